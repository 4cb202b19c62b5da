import pytest
import torch

from autocompress.core.errors import SchemeError
from autocompress.core.layer import LayerSpec
from autocompress.core.scheme import Scheme, Stage
from autocompress.methods import METHODS, LayerProblem, LayerStatistics, check, compress, footprint
from autocompress.testing.method_contract import example_layer

SHAPES = [(36, 90), (88, 37), (40, 64)]


def problem_of(shape, n_tokens=512):
    layer = example_layer(*shape, n_tokens=n_tokens)
    return LayerProblem(layer.weight, layer.statistics)


def compressed_of(problem, text):
    return compress(problem.weight, Scheme.parse(text), problem.statistics)


def loss_of(problem, text):
    return problem.loss(compressed_of(problem, text).to_dense())


def spec(o, d):
    return LayerSpec("up", "up", 0, o, d, "linear", "bfloat16", "up", o * d)


def added_bits(o, d, part):
    """Bits per weight that the part adds."""
    n_bytes = [
        footprint(spec(o, d), Scheme.parse(text)).storage_bytes
        for text in ("rtn(bits=4)", f"rtn(bits=4)+{part}")
    ]
    return 8 * (n_bytes[1] - n_bytes[0]) / (o * d)


def naive_columns(problem, k):
    energies = [
        float(problem.importance[j]) * sum(float(w) ** 2 for w in problem.weight[:, j])
        for j in range(problem.weight.shape[1])
    ]
    return sorted(sorted(range(len(energies)), key=energies.__getitem__)[-k:])


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_are_the_most_energetic_and_fitted_by_least_squares(shape):
    problem = problem_of(shape)
    columns = naive_columns(problem, 3)
    compressed = compressed_of(problem, f"rtn(bits=3)+outlier_columns(share={3 / shape[1]})")
    assert compressed.tensors["r.index"].tolist() == columns
    target = problem.weight.index_fill(1, torch.tensor(columns), 0.0)
    base = compress(target, Scheme.parse("rtn(bits=3)"), problem.statistics).to_dense()
    assert (base[:, columns] == 0).all()
    root = torch.linalg.cholesky(problem.hessian.double() + 1e-9 * torch.eye(shape[1]))
    error = (problem.weight - base).double() @ root
    fitted = torch.linalg.lstsq(root[columns].T, error.T).solution.T.float()
    stored = compressed.tensors["r.values"].float()
    torch.testing.assert_close(stored, fitted, rtol=1e-3, atol=1e-3 * float(fitted.abs().max()))
    assert torch.equal(compressed.to_dense()[:, columns], stored)


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize("shape", SHAPES)
def test_columns_lose_less_than_without_and_than_kept_as_they_are(shape, quantizer):
    problem = problem_of(shape)
    base = f"{quantizer}(bits=3,group_size=32)"
    found = compressed_of(problem, f"{base}+outlier_columns(share=0.05)")
    index = found.tensors["r.index"].long()
    as_they_are = compress(
        problem.weight.index_fill(1, index, 0.0), Scheme.parse(base), problem.statistics
    ).to_dense()
    as_they_are[:, index] += problem.weight[:, index]
    assert problem.loss(found.to_dense()) < problem.loss(as_they_are) < loss_of(problem, base)


def test_large_columns_kept_apart_leave_finer_scales_to_the_rest():
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    weight[:, 10] = 20
    inputs = torch.randn(512, 64, generator=torch.Generator().manual_seed(2))
    problem = LayerProblem(weight, LayerStatistics(inputs.T @ inputs / 512, 512, "x"))
    plain = compressed_of(problem, "rtn(bits=4)").tensors["scales"]
    apart = compressed_of(problem, "rtn(bits=4)+outlier_columns(share=0.02)").tensors
    assert apart["r.index"].tolist() == [10]
    assert (apart["scales"].abs() < 0.5 * plain.abs()).all()


def test_without_statistics_columns_are_kept_as_they_are_and_it_says_so():
    problem = LayerProblem(problem_of((40, 64)).weight, LayerStatistics.none())
    compressed = compressed_of(problem, "rtn(bits=3)+outlier_columns(share=0.05)")
    assert compressed.notes[-1].startswith("outlier_columns kept columns as they are: ")
    index = compressed.tensors["r.index"].long()
    assert torch.equal(compressed.to_dense()[:, index], problem.weight[:, index].half().float())


def test_kept_columns_read_exact_inputs():
    method = METHODS["outlier_columns"]
    options = method.read_options(Stage("outlier_columns"))
    stored = {"index": torch.tensor([2, 5], dtype=torch.int16)}
    assert method.exact_inputs(stored, options).tolist() == [2, 5]


@pytest.mark.parametrize("share", [0.004, 0.05])  # places in the matrix; columns and counts
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_those_that_quantize_worst_and_come_back_in_place(shape, share):
    problem = problem_of(shape)
    base = compressed_of(problem, "rtn(bits=3)").to_dense()
    scores = problem.importance * (problem.weight - base).square()
    n = round(share * problem.weight.numel())
    chosen = scores.flatten().argsort(descending=True)[:n].sort().values
    compressed = compressed_of(problem, f"rtn(bits=3)+outlier_weights(share={share})")
    assert ("r.counts" in compressed.tensors) == (n > shape[0])
    dense = compressed.to_dense().flatten()
    target = problem.weight.flatten().index_fill(0, chosen, 0.0).view(shape)
    rest = compress(target, Scheme.parse("rtn(bits=3)"), problem.statistics).to_dense().flatten()
    rest[chosen] = problem.weight.flatten()[chosen].half().float()
    assert torch.equal(dense, rest)


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_kept_apart_lose_less(shape, quantizer):
    problem = problem_of(shape)
    losses = [
        loss_of(problem, f"{quantizer}(bits=3)+outlier_weights(share={share})")
        for share in (0.005, 0.02, 0.1)
    ]
    losses.insert(0, loss_of(problem, f"{quantizer}(bits=3)"))
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.95 * losses[0]


def test_all_of_a_row_may_be_kept():
    weight = torch.zeros(4, 16)
    weight[2] = torch.linspace(300.5, 700.5, 16)
    text = "rtn(bits=2)+outlier_weights(share=0.25)"
    compressed = compress(weight, Scheme.parse(text), LayerStatistics.none())
    assert compressed.tensors["r.counts"].tolist() == [0, 0, 16, 0]
    assert torch.equal(compressed.to_dense(), weight.half().float())


@pytest.mark.parametrize("shape", [(64, 256), (1000, 512)])
def test_bits_per_weight_are_those_of_the_formulas(shape):
    o, d = shape
    k, n = round(0.01 * d), round(0.01 * o * d)
    assert added_bits(o, d, "outlier_columns(share=0.01)") == pytest.approx(
        k / d * 16 + k * 16 / (o * d)
    )
    # A value and a column each, a count per row.
    assert added_bits(o, d, "outlier_weights(share=0.01)") == pytest.approx(
        n / (o * d) * 32 + 16 / d
    )
    # A value and a place each.
    few = round(0.001 * o * d)
    assert added_bits(o, d, "outlier_weights(share=0.001)") == pytest.approx(few / (o * d) * 48)


def test_indices_are_as_wide_as_the_layer_needs():
    def dtypes(o, d, text):
        tensors = footprint(spec(o, d), Scheme.parse(text)).tensors
        return {name: t.dtype for name, t in tensors.items() if name in ("r.index", "r.counts")}

    assert dtypes(8, 32768, "outlier_columns") == {"r.index": "int16"}
    assert dtypes(8, 32769, "outlier_columns") == {"r.index": "int32"}
    assert dtypes(8, 32767, "outlier_weights") == {"r.index": "int16", "r.counts": "int16"}
    assert dtypes(8, 32768, "outlier_weights") == {"r.index": "int32"}


def test_weights_of_a_layer_that_cannot_be_counted_are_refused():
    huge = spec(1 << 21, 2048)
    check(huge, Scheme.parse("rtn+outlier_weights(share=0.005)"))
    with pytest.raises(SchemeError, match=r"share 0\.0001\. .* nearest legal value is 0\.00049"):
        check(huge, Scheme.parse("rtn+outlier_weights(share=0.0001)"))
    with pytest.raises(SchemeError, match="use outlier_columns"):
        check(spec(1 << 16, 1 << 16), Scheme.parse("rtn+outlier_weights"))
    check(spec(1 << 15, 1 << 16), Scheme.parse("rtn+outlier_weights"))


def test_their_multiplications_are_counted():
    plain = footprint(spec(40, 64), Scheme.parse("rtn")).macs_per_token
    for part, more in (
        ("outlier_columns(share=0.05)", 40 * 3),
        ("outlier_weights(share=0.05)", 128),
    ):
        assert footprint(spec(40, 64), Scheme.parse(f"rtn+{part}")).macs_per_token == plain + more
