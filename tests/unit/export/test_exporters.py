import json
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest

from autocompress.core import Scheme
from autocompress.core.errors import UnknownNameError, UsageError
from autocompress.export.exporter import require, require_model
from autocompress.export.formats import EXPORTERS
from autocompress.export.targets import TARGETS
from autocompress.methods import CompressedWeight
from autocompress.models import BaseModel

from .conftest import expected_outputs, outputs


@pytest.mark.parametrize("name", list(EXPORTERS))
def test_every_exporter_says_what_it_is_and_holds_the_base_scheme(
    name: str, base: BaseModel
) -> None:
    exporter = EXPORTERS[name]
    assert exporter.name == name
    assert exporter.summary
    assert "\n" not in exporter.summary
    assert exporter.tolerance > 0
    assert all(exporter.refusal(layer, Scheme()) == "" for layer in base.layout.layers)


def test_manifests_may_name_every_format() -> None:
    schema = json.loads(files("autocompress.export").joinpath("format.schema.json").read_text())
    rule = schema["$defs"]["manifest"]["properties"]["checkpoint_format"]
    for name in EXPORTERS:
        jsonschema.validate(name, rule)


@pytest.mark.parametrize("name", ["packed", "dense"])
def test_a_format_of_this_package_writes_what_its_own_client_loads(
    name: str, base: BaseModel, weights: dict[str, CompressedWeight], tmp_path: Path
) -> None:
    exporter = EXPORTERS[name]
    manifest = exporter.write(base, weights, tmp_path / "out", claim={})
    model = exporter.load(tmp_path / "out", dtype=None, device="cpu")
    assert outputs(model, "qwen2").equal(expected_outputs(base, weights, "qwen2"))
    assert exporter.stored_bytes(tmp_path / "out") == manifest.storage_bytes


def test_a_dense_checkpoint_cannot_say_that_inputs_are_rounded(base: BaseModel) -> None:
    layer = base.layout.layers[1].name
    scheme = Scheme.parse("rtn(bits=8)+int_inputs(bits=8)")
    with pytest.raises(
        UsageError, match=rf"dense cannot hold layer {layer}: .*int_inputs"
    ) as found:
        require(EXPORTERS["dense"], base.layout, {layer: scheme})
    assert "--target" not in str(found.value)
    require(EXPORTERS["packed"], base.layout, {layer: scheme})


@pytest.mark.parametrize(
    ("name", "targets"),
    [("openvino", "openvino"), ("compressed-tensors", "transformers or vllm")],
)
def test_a_refused_layer_is_told_which_searches_fit(
    name: str, targets: str, base: BaseModel
) -> None:
    layer = base.layout.layers[1].name
    allocation = {layer: Scheme.parse("hadamard+trellis(bits=3)")}
    with pytest.raises(UsageError, match=f"member, search with --target {targets}, whose members"):
        require(EXPORTERS[name], base.layout, allocation)


def test_a_refused_model_is_named_with_its_rule(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = EXPORTERS["dense"]
    require_model(dense, base)
    monkeypatch.setattr(type(dense), "refusal_of_model", lambda self, base: "It is too nice.")
    with pytest.raises(UsageError, match="dense cannot hold this model: It is too nice"):
        require_model(dense, base)


def test_an_unknown_format_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'compressed-tensors'"):
        EXPORTERS["compressed_tensor"]


def test_targets_name_formats_that_exist() -> None:
    assert {TARGETS[t].exporter for t in TARGETS} - {""} <= set(EXPORTERS)
