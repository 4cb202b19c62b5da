import itertools

import pytest
import torch
from any_loss import any_loss
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from autocompress.core import derived_seed
from autocompress.core.errors import ModelError
from autocompress.models import (
    assert_untouched,
    describe,
    overridden,
    slopes,
    version_counters,
    weight_matrix,
)
from autocompress.models.slopes import collect_slopes
from autocompress.models.weights import to_module_orientation
from autocompress.testing.tiny_models import PAD, tiny_batches, tiny_model


def drawn_label_loss(module, batch, generator):
    """Cross entropy of a label that the model itself gives, one per sequence."""
    logprobs = module(**batch).logits.log_softmax(1)
    labels = torch.multinomial(logprobs.detach().exp(), 1, generator=generator)
    return -logprobs.gather(1, labels).sum(), len(logprobs)


def sequences_of(family, n=3):
    batch = tiny_batches(family, n_batches=1)[0]
    return [{name: t[i : i + 1] for name, t in batch.items()} for i in range(n)]


def errors_of(model, layout, n, scale=1.0):
    def errors(name):
        weight = weight_matrix(model, layout.layer(name))
        generator = torch.Generator().manual_seed(derived_seed("errors", name))
        # Rounded as errors are: what is compared is exact.
        drawn = (scale * torch.randn(n, *weight.shape, generator=generator)).bfloat16().to(weight)
        if layout.layer(name).kind == "embedding":
            drawn[:, PAD] = 0  # torch gives the row of padding no gradient
        return drawn

    return errors


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # of torch's own
def test_they_are_the_change_of_the_loss_along_each_error_in_every_family(family):
    model = tiny_model(family).double()
    layout, sequences = describe(model), sequences_of(family, n=2)
    names = [layer.name for layer in layout.layers]
    errors = errors_of(model, layout, n=2)
    found = collect_slopes(
        model, layout, sequences, any_loss, n_errors=dict.fromkeys(names, 2),
        errors=lambda name: errors(name).float(), draws=2, seed=5,
    )  # fmt: skip
    assert found.n_units == 4
    for name in names[:: max(1, len(names) // 4)]:
        expected = torch.tensor(
            [
                [derivative(model, layout, sequences[place], name, error, (draw, place))
                 for error in errors(name)]
                for draw, place in itertools.product(range(2), range(2))
            ],
            dtype=torch.float64,
        )  # fmt: skip
        torch.testing.assert_close(
            found.by_layer[name], expected, rtol=0, atol=1e-4 * float(expected.abs().max())
        )


def derivative(model, layout, sequence, name, error, labels):
    """Of the loss along an error, by forward differentiation of the whole model."""
    generator = torch.Generator().manual_seed(derived_seed("slopes", 5, *labels))
    weight = model.get_parameter(f"{name}.weight").detach()

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return any_loss(self.model, sequence, generator)[0]

    def at(changed):
        return functional_call(Loss(), {f"model.{name}.weight": changed}, ())

    direction = to_module_orientation(error, layout.layer(name)).to(weight)
    with sdpa_kernel(SDPBackend.MATH):
        return float(jvp(at, (weight,), (direction,))[1].detach())


def test_half_their_square_is_the_divergence_of_an_error_of_many_layers():
    """Terms between layers, which predictions of single layers cannot have, are in it."""
    model = tiny_model("bert-classifier").double()
    layout, sequences = describe(model), sequences_of("bert-classifier", n=4)
    names = [layer.name for layer in layout.layers if layer.kind == "linear"][:6]
    errors = errors_of(model, layout, n=1, scale=2e-3)
    found = collect_slopes(
        model, layout, sequences, drawn_label_loss, n_errors=dict.fromkeys(names, 1),
        errors=lambda name: errors(name).float(), draws=500,
    )  # fmt: skip
    together = torch.stack([found.by_layer[name][:, 0] for name in names]).sum(0)
    predicted = 0.5 * float(together.square().sum()) / found.n_units
    changed = {name: weight_matrix(model, layout.layer(name)) + errors(name)[0] for name in names}
    divergence = 0.0
    with torch.no_grad():
        for batch in sequences:
            before = model(**batch).logits.log_softmax(1)
            with overridden(model, layout, changed):
                after = model(**batch).logits.log_softmax(1)
            divergence += float((before.exp() * (before - after)).sum()) / len(sequences)
    assert predicted == pytest.approx(divergence, rel=0.1)


@pytest.mark.parametrize("budget", [0, 200_000])
def test_errors_that_memory_does_not_hold_are_made_for_each_sample(budget):
    model = tiny_model("llama")
    layout, sequences = describe(model), sequences_of("llama")
    n_errors = {layer.name: 1 + index % 2 for index, layer in enumerate(layout.layers)}
    calls, made = [], []

    def collect(**options):
        def errors(name):
            made.append(name)
            return iter(errors_of(model, layout, n_errors[name])(name))

        made.clear()
        return collect_slopes(
            model, layout, sequences, any_loss, n_errors=n_errors, errors=errors, draws=2, **options
        )

    whole = collect(progress=lambda *done: calls.append(done))
    assert made == list(n_errors)
    assert calls == [(done, 2 * len(sequences)) for done in range(1, 2 * len(sequences) + 1)]
    cut = collect(memory_budget_bytes=budget)
    times = {name: made.count(name) for name in n_errors}
    kept = sum(
        2 * n_errors[name] * layout.layer(name).n_weights for name, n in times.items() if n == 1
    )
    assert kept <= budget
    assert set(times.values()) == ({1, cut.n_samples} if budget else {cut.n_samples})
    assert cut.n_units == whole.n_units == cut.n_samples == 2 * len(sequences)
    for name, expected in whole.by_layer.items():
        assert expected.shape == (2 * len(sequences), n_errors[name])
        scale = float(expected.abs().max())
        torch.testing.assert_close(cut.by_layer[name], expected, rtol=1e-4, atol=1e-4 * scale)


def test_memory_that_no_error_filled_is_never_taken_for_one():
    model = tiny_model("llama")
    layout = describe(model)
    with pytest.raises(ValueError, match="shorter"):
        collect_slopes(
            model, layout, sequences_of("llama"), any_loss, n_errors={"lm_head": 2},
            errors=errors_of(model, layout, n=1),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_over_a_large_layer_are_wider_than_its_gradient(dtype, monkeypatch):
    monkeypatch.setattr(slopes, "_AT_ONCE", 1 << 10)
    generator = torch.Generator().manual_seed(0)
    errors = (1 + torch.randn(2, 1 << 20, generator=generator)).bfloat16()
    gradient = (1 + torch.randn(1 << 20, generator=generator)).to(dtype)
    found = slopes._product(errors, gradient).double()
    torch.testing.assert_close(found, errors.double() @ gradient.double(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("trainable", [True, False])
def test_the_model_is_left_as_it_was(trainable):
    model = tiny_model("llama").requires_grad_(trainable)
    layout, before = describe(model), version_counters(model)

    def failing(module, batch, generator):
        raise ZeroDivisionError

    options = {"n_errors": {"lm_head": 1}, "errors": errors_of(model, layout, n=1)}
    with pytest.raises(ZeroDivisionError):
        collect_slopes(model, layout, sequences_of("llama"), failing, **options)
    collect_slopes(model, layout, sequences_of("llama"), any_loss, **options)
    assert_untouched(model, before)
    assert all(p.requires_grad is trainable and p.grad is None for p in model.parameters())


def test_a_layer_that_the_loss_does_not_depend_on_has_none():
    model = tiny_model("llama")
    layout = describe(model)

    def of_inputs(module, batch, generator):
        return module.get_input_embeddings()(batch["input_ids"]).sum(), 1

    names = [layout.layers[0].name, "model.layers.1.mlp.down_proj"]
    found = collect_slopes(
        model, layout, sequences_of("llama"), of_inputs, n_errors=dict.fromkeys(names, 1),
        errors=errors_of(model, layout, n=1),
    )  # fmt: skip
    assert bool(found.by_layer[names[0]].any())
    assert not bool(found.by_layer[names[1]].any())


def test_unknown_layers_are_refused_by_name():
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="nowhere"):
        collect_slopes(
            model, describe(model), sequences_of("llama"), any_loss,
            n_errors={"nowhere": 1}, errors=lambda _: torch.zeros(1, 1, 1),
        )  # fmt: skip
