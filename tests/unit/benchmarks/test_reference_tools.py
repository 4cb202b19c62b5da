from __future__ import annotations

import math
import sys

import pytest
import reference_tools as tools
import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import METHODS, check, compress
from autocompress.testing.method_contract import example_layer


@pytest.fixture(scope="module")
def layer():
    made = example_layer(64, 128)
    return tools.Layer(made.spec, made.weight.float(), made.statistics)


def test_every_setting_is_compared_once_with_a_scheme_that_a_layer_takes(layer):
    found = list(tools.comparisons())
    assert len({(c.package, c.setting) for c in found}) == len(found)
    for comparison in found:
        scheme = Scheme.parse(comparison.ours)
        if all(stage.method in METHODS for stage in scheme.stages):
            check(layer.spec, scheme)
    assert len({c.package for c in found}) == 6


def test_a_tool_that_is_ours_has_ratio_one(layer, monkeypatch):
    monkeypatch.setattr(tools, "version", lambda package: "1.0")

    def ours(weight, hessian):
        dense = compress(weight, Scheme.parse("rtn(bits=3)"), layer.statistics).to_dense()
        weight.zero_()
        hessian.zero_()
        return dense

    row = tools.compare(tools.Comparison("mine", "x", "rtn(bits=3)", ours), [layer, layer])
    assert (row["ratio"], row["worst_ratio"], row["within_2_percent"]) == (1.0, 1.0, True)
    assert 0 < row["losses"]["ours"][0] < 1
    assert bool(layer.weight.any()), "a tool must get copies"


def test_the_ratio_is_a_geometric_mean_and_two_percent_is_the_limit():
    found = tools.summary([1.0, 4.0], [2.0, 2.0])
    assert found == {"ratio": 1.0, "worst_ratio": 2.0, "within_2_percent": True}
    assert not tools.summary([1.03], [1.0])["within_2_percent"]
    assert math.isclose(tools.summary([2.0, 8.0], [1.0, 1.0])["ratio"], 4.0)


@pytest.mark.parametrize("package", ["hqq", "bitsandbytes", "torchao", "auto_round", "gptqmodel"])
def test_a_tool_that_is_missing_is_an_import_error(layer, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    comparison = next(c for c in tools.comparisons() if c.package.replace("-", "_") == package)
    with pytest.raises(ImportError):
        comparison.theirs(torch.zeros(4, 128), torch.eye(128))
