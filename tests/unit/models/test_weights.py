import pytest
import torch

from autocompress.core.errors import ModelError
from autocompress.models import (
    assert_untouched,
    describe,
    overridden,
    version_counters,
    weight_matrix,
)
from autocompress.models.weights import ResidentWeightsError
from autocompress.testing.tiny_models import tiny_batches, tiny_model


def outputs(model, batch):
    with torch.no_grad():
        result = model(**batch)
    return result.logits if "logits" in result else result.last_hidden_state


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def doubled(model, layout):
    return {layer.name: 2 * weight_matrix(model, layer) for layer in layout.layers}


def test_a_weight_is_seen_as_out_by_in_and_shares_the_models_memory(model):
    for layer in describe(model).layers:
        matrix = weight_matrix(model, layer)
        assert matrix.shape == (layer.out_features, layer.in_features)
        assert matrix.data_ptr() == model.get_submodule(layer.name).weight.data_ptr()


def test_overriding_every_layer_changes_the_output_and_leaves_no_trace(family, model):
    layout, batch = describe(model), tiny_batches(family)[0]
    before, counters, expected = state(model), version_counters(model), outputs(model, batch)
    parameters = list(model.parameters())
    with overridden(model, layout, doubled(model, layout)) as same:
        assert same is model
        assert not torch.equal(outputs(model, batch), expected)
    after = state(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert_untouched(model, counters)
    assert torch.equal(outputs(model, batch), expected)


def test_overriding_with_the_base_weights_computes_the_base_output(family, model):
    layout, batch = describe(model), tiny_batches(family)[0]
    copies = {layer.name: weight_matrix(model, layer).clone() for layer in layout.layers}
    expected = outputs(model, batch)
    with overridden(model, layout, copies):
        assert torch.equal(outputs(model, batch), expected)


def test_the_override_equals_a_model_that_was_written(family, model):
    layout, batch = describe(model), tiny_batches(family)[0]
    written = tiny_model(family)
    with torch.no_grad():
        for layer in layout.layers:
            written.get_submodule(layer.name).weight.mul_(2)
    with overridden(model, layout, doubled(model, layout)):
        torch.testing.assert_close(outputs(model, batch), outputs(written, batch))


@pytest.mark.parametrize("family", ["bart", "t5", "gpt2", "bert"])
def test_aliases_change_with_their_layer(model):
    layout = describe(model)
    tied = next(layer for layer in layout.layers if layer.aliases)
    new = torch.ones(tied.out_features, tied.in_features)
    with overridden(model, layout, {tied.name: new}):
        for name in (tied.name, *tied.aliases):
            assert model.get_submodule(name).weight.data_ptr() == new.data_ptr()
    weights = {id(model.get_submodule(name).weight) for name in (tied.name, *tied.aliases)}
    assert len(weights) == 1


def test_an_exception_inside_still_restores():
    model = tiny_model("llama")
    layout, counters = describe(model), version_counters(model)
    with pytest.raises(ZeroDivisionError), overridden(model, layout, doubled(model, layout)):
        raise ZeroDivisionError
    assert_untouched(model, counters)


def test_overrides_nest():
    model = tiny_model("gpt2")
    layout = describe(model)
    layer = layout.layers[1]
    base = model.get_submodule(layer.name).weight
    weight = weight_matrix(model, layer)
    with overridden(model, layout, {layer.name: 2 * weight}):
        with overridden(model, layout, {layer.name: 3 * weight}):
            assert torch.equal(weight_matrix(model, layer), 3 * weight)
        assert torch.equal(weight_matrix(model, layer), 2 * weight)
    assert model.get_submodule(layer.name).weight is base


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (torch.zeros(3, 4), "shape"),
        (torch.zeros(64, 64, dtype=torch.float16), "dtype"),
        (torch.zeros(64, 64, device="meta"), "device"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused_before_anything_changes(bad, what):
    model = tiny_model("llama")
    layout, counters = describe(model), version_counters(model)
    name = "model.layers.1.self_attn.q_proj"
    good = {"lm_head": weight_matrix(model, layout.layer("lm_head")).clone()}
    refusal = pytest.raises(ModelError, match=rf"The {what} of a replacement.*{name}")
    with refusal, overridden(model, layout, {**good, name: bad}):
        pass
    assert_untouched(model, counters)


def test_the_guard_names_a_weight_that_was_written_in_place():
    model = tiny_model("llama")
    counters = version_counters(model)
    with torch.no_grad():
        model.lm_head.weight.detach().mul_(1)
    with pytest.raises(ResidentWeightsError, match=r"lm_head\.weight"):
        assert_untouched(model, counters)


def test_the_guard_names_a_weight_that_was_exchanged():
    model = tiny_model("llama")
    counters = version_counters(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ResidentWeightsError, match=r"lm_head\.weight"):
        assert_untouched(model, counters)


def test_forwards_and_views_do_not_alarm_the_guard(family, model):
    counters = version_counters(model)
    outputs(model, tiny_batches(family)[0])
    for layer in describe(model).layers:
        weight_matrix(model, layer).sum()
    assert_untouched(model, counters)
