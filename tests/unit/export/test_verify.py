from pathlib import Path

import pytest

from autocompress.core.errors import CheckpointError, NoAnswerError
from autocompress.export import run_fresh_process

MODULE = """
import os, sys, time
from autocompress.core.errors import CheckpointError

def answer(request):
    print("noise on stdout")
    if request["do"] == "refuse":
        raise CheckpointError("tensor x is missing")
    if request["do"] == "crash":
        raise KeyError("a bug")
    if request["do"] == "die":
        os._exit(9)
    if request["do"] == "sleep":
        time.sleep(60)
    return {"pid": os.getpid(), "torch": "torch" in sys.modules, **request}
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_measuring_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def ask(do: str, timeout_seconds: float | None = None) -> dict:
    return run_fresh_process(
        "a_measuring_module", {"do": do, "text": "ü"}, timeout_seconds=timeout_seconds
    )


def test_a_fresh_process_answers_with_json() -> None:
    import os

    answer = ask("work")
    assert answer["pid"] != os.getpid()
    assert (answer["text"], answer["torch"]) == ("ü", False)


def test_an_error_of_ours_arrives_with_its_class_and_message() -> None:
    with pytest.raises(CheckpointError, match=r"^tensor x is missing$"):
        ask("refuse")


@pytest.mark.parametrize(("do", "message"), [("crash", "a bug"), ("die", "status 9")])
def test_a_process_that_dies_is_no_answer(do: str, message: str) -> None:
    with pytest.raises(NoAnswerError, match=message):
        ask(do)


def test_a_process_that_takes_too_long_is_no_answer() -> None:
    with pytest.raises(NoAnswerError, match=r"within 0\.5 seconds"):
        ask("sleep", timeout_seconds=0.5)
