import pickle
import shutil
import stat

import pytest
import torch

from autocompress.bank import Bank
from autocompress.core import LayerSpec, Scheme
from autocompress.core.errors import ModelError, SchemeError
from autocompress.methods import LayerStatistics, compress, compress_together
from autocompress.models import ModelLayout

NAMES = ("up", "down")
SCHEMES = [
    "rtn(bits=4,group_size=16)",
    "rtn(bits=3,symmetric=false,group_size=16)",
    "gptq(bits=4,group_size=16)",
    "magnitude(sparsity=0.5)",
    "wanda(sparsity=0.5)+gptq(bits=4,group_size=16)",
    "svd_llm(rank=8)",
    "svd(rank=8)+rtn(bits=4,group_size=16)",
]


def spec(name):
    return LayerSpec(name, "up", 0, 48, 32, "linear", "bfloat16", name, 48 * 32)


LAYOUT = ModelLayout(tuple(map(spec, NAMES)), ("block",), 0, 0)


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(48, 32, generator=generator).bfloat16() for n in NAMES}


def statistics_of(layer, seed=0):
    generator = torch.Generator().manual_seed(seed + len(layer.name))
    inputs = torch.randn(256, 32, generator=generator)
    return LayerStatistics(inputs.T @ inputs / 256, 256, f"{layer.name}-{seed}")


class Asked:
    """Statistics that remember who asked."""

    def __init__(self, seed=0):
        self.names = []
        self.seed = seed

    def __call__(self, layer):
        self.names.append(layer.name)
        return statistics_of(layer, self.seed)


def make_bank(root, seed=0, statistics=None, **limits):
    return Bank(root, LAYOUT, weights(seed), statistics or Asked(), **limits)


def same(one, two):
    return one.tensors.keys() == two.tensors.keys() and all(
        torch.equal(one.tensors[n], two.tensors[n]) for n in one.tensors
    )


@pytest.mark.parametrize("text", SCHEMES)
def test_a_cold_bank_equals_a_warm_one_and_the_method_itself(tmp_path, text):
    scheme = Scheme.parse(text)
    cold = make_bank(tmp_path)
    first = cold.packed("up", scheme)
    warm = make_bank(tmp_path)
    second = warm.packed("up", scheme)
    direct = compress(weights()["up"], scheme, statistics_of(spec("up")))
    assert same(first, direct)
    assert same(second, direct)
    assert (second.scheme, second.shape, second.dtype, second.notes) == (
        direct.scheme, direct.shape, direct.dtype, direct.notes,
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        dense = warm.dense("up", scheme, dtype)
        assert torch.equal(dense, cold.dense("up", scheme, dtype))
        assert dense.dtype == dtype
        assert dense.shape == (48, 32)


def test_a_warm_bank_does_not_compress(tmp_path, monkeypatch):
    scheme = Scheme.parse("gptq(bits=4,group_size=16)")
    make_bank(tmp_path).packed("up", scheme)
    monkeypatch.setattr("autocompress.bank.bank.compress", None)
    make_bank(tmp_path).packed("up", scheme)


def test_schemes_that_mean_the_same_share_one_entry(tmp_path):
    bank = make_bank(tmp_path)
    short, long = Scheme.parse("rtn(bits=4)"), bank.packed("up", Scheme.parse("rtn(bits=4)")).scheme
    assert bank.path("up", short) == bank.path("up", long)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_entries_differ_by_weight_statistics_and_scheme_only_where_they_matter(tmp_path):
    rtn = Scheme.parse("magnitude(sparsity=0.5)")
    gptq = Scheme.parse("gptq(bits=4,group_size=16)")
    bank, other_weights = make_bank(tmp_path), make_bank(tmp_path, seed=1)
    other_statistics = make_bank(tmp_path, statistics=Asked(seed=5))
    assert bank.path("up", rtn) != bank.path("down", rtn)
    assert bank.path("up", rtn) != other_weights.path("up", rtn)
    assert bank.path("up", rtn) == other_statistics.path("up", rtn)
    assert bank.path("up", gptq) != other_statistics.path("up", gptq)


def test_statistics_are_asked_only_for_methods_that_use_them(tmp_path):
    asked = Asked()
    bank = make_bank(tmp_path, statistics=asked)
    bank.packed("up", Scheme.parse("magnitude(sparsity=0.5)"))
    assert asked.names == []
    bank.packed("up", Scheme.parse("wanda(sparsity=0.5)"))
    assert set(asked.names) == {"up"}


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "text", "other"])
def test_a_damaged_entry_is_named_in_a_warning_and_built_again(tmp_path, caplog, damage):
    scheme = Scheme.parse("rtn(bits=4,group_size=16)")
    bank = make_bank(tmp_path)
    good = bank.packed("up", scheme)
    path = bank.path("up", scheme)
    data = path.read_bytes()
    other = bank.path("down", Scheme.parse("rtn(bits=8,group_size=16)"))
    bank.packed("down", Scheme.parse("rtn(bits=8,group_size=16)"))
    damaged = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "text": b"not a checkpoint at all",
        "other": other.read_bytes(),
    }[damage]
    path.unlink()
    path.write_bytes(damaged)
    again = make_bank(tmp_path).packed("up", scheme)
    assert same(again, good)
    assert str(path) in caplog.text
    assert "built again" in caplog.text
    assert path.read_bytes() == data


def test_entries_are_read_as_views_of_the_mapped_file(tmp_path):
    scheme = Scheme.parse("rtn(bits=4,group_size=16)")
    path = make_bank(tmp_path).path("up", scheme)
    make_bank(tmp_path).packed("up", scheme)
    entry = make_bank(tmp_path).packed("up", scheme)
    address = entry.tensors["packed"].data_ptr()
    with open("/proc/self/maps") as maps:
        owners = [
            line.split()[-1]
            for line in maps
            if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
        ]
    assert owners == [str(path)]


def test_no_temporary_file_is_left_behind(tmp_path):
    bank = make_bank(tmp_path)
    for text in SCHEMES:
        bank.packed("up", Scheme.parse(text))
    assert {p.suffix for p in tmp_path.glob("??/*")} == {".safetensors"}
    assert {p.name for p in tmp_path.iterdir() if len(p.name) > 2} == {".locks"}


def test_a_directory_that_cannot_be_made_falls_back_to_memory(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    bank = make_bank(blocked / "bank")
    scheme = Scheme.parse("gptq(bits=4,group_size=16)")
    first = bank.packed("up", scheme)
    assert bank.packed("up", scheme) is first
    bank.packed("down", scheme)
    assert caplog.text.count("cannot be used") == 1
    assert same(first, make_bank(tmp_path / "good").packed("up", scheme))


def test_a_full_disk_falls_back_to_memory(tmp_path, caplog, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autocompress.bank.entries.save_file", full)
    bank = make_bank(tmp_path)
    scheme = Scheme.parse("rtn(bits=4)")
    assert bank.packed("up", scheme) is bank.packed("up", scheme)
    assert "No space left" in caplog.text


def test_a_directory_that_vanishes_is_made_again(tmp_path):
    bank = make_bank(tmp_path / "bank")
    scheme = Scheme.parse("rtn(bits=4)")
    first = bank.packed("up", scheme)
    shutil.rmtree(tmp_path / "bank")
    assert same(bank.packed("up", scheme), first)
    assert bank.path("up", scheme).is_file()


def test_entries_of_a_read_only_directory_are_used(tmp_path):
    scheme = Scheme.parse("rtn(bits=4)")
    first = make_bank(tmp_path).packed("up", scheme)
    path = make_bank(tmp_path).path("up", scheme)
    path.chmod(stat.S_IRUSR)
    path.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert same(make_bank(tmp_path).packed("up", scheme), first)
    finally:
        path.parent.chmod(stat.S_IRWXU)


def test_dense_matrices_are_kept_within_their_bound(tmp_path):
    one = 48 * 32 * 4
    bank = make_bank(tmp_path, dense_bytes=2 * one)
    schemes = [Scheme.parse(f"rtn(bits={b})") for b in (2, 3, 4)]
    first = bank.dense("up", schemes[0], torch.float32)
    assert bank.dense("up", schemes[0], torch.float32) is first
    bank.dense("up", schemes[1], torch.float32)
    bank.dense("up", schemes[2], torch.float32)
    assert bank._dense.n_bytes == 2 * one
    assert bank.dense("up", schemes[0], torch.float32) is not first


def test_options_of_a_layer_share_its_decompositions(tmp_path, monkeypatch):
    built = []
    from autocompress.methods import LayerProblem

    def counting(*args):
        built.append(args)
        return LayerProblem(*args)

    monkeypatch.setattr("autocompress.bank.bank.LayerProblem", counting)
    bank = make_bank(tmp_path)
    for bits in (2, 3, 4, 8):
        bank.packed("up", Scheme.parse(f"gptq(bits={bits},group_size=16)"))
    assert len(built) == 1


def test_shared_decompositions_do_not_change_the_result(tmp_path):
    shared = make_bank(tmp_path / "a")
    for text in SCHEMES:
        alone = make_bank(tmp_path / "b" / str(SCHEMES.index(text)))
        assert same(shared.packed("up", Scheme.parse(text)), alone.packed("up", Scheme.parse(text)))


def test_notes_are_those_of_the_entry_cold_and_warm(tmp_path):
    scheme = Scheme.parse("gptq(bits=4,group_size=16)")
    none = LayerStatistics.none()
    notes = make_bank(tmp_path, statistics=lambda _: none).notes("up", scheme)
    assert len(notes) == 1
    assert make_bank(tmp_path, statistics=lambda _: none).notes("up", scheme) == notes


def test_the_base_weights_are_never_written(tmp_path):
    base = weights()
    bank = Bank(tmp_path, LAYOUT, base, statistics_of)
    before = {n: (w.clone(), w._version) for n, w in base.items()}
    for text in SCHEMES:
        bank.dense("up", Scheme.parse(text), torch.float32)
    assert all(torch.equal(w, before[n][0]) for n, w in base.items())
    assert all(w._version == before[n][1] for n, w in base.items())


def test_a_bank_travels_without_its_caches(tmp_path):
    bank = Bank(tmp_path, LAYOUT, weights(), statistics_of, dense_bytes=12345)
    scheme = Scheme.parse("gptq(bits=4,group_size=16)")
    first = bank.dense("up", scheme, torch.float32)
    there = pickle.loads(pickle.dumps(bank))
    assert len(there._dense) == 0
    assert there._dense.capacity_bytes == 12345
    assert torch.equal(there.dense("up", scheme, torch.float32), first)


def test_a_bank_with_resident_statistics_needs_no_files(tmp_path):
    readable = True

    def from_file(layer):
        if not readable or layer.name == "down":
            raise ModelError("not there")
        return statistics_of(layer)

    scheme = Scheme.parse("gptq(bits=4,group_size=16)")
    bank = make_bank(tmp_path / "a", statistics=from_file).with_resident_statistics()
    readable = False
    assert same(bank.packed("up", scheme), make_bank(tmp_path / "b").packed("up", scheme))
    with pytest.raises(ModelError, match="none were collected"):
        bank.packed("down", scheme)


def test_unknown_layers_and_bad_schemes_are_refused(tmp_path):
    bank = make_bank(tmp_path)
    with pytest.raises(ModelError, match="up"):
        bank.packed("upp", Scheme.parse("rtn(bits=4)"))
    with pytest.raises(SchemeError, match="bits"):
        bank.packed("up", Scheme.parse("rtn(bits=77)"))


def test_new_code_of_a_method_never_reads_old_entries(tmp_path, monkeypatch):
    bank = make_bank(tmp_path)
    scheme = Scheme.parse("rtn(bits=4)")
    before = bank.path("up", scheme)
    from autocompress.bank import code

    code.code_digest.cache_clear()
    monkeypatch.setattr(code, "_file_digest", lambda path: f"edited {path}")
    assert bank.path("up", scheme) != before
    code.code_digest.cache_clear()


SHARED = Scheme.parse("basis_sharing(blocks=0/1,rank=8)+rtn(bits=8)")
BLOCKS = ("h.0.up", "h.1.up")
TWO_BLOCKS = ModelLayout(tuple(map(spec, BLOCKS)), ("h.0", "h.1"), 0, 0)


def two_blocks(root, seed=0, statistics=statistics_of):
    found = dict(zip(BLOCKS, weights(seed).values(), strict=True))
    return Bank(root, TWO_BLOCKS, found, statistics)


def test_layers_that_share_are_built_together_and_found_one_by_one(tmp_path):
    bank = two_blocks(tmp_path)
    first = bank.packed(BLOCKS[0], SHARED)
    assert bank.path(BLOCKS[1], SHARED).is_file()
    assert bank.path(BLOCKS[0], SHARED) != bank.path(BLOCKS[1], SHARED)

    def build(*_):
        raise AssertionError("built twice")

    warm = two_blocks(tmp_path)
    warm._make = build
    second = warm.packed(BLOCKS[1], SHARED)
    found = list(weights().values())
    direct = compress_together(found, SHARED, [statistics_of(spec(n)) for n in BLOCKS])
    assert same(first, direct[0])
    assert same(second, direct[1])


def test_an_entry_that_is_shared_is_of_the_weights_and_statistics_of_all(tmp_path):
    bank, others = two_blocks(tmp_path), two_blocks(tmp_path, seed=1)
    changed = dict(bank._weights) | {BLOCKS[1]: others._weights[BLOCKS[1]]}
    other_weight = Bank(tmp_path, TWO_BLOCKS, changed, statistics_of)
    assert other_weight.path(BLOCKS[0], SHARED) != bank.path(BLOCKS[0], SHARED)

    def elsewhere(layer):
        return statistics_of(layer, seed=int(layer.name == BLOCKS[1]))

    other_statistics = bank.with_statistics(elsewhere)
    assert other_statistics.path(BLOCKS[0], SHARED) != bank.path(BLOCKS[0], SHARED)
    rtn = Scheme.parse("rtn")
    assert other_statistics.path(BLOCKS[0], rtn) == bank.path(BLOCKS[0], rtn)


def test_threads_that_fill_layers_which_share_build_them_once(tmp_path):
    bank, made = two_blocks(tmp_path), []
    make = bank._make
    bank._make = lambda key, layer, scheme: (made.append(layer.name), make(key, layer, scheme))[1]
    assert set(bank.fill_by_layer(dict.fromkeys(BLOCKS, (SHARED,)), n_threads=2)) == set(BLOCKS)
    assert len(made) == 1


def in_block(name, role, o, d):
    return LayerSpec(name, role, 0, o, d, "linear", "float32", name, o * d)


WRITER, READER = in_block("blocks.0.up", "up", 48, 32), in_block("blocks.0.down", "down", 32, 48)


def block_bank(root, reading_seed=0):
    generator = torch.Generator().manual_seed(0)
    writing = torch.randn(48, 32, generator=generator)
    reading = torch.randn(32, 48, generator=torch.Generator().manual_seed(reading_seed))

    def statistics(layer):
        inputs = torch.randn(300, layer.in_features, generator=torch.Generator().manual_seed(1))
        return LayerStatistics(inputs.T @ inputs / 300, 300, layer.name)

    layout = ModelLayout((WRITER, READER), ("blocks.0",), 0, 0)
    return Bank(root, layout, {WRITER.name: writing, READER.name: reading}, statistics)


def test_outputs_go_that_the_layer_that_reads_them_chose(tmp_path):
    bank = block_bank(tmp_path)
    reading = bank.packed(READER.name, Scheme.parse("ziplm(keep=16,of=48)+rtn"))
    narrow = Scheme.parse("ziplm(by=down,keep=16,of=48)+gptq(bits=4,group_size=16)")
    writing = bank.packed(WRITER.name, narrow)
    assert torch.equal(reading.tensors["w.kept"], writing.tensors["w.kept"])
    assert int((writing.to_dense() != 0).any(1).sum()) == 16
    assert same(block_bank(tmp_path).packed(WRITER.name, narrow), writing)


def test_such_an_entry_belongs_to_the_weight_of_its_reader_too(tmp_path):
    narrow, plain = Scheme.parse("ziplm(by=down,keep=16,of=48)"), Scheme.parse("gptq(bits=4)")
    one, other = block_bank(tmp_path), block_bank(tmp_path, reading_seed=5)
    assert one.path(WRITER.name, narrow) != other.path(WRITER.name, narrow)
    assert one.path(WRITER.name, plain) == other.path(WRITER.name, plain)
    with pytest.raises(ModelError, match=r"no layer 'blocks\.0\.dwon'.*blocks\.0\.down"):
        one.packed(WRITER.name, Scheme.parse("ziplm(by=dwon,keep=16,of=48)"))
