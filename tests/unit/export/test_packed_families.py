import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autocompress.export import Manifest, load, write_packed
from autocompress.export.tensor_file import read_header, stored_bytes, weight_files
from autocompress.methods import footprint
from autocompress.models import BaseModel, overridden
from autocompress.testing.tiny_models import FAMILIES

from .conftest import compress_all, expected_outputs, from_pretrained, outputs

DTYPES = [
    ("gemma3", "bfloat16"),
    ("t5-gated", "float16"),
    ("gpt2", "bfloat16"),
    ("bert", "float16"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reload_computes_what_the_search_measured_to_the_last_bit(
    family: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base(family)
    weights = compress_all(base)
    write_packed(base, weights, tmp_path / "out", claim={})
    expected = expected_outputs(base, weights, family)
    assert torch.equal(outputs(load(tmp_path / "out"), family), expected)
    plain = from_pretrained(base, tmp_path / "out")
    assert torch.equal(outputs(plain, family), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_tensors_weigh_what_the_shapes_say(
    family: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base(family)
    weights = compress_all(base)
    manifest = write_packed(base, weights, tmp_path / "out", claim={})
    expected = base.layout.other_bytes + sum(
        footprint(base.layout.layer(name), weight.scheme).storage_bytes
        for name, weight in weights.items()
    )
    assert manifest.storage_bytes == stored_bytes(tmp_path / "out") == expected
    assert manifest.storage_bytes < base.layout.base_bytes / 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "bart", "t5", "vit", "gemma3"])
def test_save_pretrained_of_a_loaded_model_keeps_it(
    family: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base(family)
    write_packed(base, compress_all(base), tmp_path / "first", claim={})
    first = load(tmp_path / "first")
    first.save_pretrained(tmp_path / "second")
    assert stored_bytes(tmp_path / "second") == stored_bytes(tmp_path / "first")
    second = from_pretrained(base, tmp_path / "second")
    assert torch.equal(outputs(second, family), outputs(first, family))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_packed_language_model_generates_what_the_dense_one_does(
    family: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base(family)
    weights = compress_all(base)
    write_packed(base, weights, tmp_path / "out", claim={})
    prompt = torch.tensor([[1, 40, 41, 42]])
    generated = load(tmp_path / "out").generate(prompt, max_new_tokens=8, do_sample=False)
    logits = expected_continuation(base, weights, prompt, n_tokens=generated.shape[1] - 4)
    assert torch.equal(generated, logits)


def expected_continuation(
    base: BaseModel, weights: dict, prompt: torch.Tensor, n_tokens: int
) -> torch.Tensor:
    """Greedy decoding by hand, without a cache."""
    dense = {name: weight.to_dense() for name, weight in weights.items()}
    ids = prompt
    with overridden(base.module, base.layout, dense), torch.no_grad():
        for _ in range(n_tokens):
            best = base.module(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], dim=1)
    return ids


@pytest.mark.parametrize(("family", "dtype"), DTYPES)
def test_a_half_precision_model_reloads_in_its_own_dtype_to_the_last_bit(
    family: str, dtype: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base(family, dtype)
    weights = compress_all(base)
    write_packed(base, weights, tmp_path / "out", claim={})
    loaded = load(tmp_path / "out")
    assert loaded.dtype == getattr(torch, dtype)
    assert torch.equal(outputs(loaded, family), expected_outputs(base, weights, family))


@pytest.mark.parametrize("family", ["qwen2", "bert", "bart", "t5"])
def test_a_tied_matrix_is_stored_once(
    family: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base(family)
    embedding = next(layer for layer in base.layout.layers if layer.role == "embedding")
    assert embedding.aliases
    write_packed(base, compress_all(base), tmp_path / "out", claim={})
    names = {n for path in weight_files(tmp_path / "out") for n in read_header(path)}
    assert f"{embedding.name}.packed" in names
    for alias in embedding.aliases:
        assert not any(n.startswith(f"{alias}.packed") or n == f"{alias}.weight" for n in names)


@pytest.mark.parametrize("family", ["qwen2", "bert", "bart", "t5"])
def test_tying_weights_again_and_copying_change_nothing(
    family: str, make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base(family)
    write_packed(base, compress_all(base), tmp_path / "out", claim={})
    loaded = load(tmp_path / "out")
    before = outputs(loaded, family)
    loaded.tie_weights()
    assert torch.equal(outputs(loaded, family), before)
    assert torch.equal(outputs(copy.deepcopy(loaded), family), before)


def test_layers_that_are_not_compressed_stay_as_they_are(
    make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base("llama")
    weights = compress_all(base)
    some = {name: weight for name, weight in weights.items() if "mlp" in name}
    write_packed(base, some, tmp_path / "out", claim={})
    assert torch.equal(
        outputs(load(tmp_path / "out"), "llama"), expected_outputs(base, some, "llama")
    )
    assert set(Manifest.read(tmp_path / "out").allocation) == set(some)


def test_a_large_checkpoint_is_split_and_loads(
    make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base("llama")
    weights = compress_all(base)
    manifest = write_packed(base, weights, tmp_path / "out", claim={}, max_shard_bytes=20_000)
    assert len(weight_files(tmp_path / "out")) > 1
    assert manifest.storage_bytes == stored_bytes(tmp_path / "out")
    assert torch.equal(
        outputs(load(tmp_path / "out"), "llama"), expected_outputs(base, weights, "llama")
    )


def test_writing_leaves_no_trace_on_the_base_model(
    make_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = make_base("gemma3")
    before = {
        name: (id(t), t.clone()) for name, t in base.module.state_dict(keep_vars=True).items()
    }
    config = base.module.config.to_dict()
    write_packed(base, compress_all(base), tmp_path / "out", claim={})
    after = base.module.state_dict(keep_vars=True)
    assert {n: id(t) for n, t in after.items()} == {n: key for n, (key, _) in before.items()}
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())
    assert base.module.config.to_dict() == config
    assert type(base.module.model.embed_tokens).__name__ == "Gemma3TextScaledWordEmbedding"
