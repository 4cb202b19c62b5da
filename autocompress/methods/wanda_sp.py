"""Wanda for structures: remove the neurons or heads that add least to the layer's outputs.

The score of Wanda (Sun et al. 2024, arXiv 2306.11695, equation 1) summed over a structure, which An
et al. 2024 (FLAP, arXiv 2312.11983) compare with as Wanda-SP: here ``sum_j H_jj |W_:j|^2`` over the
columns of a unit, what the outputs lose if the inputs are uncorrelated. FLAP itself scores the
variance of an input and adds what its mean put out to a bias: better than this, but not beside the
refit of `ziplm` (`benchmarks/bias_compensation.py`), so statistics here hold no means.
"""

from __future__ import annotations

from torch import Tensor

from autocompress.methods.base import METHODS, Needs
from autocompress.methods.problem import LayerProblem
from autocompress.methods.width import Chosen, Width, WidthOptions, keep_best


class WandaSP(Width):
    """Removes the units of least weight times input."""

    needs = Needs.DIAGONAL
    summary = "remove the neurons or heads of least |weight| x |input|"
    stronger = "ziplm"

    def choose(self, reader: LayerProblem, options: WidthOptions) -> Chosen:
        """See `Width.choose`; without statistics every input counts the same."""
        notes = tuple[str, ...]()
        if reader.hessian is None:
            notes = ("wanda_sp compared magnitudes: the layer has no calibration statistics",)
        return Chosen(keep_best(output_shares(reader, options.of), options.keep), None, notes)


def output_shares(reader: LayerProblem, n_units: int) -> Tensor:
    """``sum_j H_jj |W_:j|^2`` of each unit, (n_units,) float64; without H ``|W|^2``."""
    energies = reader.weight.double().square().sum(0) * reader.energies.double()
    return energies.view(n_units, -1).sum(1)


METHODS.add("wanda_sp", WandaSP())
