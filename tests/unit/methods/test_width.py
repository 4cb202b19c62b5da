"""Neurons and heads that go: which, what the others make of it, and what is left of a layer."""

from itertools import pairwise

import pytest
import torch
from layers import problem_of

from autocompress.core.errors import SchemeError
from autocompress.core.layer import LayerSpec
from autocompress.core.scheme import Scheme
from autocompress.methods import (
    METHODS,
    LayerProblem,
    LayerStatistics,
    check,
    compress,
    damage_of,
    decode_rows,
    footprint,
    input_map,
    reader,
    unread_rows,
)
from autocompress.methods.problem import DAMPING
from autocompress.methods.width import WidthOptions

METHOD_NAMES = ("magnitude_sp", "wanda_sp", "ziplm")


def naive_ziplm(problem, keep, of):
    """Equations 1 and 2, one unit at a time, every matrix in full size."""
    hessian = problem.hessian.double()
    ridge = DAMPING * float(hessian.diagonal().mean())
    hessian = hessian + ridge * torch.eye(len(hessian), dtype=torch.float64)
    inverse, weight = torch.linalg.inv(hessian), problem.weight.double().clone()
    size = len(hessian) // of
    left = set(range(of))
    while len(left) > keep:
        costs = {}
        for unit in left:
            m = list(range(unit * size, (unit + 1) * size))
            own = torch.linalg.inv(inverse[m][:, m])
            costs[unit] = float((weight[:, m] @ own @ weight[:, m].T).trace())
        worst = min(costs, key=costs.get)
        m = list(range(worst * size, (worst + 1) * size))
        own = torch.linalg.inv(inverse[m][:, m])
        weight = weight - weight[:, m] @ own @ inverse[m]
        inverse = inverse - inverse[:, m] @ own @ inverse[m]
        left.remove(worst)
    columns = [unit * size + i for unit in sorted(left) for i in range(size)]
    dense = torch.zeros_like(weight)
    dense[:, columns] = weight[:, columns]
    return left, dense, hessian


@pytest.mark.parametrize(("of", "keep"), [(48, 20), (48, 47), (48, 1), (6, 2), (3, 1)])
def test_ziplm_matches_the_naive_sweep(of, keep):
    problem = problem_of(13, 48)
    chosen = METHODS["ziplm"].choose(problem, WidthOptions(keep, of))
    left, dense, _ = naive_ziplm(problem, keep, of)
    assert set(chosen.kept.nonzero().view(-1).tolist()) == left
    columns = chosen.kept.repeat_interleave(48 // of)
    torch.testing.assert_close(chosen.values().double(), dense[:, columns], rtol=1e-4, atol=1e-4)


def test_what_the_sweep_leaves_is_the_least_squares_refit_of_the_support():
    problem = problem_of(7, 40)
    left, swept, hessian = naive_ziplm(problem, 15, 40)
    s = sorted(left)
    weight = problem.weight.double()
    refit = weight @ hessian[:, s] @ torch.linalg.inv(hessian[s][:, s])
    torch.testing.assert_close(swept[:, s], refit, rtol=1e-9, atol=1e-9)


def test_of_many_units_several_go_at_a_time_at_hardly_a_loss():
    problem = problem_of(16, 128)
    chosen = METHODS["ziplm"].choose(problem, WidthOptions(64, 128))
    _, exact, _ = naive_ziplm(problem, 64, 128)
    dense = torch.zeros_like(problem.weight)
    dense[:, chosen.kept] = chosen.values()
    assert problem.loss(dense) < 1.1 * problem.loss(exact.float())


def test_units_of_a_narrower_layer_are_among_those_of_a_wider_one():
    problem = problem_of(9, 60)
    kept = [METHODS["ziplm"].choose(problem, WidthOptions(k, 20)).kept for k in (5, 11, 19)]
    assert all(bool((narrow <= wide).all()) for narrow, wide in pairwise(kept))


def test_scores_of_the_simple_methods_match_naive_sums():
    problem = problem_of(5, 24)
    weight, diagonal = problem.weight.double(), problem.hessian.diagonal().double()
    for name, scale in (("magnitude_sp", torch.ones_like(diagonal)), ("wanda_sp", diagonal)):
        scores = [
            sum(float(weight[r, j] ** 2 * scale[j]) for r in range(5) for j in (2 * u, 2 * u + 1))
            for u in range(12)
        ]
        best = sorted(range(12), key=scores.__getitem__)[-7:]
        kept = METHODS[name].choose(problem, WidthOptions(7, 12)).kept
        assert sorted(best) == kept.nonzero().view(-1).tolist()


def test_published_ranking_holds_where_inputs_are_correlated():
    problem = problem_of(32, 64)
    losses = []
    for method in METHOD_NAMES:
        scheme = Scheme.parse(f"{method}(keep=48,of=64)")
        found = compress(problem.weight, scheme, problem.statistics, problem=problem)
        losses.append(problem.loss(found.to_dense()))
    assert losses == sorted(losses, reverse=True)


def test_without_statistics_ziplm_changes_no_weight_and_says_so():
    problem = LayerProblem(problem_of(6, 40).weight, LayerStatistics.none())
    found = compress(problem.weight, Scheme.parse("ziplm(keep=30,of=40)"), problem.statistics)
    assert "no calibration statistics" in found.notes[0]
    dense = found.to_dense()
    columns = dense.abs().sum(0) > 0
    assert int(columns.sum()) == 30
    assert torch.equal(dense[:, columns], problem.weight[:, columns])


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_outputs_go_that_the_reader_no_longer_reads(method):
    read = problem_of(10, 36)
    writer = problem_of(36, 20, seed=1)
    reading = compress(read.weight, Scheme.parse(f"{method}(keep=4,of=6)"), read.statistics)
    scheme = Scheme.parse(f"{method}(by=mlp.down,keep=4,of=6)+gptq(bits=4,group_size=8)")
    writing = compress(writer.weight, scheme, writer.statistics, reader=read)
    gone = reading.to_dense().abs().sum(0) == 0
    assert torch.equal(unread_rows(writing.tensors, writing.scheme, writing.shape), gone)
    assert int(gone.sum()) == 12
    plain = compress(
        writer.weight[~gone], Scheme.parse("gptq(bits=4,group_size=8)"), writer.statistics
    )
    assert torch.equal(writing.to_dense()[~gone], plain.to_dense())
    assert bool((writing.to_dense()[gone] == 0).all())


def test_the_rest_of_a_scheme_sees_a_smaller_layer():
    problem = problem_of(12, 40)
    found = compress(
        problem.weight, Scheme.parse("wanda_sp(keep=5,of=8)+gptq(bits=3)"), problem.statistics
    )
    left = found.to_dense().abs().sum(0) > 0
    hessian = problem.hessian[left][:, left]
    small = LayerStatistics(hessian, problem.n_tokens, "small")
    plain = compress(problem.weight[:, left], Scheme.parse("gptq(bits=3)"), small)
    assert torch.equal(found.to_dense()[:, left], plain.to_dense())
    rows = torch.tensor([3, 0, 3])
    looked_up = decode_rows(found.tensors, found.scheme, found.shape, rows, torch.float32)
    assert torch.equal(looked_up, found.to_dense()[rows])


def test_inputs_that_are_gone_do_not_take_part_in_rounding_the_others():
    problem = problem_of(6, 16)
    scheme = Scheme.parse("magnitude_sp(keep=3,of=4)+rtn+int_inputs(bits=4)")
    found = compress(problem.weight, scheme, problem.statistics)
    left = found.to_dense().abs().sum(0) > 0
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    rows[:, ~left] *= 1000
    mapped = input_map(found.tensors, found.scheme)(rows)
    step = rows[:, left].abs().amax(1, keepdim=True) / 7
    assert torch.equal(mapped[:, ~left], rows[:, ~left])
    assert bool(((mapped - rows)[:, left].abs() <= step / 2 * 1.001).all())


def spec(name="model.layers.3.mlp.up_proj", o=48, d=32, kind="linear"):
    return LayerSpec(name, "up", 3, o, d, kind, "float32", name, o * d)


def test_macs_and_bytes_are_those_of_what_is_left():
    layer = spec()
    half = footprint(layer, Scheme.parse("ziplm(by=mlp.down_proj,keep=24,of=48)"))
    assert half.macs_per_token == 24 * 32
    assert half.storage_bytes == 24 * 32 * 4 + 6
    assert reader(layer.name, Scheme.parse("ziplm(by=mlp.down_proj,keep=24,of=48)")) == (
        "model.layers.3.mlp.down_proj"
    )
    assert reader(layer.name, Scheme.parse("ziplm(keep=24,of=32)")) is None


@pytest.mark.parametrize(
    ("scheme", "layer", "message"),
    [
        ("ziplm(keep=4,of=7)", spec(), r"of must divide the 32 inputs, but got 7.*legal .* 8"),
        ("ziplm(by=x,keep=4,of=7)", spec(), r"of must divide the 48 outputs.*value is [68]"),
        ("ziplm(keep=8,of=8)", spec(), r"keep must be at least 1 and below of.*legal value is 7"),
        ("ziplm(keep=0,of=8)", spec(), r"but got 0. The nearest legal value is 1"),
        ("ziplm(by=down,keep=1,of=2)", spec("head"), r"head is in no block"),
        ("ziplm(keep=1,of=2)", spec(kind="embedding"), r"embedding.*Leave ziplm"),
        ("rtn+ziplm(keep=1,of=2)", spec(), r"order share, width, transform"),
        ("ziplm(keep=1,of=2)+drop", spec(), r"drop leaves nothing"),
        ("tied(blocks=3/4)+ziplm(keep=1,of=2)", spec(), r"cannot go with tied"),
        ("ziplm(keep=1,of=2)+svd(rank=20)", spec(), r"48 x 16\): rank must be .* below break-even"),
    ],
)  # fmt: skip
def test_what_a_layer_cannot_take_is_refused(scheme, layer, message):
    with pytest.raises(SchemeError, match=f"(?s){message}"):
        check(layer, Scheme.parse(scheme))


def test_outputs_cannot_go_without_the_layer_that_reads_them():
    problem = problem_of(8, 16)
    scheme = Scheme.parse("ziplm(by=mlp.down,keep=4,of=8)")
    with pytest.raises(SchemeError, match=r"mlp\.down, but it was not given.*reader=LayerProblem"):
        compress(problem.weight, scheme, problem.statistics)
    with pytest.raises(SchemeError, match=r"mlp\.down that reads.*8 must divide|of must divide"):
        compress(problem.weight, scheme, problem.statistics, reader=problem_of(4, 12))


def test_bits_that_do_not_add_up_are_damage():
    problem = problem_of(8, 16)
    found = compress(problem.weight, Scheme.parse("ziplm(keep=4,of=8)"), problem.statistics)
    tensors = dict(found.tensors)
    assert damage_of(tensors, found.scheme, found.shape) is None
    tensors["w.kept"] = torch.tensor([255], dtype=torch.uint8)
    damage = damage_of(tensors, found.scheme, found.shape)
    assert damage.tensor == "w.kept"
    assert "must keep 4 of 8 units, but keeps 8" in damage.reason


def test_dead_inputs_and_zero_weights_are_removed_without_harm():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 24, generator=generator)
    inputs[:, 5:9] = 0
    statistics = LayerStatistics(inputs.T @ inputs / 500, 500, "dead")
    weight = torch.randn(6, 24, generator=generator)
    found = compress(weight, Scheme.parse("ziplm(keep=20,of=24)"), statistics)
    assert LayerProblem(weight, statistics).loss(found.to_dense()) < 1e-3
    nothing = compress(torch.zeros(6, 24), Scheme.parse("ziplm(keep=20,of=24)"), statistics)
    assert bool((nothing.to_dense() == 0).all())
