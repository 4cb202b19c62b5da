"""Tuning a block: what its loss is, what moves, and what stays the same."""

import pytest
import torch

from autocompress.core import Scheme
from autocompress.core.footprint import TensorLayout
from autocompress.methods import Tunable, compress, decode, is_tunable
from autocompress.models import StatisticsStore, collect_statistics, describe, weight_matrix
from autocompress.models.block_tuning import tune_block
from autocompress.models.sequential import collect_sequential_statistics
from autocompress.models.weights import overridden, version_counters
from autocompress.testing.method_contract import example_layer
from autocompress.testing.tiny_models import tiny_batches, tiny_model

FAMILIES = ["bert", "t5"]
TUNABLE = (
    "rtn(bits=3,group_size=16)",
    "gptq(bits=2,group_size=32,symmetric=false)",
    "wanda(sparsity=0.5)+rtn(bits=4)",
    "magnitude(sparsity=0.02)+rtn(bits=4)",
    "awq(search=3)+rtn(bits=3)",
    "hadamard+rtn(bits=3)+eora(rank=2)",
)


def stored_layout(packed):
    return {
        name: TensorLayout(tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for name, t in packed.tensors.items()
    }


@pytest.mark.parametrize(
    ("sizes", "moved"),
    [((0.01, 0.0), {"scales"}), ((0.0, 0.004), {"packed"})],
    ids=["scales", "codes"],
)
@pytest.mark.parametrize("text", TUNABLE)
def test_a_layer_starts_as_it_is_stored_and_moves_downhill_in_the_same_layout(text, sizes, moved):
    layer = example_layer(36, 90)
    packed = layer.compress(text)
    movable = Tunable(packed, layer.weight)
    start = packed.to_dense()
    torch.testing.assert_close(movable.dense(torch.float32), start, rtol=1e-5, atol=1e-6)
    inputs = torch.randn(200, 90, generator=torch.Generator().manual_seed(0))
    wanted = inputs @ layer.weight.T

    def loss():
        return float((inputs @ movable.dense(torch.float32).T - wanted).square().sum())

    before, least = loss(), torch.inf
    for step in range(20):
        error = inputs @ movable.dense(torch.float32).T - wanted
        movable.descend(error.T @ inputs, *(size * (1 - step / 20) for size in sizes))
        least = min(least, loss())
    assert least < before
    after = movable.packed()
    assert stored_layout(after) == stored_layout(packed)
    assert after.scheme == packed.scheme
    assert {n for n, t in packed.tensors.items() if not torch.equal(t, after.tensors[n])} == moved
    torch.testing.assert_close(after.to_dense(), movable.dense(torch.float32), rtol=1e-5, atol=1e-6)
    assert torch.equal(packed.to_dense(), start)
    if "sparsity=0.5" in text:
        assert int((after.to_dense() != 0).sum()) <= 36 * 90 / 2


def test_factors_codebooks_and_plain_values_are_not_tuned():
    for text in ("svd(rank=4)+rtn", "kmeans(bits=3)", "wanda", "cast", "hqq"):
        assert not is_tunable(Scheme.parse(text)), text


def setting(family, n_batches=3):
    module = tiny_model(family)
    batches = [
        {n: t for n, t in batch.items() if n != "labels" or family.startswith("t5")}
        for batch in tiny_batches(family, n_batches=n_batches, batch_size=2)
    ]
    return module, describe(module), batches


def tuned_model(family, path, steps, text="rtn(bits=3,group_size=0)", token_weights=None):
    """(block losses held back before and after, all layers packed, version counters kept)."""
    module, layout, batches = setting(family)
    scheme = Scheme.parse(text)
    store = StatisticsStore(path)
    packed, losses = {}, []

    def compressed(layer):
        found = compress(weight_matrix(module, layer), scheme, store.get(layer))
        packed[layer.name] = found
        return found.to_dense()

    def tune(layers, run):
        given = {layer.name: packed[layer.name] for layer in layers}
        weights = {layer.name: weight_matrix(module, layer) for layer in layers}
        done = tune_block(run, given, weights, steps=steps, dtype=torch.float32)
        losses.append((done.before, done.after))
        packed.update(done.layers)
        return {n: decode(p.tensors, p.scheme, p.shape, p.dtype) for n, p in done.layers.items()}

    before = version_counters(module)
    collect_sequential_statistics(
        module, layout, batches, store,
        layers=[x.name for x in layout.layers if x.block is not None and x.kind != "embedding"],
        compressed=compressed, tune=tune, token_weights=token_weights,
    )  # fmt: skip
    assert version_counters(module) == before
    return losses, packed


@pytest.mark.parametrize("family", FAMILIES)
def test_no_block_errs_more_on_what_is_held_back_and_repeats_are_equal(family, tmp_path):
    losses, packed = tuned_model(family, tmp_path / "a", 3)
    assert all(after <= before for before, after in losses)
    assert any(after < before for before, after in losses)
    again, others = tuned_model(family, tmp_path / "b", 3)
    assert again == losses
    for name, one in packed.items():
        assert all(torch.equal(t, others[name].tensors[n]) for n, t in one.tensors.items()), name


def test_the_loss_is_that_of_the_blocks_output_against_the_base_model(tmp_path):
    module, layout, batches = setting("llama")
    layers = [x.name for x in layout.layers if x.block is not None]
    weights = {n: weight_matrix(module, layout.layer(n)) * 0.9 for n in layers}
    token_share = torch.rand(sum(int(b["attention_mask"].sum()) for b in batches))
    found = {}

    def tune(here, run):
        found[here[0].block] = sum(run.loss(n, {}) for n in range(len(batches)))
        return {}

    collect_sequential_statistics(
        module, layout, batches, StatisticsStore(tmp_path), layers=layers,
        compressed=lambda x: weights[x.name], tune=tune, token_weights=lambda _: token_share,
    )  # fmt: skip

    def outputs(index, given):
        kept = []
        hook = module.get_submodule(layout.blocks[index]).register_forward_hook(
            lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        with overridden(module, layout, given), torch.no_grad():
            for batch in batches:
                module(**batch)
        hook.remove()
        return torch.cat(
            [k[b["attention_mask"].bool()] for k, b in zip(kept, batches, strict=True)]
        )

    for index in range(len(layout.blocks)):
        base, compressed = outputs(index, {}), outputs(index, weights)
        errors = (compressed - base).square().sum(1)
        expected = float(errors @ token_share / (base.square().sum(1) @ token_share))
        assert found[index] == pytest.approx(expected, rel=1e-4)


def test_one_batch_leaves_nothing_to_hold_back_and_the_block_stays(tmp_path):
    module, layout, batches = setting("llama", n_batches=1)
    name = f"{layout.blocks[0]}.mlp.up_proj"
    weight = weight_matrix(module, layout.layer(name))
    store = StatisticsStore(tmp_path)
    collect_statistics(module, layout, batches, store, layers=[name])
    packed = compress(weight, Scheme.parse("rtn(bits=3)"), store.get(layout.layer(name)))
    kept = []

    def tune(_, run):
        kept.append(tune_block(run, {name: packed}, {name: weight}, steps=3, dtype=torch.float32))
        return {}

    collect_sequential_statistics(
        module, layout, batches, store, layers=[name],
        compressed=lambda _: packed.to_dense(), tune=tune,
    )  # fmt: skip
    assert all(done.layers[name] is packed for done in kept)
