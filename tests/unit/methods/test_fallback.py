"""What GPTQ and the quantizers that start from it do where H is of no use."""

import pytest
import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerStatistics, compress


@pytest.mark.parametrize("method", ["gptq", "autoround", "quantease"])
@pytest.mark.parametrize(
    ("statistics", "reason"),
    [
        (LayerStatistics.none(), "the layer has no calibration statistics"),
        (
            LayerStatistics(torch.diag(torch.tensor([-5.0] + [1.0] * 15)), 100, "x"),
            "H has no Cholesky factor at any damping up to 1",
        ),
    ],
)
def test_without_a_usable_hessian_it_rounds_and_says_so(method, statistics, reason):
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    compressed = compress(weight, Scheme.parse(method), statistics)
    assert compressed.notes == (f"{method} rounded to nearest: {reason}",)
    rounded = compress(weight, Scheme.parse("rtn"), statistics)
    assert torch.equal(compressed.to_dense(), rounded.to_dense())
