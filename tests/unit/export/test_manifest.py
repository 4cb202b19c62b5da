import json
import subprocess
import sys
from pathlib import Path

import pytest

from autocompress.core import Measurement, Quality
from autocompress.core.errors import CheckpointError
from autocompress.export import Manifest, is_export, write_packed
from autocompress.export.manifest import MANIFEST_FILE
from autocompress.models import BaseModel

QUALITY = Quality(0.97, 0.01, Measurement(0.1, 0.01), {"perplexity": Measurement(20.0, 0.4)}, 4096)
CLAIM = {
    "member": "abc",
    "base_model": "someone/model",
    "quality": QUALITY.to_json(),
    "cost_efficiency": 2.5,
    "resources": {"macs_per_token": {"value": 10.0, "unit": "macs", "origin": "analytic"}},
    "measured": {"split_digest": "f" * 32, "n_tokens": 4096, "dtype": "float32"},
}


@pytest.fixture
def manifest(base: BaseModel, weights: dict, tmp_path: Path) -> Manifest:
    return write_packed(base, weights, tmp_path / "out", claim=CLAIM)


def test_a_manifest_reads_back_equal(manifest: Manifest, tmp_path: Path) -> None:
    assert Manifest.read(tmp_path / "out") == manifest


def test_a_manifest_holds_claims_allocation_checksums_and_versions(
    manifest: Manifest, weights: dict, tmp_path: Path
) -> None:
    assert manifest.claim == CLAIM
    assert Quality.from_json(manifest.claim["quality"]) == QUALITY
    assert manifest.base_model == "someone/model"
    assert manifest.allocation == {name: str(w.scheme) for name, w in sorted(weights.items())}
    on_disk = {path.name for path in (tmp_path / "out").iterdir()} - {MANIFEST_FILE}
    assert set(manifest.files) == on_disk >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert manifest.file_bytes == sum((tmp_path / "out" / n).stat().st_size for n in on_disk)
    assert {"autocompress", "torch", "transformers", "safetensors", "python"} <= set(
        manifest.libraries
    )
    assert not manifest.simulated
    assert manifest.verification is None


def test_the_result_of_a_reload_is_added_to_the_manifest_in_place(
    manifest: Manifest, tmp_path: Path
) -> None:
    manifest.with_verification({"passed": True, "checks": []}).write(tmp_path / "out")
    again = Manifest.read(tmp_path / "out")
    assert again.verification == {"passed": True, "checks": []}
    assert again.files == manifest.files
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_is_export_knows_a_checkpoint_from_any_directory(
    manifest: Manifest, tmp_path: Path
) -> None:
    assert is_export(tmp_path / "out")
    assert not is_export(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, but this autocompress reads up to 1"),
        ({"format_version": "1"}, "not valid at format_version"),
        ({"files": {"../secret": {"bytes": 1, "sha256": "0" * 64}}}, "not valid at files"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, "not valid at files"),
        ({"files": {"a/../../b": {"bytes": 1, "sha256": "0" * 64}}}, "not valid at files"),
        ({"files": {}}, "not valid at files"),
        ({"auto_class": "os.system"}, "not valid at auto_class"),
        ({"storage_bytes": -1}, "not valid at storage_bytes"),
        ({"claim": {"quality": {"retained": "high"}}}, "not valid at claim/quality"),
        ({"allocation": {"x": 3}}, "not valid at allocation/x"),
        ({"surprise": 1}, "surprise"),
        ({"claim": {"cost_efficiency": float("nan")}}, "NaN is not a JSON number"),
    ],
)
def test_a_malformed_manifest_is_refused_with_the_place(
    manifest: Manifest, tmp_path: Path, change: dict, message: str
) -> None:
    path = tmp_path / "out" / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        Manifest.read(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "[" * 100_000])
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST_FILE):
        Manifest.read(tmp_path)


def test_a_claim_that_is_not_finite_is_not_written(
    base: BaseModel, weights: dict, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        write_packed(base, weights, tmp_path / "out", claim={"cost_efficiency": float("inf")})
    assert list(tmp_path.iterdir()) == []


def test_reading_a_manifest_and_weighing_a_checkpoint_needs_no_torch(
    manifest: Manifest, tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from autocompress.export.manifest import Manifest, stored_bytes\n"
        "path = Path(sys.argv[1])\n"
        "assert stored_bytes(path) == Manifest.read(path).storage_bytes\n"
        "assert not {'torch', 'transformers', 'ray', 'optuna'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "out"], check=True)
