"""A checkpoint computes what was measured also where it was measured in another dtype."""

from __future__ import annotations

import torch

from autocompress.bank import Bank
from autocompress.core import Scheme
from autocompress.export import load, write_packed
from autocompress.methods import LayerStatistics
from autocompress.models import load_base_model, overridden, weight_matrix
from autocompress.testing.tiny_models import save_tiny, tiny_batches, tiny_model

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
