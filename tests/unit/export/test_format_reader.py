"""docs/format.md says enough: a reader made from it alone decodes what the library does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from autocompress.core import Scheme
from autocompress.core.errors import CheckpointError
from autocompress.export import Manifest, load, stored_bytes
from autocompress.export.integrity import check_files
from autocompress.export.plan import PackedLayer, PackedPlan
from autocompress.methods import (
    METHODS,
    CompressedWeight,
    LayerStatistics,
    canonical,
    compress,
    decode,
    input_map,
)

from .format_layouts import layout
from .format_reader import (
    KINDS,
    is_shared,
    layer_tensors,
    lender,
    read_layer,
    read_scheme,
    read_tensors,
    round_inputs,
)

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
CHECKPOINTS = (
    "packed_v1",
    "packed_methods",
    "packed_smoothquant",
    "packed_sharing",
    "packed_experts",
    "packed_autoencoder",
    "packed_width",
    "packed_trellis",
)
LAYERS = {
    (checkpoint, name): layer
    for checkpoint in CHECKPOINTS
    for name, layer in json.loads((GOLDEN / checkpoint / "config.json").read_text())[
        "quantization_config"
    ]["layers"].items()
}

# Of matrices (24, 40): rows have ragged groups, and 40 = 5 x 8 for the rotation.
SCHEMES = (
    "rtn(bits=4,group_size=16)",
    "gptq(bits=3,group_size=12,symmetric=false)",
    "autoround(bits=3,group_size=12,iterations=10)",
    "quantease(bits=2,group_size=16,symmetric=false,rounds=1)",
    "wanda(sparsity=0.6)+gptq(bits=5,group_size=0,symmetric=false)",
    "magnitude(sparsity=0.6)",
    "magnitude(sparsity=0.01)+rtn(bits=2)",
    "wanda(pattern=2:4)",
    "wanda(sparsity=0.55,refit=true)+rtn(bits=8)",
    "sparsegpt(pattern=1:4)+kmeans(bits=3)",
    "sparsegpt(sparsity=0.35)",
    "obs_block(sparsity=0.7)+gptq(bits=6)",
    "cast",
    "cast(dtype=float16)",
    "wanda(sparsity=0.5)+cast",
    "fp8",
    "fp8(format=e5m2,group_size=12)",
    "magnitude(sparsity=0.5)+fp8(group_size=16)",
    "mxfp4",
    "wanda(sparsity=0.6)+mxfp4",
    "nvfp4",
    "wanda(sparsity=0.6)+nvfp4",
    "nf4",
    "nf4(group_size=3)",  # more than 256 scales
    "nf4(group_size=16,double_quantization=false)",
    "wanda(sparsity=0.6)+nf4(group_size=16)",
    "binary(group_size=12)",
    "ternary(group_size=12)",
    "wanda(sparsity=0.7)+ternary(group_size=0)",
    "hqq(bits=3,group_size=12)",
    "kmeans(bits=4)",
    "kmeans(bits=2,compensate=false)",
    "product(block=8,codewords=16)",
    "product(block=2,codewords=64)",
    "trellis(bits=3)",
    "trellis(bits=5)",
    "subgroup(bits=4-2-0-8,group_size=16)",
    "subgroup(bands=3,average=3.3)",
    "subgroup(bands=2,average=7)",
    "drop",
    "awq(search=4)+gptq(bits=3,group_size=16)",
    "awq(search=4)",
    "smoothquant(alpha=0.7)+rtn(bits=8,group_size=0)",
    "rtn+outlier_columns(share=0.1)",
    "hqq+outlier_columns(share=0.01)",
    "rtn(bits=3)+outlier_weights(share=0.1)",
    "binary+outlier_weights(share=0.01)",
    "wanda(sparsity=0.6)+outlier_weights(share=0.1)",
    "awq(search=4)+kmeans(bits=2)+outlier_columns(share=0.05)",
    "ziplm(keep=13,of=20)",
    "wanda_sp(keep=4,of=5)+wanda(sparsity=0.6)+gptq(bits=3,group_size=16)",
    "magnitude_sp(keep=7,of=40)+awq(search=4)+rtn+outlier_columns(share=0.1)",
)
"""Decoded without matrix products: equal bit for bit."""

PRODUCTS = (
    "svd(rank=7)",
    "svd_llm(rank=9)+nf4(group_size=16)",
    "asvd(rank=8)+wanda(sparsity=0.5)+gptq(bits=4,group_size=8,symmetric=false)",
    "rtn(bits=3)+eora(rank=3)",
    "mxfp4+lq_lora(rank=2,bits=5)",
    "eora(rank=24,bits=8)",
    "hadamard+rtn",
    "hadamard(seed=3)+wanda(sparsity=0.5)+gptq(bits=4)+eora(rank=2,bits=4)",
    "hadamard(seed=2)+subgroup(bands=4)+outlier_columns(share=0.1)",
    "awq(search=4)+svd_llm(rank=9)+rtn(bits=6)+outlier_weights(share=0.1)",
)

INPUTS = (
    "int_inputs",
    "rtn+int_inputs(bits=5)",
    "rtn+outlier_columns(share=0.1)+int_inputs(bits=4)",
    "awq(search=4)+rtn+outlier_columns(share=0.1)+int_inputs",
    "awq(search=4)+rtn+eora(rank=2)+int_inputs(bits=6)",
    "smoothquant+rtn(bits=8,group_size=0)+int_inputs",
    "hadamard(seed=5)+rtn+outlier_columns(share=0.1)+int_inputs",
    "hadamard+outlier_weights+int_inputs(bits=7)",
    "ziplm(keep=3,of=4)+awq(search=4)+rtn+int_inputs",
)


def compressed(
    scheme: str, shape: tuple[int, int] = (24, 40), dtype: torch.dtype = torch.float32
) -> CompressedWeight:
    """A matrix of a few loud weights, with correlated inputs of which some are loud."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator) * 0.1
    weight.view(-1)[::97] *= 8
    statistics = LayerStatistics.none()
    if shape[1] < 1000:
        rows = torch.randn(300, shape[1], generator=generator)
        rows = rows @ torch.randn(shape[1], shape[1], generator=generator)
        rows[:, ::7] *= 4
        statistics = LayerStatistics(rows.T @ rows / len(rows), len(rows), "random")
    return compress(weight.to(dtype), Scheme.parse(scheme), statistics)


def decoded_twice(weight: CompressedWeight) -> tuple[np.ndarray, np.ndarray]:
    """Ours, from the bytes of a file, and the library's."""
    ours = read_layer(read_tensors(save(dict(weight.tensors))), str(weight.scheme), weight.shape)
    library = decode(weight.tensors, weight.scheme, weight.shape, torch.float32)
    return ours.astype(np.float32), library.numpy()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_coding_decodes_bit_for_bit(scheme: str) -> None:
    ours, library = decoded_twice(compressed(scheme))
    np.testing.assert_array_equal(ours, library)


@pytest.mark.parametrize("scheme", PRODUCTS)
def test_products_decode_up_to_rounding(scheme: str) -> None:
    ours, library = decoded_twice(compressed(scheme))
    np.testing.assert_allclose(ours, library, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        ("hadamard(seed=9)+rtn(bits=4)", (6, 64)),
        ("hadamard+nf4", (6, 32)),
        ("hadamard", (3, 1)),
        ("cast+outlier_columns(share=0.0001)", (2, 32769)),  # indices of four bytes
        ("cast+outlier_columns(share=0.0001)", (2, 32768)),
        ("cast+outlier_weights(share=0.0001)", (2, 32767)),  # by row
        ("cast+outlier_weights(share=0.0001)", (2, 32768)),
        ("sparsegpt(sparsity=0.6)", (3, 300)),  # blocks of 128
    ],
)
def test_shapes_at_which_the_storage_changes(scheme: str, shape: tuple[int, int]) -> None:
    weight = compressed(scheme, shape)
    ours, library = decoded_twice(weight)
    np.testing.assert_array_equal(ours, library)
    assert layout(str(weight.scheme), shape, "float32") == announced(
        weight.scheme, shape, "float32"
    )


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_plain_values_keep_the_dtype_of_the_layer(dtype: str) -> None:
    for scheme in ("wanda(sparsity=0.5)", "awq(search=2)", "outlier_columns", "magnitude+rtn"):
        ours, library = decoded_twice(compressed(scheme, dtype=getattr(torch, dtype)))
        np.testing.assert_array_equal(ours, library)


@pytest.mark.parametrize("scheme", INPUTS)
@pytest.mark.parametrize("d", [40, 32])
def test_inputs_are_rounded_as_the_page_says(scheme: str, d: int) -> None:
    weight = compressed(scheme, (24, d))
    mapped = input_map(weight.tensors, weight.scheme)
    assert mapped is not None
    rows = torch.randn(5, d, generator=torch.Generator().manual_seed(2))
    rows[3] = 0
    stored = read_tensors(save(dict(weight.tensors)))
    ours = round_inputs(rows.numpy(), stored, str(weight.scheme))
    library = mapped(rows).numpy()
    if d == 32 or not scheme.startswith("hadamard"):
        np.testing.assert_array_equal(ours, library)
    np.testing.assert_allclose(ours, library, rtol=1e-5, atol=1e-5)


def announced(
    scheme: Scheme, shape: tuple[int, int], dtype: str, name: str = "layer"
) -> dict[str, tuple[tuple[int, ...], str]]:
    layer = PackedLayer(name, scheme, shape, dtype, "linear")
    return {name: (entry.shape, entry.dtype) for name, entry in layer.tensors().items()}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_scheme_and_shape_determine_the_tensors_as_the_page_says(dtype: str) -> None:
    for text in SCHEMES + PRODUCTS + INPUTS:
        scheme = canonical(Scheme.parse(text))
        assert layout(str(scheme), (24, 40), dtype) == announced(scheme, (24, 40), dtype), text


def test_the_page_knows_every_method() -> None:
    page = (ROOT / "docs" / "format.md").read_text()
    known = {method for methods in KINDS.values() for method in methods}
    assert known == set(METHODS), "docs/format.md and format_reader.py get each new method"
    assert not [method for method in known if f"`{method}`" not in page]


def tensors_of(checkpoint: str, layer: str) -> dict[str, np.ndarray]:
    data = (GOLDEN / checkpoint / "model.safetensors").read_bytes()
    return layer_tensors(layer, LAYERS[checkpoint, layer]["scheme"], read_tensors(data))


@pytest.mark.parametrize(("checkpoint", "layer"), sorted(LAYERS))
def test_committed_layers_decode_the_same_in_both(checkpoint: str, layer: str) -> None:
    entry, stored = LAYERS[checkpoint, layer], tensors_of(checkpoint, layer)
    shape = (entry["shape"][0], entry["shape"][1])
    library = decode(
        {name: torch.from_numpy(tensor.copy()) for name, tensor in stored.items()},
        Scheme.parse(entry["scheme"]),
        shape,
        torch.float32,
    )
    ours = read_layer(stored, entry["scheme"], shape)
    np.testing.assert_allclose(ours, library.numpy(), rtol=1e-5, atol=1e-6)


def test_the_page_says_which_layer_stores_what_layers_share() -> None:
    said = ("blocks=", "experts=")
    sharing = {key: e for key, e in LAYERS.items() if any(s in e["scheme"] for s in said)}
    assert all(any(s in e["scheme"] for e in sharing.values()) for s in said)
    for (_, name), entry in sharing.items():
        shape = (entry["shape"][0], entry["shape"][1])
        announced_here = announced(Scheme.parse(entry["scheme"]), shape, entry["dtype"], name)
        own = lender(name, entry["scheme"]) == name
        by_the_page = {
            tensor: found
            for tensor, found in layout(entry["scheme"], shape, entry["dtype"]).items()
            if own or not is_shared(tensor, entry["scheme"])
        }
        assert announced_here == by_the_page, name


def test_the_golden_checkpoints_hold_every_way_of_storing_a_matrix() -> None:
    found = {name: set(tensors_of(*name)) for name in LAYERS}
    held = set().union(*found.values())
    assert {"mask", "values", "packed", "scales", "zeros", "codebook", "matrix_scale"} <= held
    assert {"block_scales", "mean_scale", "t.scales", "r.index", "r.counts", "r.values"} <= held
    assert {"a.values", "b.values", "a.packed", "b.zeros", "b.mask"} <= held
    assert {"r.a.values", "r.b.values", "r.a.packed", "r.b.scales", "w.kept"} <= held
    assert any({"mask", "packed"} <= names for names in found.values())
    assert any("r.index" in names and "r.counts" not in names for names in found.values())
    assert any(
        "sparsity" in LAYERS[name]["scheme"] and "mask" not in names
        for name, names in found.items()
    )


def test_the_golden_checkpoints_hold_every_method() -> None:
    used = {stage.method for e in LAYERS.values() for stage in read_scheme(e["scheme"]).values()}
    assert set(METHODS) == used


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_checkpoint_of_version_1_still_loads_and_computes_the_same(checkpoint: str) -> None:
    expected = json.loads((GOLDEN / checkpoint / "expected.json").read_text())
    model = load(GOLDEN / checkpoint)
    for name, outputs in expected.get("outputs", {}).items():
        with torch.no_grad():
            found = model.get_submodule(name)(probe(model.get_submodule(name)))
        torch.testing.assert_close(found, torch.tensor(outputs), rtol=1e-5, atol=1e-6, msg=name)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([expected["tokens"]])).logits[0]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-5, atol=1e-5)


def probe(layer: torch.nn.Module) -> torch.Tensor:
    """What `make_packed_methods.py` put in."""
    if isinstance(layer, torch.nn.Embedding):
        return torch.arange(layer.num_embeddings)
    n = 2 * layer.in_features
    return ((7919 * torch.arange(1, n + 1) % 1009 - 504).double() / 331).float().view(2, -1)


def test_a_method_that_this_version_does_not_know_is_refused_by_name() -> None:
    entry = {"shape": [24, 40], "dtype": "float32", "kind": "linear", "aliases": []}
    for scheme, culprit in (
        ("wavelet(bits=3)", "Unknown compression method 'wavelet'"),
        ("rtn(bits=4,phase=2)", "rtn has no option 'phase'"),
    ):
        layers = {"model.up": entry | {"scheme": scheme}}
        config = {"quant_method": "autocompress", "version": 1, "dtype": "float32"}
        plan = PackedPlan.from_json(config | {"layers": layers})
        with pytest.raises(CheckpointError, match=f"Layer model.up .* {culprit}.* Next step"):
            plan.layers[0].tensors()


def test_the_example_in_the_specification_is_valid() -> None:
    page = (ROOT / "docs" / "format.md").read_text()
    example = json.loads(page.split("```json\n")[1].split("```")[0])
    plan = PackedPlan.from_json(example)
    assert plan.to_json() == example
    assert {"a.packed", "b.scales"} <= plan.layers[0].tensors().keys()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_manifest_of_version_1_still_holds(checkpoint: str) -> None:
    manifest = Manifest.read(GOLDEN / checkpoint)
    check_files(GOLDEN / checkpoint, manifest)
    assert manifest.storage_bytes == stored_bytes(GOLDEN / checkpoint)
