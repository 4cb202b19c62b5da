from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter

import pytest
from rich.console import Console

from autocompress.methods import METHODS
from autocompress.report.taxonomy import taxonomy_table
from autocompress.workflows.methods import describe_method, describe_methods
from autocompress.workflows.taxonomy import describe_taxonomy, taxonomy

LEAVES = """
uniform grid; uniform grid fitted without calibration; error compensation;
coordinate descent over codes; activation-aware scaling; learned rounding;
half precision; 8-bit floating point; block floating point;
levels of a distribution; learned levels; vector and product quantization; trellis codes; ternary;
binary; outliers kept apart; precision per subgroup of a layer; precision per layer; rotation;
rotation of the whole model;
learned rotation; dynamic integers per token; smoothing; clusters of channels; key-value cache;
learned clipping; distillation of the quantized model; noise on a part of the weights;
scales and zero points only; low-rank plus quantized start; adapters on quantized weights;
magnitude; weight times input; second order with compensation; empirical Fisher in blocks;
N of M patterns; first order and movement; regularization; mask refinement without training;
sparsity per layer; neurons and heads; biases for removed units; hidden width; depth;
repair of dropped blocks; tokens at run time; contextual sparsity;
binary with salient weights apart; pretraining in few bits; differences to a base model;
routers over fewer experts; experts of one basis; experts skipped at run time; offloading;
plain decomposition; scaled by activations; whitened by activations; low-rank correction;
pairs of matrices; Kronecker and tensor forms; shared basis; tied layers with corrections;
exact tying; packed bits; entropy coding; auto-encoders of weights; logits; features; relations;
black-box teachers; least-squares refit; biases and norms; adapters; continued pretraining;
fewer key and value heads; efficient attention; architecture search; choice of the base model;
multimodal interfaces; early exit; cascades; ensembles; speculative decoding; precision per expert;
pruned and merged experts; conversion to experts; prompt compression; retrieval;
sensitivity and knapsack; evolution; differentiable search; cost efficiency; groups and languages;
robustness; equal perplexity; measured size and speed; kernels; serving
"""
"""What surveys of the field distinguish."""

SYSTEMS = """
QuantGPT; MoDeGPT; LLMLingua; Just CHOP; Revisiting Offline Compression;
What Do Compressed Multilingual MT Models Forget; Optimal BERT Surgeon; AQ-BERT;
What Do Compressed LLMs Forget; Quant-Noise; Comprehensive performance-evaluation study; TinySaver;
RetriKT; Training Trajectories of LMs Across Scales; Who Says Elephants Can't Run;
Intriguing Properties of Compression on Multilingual Models; MetaLM; Efficient LM scaling with MoE;
When Ensembling Smaller Models is More Efficient; Train Large Then Compress; GPTQ; QuIP; AWQ; OWQ;
SignRound; NF4; SqueezeLLM; LUT-GEMM; LLM.int8; RPTQ; MoFQ; SmoothQuant; Outlier Suppression;
OmniQuant; QLLM; LLM-QAT; QLoRA; LoftQ; QA-LoRA; INT2.1; PEQA; AlphaTuning; OWL; DSnoT; HQQ; iPQ;
MXFP4; NVFP4; FP8; QuaRot; SpinQuant; Wanda; SparseGPT; FLAP; SliceGPT; ZipLM; ShortGPT; SLEB;
SVD-LLM; ASVD; EoRA; LQ-LoRA; Basis Sharing; HAWQ-V2; EvoPress; AMQ; LLM-Pruner; Wanda-SP;
LLM Surgeon; Shortened LLaMA; LaCo; LLM-Streamline; Deja Vu; PowerInfer; TEAL; PB-LLM; BiLLM;
BitNet; AQLM; QuIP#; QTIP; SpQR; KIVI; StreamingLLM; Minitron; Sheared LLaMA; MatFormer; MC-SMoE;
REAP; Not All Experts are Equal; QMoE; MoQE; D²-MoE; BitDelta; ToMe; RIA; ALPS; FlexGen
"""


def listed(text):
    return [name.strip() for name in text.replace("\n", " ").split(";")]


def test_the_leaves_are_those_of_the_surveys():
    names = [leaf.leaf for leaf in taxonomy()]
    assert sorted(names) == sorted(listed(LEAVES))


@pytest.mark.parametrize("system", listed(SYSTEMS))
def test_every_published_system_has_a_leaf(system):
    assert any(system in leaf.published for leaf in taxonomy())


def test_every_method_is_in_one_leaf_and_no_leaf_names_another():
    named = Counter(name for leaf in taxonomy() for name in leaf.methods)
    assert set(METHODS) - set(named) == set(), "name these in methods/taxonomy.yaml"
    assert set(named) - set(METHODS) == set(), "these are not registered"
    assert max(named.values()) == 1


@pytest.mark.parametrize("leaf", taxonomy(), ids=lambda leaf: leaf.leaf)
def test_every_leaf_has_methods_or_one_reason(leaf):
    reasons = [leaf.here, leaf.planned, leaf.out_of_scope]
    assert sum(map(bool, reasons)) == (0 if leaf.methods and not leaf.planned else 1)
    assert not (leaf.methods and leaf.out_of_scope)
    assert leaf.published


def test_the_table_shows_every_leaf_within_80_columns():
    document = describe_taxonomy()
    document["plugins"] = [{"name": "mine", "package": "my-package"}]
    console = Console(file=io.StringIO(), width=80)
    console.print(taxonomy_table(document))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert all(leaf.leaf.split()[0] in words for leaf in taxonomy())
    assert "mine (my-package)" in words
    assert f"{len(METHODS)} methods; " in words


def test_listing_imports_no_torch():
    code = (
        "import sys; from autocompress.cli import run; "
        "assert run(['methods']) == 0; assert 'torch' not in sys.modules"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert "error compensation" in shown


def test_a_method_shows_its_source_and_its_options():
    row = describe_method("gptq")
    assert {k: v for k, v in row.items() if k in describe_methods()[0]} in describe_methods()
    assert "arXiv 2210.17323" in row["about"]
    assert "damping:" in row["meaning_of_options"]
    assert row["options"]["bits"] == 4
