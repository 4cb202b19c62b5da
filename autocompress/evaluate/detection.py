"""Which task a model was made for, from its config alone."""

from __future__ import annotations

from autocompress.core.errors import UsageError
from autocompress.evaluate.task import TASKS

# Endings of class names, which transformers keeps to; the first that fits decides.
_HEADS = (
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
    ("ForMaskedLM", "masked-lm"),
    ("ForPreTraining", "masked-lm"),
    ("ForSequenceClassification", "text-classification"),
    ("ForImageClassification", "image-classification"),
    ("ForImageClassificationWithTeacher", "image-classification"),
)
_NOT_TEXT = (
    "image_size",
    "num_mel_bins",
    "vision_config",
    "audio_config",
    "num_conv_pos_embeddings",
)


def detect_task(config: object, *, has_pipeline: bool = False) -> str:
    """The name of the task that a model's architecture is for.

    Args:
        config: the model's config; ``architectures`` decides, ``is_encoder_decoder`` helps.
        has_pipeline: the model is one of sentence-transformers (with ``modules.json``), for
            feature extraction whatever its architecture.

    Raises:
        UsageError: the architecture is none that a task is for; names the choices of ``--task``.
    """
    architecture = next(iter(getattr(config, "architectures", None) or ()), "")
    if has_pipeline:
        return "feature-extraction"
    for ending, task in _HEADS:
        if architecture.endswith(ending):
            return task
    reads_text = not any(hasattr(config, name) for name in _NOT_TEXT)
    bare_task = _without_head(architecture, config) if reads_text else None
    if bare_task is not None:
        return bare_task
    raise UsageError(
        f"No task fits the architecture {architecture or '(none stated)'!r} of the model's config. "
        f"Choose one with --task: {', '.join(TASKS)}."
    )


def _without_head(architecture: str, config: object) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        sequences = ("ForConditionalGeneration", "MTModel", "Model", "WithLMHeadModel")
        return "seq2seq-lm" if architecture.endswith(sequences) else None
    is_encoder = architecture.endswith("Model") and not architecture.endswith("HeadModel")
    return "feature-extraction" if is_encoder else None
