"""What each peer does that the contract of samplers does not ask for."""

import numpy as np
import pytest

from autocompress.core import Scheme
from autocompress.search import SAMPLERS
from autocompress.search.peers.base import spread_budgets
from autocompress.search.peers.evopress import Stage, Switching, evolve
from autocompress.search.peers.programs import AssignmentProgram
from autocompress.search.solver import solve_exactly, sweep
from autocompress.spaces.space import Choice, Option, SearchSpace
from autocompress.testing.replay import ReplayTable

BITS = (2, 3, 4, 8)


def make_table(n_choices=8, seed=0):
    choices = tuple(
        Choice(
            f"layer{i}",
            (f"layer{i}",),
            tuple(
                Option(f"{b}", (Scheme.parse(f"rtn(bits={b})"),), 50 * b * (1 + i % 2))
                for b in BITS
            ),
        )
        for i in range(n_choices)
    )
    weights = np.random.default_rng(seed).uniform(0.1, 2.0, n_choices)
    singles = (weights[:, None] * 0.25 ** np.array(BITS, dtype=float)).ravel()
    space = SearchSpace("peers", "bits", choices)
    return ReplayTable(space, singles, np.zeros((len(singles),) * 2), {}, 0, 64, "kl")


TABLE = make_table()
DAMAGE = TABLE.split(TABLE.singles)
COST = TABLE.split(TABLE.bytes_per_option)


def solver(name):
    return SAMPLERS[name](TABLE.space, seed=0, table=TABLE.option_table())


def damage(levels):
    return sum(d[v] for d, v in zip(DAMAGE, levels, strict=True))


def size(levels):
    return sum(c[v] for c, v in zip(COST, levels, strict=True))


@pytest.mark.parametrize("share", [0.2, 0.41, 0.77])
def test_dynamic_and_integer_programming_are_exact(share):
    budget = size([0] * 8) + share * (size([3] * 8) - size([0] * 8))
    exact = solve_exactly(DAMAGE, [c.astype(np.int64) // 50 for c in COST], int(budget // 50))
    for name, tolerance in (("gradient-dp", 0.02), ("hawq", 0.002)):
        levels = solver(name).solve(budget)
        assert size(levels) <= budget
        assert damage(levels) == pytest.approx(damage(exact), rel=tolerance)


def test_a_linear_program_finds_supported_points_below_the_budget():
    points = sweep(DAMAGE, COST)
    on_hull = {tuple(points.at(k).tolist()) for k in range(len(points))}
    lp = solver("gradient-lp")
    for budget in spread_budgets(COST, 7):
        levels = lp.solve(budget)
        assert size(levels) <= budget
        assert levels in on_hull


def test_programs_are_scaled_whatever_the_units():
    program = AssignmentProgram.of((np.array([3e-9, 1e-9]),), (np.array([1e9, 4e9]),))
    np.testing.assert_allclose(program.damage, [1.0, 1 / 3])
    np.testing.assert_allclose(program.cost, [[0.25, 1.0]])


def test_any_beginning_of_the_budgets_covers_the_range():
    budgets = spread_budgets(COST, 15)
    low, high = size([0] * 8), size([3] * 8)
    np.testing.assert_allclose(budgets[:3], [low + f * (high - low) for f in (0.5, 0.25, 0.75)])
    np.testing.assert_allclose(np.diff(np.sort(budgets)), (high - low) / 16)


def test_switches_keep_the_size():
    switching = Switching(COST, float(size([1] * 8)) * 1.3)
    generator = np.random.default_rng(0)
    parent = switching.start(generator)
    assert switching.fits(parent)
    children = [switching.offspring(parent, generator) for _ in range(100)]
    assert all(child != parent and switching.fits(child) for child in children)
    assert {levels[0] for levels in children} >= {1, 2, 3}  # 4 to 8 bits takes four others


def test_evolution_in_stages_improves_and_counts_its_tokens():
    stages = (Stage(1, 10), Stage(1, 100))
    calls = []

    def evaluate(levels, tokens, draw):
        calls.append((tokens, draw))
        return damage(levels)

    found = list(
        evolve(COST, size([1] * 8) * 1.15, evaluate, generations=60, offspring=2, stages=stages)
    )
    assert damage(found[-1].parent) < damage(found[0].parent)
    assert found[-1].tokens == sum(tokens for tokens, _ in calls)
    assert {tokens for tokens, draw in calls if draw % 2} == {100}
    assert all(size(g.parent) <= size([1] * 8) * 1.15 for g in found)


def test_greedy_starts_with_one_probe_per_option():
    greedy = SAMPLERS["greedy-kl"](TABLE.space, seed=0)
    probes = {greedy.encode(greedy.ask(n)) for n in range(8)}
    assert (3,) * 8 in probes
    assert all(sum(v != 3 for v in levels) <= 1 for levels in probes)
