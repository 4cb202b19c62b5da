import pytest
import torch

from autocompress.core.errors import ModelError
from autocompress.models import StatisticsStore, collect_statistics, describe, weight_matrix
from autocompress.models.sequential import collect_sequential_statistics
from autocompress.models.weights import overridden, version_counters
from autocompress.testing.tiny_models import FAMILIES, tiny_batches, tiny_model


def setting(family):
    module = tiny_model(family)
    layout = describe(module)
    batches = [
        {n: t for n, t in batch.items() if n != "labels" or family.startswith("t5")}
        for batch in tiny_batches(family, n_batches=2, batch_size=3)
    ]
    return module, layout, batches


def coarse(module, layer):
    """The layer's weight in steps of a quarter of its largest entry."""
    weight = weight_matrix(module, layer)
    step = weight.abs().max() / 4
    return (weight / step).round() * step


def names(layout):
    return [layer.name for layer in layout.layers]


def hessians(store, layout):
    return {
        layer.name: store.get(layer).hessian
        for layer in layout.layers
        if layer.input_name is not None
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_without_compression_they_are_the_plain_statistics(tmp_path, family):
    module, layout, batches = setting(family)
    plain, sequential = StatisticsStore(tmp_path / "a"), StatisticsStore(tmp_path / "b")
    collect_statistics(module, layout, batches, plain)
    before = version_counters(module)
    collect_sequential_statistics(
        module, layout, batches, sequential, layers=names(layout),
        compressed=lambda layer: weight_matrix(module, layer),
    )  # fmt: skip
    assert version_counters(module) == before
    assert not any("forward" in vars(child) for child in module.modules())
    for layer in layout.layers:
        if layer.kind == "embedding" or layer.input_name is None:
            continue
        one, two = plain.get(layer), sequential.get(layer)
        assert one.n_tokens == two.n_tokens
        assert (one.hessian is None) == (two.hessian is None)
        if one.hessian is not None:
            assert torch.equal(one.hessian, two.hessian), layer.name


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_each_block_sees_what_the_compressed_blocks_before_it_put_out(tmp_path, family):
    module, layout, batches = setting(family)
    asked = []

    def compressed(layer):
        asked.append(layer.name)
        return coarse(module, layer)

    store = StatisticsStore(tmp_path / "sequential")
    collect_sequential_statistics(
        module, layout, batches, store, layers=names(layout), compressed=compressed
    )
    first = [x.name for x in layout.layers if x.block is not None or x.kind == "embedding"]
    assert sorted(asked) == sorted(first)
    for index in [*range(len(layout.blocks)), None]:
        before = [
            layer
            for layer in layout.layers
            if layer.kind == "embedding"
            or (layer.block is not None and (index is None or layer.block < index))
        ]
        here = [x for x in layout.layers if x.block == index and x.kind != "embedding"]
        if not here:
            continue
        expected = StatisticsStore(tmp_path / f"block {index}")
        weights = {layer.name: coarse(module, layer) for layer in before}
        with overridden(module, layout, weights):
            collect_statistics(module, layout, batches, expected, layers=[x.name for x in here])
        crossed = ("cross_key", "cross_value")
        for layer in here:
            if layer.role in crossed and layer.input_name != layer.name:
                continue  # the encoder's output was seen by the first block that reads it
            assert torch.equal(store.get(layer).hessian, expected.get(layer).hessian), layer.name


def test_every_block_runs_at_most_twice_per_batch(tmp_path):
    module, layout, batches = setting("llama")
    runs = dict.fromkeys(layout.blocks, 0)

    def counter(name):
        def count(*_):
            runs[name] += 1

        return count

    inner = [
        module.get_submodule(f"{name}.self_attn").register_forward_hook(counter(name))
        for name in layout.blocks
    ]
    seen = []
    collect_sequential_statistics(
        module, layout, batches, StatisticsStore(tmp_path), layers=names(layout),
        compressed=lambda layer: coarse(module, layer), progress=lambda *p: seen.append(p),
    )  # fmt: skip
    for handle in inner:
        handle.remove()
    assert set(runs.values()) == {2 * len(batches)}
    assert seen[-1][0] == seen[-1][1]


def test_a_second_time_only_missing_inputs_are_observed_and_nothing_changes(tmp_path):
    module, layout, batches = setting("llama")

    def collect():
        store = StatisticsStore(tmp_path)
        collect_sequential_statistics(
            module, layout, batches, store, layers=names(layout),
            compressed=lambda layer: coarse(module, layer),
        )  # fmt: skip
        return store.digest

    first = collect()
    dropped = sorted(tmp_path.glob("*.safetensors"))[0]
    dropped.unlink()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
    assert collect() == first
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_token_weights_weigh_the_tokens(tmp_path):
    module, layout, batches = setting("llama")
    store = StatisticsStore(tmp_path / "weighted")
    n_tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    weights = torch.zeros(n_tokens)
    weights[3] = 5.0
    layer = layout.layer(f"{layout.blocks[0]}.self_attn.q_proj")
    seen = []
    hook = module.get_submodule(layer.name).register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0])
    )
    with torch.no_grad():
        module(**batches[0])
    hook.remove()
    collect_sequential_statistics(
        module, layout, batches, store, layers=[layer.name],
        compressed=lambda x: weight_matrix(module, x), token_weights=lambda name: weights,
    )  # fmt: skip
    token = seen[0][batches[0]["attention_mask"].bool()][3]
    found = store.get(layer)
    assert torch.allclose(found.hessian, torch.outer(token, token), rtol=1e-4, atol=1e-6)
    assert found.n_tokens == 1


@pytest.mark.parametrize("extra", [-1, 1])
def test_another_number_of_token_weights_is_refused(tmp_path, extra):
    module, layout, batches = setting("llama")
    n_tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    with pytest.raises(ModelError, match="needs a weight"):
        collect_sequential_statistics(
            module, layout, batches, StatisticsStore(tmp_path), layers=names(layout),
            compressed=lambda x: weight_matrix(module, x),
            token_weights=lambda name: torch.ones(n_tokens + extra),
        )  # fmt: skip
    assert not any("forward" in vars(child) for child in module.modules())
