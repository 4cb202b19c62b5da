import logging

import pytest
import torch
from any_loss import any_loss

from autocompress.core import derived_seed
from autocompress.core.errors import ModelError
from autocompress.methods import LayerProblem, LayerStatistics
from autocompress.models import (
    CurvatureStore,
    LayerCurvature,
    assert_untouched,
    collect_curvature,
    describe,
    overridden,
    predicted_damage,
    predicted_damages,
    version_counters,
    weight_matrix,
)
from autocompress.models.curvature import InputCurvature, Lookup
from autocompress.testing.tiny_models import tiny_batches, tiny_model


def logits_loss(module, batch, generator):
    logits = module(**batch).logits
    weights = torch.randn(logits.shape, dtype=torch.float64, generator=generator)
    if logits.ndim == 3 and logits.shape[:2] == batch["attention_mask"].shape:
        weights = weights * batch["attention_mask"][:, :, None]
    return (logits * weights.to(logits)).sum(), len(logits)


def captured(model, layer, batches):
    """(x, g) of a layer, per batch, from autograd itself."""
    found = []
    for index, batch in enumerate(batches):
        seen = {}

        def keep(_, arguments, output, seen=seen):
            output.retain_grad()
            seen.update(x=arguments[0].detach(), y=output)

        handle = model.get_submodule(layer).register_forward_hook(keep)
        generator = torch.Generator().manual_seed(derived_seed("curvature", 0, index))
        loss, _ = logits_loss(model, batch, generator)
        loss.backward()
        handle.remove()
        found.append((seen["x"], seen["y"].grad, batch["attention_mask"].bool()))
    return found


@pytest.mark.parametrize("coupled", [True, False])
def test_summed_over_outputs_the_rank_one_form_is_the_exact_fisher(tmp_path, coupled):
    model = tiny_model("llama").double()
    layout, batches = describe(model), tiny_batches("llama")
    store, name = CurvatureStore(tmp_path), "model.layers.0.mlp.down_proj"
    collect_curvature(model, layout, batches, logits_loss, store, layers=[name], coupled=coupled)
    found = store.get(layout.layer(name))
    exact = torch.zeros(96, 96, dtype=torch.float64)
    by_output = torch.zeros(64, dtype=torch.float64)
    energies, n_sequences = [], 0
    for x, g, mask in captured(model, name, batches):
        for x_all, g_all, m in zip(x, g, mask, strict=True):
            x_s, g_s = x_all[m], g_all[m]

            energies.append(g_s.square().sum(1))
            n_sequences += 1
            if coupled:
                gradient = g_s.T @ x_s  # of the weight
                exact += gradient.T @ gradient
                by_output += gradient.square().sum(1)
            else:
                exact += x_s.T @ (x_s * g_s.square().sum(1)[:, None])
                by_output += g_s.square().sum(0)
    exact, by_output = exact / n_sequences, by_output / n_sequences
    rows, hessian = found.rows.double(), found.hessian.double()
    scale = float(exact.diagonal().max())
    torch.testing.assert_close(rows.sum() * hessian, exact, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(rows / rows.sum(), by_output / by_output.sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        store.energies(layout.layer(name)).double(), torch.cat(energies), rtol=1e-5, atol=0
    )


def exact_labels_loss(n_classes):
    """Every label once, weighted by the root of its probability: no sampling noise."""

    def loss(module, batch, _):
        inputs = {n: t for n, t in batch.items() if n != "class"}
        logprobs = module(**inputs).logits.log_softmax(1)
        label = int(batch["class"][0])
        weights = logprobs[:, label].exp().sqrt().detach()
        return -(weights * logprobs[:, label]).sum(), len(logprobs) if label == 0 else 0

    return loss


@pytest.mark.parametrize(
    "name", ["encoder.layer.0.output.dense", "encoder.layer.1.attention.self.value"]
)
def test_the_prediction_is_the_divergence_of_a_small_change(tmp_path, name):
    model = tiny_model("bert-classifier").double()
    with torch.no_grad():
        model.classifier.weight *= 20
    layout = describe(model)
    name = f"bert.{name}"
    batch = {
        n: t for n, t in tiny_batches("bert-classifier", n_batches=1)[0].items() if n != "labels"
    }
    singles = [{n: t[i : i + 1] for n, t in batch.items()} for i in range(4)]
    batches = [{**b, "class": torch.tensor([c])} for b in singles for c in range(4)]
    store = CurvatureStore(tmp_path)
    collect_curvature(model, layout, batches, exact_labels_loss(4), store, layers=[name])
    found, weight = store.get(layout.layer(name)), weight_matrix(model, layout.layer(name))
    predicted, real = 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        base = model(**batch).logits.log_softmax(1)
        for _ in range(20):
            change = 1e-4 * torch.randn(weight.shape, dtype=torch.float64, generator=generator)
            with overridden(model, layout, {name: weight + change}):
                changed = model(**batch).logits.log_softmax(1)
            real += float((base.exp() * (base - changed)).sum(1).mean())
            predicted += predicted_damage(weight, weight + change, found)
    assert 1 / 1.3 < predicted / real < 1.3


def test_every_family_has_curvature_for_every_layer(family, model, tmp_path):
    layout, store = describe(model), CurvatureStore(tmp_path)
    collect_curvature(model, layout, tiny_batches(family), any_loss, store)
    for layer in layout.layers:
        found = store.get(layer)
        assert (found.lookup is not None) == (layer.kind == "embedding")
        assert (found.rows is not None) == (layer.input_name is not None)
        if found.hessian is not None:
            assert found.rows.shape == (layer.out_features,)
            assert found.hessian.shape == (layer.in_features, layer.in_features)
            assert float(found.rows.sum()) > 0
        reached = found.hessian is not None or found.lookup is not None
        assert (store.statistics(layer).hessian is not None) == reached


@pytest.mark.parametrize("family", ["gemma3", "bart", "vit"])
def test_windows_of_any_size_and_repetition_give_the_same(family, tmp_path):
    model = tiny_model(family)
    layout, batches = describe(model), tiny_batches(family, n_batches=1)
    whole, parts = CurvatureStore(tmp_path / "whole"), CurvatureStore(tmp_path / "parts")
    collect_curvature(model, layout, batches, any_loss, whole)
    collect_curvature(model, layout, batches, any_loss, parts, memory_budget_bytes=1)
    for layer in layout.layers:
        a, b = whole.get(layer), parts.get(layer)
        for one, other in ((a.rows, b.rows), (a.hessian, b.hessian)):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.max()))
    calls = []
    collect_curvature(model, layout, batches, any_loss, whole, progress=lambda *d: calls.append(d))
    assert calls == []


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert-classifier"])
def test_collection_leaves_the_model_as_it_was(family, tmp_path):
    model = tiny_model(family)
    counters = version_counters(model)
    trainable = [p.requires_grad for p in model.parameters()]
    collect_curvature(
        model,
        describe(model),
        tiny_batches(family, n_batches=1),
        any_loss,
        CurvatureStore(tmp_path),
    )
    assert_untouched(model, counters)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["gemma3", "bart", "gpt2"])
def test_an_embedding_has_the_energy_of_the_rows_that_were_read(tmp_path, family):
    model = tiny_model(family).double()
    layout, batch = describe(model), tiny_batches(family, n_batches=1, padded=False)[0]
    batch = {n: t for n, t in batch.items() if n != "labels" or family == "bart"}
    store, layer = CurvatureStore(tmp_path), layout.layers[0]
    collect_curvature(model, layout, [batch], any_loss, store, layers=[layer.name])
    lookup = store.get(layer).lookup
    read = set(batch["input_ids"].unique().tolist())
    assert set(lookup.rows.nonzero()[:, 0].tolist()) >= read - {0, 1, 2}
    assert float(lookup.hessian.trace()) == pytest.approx(1)


def test_summed_over_rows_the_form_of_an_embedding_is_the_exact_fisher(tmp_path):
    model = tiny_model("llama").double()
    layout, store = describe(model), CurvatureStore(tmp_path)
    batches = tiny_batches("llama", n_batches=2)
    layer = layout.layer("model.embed_tokens")
    singles = [
        {n: t[i : i + 1] for n, t in b.items()} for b in batches for i in range(len(b["input_ids"]))
    ]
    collect_curvature(model, layout, singles, logits_loss, store, layers=[layer.name])
    exact = torch.zeros(64, 64, dtype=torch.float64)
    by_row = torch.zeros(layer.out_features, dtype=torch.float64)
    for index, batch in enumerate(singles):
        model.zero_grad()
        generator = torch.Generator().manual_seed(derived_seed("curvature", 0, index))
        logits_loss(model, batch, generator)[0].backward()
        gradient = model.model.embed_tokens.weight.grad
        exact += gradient.T @ gradient / len(singles)
        by_row += gradient.square().sum(1) / len(singles)
    lookup = store.get(layer).lookup
    found = lookup.rows.double().sum() * lookup.hessian.double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6 * float(exact.max()))
    torch.testing.assert_close(lookup.rows.double(), by_row, rtol=1e-5, atol=0)
    statistics = store.statistics(layer)
    assert (
        statistics.n_tokens
        == lookup.n_reads
        == len(
            {
                (i, int(t))
                for i, b in enumerate(singles)
                for t in b["input_ids"][b["attention_mask"].bool()]
            }
        )
    )
    assert float(statistics.hessian.trace()) == pytest.approx(1)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_positions_looked_up_once_for_a_batch_have_the_gradient_of_each_sequence(tmp_path, family):
    model = tiny_model(family).double()
    layout, batch = describe(model), tiny_batches(family, n_batches=1)[0]
    (layer,) = (layer for layer in layout.layers if layer.role == "position")
    n, length = batch["input_ids"].shape
    places = torch.arange(length).expand(n, -1)
    found = []
    for folder, given in (("once", batch), ("each", {**batch, "position_ids": places})):
        store = CurvatureStore(tmp_path / folder)
        collect_curvature(model, layout, [given], logits_loss, store, layers=[layer.name])
        found.append(store.get(layer).lookup)
    once, each = found
    assert n > 1
    assert once.n_reads == each.n_reads > length
    for name in ("rows", "hessian", "statistics"):
        torch.testing.assert_close(getattr(once, name), getattr(each, name))


def test_a_tied_head_counts_by_what_errors_damage_there(tmp_path):
    layer = describe(tiny_model("gemma3")).layers[0]
    assert layer.kind == "embedding"
    assert layer.input_name is not None
    o, d = layer.out_features, layer.in_features
    store, first, last = CurvatureStore(tmp_path), torch.zeros(d, d), torch.zeros(d, d)
    first[0, 0], last[1, 1] = 5.0, 2.0
    rows = torch.zeros(o)
    rows[3] = 6.0
    read = Lookup(rows, first / 5, first, n_reads=7)
    store.put_lookup(layer, read)
    as_head = InputCurvature(
        last, last.clone(), torch.ones(9), {layer.name: torch.full((o,), 1 / o)}
    )
    store.put(layer.input_name, as_head)  # sum of f 1, trace of H 2: a third of the lookups' 6
    found = store.statistics(layer)
    torch.testing.assert_close(found.hessian, (0.75 * first / 5 + 0.25 * last / 2))
    assert found.n_tokens == 9
    store.put_lookup(layer, Lookup(0 * rows, 0 * first, 0 * first, n_reads=0))
    torch.testing.assert_close(store.statistics(layer).hessian, last / 2)
    nothing = InputCurvature(None, None, torch.zeros(9), {layer.name: torch.zeros(o)})
    store.put(layer.input_name, nothing)
    assert store.statistics(layer).hessian is None


def test_the_scale_of_an_embedding_is_part_of_its_gradient(tmp_path):
    model = tiny_model("gemma3").double()
    layout, batch = describe(model), tiny_batches("gemma3", n_batches=1)[0]
    name = layout.layers[0].name
    found = []
    for folder in ("scaled", "plain"):
        store = CurvatureStore(tmp_path / folder)
        collect_curvature(model, layout, [batch], logits_loss, store, layers=[name])
        found.append(store.get(layout.layers[0]).lookup.rows)
        embedding = model.get_submodule(name)
        scale = float(embedding.embed_scale)
        with torch.no_grad():  # the same function, the factor moved into the table
            model.lm_head.weight = torch.nn.Parameter(embedding.weight.clone())
            embedding.weight.mul_(scale)
            embedding.embed_scale.fill_(1.0)
            embedding.scalar_embed_scale = 1.0
    assert scale == 1.0
    torch.testing.assert_close(found[0], found[1] * 64, rtol=1e-4, atol=1e-9)  # sqrt(64) squared


def curvature(o, d, *, rows=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3 * d, d, dtype=torch.float64, generator=generator)
    return LayerCurvature(
        torch.rand(o, dtype=torch.float64, generator=generator) if rows is None else rows,
        x.T @ x / len(x),
        None,
        "x",
    )


def test_the_damage_is_the_quadratic_form_whatever_the_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 16, dtype=torch.float64, generator=generator)
    change = torch.randn(37, 16, dtype=torch.float64, generator=generator)
    found = curvature(37, 16)
    expected = 0.5 * float(found.rows @ (change @ found.hessian @ change.T).diagonal())
    assert predicted_damage(weight, weight + change, found) == pytest.approx(expected)
    monkeypatch.setattr("autocompress.models.curvature._CHUNK_WEIGHTS", 50)
    both = predicted_damages(weight, (weight + k * change for k in (1, 2)), found)
    assert both == pytest.approx([expected, 4 * expected])


def test_a_lookup_is_damaged_by_the_rows_that_are_read():
    weight = torch.zeros(5, 4)
    hessian = torch.tensor([[0.5, 0.2, 0, 0], [0.2, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    lookup = Lookup(torch.tensor([0.0, 2.0, 0, 0, 0]), hessian, hessian, 1)
    found = LayerCurvature(None, None, lookup, "x")
    assert predicted_damage(weight, torch.eye(5, 4), found) == pytest.approx(0.5 * 2 * 0.5)
    both = torch.tensor([0.0, 1, 0, 0, 0])[:, None] * torch.tensor([1.0, -1, 0, 0])
    assert predicted_damage(weight, both, found) == pytest.approx(0.5 * 2 * 0.6)


def test_equal_outputs_make_it_the_tail_of_the_whitened_spectrum():
    weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(2))
    found = curvature(12, 16, rows=torch.full((12,), 2.0))
    problem = LayerProblem(weight, LayerStatistics(found.hessian.float(), 48, "x"))
    spectrum = problem.whitened_spectrum
    for rank in (1, 5, 11):
        dense = spectrum.outer[:, :rank] @ spectrum.inner[:rank]
        expected = float(spectrum.energies[rank:].sum())
        assert predicted_damage(weight, dense, found) == pytest.approx(expected, rel=1e-4)


def test_damage_that_is_not_finite_is_not_hidden():
    weight = torch.zeros(3, 4)
    broken = torch.full((3, 4), torch.nan)
    assert predicted_damage(weight, broken, curvature(3, 4)) != predicted_damage(
        weight, weight, curvature(3, 4)
    )


def test_a_damaged_file_is_named_and_collected_again(tmp_path, caplog):
    model = tiny_model("llama")
    layout, batches, store = describe(model), tiny_batches("llama"), CurvatureStore(tmp_path)
    collect_curvature(model, layout, batches, logits_loss, store)
    digest = store.digest
    flipped, cut = sorted(tmp_path.glob("*.safetensors"))[:2]
    content = bytearray(flipped.read_bytes())
    content[-5] ^= 1
    flipped.write_bytes(bytes(content))
    cut.write_bytes(cut.read_bytes()[:40])
    with caplog.at_level(logging.WARNING):
        collect_curvature(model, layout, batches, logits_loss, store)
    assert flipped.name in caplog.text
    assert cut.name in caplog.text
    assert store.digest == digest


def test_a_layer_that_no_gradient_reaches_is_harmless(tmp_path, caplog):
    model = tiny_model("bert-encoder")
    layout, store = describe(model), CurvatureStore(tmp_path)
    collect_curvature(model, layout, tiny_batches("bert-encoder"), any_loss, store)
    pooler = next(layer for layer in layout.layers if "pooler" in layer.name)
    assert "No gradient reached layer 'pooler.dense'" in caplog.text
    assert store.get(pooler).hessian is None
    weight = weight_matrix(model, pooler)
    assert predicted_damage(weight, 2 * weight, store.get(pooler)) == 0
    assert store.statistics(pooler).n_tokens == 0


def test_what_was_not_collected_is_asked_for_by_name(tmp_path):
    layout = describe(tiny_model("llama"))
    with pytest.raises(ModelError, match=r"'lm_head'.*Run collect_curvature"):
        CurvatureStore(tmp_path).get(layout.layer("lm_head"))


def test_gradients_that_overflow_are_refused_by_name(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(ModelError, match="must be finite, but those of layer"):
        collect_curvature(
            model, describe(model), tiny_batches("llama"), logits_loss, CurvatureStore(tmp_path)
        )
