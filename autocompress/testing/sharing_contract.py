"""The contract of methods that layers share, as checks that any such method can be put through.

As `autocompress.testing.method_contract`, on three layers at a time, of adjacent blocks or of the
experts of one: the schemes of the examples name blocks, or experts, ``0/1/2``. A check raises
`AssertionError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from safetensors.torch import load, save
from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.core.footprint import TensorLayout
from autocompress.core.layer import BLOCKS, EXPERTS, Among, LayerSpec
from autocompress.core.scheme import Scheme
from autocompress.methods import (
    CompressedWeight,
    LayerProblem,
    LayerStatistics,
    canonical,
    check,
    compress_together,
    decode,
    footprint,
    own_tensors,
)
from autocompress.methods.schemes import plan
from autocompress.testing.method_contract import MethodExamples, example_layer

N_LAYERS = 3
_ALIKE = 0.8  # of the weights of a layer is common to all
_NAMES: Mapping[Among, str] = {BLOCKS: "blocks.{}.layer", EXPERTS: "blocks.0.experts.layer.{}"}


@dataclass(frozen=True, eq=False)
class SharingLayers:
    """Layers that may share, with weights (o, d) and statistics."""

    specs: tuple[LayerSpec, ...]
    weights: tuple[Tensor, ...]
    statistics: tuple[LayerStatistics, ...]

    def compress(self, text: str) -> tuple[CompressedWeight, ...]:
        """The layers under the scheme that `text` spells."""
        return compress_together(self.weights, Scheme.parse(text), self.statistics)

    def problems(self) -> list[LayerProblem]:
        """A problem for each layer."""
        return list(map(LayerProblem, self.weights, self.statistics))


@lru_cache(maxsize=2)
def sharing_layers_examples(among: Among = BLOCKS) -> tuple[SharingLayers, ...]:
    """Wide and tall, two dtypes, with and without statistics."""
    wide, tall = _layers(40, 56, "float32", among), _layers(60, 32, "bfloat16", among)
    without = tuple(LayerStatistics.none() for _ in wide.specs)
    return wide, tall, replace(wide, statistics=without)


def _layers(o: int, d: int, dtype: str, among: Among) -> SharingLayers:
    example = example_layer(o, d, dtype)
    generator = torch.Generator().manual_seed(o + d)
    weights, statistics = [], []
    for number in range(N_LAYERS):
        own = torch.randn(o, d, generator=generator) * 0.05
        mixed = _ALIKE * example.weight.float() + (1 - _ALIKE) * own
        weights.append(mixed.to(example.weight.dtype))
        gains = 0.5 + torch.rand(d, generator=generator)
        hessian = example.statistics.hessian
        assert hessian is not None
        scaled = hessian * gains[:, None] * gains
        tokens = example.statistics.n_tokens
        statistics.append(LayerStatistics(scaled, tokens, f"sharing-{o}-{d}-{number}"))
    names = (_NAMES[among].format(number) for number in range(N_LAYERS))
    specs = (replace(example.spec, name=name) for name in names)
    return SharingLayers(tuple(specs), tuple(weights), tuple(statistics))


def input_is_unchanged(examples: MethodExamples) -> None:
    """Neither weights nor statistics are written, nor do results share their memory."""
    for text, layers in _cases(replace(examples, ladder=())):
        before = [weight.clone() for weight in layers.weights]
        hessians = [None if s.hessian is None else s.hessian.clone() for s in layers.statistics]
        for compressed in layers.compress(text):
            for tensor in compressed.tensors.values():
                tensor.zero_()
        same = all(map(torch.equal, layers.weights, before))
        assert same, f"{text} wrote a weight, or shares its memory"
        for statistics, hessian in zip(layers.statistics, hessians, strict=True):
            unchanged = hessian is None or torch.equal(_known(statistics.hessian), hessian)
            assert unchanged, f"{text} wrote the statistics"


def repeats_bit_for_bit(examples: MethodExamples) -> None:
    """The same input gives the same tensors, whether or not decompositions are kept."""
    kept = {layers: layers.problems() for layers in _examples_for(examples)}
    for text, layers in _cases(examples):
        first = _compressed(layers, text)
        again = compress_together(
            layers.weights, Scheme.parse(text), layers.statistics, problems=kept[layers]
        )
        for one, other in zip(first, again, strict=True):
            assert list(one.tensors) == list(other.tensors), f"{text} stores other tensors"
            same = all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())
            assert same, f"{text} stores other bits when repeated"


def shared_tensors_are_one(examples: MethodExamples) -> None:
    """What the first layer stores for the others is what they were compressed with."""
    for text, layers in _cases(examples):
        first, *others = _compressed(layers, text)
        for spec, compressed in zip(layers.specs[1:], others, strict=True):
            own = own_tensors(spec.name, compressed.scheme, compressed.tensors)
            borrowed = compressed.tensors.keys() - own.keys()
            assert borrowed, f"{text} shares nothing"
            for name in borrowed:
                same = torch.equal(compressed.tensors[name], first.tensors[name])
                assert same, f"{text}: {name} of {spec.name} is not that of the first layer"


def footprint_is_what_is_stored(examples: MethodExamples) -> None:
    """Stored and borrowed tensors are known from shapes alone; the shared ones count once."""
    for text, layers in _cases(examples):
        n_bytes = 0
        for spec, compressed in zip(layers.specs, _compressed(layers, text), strict=True):
            claimed = footprint(spec, Scheme.parse(text))
            stored = own_tensors(spec.name, compressed.scheme, compressed.tensors)
            assert _layouts(stored) == dict(claimed.tensors), f"{text}: {spec.name} stores others"
            both = {**claimed.tensors, **claimed.borrowed}
            assert _layouts(compressed.tensors) == both, f"{text}: {spec.name} decodes from others"
            assert sum(t.nbytes for t in stored.values()) == claimed.storage_bytes
            n_bytes += claimed.storage_bytes
        alone = footprint(layers.specs[0], Scheme.parse(text)).storage_bytes
        assert n_bytes < len(layers.specs) * alone, f"{text} counts what is shared several times"


def survives_a_file(examples: MethodExamples) -> None:
    """Each layer decodes to the same bits from a file that holds what is shared once."""
    for text, layers in _cases(examples):
        found = _compressed(layers, text)
        file = load(
            save(
                {
                    f"{spec.name}.{leaf}": tensor.contiguous()
                    for spec, compressed in zip(layers.specs, found, strict=True)
                    for leaf, tensor in own_tensors(
                        spec.name, compressed.scheme, compressed.tensors
                    ).items()
                }
            )
        )
        for spec, compressed in zip(layers.specs, found, strict=True):
            claimed = footprint(spec, compressed.scheme)
            tensors = {n: file[f"{spec.name}.{n}"] for n in claimed.tensors}
            tensors |= {n: file[f"{layers.specs[0].name}.{n}"] for n in claimed.borrowed}
            dense = decode(tensors, compressed.scheme, compressed.shape, compressed.dtype)
            assert torch.equal(dense, compressed.to_dense()), f"{text} changes when reloaded"
            weight = layers.weights[0]
            assert (dense.shape, dense.dtype) == (weight.shape, weight.dtype), f"{text}: {dense}"
            assert bool(torch.isfinite(dense).all()), f"{text} gives NaN or infinity"


def more_bytes_never_lose_more(examples: MethodExamples) -> None:
    """Along the ladder bytes rise, and the loss of all layers together does not."""
    able = [
        layers
        for layers in _examples_for(examples)[:2]
        if all(_accepts(layers, text) for text in examples.ladder)
    ]
    assert able, f"the schemes {examples.ladder} must have example layers in common"
    for layers in able:
        schemes = [Scheme.parse(text) for text in examples.ladder]
        n_bytes = [sum(footprint(s, c).storage_bytes for s in layers.specs) for c in schemes]
        assert n_bytes == sorted(n_bytes), f"bytes must rise along {examples.ladder}: {n_bytes}"
        problems = layers.problems()
        losses = [
            sum(
                problem.loss(compressed.to_dense())
                for problem, compressed in zip(
                    problems,
                    compress_together(layers.weights, s, layers.statistics, problems=problems),
                    strict=True,
                )
            )
            for s in schemes
        ]
        falling = sorted(losses, reverse=True)
        assert losses == falling, f"loss must fall along {examples.ladder}: {losses}"


def refuses_by_name(examples: MethodExamples) -> None:
    """Bad options, and layers that the scheme does not name, are refused before anything runs."""
    spec = _examples_for(examples)[0].specs[0]
    for name, text in examples.bad_options.items():
        for ask in (canonical, partial(check, spec)):
            message = _refusal(ask, text)
            assert name in message, f"{text} must be refused by {name}, but got {message!r}"
    for text in examples.schemes:
        for name in (_NAMES[_among(examples)].format(7), "head"):
            message = _refusal(partial(check, replace(spec, name=name)), text)
            assert name in message, f"{text} must be refused for {name}, but got {message!r}"


def schemes_survive_text(examples: MethodExamples) -> None:
    """A canonical scheme is a fixed point, and reads back from its text."""
    for text in (*examples.schemes, *examples.ladder):
        scheme = canonical(Scheme.parse(text))
        assert canonical(scheme) == scheme, f"{text} is not canonical after one pass"
        assert Scheme.parse(str(scheme)) == scheme, f"{text} does not survive {scheme}"


SHARING_CONTRACT: Mapping[str, Callable[[MethodExamples], None]] = {
    function.__name__: function
    for function in (
        input_is_unchanged,
        repeats_bit_for_bit,
        shared_tensors_are_one,
        footprint_is_what_is_stored,
        survives_a_file,
        more_bytes_never_lose_more,
        refuses_by_name,
        schemes_survive_text,
    )
}
"""Every check, by name."""


def _among(examples: MethodExamples) -> Among:
    return plan(Scheme.parse(examples.schemes[0])).among


def _examples_for(examples: MethodExamples) -> tuple[SharingLayers, ...]:
    return sharing_layers_examples(_among(examples))


def _cases(examples: MethodExamples) -> Iterator[tuple[str, SharingLayers]]:
    for text in dict.fromkeys((*examples.schemes, *examples.ladder)):
        accepting = [layers for layers in _examples_for(examples) if _accepts(layers, text)]
        assert accepting, f"{text} refuses all example layers"
        for layers in accepting:
            yield text, layers


@lru_cache(maxsize=64)
def _compressed(layers: SharingLayers, text: str) -> tuple[CompressedWeight, ...]:
    """Shared by the checks that only read it."""
    return layers.compress(text)


def _accepts(layers: SharingLayers, text: str) -> bool:
    return not _refusal(partial(check, layers.specs[0]), text)


def _refusal(ask: Callable[[Scheme], object], text: str) -> str:
    try:
        ask(Scheme.parse(text))
    except SchemeError as error:
        return str(error)
    return ""


def _layouts(tensors: Mapping[str, Tensor]) -> dict[str, TensorLayout]:
    return {
        name: TensorLayout(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }


def _known(hessian: Tensor | None) -> Tensor:
    assert hessian is not None
    return hessian
