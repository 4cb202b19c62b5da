"""The auto-encoder against naive references: decoding, search, compensation, training."""

from dataclasses import replace

import pytest
import torch
from layers import loss_of, problem_of

from autocompress.core import Scheme
from autocompress.core.errors import SchemeError
from autocompress.methods import (
    LayerProblem,
    LayerStatistics,
    canonical,
    check,
    compress_together,
    footprint,
)
from autocompress.methods.autoencoder import (
    AutoencoderCoding,
    compensated,
    descended,
    fitted_scales,
)
from autocompress.methods.decoder import (
    AutoencoderOptions,
    decoded,
    first_decoder,
    nearest_by_place,
    sample,
    signs,
    trained,
)
from autocompress.methods.problem import DAMPING
from autocompress.testing.method_contract import example_layer

SMALL = AutoencoderOptions(piece=4, latents=5, hidden=3, steps=20)


def problems(o=24, d=16):
    return [problem_of(o, d, seed=seed) for seed in range(2)]


def codewords_of(options=SMALL, seed=3):
    generator = torch.Generator().manual_seed(seed)
    decoder = first_decoder(options, generator)
    for name, tensor in decoder.items():
        decoder[name] = tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
    return decoded(decoder, signs(options.latents, torch.device("cpu")))


def factor_of(problem, piece=4):
    return problem.inverse_factor(by_activation=True, damping=DAMPING, piece=piece)


def damped(problem):
    return (problem.hessian + factor_of(problem).ridge * torch.eye(len(problem.hessian))).double()


def together(found, text):
    weights = [problem.weight for problem in found]
    statistics = [problem.statistics for problem in found]
    return compress_together(weights, Scheme.parse(text), statistics, problems=found)


def test_each_code_decodes_to_what_the_formula_says():
    decoder = {name: t.half() for name, t in first_decoder(SMALL, torch.Generator()).items()}
    decoder["decoder_outer"] += 0.3
    scales = torch.tensor([0.5, -2.0]).half()
    codes = torch.tensor([[0, 31, 9], [6, 17, 30]], dtype=torch.int32)
    coding = AutoencoderCoding(4, 5, 3)
    columns = torch.linspace(0.5, 2, 12).half()
    found = coding.values(codes, {"scales": scales, "columns": columns, **decoder}, (2, 12))
    linear, inner, bias, outer = (
        decoder[f"decoder_{part}"].double() for part in ("linear", "inner", "bias", "outer")
    )
    for row in range(2):
        for place in range(3):
            code = int(codes[row, place])
            z = torch.tensor([1.0 if code >> t & 1 else -1.0 for t in range(5)]).double()
            pre = [float(inner[k] @ z + bias[k]) for k in range(3)]
            bent = torch.tensor([x if x >= 0 else x / 8 for x in pre]).double()
            here = slice(4 * place, 4 * place + 4)
            naive = (linear @ z + outer @ bent) * scales[row].double() * columns[here].double()
            torch.testing.assert_close(found[row, here].double(), naive, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("latents", [2, 5, 12, 16])
def test_codes_take_their_bits_and_come_back(latents):
    coding = AutoencoderCoding(4, latents, 0)
    generator = torch.Generator().manual_seed(latents)
    codes = torch.randint(1 << latents, (6, 3), generator=generator, dtype=torch.int32)
    packed = coding.pack(codes)
    assert packed.numel() == coding.code_bytes((6, 12)) == -(-18 * latents // 8)
    assert torch.equal(coding.unpack(packed, (6, 12)), codes)
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(coding.unpack_rows(packed, (6, 12), rows), codes[rows])


def test_rows_that_start_on_a_byte_are_read_alone():
    coding = AutoencoderCoding(4, 4, 0)
    codes = torch.arange(12, dtype=torch.int32).view(6, 2)
    packed, rows = coding.pack(codes), torch.tensor([5, 1])
    assert torch.equal(coding.unpack_rows(packed, (6, 8), rows), codes[rows])


def test_bytes_are_codes_scales_and_one_decoder():
    spec = replace(example_layer(40, 32).spec, name="h.0.q", macs_per_token=40 * 32)
    scheme = Scheme.parse("autoencoder(blocks=0/1,piece=4,latents=5,hidden=3)")
    first, second = (footprint(replace(spec, name=f"h.{b}.q"), scheme) for b in (0, 1))
    own = 40 * 32 // 4 * 5 // 8 + 2 * (40 + 32)
    assert second.storage_bytes == own
    assert first.storage_bytes == own + 2 * (4 * 5 + 3 * 5 + 3 + 4 * 3)
    assert first.macs_per_token == second.macs_per_token == 40 * 32


def test_the_search_by_place_is_the_nearest_by_brute_force():
    generator = torch.Generator().manual_seed(1)
    points, words = torch.randn(30, 4, generator=generator), codewords_of()
    shares = torch.randn(30, 4, generator=generator).exp()
    naive = [int((shares[i] * (words - points[i]).square()).sum(1).argmin()) for i in range(30)]
    assert nearest_by_place(points, shares, words).tolist() == naive


def naive_compensation(problem, words, weight):
    """OBQ by pieces, one row at a time, each inverse of what is left anew; codes and its loss."""
    hessian, piece = damped(problem), words.shape[1]
    order = [int(i) // piece for i in factor_of(problem).order[::piece]]
    codes = torch.zeros(len(weight), len(order), dtype=torch.int32)
    loss = 0.0
    for row, line in enumerate(weight.double().clone()):
        for k, place in enumerate(order):
            left = [j * piece + i for j in order[k:] for i in range(piece)]
            inverse = torch.linalg.inv(hessian[left][:, left])
            metric = torch.linalg.inv(inverse[:piece, :piece])
            off = line[left[:piece]] - words.double()
            losses = ((off @ metric) * off).sum(1)
            best = int(losses.argmin())
            loss += float(losses[best])
            line[left] -= off[best] @ metric @ inverse[:piece]
            codes[row, place] = best
    return codes, loss


def test_compensation_is_obq_by_pieces_and_its_errors_are_the_loss():
    problem, words = problems()[0], codewords_of()
    codes = compensated(problem.weight, words, factor_of(problem))
    naive, errors = naive_compensation(problem, words, problem.weight)
    assert torch.equal(codes, naive)
    off = words[codes].flatten(1).double() - problem.weight.double()
    assert float(((off @ damped(problem)) * off).sum()) == pytest.approx(errors, rel=1e-4)


def test_weights_that_the_decoder_can_say_are_found_exactly():
    problem, words = problems()[0], codewords_of()
    codes = torch.randint(32, (24, 4), generator=torch.Generator().manual_seed(5)).int()
    assert torch.equal(compensated(words[codes].flatten(1), words, factor_of(problem)), codes)


def test_descent_ends_where_no_other_code_is_better():
    problem, words = problems()[0], codewords_of()
    factor, scales = factor_of(problem), torch.full((24,), 1.3)
    codes = compensated(problem.weight / 1.3, words, factor)

    def losses(codes):
        off = 1.3 * words[codes].flatten(1).double() - problem.weight.double()
        return ((off @ damped(problem)) * off).sum(1)

    before = losses(codes)
    for _ in range(20):
        codes = descended(problem, codes, words, scales, factor)
    assert bool((losses(codes) < before).any())
    assert bool((losses(codes) <= before * (1 + 1e-6)).all())
    for place in range(4):
        for code in range(32):
            other = codes.clone()
            other[:, place] = code
            assert bool((losses(other) >= losses(codes) * (1 - 1e-5)).all())


def test_no_other_scale_of_a_row_loses_less():
    problem, words = problems()[0], codewords_of()
    dense = words[compensated(problem.weight, words, factor_of(problem))].flatten(1)
    best = fitted_scales(problem, dense)[:, None]
    least = problem.loss(best * dense)
    assert least < problem.loss(dense)
    assert least < min(problem.loss(share * best * dense) for share in (0.98, 1.02))


def test_training_fits_the_weighted_pieces_of_all_layers():
    found = problems()
    pieces, shares = sample(found, 4)
    assert len(pieces) == 2 * 24 * 4
    importance = torch.cat([(p.importance / p.importance.mean()).repeat(24) for p in found])
    rms = torch.cat([p.weight.square().mean(1).sqrt() for p in found])
    torch.testing.assert_close(
        pieces.view(48, 16) * rms[:, None], torch.cat([p.weight for p in found])
    )
    means = torch.cat([p.weight.square().mean(1) / p.weight.square().mean() for p in found])
    naive = (importance.view(48, 16) * means[:, None]).sqrt()
    torch.testing.assert_close(shares.view(48, 16), naive, rtol=1e-3, atol=1e-5)

    def error(steps):
        decoder = trained(found, replace(SMALL, steps=steps))
        assert {tensor.dtype for tensor in decoder.values()} == {torch.float16}
        words = decoded(decoder, signs(5, pieces.device))
        chosen = words[nearest_by_place(pieces, shares, words)]
        return float((shares * (chosen - pieces).square()).sum())

    assert error(60) < 0.9 * error(0)


def test_a_loud_column_is_in_reach():
    """Weights of thirty times the others at an input that outweighs all."""
    found = []
    for problem in problems(48, 32):
        weight, gains = problem.weight.clone(), torch.ones(32)
        weight[:, 5] *= 30
        gains[5] = 10
        statistics = LayerStatistics(gains[:, None] * problem.hessian * gains, 1024, "loud")
        found.append(LayerProblem(weight, statistics))
    for problem, one in zip(found, together(found, "autoencoder(blocks=0/1,steps=3)"), strict=True):
        assert problem.loss(one.to_dense()) < 1e-3 * problem.loss(torch.zeros(48, 32))


def test_it_loses_less_than_a_grid_of_as_many_bits():
    found = problems(48, 32)
    ours = together(found, "autoencoder(blocks=0/1,piece=4,latents=8,steps=20)")
    for problem, one in zip(found, ours, strict=True):
        assert problem.loss(one.to_dense()) < 0.9 * loss_of(problem, "gptq(bits=2,group_size=32)")


def test_without_statistics_it_says_what_it_did():
    none = [LayerProblem(p.weight, LayerStatistics.none()) for p in problems()]
    for one in together(none, "autoencoder(blocks=0/1,latents=4,steps=1)"):
        assert one.notes[0].startswith("autoencoder did not compensate: ")
        assert bool(torch.isfinite(one.to_dense()).all())


def test_rows_of_zeros_stay_zeros():
    found = problems()
    weight = found[1].weight.clone()
    weight[3] = 0
    found = [LayerProblem(torch.zeros(24, 16), found[0].statistics), found[1].with_weight(weight)]
    first, second = together(found, "autoencoder(blocks=0/1,latents=4,steps=2)")
    assert not first.to_dense().any()
    assert not second.to_dense()[3].any()
    assert second.to_dense()[4].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("svd(rank=2)+autoencoder", "autoencoder quantizes layers .* cannot follow svd"),
        ("tied(blocks=0/1)+autoencoder", "autoencoder quantizes layers .* cannot follow tied"),
        ("wanda+autoencoder", "autoencoder has no code for zero"),
        ("hadamard+autoencoder", "hadamard gives each layer a basis of its own"),
    ],
)
def test_nothing_stands_before_it(text, message):
    with pytest.raises(SchemeError, match=message):
        canonical(Scheme.parse(text))


def test_a_piece_must_divide_the_inputs():
    spec = replace(example_layer(40, 32).spec, name="h.0.q")
    with pytest.raises(SchemeError, match=r"must divide the 32 inputs, but got 6.* value is 4"):
        check(spec, Scheme.parse("autoencoder(blocks=0/1,piece=6)"))
