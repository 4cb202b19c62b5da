from __future__ import annotations

import pytest
import torch

from autocompress.core.errors import UsageError
from autocompress.testing.tiny_models import save_tiny
from autocompress.workflows.session import open_session
from autocompress.workflows.settings import SearchSettings, require_same_study


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """A tied model as it is, and rotated."""
    folder = tmp_path_factory.mktemp("rotate")
    model = save_tiny("qwen2", folder / "qwen2")
    (folder / "text.txt").write_text("Some words to read, and then a few others.\n" * 60)
    opened = {}
    for rotate in ("none", "hadamard"):
        settings = SearchSettings(
            str(model), data=str(folder / "text.txt"), rotate=rotate, sequence_length=16,
            calibration_tokens=32, search_tokens=32, report_tokens=32,
        )  # fmt: skip
        opened[rotate] = open_session(settings, folder / "cache")
    return opened


def test_size_is_relative_to_the_model_as_it_was_given(sessions):
    plain, turned = sessions["none"], sessions["hadamard"]
    assert turned.given == plain.base.layout
    assert turned.given_resources == plain.given_resources
    untied = turned.base.layout.layer("model.embed_tokens").base_bytes
    assert turned.base.layout.base_bytes == plain.base.layout.base_bytes + untied


def test_quality_is_relative_to_the_model_as_it_was_given(sessions):
    plain, turned = sessions["none"], sessions["hadamard"]
    module, split = turned.base.module, turned.splits.report
    assert not torch.equal(module.lm_head.weight, plain.base.module.lm_head.weight)
    found = turned.task.measure(
        module, split, plain.reference(plain.base.module, split, 2), batch_size=2
    )
    same = turned.task.measure(module, split, turned.reference(module, split, 2), batch_size=2)
    assert found == same
    assert found.retained == pytest.approx(1, abs=1e-4)
    again = turned.task.measure(
        plain.base.module, split, turned.reference(module, split, 2), batch_size=2
    )
    assert again.damage.value == 0.0


def test_another_dtype_holds_the_same_weights(sessions):
    turned = sessions["hadamard"]
    lower = turned.compute_module("bfloat16")
    assert torch.equal(lower.lm_head.weight, turned.base.module.lm_head.weight.bfloat16())
    assert turned.compute_module("float32") is turned.base.module


def test_the_rotation_is_a_setting_that_a_resumed_study_keeps():
    settings = SearchSettings("m", rotate="hadamard")
    assert SearchSettings.from_json(settings.to_json()) == settings
    older = {k: v for k, v in settings.to_json().items() if k != "rotate"}
    assert SearchSettings.from_json(older).rotate == "none"
    with pytest.raises(UsageError, match="rotate"):
        require_same_study(settings, SearchSettings("m"))
    with pytest.raises(UsageError, match=r"Unknown --rotate 'hadamart'\. Did you mean 'hadamard'"):
        SearchSettings("m", rotate="hadamart")
