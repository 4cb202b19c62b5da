"""Write layers that share, in a checkpoint of version 1. See `make_packed_v1.py`.

python tests/golden/make_packed_sharing.py tests/golden/packed_sharing
python tests/golden/make_packed_sharing.py tests/golden/packed_autoencoder
"""

import sys
from pathlib import Path

from make_packed_methods import golden_statistics, tiny_base, write_golden

from autocompress.core import Scheme
from autocompress.methods import compress_together
from autocompress.models import weight_matrix
from autocompress.testing.tiny_models import Sizes

SIZES = Sizes(hidden=24, intermediate=40, blocks=3, heads=2, key_value_heads=1, vocabulary=48)
TOKENS = [1, 5, 9, 47, 0, 13]
FOLDERS = {
    "packed_sharing": {
        "self_attn.q_proj": "basis_sharing(blocks=0/1/2,rank=9)",
        "self_attn.k_proj": "basis_sharing(blocks=0/2,rank=7)+gptq(bits=4,group_size=8)",
        "mlp.gate_proj": "basis_sharing(blocks=0/1,rank=9)+wanda(sparsity=0.6)+rtn+eora(rank=2)",
        "mlp.up_proj": "tied(blocks=0/2)+svd_llm(rank=7)+rtn(bits=8)+eora(rank=3,bits=4)",
        "self_attn.o_proj": "tied(blocks=1/2,to=first)+gptq(bits=4)",
        "mlp.down_proj": "basis_sharing(blocks=1/2,rank=9)+cast+int_inputs",
    },
    "packed_autoencoder": {
        "self_attn.v_proj": "autoencoder(blocks=0/2,piece=4,latents=7,hidden=3)+eora(rank=2)",
        "mlp.up_proj": "autoencoder(blocks=0/1/2,piece=6,latents=5,hidden=0)",
    },
}


def main(out: Path) -> None:
    """Compress a tiny Qwen 2 and write checkpoint, outputs of each layer and logits."""
    base = tiny_base(SIZES)
    weights = {}
    for part, text in FOLDERS[out.name].items():
        blocks = text.partition("blocks=")[2].partition(",")[0].partition(")")[0].split("/")
        names = [f"model.layers.{block}.{part}" for block in blocks]
        matrices = [weight_matrix(base.module, base.layout.layer(name)) for name in names]
        statistics = [golden_statistics(matrix.shape[1]) for matrix in matrices]
        found = compress_together(matrices, Scheme.parse(text), statistics)
        weights |= dict(zip(names, found, strict=True))
    write_golden(base, weights, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
