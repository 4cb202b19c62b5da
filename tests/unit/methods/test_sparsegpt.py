import pytest
import torch
from layers import loss_of

from autocompress.core import LayerSpec
from autocompress.core.scheme import Scheme
from autocompress.methods import METHODS, LayerProblem, LayerStatistics, compress, footprint
from autocompress.methods.gptq import GPTQOptions
from autocompress.methods.problem import DAMPING, inverse_cholesky_upper
from autocompress.methods.sparsity import PruningOptions
from autocompress.testing.method_contract import example_layer


def problem_of(o, d, n_tokens=1024, seed=0):
    """Inputs with a falling spectrum of principal components, of different loudness."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, d, generator=generator)
    mixing = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    inputs = torch.randn(n_tokens, d, generator=generator) * torch.arange(1, d + 1) ** -0.7
    inputs = inputs @ mixing * torch.randn(d, generator=generator).mul(0.7).exp()
    return LayerProblem(weight, LayerStatistics(inputs.T @ inputs / n_tokens, n_tokens, "x"))


def naive_sparsegpt(problem, options):
    """As published, in float64: row by row, each error to all later inputs at once."""
    hessian = problem.hessian.double()
    ridge = DAMPING * float(hessian.diagonal().mean())
    upper = inverse_cholesky_upper(hessian, ridge)
    weight = problem.weight.double().clone()
    o, d = weight.shape
    mask, errors = torch.zeros(o, d, dtype=torch.bool), torch.zeros_like(weight)
    width = options.kept_of[1] if options.kept_of else 128
    for j in range(d):
        if j % width == 0:
            stop = min(j + width, d)
            scores = weight[:, j:stop] ** 2 / upper.diagonal()[j:stop] ** 2
            if options.kept_of:
                best = scores.argsort(dim=1)[:, -options.kept_of[0] :]
                mask[:, j:stop].scatter_(1, best, value=True)
            else:
                n_dropped = round(options.sparsity * scores.numel())
                limit = scores.flatten().sort().values[n_dropped]
                mask[:, j:stop] = scores >= limit
        errors[:, j] = torch.where(mask[:, j], 0, weight[:, j]) / upper[j, j]
        weight[:, j + 1 :] -= errors[:, j : j + 1] * upper[j, j + 1 :]
    return mask, weight * mask, errors, ridge


@pytest.mark.parametrize(
    "options",
    [
        PruningOptions(0.5),
        PruningOptions(0.83),
        PruningOptions(pattern="2:4"),
        PruningOptions(pattern="4:8"),
        PruningOptions(pattern="3:5"),
        PruningOptions(pattern="1:40"),
    ],
    ids=str,
)
def test_the_sweep_matches_the_naive_one(options):
    problem = problem_of(9, 280)  # two whole blocks and a ragged one
    pruned = METHODS["sparsegpt"].prune(problem, options)
    mask, values, _, _ = naive_sparsegpt(problem, options)
    # Scores within float32 rounding of each other may swap; what follows then differs.
    assert (pruned.mask != mask).float().mean() < 0.01
    if torch.equal(pruned.mask, mask):
        torch.testing.assert_close(pruned.values.double(), values, rtol=1e-3, atol=1e-3)
    assert (pruned.values[~pruned.mask] == 0).all()
    assert problem.loss(pruned.values) == pytest.approx(problem.loss(values), rel=1e-2)


def test_the_sum_of_squared_errors_is_the_damped_loss():
    problem = problem_of(9, 280)
    _, values, errors, ridge = naive_sparsegpt(problem, PruningOptions(0.5))
    difference = values - problem.weight.double()
    damped = problem.hessian.double() + ridge * torch.eye(280, dtype=torch.float64)
    loss = ((difference @ damped) * difference).sum()
    torch.testing.assert_close(errors.square().sum(), loss, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (5, 129), (16, 300)])
@pytest.mark.parametrize("sparsity", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("n_tokens", [0, 700])
def test_the_promised_count_is_the_count_of_the_mask(shape, sparsity, n_tokens):
    problem = problem_of(*shape, n_tokens=max(n_tokens, 1))
    if not n_tokens:
        problem = LayerProblem(problem.weight, LayerStatistics.none())
    method = METHODS["sparsegpt"]
    mask, _ = method.mask(problem, PruningOptions(sparsity))
    assert int(mask.sum()) == method.n_kept(shape, PruningOptions(sparsity))


def test_one_sweep_gives_both_mask_and_values(monkeypatch):
    problem, method, calls = problem_of(8, 40), METHODS["sparsegpt"], []
    prune = type(method).prune
    monkeypatch.setattr(
        type(method), "prune", lambda *given: calls.append(given[2]) or prune(*given)
    )
    for sparsity in (0.5, 0.6):
        compress(
            problem.weight,
            Scheme.parse(f"sparsegpt(sparsity={sparsity})"),
            problem.statistics,
            problem=problem,
        )
    assert calls == [PruningOptions(0.5), PruningOptions(0.6)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_methods_and_patterns_rank_as_published(seed):
    problem = problem_of(64, 128, seed=seed)
    loss = {
        name: loss_of(problem, name)
        for name in (
            "magnitude",
            "wanda",
            "sparsegpt",
            "wanda(refit=true)",
            "sparsegpt(refit=true)",
            "wanda(pattern=2:4)",
            "sparsegpt(pattern=2:4)",
            "sparsegpt(pattern=4:8)",
        )
    }
    assert loss["magnitude"] > 1.5 * loss["wanda"]
    assert loss["wanda"] > 1.5 * loss["sparsegpt"]
    assert loss["sparsegpt"] > loss["wanda(refit=true)"]
    assert loss["sparsegpt(refit=true)"] == pytest.approx(loss["wanda(refit=true)"], rel=0.2)
    assert loss["wanda(pattern=2:4)"] > loss["wanda"]
    assert loss["sparsegpt(pattern=2:4)"] > loss["sparsegpt(pattern=4:8)"] > loss["sparsegpt"]
    assert loss["sparsegpt(pattern=2:4)"] < loss["wanda(pattern=2:4)"]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("actorder", ["true", "false"])
def test_quantizing_in_the_same_scheme_is_no_worse_than_after_pruning(bits, actorder):
    """Neither rounding the pruned weight nor masking the dense one does better."""
    problem = problem_of(48, 128)
    pruned = METHODS["sparsegpt"].prune(problem, PruningOptions(0.5))
    grid = f"bits={bits},group_size=32"
    joint = loss_of(problem, f"sparsegpt+gptq({grid},actorder={actorder})")
    assert joint < loss_of(problem, f"sparsegpt+rtn({grid})")
    gptq = METHODS["gptq"]
    options = GPTQOptions(bits, 32, actorder=actorder == "true")
    masked = gptq.quantize(problem, pruned.mask, options)
    dense = gptq.coding(options).values(masked.codes, masked.parameters, (48, 128))
    assert joint <= 1.0001 * problem.loss(dense)


def test_a_quantized_layer_keeps_the_zeros():
    problem = problem_of(16, 64)
    scheme = Scheme.parse("sparsegpt(pattern=2:4)+gptq(bits=4,group_size=0)")
    dense = compress(problem.weight, scheme, problem.statistics).to_dense()
    mask, _ = METHODS["sparsegpt"].mask(problem, PruningOptions(pattern="2:4"))
    assert (dense[~mask] == 0).all()


@pytest.mark.parametrize("pattern", ["2:4", "4:8", ""])
def test_half_of_the_weights_cost_half_of_the_bits_and_one_for_the_mask(pattern):
    layer = LayerSpec("up", "up", 0, 256, 512, "linear", "bfloat16", "up", 256 * 512)
    scheme = Scheme.parse(f"sparsegpt(pattern={pattern})+gptq(bits=4,group_size=128)")
    bits = 8 * footprint(layer, scheme).storage_bytes / (256 * 512)
    assert bits == 4 / 2 + 1 + 16 / 128


def test_without_statistics_it_chooses_by_weight_in_each_block_and_says_so():
    layer = example_layer(16, 64)
    problem = LayerProblem(layer.weight, LayerStatistics.none())
    compressed = compress(layer.weight, Scheme.parse("sparsegpt"), problem.statistics)
    dense = compressed.to_dense()
    kept = dense != 0
    assert torch.equal(dense[kept], layer.weight[kept])
    scores = layer.weight.square() * problem.importance
    assert scores[kept].min() >= scores[~kept].max()
    assert compressed.notes == (
        f"sparsegpt compared |weight| x |input| and changed no weight: {problem.unseen}",
    )


def test_a_hessian_that_is_not_positive_definite_is_damped_and_noted():
    hessian = torch.diag(torch.tensor([4.0, 3.0, 2.0, -0.2]))
    compressed = compress(
        torch.ones(3, 4), Scheme.parse("sparsegpt"), LayerStatistics(hessian, 100, "bad")
    )
    assert compressed.notes == ("sparsegpt raised damping to 0.1: H is not positive definite",)
    assert torch.isfinite(compressed.to_dense()).all()


def test_the_pruned_weight_shares_the_inverse_factor_of_the_dense_one():
    problem = problem_of(4, 16)
    factor = problem.with_weight(problem.weight * 2).inverse_factor(
        by_activation=False, damping=DAMPING
    )
    assert factor is problem.inverse_factor(by_activation=False, damping=DAMPING)
