import logging

import pytest
import torch

from autocompress.core.errors import ModelError, RunDirectoryError
from autocompress.models import (
    StatisticsStore,
    assert_untouched,
    collect_statistics,
    describe,
    version_counters,
)
from autocompress.testing.tiny_models import tiny_batches, tiny_model


def naive_statistics(model, layout, batches, is_token):
    """H and the number of tokens by input name, from all inputs kept whole."""
    rows = {layer.input_name: [] for layer in layout.layers if layer.input_name is not None}
    handles = []
    for name, seen in rows.items():

        def keep(_, arguments, seen=seen):
            seen.append(arguments[0].double())

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    result = {}
    for name, seen in rows.items():
        tokens = []
        for x, batch in zip(seen, batches, strict=True):
            mask = is_token(name, batch, x.shape[:-1])
            tokens += [
                x[index] for index in torch.nonzero(mask).tolist() for index in [tuple(index)]
            ]
        x = torch.stack(tokens)
        result[name] = (x.T @ x / len(x), len(x))
    return result


def is_token(name, batch, shape):
    """Which positions are tokens, spelled out for the tiny families."""
    if len(shape) == 1 or "pixel_values" in batch:
        return torch.ones(shape, dtype=torch.bool)
    is_seq2seq = batch.get("labels") is not None and batch["labels"].shape[1:] == (16,)
    in_encoder = "encoder.block." in name or "encoder.layers." in name
    reads_encoder = "EncDecAttention.k" in name or "encoder_attn.k_proj" in name
    if is_seq2seq and not in_encoder and not reads_encoder:
        return batch["labels"] != -100
    return batch["attention_mask"] == 1


def test_statistics_are_the_naive_second_moment_without_padding(family, model, tmp_path):
    # what is padding among the tokens of an expert: test_experts.py
    layout, batches = describe(model), tiny_batches(family, padded=family != "mixtral")
    store = StatisticsStore(tmp_path)
    collect_statistics(model, layout, batches, store)
    expected = naive_statistics(model, layout, batches, is_token)
    for layer in layout.layers:
        found = store.get(layer)
        if layer.input_name is None:
            assert found.hessian is None
            continue
        hessian, n_tokens = expected[layer.input_name]
        assert found.n_tokens == n_tokens
        assert found.hessian.dtype == torch.float32
        scale = float(hessian.abs().max())
        torch.testing.assert_close(
            found.hessian.double(), hessian, rtol=1e-5, atol=1e-6 * max(scale, 1e-12)
        )


def test_padding_does_not_change_the_statistics(tmp_path):
    model = tiny_model("llama")
    layout, batch = describe(model), tiny_batches("llama", n_batches=1, padded=False)[0]
    extra = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = {
        name: torch.nn.functional.pad(tensor, (0, 9), value=extra[name])
        for name, tensor in batch.items()
    }
    plain, filled = StatisticsStore(tmp_path / "a"), StatisticsStore(tmp_path / "b")
    collect_statistics(model, layout, [batch], plain)
    collect_statistics(model, layout, [padded], filled)
    for layer in layout.layers[1:]:
        a, b = plain.get(layer), filled.get(layer)
        assert a.n_tokens == b.n_tokens == batch["input_ids"].numel()
        torch.testing.assert_close(a.hessian, b.hessian, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", [1, 3 * 8 * 96**2])
def test_windows_of_any_size_give_the_same_bits_as_one_window(family, model, tmp_path, budget):
    layout, batches = describe(model), tiny_batches(family)
    whole, windowed = StatisticsStore(tmp_path / "whole"), StatisticsStore(tmp_path / "windowed")
    collect_statistics(model, layout, batches, whole)
    collect_statistics(model, layout, batches, windowed, memory_budget_bytes=budget)
    assert whole.digest == windowed.digest
    for layer in layout.layers:
        a, b = whole.get(layer), windowed.get(layer)
        assert a.digest == b.digest
        assert a.hessian is None or torch.equal(a.hessian, b.hessian)


def test_a_window_stops_its_forwards_after_its_last_block(tmp_path):
    model = tiny_model("llama")
    layout, ran = describe(model), []
    for name in (*layout.blocks, "lm_head"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    store = StatisticsStore(tmp_path)
    wanted = ["model.layers.1.self_attn.q_proj"]
    collect_statistics(model, layout, tiny_batches("llama"), store, layers=wanted)
    assert set(ran) == {"model.layers.0"}


def test_the_logits_of_a_large_vocabulary_are_never_computed(tmp_path):
    model = tiny_model("gemma3")
    ran = []
    model.lm_head.register_forward_hook(lambda *_: ran.append(1))
    collect_statistics(model, describe(model), tiny_batches("gemma3"), StatisticsStore(tmp_path))
    assert ran == []


def test_collection_leaves_the_model_as_it_was(family, model, tmp_path):
    layout, batches = describe(model), tiny_batches(family)
    counters = version_counters(model)
    with torch.no_grad():
        before = model(**batches[0])[0]
    collect_statistics(model, layout, batches, StatisticsStore(tmp_path), memory_budget_bytes=1)
    with torch.no_grad():
        assert torch.equal(model(**batches[0])[0], before)
    assert_untouched(model, counters)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_warm_store_equals_a_cold_one_and_costs_no_forward(tmp_path):
    model = tiny_model("bert")
    layout, batches = describe(model), tiny_batches("bert")
    cold, warm = StatisticsStore(tmp_path / "cold"), StatisticsStore(tmp_path / "warm")
    collect_statistics(model, layout, batches, cold)
    collect_statistics(model, layout, batches, warm, layers=[layout.layers[3].name])
    collect_statistics(model, layout, batches, warm)
    assert warm.digest == cold.digest
    calls = []
    collect_statistics(model, layout, batches, warm, progress=lambda *done: calls.append(done))
    assert calls == []


def test_only_the_inputs_of_the_named_layers_are_collected(tmp_path):
    model = tiny_model("llama")
    layout, store = describe(model), StatisticsStore(tmp_path)
    up = "model.layers.0.mlp.up_proj"
    collect_statistics(model, layout, tiny_batches("llama"), store, layers={up})
    assert store.get(layout.layer(up)).n_tokens > 0
    assert "model.layers.0.mlp.gate_proj" in store  # reads the same input
    with pytest.raises(ModelError, match=r"needs the statistics of its input 'lm_head'"):
        store.get(layout.layer("lm_head"))


def test_a_damaged_file_is_named_and_collected_again(tmp_path, caplog):
    model = tiny_model("llama")
    layout, batches, store = describe(model), tiny_batches("llama"), StatisticsStore(tmp_path)
    collect_statistics(model, layout, batches, store)
    digest = store.digest
    victim = sorted(tmp_path.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:40])
    with caplog.at_level(logging.WARNING):
        collect_statistics(model, layout, batches, store)
    assert victim.name in caplog.text
    assert store.digest == digest


def test_progress_counts_forwards_over_all_windows(tmp_path):
    model = tiny_model("gpt2")
    calls = []
    collect_statistics(
        model,
        describe(model),
        tiny_batches("gpt2"),
        StatisticsStore(tmp_path),
        memory_budget_bytes=1,
        progress=lambda *done: calls.append(done),
    )
    assert calls == [(i + 1, 18) for i in range(18)]  # nine inputs, two batches


def test_a_layer_that_no_token_reaches_has_no_statistics(tmp_path, caplog):
    model = tiny_model("llama")
    layout, store = describe(model), StatisticsStore(tmp_path)
    batch = tiny_batches("llama", n_batches=1)[0]
    batch["attention_mask"].zero_()
    collect_statistics(model, layout, [batch], store, layers=["lm_head"])
    found = store.get(layout.layer("lm_head"))
    assert (found.hessian, found.n_tokens) == (None, 0)
    assert "No token reached layer 'lm_head'" in caplog.text


def test_activations_that_overflow_are_refused_by_name(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(ModelError, match="input of layer 'lm_head' has NaN or infinite"):
        collect_statistics(model, describe(model), tiny_batches("llama"), StatisticsStore(tmp_path))


def test_half_precision_models_give_float32_statistics(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    layout, store = describe(model), StatisticsStore(tmp_path)
    collect_statistics(model, layout, tiny_batches("llama"), store)
    assert store.get(layout.layers[1]).hessian.dtype == torch.float32


def test_a_store_that_cannot_be_written_says_so(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(RunDirectoryError, match=r"Layer statistics must be written to .*file"):
        StatisticsStore(blocked).put("x", torch.eye(2), 4)
