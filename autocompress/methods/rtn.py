"""Round to nearest.

Each weight goes to the nearest level of its group's grid. The grid is clipped to minimise the
squared error weighted by diag(H): an input that is loud in calibration counts for more. (Range
clipping by weighted error is the practice of llama.cpp's importance matrices; clipping by plain
error is in the reference code of GPTQ, Frantar et al. 2023, arXiv 2210.17323.)
"""

from __future__ import annotations

from torch import Tensor

from autocompress.methods.base import METHODS, GridQuantizer, Needs
from autocompress.methods.coding import Quantized
from autocompress.methods.grid import GridOptions, round_to_nearest
from autocompress.methods.problem import LayerProblem


class RoundToNearest(GridQuantizer[GridOptions]):
    """Nearest level of an importance-weighted grid."""

    needs = Needs.DIAGONAL
    options = GridOptions
    summary = "round to nearest on a grid clipped by importance-weighted error"
    stronger = "gptq"

    def quantize(
        self, problem: LayerProblem, mask: Tensor | None, options: GridOptions
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        return round_to_nearest(problem, mask, options)


METHODS.add("rtn", RoundToNearest())
