"""Write `packed_v1` anew. Run it only when the format version changes, into a new folder.

    python tests/golden/make_packed_v1.py tests/golden/packed_v1

A format that can no longer read an old golden file has broken its users' checkpoints: fix the
reader, not the file.
"""

import json
import sys
from pathlib import Path

import torch

from autocompress.core import LayerSpec, Scheme
from autocompress.export import load, write_packed
from autocompress.methods import LayerStatistics, compress
from autocompress.models import BaseModel, describe, weight_matrix
from autocompress.testing.tiny_models import Sizes, tiny_model

SIZES = Sizes(hidden=16, intermediate=20, blocks=2, heads=2, key_value_heads=1, vocabulary=48)
TOKENS = [1, 5, 9, 47, 0, 13]
# Each storage at least once: symmetric and not, ragged groups, mask with values and with codes,
# plain and quantized factors, sparse quantized factors. Two layers stay as they are.
SCHEMES = {
    "model.embed_tokens": "rtn(bits=4,group_size=8)",
    "model.layers.0.self_attn.q_proj": "rtn(bits=3,group_size=6,symmetric=false)",
    "model.layers.0.self_attn.k_proj": "magnitude(sparsity=0.6)",
    "model.layers.0.self_attn.v_proj": "rtn(bits=8,group_size=0)",
    "model.layers.0.self_attn.o_proj": "magnitude(sparsity=0.7)+rtn(bits=5,group_size=8)",
    "model.layers.0.mlp.gate_proj": "svd(rank=5)",
    "model.layers.0.mlp.up_proj": "svd(rank=6)+rtn(bits=6,group_size=4,symmetric=false)",
    "model.layers.0.mlp.down_proj": "svd(rank=7)+wanda(sparsity=0.5)+rtn(bits=7,group_size=8)",
    "model.layers.1.self_attn.q_proj": "rtn(bits=2,group_size=16)",
    "model.layers.1.self_attn.k_proj": "magnitude(sparsity=0.1)+rtn(bits=2,group_size=16)",
    "model.layers.1.mlp.gate_proj": "wanda(sparsity=0.5)",
    "model.layers.1.mlp.up_proj": "magnitude(sparsity=0.5)+rtn(bits=4,group_size=7)",
}


def main(out: Path) -> None:
    """Compress a tiny Qwen 2 and write checkpoint and expected logits."""
    module = tiny_model("qwen2", sizes=SIZES)
    layout = describe(module)
    base = BaseModel(module, layout, None, "tiny qwen2", "AutoModelForCausalLM", "0" * 32)
    weights = {
        name: compress(
            weight_matrix(module, _layer(layout.layers, name)),
            Scheme.parse(scheme),
            LayerStatistics.none(),
        )
        for name, scheme in SCHEMES.items()
    }
    write_packed(base, weights, out, claim={"member": "golden"})
    with torch.no_grad():
        logits = load(out)(input_ids=torch.tensor([TOKENS])).logits[0]
    expected = {"tokens": TOKENS, "logits": logits.tolist()}
    (out / "expected.json").write_text(json.dumps(expected) + "\n")


def _layer(layers: tuple[LayerSpec, ...], name: str) -> LayerSpec:
    return next(layer for layer in layers if layer.name == name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
