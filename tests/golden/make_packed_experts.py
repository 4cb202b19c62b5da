"""Write `packed_experts`: merged and dropped experts, in a checkpoint of version 1.

See `make_packed_v1.py`.
    python tests/golden/make_packed_experts.py tests/golden/packed_experts
"""

import sys
from pathlib import Path

from make_packed_methods import golden_statistics, tiny_base, write_golden

from autocompress.core import Scheme
from autocompress.methods import LayerStatistics, compress, compress_together, sharing_layers
from autocompress.models import weight_matrix
from autocompress.testing.tiny_models import Sizes

SIZES = Sizes(
    hidden=24, intermediate=20, blocks=2, heads=2, key_value_heads=1, vocabulary=48, experts=6
)
MERGED = {
    "0.mlp.experts.gate_up_proj.0": "merged(experts=0/3)+gptq(bits=4,group_size=8)",
    "0.mlp.experts.down_proj.0": "merged(experts=0/3)+rtn(bits=8)+eora(rank=2)",
    "0.mlp.experts.down_proj.1": "merged(experts=1/2/4,to=busiest)",
    "1.mlp.experts.gate_up_proj.2": "merged(experts=2/5)+svd_llm(rank=7)+eora(rank=3,bits=4)",
}
DROPPED = ("0.mlp.experts.{}.5", "1.mlp.experts.{}.0")


def main(out: Path) -> None:
    """Compress a tiny Mixtral and write checkpoint, outputs of each layer and logits."""
    base = tiny_base(SIZES, "mixtral")
    weights = {}
    for first, text in MERGED.items():
        scheme = Scheme.parse(text)
        names = sharing_layers(f"model.layers.{first}", scheme)
        matrices = [weight_matrix(base.module, base.layout.layer(name)) for name in names]
        statistics = [golden_statistics(matrix.shape[1]) for matrix in matrices]
        found = compress_together(matrices, scheme, statistics)
        weights |= dict(zip(names, found, strict=True))
    for part in ("gate_up_proj", "down_proj"):
        for dropped in DROPPED:
            name = f"model.layers.{dropped.format(part)}"
            matrix = weight_matrix(base.module, base.layout.layer(name))
            weights[name] = compress(matrix, Scheme.parse("drop"), LayerStatistics.none())
    write_golden(base, weights, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
