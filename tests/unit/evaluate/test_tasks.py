"""What holds for every task, on a tiny model of its own kind."""

from __future__ import annotations

import math

import pytest
import torch

from autocompress.core import Allocation, Quality, Scheme
from autocompress.core.errors import ModelError
from autocompress.evaluate import TASKS, Split, join
from autocompress.evaluate.task import CorpusKind
from autocompress.models import describe, overridden, weight_matrix
from autocompress.models.prefix import PrefixCache


def perturbed(setting, scale: float):
    module = setting.fresh_module()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * parameter.std() * noise)
    return module


def with_first_parameter(setting, value: float):
    module = setting.fresh_module()
    with torch.no_grad():
        next(p for p in module.parameters() if p.dim() == 2).fill_(value)
    return module


def measure(setting, module, batch_size: int = 4) -> Quality:
    reference = setting.task.reference(setting.module, setting.split, batch_size=5)
    return setting.task.measure(module, setting.split, reference, batch_size=batch_size)


def test_the_base_keeps_all_of_its_quality_and_takes_no_damage(setting):
    quality = measure(setting, setting.module)
    assert quality.retained == pytest.approx(1.0, abs=1e-5)
    assert quality.standard_error < 1e-5
    assert quality.damage.value == pytest.approx(0.0, abs=1e-5)
    assert quality.n_tokens == setting.split.n_tokens


def test_more_damage_to_the_weights_is_more_damage_to_the_outputs(setting):
    little, much = (measure(setting, perturbed(setting, scale)) for scale in (0.05, 1.0))
    assert 0 < little.damage.value < much.damage.value
    assert much.damage.standard_error > 0
    assert setting.task.damage in much.metrics


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_result_does_not_depend_on_the_batch_size(setting, batch_size):
    module = perturbed(setting, 0.3)
    one, other = measure(setting, module, 4), measure(setting, module, batch_size)
    assert one.retained == pytest.approx(other.retained, rel=1e-4)
    assert one.damage.value == pytest.approx(other.damage.value, rel=1e-3, abs=1e-6)


def test_the_reference_does_not_depend_on_the_batch_size(setting):
    one, other = (
        setting.task.reference(setting.module, setting.split, batch_size=n) for n in (1, 7)
    )
    assert one.keys() == other.keys()
    for name, values in one.items():
        if values.is_floating_point():
            assert torch.allclose(values, other[name], atol=1e-4), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_has_a_quality_that_is_not_finite(setting, value):
    quality = measure(setting, with_first_parameter(setting, value))
    assert not quality.is_finite
    assert all(
        not math.isfinite(m.value) for n, m in quality.metrics.items() if n != "top1_agreement"
    )


def test_a_base_that_is_broken_is_refused(setting):
    broken = with_first_parameter(setting, math.nan)
    with pytest.raises(ModelError, match="finite"):
        setting.task.reference(broken, setting.split, batch_size=4)


def test_measuring_leaves_no_trace_on_the_model(setting):
    before = {n: t.clone() for n, t in setting.module.state_dict().items()}
    measure(setting, setting.module)
    for name, tensor in setting.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_reference_can_be_shared_as_numpy_arrays(setting):
    reference = setting.task.reference(setting.module, setting.split, batch_size=4)
    again = {name: torch.from_numpy(tensor.numpy()) for name, tensor in reference.items()}
    one = setting.task.measure(setting.module, setting.split, reference, batch_size=4)
    other = setting.task.measure(setting.module, setting.split, again, batch_size=4)
    assert one == other


def test_a_split_can_be_measured_piece_by_piece(setting):
    task, split = setting.task, setting.split
    module = perturbed(setting, 0.3)
    reference = task.reference(setting.module, split, batch_size=4)
    whole = task.score(module, split, reference, batch_size=4)
    pieces = []
    for start, stop in ((0, 3), (3, 4), (4, len(split))):
        piece = Split.of("search", split.examples[start:stop])
        rows = task.rows(reference, split, start, stop)
        pieces.append(task.score(module, piece, rows, batch_size=4))
    joined = join(pieces)
    for name, values in whole.items():
        assert joined[name].dtype == values.dtype
        assert torch.allclose(joined[name], values, atol=1e-4), name
    quality = task.summarise(joined, split, reference)
    expected = task.measure(module, split, reference, batch_size=4)
    assert quality.damage.value == pytest.approx(expected.damage.value, rel=1e-4)
    assert quality.retained == pytest.approx(expected.retained, rel=1e-4)
    head = task.summarise(pieces[0], split.head(3), task.rows(reference, split, 0, 3))
    assert head.n_tokens == split.head(3).n_tokens


def test_the_damages_of_the_sequences_add_up_to_the_damage(setting):
    task, module = setting.task, perturbed(setting, 0.3)
    reference = task.reference(setting.module, setting.split, batch_size=4)
    scores = task.score(module, setting.split, reference, batch_size=4)
    damages = task.damages(scores)
    damage = task.summarise(scores, setting.split, reference).damage.value
    assert damages.shape == (len(setting.split),)
    assert damages.dtype == torch.float64
    # the damage is a mean over tokens or over sequences
    per = float(damages.sum()) / damage
    assert per == pytest.approx(round(per), rel=1e-6)
    assert round(per) >= len(setting.split)


def test_shared_prefixes_change_no_bit_of_a_quality(setting):
    task, split, module = setting.task, setting.split, setting.fresh_module()
    layout = describe(module)
    reference = task.reference(module, split, batch_size=4)
    cache = PrefixCache(module, layout)
    for layer in layout.layers[::-5]:
        allocation = Allocation.of({layer.name: Scheme.parse("halved")})
        weights = {layer.name: weight_matrix(module, layer) * 0.5}
        with overridden(module, layout, weights):
            expected = task.score(module, split, reference, batch_size=4)
            for _ in range(2):
                with cache.sharing(allocation, "all"):
                    got = task.score(module, split, reference, batch_size=4)
                assert all(torch.equal(got[name], expected[name]) for name in expected)
                assert task.summarise(got, split, reference) == task.summarise(
                    expected, split, reference
                )
    assert cache.reason == ""
    assert cache.counts.saved_share >= 0.4


def test_batches_hold_all_tokens_and_what_the_model_takes(setting):
    batches = setting.task.batches(setting.split, 5)
    with torch.no_grad():
        for batch in batches:
            setting.module(**batch)
    if "attention_mask" in batches[0]:
        tokens = sum(
            int(batch[name].sum())
            for batch in batches
            for name in ("attention_mask", "decoder_attention_mask")
            if name in batch
        )
        assert tokens == setting.split.n_tokens
    lengths = [next(iter(batch.values())).shape[1] for batch in batches]
    assert lengths == sorted(lengths, reverse=True)


def test_half_precision_modules_are_measured_too(setting):
    module = setting.fresh_module().to(torch.bfloat16)
    quality = measure(setting, module)
    assert quality.is_finite
    assert quality.damage.value < 0.5


def test_a_quality_survives_json(setting):
    quality = measure(setting, perturbed(setting, 0.1))
    assert Quality.from_json(quality.to_json()) == quality


def test_decoders_read_their_weights_for_each_token_and_encoders_once_a_sequence(setting):
    tokens = setting.task.tokens_per_pass(setting.split)
    if setting.task.name in ("causal-lm", "seq2seq-lm"):
        assert tokens == 1
    else:
        longest = max(
            setting.task.tokens_per_pass(Split.of("x", [e])) for e in setting.split.examples
        )
        assert 1 < tokens <= longest


def test_every_task_is_described():
    for name in TASKS:
        task = TASKS[name]
        assert task.name == name
        assert task.auto_class.startswith("AutoModel")
        assert task.corpus_kind in CorpusKind
        assert task.summary
        assert (task.default_data is None) == (name == "text-classification")
