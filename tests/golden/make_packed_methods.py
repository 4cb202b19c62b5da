"""Write the folders of `FOLDERS`: every method in checkpoints of version 1.

See `make_packed_v1.py`.
    python tests/golden/make_packed_methods.py tests/golden/packed_width

A method that comes later gets a golden folder of its own; those that are there stay as they are.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from autocompress.core import Scheme
from autocompress.export import load, write_packed
from autocompress.methods import (
    CompressedWeight,
    LayerProblem,
    LayerStatistics,
    compress,
    reader,
)
from autocompress.models import BaseModel, describe, weight_matrix
from autocompress.testing.tiny_models import Sizes, tiny_model

SIZES = Sizes(hidden=24, intermediate=40, blocks=4, heads=2, key_value_heads=1, vocabulary=48)
TOKENS = [1, 5, 9, 47, 0, 13]
# Every coding, residual, transform and rounding of inputs at least once, with ragged groups. A few
# layers stay as they are.
SCHEMES = {
    "model.embed_tokens": "nf4(group_size=7)",
    "model.layers.0.self_attn.q_proj": "cast",
    "model.layers.0.self_attn.k_proj": "wanda(sparsity=0.5)+cast(dtype=float16)",
    "model.layers.0.self_attn.v_proj": "fp8(group_size=16)",
    "model.layers.0.self_attn.o_proj": "fp8(format=e5m2)",
    "model.layers.0.mlp.gate_proj": "magnitude(sparsity=0.6)+fp8",
    "model.layers.0.mlp.up_proj": "nvfp4",
    "model.layers.0.mlp.down_proj": "mxfp4",
    "model.layers.1.self_attn.q_proj": "nf4(group_size=16,double_quantization=false)",
    "model.layers.1.self_attn.k_proj": "binary(group_size=10)",
    "model.layers.1.self_attn.v_proj": "ternary(group_size=10)",
    "model.layers.1.self_attn.o_proj": "wanda(sparsity=0.7)+ternary(group_size=0)",
    "model.layers.1.mlp.gate_proj": "hqq(bits=3,group_size=10)",
    "model.layers.1.mlp.up_proj": "kmeans(bits=3)",
    "model.layers.1.mlp.down_proj": "product(block=4,codewords=32)",
    "model.layers.2.self_attn.q_proj": "wanda(pattern=2:4,refit=true)+kmeans(bits=4)",
    "model.layers.2.self_attn.k_proj": "subgroup(bits=4-0-8)",
    "model.layers.2.self_attn.v_proj": "subgroup(bands=4,average=2.5,group_size=16)",
    "model.layers.2.self_attn.o_proj": "hadamard(seed=7)+gptq(bits=4,group_size=8)",
    "model.layers.2.mlp.gate_proj": "awq(search=4)+gptq(bits=3,group_size=8)",
    "model.layers.2.mlp.up_proj": "asvd(rank=6)+rtn(bits=6)",
    "model.layers.2.mlp.down_proj": "quantease(bits=3,group_size=16)+eora(rank=3)",
    "model.layers.3.self_attn.q_proj": "sparsegpt(pattern=4:8)+gptq+lq_lora(rank=2,bits=6)",
    "model.layers.3.self_attn.k_proj": "rtn(bits=3)+outlier_columns(share=0.1)",
    "model.layers.3.self_attn.v_proj": "autoround(bits=3)+outlier_weights(share=0.1)",
    "model.layers.3.self_attn.o_proj": "obs_block(block=8)+outlier_weights(share=0.02)",
    "model.layers.3.mlp.gate_proj": (
        "awq(search=4)+rtn+outlier_columns(share=0.1)+int_inputs(bits=5)"
    ),
    "model.layers.3.mlp.up_proj": (
        "hadamard(seed=3)+svd_llm(rank=7)+rtn(bits=8)+eora(rank=2,bits=4)+int_inputs"
    ),
    "model.layers.3.mlp.down_proj": "rtn(bits=8)+int_inputs(bits=6)",
}
FOLDERS = {
    "packed_methods": (SIZES, SCHEMES),
    "packed_smoothquant": (
        Sizes(hidden=24, intermediate=40, blocks=1, heads=2, key_value_heads=1, vocabulary=48),
        {
            "model.layers.0.mlp.up_proj": "smoothquant+rtn(bits=8,group_size=0)+int_inputs",
            "model.layers.0.mlp.down_proj": "smoothquant(alpha=0.8)+gptq(bits=3,group_size=8)",
        },
    ),
    "packed_trellis": (  # a vocabulary of two cycles, layers of one
        Sizes(hidden=16, intermediate=24, blocks=1, heads=2, key_value_heads=2, vocabulary=520),
        {
            "model.embed_tokens": "hadamard+trellis(bits=2)",
            "model.layers.0.self_attn.o_proj": "trellis(bits=5)",
            "model.layers.0.mlp.up_proj": "hadamard(seed=2)+trellis(bits=3)+eora(rank=2)",
            "model.layers.0.mlp.down_proj": "trellis(bits=4)+int_inputs(bits=7)",
        },
    ),
    "packed_width": (
        Sizes(hidden=24, intermediate=40, blocks=2, heads=4, key_value_heads=2, vocabulary=48),
        {
            "model.layers.0.self_attn.q_proj": "ziplm(by=self_attn.o_proj,keep=1,of=2)",
            "model.layers.0.self_attn.k_proj": "ziplm(by=self_attn.o_proj,keep=1,of=2)+cast",
            "model.layers.0.self_attn.o_proj": "ziplm(keep=1,of=2)+rtn+int_inputs(bits=6)",
            "model.layers.0.mlp.gate_proj": "wanda_sp(by=mlp.down_proj,keep=28,of=40)+rtn",
            "model.layers.0.mlp.up_proj": (
                "wanda_sp(by=mlp.down_proj,keep=28,of=40)+hadamard+rtn(bits=3)+int_inputs"
            ),
            "model.layers.0.mlp.down_proj": "wanda_sp(keep=28,of=40)+awq(search=4)+rtn+int_inputs",
            "model.layers.1.mlp.gate_proj": (
                "magnitude_sp(by=mlp.down_proj,keep=11,of=40)+wanda(sparsity=0.6)+rtn(bits=8)"
            ),
            "model.layers.1.mlp.up_proj": (
                "magnitude_sp(by=mlp.down_proj,keep=11,of=40)+svd_llm(rank=5)+rtn+eora(rank=2)"
            ),
            "model.layers.1.mlp.down_proj": "magnitude_sp(keep=11,of=40)+gptq(bits=3,group_size=8)",
        },
    ),
}


def main(out: Path) -> None:
    """Compress a tiny Qwen 2 and write checkpoint, outputs of each layer and logits."""
    sizes, schemes = FOLDERS[out.name]
    base = tiny_base(sizes)
    weights = {}
    for name, text in schemes.items():
        scheme = Scheme.parse(text)
        matrix, statistics = made_of(base, name)
        by = reader(name, scheme)
        read = None if by is None else LayerProblem(*made_of(base, by))
        weights[name] = compress(matrix, scheme, statistics, reader=read)
    write_golden(base, weights, out)


def made_of(base: BaseModel, name: str) -> tuple[Tensor, LayerStatistics]:
    """A layer's matrix and statistics."""
    matrix = weight_matrix(base.module, base.layout.layer(name))
    return matrix, golden_statistics(matrix.shape[1])


def tiny_base(sizes: Sizes, family: str = "qwen2") -> BaseModel:
    """The same tiny model every time."""
    module = tiny_model(family, sizes=sizes)
    layout = describe(module)
    return BaseModel(module, layout, None, f"tiny {family}", "AutoModelForCausalLM", "0" * 32)


def write_golden(base: BaseModel, weights: Mapping[str, CompressedWeight], out: Path) -> None:
    """Write the checkpoint, and beside it what each of its layers and the whole put out."""
    write_packed(base, weights, out, claim={"member": "golden"})
    loaded = load(out)
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([TOKENS])).logits[0]
        layers = {name: loaded.get_submodule(name) for name in weights}
        outputs = {name: layer(probe(layer)).tolist() for name, layer in layers.items()}
    expected = {"tokens": TOKENS, "logits": logits.tolist(), "outputs": outputs}
    text = json.dumps(expected).replace("]], ", "]],\n").replace("], [", "],\n[")
    (out / "expected.json").write_text(text + "\n")


def probe(layer: nn.Module) -> Tensor:
    """All ids of an embedding; two inputs of any other layer, the same on every machine."""
    if isinstance(layer, nn.Embedding):
        return torch.arange(layer.num_embeddings)
    n = 2 * layer.in_features
    return ((7919 * torch.arange(1, n + 1) % 1009 - 504).double() / 331).float().view(2, -1)


def golden_statistics(d: int) -> LayerStatistics:
    """Of correlated inputs, some of them loud."""
    generator = torch.Generator().manual_seed(d)
    rows = torch.randn(400, d, generator=generator) @ torch.randn(d, d, generator=generator)
    rows[:, ::7] *= 4
    return LayerStatistics(rows.T @ rows / len(rows), len(rows), "golden")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
