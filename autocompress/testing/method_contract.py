"""The contract of compression methods, as checks that any method can be put through.

For a method of your own::

    from autocompress.testing.method_contract import CONTRACT, MethodExamples

    EXAMPLES = MethodExamples(
        schemes=("mine(bits=4)", "svd_llm(rank=9)+mine(bits=4)"),
        ladder=("mine(bits=2)", "mine(bits=4)", "mine(bits=8)"),
        bad_options={"bits": "mine(bits=9)"},
    )

    @pytest.mark.parametrize("check", CONTRACT.values(), ids=CONTRACT)
    def test_my_method_keeps_the_contract(check):
        check(EXAMPLES)

A check raises `AssertionError`. The layers are small, with correlated inputs of which some are
loud, one is dead, and sizes that no group divides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from safetensors.torch import load, save
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.core.layer import LayerSpec
from autocompress.core.scheme import Scheme
from autocompress.methods import (
    CompressedWeight,
    LayerProblem,
    LayerStatistics,
    canonical,
    check,
    compress,
    decode,
    decode_rows,
    footprint,
)


@dataclass(frozen=True, slots=True)
class MethodExamples:
    """What the contract needs to know about a method.

    Attributes:
        schemes: texts of schemes that use it, alone and composed; ranks below 18. A scheme may
            refuse some of the example layers by their shape, not all.
        ladder: texts of schemes from fewest to most bytes.
        bad_options: option name to the text of a scheme in which it alone is out of range.
    """

    schemes: tuple[str, ...]
    ladder: tuple[str, ...]
    bad_options: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class ExampleLayer:
    """A layer with its weight (o, d) and statistics."""

    spec: LayerSpec
    weight: Tensor
    statistics: LayerStatistics

    def compress(self, text: str) -> CompressedWeight:
        """The layer under the scheme that `text` spells."""
        return compress(self.weight, Scheme.parse(text), self.statistics)


@lru_cache(maxsize=16)
def example_layer(
    out_features: int, in_features: int, dtype: str = "float32", n_tokens: int = 512
) -> ExampleLayer:
    """A layer with correlated inputs, three of them loud and the last one dead."""
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    inputs = torch.randn(n_tokens, in_features, generator=generator) @ mixing
    inputs[:, :3] *= 8
    inputs[:, -1] = 0
    spec = LayerSpec(
        name=f"example.{out_features}x{in_features}.{dtype}",
        role="other",
        block=0,
        out_features=out_features,
        in_features=in_features,
        kind="linear",
        dtype=dtype,
        input_name="example.input",
        macs_per_token=out_features * in_features,
    )
    hessian = inputs.T @ inputs / n_tokens
    return ExampleLayer(
        spec,
        weight.to(getattr(torch, dtype)),
        LayerStatistics(hessian, n_tokens, f"example-{out_features}-{in_features}"),
    )


@lru_cache(maxsize=1)
def example_layers() -> tuple[ExampleLayer, ...]:
    """Wide and tall, each dtype, with and without statistics."""
    wide, tall = example_layer(36, 90), example_layer(88, 37, "bfloat16")
    return (
        wide,
        tall,
        example_layer(40, 64, "float16"),
        ExampleLayer(wide.spec, wide.weight, LayerStatistics.none()),
    )


def input_is_unchanged(examples: MethodExamples) -> None:
    """Neither the weight nor the statistics are written."""
    for text, layer in _first_cases(examples):
        weight, hessian = layer.weight.clone(), layer.statistics.hessian
        before = None if hessian is None else hessian.clone()
        compressed = layer.compress(text)
        for tensor in compressed.tensors.values():
            tensor.zero_()
        assert torch.equal(layer.weight, weight), f"{text} wrote the weight, or shares its memory"
        unchanged = before is None or (hessian is not None and torch.equal(hessian, before))
        assert unchanged, f"{text} wrote the statistics"


def repeats_bit_for_bit(examples: MethodExamples) -> None:
    """The same input gives the same tensors, whether or not decompositions are shared."""
    for text, layer in _first_cases(examples):
        problem = LayerProblem(layer.weight, layer.statistics)
        scheme = Scheme.parse(text)
        first = _compressed(layer, text).tensors
        for _ in range(2):
            again = compress(layer.weight, scheme, layer.statistics, problem=problem).tensors
            assert list(first) == list(again), f"{text} stores other tensors when repeated"
            same = all(torch.equal(first[name], again[name]) for name in first)
            assert same, f"{text} stores other bits when repeated"


def keeps_shape_and_dtype(examples: MethodExamples) -> None:
    """The dense matrix has the shape and dtype of the weight, and is finite."""
    for text, layer in _cases(examples):
        dense = _compressed(layer, text).to_dense()
        assert dense.shape == layer.weight.shape, f"{text} gives shape {tuple(dense.shape)}"
        assert dense.dtype == layer.weight.dtype, f"{text} gives {dense.dtype}"
        assert bool(torch.isfinite(dense).all()), f"{text} gives NaN or infinity"


def footprint_is_what_is_stored(examples: MethodExamples) -> None:
    """Names, shapes, dtypes and bytes of the stored tensors are known from shapes alone."""
    for text, layer in _cases(examples):
        tensors = _compressed(layer, text).tensors
        stored = {name: _layout(tensor) for name, tensor in tensors.items()}
        claimed = footprint(layer.spec, Scheme.parse(text))
        assert stored == dict(claimed.tensors), f"{text}: stored {stored}, claimed {claimed}"
        n_bytes = sum(tensor.nbytes for tensor in tensors.values())
        assert n_bytes == claimed.storage_bytes, f"{text}: {n_bytes} bytes, claimed {claimed}"


def survives_a_file(examples: MethodExamples) -> None:
    """Stored tensors decode to the same bits after a round trip through safetensors."""
    for text, layer in _cases(examples):
        compressed = _compressed(layer, text)
        scheme, shape, dtype = compressed.scheme, compressed.shape, compressed.dtype
        reloaded = load(save(dict(compressed.tensors)))
        dense = decode(reloaded, scheme, shape, dtype)
        assert torch.equal(dense, compressed.to_dense()), f"{text} changes when reloaded"
        rows = torch.tensor([3, 0, 3, shape[0] - 1])
        looked_up = decode_rows(reloaded, scheme, shape, rows, dtype)
        difference = (looked_up.float() - dense[rows].float()).abs().max()
        assert difference <= 1e-2 * dense.float().abs().max(), f"{text}: rows differ"


def more_bytes_never_lose_more(examples: MethodExamples) -> None:
    """Along the ladder bytes rise and the calibration loss does not."""
    layers = (example_layer(36, 90), example_layer(88, 37), example_layer(40, 64))
    accepting = [a for a in layers if all(_accepts(a, text) for text in examples.ladder)]
    assert accepting, f"the schemes {examples.ladder} must have an example layer in common"
    for layer in accepting:
        problem = LayerProblem(layer.weight, layer.statistics)
        schemes = [Scheme.parse(text) for text in examples.ladder]
        n_bytes = [footprint(layer.spec, scheme).storage_bytes for scheme in schemes]
        assert n_bytes == sorted(n_bytes), f"bytes must rise along {examples.ladder}: {n_bytes}"
        losses = [
            problem.loss(compress(layer.weight, s, layer.statistics, problem=problem).to_dense())
            for s in schemes
        ]
        falling = sorted(losses, reverse=True)
        assert losses == falling, f"loss must fall along {examples.ladder}: {losses}"


def refuses_bad_options_by_name(examples: MethodExamples) -> None:
    """A bad option is named in the error, for the scheme and for the layer."""
    layer = example_layer(36, 90)
    for name, text in examples.bad_options.items():
        for ask in (canonical, lambda scheme: check(layer.spec, scheme)):
            message = ""
            try:
                ask(Scheme.parse(text))
            except SchemeError as error:
                message = str(error)
            assert message, f"{text} must be refused, for {name}"
            assert name in message, f"{text}: the error does not name {name}: {message}"


def schemes_survive_text(examples: MethodExamples) -> None:
    """A canonical scheme is a fixed point, and reads back from its text."""
    for text in (*examples.schemes, *examples.ladder):
        scheme = canonical(Scheme.parse(text))
        assert canonical(scheme) == scheme, f"{text} is not canonical after one pass"
        assert Scheme.parse(str(scheme)) == scheme, f"{text} does not survive {scheme}"


def computes_alike_on(examples: MethodExamples, device: str) -> None:
    """Compressed on `device` a layer stores and loses what it does on the CPU, up to rounding.

    Not in `CONTRACT`: it needs the device.
    """
    for text, layer in _cases(examples):
        here = _compressed(layer, text)
        there = compress(layer.weight.to(device), Scheme.parse(text), layer.statistics)
        layouts = [{n: _layout(t) for n, t in c.tensors.items()} for c in (here, there)]
        assert layouts[0] == layouts[1], f"{text} stores {layouts[1]} on {device}, not {layouts[0]}"
        places = {tensor.device.type for tensor in there.tensors.values()}
        assert places <= {device}, f"{text} leaves tensors on {places}"
        moved = there.to(torch.device("cpu"))
        dense, decoded = moved.to_dense().float(), there.to_dense().cpu().float()
        difference = float((dense - decoded).abs().max())
        assert difference <= 1e-2 * float(dense.abs().max()), (
            f"{text} decodes otherwise on {device}"
        )
        problem = LayerProblem(layer.weight, layer.statistics)
        losses = [problem.loss(d.to(layer.weight.dtype)) for d in (here.to_dense(), dense)]
        alike = abs(losses[0] - losses[1]) <= 0.05 * losses[0] + 1e-9
        assert alike, f"{text} loses {losses[1]:.4g} on {device}, {losses[0]:.4g} on the CPU"


CONTRACT: Mapping[str, Callable[[MethodExamples], None]] = {
    function.__name__: function
    for function in (
        input_is_unchanged,
        repeats_bit_for_bit,
        keeps_shape_and_dtype,
        footprint_is_what_is_stored,
        survives_a_file,
        more_bytes_never_lose_more,
        refuses_bad_options_by_name,
        schemes_survive_text,
    )
}
"""Every check, by name."""


def _cases(examples: MethodExamples) -> Iterator[tuple[str, ExampleLayer]]:
    for text in dict.fromkeys((*examples.schemes, *examples.ladder)):
        accepting = [layer for layer in example_layers() if _accepts(layer, text)]
        assert accepting, f"{text} refuses every example layer"
        for layer in accepting:
            yield text, layer


def _first_cases(examples: MethodExamples) -> Iterator[tuple[str, ExampleLayer]]:
    """Each scheme on the first layer that takes it: for what each check compresses anew."""
    seen: set[str] = set()
    for text, layer in _cases(examples):
        if text not in seen:
            seen.add(text)
            yield text, layer


@lru_cache(maxsize=64)
def _compressed(layer: ExampleLayer, text: str) -> CompressedWeight:
    """Shared by the checks that only read it."""
    return layer.compress(text)


def _accepts(layer: ExampleLayer, text: str) -> bool:
    try:
        check(layer.spec, Scheme.parse(text))
    except SchemeError:
        return False
    return True


def _layout(tensor: Tensor) -> TensorLayout:
    return TensorLayout(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
