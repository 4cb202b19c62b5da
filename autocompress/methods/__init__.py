"""Compression methods: one file each, composed into schemes by `compress`.

To add a method, write its file and name it in the first import below:
it registers itself. `METHODS` lists them.
"""

from autocompress.methods import (  # noqa: F401
    asvd,
    autoround,
    awq,
    binary,
    cast,
    eora,
    fp8,
    gptq,
    hadamard,
    hqq,
    int_inputs,
    kmeans,
    lq_lora,
    magnitude,
    mxfp4,
    nf4,
    nvfp4,
    obert,
    outliers,
    product,
    quantease,
    rtn,
    smoothquant,
    sparsegpt,
    subgroup,
    svd,
    svd_llm,
    ternary,
    wanda,
)
from autocompress.methods.base import (
    METHODS,
    Factorizer,
    GridQuantizer,
    InputQuantizer,
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
from autocompress.methods.inputs import InputMap, input_errors, input_map
from autocompress.methods.problem import LayerProblem, LayerStatistics
from autocompress.methods.schemes import canonical, check, needs, rounds_inputs
from autocompress.methods.strongest import strongest

__all__ = [
    "METHODS",
    "Coding",
    "CompressedWeight",
    "Factorizer",
    "GridQuantizer",
    "InputMap",
    "InputQuantizer",
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
    "input_errors",
    "input_map",
    "needs",
    "rounds_inputs",
    "strongest",
]
