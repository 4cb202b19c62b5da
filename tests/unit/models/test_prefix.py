from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from autocompress.core import BASE_ALLOCATION, Allocation, Scheme
from autocompress.models import describe, overridden, weight_matrix
from autocompress.models.prefix import PrefixCache
from autocompress.testing.tiny_models import FAMILIES, tiny_batches, tiny_model

SIZE = 1 << 28


class Setting:
    """A tiny model, its batches, and forwards under an allocation with and without a cache."""

    def __init__(self, family, max_bytes=SIZE):
        self.module = tiny_model(family)
        self.layout = describe(self.module)
        self.cache = PrefixCache(self.module, self.layout, max_bytes)
        self.batches = tiny_batches(family, n_batches=2, batch_size=2, length=24)

    def run(self, allocation, *, shared=True):
        weights = {name: self.damaged(name, scheme) for name, scheme in allocation.items()}
        sharing = self.cache.sharing(allocation, "all") if shared else nullcontext()
        with overridden(self.module, self.layout, weights), torch.no_grad(), sharing:
            return [dict(self.module(**batch)) for batch in self.batches]

    def damaged(self, name, scheme):
        weight = weight_matrix(self.module, self.layout.layer(name))
        step = weight.abs().max() / 2 ** dict(scheme.stages[0].options)["bits"]
        return (weight / step).round() * step

    def computed(self, allocation):
        before = self.cache.counts.computed
        self.run(allocation)
        return self.cache.counts.computed - before


def scheme(bits):
    return Scheme.parse(f"rtn(bits={bits})")


def uniform(layout, bits):
    return {layer.name: scheme(bits) for layer in layout.layers}


def equal(got, expected):
    tensors = [(k, v) for one in expected for k, v in one.items() if isinstance(v, torch.Tensor)]
    others = [v for one in got for v in one.values() if isinstance(v, torch.Tensor)]
    assert tensors
    for (name, one), other in zip(tensors, others, strict=True):
        assert torch.equal(one, other), name
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_bits_whatever_is_shared(family):
    setting = Setting(family)
    layout = setting.layout
    parent = uniform(layout, 4)
    sweep = [{**parent, layer.name: scheme(2)} for layer in layout.layers[::-3]]
    for schemes in [{}, parent, *sweep, {}]:
        allocation = Allocation.of(schemes)
        expected = setting.run(allocation, shared=False)
        assert equal(setting.run(allocation), expected)
    assert setting.cache.reason == ""
    assert setting.cache.counts.saved_share > 0.25


@pytest.mark.parametrize("family", ["llama", "bart", "t5", "vit"])
def test_what_was_run_before_is_not_run_again(family):
    setting = Setting(family)
    n_blocks = len(setting.layout.blocks)
    allocation = Allocation.of(uniform(setting.layout, 4))
    setting.run(BASE_ALLOCATION)
    assert setting.computed(allocation) == 2 * n_blocks
    assert setting.computed(allocation) == 0
    assert setting.computed(BASE_ALLOCATION) == 0


def test_a_change_in_the_last_block_runs_that_block_alone():
    setting = Setting("bart")
    parent = uniform(setting.layout, 4)
    setting.run(Allocation.of(parent))
    last = len(setting.layout.blocks) - 1
    name = next(layer.name for layer in setting.layout.layers if layer.block == last)
    assert setting.computed(Allocation.of({**parent, name: scheme(2)})) == 2


def test_encoder_blocks_are_a_prefix_of_the_decoder():
    setting = Setting("t5")
    parent = uniform(setting.layout, 4)
    setting.run(Allocation.of(parent))
    encoder = next(layer.name for layer in setting.layout.layers if layer.block == 0)
    assert setting.computed(Allocation.of({**parent, encoder: scheme(2)})) == 2 * len(
        setting.layout.blocks
    )


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert"])
def test_a_tied_head_is_a_change_before_the_first_block(family):
    setting = Setting(family)
    setting.run(BASE_ALLOCATION)
    embedding = next(layer for layer in setting.layout.layers if layer.kind == "embedding")
    assert embedding.aliases
    changed = Allocation.of({embedding.name: scheme(2)})
    assert setting.computed(changed) == 2 * len(setting.layout.blocks)


def test_a_head_of_its_own_changes_no_block():
    setting = Setting("llama")
    setting.run(BASE_ALLOCATION)
    assert setting.computed(Allocation.of({"lm_head": scheme(2)})) == 0


def test_the_modules_are_as_before_even_after_an_error():
    setting = Setting("gpt2")
    before = [dict(m.__dict__) for m in setting.module.modules()]
    setting.run(BASE_ALLOCATION)
    with pytest.raises(RuntimeError, match="stop"), setting.cache.sharing(BASE_ALLOCATION, 0):
        raise RuntimeError("stop")
    assert [dict(m.__dict__) for m in setting.module.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in setting.module.modules())
    assert setting.cache.n_bytes == 0


def test_memory_is_bounded_and_blocks_are_thinned_out():
    plenty = Setting("llama")
    plenty.run(BASE_ALLOCATION)
    whole = plenty.cache.n_bytes
    tight = Setting("llama", max_bytes=whole)
    for bits in (0, 2, 3, 4, 5):
        tight.run(Allocation.of(uniform(tight.layout, bits) if bits else {}))
        assert tight.cache.n_bytes <= whole
    assert tight.cache.n_bytes > 0
    assert tight.computed(Allocation.of(uniform(tight.layout, 5))) < 2 * len(tight.layout.blocks)
    hopeless = Setting("llama", max_bytes=whole // 100)
    hopeless.run(BASE_ALLOCATION)
    assert hopeless.cache.n_bytes == 0
    assert equal(hopeless.run(BASE_ALLOCATION), hopeless.run(BASE_ALLOCATION, shared=False))


def test_without_memory_nothing_is_shared():
    setting = Setting("bert", max_bytes=0)
    assert equal(setting.run(BASE_ALLOCATION), setting.run(BASE_ALLOCATION, shared=False))
    assert setting.cache.reason
    assert setting.cache.counts.blocks == 0


class Odd(nn.Module):
    """Blocks that run in a way that prefixes cannot be shared."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(8, 8)}) for _ in range(3))
        for layer in self.layers:
            layer.forward = partial(self.run, layer)
        self.eval()

    def run(self, layer, x):
        y = torch.tanh(layer["fc1"](x))
        return [y] if self.way == "list" else y

    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            if self.way == "list":
                (x,) = x
            if self.way == "in_place":
                x.add_(1.0)
            outputs.append(x)
        if self.way == "twice":
            x = self.layers[0](x)
        return {"out": sum(outputs) if self.way == "skips" else x}


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("twice", "more than once"),
        ("skips", "other outputs"),
        ("in_place", "writes to what"),
        ("list", "returns a list"),
        ("plain", ""),
    ],
)
def test_models_that_hand_on_more_than_a_block_returns_run_in_full(way, reason):
    module = Odd(way)
    cache = PrefixCache(module, describe(module), SIZE)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(x)["out"]
        for _ in range(3):
            with cache.sharing(BASE_ALLOCATION, 0):
                assert torch.equal(module(x)["out"], expected)
    assert reason in cache.reason
    assert bool(reason) == bool(cache.reason)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(layer.__dict__["forward"].func == module.run for layer in module.layers)


def test_a_forward_that_raises_leaves_no_hook_behind():
    setting = Setting("bert")
    with torch.no_grad(), setting.cache.sharing(BASE_ALLOCATION, 0):
        with pytest.raises(ValueError, match="input_ids"):
            setting.module()
        setting.module(**setting.batches[0])
    assert setting.cache.reason == ""
    modules = list(setting.module.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
