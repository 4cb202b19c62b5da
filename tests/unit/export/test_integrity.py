import json
from pathlib import Path
from random import Random

import pytest

from autocompress.core.errors import CheckpointError
from autocompress.export import load, stored_bytes, write_packed
from autocompress.export.integrity import check_files
from autocompress.export.manifest import Manifest
from autocompress.export.tensor_file import INDEX_FILE, read_header, weight_files
from autocompress.models import BaseModel

WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(base: BaseModel, weights: dict, tmp_path: Path) -> Path:
    write_packed(base, weights, tmp_path / "out", claim={})
    return tmp_path / "out"


def check(checkpoint: Path) -> None:
    check_files(checkpoint, Manifest.read(checkpoint))


def test_a_checkpoint_as_written_passes(checkpoint: Path) -> None:
    check(checkpoint)


def test_one_flipped_bit_is_found_and_its_tensor_named(checkpoint: Path) -> None:
    path = checkpoint / WEIGHTS
    name, entry = list(read_header(path).items())[7]
    data = bytearray(path.read_bytes())
    data[entry.start + entry.n_bytes // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is damaged: tensor {name} is not"):
        load(checkpoint)


def test_a_truncated_file_names_the_first_tensor_that_is_cut_off(checkpoint: Path) -> None:
    path = checkpoint / WEIGHTS
    entries = list(read_header(path).items())
    name, entry = entries[len(entries) // 2]
    path.write_bytes(path.read_bytes()[: entry.start + entry.n_bytes - 1])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is truncated: tensor {name} ends"):
        load(checkpoint)


@pytest.mark.parametrize("length", [0, 5, 8, 100])
def test_a_file_without_a_whole_header_is_refused(checkpoint: Path, length: int) -> None:
    path = checkpoint / WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is not a complete safetensors file"):
        load(checkpoint)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_an_edited_file_is_named(checkpoint: Path, name: str) -> None:
    with (checkpoint / name).open("a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError, match=rf"{name} is damaged or was edited"):
        load(checkpoint)


def test_whatever_byte_is_damaged_the_file_is_named(checkpoint: Path) -> None:
    random = Random(0)
    for name in sorted(Manifest.read(checkpoint).files):
        path = checkpoint / name
        intact = path.read_bytes()
        for _ in range(25):
            damaged = bytearray(intact)
            damaged[random.randrange(len(damaged))] ^= random.randrange(1, 256)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=name):
                check(checkpoint)
        path.write_bytes(intact)
    check(checkpoint)


def test_an_added_file_is_none_of_our_business(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("# mine")
    check(checkpoint)


def header(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path: Path, entries: object, data: bytes) -> None:
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ([], b"", "damaged header"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "damaged header"),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"12345678", "F99"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678", "8 bytes for"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"123", "gap or an overlap"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"123", "1 bytes after"),
        ({"a": {"dtype": "U8", "shape": ["x"], "data_offsets": [0, 2]}}, b"12", "damaged header"),
    ],
)
def test_a_hostile_header_is_refused(
    tmp_path: Path, entries: object, data: bytes, message: str
) -> None:
    write(tmp_path / WEIGHTS, entries, data)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / WEIGHTS)


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_header(tmp_path / WEIGHTS)


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"a": "../../etc/passwd"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {}}',
        '{"weight_map": []}',
        "{",
    ],
)
def test_an_index_that_leads_elsewhere_or_is_damaged_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match="index"):
        weight_files(tmp_path)


def test_stored_bytes_of_any_model_directory_are_its_tensors(
    base: BaseModel, tmp_path: Path
) -> None:
    assert stored_bytes(Path(base.source)) == base.layout.base_bytes
    with pytest.raises(CheckpointError, match="neither"):
        stored_bytes(tmp_path)
