"""A checkpoint computes what was measured also where it was measured in another dtype."""

from __future__ import annotations

import pytest
import torch

from autocompress.bank import Bank
from autocompress.core import Allocation, Scheme
from autocompress.core.errors import UsageError
from autocompress.export import load, write_packed
from autocompress.export.dense import write_dense
from autocompress.methods import LayerStatistics
from autocompress.models import load_base_model, overridden, weight_matrix
from autocompress.testing.tiny_models import auto_class_of, save_tiny, tiny_batches, tiny_model

SCHEME = Scheme.parse("rtn(bits=4,group_size=32)")


def test_a_bfloat16_checkpoint_measured_in_float32_reloads_to_the_same_logits(tmp_path):
    path = save_tiny("llama", tmp_path / "base", model=tiny_model("llama").to(torch.bfloat16))
    base = load_base_model(str(path), "AutoModelForCausalLM")
    exact = load_base_model(str(path), "AutoModelForCausalLM", dtype="float32")
    names = [layer.name for layer in base.layout.layers if layer.block is not None]
    weights = {n: weight_matrix(base.module, base.layout.layer(n)) for n in names}
    bank = Bank(tmp_path / "bank", base.layout, weights, lambda _: LayerStatistics.none())
    write_packed(base, {n: bank.packed(n, SCHEME) for n in names}, tmp_path / "out", claim={})
    batch = tiny_batches("llama")[0]
    measured = {n: bank.dense(n, SCHEME, torch.float32) for n in names}
    with torch.no_grad():
        with overridden(exact.module, base.layout, measured):
            expected = exact.module(**batch).logits
        found = load(tmp_path / "out", dtype="float32")(**batch).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_checkpoint_that_rounds_inputs_reloads_to_the_same_outputs(family, tmp_path):
    scheme = Scheme.parse("hadamard+rtn(bits=8,group_size=0)+int_inputs")
    path = save_tiny(family, tmp_path / "base")
    base = load_base_model(str(path), auto_class_of(family))
    names = [layer.name for layer in base.layout.layers if layer.block is not None]
    weights = {n: weight_matrix(base.module, base.layout.layer(n)) for n in names}
    bank = Bank(tmp_path / "bank", base.layout, weights, lambda _: LayerStatistics.none())
    write_packed(base, {n: bank.packed(n, scheme) for n in names}, tmp_path / "out", claim={})
    batch = tiny_batches(family)[0]
    measured = {n: bank.dense(n, scheme, torch.float32) for n in names}
    inputs = bank.input_maps(dict.fromkeys(names, scheme))
    with torch.no_grad():
        without = base.module(**batch)[0]
        with overridden(base.module, base.layout, measured, inputs):
            expected = base.module(**batch)[0]
        found = load(tmp_path / "out", dtype="float32")(**batch)[0]
        assert torch.equal(base.module(**batch)[0], without)
    assert torch.equal(found, expected)
    assert not torch.equal(expected, without)


def test_a_dense_checkpoint_cannot_round_inputs(tmp_path):
    base = load_base_model(str(save_tiny("llama", tmp_path / "base")), "AutoModelForCausalLM")
    name = next(layer.name for layer in base.layout.layers if layer.block is not None)
    allocation = Allocation.of({name: Scheme.parse("rtn+int_inputs")})
    weights = {name: weight_matrix(base.module, base.layout.layer(name))}
    with pytest.raises(UsageError, match=f"{name} rounds its inputs.*--format packed"):
        write_dense(base, weights, allocation, tmp_path / "out", claim={})
    assert not (tmp_path / "out").exists()
