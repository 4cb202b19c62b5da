"""Layers that share: who they are, what is stored once, what cannot go together."""

from dataclasses import replace

import pytest
import torch
from layers import problem_of

from autocompress.core import Allocation, Scheme
from autocompress.core.errors import SchemeError
from autocompress.core.layer import Place
from autocompress.methods import (
    METHODS,
    LayerProblem,
    LayerStatistics,
    canonical,
    check,
    compress,
    compress_together,
    footprint,
    require_whole,
    sharing_layers,
    strongest,
)
from autocompress.methods.problem import DAMPING
from autocompress.methods.sharing import pooled, pooled_statistics
from autocompress.testing.method_contract import example_layer

BASIS = "basis_sharing(blocks=0/1,rank=12)"


def problems():
    return [problem_of(40, 32, seed=seed) for seed in range(2)]


def together(found, text):
    weights = [problem.weight for problem in found]
    statistics = [problem.statistics for problem in found]
    return compress_together(weights, Scheme.parse(text), statistics, problems=found)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj", Place("model.layers", 3, "mlp.up_proj")),
        ("decoder.block.1.layer.2.wi", Place("decoder.block", 1, "layer.2.wi")),
        ("h.11", Place("h", 11, "")),
        ("lm_head", None),
    ],
)
def test_a_place_is_the_name_around_its_first_number(name, place):
    assert Place.of(name) == place
    assert place is None or place.at(place.number) == name


def test_layers_that_share_have_names_that_differ_in_the_block():
    scheme = Scheme.parse("basis_sharing(blocks=2/3,rank=4)")
    assert sharing_layers("h.3.q", scheme) == ("h.2.q", "h.3.q")
    assert sharing_layers("h.3.q", Scheme.parse("rtn")) == ("h.3.q",)
    with pytest.raises(SchemeError, match=r"h\.4\.q must be one of them, but got blocks=2/3"):
        sharing_layers("h.4.q", scheme)


@pytest.mark.parametrize("blocks", ["1/0", "0/0", "3", "a/b", "0/01", "0//1", "0/"])
def test_blocks_are_two_or_more_rising_numbers(blocks):
    with pytest.raises(SchemeError, match="blocks must be"):
        METHODS["basis_sharing"].options(blocks=blocks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"hadamard+{BASIS}", "hadamard gives each layer a basis of its own"),
        (f"{BASIS}+outlier_columns", "outlier_columns takes weights away .* Take eora"),
    ],
)
def test_what_is_fitted_to_one_layer_alone_cannot_go_with_what_layers_share(text, message):
    with pytest.raises(SchemeError, match=message):
        canonical(Scheme.parse(text))


def test_one_layer_of_those_that_share_is_not_compressed_alone():
    found = problem_of(8, 8)
    with pytest.raises(SchemeError, match="compressed together"):
        compress(found.weight, Scheme.parse("basis_sharing(blocks=0/1)"), found.statistics)
    with pytest.raises(SchemeError, match="got 1 layers"):
        together([found], "basis_sharing(blocks=0/1,rank=2)")


def test_an_allocation_holds_all_layers_that_share():
    scheme = canonical(Scheme.parse(BASIS))
    require_whole(Allocation.of({"h.0.q": scheme, "h.1.q": scheme, "h.2.q": Scheme.parse("rtn")}))
    with pytest.raises(SchemeError, match=r"h\.0\.q has basis.* and h\.1\.q has base"):
        require_whole(Allocation.of({"h.0.q": scheme}))


def test_break_even_is_that_of_the_stacked_layers():
    spec = replace(example_layer(40, 32).spec, name="h.0.q")
    largest = (2 * 40 * 32 - 1) // (2 * 40 + 32)
    check(spec, Scheme.parse(f"basis_sharing(blocks=0/1,rank={largest})"))
    with pytest.raises(SchemeError, match=f"nearest legal value is {largest}"):
        check(spec, Scheme.parse(f"basis_sharing(blocks=0/1,rank={largest + 1})"))


def test_the_first_layer_stores_what_the_others_borrow_and_all_multiply_by_it():
    spec = replace(example_layer(40, 32).spec, macs_per_token=40 * 32)
    scheme = Scheme.parse(BASIS)
    first, second = (footprint(replace(spec, name=f"h.{b}.q"), scheme) for b in (0, 1))
    assert set(first.tensors) == {"a.values", "b.values"}
    assert set(second.tensors) == {"a.values"}
    assert set(second.borrowed) == {"b.values"}
    assert first.storage_bytes + second.storage_bytes == 4 * 12 * (2 * 40 + 32)
    assert first.read_bytes == second.read_bytes == first.storage_bytes
    assert first.macs_per_token == second.macs_per_token == 12 * (40 + 32)


def test_layers_that_share_keep_their_scheme_when_rebuilt():
    spec = replace(example_layer(40, 32).spec, name="h.0.q")
    scheme = canonical(Scheme.parse(f"{BASIS}+gptq(bits=4)"))
    assert strongest(spec, scheme) == scheme


def test_pooled_statistics_are_those_of_all_tokens_together():
    inputs = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (50, 150)]
    parts = [LayerStatistics(x.T @ x / len(x), len(x), str(len(x))) for x in inputs]
    found = [LayerProblem(torch.ones(3, 6), part) for part in parts]
    all_inputs = torch.cat(inputs)
    whole = pooled_statistics(found)
    torch.testing.assert_close(whole.hessian, all_inputs.T @ all_inputs / 200)
    assert whole.n_tokens == 200
    without = LayerProblem(torch.ones(3, 6), LayerStatistics.none())
    assert pooled_statistics([found[0], without]).hessian is None


def test_the_basis_is_that_of_the_stacked_whitened_weights():
    """Naive: singular vectors of W L with L L^T the summed H, in float64."""
    found = problems()
    stacked = torch.cat([p.weight for p in found]).double()
    lower = torch.linalg.cholesky(sum(p.hessian.double() for p in found))
    u, s, vt = torch.linalg.svd(stacked @ lower, full_matrices=False)
    best = (
        u[:, :12]
        @ torch.diag(s[:12])
        @ torch.linalg.solve_triangular(lower, vt[:12], upper=False, left=False)
    )
    whole = pooled(found, (0, 1))
    options = METHODS["basis_sharing"].options(rank=12, blocks="0/1")
    outer, inner, notes = METHODS["basis_sharing"].factorize(whole, options)
    torch.testing.assert_close((outer @ inner).double(), best, rtol=1e-3, atol=1e-3)
    tail = float((s[12:] ** 2).sum()) / 2  # H of the pooled problem is the mean
    assert whole.loss(outer @ inner) == pytest.approx(tail, rel=1e-4)
    assert notes == ()


def test_own_coefficients_are_the_least_squares_fit_to_own_inputs():
    found = problems()
    options = METHODS["basis_sharing"].options(rank=12, blocks="0/1")
    outer, _, _ = METHODS["basis_sharing"].factorize(pooled(found, (0, 1)), options)
    for problem, rows, compressed in zip(
        found, outer.chunk(2), together(found, BASIS), strict=True
    ):
        basis = compressed.tensors["b.values"].double()
        hessian = problem.hessian.double()
        naive = torch.linalg.solve(
            basis @ hessian @ basis.T, basis @ hessian @ problem.weight.double().T
        ).T
        best = problem.loss((naive @ basis).float())
        loss = problem.loss(compressed.to_dense())
        assert loss == pytest.approx(best, rel=1e-3)
        assert loss <= problem.loss(rows @ compressed.tensors["b.values"])


def test_alike_layers_lose_less_by_a_shared_basis_than_apart_at_equal_bytes():
    first = problem_of(40, 32, seed=1)
    other = first.with_weight(first.weight + 0.1 * problem_of(40, 32, seed=2).weight)
    shared = sum(
        p.loss(c.to_dense())
        for p, c in zip((first, other), together([first, other], BASIS), strict=True)
    )
    rank = 12 * (2 * 40 + 32) // (2 * (40 + 32))
    apart = sum(
        p.loss(compress(p.weight, Scheme.parse(f"svd_llm(rank={rank})"), p.statistics).to_dense())
        for p in (first, other)
    )
    assert shared < apart


def test_a_full_basis_gives_the_weights_back():
    found = [problem_of(40, 8, seed=seed) for seed in range(2)]
    for problem, compressed in zip(
        found, together(found, "basis_sharing(blocks=0/1,rank=8)"), strict=True
    ):
        torch.testing.assert_close(compressed.to_dense(), problem.weight, rtol=1e-3, atol=1e-4)


def test_without_statistics_it_says_what_it_did():
    none = [LayerProblem(p.weight, LayerStatistics.none()) for p in problems()]
    assert all("the plain decomposition" in c.notes[0] for c in together(none, BASIS))


def test_another_neighbour_without_statistics_is_another_pool():
    a, b, c = (
        LayerProblem(problem_of(6, 4, seed=s).weight, LayerStatistics.none()) for s in range(3)
    )
    assert torch.equal(pooled([a, b], (0, 1)).weight, torch.cat([a.weight, b.weight]))
    assert torch.equal(pooled([a, c], (0, 2)).weight, torch.cat([a.weight, c.weight]))


def test_the_tied_matrix_is_the_mean_nearest_in_the_outputs():
    """Naive: no step from it in any direction lowers the damped loss of all layers."""
    found = problems()
    target, notes = METHODS["tied"].target(found, METHODS["tied"].options())
    assert notes == ()
    gradient = sum(
        (target.double() - p.weight.double())
        @ (p.hessian.double() + DAMPING * p.hessian.diagonal().mean() * torch.eye(32))
        for p in found
    )
    scale = sum(float((p.weight.double() @ p.hessian.double()).norm()) for p in found)
    assert float(gradient.norm()) < 1e-5 * scale
    plain = (found[0].weight + found[1].weight) / 2
    assert sum(p.loss(target) for p in found) < sum(p.loss(plain) for p in found)


def test_tied_layers_without_statistics_take_the_plain_mean_and_say_so():
    found = [LayerProblem(p.weight, LayerStatistics.none()) for p in problems()]
    first, second = together(found, "tied(blocks=0/1)")
    torch.testing.assert_close(first.to_dense(), (found[0].weight + found[1].weight) / 2)
    assert torch.equal(first.to_dense(), second.to_dense())
    assert "plain mean" in first.notes[0]
    first, second = together(problems(), "tied(blocks=0/1,to=first)")
    assert torch.equal(second.to_dense(), found[0].weight)


def test_a_correction_of_full_rank_gives_each_tied_layer_its_weight_back():
    found = problems()
    for problem, one in zip(
        found, together(found, "tied(blocks=0/1)+rtn(bits=4)+eora(rank=32)"), strict=True
    ):
        torch.testing.assert_close(one.to_dense(), problem.weight, rtol=1e-2, atol=1e-2)


def test_only_what_differs_is_each_tied_layers_own():
    spec = replace(example_layer(40, 32).spec, name="h.1.q")
    scheme = Scheme.parse("tied(blocks=0/1)+svd_llm(rank=4)+rtn(bits=8)+eora(rank=2)")
    claimed = footprint(spec, scheme)
    assert set(claimed.tensors) == {"r.a.values", "r.b.values"}
    assert set(claimed.borrowed) == {"a.packed", "a.scales", "b.packed", "b.scales"}
