"""A second reader of the packed format, from docs/format.md alone: NumPy, no torch, no methods."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from autocompress.core import Scheme
from autocompress.export import Manifest, load, stored_bytes
from autocompress.export.integrity import check_files
from autocompress.export.plan import PackedPlan
from autocompress.methods import decode

GOLDEN = Path(__file__).parents[2] / "golden" / "packed_v1"
DTYPES = {"U8": np.uint8, "F16": np.float16, "F32": np.float32}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            flat = np.frombuffer(data[start + first : start + last], DTYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def read_codes(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """Eight codes per chunk of `bits` bytes, a little-endian integer, code i at bit i * bits."""
    codes = []
    for chunk in packed.reshape(-1, bits):
        number = int.from_bytes(chunk.tobytes(), "little")
        codes += [(number >> (i * bits)) & ((1 << bits) - 1) for i in range(8)]
    return np.array(codes[:n], dtype=np.int64)


def option(scheme: str, name: str) -> str | None:
    match = re.search(rf"\b{name}=(\w+)", scheme)
    return match and match[1]


def read_matrix(tensors: dict[str, np.ndarray], scheme: str, shape: tuple[int, int]) -> np.ndarray:
    o, d = shape
    kept = np.ones(o * d, dtype=bool)
    if "mask" in tensors:
        kept = read_codes(tensors["mask"], 1, o * d).astype(bool)
    flat = np.zeros(o * d, dtype=np.float32)
    if "values" in tensors:
        flat[kept] = tensors["values"].reshape(-1)
        return flat.reshape(shape)
    bits = int(option(scheme, "bits") or 0)
    width = min(int(option(scheme, "group_size") or 0) or d, d)
    n_groups = -(-d // width)
    groups = (np.arange(o)[:, None] * n_groups + np.arange(d) // width).reshape(-1)
    zeros = np.full(o * n_groups, 1 << (bits - 1))
    if option(scheme, "symmetric") == "false":
        zeros = read_codes(tensors["zeros"], bits, o * n_groups)
    scales = tensors["scales"].astype(np.float32).reshape(-1)
    codes = read_codes(tensors["packed"], bits, int(kept.sum()))
    flat[kept] = (codes - zeros[groups[kept]]).astype(np.float32) * scales[groups[kept]]
    return flat.reshape(shape)


def read_layer(tensors: dict[str, np.ndarray], scheme: str, shape: tuple[int, int]) -> np.ndarray:
    rank = option(scheme, "rank")
    if rank is None:
        return read_matrix(tensors, scheme, shape)
    factors = [
        {name[2:]: t for name, t in tensors.items() if name.startswith(prefix)}
        for prefix in ("a.", "b.")
    ]
    outer = read_matrix(factors[0], scheme, (shape[0], int(rank)))
    return outer @ read_matrix(factors[1], scheme, (int(rank), shape[1]))


LAYERS = json.loads((GOLDEN / "config.json").read_text())["quantization_config"]["layers"]


def tensors_of(layer: str) -> dict[str, np.ndarray]:
    prefix = f"{layer}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in read_tensors(GOLDEN / "model.safetensors").items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_a_reader_made_from_the_specification_decodes_what_the_library_does(layer: str) -> None:
    entry, stored = LAYERS[layer], tensors_of(layer)
    shape = (entry["shape"][0], entry["shape"][1])
    library = decode(
        {name: torch.from_numpy(tensor.copy()) for name, tensor in stored.items()},
        Scheme.parse(entry["scheme"]),
        shape,
        torch.float32,
    )
    ours = read_layer(stored, entry["scheme"], shape)
    np.testing.assert_allclose(ours, library.numpy(), rtol=1e-5, atol=1e-6)


def test_the_golden_checkpoint_holds_every_way_of_storing_a_matrix() -> None:
    found = {name for layer in LAYERS for name in tensors_of(layer)}
    plain = {"mask", "values", "packed", "scales", "zeros"}
    assert plain <= found
    assert {"a.values", "b.values", "a.packed", "b.zeros", "b.mask"} <= found
    assert any({"mask", "packed"} <= tensors_of(layer).keys() for layer in LAYERS)
    assert any(
        "sparsity" in LAYERS[layer]["scheme"] and "mask" not in tensors_of(layer)
        for layer in LAYERS
    )


def test_a_checkpoint_of_version_1_still_loads_and_computes_the_same() -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())
    with torch.no_grad():
        logits = load(GOLDEN)(input_ids=torch.tensor([expected["tokens"]])).logits[0]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-5, atol=1e-5)


def test_the_example_in_the_specification_is_valid() -> None:
    page = (Path(__file__).parents[3] / "docs" / "format.md").read_text()
    example = json.loads(page.split("```json\n")[1].split("```")[0])
    plan = PackedPlan.from_json(example)
    assert plan.to_json() == example
    assert {"a.packed", "b.scales"} <= plan.layers[0].tensors().keys()


def test_a_manifest_of_version_1_still_holds() -> None:
    manifest = Manifest.read(GOLDEN)
    check_files(GOLDEN, manifest)
    assert manifest.storage_bytes == stored_bytes(GOLDEN)
