"""One layer to compress: its weight, its calibration statistics, and what is derived from both.

Decompositions are computed on first use and kept, so that all options of a layer share them: one
inverse factor serves every bit width, one spectrum every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, cast

import torch
from torch import Tensor

from autocompress.core.digest import digest
from autocompress.core.errors import ModelError, SchemeError

DAMPING = 0.01
"""Share of the mean of diag(H) that is added to the diagonal."""

_SHRINKAGE = 0.25  # benchmarks/few_tokens.py
_ROWS_AT_ONCE = 16384
_NEGLIGIBLE = 1e-14  # share of the largest eigenvalue of a Gram matrix that is rounding noise

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What calibration gathered about the input of a layer.

    Attributes:
        hessian: ``H = E[x x^T]``, (d, d) float32, or None if the input is not a vector of
            activations or was not seen.
        n_tokens: tokens that H averages.
        digest: of the content; part of the key of cached results.
        ridge: share of the mean of diag(H) that is added to the diagonal before H is used.
    """

    hessian: Tensor | None
    n_tokens: int
    digest: str
    ridge: float = 0.0

    @classmethod
    def sampled(cls, hessian: Tensor | None, n_tokens: int, identity: str) -> LayerStatistics:
        """Of tokens that stand for others: H gets a ridge of ``d / (4 n)`` of the mean of diag(H).

        Compensating errors by the H of few tokens fits its noise. The ridge is that of a shrinkage
        to the identity (Ledoit and Wolf, A well-conditioned estimator for large-dimensional
        covariance matrices, Journal of Multivariate Analysis 88, 2004); its size is measured
        (`benchmarks/few_tokens.py`). The fewer tokens, the nearer are methods to their plain form.

        Args:
            hessian: mean of ``x x^T`` over the tokens, (d, d) float32; None if there were none.
            n_tokens: so many.
            identity: digest of the content.
        """
        if hessian is None or not n_tokens:
            return cls.none()
        return cls(
            hessian,
            n_tokens,
            digest(["sampled", _SHRINKAGE, n_tokens, identity]),
            ridge=_SHRINKAGE * len(hessian) / n_tokens,
        )

    @classmethod
    def none(cls) -> LayerStatistics:
        """No statistics; methods fall back to their data-free form and say so."""
        return cls(None, 0, "none")


@dataclass(frozen=True, eq=False)
class InverseFactor:
    """Upper triangular U with ``U^T U = (P^T (H + ridge I) P)^-1``.

    Attributes:
        upper: U, (d, d) float32.
        order: the permutation P as indices, (d,) int64: position k holds input ``order[k]``.
        ridge: what was added to the diagonal.
        damping: the same as a share of the mean of diag(H); more than was asked for if H needed it.
    """

    upper: Tensor
    order: Tensor
    ridge: float
    damping: float


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The best factors of every rank at once; the first r of each are those of rank r.

    Attributes:
        outer: U, (o, k) float32, k = min(o, d): left singular vectors of ``W L``, ``L L^T = H``.
        inner: ``U^T W``, (k, d) float32.
        energies: squared singular values of ``W L``, (k,) float64, descending; rank r loses
            exactly ``energies[r:].sum()`` of ``tr(D H D^T)``.
    """

    outer: Tensor
    inner: Tensor
    energies: Tensor


class LayerProblem:
    """A layer's weight (o, d) in float32 with its statistics; treat both as read-only.

    Raises:
        SchemeError: the weight is not a matrix, or the shape of H does not fit it.
        ModelError: the weight or H holds NaN or infinity.
    """

    def __init__(self, weight: Tensor, statistics: LayerStatistics) -> None:
        if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
            raise SchemeError(
                "A weight must be a non-empty floating-point matrix (out_features, in_features), "
                f"but got shape {tuple(weight.shape)} of {weight.dtype}."
            )
        self.weight = weight.detach().to(torch.float32).contiguous()
        self.statistics = statistics
        self.hessian = self._checked_hessian()
        self._factors: dict[tuple[bool, float, int], InverseFactor | None] = {}
        self._derived: dict[Hashable, LayerProblem] = {}
        self._latest: tuple[Hashable, object] = (None, None)
        if not bool(torch.isfinite(self.weight).all()):
            raise ModelError(
                "A weight must be finite, but it holds NaN or infinity. The checkpoint is damaged "
                "or overflowed its dtype: load it from its source again."
            )

    def _checked_hessian(self) -> Tensor | None:
        hessian, d = self.statistics.hessian, self.weight.shape[1]
        if hessian is None:
            return None
        if tuple(hessian.shape) != (d, d):
            raise SchemeError(
                f"Statistics must be a ({d}, {d}) matrix for a weight with {d} inputs, but got "
                f"{tuple(hessian.shape)}. Are they those of another layer?"
            )
        if not bool(torch.isfinite(hessian).all()):
            raise ModelError(
                "Calibration statistics must be finite, but they hold NaN or infinity: the model "
                "overflows on the calibration tokens. Calibrate in float32 or bfloat16."
            )
        hessian = hessian.detach().to(self.weight.device, torch.float32)
        if self.statistics.ridge:
            hessian = hessian.clone()
            hessian.diagonal().add_(self.statistics.ridge * hessian.diagonal().mean())
        return hessian

    @property
    def n_tokens(self) -> int:
        """Calibration tokens behind the statistics."""
        return self.statistics.n_tokens

    @property
    def unseen(self) -> str:
        """Why there is no H; empty if there is one."""
        return "" if self.hessian is not None else "the layer has no calibration statistics"

    @cached_property
    def energies(self) -> Tensor:
        """Mean square of each input, (d,); ones without statistics.

        The diagonal of H is known from far fewer tokens than H: of n sampled ones it is shrunk by
        ``1 / n`` of its mean instead of the ridge.
        """
        hessian = self.statistics.hessian
        if hessian is None:
            return torch.ones(self.weight.shape[1], device=self.weight.device)
        found = hessian.diagonal().to(self.weight.device, torch.float32).clamp(min=0)
        return found + found.mean() / self.n_tokens if self.statistics.ridge else found

    @cached_property
    def importance(self) -> Tensor:
        """Cost of a unit error in each input, (d,): their energies, damped; ones without any."""
        if self.hessian is None or not bool(self.energies.any()):
            return torch.ones_like(self.energies)
        return self.energies + DAMPING * self.energies.mean()

    def with_weight(self, weight: Tensor) -> LayerProblem:
        """The same statistics for another weight (o, d); what follows from H alone is shared."""
        problem = LayerProblem(weight, self.statistics)
        problem._factors = self._factors
        return problem

    def derived(self, key: Hashable, make: Callable[[], LayerProblem]) -> LayerProblem:
        """A problem made from this one, kept, so that options that derive the same share it."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def latest(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives; kept until another key is asked for, so that memory is bounded.

        For results that several calls on behalf of one option share, e.g. a mask and its values.
        """
        kept, found = self._latest
        if kept != key:
            found = make()
            self._latest = key, found
        return cast(Made, found)

    def loss(self, dense: Tensor) -> float:
        """Calibration loss ``tr(D H D^T)``, D = dense - weight: mean squared output error.

        Without statistics H is the identity. Accumulated in float64.
        """
        return float(row_losses(dense, self.weight, self.hessian).sum())

    def inverse_factor(
        self, *, by_activation: bool, damping: float, piece: int = 1
    ) -> InverseFactor | None:
        """The inverse factor, inputs ordered by diag(H) if `by_activation`; None if all fails.

        Runs of `piece` inputs, which must divide d, stay together: they go by their sums.
        """
        key = (by_activation, damping, piece)
        if key not in self._factors:
            self._factors[key] = self._factorised(by_activation, damping, piece)
        return self._factors[key]

    def usable_factor(
        self, *, by_activation: bool, damping: float, piece: int = 1
    ) -> tuple[InverseFactor | None, str]:
        """`inverse_factor`, or None and why H is of no use."""
        if self.unseen:
            return None, self.unseen
        factor = self.inverse_factor(by_activation=by_activation, damping=damping, piece=piece)
        return factor, "" if factor else "H has no Cholesky factor at any damping up to 1"

    def _factorised(self, by_activation: bool, damping: float, piece: int) -> InverseFactor | None:
        if self.hessian is None:
            return None
        diagonal = self.hessian.diagonal()
        order = torch.arange(len(diagonal), device=diagonal.device)
        if by_activation:
            sums = diagonal.view(-1, piece).sum(1)
            runs = torch.argsort(sums, descending=True, stable=True)
            order = order.view(-1, piece)[runs].view(-1)
        permuted = self.hessian[order][:, order].to(torch.float64)
        mean = float(diagonal.mean()) or 1.0
        for share in (damping, 10 * damping, 100 * damping, 1.0):
            if damping <= share <= 1.0:
                upper = inverse_cholesky_upper(permuted, share * mean)
                if upper is not None:
                    return InverseFactor(upper.float(), order, share * mean, share)
        return None

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of the weight itself."""
        return spectrum_of(self.weight, None)

    @cached_property
    def whitened_spectrum(self) -> Spectrum:
        """Of the weight whitened by H (SVD-LLM)."""
        return spectrum_of(self.weight, self.hessian)


def row_losses(dense: Tensor, weight: Tensor, hessian: Tensor | None) -> Tensor:
    """``d H d^T`` of each row d of dense - weight, (o,) float64; without H the squared length.

    Single precision could not tell small gains from none.
    """
    difference = dense.double() - weight.double()
    weighted = difference if hessian is None else difference @ hessian.double()
    return (weighted * difference).sum(1)


def inverse_cholesky_upper(hessian: Tensor, ridge: float) -> Tensor | None:
    """Upper U with ``U^T U = (H + ridge I)^-1``; None if H + ridge I is not positive definite.

    By reverse Cholesky: with J the exchange matrix and ``L L^T = J H J``, ``A = J L J`` is upper
    with ``H = A A^T``, so ``U = A^-1``. No inverse of H is formed.
    """
    d = hessian.shape[0]
    identity = torch.eye(d, dtype=hessian.dtype, device=hessian.device)
    reversed_ = (hessian + ridge * identity).flip(0, 1)
    lower, info = torch.linalg.cholesky_ex(reversed_)
    if int(info) != 0:
        return None
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return upper if bool(torch.isfinite(upper).all()) else None


def spectrum_of(weight: Tensor, hessian: Tensor | None) -> Spectrum:
    """Spectrum of ``W L`` from eigenvalues of Gram matrices of size min(o, d), in float64.

    With ``W L = U S V^T`` the best approximation of rank r in the norm of H is
    ``U_r S_r V_r^T L^-1 = U_r U_r^T W``: neither L nor its inverse is needed, and a singular H
    (fewer tokens than inputs) does no harm. A tall W is first reduced to a d x d matrix R with
    ``R^T R = W^T W``.

    Args:
        weight: (o, d) float32.
        hessian: (d, d), or None for the identity.
    """
    o, d = weight.shape
    if o <= d:
        basis, inner, energies = _wide_spectrum(weight.double(), hessian)
        return Spectrum(basis.float(), inner.float(), energies)
    blocks = torch.split(weight, _ROWS_AT_ONCE)
    gram = torch.stack([block.double().T @ block.double() for block in blocks]).sum(0)
    values, vectors = torch.linalg.eigh(gram)
    roots = values.clamp(min=float(values[-1]) * _NEGLIGIBLE).sqrt()
    basis, inner, energies = _wide_spectrum(roots[:, None] * vectors.T, hessian)
    lift = vectors @ (basis / roots.clamp(min=torch.finfo(roots.dtype).tiny)[:, None])
    outer = torch.cat([(block.double() @ lift).float() for block in blocks])
    return Spectrum(outer, inner.float(), energies)


def _wide_spectrum(weight: Tensor, hessian: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(U, U^T W, energies) of a float64 matrix with no more rows than columns."""
    gram = weight @ weight.T if hessian is None else weight @ hessian.double() @ weight.T
    energies, basis = torch.linalg.eigh((gram + gram.T) / 2)
    basis = basis.flip(1)
    return basis, basis.T @ weight, energies.flip(0).clamp(min=0)
