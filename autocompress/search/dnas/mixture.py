"""A layer that computes with a convex mixture of its options' weights.

``W = sum_o p_o Q_o`` with Q_o the decoded weight under option o (DNAS, Wu et al. 2018, eq. 5;
AQ-BERT, Zhao et al. 2021, eq. 4): ``dL/dp_o = <dL/dW, Q_o>``. The mixture is made when the layer
runs, dropped after it, and made again when backward reaches the layer (Chen et al. 2016, arXiv
1604.06174), so beside the options themselves one mixture and its gradient are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autocompress.core.errors import UsageError
from autocompress.methods import METHODS, rounds_inputs
from autocompress.methods.subgroup import SubgroupOptions
from autocompress.models import ModelLayout, weight_matrix
from autocompress.models.weights import to_module_orientation
from autocompress.search.peers.scores import Dense
from autocompress.spaces import Choice, SearchSpace

MOST_BYTES = 4 << 30
"""Bound on the decoded options of a space, all of them together."""

_NO_NORM = 1e-12


@dataclass(frozen=True, eq=False)
class Mixture:
    """The decoded options of one layer.

    Attributes:
        layer: its name.
        holders: names of the modules that compute with the weight: the layer's and its aliases.
        weights: (n_options, n_weights), each flattened as the module stores it.
        usable: (n_options,), False for an option whose weights are not finite; its row is 0.
        bands: Gram matrices of the options within each band of outputs that may have a bit width
            of its own, over the squared sum of the base's norms: (n_bands, n_options, n_options);
            None if no option has such bands.
    """

    layer: str
    holders: tuple[str, ...]
    weights: Tensor
    usable: Tensor
    bands: Tensor | None

    def lasso(self, probabilities: Tensor) -> Tensor:
        """``sum_g |W_g|_2`` over the bands of the mixture, relative to the base's: a scalar.

        The group lasso of AQ-BERT (eq. 2), on the mixture: there is no other weight to train.
        """
        if self.bands is None:
            return probabilities.new_zeros(())
        squares = torch.einsum("a,gab,b->g", probabilities, self.bands, probabilities)
        return (squares.clamp(min=0) + _NO_NORM).sqrt().sum()


def require_room(space: SearchSpace, layout: ModelLayout, *, most_bytes: int = MOST_BYTES) -> None:
    """Make sure that a space can be trained, from names and shapes alone.

    Raises:
        UsageError: its decoded options take more memory than `most_bytes`, or an option rounds
            what a layer reads, which no mixture of weights expresses.
    """
    needed = 4 * sum(
        len(choice.options) * layout.layer(name).n_weights
        for choice in space.choices
        for name in choice.layers
    )
    if needed > most_bytes:
        raise UsageError(
            f"Differentiable search holds every option of every searched layer decoded, at most "
            f"{most_bytes:,} bytes, but the space {space.name!r} takes {needed:,} on this model. "
            "Next step: take --sampler guided, which decodes what a trial needs, or a space of "
            f"{most_bytes / needed:.0%} as many options or layers."
        )
    for choice in space.choices:
        for option in choice.options:
            if any(map(rounds_inputs, option.schemes)):
                raise UsageError(
                    f"Differentiable search mixes weights, but the option {option.label!r} of "
                    f"{choice.name!r} rounds what the layer reads. Next step: take --sampler "
                    "guided, or a space without such options."
                )


def mixtures(
    module: nn.Module, layout: ModelLayout, space: SearchSpace, dense: Dense
) -> list[list[Mixture]]:
    """The mixtures of the layers of each choice, decoded one matrix at a time.

    Args:
        module: the base model; dtype and device of the mixtures are those of its weights.
        layout: of the model.
        space: whose options are mixed.
        dense: decoded weights; of a `Bank`, for instance.

    Raises:
        UsageError: as `require_room`.
    """
    require_room(space, layout)
    return [
        [_mixture(module, layout, choice, place, dense) for place in range(len(choice.layers))]
        for choice in space.choices
    ]


def _mixture(
    module: nn.Module, layout: ModelLayout, choice: Choice, place: int, dense: Dense
) -> Mixture:
    name = choice.layers[place]
    layer = layout.layer(name)
    base = weight_matrix(module, layer)
    weights = base.new_empty(len(choice.options), base.numel())
    for row, option in zip(weights, choice.options, strict=True):
        scheme = option.schemes[place]
        matrix = base if scheme.is_base else dense(name, scheme).to(base)
        row.copy_(to_module_orientation(matrix, layer).flatten())
    usable = weights.isfinite().all(1)
    weights[~usable] = 0.0
    n_bands = max(map(_n_bands, (option.schemes[place] for option in choice.options)))
    bands = None
    if n_bands:  # bands are rows of the matrix, which a conv1d stores as columns
        stored = (-1, *to_module_orientation(base, layer).shape)
        turned = [to_module_orientation(matrix, layer) for matrix in weights.view(stored)]
        bands = _grams(turned, base, n_bands)
    return Mixture(name, (name, *layer.aliases), weights, usable, bands)


def _n_bands(scheme: Any) -> int:
    """Bands of rows with bit widths of their own under a scheme; 0 for none."""
    options = [METHODS[stage.method].read_options(stage) for stage in scheme.stages]
    return max((o.bands for o in options if isinstance(o, SubgroupOptions)), default=0)


def _grams(matrices: Sequence[Tensor], base: Tensor, n_bands: int) -> Tensor:
    """(n_bands, n_options, n_options), over the square of the summed norms of the base's bands."""
    parts = [torch.tensor_split(matrix, n_bands) for matrix in (*matrices, base)]
    bands = [torch.stack([part[g].flatten() for part in parts]) for g in range(n_bands)]
    grams = torch.stack([band @ band.T for band in bands])
    norms = grams[:, -1, -1].clamp(min=0).sqrt().sum()
    return grams[:, :-1, :-1] / (norms.square() + _NO_NORM)


@contextmanager
def mixed(
    module: nn.Module, parts: Sequence[Sequence[Mixture]], probabilities: Sequence[Tensor]
) -> Iterator[set[str]]:
    """Within the block, the layers of each choice compute with the mixture of its options.

    Args:
        module: the model; modules get their weight and forward back on any exit.
        parts: of `mixtures`.
        probabilities: (n_options,) of each choice, in the graph.

    Yields:
        Names of the modules that ran, filled as they run: what is not in it got no gradient.
    """
    ran: set[str] = set()
    with ExitStack() as stack:
        for layers, p in zip(parts, probabilities, strict=True):
            for mixture in layers:
                for name in mixture.holders:
                    holder = module.get_submodule(name)
                    stack.enter_context(_mixing(holder, mixture, p, partial(ran.add, name)))
        yield ran


@contextmanager
def _mixing(
    holder: nn.Module, mixture: Mixture, probabilities: Tensor, note: Callable[[], None]
) -> Iterator[None]:
    own = vars(holder).get("forward")  # one that was put on the instance stays there afterwards
    plain = holder.forward
    shape = cast(Tensor, holder.weight).shape

    def compute(p: Tensor, *arguments: Any, **named: Any) -> Any:
        weight = (p @ mixture.weights).view(shape)
        with _holding(holder, weight):
            return plain(*arguments, **named)

    def forward(*arguments: Any, **named: Any) -> Any:
        note()
        return checkpoint(
            compute, probabilities, *arguments, use_reentrant=False, preserve_rng_state=False,
            **named,
        )  # fmt: skip

    holder.forward = forward
    try:
        yield
    finally:
        if own is None:
            del holder.forward
        else:
            holder.forward = own


@contextmanager
def _holding(holder: nn.Module, weight: Tensor) -> Iterator[None]:
    """The module's weight is another tensor, in the graph, for as long as the block lasts."""
    parameters = cast(dict[str, Tensor | None], holder._parameters)
    before = parameters["weight"]
    parameters["weight"] = weight
    try:
        yield
    finally:
        parameters["weight"] = before


def penalties(parts: Sequence[Sequence[Mixture]], probabilities: Sequence[Tensor]) -> Tensor:
    """Mean group lasso over the layers that have bands; 0 if none has."""
    pairs = zip(parts, probabilities, strict=True)
    found = [m.lasso(p) for layers, p in pairs for m in layers if m.bands is not None]
    return torch.stack(found).mean() if found else probabilities[0].new_zeros(())


def usable(parts: Sequence[Mixture]) -> Tensor:
    """(n_options,) of a choice: whether every layer's weights are finite."""
    return torch.stack([mixture.usable for mixture in parts]).all(0)


def require_all_ran(parts: Sequence[Sequence[Mixture]], ran: set[str]) -> None:
    """Make sure that every searched layer takes part in the loss.

    Raises:
        UsageError: one did not run.
    """
    for mixture in (mixture for layers in parts for mixture in layers):
        if not ran.intersection(mixture.holders):
            raise UsageError(
                f"Differentiable search needs every searched layer to take part in a forward pass, "
                f"but {mixture.layer!r} did not. Next step: leave it out of the space, or take "
                "--sampler guided."
            )
