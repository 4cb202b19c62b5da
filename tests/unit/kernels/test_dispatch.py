import copy
import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress.core import Scheme
from autocompress.core.errors import SchemeError, UsageError
from autocompress.export.modules import PackedModule, pack_module, use_kernels
from autocompress.export.plan import PackedLayer
from autocompress.kernels import KERNELS, Runner, code, dispatch, measure, signature, table, times
from autocompress.kernels.measure import layer_of, random_tensors
from autocompress.methods import (
    LayerProblem,
    LayerStatistics,
    compress,
    decode,
    footprint,
    input_map,
)

from .conftest import CPU, SCHEMES, SHAPE, compressed, tokens

SCHEME = "rtn(bits=4,group_size=32)"


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same candidates on every machine."""
    monkeypatch.setenv("AUTOCOMPRESS_NATIVE", "0")


def slowest_first(monkeypatch: pytest.MonkeyPatch, fastest: dict[int, str]) -> list[str]:
    """Times by rule instead of by clock; returns what was timed."""
    timed: list[str] = []

    def seconds(action, _device) -> float:
        kernel, rows = action.func.__self__, action.args[0]
        timed.append(f"{kernel.name}@{len(rows)}")
        return 1.0 if fastest.get(len(rows)) == kernel.name else 2.0

    monkeypatch.setattr(dispatch, "seconds_of", seconds)
    return timed


def runner(choice: str = "auto") -> Runner:
    return Runner(Scheme.parse(SCHEME), SHAPE, torch.float32, CPU, choice)


def test_one_token_and_many_are_chosen_apart_and_measured_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = slowest_first(monkeypatch, {1: "int4_weight", 256: "tiles"})
    tensors, run = compressed(SCHEME).tensors, runner()
    run(tensors, tokens(1))
    run(tensors, tokens(300))
    assert run.chosen == {1: "int4_weight", 256: "tiles"}
    assert sorted(timed) == sorted(
        f"{name}@{n}" for n in (1, 256) for name in ("int4_tiles", "int4_weight", "tiles")
    )
    timed.clear()
    again = runner()
    again(tensors, tokens(1))
    run(tensors, tokens(257))
    assert not timed
    assert again.chosen == {1: "int4_weight"}


def test_kernels_of_one_form_share_what_they_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    slowest_first(monkeypatch, {1: "int4_weight", 64: "int4_tiles"})
    run, tensors = runner(), compressed(SCHEME).tensors
    run(tensors, tokens(1))
    held = run.extra_bytes
    run(tensors, tokens(64))
    assert run.extra_bytes == held == 64 * 128 // 2 + 64 * 4 * 4


def test_a_table_survives_its_process_and_belongs_to_its_device(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    timed = slowest_first(monkeypatch, {})
    runner()(compressed(SCHEME).tensors, tokens(1))
    (file,) = (own_cache / "kernels").iterdir()
    content = json.loads(file.read_text())
    assert "torch" in content["device"]
    table._table.cache_clear()
    timed.clear()
    runner()(compressed(SCHEME).tensors, tokens(1))
    assert not timed
    file.write_text(json.dumps({**content, "device": "another"}))
    table._table.cache_clear()
    runner()(compressed(SCHEME).tensors, tokens(1))
    assert timed


def test_times_of_other_kernels_are_measured_again(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    timed = slowest_first(monkeypatch, {})
    runner()(compressed(SCHEME).tensors, tokens(1))
    timed.clear()
    table._table.cache_clear()
    runner()(compressed(SCHEME).tensors, tokens(1))
    assert not timed
    monkeypatch.setattr(table, "code_digest", lambda: "faster")
    runner()(compressed(SCHEME).tensors, tokens(1))
    assert timed
    (file,) = (own_cache / "kernels").iterdir()
    assert json.loads(file.read_text())["code"] == "faster"


def test_the_code_that_is_timed_is_that_of_all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    read, before = Path.read_bytes, code.code_digest.__wrapped__()
    for changed in ("grid.c", "grid.h", "tiles.py", "packing.py"):

        def edited(path: Path, changed: str = changed) -> bytes:
            return read(path) + b"#" * (path.name == changed)

        monkeypatch.setattr(Path, "read_bytes", edited)
        assert code.code_digest.__wrapped__() != before
    monkeypatch.setattr(Path, "read_bytes", read)
    assert code.code_digest.__wrapped__() == before


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}', '{"version": 9}'])
def test_a_damaged_table_is_measured_again(
    content: str, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    timed = slowest_first(monkeypatch, {})
    name = table.table_of(CPU).path
    name.parent.mkdir(parents=True)
    name.write_text(content)
    table._table.cache_clear()
    runner()(compressed(SCHEME).tensors, tokens(1))
    assert timed
    assert json.loads(name.read_text())["seconds"]


def test_a_cache_that_cannot_be_written_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "file"))
    slowest_first(monkeypatch, {})
    with caplog.at_level(logging.WARNING):
        assert runner()(compressed(SCHEME).tensors, tokens(1)).shape == (1, 64)
    assert "not kept" in caplog.text


def test_measuring_leaves_the_users_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    slowest_first(monkeypatch, {})
    before = torch.random.get_rng_state()
    runner()(compressed(SCHEME).tensors, tokens(1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_unknown_choice_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="Did you mean 'reference'"):
        runner("referense")
    with pytest.raises(UsageError, match="Available: auto, dense, reference"):
        runner("int4_weight")


def test_a_copy_of_a_runner_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    slowest_first(monkeypatch, {})
    run = runner()
    run(compressed(SCHEME).tensors, tokens(1))
    for twin in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert not twin.chosen
        assert torch.equal(
            twin(compressed(SCHEME).tensors, tokens(2)), run(compressed(SCHEME).tensors, tokens(2))
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_tensors_of_a_scheme_are_laid_out_as_stored_ones_and_decode(scheme: str) -> None:
    layer, parsed = layer_of(SHAPE, torch.float32), Scheme.parse(scheme)
    made = random_tensors(layer, parsed)
    layouts = footprint(layer, parsed).tensors
    assert {name: (tuple(t.shape), str(t.dtype)) for name, t in made.items()} == {
        name: (layout.shape, f"torch.{layout.dtype}") for name, layout in layouts.items()
    }
    assert decode(made, parsed, SHAPE, torch.float32).shape == SHAPE


def test_measure_is_the_time_of_the_kernel_that_a_model_would_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seconds(action, _device) -> float:
        kernel, n = action.func.__self__, len(action.args[0])
        return {"tiles": 1.0, "int4_tiles": 3.0, "int4_weight": 2.0 if n <= 16 else 0.5}[
            kernel.name
        ]

    monkeypatch.setattr(dispatch, "seconds_of", seconds)
    scheme = Scheme.parse(SCHEME)
    assert times(SHAPE, scheme, 20) == {"tiles": 1.0, "int4_tiles": 3.0, "int4_weight": 0.5}
    assert measure(SHAPE, scheme, 20) == 1.0  # chosen at 16
    with pytest.raises(UsageError, match="at least 1"):
        measure(SHAPE, scheme, 0)
    with pytest.raises(SchemeError, match="break-even"):
        measure(SHAPE, Scheme.parse("svd(rank=60)"), 1)


def test_a_measurement_is_seconds() -> None:
    assert 0 < measure(SHAPE, Scheme.parse("rtn(bits=8,group_size=0)"), 1) < 5


def packed(module: nn.Module, scheme: str = SCHEME) -> PackedModule:
    matrix = module.weight.detach()
    weight = compress(matrix, Scheme.parse(scheme), LayerStatistics.none())
    layer = PackedLayer("layer", weight.scheme, weight.shape, "float32", "linear")
    return pack_module(module, layer, weight.tensors, torch.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", [SCHEME, "rtn(bits=8,group_size=0)+int_inputs(bits=8)"])
def test_a_packed_layer_runs_on_kernels_if_asked(
    scheme: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowest_first(monkeypatch, {})
    linear = packed(nn.Linear(128, 64, bias=bias), scheme)
    x = tokens(6).view(2, 3, 128)
    want = linear(x).detach()
    assert linear._runner is None
    use_kernels(linear, "auto")
    with torch.no_grad():
        got = linear(x)
    assert linear._runner is not None
    assert not torch.equal(got, want)
    assert float((got - want).abs().max()) < 0.02 * float(want.abs().max())
    use_kernels(linear, "reference")
    assert torch.equal(linear(x), want)
    use_kernels(linear, "dense")
    assert torch.equal(linear(x), want)


def test_gradients_and_empty_batches_take_the_reference() -> None:
    linear = packed(nn.Linear(128, 64))
    use_kernels(linear, "auto")
    x = tokens(2).requires_grad_()
    linear(x).sum().backward()
    assert x.grad is not None
    assert linear(tokens(2)[:0]).shape == (0, 64)
    assert linear._runner is None


def test_rewritten_weights_are_prepared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slowest_first(monkeypatch, {1: "int4_weight"})
    linear = packed(nn.Linear(128, 64, bias=False))
    use_kernels(linear, "auto")
    with torch.no_grad():
        before = linear(tokens(1))
        linear.scales.mul_(2)
        torch.testing.assert_close(linear(tokens(1)), 2 * before)
        twin = copy.deepcopy(linear)
        twin.scales.mul_(2)
        torch.testing.assert_close(twin(tokens(1)), 4 * before)
        torch.testing.assert_close(linear(tokens(1)), 2 * before)


def test_every_kernel_is_named_as_it_is_registered() -> None:
    assert all(KERNELS[name].name == name for name in KERNELS)


@pytest.mark.parametrize("rest", ["", "+rtn(bits=4,group_size=32)", "+hadamard+rtn+int_inputs"])
@pytest.mark.parametrize("width", ["ziplm(keep=3,of=4)", "ziplm(by=down,keep=3,of=4)"])
def test_a_narrower_layer_is_run_without_what_is_gone(
    width: str, rest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowest_first(monkeypatch, {})
    scheme, weight = Scheme.parse(width + rest), compressed("base").to_dense()
    read = LayerProblem(torch.randn(8, SHAPE[0]), LayerStatistics.none())
    found = compress(weight, scheme, LayerStatistics.none(), reader=read)
    run = Runner(scheme, SHAPE, torch.float32, CPU)
    rows = tokens(5)
    mapped = input_map(found.tensors, found.scheme)
    expected = (rows if mapped is None else mapped(rows)) @ found.to_dense().T
    got = run(found.tensors, rows)
    sizes = rows.abs() @ found.to_dense().abs().amax(0)
    assert bool(((got - expected).abs() <= 0.02 * sizes[:, None]).all())
    gone = (found.to_dense() == 0).all(1)
    assert bool((got[:, gone] == 0).all())
    assert torch.equal(pickle.loads(pickle.dumps(run))(found.tensors, rows), got)
    made = random_tensors(layer_of(SHAPE, torch.float32), scheme)
    assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in found.tensors.items()}
    assert run(made, rows).shape == got.shape
    assert set(times(SHAPE, scheme, 5)) == {
        *times((48, 128) if "by" in width else (64, 96), Scheme.parse(rest[1:] or "base"), 5)
    }


def test_layers_of_other_widths_have_times_of_their_own() -> None:
    texts = (
        "ziplm(keep=3,of=4)+rtn",
        "ziplm(keep=6,of=8)+rtn",
        "ziplm(by=x,keep=3,of=4)+rtn",
        "rtn",
    )
    assert len({signature(SHAPE, Scheme.parse(text)) for text in texts}) == len(texts)
