"""Compression methods: one file each, composed into schemes by `compress`.

To add a method, write its file and name it in the first import below:
it registers itself. `METHODS` lists them.
"""

from autocompress.methods import (  # noqa: F401
    eora,
    gptq,
    hadamard,
    magnitude,
    rtn,
    svd,
    svd_llm,
    wanda,
)
from autocompress.methods.base import (
    METHODS,
    Factorizer,
    GridQuantizer,
    Method,
    Needs,
    Quantizer,
    Residual,
    Sparsifier,
    StageKind,
    Transform,
)
from autocompress.methods.coding import Coding, Quantized
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
    "Coding",
    "CompressedWeight",
    "Factorizer",
    "GridQuantizer",
    "LayerProblem",
    "LayerStatistics",
    "Method",
    "Needs",
    "Quantized",
    "Quantizer",
    "Residual",
    "Sparsifier",
    "StageKind",
    "Transform",
    "canonical",
    "check",
    "compress",
    "decode",
    "decode_rows",
    "footprint",
    "needs",
    "strongest",
]
