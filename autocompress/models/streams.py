"""Which positions of a layer's input are tokens and which are padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Masks of the two streams of an encoder-decoder, or of the one stream of any other model.

    Attributes:
        encoder_prefix: fully qualified name of the encoder of an encoder-decoder; None otherwise.
    """

    encoder_prefix: str | None

    def of(
        self, module_name: str, batch: Mapping[str, Tensor], *, reads_encoder_output: bool
    ) -> Tensor | None:
        """True where the input of `module_name` is a token; None if every position is one.

        Args:
            module_name: the layer.
            batch: what the model was called with.
            reads_encoder_output: the layer is a key or value projection of cross-attention.
        """
        if self._in_decoder(module_name) and not reads_encoder_output:
            return _decoder_mask(batch)
        return _as_mask(batch.get("attention_mask"))

    def _in_decoder(self, module_name: str) -> bool:
        """Also true for the head, which follows the decoder."""
        prefix = self.encoder_prefix
        return prefix is not None and not module_name.startswith(f"{prefix}.")


def encoder_prefix(module: nn.Module) -> str | None:
    """Name of the encoder of an encoder-decoder model; None for every other model."""
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return None
    encoder = module.get_encoder()  # type: ignore[operator]  # transformers gives it to them all
    return next((name for name, child in module.named_modules() if child is encoder), None)


def _decoder_mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    """The decoder's own mask; else the labels that count; else the decoder reads the source."""
    mask = batch.get("decoder_attention_mask")
    labels = batch.get("labels")
    if mask is None and labels is not None and labels.ndim == 2:
        return labels != IGNORED_LABEL
    if mask is None and "decoder_input_ids" not in batch:
        mask = batch.get("attention_mask")
    return _as_mask(mask)


def _as_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()
