import copy

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from autocompress.core import Scheme
from autocompress.export import modules
from autocompress.export.deferred import DeferredWeight
from autocompress.export.modules import PackedModule, pack_module, packs, weight_shape
from autocompress.export.plan import PackedLayer
from autocompress.methods import CompressedWeight, LayerStatistics, compress

SCHEMES = (
    "rtn(bits=3,group_size=8,symmetric=false)",
    "magnitude(sparsity=0.6)",
    "svd(rank=4)+rtn(bits=8)",
)


def packed_copy(module: nn.Module, scheme: str) -> tuple[PackedModule, CompressedWeight]:
    """A packed copy of a module and the compressed weight that it holds."""
    kind = {nn.Linear: "linear", Conv1D: "conv1d"}.get(type(module), "embedding")
    matrix = module.weight.detach().t() if kind == "conv1d" else module.weight.detach()
    weight = compress(matrix, Scheme.parse(scheme), LayerStatistics.none())
    layer = PackedLayer("layer", weight.scheme, weight.shape, "float32", kind)
    packed = pack_module(copy.deepcopy(module), layer, weight.tensors, torch.float32)
    return packed, weight


def with_weight(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    changed = copy.deepcopy(module)
    changed.weight = nn.Parameter(weight, requires_grad=False)
    return changed


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_layer_computes_with_the_decoded_matrix(scheme: str, bias: bool) -> None:
    linear = nn.Linear(16, 24, bias=bias)
    packed, weight = packed_copy(linear, scheme)
    x = torch.randn(3, 5, 16)
    assert torch.equal(packed(x), with_weight(linear, weight.to_dense())(x))
    assert isinstance(packed, nn.Linear)
    assert "layer" not in dict(packed.named_parameters())
    assert ("bias" in packed.state_dict()) == bias


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_conv1d_turns_the_matrix_as_gpt2_stores_it(scheme: str) -> None:
    conv = Conv1D(24, 16)
    nn.init.normal_(conv.bias)
    packed, weight = packed_copy(conv, scheme)
    x = torch.randn(3, 16)
    assert torch.equal(packed(x), with_weight(conv, weight.to_dense().t())(x))
    assert packed.weight.shape == (16, 24)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_embedding_looks_up_rows_of_the_decoded_matrix(scheme: str) -> None:
    embedding = nn.Embedding(40, 16)
    packed, weight = packed_copy(embedding, scheme)
    ids = torch.tensor([[3, 39, 3], [0, 1, 2]])
    torch.testing.assert_close(packed(ids), weight.to_dense()[ids], rtol=1e-6, atol=1e-6)
    assert packed(ids[:, :0]).shape == (2, 0, 16)


def test_a_scaled_word_embedding_still_scales() -> None:
    embedding = BartScaledWordEmbedding(40, 16, padding_idx=1, embed_scale=4.0)
    packed, weight = packed_copy(embedding, SCHEMES[0])
    ids = torch.arange(40)
    assert torch.equal(packed(ids), weight.to_dense() * 4.0)
    assert isinstance(packed, BartScaledWordEmbedding)


@pytest.mark.parametrize("token", [-1, 40])
def test_an_id_outside_the_vocabulary_is_an_error_as_it_is_for_a_plain_embedding(
    token: int,
) -> None:
    embedding = nn.Embedding(40, 16)
    packed, _ = packed_copy(embedding, SCHEMES[0])
    for module in (embedding, packed):
        with pytest.raises(IndexError):
            module(torch.tensor([0, token]))


def test_asking_a_weight_for_shape_dtype_or_device_decodes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed, _ = packed_copy(nn.Linear(16, 24), SCHEMES[0])

    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("decoded")

    monkeypatch.setattr(modules, "decode", refuse)
    weight = packed.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((24, 16), torch.float32, "cpu")
    assert "24, 16" in repr(weight)
    assert "rtn(" in repr(packed)


def test_computing_with_the_weight_of_a_packed_layer_decodes_it() -> None:
    packed, weight = packed_copy(nn.Linear(16, 24), SCHEMES[0])
    stand_in = packed.weight
    assert isinstance(stand_in, DeferredWeight)
    assert torch.equal(stand_in + 0, weight.to_dense())
    assert torch.equal(torch.cat([stand_in, stand_in])[24:], weight.to_dense())
    x = torch.randn(2, 16, requires_grad=True)
    nn.functional.linear(x, stand_in).sum().backward()
    torch.testing.assert_close(x.grad, weight.to_dense().sum(0).expand(2, -1))


def test_writing_to_the_weight_of_a_packed_layer_is_an_error() -> None:
    packed, weight = packed_copy(nn.Linear(16, 24), SCHEMES[0])
    with pytest.raises(RuntimeError, match="A packed weight is a constant"):
        packed.weight.fill_(0.0)
    assert torch.equal(torch.zeros(24, 16).copy_(packed.weight), weight.to_dense())


def test_gradients_flow_through_a_packed_layer_to_its_input_and_bias() -> None:
    packed, weight = packed_copy(nn.Linear(16, 24), SCHEMES[0])
    x = torch.randn(2, 16, requires_grad=True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.to_dense().sum(0).expand(2, -1))
    assert packed.bias.grad is not None


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_dropped_layer_multiplies_nothing_and_leaves_its_bias(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kind(16, 24) if kind is nn.Linear else kind(24, 16)
    nn.init.normal_(module.bias)
    packed, weight = packed_copy(module, "drop")
    assert not weight.tensors
    x = torch.randn(3, 5, 16, requires_grad=True)
    decoded = packed(x)
    decoded.sum().backward()
    assert not x.grad.any()
    monkeypatch.setattr(modules, "decode", None)
    assert torch.equal(packed(x.detach()), decoded)
    assert torch.equal(decoded, module.bias.expand(3, 5, 24))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_changing_the_models_dtype_leaves_the_stored_tensors_alone(scheme: str) -> None:
    packed, weight = packed_copy(nn.Linear(16, 24), scheme)
    model = nn.Sequential(packed).to(torch.bfloat16)
    for name, tensor in packed.stored().items():
        assert torch.equal(tensor, weight.tensors[name])
        assert tensor.dtype == weight.tensors[name].dtype
    assert packed.weight.dtype == torch.bfloat16
    assert model(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model.to("meta")[0].stored().keys() == weight.tensors.keys()
    assert all(tensor.is_meta for tensor in packed.stored().values())


def test_an_alias_reads_its_owners_tensors_and_stores_none() -> None:
    embedding = nn.Embedding(40, 16)
    owner, weight = packed_copy(embedding, SCHEMES[0])
    head = pack_module(nn.Linear(16, 40), owner.packed_layer, {}, torch.float32, owner)
    x = torch.randn(2, 16)
    assert torch.equal(head(x), nn.functional.linear(x, weight.to_dense(), head.bias))
    assert list(head.state_dict()) == ["bias"]
    assert [name for name, _ in nn.ModuleDict({"a": owner, "b": head}).named_modules()] == [
        "", "a", "b",
    ]  # fmt: skip


def test_a_deep_copy_is_tied_within_itself() -> None:
    owner, _ = packed_copy(nn.Embedding(40, 16), SCHEMES[0])
    head = pack_module(nn.Linear(16, 40), owner.packed_layer, {}, torch.float32, owner)
    twin = copy.deepcopy(nn.ModuleDict({"embedding": owner, "head": head}))
    twin["embedding"].packed.zero_()
    assert not twin["head"].stored()["packed"].any()
    assert head.stored()["packed"].any()


def test_only_linear_conv1d_and_embedding_modules_can_be_packed() -> None:
    packed, _ = packed_copy(nn.Linear(16, 24), SCHEMES[0])
    assert [packs(m) for m in (nn.Linear(2, 3), Conv1D(3, 2), nn.Embedding(3, 2))] == [True] * 3
    assert [packs(m) for m in (nn.LayerNorm(3), nn.Conv2d(1, 1, 1), packed)] == [False] * 3
    assert weight_shape(Conv1D(3, 2)) == weight_shape(nn.Linear(2, 3)) == (3, 2)
