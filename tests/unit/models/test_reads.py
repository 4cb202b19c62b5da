from dataclasses import replace

import pytest
import torch
import transformers as hf

from autocompress.core import Scheme
from autocompress.core.errors import ModelError
from autocompress.methods import LayerStatistics, canonical, compress
from autocompress.models import (
    CurvatureStore,
    StatisticsStore,
    collect_curvature,
    collect_statistics,
    describe,
    weight_matrix,
)
from autocompress.models.reads import as_read, reads_of
from autocompress.spaces import load_space
from autocompress.testing.tiny_models import tiny_batches

TOKENS = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2}
IMAGES = [{"pixel_values": torch.randn(2, 3, 64, 64)} for _ in range(2)]


def segformer():
    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    return hf.SegformerForImageClassification(hf.SegformerConfig(**sizes)).eval()


def rwkv():
    return hf.RwkvForCausalLM(hf.RwkvConfig(**TOKENS, attention_hidden_size=32)).eval()


def mobilebert():
    widths = {"intermediate_size": 64, "embedding_size": 16, "intra_bottleneck_size": 16}
    config = hf.MobileBertConfig(**TOKENS, **widths, num_attention_heads=4)
    return hf.MobileBertForMaskedLM(config).eval()


def read_by(layout, *names):
    """The input of each layer whose name ends so, in the first block that has it."""
    return [next(x for x in layout.layers if x.name.endswith(name)).input_name for name in names]


def logits_loss(module, batch, generator):
    logits = module(**batch).logits
    return (logits * torch.randn(logits.shape, generator=generator)).sum(), len(logits)


def test_a_layout_that_is_right_stays_as_it_is(family, model):
    layout = describe(model)
    assert as_read(layout, reads_of(model, layout, tiny_batches(family)[0])) == layout


def test_keys_and_values_of_fewer_places_have_an_input_of_their_own():
    model = segformer()
    assumed = describe(model)
    layout = as_read(assumed, reads_of(model, assumed, IMAGES[0]))
    query, key, value = read_by(layout, "q_proj", "k_proj", "v_proj")
    assert query.endswith("stages.0.blocks.0.attention.q_proj")
    assert key == value
    assert key.endswith("stages.0.blocks.0.attention.k_proj")
    last = [x for x in layout.layers if ".stages.3." in x.name and x.role in ("query", "key")]
    assert len({x.input_name for x in last}) == 1  # nothing is reduced there
    described = [replace(x, input_name=None) for x in layout.layers]
    assert described == [replace(x, input_name=None) for x in assumed.layers]


def test_layers_that_mix_tokens_in_their_own_way_share_nothing():
    model = rwkv()
    assumed = describe(model)
    layout = as_read(assumed, reads_of(model, assumed, tiny_batches("llama")[0]))
    mixing = [x for x in layout.layers if x.role in ("key", "value")]
    assert all(x.input_name == x.name for x in mixing)


def test_layers_of_different_widths_are_never_taken_for_readers_of_one_tensor():
    query, key, value = read_by(describe(mobilebert()), "self.query", "self.key", "self.value")
    assert query == key != value


def test_layers_that_are_not_called_stay_together():
    model = segformer()
    layout = describe(model)
    assert as_read(layout, {}) == layout


def test_layers_that_read_different_tensors_are_not_tied():
    model = segformer()
    assumed = describe(model)
    layout = as_read(assumed, reads_of(model, assumed, IMAGES[0]))
    names = {choice.name.partition("attention.")[2] for choice in _choices(layout)}
    assert {"q_proj", "{k_proj,v_proj}", "{q_proj,k_proj,v_proj}"} <= names
    assert "{k_proj,v_proj}" not in {c.name.partition("attention.")[2] for c in _choices(assumed)}


def _choices(layout):
    return load_space("quick", layout.layers).choices


@pytest.mark.parametrize("make", [segformer, rwkv])
def test_statistics_that_different_tensors_would_share_are_refused(make, tmp_path):
    model = make().requires_grad_(False)
    batches = IMAGES if make is segformer else tiny_batches("llama")
    layout = describe(model)
    with pytest.raises(ModelError, match=r"must read one tensor.*Next step: describe"):
        collect_statistics(model, layout, batches, StatisticsStore(tmp_path / "statistics"))
    with pytest.raises(ModelError, match=r"must read one tensor.*Next step: describe"):
        collect_curvature(model, layout, batches, logits_loss, CurvatureStore(tmp_path / "c"))


def test_each_layer_gets_the_statistics_of_what_it_reads(tmp_path):
    model = segformer().requires_grad_(False)
    assumed = describe(model)
    layout = as_read(assumed, reads_of(model, assumed, IMAGES[0]))
    seen = {}

    def remember(name):
        return lambda _, arguments: seen.setdefault(name, []).append(arguments[0].flatten(0, -2))

    store, curvature = StatisticsStore(tmp_path / "statistics"), CurvatureStore(tmp_path / "c")
    collect_curvature(model, layout, IMAGES, logits_loss, curvature)
    hooks = [
        model.get_submodule(x.name).register_forward_pre_hook(remember(x.name))
        for x in layout.layers
    ]
    collect_statistics(model, layout, IMAGES, store)
    for hook in hooks:
        hook.remove()
    for layer in layout.layers:
        rows = torch.cat(seen[layer.name]).double()
        found = store.get(layer)
        assert found.n_tokens == len(rows)
        expected = rows.T @ rows / len(rows)
        rounding = 1e-5 * float(expected.diagonal().max())
        torch.testing.assert_close(found.hessian.double(), expected, rtol=1e-4, atol=rounding)
        assert curvature.get(layer).rows.shape == (layer.out_features,)
        assert _compresses(model, layer, curvature.statistics(layer))


def _compresses(model, layer, statistics: LayerStatistics):
    scheme = canonical(Scheme.parse("gptq(bits=4,group_size=0)"))
    return compress(weight_matrix(model, layer), scheme, statistics).shape == (
        layer.out_features,
        layer.in_features,
    )
