from __future__ import annotations

from types import SimpleNamespace

import pytest

from autocompress.core.errors import UsageError
from autocompress.evaluate import detect_task
from autocompress.testing.tiny_models import FAMILIES, auto_class_of, tiny_model

TASK_OF_AUTO_CLASS = {
    "AutoModelForCausalLM": "causal-lm",
    "AutoModelForMaskedLM": "masked-lm",
    "AutoModelForSeq2SeqLM": "seq2seq-lm",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModel": "feature-extraction",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_task_of_every_supported_family_is_known(family):
    model = tiny_model(family)
    model.config.architectures = [type(model).__name__]
    assert detect_task(model.config) == TASK_OF_AUTO_CLASS[auto_class_of(family)]


@pytest.mark.parametrize(
    ("architecture", "is_encoder_decoder", "task"),
    [
        ("GPT2LMHeadModel", False, "causal-lm"),
        ("BertForPreTraining", False, "masked-lm"),
        ("MarianMTModel", True, "seq2seq-lm"),
        ("BartModel", True, "seq2seq-lm"),
        ("BartForCausalLM", True, "causal-lm"),
        ("MistralModel", False, "feature-extraction"),
        ("DeiTForImageClassificationWithTeacher", False, "image-classification"),
    ],
)
def test_the_architecture_decides(architecture, is_encoder_decoder, task):
    config = SimpleNamespace(architectures=[architecture], is_encoder_decoder=is_encoder_decoder)
    assert detect_task(config) == task


@pytest.mark.parametrize(
    "config",
    [
        SimpleNamespace(architectures=["BertForTokenClassification"]),
        SimpleNamespace(architectures=["ViTModel"], image_size=224),
        SimpleNamespace(
            architectures=["WhisperForConditionalGeneration"],
            num_mel_bins=80,
            is_encoder_decoder=True,
        ),
        SimpleNamespace(architectures=["LlavaForConditionalGeneration"], vision_config={}),
        SimpleNamespace(architectures=None),
        SimpleNamespace(),
    ],
)
def test_other_architectures_are_refused_with_the_choices(config):
    with pytest.raises(UsageError, match=r"--task: causal-lm, .*image-classification"):
        detect_task(config)


def test_a_sentence_transformers_model_is_for_feature_extraction():
    config = SimpleNamespace(architectures=["Qwen3ForCausalLM"])
    assert detect_task(config) == "causal-lm"
    assert detect_task(config, has_pipeline=True) == "feature-extraction"
