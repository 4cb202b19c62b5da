import pytest

from autocompress.search.probe import MOST_DRAWS
from autocompress.testing.tiny_models import save_tiny
from autocompress.workflows import probing
from autocompress.workflows.session import open_session
from autocompress.workflows.settings import SearchSettings


class Steps:
    def __init__(self):
        self.said = []

    def step(self, text):
        self.said.append(text)

    def advance(self, done, total):
        pass


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    root, steps = tmp_path_factory.mktemp("probing"), Steps()
    settings = SearchSettings(
        str(save_tiny("llama", root / "model")), space="quick", calibration_tokens=256,
        search_tokens=128, report_tokens=64, sequence_length=32,
    )  # fmt: skip
    session = open_session(settings, root / "cache", steps)
    return session, session.compute_module("float32"), steps


def test_few_sequences_get_draws_and_the_key_knows_them(opened, monkeypatch):
    session, module, steps = opened
    probe = probing.search_probe(session, module)
    assert probe.key == probing.search_probe(session, module).key
    assert probe.key != probing.search_probe(session, module, empirical=True).key
    layer = session.space.searched_layers[0]
    weight = session.weights[layer]
    slopes = probe.measure({layer: 1}, lambda name: weight[None].float())
    n_sequences = len(session.splits.search)
    assert slopes.n_samples == MOST_DRAWS * n_sequences
    said = f"{MOST_DRAWS} x {session.splits.search.n_tokens} search tokens"
    assert said in steps.said[-1]
    monkeypatch.setattr(probing, "draws_of", lambda *_: 1)
    assert probing.search_probe(session, module).key != probe.key


def test_a_search_does_without_a_probe_that_memory_does_not_hold(opened, monkeypatch, caplog):
    session, module, _ = opened

    def too_much(*_, **__):
        raise MemoryError

    monkeypatch.setattr(probing, "collect_slopes", too_much)
    assert probing.search_probe(session, module).measure({}, lambda _: None) is None
    assert "Predictions stay those of the calibration tokens." in caplog.text
