import math

import pytest
import torch

from autocompress.core.errors import UnknownNameError
from autocompress.models import model_digest
from autocompress.testing.tiny_models import (
    FAMILIES,
    Sizes,
    tiny_batches,
    tiny_model,
    tiny_tokenizer,
    train_briefly,
)


def test_equal_seeds_give_equal_models_and_leave_the_global_generator_alone(family):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = model_digest(tiny_model(family))
    assert model_digest(tiny_model(family)) == first
    assert model_digest(tiny_model(family, seed=1)) != first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_equal_seeds_give_equal_batches(family):
    for a, b in zip(tiny_batches(family), tiny_batches(family), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_padded_batches_hold_padding(family):
    batch = tiny_batches(family)[0]
    if "attention_mask" in batch:
        assert (batch["attention_mask"] == 0).any()
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"bert-encoder"}))  # that has no loss
def test_every_family_learns_its_batches_a_little(family, model):
    batches = tiny_batches(family, n_batches=2)
    with torch.no_grad():
        before = sum(float(model(**batch).loss) for batch in batches) / 2
    assert train_briefly(model, batches, steps=20) < before
    assert not model.training


@pytest.mark.slow
def test_brief_training_brings_the_perplexity_far_below_the_vocabulary():
    model = tiny_model("llama")
    batches = tiny_batches("llama", n_batches=32, batch_size=8, length=64, padded=False)
    held_out = tiny_batches("llama", n_batches=2, batch_size=8, length=64, padded=False, seed=1)
    train_briefly(model, batches)
    with torch.no_grad():
        loss = sum(float(model(**batch).loss) for batch in held_out) / 2
    assert math.exp(loss) < Sizes().vocabulary / 8


def test_the_tokenizer_reads_any_text_and_frames_it():
    causal, encoder = tiny_tokenizer("llama"), tiny_tokenizer("bert")
    assert causal("a")["input_ids"][:1] == [causal.bos_token_id]
    assert encoder("a")["input_ids"][-1] == encoder.sep_token_id
    text = "tschüß 漢字 \x00\n"
    assert causal.decode(causal(text)["input_ids"], skip_special_tokens=True) == text
    assert len(causal) == Sizes().vocabulary


def test_an_unknown_family_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'llama'"):
        tiny_model("lama")
