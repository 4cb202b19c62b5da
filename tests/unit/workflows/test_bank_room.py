"""A search says when its options do not fit into the bank."""

import pytest

from autocompress.testing.tiny_models import save_tiny
from autocompress.workflows.bank_room import bank_need, small_bank
from autocompress.workflows.session import open_session
from autocompress.workflows.settings import SearchSettings

LONGEST_HEADER = 2000


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    settings = SearchSettings(
        model=str(save_tiny("llama", folder / "model")), space="mixed_precision",
        calibration_tokens=128, search_tokens=64, report_tokens=64, sequence_length=32,
        token_weighting="none",
    )  # fmt: skip
    return open_session(settings, folder / "cache")


def test_the_need_is_what_a_full_bank_holds(session):
    bank = session.bank("float32")
    wanted = {}
    for choice in session.space.choices:
        for option in choice.options:
            for name, scheme in zip(choice.layers, option.schemes, strict=True):
                wanted.setdefault(name, []).append(scheme)
    bank.fill(wanted)
    sizes = [path.stat().st_size for path in bank.root.glob("??/*.safetensors")]
    need = bank_need(session.space)
    assert need < sum(sizes) < need + LONGEST_HEADER * len(sizes)


def test_a_bank_that_is_too_small_is_worth_a_line(session):
    need = bank_need(session.space)
    assert small_bank(session.space, 2 * need) == ""
    said = small_bank(session.space, need // 2)
    assert f"bounded at {need // 2 / 1e9:.3g} GB" in said
    assert said.endswith("--bank-size 1MB")
