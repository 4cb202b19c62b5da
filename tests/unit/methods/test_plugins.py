"""Methods from outside the package: the guide's example, and entry points."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from autocompress.core.errors import UnknownNameError, UsageError
from autocompress.core.scheme import Scheme
from autocompress.methods import METHODS, compress
from autocompress.methods.schemes import plan
from autocompress.testing.method_contract import example_layer
from autocompress.workflows.methods import describe_methods
from autocompress.workflows.taxonomy import describe_taxonomy

GUIDE = Path(__file__).parents[3] / "CONTRIBUTING.md"


@pytest.fixture
def methods(monkeypatch, tmp_path):
    """`METHODS`, as it was again afterwards, looking for plug-ins in `tmp_path`."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))
    monkeypatch.setattr(METHODS, "_plugins_loaded", False)
    yield METHODS
    plan.cache_clear()
    for name in set(sys.modules) - known:
        del sys.modules[name]


def blocks():
    return re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)


def installed(folder: Path, name: str, code: str, method: str | None = None) -> None:
    """What pip leaves of a package with one module that announces one method."""
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    entry = f"[autocompress.methods]\n{method or name} = {name}\n"
    (metadata / "entry_points.txt").write_text(entry)


def test_the_example_of_the_guide_keeps_the_contract(methods, tmp_path):
    method, row = blocks()
    assert len(method.splitlines()) <= 48
    (tmp_path / "ria.py").write_text(method, encoding="utf-8")
    (tmp_path / "ria_contract.py").write_text(row, encoding="utf-8")
    importlib.import_module("ria")
    assert "ria" in methods
    importlib.import_module("ria_contract")


def test_the_example_of_the_guide_is_gone_afterwards():
    assert "ria" not in METHODS


def test_a_package_brings_a_method_by_an_entry_point(methods, tmp_path):
    installed(
        tmp_path, "outside", blocks()[0].replace('METHODS.add("ria"', 'METHODS.add("outside"')
    )
    assert "outside" not in sys.modules
    assert {"name": "outside", "package": "outside"} in describe_taxonomy()["plugins"]
    assert "outside" not in sys.modules, "listing must not import plug-ins"
    assert "outside" in [row["name"] for row in describe_methods()]
    layer = example_layer(36, 90)
    scheme = Scheme.parse("outside(sparsity=0.75)+rtn(bits=4)")
    dense = compress(layer.weight, scheme, layer.statistics).to_dense()
    assert int((dense == 0).sum()) >= round(0.75 * dense.numel())


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("", "importing broken registered nothing under that name"),
        (
            "from autocompress.methods import METHODS\nMETHODS.add('rtn', METHODS['svd'])",
            "'rtn' is already registered",
        ),
    ],
    ids=["missing dependency", "own mistake", "registers nothing", "takes a name"],
)
def test_a_broken_plugin_is_named_with_its_package_on_every_lookup(methods, tmp_path, code, reason):
    installed(tmp_path, "broken", code)
    for _ in range(2):
        with pytest.raises(UsageError) as caught:
            methods["rtn"]
        assert "compression method 'broken' comes from the package broken" in str(caught.value)
        assert reason in str(caught.value)
        assert "uninstall that package" in str(caught.value)


def test_a_name_that_no_package_brings_is_unknown(methods):
    with pytest.raises(UnknownNameError, match="Unknown compression method 'outside'"):
        methods["outside"]
