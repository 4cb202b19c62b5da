import pytest
import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress
from autocompress.methods.problem import spectrum_of
from autocompress.testing.method_contract import example_layer

SHAPES = [(30, 80), (80, 30), (48, 48)]


def problem_of(o, d, n_tokens=400):
    generator = torch.Generator().manual_seed(o)
    inputs = torch.randn(n_tokens, d, generator=generator) @ torch.randn(d, d, generator=generator)
    statistics = LayerStatistics(inputs.T @ inputs / n_tokens, n_tokens, "x")
    return LayerProblem(torch.randn(o, d, generator=generator), statistics)


def dense_of(problem, text):
    scheme = Scheme.parse(text)
    return compress(problem.weight, scheme, problem.statistics, problem=problem).to_dense()


def naive_svd_llm(weight, hessian, rank):
    """As published: decompose W L, truncate, undo L."""
    lower = torch.linalg.cholesky(hessian.double())
    left, sizes, right = torch.linalg.svd(weight.double() @ lower, full_matrices=False)
    truncated = left[:, :rank] @ torch.diag(sizes[:rank]) @ right[:rank]
    return truncated @ torch.linalg.inv(lower), sizes


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_matches_the_library_decomposition(shape):
    problem = problem_of(*shape)
    left, sizes, right = torch.linalg.svd(problem.weight.double(), full_matrices=False)
    expected = left[:, :9] @ torch.diag(sizes[:9]) @ right[:9]
    dense = dense_of(problem, "svd(rank=9)").double()
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(problem.spectrum.energies, sizes.square(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_llm_matches_the_published_algorithm(shape):
    problem = problem_of(*shape)
    expected, _ = naive_svd_llm(problem.weight, problem.hessian, 9)
    dense = dense_of(problem, "svd_llm(rank=9)").double()
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_of_svd_llm_is_the_tail_of_the_squared_singular_values(shape):
    problem = problem_of(*shape)
    _, sizes = naive_svd_llm(problem.weight, problem.hessian, 1)
    energies = problem.whitened_spectrum.energies
    torch.testing.assert_close(energies, sizes.square(), rtol=1e-4, atol=1e-6 * float(energies[0]))
    losses = []
    for rank in (1, 4, 11, 20):
        losses.append(problem.loss(dense_of(problem, f"svd_llm(rank={rank})")))
        assert losses[-1] == pytest.approx(float(energies[rank:].sum()), rel=1e-4)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_loses_nothing(shape):
    problem = problem_of(*shape)
    for spectrum in (problem.spectrum, problem.whitened_spectrum):
        dense = spectrum.outer @ spectrum.inner
        torch.testing.assert_close(dense, problem.weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rank", [2, 8, 16])
def test_svd_llm_loses_no_more_than_svd(rank):
    layer = example_layer(36, 90)
    problem = LayerProblem(layer.weight, layer.statistics)
    assert problem.loss(dense_of(problem, f"svd_llm(rank={rank})")) < problem.loss(
        dense_of(problem, f"svd(rank={rank})")
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_tokens", [1, 20])
def test_fewer_tokens_than_inputs_still_give_a_good_weight(shape, n_tokens):
    problem = problem_of(*shape, n_tokens=n_tokens)
    few = LayerStatistics.sampled(problem.statistics.hessian, n_tokens, "few")
    compressed = compress(problem.weight, Scheme.parse("svd_llm(rank=14)"), few)
    assert torch.isfinite(compressed.to_dense()).all()
    best = float(problem.spectrum.energies[14:].sum())
    lost = (compressed.to_dense() - problem.weight).square().sum()
    assert lost < 1.6 * best  # directions that no token took are decomposed as they are


def test_without_statistics_svd_llm_is_svd_and_says_so():
    weight = torch.randn(20, 40)
    plain = compress(weight, Scheme.parse("svd(rank=5)"), LayerStatistics.none())
    whitened = compress(weight, Scheme.parse("svd_llm(rank=5)"), LayerStatistics.none())
    assert torch.equal(plain.to_dense(), whitened.to_dense())
    assert whitened.notes == (
        "svd_llm used the plain decomposition: the layer has no calibration statistics",
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_share_the_singular_values_evenly(shape):
    problem = problem_of(*shape)
    tensors = compress(problem.weight, Scheme.parse("svd(rank=7)"), problem.statistics).tensors
    outer, inner = tensors["a.values"].norm(dim=0), tensors["b.values"].norm(dim=1)
    torch.testing.assert_close(outer, inner, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_deficient_or_dead_layer_is_restored(shape):
    o, d = shape
    weight = torch.outer(torch.randn(o), torch.randn(d))
    for exact in (weight, torch.zeros(o, d)):
        dense = compress(exact, Scheme.parse("svd(rank=6)"), LayerStatistics.none()).to_dense()
        torch.testing.assert_close(dense, exact, rtol=0, atol=1e-5)


def test_one_decomposition_serves_every_rank():
    problem = problem_of(20, 40)
    first = problem.whitened_spectrum
    dense_of(problem, "svd_llm(rank=3)")
    dense_of(problem, "svd_llm(rank=9)+gptq")
    assert problem.whitened_spectrum is first


def test_a_tall_matrix_is_decomposed_in_blocks_of_rows_alike():
    weight = torch.randn(40_000, 8, generator=torch.Generator().manual_seed(0))
    spectrum = spectrum_of(weight, None)
    expected = torch.linalg.svdvals(weight.double()).square()
    torch.testing.assert_close(spectrum.energies, expected, rtol=1e-9, atol=0)
    gram = spectrum.outer.T.double() @ spectrum.outer.double()
    torch.testing.assert_close(gram, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-5)
