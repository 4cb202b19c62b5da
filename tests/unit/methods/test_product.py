import math

import pytest
import torch

from autocompress.core.errors import SchemeError
from autocompress.core.scheme import Scheme
from autocompress.methods import METHODS, LayerProblem, LayerStatistics, check, compress, product
from autocompress.methods.product import (
    Assignment,
    ProductOptions,
    SubVectors,
    first_codewords,
    improved,
    lloyd,
)
from autocompress.testing.method_contract import example_layer


def vectors_of(o, d, block, seed=0):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randn(d, generator=generator).exp()
    return SubVectors(torch.randn(o, d, generator=generator), importance, block), importance


def naive_assignment(vectors, importance, codebook):
    """Sub-vector by sub-vector, codeword by codeword."""
    shares = importance / importance.mean()
    block = codebook.shape[1]
    codes, errors = [], []
    for i, point in enumerate(vectors.points):
        start = i * block % len(importance)
        share = shares[start : start + block]
        each = [float((share * (point - word).square()).sum()) for word in codebook]
        errors.append(min(each))
        codes.append(each.index(min(each)))
    return torch.tensor(codes), torch.tensor(errors)


def naive_means(vectors, importance, codebook, codes):
    means, block = codebook.clone(), codebook.shape[1]
    for k in range(len(codebook)):
        mass, moment = torch.zeros(block), torch.zeros(block)
        for i in (codes == k).nonzero()[:, 0].tolist():
            start = i * block % len(importance)
            mass += importance[start : start + block]
            moment += importance[start : start + block] * vectors.points[i]
        means[k] = moment / mass
    return means


def weighted_error(vectors, codebook):
    return float(vectors.assign(codebook).errors.sum())


def problem_loss(layer, text):
    return LayerProblem(layer.weight, layer.statistics).loss(layer.compress(text).to_dense())


@pytest.mark.parametrize("block", [2, 4, 8])
def test_assignment_matches_the_naive_one(block, monkeypatch):
    monkeypatch.setattr(product, "_DISTANCES_AT_ONCE", 500)  # several chunks, the last ragged
    vectors, importance = vectors_of(13, 24, block)
    codebook = first_codewords(vectors, 16, 0)
    assignment = vectors.assign(codebook)
    codes, errors = naive_assignment(vectors, importance, codebook)
    assert (assignment.codes != codes).float().mean() < 0.02  # ties, up to rounding
    torch.testing.assert_close(assignment.errors, errors, rtol=1e-4, atol=1e-5)


def test_codewords_become_weighted_means(monkeypatch):
    monkeypatch.setattr(product, "_DISTANCES_AT_ONCE", 500)
    vectors, importance = vectors_of(13, 24, 4)
    codebook = first_codewords(vectors, 16, 0)
    assignment = vectors.assign(codebook)
    expected = naive_means(vectors, importance, codebook, assignment.codes)
    torch.testing.assert_close(improved(vectors, codebook, assignment), expected)


def test_an_unused_codeword_takes_the_worst_follower_of_the_most_popular_one():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 0.0], [20.0, 0.0]])
    vectors = SubVectors(points, torch.ones(2), 2)
    codebook = torch.tensor([[0.0, 0.0], [20.0, 0.0], [90.0, 0.0], [99.0, 0.0]])
    assignment = vectors.assign(codebook)
    assert assignment.codes.tolist() == [0, 0, 0, 1]
    means = improved(vectors, codebook, assignment)
    torch.testing.assert_close(means[0], torch.tensor([5 / 3, 0.0]))
    assert means[1:].tolist() == [[20.0, 0.0], [4.0, 0.0], [1.0, 0.0]]


def test_iterations_lower_the_weighted_error():
    vectors, _ = vectors_of(40, 64, 4)
    codebook = first_codewords(vectors, 32, 0)
    errors = [weighted_error(vectors, lloyd(vectors, codebook, n)) for n in (0, 1, 3, 15)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_first_codewords_are_spread_and_repeatable():
    """Random ones leave several of these far clusters without a codeword; k-means++ does not."""
    centres = 100 * torch.eye(16)
    points = centres.repeat(10, 1) + torch.rand(160, 16, generator=torch.Generator().manual_seed(0))
    vectors = SubVectors(points, torch.ones(16), 16)
    for seed in range(5):
        found = first_codewords(vectors, 16, seed)
        assert sorted(found.argmax(1).tolist()) == list(range(16))
        assert torch.equal(found, first_codewords(vectors, 16, seed))


@pytest.mark.parametrize(("o", "d", "block"), [(4, 16, 4), (8, 32, 8), (2, 8, 2)])
def test_as_many_codewords_as_sub_vectors_lose_nothing(o, d, block):
    """Part of the definition of a codec: up to the float16 of the codewords it is lossless."""
    weight = torch.randn(o, d, generator=torch.Generator().manual_seed(0)).half().float()
    for codewords in (o * d // block, 256):
        if codewords in (16, 32, 64, 128, 256):
            scheme = Scheme.parse(f"product(block={block},codewords={codewords})")
            assert torch.equal(compress(weight, scheme, LayerStatistics.none()).to_dense(), weight)


def test_importance_lowers_the_loss():
    layer = example_layer(64, 96)
    problem = LayerProblem(layer.weight, layer.statistics)
    blind = compress(layer.weight, Scheme.parse("product(block=4)"), LayerStatistics.none())
    assert problem_loss(layer, "product(block=4)") < 0.9 * problem.loss(blind.to_dense())


def test_a_large_matrix_is_learnt_from_some_of_its_rows(monkeypatch):
    layer = example_layer(96, 64)
    whole = problem_loss(layer, "product(block=4,codewords=32)")
    half = problem_loss(layer, "product(block=4,codewords=16)")
    monkeypatch.setattr(product, "_SEEN_PER_CODEWORD", 16)  # 32 of the 96 rows
    part = problem_loss(layer, "product(block=4,codewords=32)")
    assert whole < part < half


@pytest.mark.parametrize(("block", "codewords"), [(2, 16), (4, 64), (8, 256)])
def test_the_codebook_is_stored_once(block, codewords):
    layer = example_layer(64, 32)
    compressed = layer.compress(f"product(block={block},codewords={codewords})")
    n_bytes = sum(tensor.nbytes for tensor in compressed.tensors.values())
    expected = math.log2(codewords) / block + 16 * codewords * block / (64 * 32)
    assert 8 * n_bytes / (64 * 32) == expected


def test_a_block_that_does_not_divide_the_inputs_is_refused_with_the_nearest_that_does():
    layer = example_layer(36, 90)
    with pytest.raises(SchemeError, match=r"divide the 90 inputs.*nearest legal value is 2\."):
        check(layer.spec, Scheme.parse("product(block=8)"))
    refusal = METHODS["product"].refusal((4, 33), ProductOptions())
    assert refusal.endswith("Take another method.")


def test_assignments_of_distinct_points_have_no_error():
    vectors, _ = vectors_of(2, 16, 4)
    found = vectors.assign(vectors.points)
    assert isinstance(found, Assignment)
    assert found.codes.tolist() == list(range(8))
    assert float(found.errors.max()) == 0
