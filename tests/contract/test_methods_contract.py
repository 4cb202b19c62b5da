"""Every registered method, put through the contract kit. A new method adds one row here."""

import pytest
import torch

from autocompress.methods import METHODS, Sharing
from autocompress.testing.method_contract import CONTRACT, MethodExamples, computes_alike_on

EXAMPLES = {
    "rtn": MethodExamples(
        schemes=(
            "rtn",
            "rtn(bits=3,group_size=0)",
            "rtn(bits=5,group_size=32,symmetric=false)",
            "magnitude(sparsity=0.3)+rtn(bits=8)",
            "svd(rank=9)+rtn(bits=6,group_size=16)",
        ),
        ladder=tuple(f"rtn(bits={bits},group_size=32)" for bits in range(2, 9)),
        bad_options={"bits": "rtn(bits=9)", "group_size": "rtn(group_size=-1)"},
    ),
    "gptq": MethodExamples(
        schemes=(
            "gptq",
            "gptq(bits=3,group_size=16,symmetric=false)",
            "gptq(bits=7,group_size=0,actorder=false)",
            "wanda(sparsity=0.6)+gptq(bits=4,symmetric=false)",
            "svd_llm(rank=12)+gptq(bits=4)",
            "svd_llm(rank=17)+magnitude(sparsity=0.7)+gptq(bits=8)",
        ),
        ladder=tuple(f"gptq(bits={bits},group_size=0)" for bits in range(2, 9)),
        bad_options={
            "bits": "gptq(bits=1)",
            "group_size": "gptq(group_size=-8)",
            "damping": "gptq(damping=0.0)",
        },
    ),
    "autoround": MethodExamples(
        schemes=(
            "autoround(iterations=20)",
            "autoround(bits=3,group_size=16,symmetric=false,iterations=20)",
            "autoround(bits=2,group_size=0,actorder=false,iterations=20)",
            "wanda(sparsity=0.6)+autoround(bits=4,symmetric=false,iterations=20)",
            "sparsegpt+autoround(iterations=20)",
            "svd_llm(rank=12)+autoround(bits=4,iterations=20)",
            "awq+autoround(bits=3,iterations=5)+eora(rank=2)",
        ),
        ladder=tuple(f"autoround(bits={b},group_size=0,iterations=20)" for b in range(2, 9)),
        bad_options={
            "bits": "autoround(bits=1)",
            "group_size": "autoround(group_size=-8)",
            "damping": "autoround(damping=0.0)",
            "iterations": "autoround(iterations=0)",
        },
    ),
    "quantease": MethodExamples(
        schemes=(
            "quantease",
            "quantease(bits=3,group_size=16,symmetric=false,rounds=2)",
            "quantease(bits=2,group_size=0,actorder=false)",
            "wanda(sparsity=0.6)+quantease(bits=4,symmetric=false)",
            "sparsegpt+quantease",
            "svd_llm(rank=12)+quantease(bits=4)",
            "awq+quantease(bits=3,rounds=1)+eora(rank=2)",
        ),
        ladder=tuple(f"quantease(bits={bits},group_size=0)" for bits in range(2, 9)),
        bad_options={
            "bits": "quantease(bits=1)",
            "group_size": "quantease(group_size=-8)",
            "damping": "quantease(damping=0.0)",
            "rounds": "quantease(rounds=0)",
        },
    ),
    "magnitude": MethodExamples(
        schemes=(
            "magnitude",
            "magnitude(sparsity=0.01)",
            "magnitude(sparsity=0.99)",
            "magnitude(pattern=1:2,refit=true)",
        ),
        ladder=tuple(f"magnitude(sparsity=0.{tenths})" for tenths in (9, 7, 5, 3, 1)),
        bad_options={
            "sparsity": "magnitude(sparsity=1.0)",
            "pattern": "magnitude(pattern=4:4)",
        },
    ),
    "wanda": MethodExamples(
        schemes=(
            "wanda",
            "wanda(sparsity=0.02)",
            "svd_llm(rank=10)+wanda(sparsity=0.5)",
            "wanda(pattern=2:4,refit=true)+gptq(bits=4)",
            "wanda(sparsity=0.7,refit=true)+rtn",
        ),
        ladder=tuple(f"wanda(sparsity=0.{tenths})" for tenths in (9, 7, 5, 3, 1)),
        bad_options={"sparsity": "wanda(sparsity=0.0)", "pattern": "wanda(pattern=2)"},
    ),
    "sparsegpt": MethodExamples(
        schemes=(
            "sparsegpt",
            "sparsegpt(pattern=2:4)+gptq(bits=4)",
            "sparsegpt(sparsity=0.7,refit=true)",
            "svd_llm(rank=10)+sparsegpt(sparsity=0.4)+rtn",
            "hadamard+sparsegpt+gptq(bits=3)+eora(rank=2)",
        ),
        ladder=tuple(f"sparsegpt(sparsity=0.{tenths})" for tenths in (9, 7, 5, 3, 1)),
        bad_options={"sparsity": "sparsegpt(sparsity=1.5)", "pattern": "sparsegpt(pattern=0:4)"},
    ),
    "obs_block": MethodExamples(
        schemes=(
            "obs_block",
            "obs_block(sparsity=0.9,block=7,recomputations=3)+gptq(bits=4)",
            "svd(rank=9)+obs_block(block=1)+rtn(bits=6)",
        ),
        ladder=tuple(f"obs_block(sparsity=0.{tenths})" for tenths in (9, 7, 5, 3, 1)),
        bad_options={
            "sparsity": "obs_block(sparsity=0.0)",
            "block": "obs_block(block=0)",
            "recomputations": "obs_block(recomputations=65)",
        },
    ),
    "drop": MethodExamples(
        schemes=("drop",),
        ladder=("drop", "rtn(bits=2)", "rtn(bits=4)"),
        bad_options={"bits": "drop(bits=0)", "stands alone": "drop+eora(rank=2)"},
    ),
    "svd": MethodExamples(
        schemes=("svd(rank=1)", "svd(rank=17)", "svd(rank=8)+wanda(sparsity=0.4)+rtn"),
        ladder=tuple(f"svd(rank={rank})" for rank in (1, 4, 9, 17)),
        bad_options={"rank": "svd(rank=0)"},
    ),
    "svd_llm": MethodExamples(
        schemes=("svd_llm(rank=1)", "svd_llm(rank=17)", "svd_llm(rank=8)+rtn(symmetric=false)"),
        ladder=tuple(f"svd_llm(rank={rank})" for rank in (1, 4, 9, 17)),
        bad_options={"rank": "svd_llm(rank=-2)"},
    ),
    **{
        method: MethodExamples(
            schemes=(
                f"{method}(keep=60,of=90)",
                f"{method}(keep=3,of=5)+rtn(bits=4,group_size=32)",
                f"{method}(keep=16,of=32)+wanda(sparsity=0.5)+gptq(bits=4,group_size=16)",
                f"{method}(keep=7,of=10)+svd_llm(rank=9)+rtn+eora(rank=2)",
                f"{method}(keep=20,of=37)+awq(search=2)+rtn+outlier_columns+int_inputs",
            ),
            ladder=tuple(f"{method}(keep={keep},of=90)" for keep in (20, 45, 70, 89)),
            bad_options={"keep": f"{method}(keep=90,of=90)"},
        )
        for method in ("magnitude_sp", "wanda_sp", "ziplm")
    },
    "hadamard": MethodExamples(
        schemes=(
            "hadamard",
            "hadamard(seed=3)+gptq(bits=3,group_size=16)",
            "hadamard+wanda(sparsity=0.5)+rtn",
            "hadamard+svd_llm(rank=9)+rtn(bits=6)",
        ),
        ladder=tuple(f"hadamard+gptq(bits={bits},group_size=0)" for bits in (2, 3, 4, 8)),
        bad_options={"seed": "hadamard(seed=-1)"},
    ),
    "eora": MethodExamples(
        schemes=(
            "gptq(bits=3)+eora(rank=4)",
            "eora(rank=36,bits=8)",
            "hadamard+wanda(sparsity=0.5)+rtn+eora(rank=3,bits=4)",
            "svd(rank=9)+rtn(bits=4)+eora(rank=2)",
        ),
        ladder=tuple(f"rtn(bits=3)+eora(rank={rank})" for rank in (1, 4, 9, 17, 30)),
        bad_options={"rank": "eora(rank=0)", "bits": "eora(bits=9)"},
    ),
    "int_inputs": MethodExamples(
        schemes=(
            "int_inputs",
            "rtn(bits=8,group_size=0)+int_inputs",
            "hadamard+gptq(bits=4)+eora(rank=2)+int_inputs(bits=4)",
        ),
        ladder=("rtn(bits=4)+int_inputs", "rtn(bits=8)+int_inputs", "int_inputs"),
        bad_options={"bits": "int_inputs(bits=16)"},
    ),
    "cast": MethodExamples(
        schemes=(
            "cast",
            "cast(dtype=float16)",
            "wanda(sparsity=0.5)+cast",
            "magnitude(sparsity=0.02)+cast",
            "svd(rank=9)+cast(dtype=float16)",
        ),
        ladder=("cast(dtype=bfloat16)", "cast(dtype=float16)"),
        bad_options={"dtype": "cast(dtype=float32)"},
    ),
    "fp8": MethodExamples(
        schemes=(
            "fp8",
            "fp8(format=e5m2,group_size=16)",
            "wanda(sparsity=0.5)+fp8",
            "magnitude(sparsity=0.02)+fp8(group_size=32)",
            "svd_llm(rank=9)+fp8",
        ),
        ladder=("fp8(format=e5m2)", "fp8(format=e4m3)", "fp8(group_size=8)"),
        bad_options={"format": "fp8(format=e3m4)", "group_size": "fp8(group_size=-1)"},
    ),
    "mxfp4": MethodExamples(
        schemes=(
            "mxfp4",
            "wanda(sparsity=0.6)+mxfp4",
            "magnitude(sparsity=0.02)+mxfp4",
            "svd_llm(rank=9)+mxfp4",
            "hadamard+mxfp4+eora(rank=2)",
        ),
        ladder=("mxfp4", "mxfp4+eora(rank=4)", "fp8(group_size=32)"),
        bad_options={"group_size": "mxfp4(group_size=16)"},
    ),
    "nvfp4": MethodExamples(
        schemes=(
            "nvfp4",
            "wanda(sparsity=0.6)+nvfp4",
            "magnitude(sparsity=0.02)+nvfp4",
            "svd_llm(rank=9)+nvfp4",
            "hadamard+nvfp4+eora(rank=2)",
        ),
        ladder=("nvfp4", "nvfp4+eora(rank=4)", "fp8(group_size=16)"),
        bad_options={"group_size": "nvfp4(group_size=32)"},
    ),
    "nf4": MethodExamples(
        schemes=(
            "nf4",
            "nf4(group_size=16,double_quantization=false)",
            "nf4(group_size=0)",
            "wanda(sparsity=0.6)+nf4(group_size=5)",
            "magnitude(sparsity=0.02)+nf4",
            "svd_llm(rank=9)+nf4",
        ),
        ladder=tuple(f"nf4(group_size={size})" for size in (0, 16, 4)),
        bad_options={
            "group_size": "nf4(group_size=-64)",
            "double_quantization": "nf4(double_quantization=2)",
        },
    ),
    "binary": MethodExamples(
        schemes=("binary", "binary(group_size=0)", "svd(rank=9)+binary(group_size=5)"),
        ladder=tuple(f"binary(group_size={size})" for size in (0, 16, 4)),
        bad_options={"group_size": "binary(group_size=-1)"},
    ),
    "ternary": MethodExamples(
        schemes=(
            "ternary",
            "ternary(group_size=0)",
            "wanda(sparsity=0.7)+ternary(group_size=16)",
            "magnitude(sparsity=0.02)+ternary",
            "svd(rank=9)+ternary(group_size=5)",
        ),
        ladder=tuple(f"ternary(group_size={size})" for size in (0, 16, 4)),
        bad_options={"group_size": "ternary(group_size=-1)"},
    ),
    "hqq": MethodExamples(
        schemes=(
            "hqq",
            "hqq(bits=3,group_size=0)",
            "hqq(bits=5,group_size=7,iterations=0)",
            "hadamard+hqq(bits=2)",
            "svd(rank=9)+hqq(bits=6,group_size=16)",
        ),
        ladder=tuple(f"hqq(bits={bits},group_size=32)" for bits in range(2, 9)),
        bad_options={
            "bits": "hqq(bits=9)",
            "group_size": "hqq(group_size=-1)",
            "iterations": "hqq(iterations=-1)",
        },
    ),
    "kmeans": MethodExamples(
        schemes=(
            "kmeans",
            "kmeans(bits=4,compensate=false)",
            "wanda(sparsity=0.6)+kmeans(bits=4)",
            "magnitude(sparsity=0.05)+kmeans(bits=2,compensate=false)",
            "svd_llm(rank=12)+kmeans(bits=3,iterations=0)",
        ),
        ladder=tuple(f"kmeans(bits={bits})" for bits in range(2, 7)),
        bad_options={"bits": "kmeans(bits=7)", "iterations": "kmeans(iterations=-1)"},
    ),
    "product": MethodExamples(
        schemes=(
            "product(block=2,codewords=16)",
            "product(block=8,seed=4)",
            "hadamard+product(block=4,codewords=64,iterations=2)",
            "svd_llm(rank=16)+product(block=2,codewords=32)",
        ),
        ladder=tuple(f"product(block=4,codewords={k})" for k in (16, 32, 64, 128, 256)),
        bad_options={
            "block": "product(block=3)",
            "codewords": "product(codewords=100)",
            "iterations": "product(block=2,iterations=-1)",
        },
    ),
    "trellis": MethodExamples(
        schemes=(
            "trellis(bits=2)",
            "hadamard+trellis(bits=3)",
            "svd_llm(rank=16)+trellis(bits=5)",
            "trellis(bits=4)+eora(rank=2)",
        ),
        ladder=tuple(f"hadamard+trellis(bits={bits})" for bits in range(1, 7)),
        bad_options={"bits": "trellis(bits=7)", "damping": "trellis(damping=0)"},
    ),
    "subgroup": MethodExamples(
        schemes=(
            "subgroup(bands=4)",
            "subgroup(bands=2,average=5.5,group_size=0)",
            "subgroup(bits=4-2-0-4)",
            "subgroup(bits=0-8,group_size=16)",
            "hadamard+subgroup(bands=4)",
            "svd_llm(rank=12)+subgroup(bands=4)",
        ),
        ladder=tuple(f"subgroup(bands=4,average={a})" for a in (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)),
        bad_options={
            "bits": "subgroup(bits=4-3)",
            "bands": "subgroup(bands=1)",
            "average": "subgroup(average=9.0)",
            "group_size": "subgroup(group_size=-2)",
        },
    ),
    "awq": MethodExamples(
        schemes=(
            "awq",
            "awq(search=5)+gptq(bits=3,group_size=16)",
            "awq(search=2)+wanda(sparsity=0.5)+rtn",
            "awq(search=2)+svd_llm(rank=9)+rtn(bits=6)",
            "awq(search=2)+gptq(bits=3)+eora(rank=2)",
        ),
        ladder=tuple(f"awq(search=5)+gptq(bits={bits},group_size=0)" for bits in (2, 3, 4, 8)),
        bad_options={"search": "awq(search=1)"},
    ),
    "smoothquant": MethodExamples(
        schemes=(
            "smoothquant",
            "smoothquant(alpha=0.7)+rtn(bits=8,group_size=0)+int_inputs",
            "smoothquant+wanda(sparsity=0.5)+gptq(bits=4)",
            "smoothquant(alpha=1)+svd_llm(rank=9)+rtn(bits=6)+eora(rank=2)",
        ),
        ladder=tuple(f"smoothquant+gptq(bits={bits},group_size=0)" for bits in (2, 3, 4, 8)),
        bad_options={"alpha": "smoothquant(alpha=1.5)"},
    ),
    "asvd": MethodExamples(
        schemes=("asvd(rank=1)", "asvd(rank=17,alpha=1)", "asvd(rank=8)+rtn(symmetric=false)"),
        ladder=tuple(f"asvd(rank={rank})" for rank in (1, 4, 9, 17)),
        bad_options={"rank": "asvd(rank=0)", "alpha": "asvd(alpha=1.5)"},
    ),
    "lq_lora": MethodExamples(
        schemes=(
            "gptq(bits=3)+lq_lora(rank=4)",
            "lq_lora(rank=36,bits=8)",
            "hadamard+wanda(sparsity=0.5)+rtn+lq_lora(rank=3,bits=4,iterations=2)",
            "awq(search=2)+rtn(bits=3)+lq_lora(rank=2,iterations=1)",
        ),
        ladder=tuple(f"rtn(bits=3)+lq_lora(rank={rank})" for rank in (1, 4, 9, 17, 30)),
        bad_options={
            "rank": "lq_lora(rank=0)",
            "bits": "lq_lora(bits=3)",
            "iterations": "lq_lora(iterations=0)",
        },
    ),
    "outlier_columns": MethodExamples(
        schemes=(
            "outlier_columns",
            "gptq(bits=3)+outlier_columns(share=0.05)",
            "hadamard+wanda(sparsity=0.5)+rtn+outlier_columns",
            "svd(rank=9)+rtn(bits=4)+outlier_columns(share=0.1)",
        ),
        ladder=tuple(f"rtn(bits=3)+outlier_columns(share={s})" for s in (0.01, 0.05, 0.2, 0.5)),
        bad_options={"share": "outlier_columns(share=0.0)"},
    ),
    "outlier_weights": MethodExamples(
        schemes=(
            "outlier_weights",
            "gptq(bits=3)+outlier_weights(share=0.05)",
            "hadamard+wanda(sparsity=0.5)+rtn+outlier_weights",
            "svd(rank=9)+rtn(bits=4)+outlier_weights(share=0.1)",
        ),
        ladder=tuple(f"rtn(bits=3)+outlier_weights(share={s})" for s in (0.01, 0.05, 0.2, 0.5)),
        bad_options={"share": "outlier_weights(share=0.7)"},
    ),
}


# Those that layers share have a kit of their own, in test_sharing_contract.py.
ALONE = [name for name in METHODS if not isinstance(METHODS[name], Sharing)]


def test_every_method_is_covered():
    assert set(EXAMPLES) == set(ALONE)


@pytest.mark.parametrize("check", CONTRACT.values(), ids=CONTRACT)
@pytest.mark.parametrize("method", ALONE)
def test_contract(method, check):
    check(EXAMPLES[method])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("method", ALONE)
def test_a_gpu_computes_what_the_cpu_does(method):
    computes_alike_on(EXAMPLES[method], "cuda")


@pytest.mark.parametrize("method", ALONE)
def test_every_method_has_a_one_line_summary(method):
    assert METHODS[method].summary
    assert "\n" not in METHODS[method].summary
