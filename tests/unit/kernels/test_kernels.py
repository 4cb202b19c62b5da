import math
from dataclasses import fields

import pytest
import torch

from autocompress.core import Scheme
from autocompress.kernels import KERNELS, dispatch, dynamic, refusals
from autocompress.kernels.base import product_dtype
from autocompress.methods import decode, input_map, slices
from autocompress.methods.base import Residual
from autocompress.methods.schemes import plan
from autocompress.methods.storage import under

from .conftest import CPU, INPUTS, RESIDUALS, SCHEMES, SHAPE, compressed, errors, prepared, tokens

ON_CPU = {
    name: [
        s for s in SCHEMES if not KERNELS[name].refusal(SHAPE, Scheme.parse(s), torch.float32, CPU)
    ]
    for name in KERNELS
}
ROWS = [(name, scheme) for name, schemes in ON_CPU.items() for scheme in schemes]


@pytest.fixture(autouse=True)
def fixed_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors take the first kernel that can: nothing is timed here."""
    monkeypatch.setattr(dispatch, "seconds_of", lambda *_: 1.0)


@pytest.mark.parametrize(("name", "scheme"), ROWS)
def test_a_kernel_agrees_with_the_decoded_matrix_within_its_tolerance(
    name: str, scheme: str
) -> None:
    weight, kernel = compressed(scheme), KERNELS[name]
    before = {key: tensor.clone() for key, tensor in weight.tensors.items()}
    for dtype in (torch.float32, torch.bfloat16):
        ready = prepared(name, weight, dtype, CPU)
        for n in (1, 33):
            rows = tokens(n).to(dtype)
            got = kernel.apply(rows, ready)
            assert got.dtype == dtype
            assert got.shape == (n, SHAPE[0])
            assert torch.equal(rows, tokens(n).to(dtype))
            assert errors(name, weight, got, rows, ready) <= kernel.tolerance(dtype, CPU)
            assert torch.equal(got, kernel.apply(rows, ready))
    assert all(torch.equal(before[key], tensor) for key, tensor in weight.tensors.items())


@pytest.mark.parametrize("shape", [(7, 9), (9, 7), (52, 104), (33, 64)])
@pytest.mark.parametrize("scheme", ["rtn(bits=4,group_size=0)", INPUTS[0]])
def test_odd_shapes_are_computed_or_refused(scheme: str, shape: tuple[int, int]) -> None:
    weight = compressed(scheme, shape)
    for kernel in dispatch.candidates(shape, weight.scheme, torch.float32, CPU):
        ready = prepared(kernel.name, weight, torch.float32, CPU)
        rows = tokens(5, shape[1])
        worst = errors(kernel.name, weight, kernel.apply(rows, ready), rows, ready)
        assert worst <= kernel.tolerance(torch.float32, CPU)


@pytest.mark.parametrize("scheme", [*INPUTS, *RESIDUALS])
def test_inputs_are_rounded_as_a_trial_rounds_them(scheme: str) -> None:
    """Those that only a residual reads are not."""
    weight, rows = compressed(scheme), tokens(5)
    mapped = input_map(weight.tensors, weight.scheme)
    entered = rows if mapped is None else mapped(rows)
    for name in ("reference", *(k.name for k in dispatch.candidates(
        SHAPE, weight.scheme, torch.float32, CPU
    ))):  # fmt: skip
        got = KERNELS[name].apply(rows, prepared(name, weight, torch.float32, CPU))
        dense = weight.to_dense()
        bound = KERNELS[name].tolerance(torch.float32, CPU) + 1e-5
        sizes = entered.abs() @ dense.abs().amax(1, keepdim=True).expand_as(dense).T
        assert bool(((got - entered @ dense.T).abs() <= 2 * bound * sizes + 1e-4).all()), name


@pytest.mark.parametrize("name", ["eora", "outlier_columns", "outlier_weights"])
def test_the_short_way_through_a_residual_is_that_of_its_matrix(name: str) -> None:
    """Which is what the residual of a plug-in gets that says no shorter way."""
    weight = next(compressed(s) for s in RESIDUALS if f"+{name}" in s)
    step = plan(weight.scheme).residual
    assert step is not None
    part, rows = under("r.", weight.tensors), tokens(4)
    short = step.method.multiplier(part, SHAPE, step.options)
    whole = Residual.multiplier(step.method, part, SHAPE, step.options)
    torch.testing.assert_close(short.apply(rows), whole.apply(rows), rtol=1e-4, atol=1e-4)
    assert short.n_bytes > whole.n_bytes == 0


def test_the_check_sees_a_wrong_scale() -> None:
    weight, kernel = compressed("rtn(bits=4,group_size=32)"), KERNELS["int4_weight"]
    ready = prepared("int4_weight", weight, torch.float32, CPU)
    wrong = kernel.apply(tokens(3), ready) * 1.05
    assert errors("int4_weight", weight, wrong, tokens(3), ready) > kernel.tolerance(
        torch.float32, CPU
    )


@pytest.mark.parametrize("name", ["int4_weight", "int8_weight"])
def test_repacking_by_slices_gives_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ON_CPU[name]:
        weight = compressed(scheme, (208, 128))
        whole = prepared(name, weight, torch.float32, CPU).state
        with monkeypatch.context() as small:
            small.setattr(slices, "_WEIGHTS", 64 * 128)
            sliced = prepared(name, weight, torch.float32, CPU).state
        for field in fields(whole):
            one, other = (getattr(state, field.name) for state in (whole, sliced))
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_scheme_need_be_decoded_whole(scheme: str) -> None:
    found = dispatch.candidates(SHAPE, Scheme.parse(scheme), torch.float32, CPU)
    names = {kernel.name for kernel in found}
    assert names == {"corrected"} if scheme in RESIDUALS else "reference" not in names


@pytest.mark.parametrize(
    ("scheme", "name", "reason"),
    [
        ("rtn(bits=8,group_size=32)", "int8_weight", "one scale per row"),
        ("svd(rank=4)", "int8_weight", "not integers on a grid"),
        ("rtn(bits=8,group_size=0,symmetric=false)", "int8_weight", "do not fit int8"),
        ("nf4", "int8_weight", "not integers on a grid"),
        ("rtn(bits=5,group_size=32)", "int4_weight", "at most 4 bits"),
        ("rtn(bits=4,group_size=48)", "int4_weight", "multiple of 32"),
        ("rtn(bits=8,group_size=0)", "dynamic_int8", "does not round the inputs"),
        ("magnitude(pattern=2:4)", "sparse_2_4", "needs a CUDA device"),
        ("svd(rank=4)", "tiles", "two factors"),
        ("rtn", "low_rank", "not two factors"),
        ("rtn", "corrected", "no part apart"),
        (RESIDUALS[0], "tiles", "residual"),
    ],
)
def test_a_kernel_says_why_it_refuses(scheme: str, name: str, reason: str) -> None:
    assert reason in refusals(SHAPE, Scheme.parse(scheme), torch.float32, CPU)[name]


@pytest.mark.parametrize("operator", ["_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu"])
def test_an_operator_that_torch_lacks_is_a_refusal(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autocompress.kernels import integer

    monkeypatch.setattr(integer, "has_operator", lambda name, _: name != operator)
    scheme = Scheme.parse("rtn(bits=4,group_size=0)")
    lacking = [r for r in refusals(SHAPE, scheme, torch.float32, CPU).values() if operator in r]
    assert lacking
    assert all("torch has no" in reason for reason in lacking)


@pytest.mark.parametrize("scheme", INPUTS)
@pytest.mark.parametrize("split", [False, True])
def test_extreme_codes_do_not_saturate(
    scheme: str, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if split:
        monkeypatch.setattr(dynamic, "_is_exact", lambda *_: False)
    weight, kernel = compressed(scheme), KERNELS["dynamic_int8"]
    ready = prepared("dynamic_int8", weight, torch.float32, CPU)
    rows = torch.where(tokens(6) > 0, 3.0, -3.0)
    rows[:2] = torch.tensor([[3.0], [-3.0]])
    got = kernel.apply(rows, ready)
    assert errors("dynamic_int8", weight, got, rows, ready) <= kernel.tolerance(torch.float32, CPU)


@pytest.mark.parametrize(
    ("name", "scheme", "n_bytes"),
    [
        ("tiles", "rtn(bits=4,group_size=32)", 0),
        ("int8_weight", "rtn(bits=8,group_size=0)", 64 * 128 + 64 * 4),
        ("int4_weight", "rtn(bits=4,group_size=32)", 64 * 128 // 2 + 64 * 4 * 4),
        ("dense", "rtn(bits=4,group_size=32)", 64 * 128 * 4),
    ],
)
def test_what_a_kernel_holds_beyond_the_stored_tensors_is_known(
    name: str, scheme: str, n_bytes: int
) -> None:
    ready = prepared(name, compressed(scheme), torch.float32, CPU)
    assert KERNELS[name].extra_bytes(ready) == n_bytes


def test_reference_and_dense_compute_with_the_very_matrix_that_a_reload_decodes() -> None:
    weight = compressed("rtn(bits=4,group_size=32)+eora(rank=4)")
    matrix = decode(weight.tensors, weight.scheme, weight.shape, torch.float32)
    for name in ("reference", "dense"):
        ready = prepared(name, weight, torch.float32, CPU)
        assert torch.equal(KERNELS[name].apply(tokens(5), ready), tokens(5) @ matrix.T)


def test_the_tolerances_are_those_of_rounding() -> None:
    for name in KERNELS:
        tolerance = KERNELS[name].tolerance(torch.float32, CPU)
        assert math.isfinite(tolerance)
        in_16_bits = product_dtype(torch.float32, CPU) is torch.bfloat16
        two_matrices = name in ("low_rank", "corrected")
        assert 0 < tolerance < (0.05 if in_16_bits and two_matrices else 0.03)
