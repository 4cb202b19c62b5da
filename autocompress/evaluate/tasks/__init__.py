"""One file per task; importing this package registers them all."""

from autocompress.evaluate.tasks import (
    causal_lm,
    feature_extraction,
    image_classification,
    masked_lm,
    seq2seq_lm,
    text_classification,
)

__all__ = [
    "causal_lm",
    "feature_extraction",
    "image_classification",
    "masked_lm",
    "seq2seq_lm",
    "text_classification",
]
