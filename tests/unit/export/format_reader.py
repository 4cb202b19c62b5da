"""A second reader of packed layers, from docs/format.md alone: NumPy, no torch, no methods."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import shake_128
from statistics import NormalDist

import numpy as np

Tensors = Mapping[str, np.ndarray]
Shape = tuple[int, int]
F32 = np.float32

SCALINGS = ("awq", "smoothquant")
KINDS = {
    "share": ("tied", "merged"),
    "width": ("ziplm", "wanda_sp", "magnitude_sp"),
    "transform": (*SCALINGS, "hadamard"),
    "factorize": ("svd", "svd_llm", "asvd", "basis_sharing"),
    "sparsify": ("magnitude", "wanda", "sparsegpt", "obs_block"),
    "quantize": (
        "rtn", "gptq", "autoround", "quantease", "cast", "fp8", "mxfp4", "nvfp4", "nf4",
        "binary", "ternary", "hqq", "kmeans", "product", "subgroup", "drop", "autoencoder",
        "trellis",
    ),
    "residual": ("eora", "lq_lora", "outlier_columns", "outlier_weights"),
    "inputs": ("int_inputs",),
}  # fmt: skip
DTYPES = {
    "U8": np.uint8, "I16": np.int16, "I32": np.int32,
    "F16": np.float16, "BF16": np.uint16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip
NF4 = (
    "-1 -0.6961928010 -0.5250730515 -0.3949174881 -0.2844413817 -0.1847734302 -0.0910500363 0 "
    "0.0795802996 0.1609302014 0.2461123019 0.3379152417 0.4407098293 0.5626170039 0.7229568362 1"
)


@dataclass(frozen=True)
class Stage:
    method: str
    options: Mapping[str, str]

    def number(self, name: str) -> int:
        return int(self.options[name])

    def share(self, name: str) -> float:
        return float(self.options[name])


def read_scheme(text: str) -> dict[str, Stage]:
    """The stages of a scheme by what they do."""
    stages = {}
    for part in text.split("+") if text != "base" else ():
        method, _, options = part.removesuffix(")").partition("(")
        kind = next((kind for kind, methods in KINDS.items() if method in methods), None)
        if kind is None:
            raise ValueError(f"unknown method {method}")
        stages[kind] = Stage(method, dict(o.split("=") for o in options.split(",") if o))
    return stages


def read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file; bfloat16 as float32."""
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            flat = np.frombuffer(data[start + first : start + last], DTYPES[entry["dtype"]])
            flat = _bfloat16(flat) if entry["dtype"] == "BF16" else flat
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def under(prefix: str, tensors: Tensors) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def layer_tensors(name: str, scheme: str, tensors: Tensors) -> dict[str, np.ndarray]:
    """What a layer decodes from, by name within it: its own, and what it shares with another."""
    first = lender(name, scheme)
    lent = {n: t for n, t in under(f"{first}.", tensors).items() if is_shared(n, scheme)}
    return lent | under(f"{name}.", tensors)


def lender(name: str, scheme: str) -> str:
    """The layer that stores what the layers share; the layer itself if it does not share."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    for stage in read_scheme(scheme).values():
        for option, place in (("blocks", 0), ("experts", -1)):
            if option in stage.options:
                parts[numbers[place]] = stage.options[option].split("/")[0]
    return ".".join(parts)


def is_shared(tensor: str, scheme: str) -> bool:
    """Whether the layers that share store that tensor once."""
    methods = {stage.method for stage in read_scheme(scheme).values()}
    if methods & {"tied", "merged"}:
        return not tensor.startswith("r.")
    if "autoencoder" in methods:
        return tensor.startswith("decoder_")
    return "basis_sharing" in methods and tensor.startswith("b.")


def read_layer(tensors: Tensors, scheme: str, shape: Shape) -> np.ndarray:
    """W = (C + R) / T."""
    stages = read_scheme(scheme)
    if "width" in stages:
        rows, columns = read_width(tensors, stages["width"], shape)
        matrix = np.zeros(shape, dtype=F32)
        inside = scheme.partition("+")[2] or "base"
        matrix[np.ix_(rows, columns)] = read_layer(tensors, inside, (len(rows), len(columns)))
        return matrix
    quantize = stages.get("quantize")
    if "factorize" in stages:
        rank = stages["factorize"].number("rank")
        outer = read_matrix(under("a.", tensors), quantize, (shape[0], rank))
        matrix = outer.astype(F32) @ read_matrix(
            under("b.", tensors), quantize, (rank, shape[1])
        ).astype(F32)
    else:
        matrix = read_matrix(tensors, quantize, shape)
    if "residual" in stages:
        residual = read_residual(under("r.", tensors), stages["residual"], shape)
        matrix = matrix.astype(F32) + residual
    if "transform" in stages:
        matrix = undo(matrix.astype(F32), under("t.", tensors), stages["transform"])
    return matrix


def read_width(tensors: Tensors, stage: Stage, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns that are left."""
    kept = read_codes(tensors["w.kept"], 1, stage.number("of"))
    assert kept.sum() == stage.number("keep")
    cut = 0 if "by" in stage.options else 1
    sides = [np.arange(size) for size in shape]
    sides[cut] = np.flatnonzero(np.repeat(kept, shape[cut] // len(kept)))
    return sides[0], sides[1]


# One matrix


def read_codes(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """Eight codes per chunk of `bits` bytes, a little-endian integer, code i at bit i * bits."""
    assert packed.shape == (packed_bytes(n, bits),)
    codes = []
    for chunk in packed.reshape(-1, bits):
        number = int.from_bytes(chunk.tobytes(), "little")
        codes += [(number >> (i * bits)) & ((1 << bits) - 1) for i in range(8)]
    return np.array(codes[:n], dtype=np.int64)


def packed_bytes(n: int, bits: int) -> int:
    return -(-n // 8) * bits


def read_matrix(tensors: Tensors, quantize: Stage | None, shape: Shape) -> np.ndarray:
    n = shape[0] * shape[1]
    if quantize is not None and quantize.method == "drop":
        return np.zeros(shape, dtype=F32)
    kept = np.ones(n, dtype=bool)
    if "mask" in tensors:
        kept = read_codes(tensors["mask"], 1, n).astype(bool)
    if quantize is None:
        values = tensors["values"].reshape(-1)
        flat = np.zeros(n, dtype=values.dtype)
        flat[kept] = values
        return flat.reshape(shape)
    whole = {
        "subgroup": read_bands,
        "product": read_product,
        "trellis": read_paths,
        "autoencoder": read_pieces,
    }
    if quantize.method in whole:
        return whole[quantize.method](tensors, quantize, shape)
    if quantize.method == "cast":
        flat = np.zeros(n, dtype=F32)
        flat[kept] = read_cast(tensors["packed"], quantize.options["dtype"])
        return flat.reshape(shape)
    codes = np.zeros(n, dtype=np.int64)
    codes[kept] = read_codes(tensors["packed"], bits_of(quantize), int(kept.sum()))
    entries = CODINGS[quantize.method](codes.reshape(shape), tensors, quantize)
    return np.where(kept.reshape(shape), entries, F32(0))


def bits_of(stage: Stage) -> int:
    if stage.method == "product":
        return stage.number("codewords").bit_length() - 1
    fixed = {"fp8": 8, "mxfp4": 4, "nvfp4": 4, "nf4": 4, "binary": 1, "ternary": 2}
    return fixed.get(stage.method) or stage.number("bits")


def width_of(stage: Stage, d: int) -> int:
    fixed = {"mxfp4": 32, "nvfp4": 16}
    size = fixed[stage.method] if stage.method in fixed else stage.number("group_size")
    return min(size or d, d)


def per_entry(groups: np.ndarray, stage: Stage, d: int) -> np.ndarray:
    """(o, d) of (o, G)."""
    wide = np.repeat(groups, width_of(stage, d), axis=1)[:, :d]
    return wide.astype(F32) if wide.dtype == np.float16 else wide


def floats(codes: np.ndarray, exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """E2M1, E4M3, E5M2."""
    codes = codes.astype(np.int64)
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) + ((exponent > 0) << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    sizes = np.ldexp(F32(1) * mantissa, np.maximum(exponent, 1) - bias - mantissa_bits)
    signs = np.where(codes >> (exponent_bits + mantissa_bits), F32(-1), F32(1))
    return (signs * sizes).astype(F32)


def read_grid(codes: np.ndarray, tensors: Tensors, stage: Stage) -> np.ndarray:
    d, scales, bits = codes.shape[1], tensors["scales"], bits_of(stage)
    zeros = np.full(scales.shape, 1 << (bits - 1))
    if stage.options.get("symmetric") == "false":
        zeros = read_codes(tensors["zeros"], bits, scales.size).reshape(scales.shape)
    offsets = codes - per_entry(zeros, stage, d)
    return offsets.astype(F32) * per_entry(scales, stage, d)


def read_levels(codes: np.ndarray, tensors: Tensors, stage: Stage) -> np.ndarray:
    """The codings whose entries are L[q] s."""
    scales = tensors["scales"]
    if stage.method == "fp8":
        levels = floats(codes, 4, 3) if stage.options["format"] == "e4m3" else floats(codes, 5, 2)
    elif stage.method == "mxfp4":
        levels, scales = floats(codes, 2, 1), np.ldexp(F32(1), scales.astype(np.int64) - 127)
    elif stage.method == "nvfp4":
        levels, scales = floats(codes, 2, 1), floats(scales, 4, 3) * tensors["matrix_scale"]
    elif stage.method == "nf4":
        levels = np.array(NF4.split(), dtype=np.float64).astype(F32)[codes]
        if stage.options["double_quantization"] == "true":
            blocks = tensors["block_scales"][np.arange(scales.size).reshape(scales.shape) // 256]
            scales = floats(scales, 4, 3) * blocks + tensors["mean_scale"]
    else:
        levels = {"binary": codes * 2 - 1, "ternary": codes - 1}[stage.method].astype(F32)
    return levels * per_entry(scales, stage, codes.shape[1])


def read_float_zeros(codes: np.ndarray, tensors: Tensors, stage: Stage) -> np.ndarray:
    zeros, scales = (per_entry(tensors[n], stage, codes.shape[1]) for n in ("zeros", "scales"))
    return (codes.astype(F32) - zeros) * scales


def read_codebooks(codes: np.ndarray, tensors: Tensors, stage: Stage) -> np.ndarray:
    return np.take_along_axis(tensors["codebook"].astype(F32), codes, axis=1)


CODINGS: dict[str, Callable[[np.ndarray, Tensors, Stage], np.ndarray]] = {
    "rtn": read_grid,
    "gptq": read_grid,
    "autoround": read_grid,
    "quantease": read_grid,
    "hqq": read_float_zeros,
    "kmeans": read_codebooks,
    **dict.fromkeys(("fp8", "mxfp4", "nvfp4", "nf4", "binary", "ternary"), read_levels),
}


def read_cast(packed: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float16":
        return packed.view("<f2").astype(F32)
    return _bfloat16(packed.view("<u2"))


def _bfloat16(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(F32)


def read_product(tensors: Tensors, stage: Stage, shape: Shape) -> np.ndarray:
    n = shape[0] * shape[1] // stage.number("block")
    codes = read_codes(tensors["packed"], bits_of(stage), n)
    return tensors["codebook"].astype(F32)[codes].reshape(shape)


def read_paths(tensors: Tensors, stage: Stage, shape: Shape) -> np.ndarray:
    bits, (o, d) = stage.number("bits"), shape
    codes = read_codes(tensors["packed"], bits, o * d).reshape(shape)
    found = np.empty(shape, dtype=F32)
    n_cycles = max(1, o // 256)
    for i in range(o):
        cycle = min(i // 256, n_cycles - 1)
        start, stop = 256 * cycle, (o if cycle == n_cycles - 1 else 256 * cycle + 256)
        state, row = np.zeros(d, dtype=np.int64), i
        for back in range(0, 12, bits):
            state |= codes[row] << back
            row = row - 1 if row > start else stop - 1
        places = state % 4096 * 979 % 4096
        values = [NormalDist().inv_cdf((place + 0.5) / 4096) for place in places]
        found[i] = np.array(values).astype(np.float16).astype(F32) * F32(tensors["scales"][i])
    return found


def read_pieces(tensors: Tensors, stage: Stage, shape: Shape) -> np.ndarray:
    latents = stage.number("latents")
    n = shape[0] * shape[1] // stage.number("piece") * latents
    signs = (2 * read_codes(tensors["packed"], 1, n) - 1).reshape(-1, latents).astype(F32)
    found = signs @ tensors["decoder_linear"].astype(F32).T
    if stage.number("hidden"):
        names = ("decoder_inner", "decoder_bias", "decoder_outer")
        inner, bias, outer = (tensors[name].astype(F32) for name in names)
        bent = signs @ inner.T + bias
        found += np.where(bent < 0, bent * F32(0.125), bent) @ outer.T
    found = found.reshape(shape) * tensors["columns"].astype(F32)
    return found * tensors["scales"].astype(F32)[:, None]


def read_bands(tensors: Tensors, stage: Stage, shape: Shape) -> np.ndarray:
    n_bands, packed = stage.number("bands"), tensors["packed"]
    widths, start = packed[:n_bands], n_bands
    rows, n = shape[0] // n_bands, shape[0] // n_bands * shape[1]
    assert widths.sum() == total_width(stage)
    offsets = np.zeros((n_bands, n), dtype=np.int64)
    for width in (8, 4, 2):
        for band in np.flatnonzero(widths == width):
            stop = start + packed_bytes(n, width)
            offsets[band] = read_codes(packed[start:stop], width, n) - (1 << (width - 1))
            start = stop
    assert start == len(packed)
    matrix = offsets.reshape(n_bands * rows, shape[1]).astype(F32)
    return matrix * per_entry(tensors["scales"], stage, shape[1])


def total_width(stage: Stage) -> int:
    bands = stage.number("bands")
    total = 2 * round(stage.share("average") * bands / 2)
    return total - 2 if total == 8 * bands - 2 else total


# Residuals, transforms, inputs


def read_residual(tensors: Tensors, stage: Stage, shape: Shape) -> np.ndarray:
    if stage.method in ("eora", "lq_lora"):
        rank = stage.number("rank")
        quantize = correction_grid(stage)
        outer, inner = (
            read_matrix(under(prefix, tensors), quantize, (rank, side)).astype(F32)
            for prefix, side in zip(("a.", "b."), shape, strict=True)
        )
        return outer.T @ inner
    residual = np.zeros(shape, dtype=F32)
    index, values = tensors["index"].astype(np.int64), tensors["values"].astype(F32)
    if stage.method == "outlier_columns":
        residual[:, index] = values
    elif "counts" in tensors:
        residual[np.repeat(np.arange(shape[0]), tensors["counts"]), index] = values
    else:
        residual.reshape(-1)[index] = values
    return residual


def correction_grid(stage: Stage) -> Stage | None:
    bits = stage.options["bits"]
    return None if bits == "16" else Stage("rtn", {"bits": bits, "group_size": "64"})


def undo(rows: np.ndarray, tensors: Tensors, stage: Stage) -> np.ndarray:
    """x / T for each row x."""
    if stage.method in SCALINGS:
        return rows / tensors["scales"].astype(F32)
    signs = signs_of(stage, rows.shape[1])
    return mixed(rows, transposed=False) * signs


def apply(rows: np.ndarray, tensors: Tensors, stage: Stage) -> np.ndarray:
    """x T for each row x."""
    if stage.method in SCALINGS:
        return rows * tensors["scales"].astype(F32)
    return mixed(rows * signs_of(stage, rows.shape[1]), transposed=True)


def signs_of(stage: Stage, d: int) -> np.ndarray:
    text = f"autocompress hadamard {stage.number('seed')}"
    stream = np.frombuffer(shake_128(text.encode()).digest(-(-d // 8)), dtype=np.uint8)
    return np.where(np.unpackbits(stream, count=d, bitorder="little"), F32(1), F32(-1))


def mixed(rows: np.ndarray, *, transposed: bool) -> np.ndarray:
    """C X H, or C^T X H, of each row X."""
    d = rows.shape[1]
    n = d & -d
    m = d // n
    found, half = rows.reshape(-1, n), 1
    while half < n:
        low, high = found.reshape(-1, n // (2 * half), 2, half).transpose(2, 0, 1, 3)
        found, half = np.stack((low + high, low - high), axis=2).reshape(-1, n), 2 * half
    found = found * F32(1 / math.sqrt(n))
    if m > 1:
        k, j = np.arange(m)[:, None], np.arange(m)
        cosines = np.cos(np.pi / m * (j + 0.5) * k) * math.sqrt(2 / m)
        cosines[0] /= math.sqrt(2)
        cosines = cosines.astype(F32)
        found = (cosines.T if transposed else cosines) @ found.reshape(-1, m, n)
    return found.reshape(rows.shape)


def round_inputs(rows: np.ndarray, tensors: Tensors, scheme: str) -> np.ndarray:
    """What inputs (tokens, d) float32 become."""
    stages = read_scheme(scheme)
    if "width" in stages:
        inside = scheme.partition("+")[2]
        if "by" in stages["width"].options:
            return round_inputs(rows, tensors, inside)
        _, left = read_width(tensors, stages["width"], (1, rows.shape[1]))
        found = rows.copy()
        found[:, left] = round_inputs(rows[:, left], tensors, inside)
        return found
    transform, moved = stages.get("transform"), under("t.", tensors)
    if transform is not None:
        change = undo if transform.method in SCALINGS else apply
        rows = change(rows, moved, transform)
    aside = np.empty(0, dtype=np.int64)
    if "residual" in stages and stages["residual"].method == "outlier_columns":
        aside = tensors["r.index"].astype(np.int64)
    found = rows.copy()
    found[:, aside] = 0
    largest = F32((1 << (stages["inputs"].number("bits") - 1)) - 1)
    scale = np.maximum(np.abs(found).max(1, keepdims=True) / largest, F32(2.0**-126))
    found = np.round(found / scale) * scale
    found[:, aside] = rows[:, aside]
    if transform is not None:
        change = apply if transform.method in SCALINGS else undo
        found = change(found, moved, transform)
    return found
