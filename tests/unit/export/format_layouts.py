"""Shapes and dtypes that scheme and shape determine, from docs/format.md alone."""

from __future__ import annotations

from .format_reader import (
    SCALINGS,
    Shape,
    Stage,
    bits_of,
    correction_grid,
    packed_bytes,
    read_scheme,
    total_width,
    width_of,
)

Layout = dict[str, tuple[tuple[int, ...], str]]
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def layout(scheme: str, shape: Shape, dtype: str) -> Layout:
    """Shape and dtype of every stored tensor."""
    stages = read_scheme(scheme)
    if "width" in stages:
        width = stages["width"]
        left = [*shape]
        left["by" not in width.options] //= width.number("of")
        left["by" not in width.options] *= width.number("keep")
        inside = layout(scheme.partition("+")[2] or "base", (left[0], left[1]), dtype)
        return {"w.kept": ((packed_bytes(width.number("of"), 1),), "uint8")} | inside
    inner = (stages.get("sparsify"), stages.get("quantize"))
    if "factorize" in stages:
        rank = stages["factorize"].number("rank")
        found = _prefixed("a.", matrix_layout(*inner, (shape[0], rank), dtype))
        found |= _prefixed("b.", matrix_layout(*inner, (rank, shape[1]), dtype))
    else:
        found = matrix_layout(*inner, shape, dtype)
    if "residual" in stages:
        found |= _prefixed("r.", residual_layout(stages["residual"], shape))
    if "transform" in stages and stages["transform"].method in SCALINGS:
        found["t.scales"] = (shape[1],), "float16"
    return found


def _prefixed(prefix: str, found: Layout) -> Layout:
    return {f"{prefix}{name}": entry for name, entry in found.items()}


def matrix_layout(
    sparsify: Stage | None, quantize: Stage | None, shape: Shape, dtype: str
) -> Layout:
    n = shape[0] * shape[1]
    found: Layout = {}
    if quantize is not None and quantize.method == "drop":
        return found
    n_stored = n

    def size(count: int) -> int:
        return count * BYTES[dtype] if quantize is None else code_bytes(quantize, count)

    if sparsify is not None:
        n_kept = kept_of(sparsify, shape)
        if packed_bytes(n, 1) + size(n_kept) < size(n):
            n_stored, found["mask"] = n_kept, ((packed_bytes(n, 1),), "uint8")
    if quantize is None:
        return found | {"values": (shape if "mask" not in found else (n_stored,), dtype)}
    found["packed"] = (size(n_stored),), "uint8"
    return found | parameter_layout(quantize, shape)


def kept_of(stage: Stage, shape: Shape) -> int:
    o, d = shape
    if "pattern" in stage.options:
        kept, width = map(int, stage.options["pattern"].split(":"))
        return o * d * kept // width

    def kept_among(n: int) -> int:
        return max(1, n - round(stage.share("sparsity") * n))

    if stage.method == "magnitude":
        return kept_among(o * d)
    if stage.method == "sparsegpt":
        return sum(kept_among(o * min(128, d - start)) for start in range(0, d, 128))
    return o * kept_among(d)


def code_bytes(stage: Stage, n: int) -> int:
    """Bytes of `packed` for n entries."""
    if stage.method == "cast":
        return 2 * n
    if stage.method == "subgroup":
        bands = stage.number("bands")
        return bands + packed_bytes(n // bands, 1) * total_width(stage)
    if stage.method == "product":
        n //= stage.number("block")
    if stage.method == "autoencoder":
        return packed_bytes(n // stage.number("piece") * stage.number("latents"), 1)
    return packed_bytes(n, bits_of(stage))


def parameter_layout(stage: Stage, shape: Shape) -> Layout:
    """Of what lies beside `packed`."""
    if stage.method == "cast":
        return {}
    if stage.method == "kmeans":
        return {"codebook": ((shape[0], 1 << bits_of(stage)), "float16")}
    if stage.method == "product":
        return {"codebook": ((stage.number("codewords"), stage.number("block")), "float16")}
    if stage.method == "trellis":
        return {"scales": ((shape[0],), "float16")}
    if stage.method == "autoencoder":
        return piece_layout(stage, shape)
    return scale_layout(stage, (shape[0], -(-shape[1] // width_of(stage, shape[1]))))


def piece_layout(stage: Stage, shape: Shape) -> Layout:
    piece, latents, hidden = map(stage.number, ("piece", "latents", "hidden"))
    found: Layout = {"scales": ((shape[0],), "float16"), "columns": ((shape[1],), "float16")}
    found["decoder_linear"] = (piece, latents), "float16"
    if hidden:
        found["decoder_inner"] = (hidden, latents), "float16"
        found["decoder_bias"] = (hidden,), "float16"
        found["decoder_outer"] = (piece, hidden), "float16"
    return found


def scale_layout(stage: Stage, scales: Shape) -> Layout:
    n_scales = scales[0] * scales[1]
    if stage.method == "mxfp4":
        return {"scales": (scales, "uint8")}
    if stage.method == "nvfp4":
        return {"scales": (scales, "uint8"), "matrix_scale": ((1,), "float32")}
    if stage.options.get("double_quantization") == "true":
        blocks = {"block_scales": ((-(-n_scales // 256),), "float32")}
        return {"scales": (scales, "uint8"), **blocks, "mean_scale": ((1,), "float32")}
    found: Layout = {"scales": (scales, "float16")}
    if stage.method == "hqq":
        found["zeros"] = scales, "float16"
    elif stage.options.get("symmetric") == "false":
        found["zeros"] = (packed_bytes(n_scales, bits_of(stage)),), "uint8"
    return found


def residual_layout(stage: Stage, shape: Shape) -> Layout:
    o, d = shape
    if stage.method in ("eora", "lq_lora"):
        grid, rank = correction_grid(stage), stage.number("rank")
        return _prefixed("a.", matrix_layout(None, grid, (rank, o), "float16")) | _prefixed(
            "b.", matrix_layout(None, grid, (rank, d), "float16")
        )
    if stage.method == "outlier_columns":
        n = max(1, round(stage.share("share") * d))
        index = "int16" if d <= 32768 else "int32"
        return {"index": ((n,), index), "values": ((o, n), "float16")}
    n = max(1, round(stage.share("share") * o * d))
    if d < 32768 and n > o:
        return {"index": ((n,), "int16"), "counts": ((o,), "int16"), "values": ((n,), "float16")}
    return {"index": ((n,), "int32"), "values": ((n,), "float16")}
