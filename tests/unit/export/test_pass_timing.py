"""Layers timed inside whole models: the model that runs is the packed one, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

from autocompress.core import Allocation, Scheme
from autocompress.core.errors import ModelError
from autocompress.export.modules import PackedModule
from autocompress.export.pass_inputs import CONTEXT_TOKENS
from autocompress.export.pass_timing import Stored, TimedModel, packed_model
from autocompress.methods import canonical
from autocompress.models import BaseModel, describe
from autocompress.testing.tiny_models import auto_class_of, tiny_model

FOUR = canonical(Scheme.parse("rtn(bits=4,group_size=16)"))


def _base(family: str) -> BaseModel:
    module = tiny_model(family)
    return BaseModel(module, describe(module), None, family, auto_class_of(family), "")


def _uniform(base: BaseModel, scheme: Scheme = FOUR) -> Allocation:
    return Allocation.of({layer.name: scheme for layer in base.layout.layers})


@pytest.fixture(scope="module")
def llama() -> BaseModel:
    return _base("llama")


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "vit", "mixtral"])
def test_every_layer_takes_its_part_of_a_pass(family, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path))
    base = _base(family)
    timed = TimedModel.of(packed_model(base, _uniform(base), Stored()), base.auto_class, 5)
    layers = {layer.name: layer for layer in base.layout.layers}
    whole, parts = timed.parts(layers)
    assert parts.keys() == layers.keys()
    assert 0 < sum(parts.values()) < whole
    ran = {name for name, seconds in parts.items() if seconds > 0}
    assert ran >= {name for name, layer in layers.items() if layer.expert is None}
    assert all("forward" not in vars(module) for module in timed.model.modules())


def test_the_model_is_packed_runs_on_kernels_and_shares_the_rest_with_the_base(llama):
    name = llama.layout.layers[1].name
    before = {n: t.data_ptr() for n, t in llama.module.state_dict().items()}
    model = packed_model(llama, Allocation.of({name: FOUR}), Stored())
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedModule)}
    assert list(packed) == [name]
    assert packed[name].kernels == "auto"
    assert {n: t.data_ptr() for n, t in llama.module.state_dict().items()} == before
    own = {n: t.data_ptr() for n, t in model.state_dict().items() if not n.startswith(name)}
    assert own.items() <= before.items()


def test_layers_of_equal_shape_have_tensors_of_their_own(llama):
    stored, layer = Stored(), llama.layout.layers[1]
    one, other = stored.of(layer, FOUR), stored.of(layer, FOUR)
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert all(one[n].data_ptr() != other[n].data_ptr() for n in one)


def test_one_token_is_decoded_after_others_again_and_again(llama):
    timed = TimedModel.of(packed_model(llama, Allocation(), Stored()), llama.auto_class, 1)
    for _ in range(2):
        arguments = timed.inputs()
        assert arguments["input_ids"].shape == (1, 1)
        assert arguments["past_key_values"].get_seq_length() == CONTEXT_TOKENS
        with torch.no_grad():
            timed.model(**arguments)
        assert arguments["past_key_values"].get_seq_length() == CONTEXT_TOKENS + 1
    many = TimedModel.of(timed.model, llama.auto_class, 7)
    assert many.inputs()["input_ids"].shape == (1, 7)
    assert "past_key_values" not in many.inputs()


def test_layers_that_share_are_timed_with_what_they_borrow():
    base = _base("llama")
    up = [layer for layer in base.layout.layers if layer.role == "up"]
    scheme = canonical(Scheme.parse("basis_sharing(blocks=0/1,rank=8)+rtn(bits=4,group_size=8)"))
    allocation = Allocation.of({layer.name: scheme for layer in up})
    timed = TimedModel.of(packed_model(base, allocation, Stored()), base.auto_class, 3)
    _, parts = timed.parts({layer.name: layer for layer in up})
    assert len(parts) == 2
    assert min(parts.values()) > 0


def test_more_tokens_than_a_model_reads_are_refused():
    base = _base("bert")
    with pytest.raises(ModelError, match="give fewer --tokens"):
        TimedModel.of(packed_model(base, Allocation(), Stored()), base.auto_class, 9999).warm_up()
