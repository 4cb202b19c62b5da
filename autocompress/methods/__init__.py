"""Compression methods: one file each, composed into schemes by `compress`.

To add a method, write its file and name it in the first import below:
it registers itself. `METHODS` lists them.
"""

from autocompress.methods import gptq, magnitude, rtn, svd, svd_llm, wanda  # noqa: F401
from autocompress.methods.base import (
    METHODS,
    Factorizer,
    Method,
    Needs,
    Quantizer,
    Sparsifier,
    StageKind,
)
from autocompress.methods.compress import (
    CompressedWeight,
    compress,
    decode,
    decode_rows,
    footprint,
)
from autocompress.methods.problem import LayerProblem, LayerStatistics
from autocompress.methods.schemes import canonical, check, needs
from autocompress.methods.strongest import strongest

__all__ = [
    "METHODS",
    "CompressedWeight",
    "Factorizer",
    "LayerProblem",
    "LayerStatistics",
    "Method",
    "Needs",
    "Quantizer",
    "Sparsifier",
    "StageKind",
    "canonical",
    "check",
    "compress",
    "decode",
    "decode_rows",
    "footprint",
    "needs",
    "strongest",
]
