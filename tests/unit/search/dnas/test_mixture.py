"""Layers that compute with a mixture of their options."""

from dataclasses import replace

import pytest
import torch

from autocompress.core import Scheme
from autocompress.core.errors import UsageError
from autocompress.methods import LayerStatistics, compress, decode
from autocompress.models import describe, weight_matrix
from autocompress.models.weights import assert_untouched, version_counters
from autocompress.search.dnas.mixture import (
    mixed,
    mixtures,
    penalties,
    require_all_ran,
    require_room,
    usable,
)
from autocompress.spaces.space import Choice, Option, SearchSpace
from autocompress.testing.tiny_models import Sizes, tiny_batches, tiny_model

SIZES = Sizes(hidden=16, intermediate=16, blocks=1, heads=2, key_value_heads=1)
RTN = tuple(f"rtn(bits={bits},group_size=16)" for bits in (2, 3, 8))


def space_of(names, schemes=RTN):
    parsed = [Scheme.parse(s) for s in schemes]
    choices = (
        Choice(n, (n,), tuple(Option(str(s), (s,), 9 + i) for i, s in enumerate(parsed)))
        for n in names
    )
    return SearchSpace("mixed", "some layers", tuple(choices))


def decoder(module, layout):
    def dense(name, scheme):
        weight = weight_matrix(module, layout.layer(name))
        packed = compress(weight, scheme, LayerStatistics.none())
        return decode(packed.tensors, scheme, tuple(weight.shape), weight.dtype)

    return dense


@pytest.fixture(scope="module")
def gpt2():
    module = tiny_model("gpt2", sizes=SIZES).double()
    return module, describe(module)


def test_the_gradient_by_the_probabilities_is_that_of_finite_differences(gpt2):
    module, layout = gpt2
    names = [x.name for x in layout.layers if x.kind in ("conv1d", "embedding")]
    assert {layout.layer(n).kind for n in names} == {"conv1d", "embedding"}
    space = space_of(names)
    parts = mixtures(module, layout, space, decoder(module, layout))
    batch = tiny_batches("gpt2", n_batches=1, batch_size=2, length=6, padded=False)[0]
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(2, 6, 320, dtype=torch.float64, generator=generator)
    p = torch.rand(len(names), 3, dtype=torch.float64, generator=generator).softmax(1)

    def loss(probabilities):
        with mixed(module, parts, list(probabilities)) as ran:
            value = (module(**inputs).logits * direction).sum()
        require_all_ran(parts, ran)
        return value

    p.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(p), p)
    with torch.no_grad():
        for row, column in [(0, 0), (1, 2), (len(names) - 1, 1)]:
            step = torch.zeros_like(p)
            step[row, column] = 1e-5
            slope = (loss(p + step) - loss(p - step)) / 2e-5
            torch.testing.assert_close(gradient[row, column], slope, rtol=1e-6, atol=1e-8)


def test_a_certain_option_is_that_option_and_nothing_remains_afterwards(gpt2):
    module, layout = gpt2
    name = next(x.name for x in layout.layers if x.kind == "conv1d")
    space, dense = space_of([name]), decoder(module, layout)
    parts = mixtures(module, layout, space, dense)
    before = version_counters(module)
    holder = module.get_submodule(name)
    x = torch.randn(3, holder.weight.shape[0], dtype=torch.float64)
    certain = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    with mixed(module, parts, [certain]):
        found = holder(x)
    expected = x @ dense(name, Scheme.parse(RTN[1])).T + holder.bias
    torch.testing.assert_close(found, expected)
    with pytest.raises(ZeroDivisionError), mixed(module, parts, [certain]):
        raise ZeroDivisionError
    assert "forward" not in vars(holder)
    assert_untouched(module, before)


def test_the_lasso_is_the_sum_of_the_norms_of_bands():
    module = tiny_model("llama", sizes=SIZES)
    layout = describe(module)
    name = next(x.name for x in layout.layers if x.role == "query")
    schemes = ("subgroup(bits=0-2-0-4,group_size=16)", "rtn(bits=8,group_size=16)")
    first = torch.zeros(16, 16).index_fill_(0, torch.tensor([4, 5, 6, 7, 12, 13, 14, 15]), 0.5)
    matrices = dict(zip(map(Scheme.parse, schemes), (first, torch.ones(16, 16)), strict=True))
    space = space_of([name], schemes)
    parts = mixtures(module, layout, space, lambda _, scheme: matrices[scheme])
    p = torch.tensor([0.7, 0.3])
    mixture = 0.7 * first + 0.3
    base = weight_matrix(module, layout.layer(name))
    norms = [torch.stack([b.norm() for b in m.split(4)]).sum() for m in (mixture, base)]
    torch.testing.assert_close(penalties(parts, [p]), norms[0] / norms[1])


def test_options_that_are_not_finite_are_left_out():
    module = tiny_model("llama", sizes=SIZES)
    layout = describe(module)
    name = layout.layers[1].name

    def dense(_, scheme):
        shape = weight_matrix(module, layout.layer(name)).shape
        return torch.full(shape, torch.nan if "bits=2" in str(scheme) else 1.0)

    parts = mixtures(module, layout, space_of([name]), dense)
    assert usable(parts[0]).tolist() == [False, True, True]
    assert bool(parts[0][0].weights.isfinite().all())
    assert float(penalties(parts, [torch.ones(3)])) == 0


def test_what_cannot_be_trained_is_refused_with_the_next_step():
    module = tiny_model("llama", sizes=SIZES)
    layout = describe(module)
    name = layout.layers[1].name
    space = space_of([name])
    needed = 3 * 4 * layout.layer(name).n_weights
    require_room(space, layout, most_bytes=needed)
    with pytest.raises(UsageError, match=f"at most {needed - 1:,} bytes.*--sampler guided"):
        require_room(space, layout, most_bytes=needed - 1)
    rounding = space_of([name], ("rtn(bits=4,group_size=16)+int_inputs(bits=8)",))
    with pytest.raises(UsageError, match=r"rounds what the layer reads.*--sampler guided"):
        require_room(rounding, layout)
    parts = mixtures(module, layout, space, lambda n, _: weight_matrix(module, layout.layer(n)))
    with pytest.raises(UsageError, match="take part in a forward pass"):
        require_all_ran(parts, set())
    assert require_all_ran([[replace(parts[0][0], holders=("a", "b"))]], {"b"}) is None
