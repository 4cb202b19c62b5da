"""The way from a name to a search space on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from autocompress.core.errors import SpaceError
from autocompress.core.layer import LayerSpec
from autocompress.spaces.catalog import find_space
from autocompress.spaces.schema import Ties
from autocompress.spaces.space import SearchSpace


def load_space(
    name_or_path: str,
    layers: Sequence[LayerSpec],
    *,
    ties: Ties | None = None,
    routed: Mapping[str, int] = MappingProxyType({}),
) -> SearchSpace:
    """The search space that a shipped space or a space file gives on a model.

    Args:
        name_or_path: a name of `available_spaces`, or the path of a YAML file.
        layers: all compressible layers of the model, in execution order
            (``describe(module).layers``).
        ties: which layers must take the same option, whatever the file says; None: as it says.
        routed: by name of a layer of an expert, the calibration tokens that are sent to it: experts
            that share an option are picked by it. Without it they are picked by their number.

    Raises:
        UnknownNameError: there is no shipped space of that name.
        SpaceError: the file is malformed or does not fit the model; names file, line and field.
    """
    file = find_space(name_or_path)
    from autocompress.spaces.resolve import resolve  # imports torch: not needed to list spaces

    if ties is None or ties == file.spec.ties:
        return resolve(file, layers, routed)
    tied = replace(file, spec=file.spec.model_copy(update={"ties": ties}))
    try:
        return resolve(tied, layers, routed)
    except SpaceError as error:
        raise SpaceError(
            f"{error} (The file does not tie them, but the target runs them as one.)"
        ) from error
