"""Compression methods: one file each, composed into schemes by `compress`.

To add a method, write its file and name it in the first import below:
it registers itself. `METHODS` lists them.
"""

from autocompress.methods import (  # noqa: F401
    asvd,
    autoencoder,
    autoround,
    awq,
    basis_sharing,
    binary,
    cast,
    drop,
    eora,
    fp8,
    gptq,
    hadamard,
    hqq,
    int_inputs,
    kmeans,
    lq_lora,
    magnitude,
    magnitude_sp,
    merged,
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
    tied,
    trellis,
    wanda,
    wanda_sp,
    ziplm,
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
from autocompress.methods.coding import Coding, Damage, Quantized
from autocompress.methods.compress import (
    CompressedWeight,
    compress,
    decode,
    decode_rows,
    footprint,
    unread_rows,
)
from autocompress.methods.inputs import InputMap, input_errors, input_map
from autocompress.methods.problem import LayerProblem, LayerStatistics
from autocompress.methods.schemes import (
    canonical,
    check,
    drops,
    is_shared,
    needs,
    own_tensors,
    reader,
    require_whole,
    rounds_inputs,
    shares,
    sharing_layers,
)
from autocompress.methods.sharing import Sharing, written_numbers
from autocompress.methods.soundness import damage_of
from autocompress.methods.strongest import strongest
from autocompress.methods.together import compress_together
from autocompress.methods.trellis import TrellisQuantizer
from autocompress.methods.tuning import Tunable, is_tunable
from autocompress.methods.width import Width

__all__ = [
    "METHODS",
    "Coding",
    "CompressedWeight",
    "Damage",
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
    "Sharing",
    "Sparsifier",
    "StageKind",
    "Transform",
    "TrellisQuantizer",
    "Tunable",
    "Width",
    "canonical",
    "check",
    "compress",
    "compress_together",
    "damage_of",
    "decode",
    "decode_rows",
    "drops",
    "footprint",
    "input_errors",
    "input_map",
    "is_shared",
    "is_tunable",
    "needs",
    "own_tensors",
    "reader",
    "require_whole",
    "rounds_inputs",
    "shares",
    "sharing_layers",
    "strongest",
    "unread_rows",
    "written_numbers",
]
