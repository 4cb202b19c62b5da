"""Trellis codes: paths against brute force, C against torch, and what they are for."""

import itertools

import pytest
import torch

from autocompress.core import Scheme
from autocompress.core.errors import SchemeError
from autocompress.methods import LayerProblem, LayerStatistics, check, compress
from autocompress.methods.trellis import TrellisCoding
from autocompress.methods.viterbi import Trellis
from autocompress.testing.method_contract import example_layer


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive_states(codes, bits, window):
    """Of one cycle of codes."""
    states = []
    for i in range(len(codes)):
        state = sum(codes[(i - j) % len(codes)] << (bits * j) for j in range(-(-window // bits)))
        states.append(state % (1 << window))
    return states


def cost(trellis, targets, weights, states):
    values = trellis.table[states.int()]
    return float((weights * (targets - values).square()).sum())


@pytest.mark.parametrize(("window", "bits", "steps"), [(3, 1, 9), (4, 2, 6), (4, 1, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_the_path_through_a_given_seam_is_the_cheapest_of_all_codes(window, bits, steps, seed):
    trellis = Trellis(numbers(1 << window, seed=9), bits, run=64)
    x, w = numbers(steps, seed=seed), numbers(steps, seed=seed + 50).exp()
    found = trellis.by_torch(x, w)
    seam = int(found[-1]) % trellis.n_shared
    every = [
        torch.tensor(naive_states(codes, bits, window))
        for codes in itertools.product(range(1 << bits), repeat=steps)
    ]
    through = [states for states in every if int(states[-1]) % trellis.n_shared == seam]
    best = min(cost(trellis, x, w, states) for states in through)
    assert cost(trellis, x, w, found) == pytest.approx(best, rel=1e-5)
    # where the cycle closes is chosen by a stretch around the seam, which costs little
    anywhere = min(cost(trellis, x, w, states) for states in every)
    assert best <= 1.6 * anywhere + 0.5


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("shape", [(16, 8), (300, 8), (520, 3)])
def test_states_come_back_from_their_lowest_bits(bits, shape):
    coding = TrellisCoding(bits)
    weight = numbers(*shape)
    found = torch.stack(
        [coding.trellis.states(x, torch.ones(shape[0])) for x in weight.T.contiguous()], 1
    )
    packed = coding.pack(found)
    assert packed.numel() == coding.code_bytes(shape)
    assert torch.equal(coding.unpack(packed, shape), found)
    rows = torch.tensor([0, shape[0] - 1, 5, 5])
    assert torch.equal(coding.unpack_rows(packed, shape, rows), found[rows])
    start, stop = coding.trellis.bounds(shape[0])[0]
    codes = (found[start:stop, 0] % (1 << bits)).tolist()
    assert found[start:stop, 0].tolist() == naive_states(codes, bits, 12)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.65), (3, 0.6), (4, 0.6)])
def test_gaussian_weights_lose_little_more_than_half_of_what_the_best_levels_lose(bits, share):
    levels = {2: 0.1175, 3: 0.03454, 4: 0.009497}[bits]  # Max 1960, table I
    weight = numbers(256, 128)
    found = compress(weight, Scheme.parse(f"trellis(bits={bits})"), LayerStatistics.none())
    assert 4.0**-bits < float((found.to_dense() - weight).square().mean()) < share * levels


def test_it_damages_less_than_gptq_of_as_many_bits():
    layer = example_layer(128, 64)
    problem = LayerProblem(layer.weight, layer.statistics)
    loss = [
        problem.loss(layer.compress(text).to_dense())
        for text in ("hadamard+gptq(bits=3,group_size=64)", "hadamard+trellis(bits=3)")
    ]
    assert loss[1] < 0.75 * loss[0]


def test_rows_of_zeros_stay_zero():
    weight = numbers(32, 8)
    weight[3] = 0
    found = compress(weight, Scheme.parse("trellis"), LayerStatistics.none())
    assert not found.to_dense()[3].any()
    assert "trellis did not compensate" in found.notes[0]


def test_a_layer_of_few_outputs_is_refused():
    layer = example_layer(8, 64)
    with pytest.raises(SchemeError, match="16 outputs or more, but got 8"):
        check(layer.spec, Scheme.parse("trellis"))
