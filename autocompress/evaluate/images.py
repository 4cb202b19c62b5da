"""Images to the pixels that a model wants, with torch alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autocompress.core.errors import DataError, ModelError
from autocompress.evaluate.readers import missing_file


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """What a vision model wants.

    Attributes:
        height: in pixels.
        width: in pixels.
        channels: 1 or 3.
        mean: subtracted, by channel, after scaling to [0, 1].
        std: divided by, by channel.
        n_tokens: tokens that the model makes of one image: patches and a class token.
    """

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    n_tokens: int

    @classmethod
    def of(cls, processor: object, config: object) -> ImageGeometry:
        """Size from the config, else the processor; mean and deviation from the processor.

        Where the processor (an object, or the JSON of one) states none, both are 0.5, as most
        vision transformers have it.

        Raises:
            ModelError: neither states an image size.
        """
        size = getattr(config, "image_size", None) or _processor_size(processor)
        if size is None:
            raise ModelError(
                "The model states no image size: neither image_size in its config.json nor size "
                "in preprocessor_config.json. Is it an image classifier?"
            )
        height, width = _pair(size)
        channels = int(getattr(config, "num_channels", 3) or 3)
        patch = _pair(getattr(config, "patch_size", None) or 16)
        patches = (height // patch[0]) * (width // patch[1])
        return cls(
            height,
            width,
            channels,
            _per_channel(_field(processor, "image_mean"), channels),
            _per_channel(_field(processor, "image_std"), channels),
            max(1, patches) + 1,
        )


def to_pixels(image: Tensor, geometry: ImageGeometry) -> Tensor:
    """Resize (bilinear, antialiased), match the channels and normalise.

    Args:
        image: shape ``(c, h, w)``, float32 in [0, 1].
        geometry: what the model wants.

    Returns:
        Shape ``(channels, height, width)``, float32.
    """
    if image.shape[0] != geometry.channels:
        grey = image.mean(0, keepdim=True)
        image = grey.expand(geometry.channels, -1, -1)
    resized = torch.nn.functional.interpolate(
        image[None],
        size=(geometry.height, geometry.width),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )[0]
    mean = torch.tensor(geometry.mean)[:, None, None]
    std = torch.tensor(geometry.std)[:, None, None]
    return (resized - mean) / std


def read_image(cell: object, folder: Path, source: str) -> Tensor:
    """One cell of an image column.

    Args:
        cell: a path, encoded bytes, nested lists, an array, or a Pillow image.
        folder: what a path is relative to.
        source: the data's name, for messages.

    Returns:
        Shape ``(channels, height, width)``, float32 in [0, 1].

    Raises:
        DataError: the file is missing or is no image.
    """
    if isinstance(cell, dict):  # as `datasets` stores an encoded image
        cell = io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell.get("path")
    if isinstance(cell, str):
        path = folder / Path(cell).expanduser()
        if not path.is_file():
            raise missing_file(path)
        if path.suffix == ".npy":
            return _from_array(np.load(path, allow_pickle=False), source)
        return _from_array(_decoded(path, source), source)
    if isinstance(cell, io.BytesIO):
        return _from_array(_decoded(cell, source), source)
    return _from_array(np.asarray(cell), source)


def _decoded(file: Path | io.BytesIO, source: str) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError(
            f"Reading the image files of {source!r} needs Pillow: pip install pillow. (Arrays of "
            "pixels and .npy files need nothing.)"
        ) from error
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"An image of {source!r} cannot be decoded: {error}.") from error


def _from_array(array: np.ndarray, source: str) -> Tensor:
    if array.dtype.kind not in "uif" or array.ndim not in (2, 3):
        raise DataError(
            f"An image has shape (height, width) or (height, width, channels), but one of "
            f"{source!r} has shape {array.shape} of {array.dtype}."
        )
    # whole numbers are 0..255, as in image files
    scaled = array.astype(np.float32) / (255.0 if array.dtype.kind in "ui" else 1.0)
    pixels = torch.from_numpy(scaled)
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def _field(processor: object, name: str) -> object:
    """A field of an image processor or of its JSON."""
    if isinstance(processor, Mapping):
        return processor.get(name)
    return getattr(processor, name, None)


def _processor_size(processor: object) -> object:
    size = _field(processor, "size")
    if size is None or isinstance(size, int | Sequence):
        return size
    edge = _field(size, "shortest_edge")
    return edge or (_field(size, "height"), _field(size, "width"))


def _pair(size: object) -> tuple[int, int]:
    if isinstance(size, Sequence):
        return int(size[0]), int(size[1])
    if isinstance(size, int):
        return size, size
    raise ModelError(f"An image or patch size is one or two whole numbers, but got {size!r}.")


def _per_channel(values: object, channels: int) -> tuple[float, ...]:
    if isinstance(values, Sequence) and len(values) == channels:
        return tuple(float(v) for v in values)
    return (0.5,) * channels
