import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from autocompress.bank import Bank
from autocompress.bank.filling import WORKING_BYTES, is_large, shares
from autocompress.core import LayerSpec, Scheme
from autocompress.core.errors import SchemeError
from autocompress.methods import LayerProblem, LayerStatistics, footprint
from autocompress.models import ModelLayout

NAMES = tuple("abcdef")
WIDTHS = tuple(Scheme.parse(f"gptq(bits={b},group_size=16)") for b in (2, 3, 4, 8))
ALLOCATION = dict.fromkeys(NAMES, WIDTHS[1])


def layout(o=24, d=32):
    specs = (LayerSpec(n, "up", 0, o, d, "linear", "float32", n, o * d) for n in NAMES)
    return ModelLayout(tuple(specs), ("block",), 0, 0)


class Counting(Bank):
    """Remembers what it builds."""

    def _start_empty(self):
        super()._start_empty()
        self.built = []
        self.pause = None

    def _build(self, layer, scheme):
        self.built.append((layer.name, str(scheme)))
        if self.pause is not None:
            self.pause.wait(0.05)
        return super()._build(layer, scheme)


def make(root, o=24, d=32, **options):
    def weight(i):
        return torch.randn(o, d, generator=torch.Generator().manual_seed(i))

    def statistics(layer):
        x = torch.randn(4 * d, d, generator=torch.Generator().manual_seed(9))
        return LayerStatistics(x.T @ x / len(x), len(x), f"of {layer.name}")

    weights = {name: weight(i) for i, name in enumerate(NAMES)}
    return Counting(root, layout(o, d), weights, statistics, **options)


def run_together(*actions):
    with ThreadPoolExecutor(len(actions)) as pool:
        for future in [pool.submit(action) for action in actions]:
            future.result(timeout=60)


def test_two_cold_workers_never_build_the_same_entry(tmp_path):
    one, two = make(tmp_path), make(tmp_path)
    one.pause = two.pause = threading.Event()  # a build takes long enough for both to meet
    run_together(lambda: one.prepare(ALLOCATION), lambda: two.prepare(ALLOCATION))
    assert sorted(name for name, _ in one.built + two.built) == list(NAMES)
    assert one.built
    assert two.built


def test_workers_that_ask_layer_by_layer_do_not_either(tmp_path):
    one, two = make(tmp_path), make(tmp_path)
    one.pause = two.pause = threading.Event()

    def ask(bank):
        return lambda: [bank.packed(name, WIDTHS[0]) for name in NAMES]

    run_together(ask(one), ask(two))
    assert len(one.built + two.built) == len(NAMES)


def test_layers_that_are_free_are_built_while_another_worker_holds_one(tmp_path):
    holder, bank = make(tmp_path), make(tmp_path)
    lock = holder._store.building(holder._keys.lock_name(holder.layout.layer("a"), WIDTHS[1]))
    lock.__enter__()
    released = []

    def release_when_the_rest_is_there(done, total):
        if done == len(NAMES) - 1 and not released:
            released.append([name for name, _ in bank.built])
            lock.__exit__(None, None, None)

    wanted = {name: (scheme,) for name, scheme in ALLOCATION.items()}
    run_together(lambda: bank.fill(wanted, progress=release_when_the_rest_is_there))
    assert released == [list(NAMES[1:])]
    assert [name for name, _ in bank.built] == [*NAMES[1:], "a"]


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_filled_bank_holds_what_asking_one_by_one_gives(tmp_path, n_threads):
    before = torch.get_num_threads()
    filled, asked = make(tmp_path / "a"), make(tmp_path / "b")
    seen = []
    filled.fill(
        dict.fromkeys(NAMES, WIDTHS), n_threads=n_threads, progress=lambda *p: seen.append(p)
    )
    assert sorted(seen) == [(i + 1, len(NAMES)) for i in range(len(NAMES))]
    assert len(filled.built) == len(NAMES) * len(WIDTHS)
    for name in NAMES:
        for scheme in WIDTHS:
            one, two = filled.packed(name, scheme), asked.packed(name, scheme)
            assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in two.tensors)
    assert len(filled.built) == len(NAMES) * len(WIDTHS)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("n_threads", [1, 4])
def test_filling_by_layer_names_each_layer_once_its_entries_are_there(tmp_path, n_threads):
    before = torch.get_num_threads()
    bank, asked = make(tmp_path / "a"), make(tmp_path / "b")
    named = []
    for name in bank.fill_by_layer(dict.fromkeys(NAMES, WIDTHS), n_threads=n_threads):
        named.append(name)
        assert torch.get_num_threads() == before
        assert all(bank.path(name, scheme).is_file() for scheme in WIDTHS)
    assert named == list(NAMES)
    for name in NAMES:
        one, two = bank.packed(name, WIDTHS[0]), asked.packed(name, WIDTHS[0])
        assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in two.tensors)


def test_a_layer_has_one_torch_thread_unless_it_is_too_large_for_company(tmp_path, monkeypatch):
    seen = []
    real = Bank._build
    monkeypatch.setattr(Bank, "_build", lambda *a: seen.append(torch.get_num_threads()) or real(*a))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        list(make(tmp_path / "a").fill_by_layer({"a": WIDTHS[:1], "b": WIDTHS[:1]}))
        monkeypatch.setattr("autocompress.bank.bank.is_large", lambda _: True)
        list(make(tmp_path / "b").fill_by_layer({"a": WIDTHS[:1]}))
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 3]


def test_shares_hold_what_fits_memory_and_large_layers_alone():
    def layer(width):
        return LayerSpec("x", "up", 0, width, width, "linear", "float32", "x", width * width)

    small, medium, large = layer(64), layer(3000), layer(8192)
    assert [is_large(each) for each in (small, medium, large)] == [False, False, True]
    layers = [large, medium, medium, large, *[small] * 5]
    widths = [[each.out_features for each in share] for share in shares(layers, 4)]
    assert widths == [[8192], [3000] * 2, [8192], [64] * 4, [64]]
    many = [len(share) for share in shares([medium] * 12, 12)]
    assert sum(many) == 12
    assert max(many) * 16 * 3 * 3000**2 <= WORKING_BYTES
    assert list(shares([], 2)) == []


def test_an_interrupt_ends_other_threads_after_the_scheme_that_they_are_at(tmp_path):
    bank = make(tmp_path)
    bank.pause = threading.Event()

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bank.fill(dict.fromkeys(NAMES, WIDTHS), n_threads=2, progress=interrupt)
    assert len(bank.built) < len(NAMES) * len(WIDTHS) / 2
    bank.pause = None
    bank.fill(dict.fromkeys(NAMES, WIDTHS))
    assert len(bank.built) == len(NAMES) * len(WIDTHS)


def test_widths_and_sparsities_of_a_layer_share_one_factorisation(tmp_path, monkeypatch):
    calls = []
    real = LayerProblem._factorised

    def counting(self, *arguments):
        calls.append(arguments)
        return real(self, *arguments)

    monkeypatch.setattr(LayerProblem, "_factorised", counting)
    pruned = Scheme.parse("wanda(sparsity=0.5)+gptq(bits=4,group_size=16)")
    make(tmp_path).fill({"a": [*WIDTHS, pruned, Scheme.parse("wanda(sparsity=0.25)")]})
    assert len(calls) == 1


def test_ranks_of_a_layer_share_one_whitened_spectrum(tmp_path, monkeypatch):
    from autocompress.methods import problem

    calls = []
    real = problem.spectrum_of
    monkeypatch.setattr(problem, "spectrum_of", lambda *a: calls.append(a) or real(*a))
    make(tmp_path).fill({"a": [Scheme.parse(f"svd_llm(rank={r})") for r in (2, 4, 8)]})
    assert len(calls) == 1


def test_the_base_scheme_and_what_is_there_are_passed_over(tmp_path):
    bank = make(tmp_path)
    bank.fill({"a": [Scheme(), WIDTHS[0], WIDTHS[0]]})
    bank.prepare({"a": WIDTHS[0]})
    assert bank.built == [("a", str(bank.packed("a", WIDTHS[0]).scheme))]


def test_a_scheme_that_a_layer_cannot_take_is_an_error_and_frees_the_lock(tmp_path):
    bank = make(tmp_path)
    for _ in range(2):
        with pytest.raises(SchemeError):
            bank.fill({"a": [Scheme.parse("rtn(bits=77)")]}, n_threads=2)
    bank.packed("a", WIDTHS[0])


def test_a_bank_that_cannot_be_written_is_filled_in_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    bank = make(tmp_path / "file" / "bank")
    bank.prepare(ALLOCATION)
    bank.prepare(ALLOCATION)
    assert len(bank.built) == len(NAMES)
    assert caplog.text.count("cannot be used") == 1


def test_a_layer_above_the_bound_is_kept_in_memory_and_said_once(tmp_path, caplog):
    bank = make(tmp_path, capacity_bytes=100)
    bank.prepare(ALLOCATION)
    bank.prepare(ALLOCATION)
    assert len(bank.built) == len(NAMES)
    assert caplog.text.count("exceeds the bank's bound of 100 bytes") == 1


def test_a_bounded_bank_gives_the_same_tensors_as_a_large_one(tmp_path):
    small, large = make(tmp_path / "a", capacity_bytes=3000), make(tmp_path / "b")
    for _ in range(2):
        for name in NAMES:
            one, two = small.packed(name, WIDTHS[2]), large.packed(name, WIDTHS[2])
            assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in two.tensors)
    assert sum(p.stat().st_size for p in (tmp_path / "a").glob("??/*")) <= 3000
    assert len(small.built) > len(NAMES)


def test_entries_weigh_at_most_three_tenths_more_than_what_they_pack(tmp_path):
    """On the smallest layers of a real model at the fewest bits."""
    bank = make(tmp_path, 384, 384)
    schemes = [Scheme.parse(text) for text in ("rtn(bits=2)", "rtn(bits=3)", "svd(rank=8)")]
    bank.fill({"a": schemes})
    layer = bank.layout.layer("a")
    for scheme in schemes:
        packed = footprint(layer, scheme).storage_bytes
        assert packed <= bank.path("a", scheme).stat().st_size <= 1.3 * packed
