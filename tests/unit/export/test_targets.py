from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from autocompress.core import LayerSpec, Scheme
from autocompress.core.errors import SpaceError, UnknownNameError, UsageError
from autocompress.export.targets import TARGETS, restricted, space_for
from autocompress.methods import canonical
from autocompress.models import BaseModel
from autocompress.spaces import SearchSpace, load_space
from autocompress.workflows.settings import SearchSettings, require_same_study

HEAD = "schema_version: 1\nname: mine\ndescription: A test.\n"
MIXED = """\
ties: {qkv: false, gate_up: false}
choices:
  - roles: [embedding]
    options: ["rtn(bits=4,group_size=32)"]
  - roles: [query, key, value]
    options: ["rtn(bits=3,group_size=32)", "rtn(bits=4,group_size=16)", "rtn(bits=4,group_size=32)",
              "rtn(bits=8,group_size=0)+int_inputs(bits=8)", "svd(rank=4)", base]
  - roles: [output, gate, up, down]
    options: ["rtn(bits=8,group_size=0)", "wanda(sparsity=0.5)"]
"""


@pytest.fixture
def space_of(tmp_path: Path, base: BaseModel) -> Callable[[str, str], SearchSpace]:
    def resolve(target: str, text: str = MIXED) -> SearchSpace:
        path = tmp_path / "mine.yaml"
        path.write_text(HEAD + text)
        return space_for(target, str(path), base)

    return resolve


def labels(space: SearchSpace, layer: str) -> set[str]:
    choice = next(c for c in space.choices if any(name.endswith(layer) for name in c.layers))
    return {option.label for option in choice.options}


def test_any_target_leaves_the_space_as_it_is(space_of: Callable[..., SearchSpace]) -> None:
    whole = space_of("any")
    assert len(labels(whole, "layers.0.self_attn.q_proj")) == 6
    assert len(whole.choices) == 1 + 2 * 7


def test_transformers_drops_what_the_format_cannot_hold(
    space_of: Callable[..., SearchSpace],
) -> None:
    space = space_of("transformers")
    assert len(space.choices) == 1 + 2 * 7
    assert labels(space, "layers.1.self_attn.k_proj") == {
        "rtn(bits=3,group_size=32)", "rtn(bits=4,group_size=16)", "rtn(bits=4,group_size=32)",
        "rtn(bits=8,group_size=0)+int_inputs(bits=8)", "base",
    }  # fmt: skip
    assert labels(space, "mlp.down_proj") == {"rtn(bits=8,group_size=0)"}
    assert space.n_dropped == 2 * (3 + 4)


def test_a_choice_that_loses_every_option_keeps_the_base(
    space_of: Callable[..., SearchSpace], base: BaseModel
) -> None:
    embedding = space_of("transformers").choices[0]
    assert [option.label for option in embedding.options] == ["base"]
    assert embedding.options[0].storage_bytes == embedding.base_bytes
    assert embedding.options[0].schemes == (Scheme(),)


ROTATED = """\
choices:
  - roles: [output, down]
    options:
      - base
      - transform: [hadamard]
        quantize: [{method: gptq, bits: [2, 3, 4, 6, 8], group_size: 32}]
      - transform: [hadamard]
        quantize: [{method: trellis, bits: [5]}]
  - roles: [embedding]
    optional: true
    options: ["hadamard+gptq(bits=4,group_size=32)", base]
"""


def test_openvino_keeps_every_width_of_a_rotated_basis_and_levels_for_trellis_codes(
    space_of: Callable[..., SearchSpace],
) -> None:
    space = space_of("openvino", ROTATED)
    for layer in ("layers.1.self_attn.o_proj", "layers.1.mlp.down_proj"):
        assert labels(space, layer) == {
            "base", *(f"hadamard+gptq(bits={bits},group_size=32)" for bits in (2, 3, 4, 6, 8)),
            "hadamard+gptq(bits=5,group_size=128)",
        }  # fmt: skip
    assert labels(space, "embed_tokens") == {"base", "hadamard+gptq(bits=4,group_size=32)"}
    with pytest.raises(SpaceError, match="without a transform, but got hadamard"):
        space_of("llama.cpp", ROTATED)


def test_openvino_keeps_low_rank_and_drops_rounded_inputs(
    space_of: Callable[..., SearchSpace],
) -> None:
    space = space_of("openvino")
    assert labels(space, "layers.1.self_attn.k_proj") == {
        "rtn(bits=3,group_size=32)", "rtn(bits=4,group_size=16)", "rtn(bits=4,group_size=32)",
        "svd(rank=4)", "base",
    }  # fmt: skip
    assert labels(space, "mlp.down_proj") == {"rtn(bits=8,group_size=0)", "wanda(sparsity=0.5)"}
    assert {o.label for o in space.choices[0].options} >= {"rtn(bits=4,group_size=32)"}


def test_vllm_ties_fused_layers_and_keeps_the_bits_and_groups_it_has_kernels_for(
    space_of: Callable[..., SearchSpace],
) -> None:
    space = space_of("vllm")
    qkv = next(c for c in space.choices if len(c.layers) == 3)
    assert {name.split(".")[-1] for name in qkv.layers} == {"q_proj", "k_proj", "v_proj"}
    assert {o.label for o in qkv.options} == {
        "rtn(bits=4,group_size=32)", "rtn(bits=8,group_size=0)+int_inputs(bits=8)", "base",
    }  # fmt: skip
    assert any(
        {n.split(".")[-1] for n in c.layers} == {"gate_proj", "up_proj"} for c in space.choices
    )


def test_a_file_that_splits_fused_layers_is_told_who_ties_them(
    space_of: Callable[..., SearchSpace],
) -> None:
    split = """\
ties: {qkv: false}
choices:
  - roles: [query]
    options: ["rtn(bits=4,group_size=32)"]
  - roles: [key, value]
    options: ["rtn(bits=8,group_size=32)"]
"""
    assert len(space_of("transformers", split).choices) == 6
    with pytest.raises(SpaceError, match="the target runs them as one"):
        space_of("vllm", split)


def test_a_space_that_loses_everything_is_an_error_with_an_example(
    space_of: Callable[..., SearchSpace],
) -> None:
    only_ranks = 'choices:\n  - roles: [output]\n    options: ["svd(rank=4)", base]\n'
    with pytest.raises(SpaceError, match=r"target vllm runs.*'mine'.*o_proj: .*svd.*--target any"):
        space_of("vllm", only_ranks)


def test_a_model_that_the_format_cannot_hold_is_told_which_targets_can(
    make_base: Callable[..., BaseModel],
) -> None:
    with pytest.raises(
        UsageError,
        match=r"^gguf, which the target llama\.cpp reads, cannot hold this model: .* Next step: "
        r"--target transformers or vllm or openvino, which can, or --target any and then export",
    ):
        space_for("llama.cpp", "quick", make_base("bert-encoder"))
    with pytest.raises(UsageError, match=r"openvino reads.* Next step: --target any and then"):
        space_for("openvino", "quick", make_base("t5"))


def test_a_target_whose_package_must_tell_what_it_holds_names_it(
    base: BaseModel, make_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"gguf.*pip install 'autocompress\[gguf\]'"):
        space_for("llama.cpp", "quick", base)
    with pytest.raises(UsageError, match=r"openvino reads.* Next step: --target any and then"):
        space_for("openvino", "quick", make_base("mixtral"))


def wide_layer(inputs: int) -> LayerSpec:
    name = "model.layers.0.self_attn.o_proj"
    return LayerSpec(name, "output", 0, 64, inputs, "linear", "bfloat16", name, 64 * inputs)


@pytest.mark.parametrize(
    ("target", "inputs", "left"),
    [
        ("transformers", 1024, {"4,group_size=128": 4.125, "4,group_size=64": 4.25}),
        ("transformers", 960, {"4,group_size=64": 4.25}),
        ("openvino", 960, {"4,group_size=64": 4.25}),
        ("vllm", 864, {"4,group_size=32": 4.5}),
        ("llama.cpp", 960, {"4,group_size=128": 4 + 16 * 8 / 960, "4,group_size=64": 4.25}),
        ("transformers", 1000, {}),
    ],
)
def test_groups_become_as_fine_as_the_rows_of_a_layer_want(
    tmp_path: Path, target: str, inputs: int, left: dict[str, float]
) -> None:
    layer = wide_layer(inputs)
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"{HEAD}choices:\n- roles: [output]\n  options:\n  - base\n  - rtn(bits=8,group_size=0)\n"
        "  - quantize: [{method: rtn, bits: 4, group_size: [128, 64]}]\n"
    )
    whole = load_space(str(path), [layer])
    space = restricted(whole, TARGETS[target], {layer.name: layer})
    grids = [o for o in space.choices[0].options if "bits=4" in o.label]
    assert {o.label for o in grids} == {f"rtn(bits={text})" for text in left}
    for option in grids:
        assert option.storage_bytes * 8 / layer.n_weights == left[option.label[9:-1]]
        assert option.schemes == (canonical(Scheme.parse(option.label)),)
    sizes = [o.storage_bytes for o in space.choices[0].options]
    assert sizes == sorted(sizes)
    assert space.n_dropped == 2 - len(left)


def test_an_unknown_target_is_answered_with_the_nearest(base: BaseModel) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'vllm'"):
        space_for("vlm", "quick", base)
    with pytest.raises(UsageError, match=r"Unknown --target 'vlm'\. Did you mean 'vllm'"):
        SearchSettings("m", target="vlm")


@pytest.mark.parametrize(
    ("changes", "scheme", "reason"),
    [
        ({"role": "head"}, "rtn(bits=4,group_size=32)", "output head"),
        ({}, "rtn(bits=6,group_size=32)", "bits 4 and 8, but got 6"),
        ({}, "rtn(bits=4,group_size=16)", "got 16. The nearest legal value is 32"),
        ({"in_features": 44}, "rtn(bits=4,group_size=0)", "44 inputs of 4 bits"),
        ({}, "rtn(bits=4,group_size=0,symmetric=false)", "symmetric must be true"),
        ({}, "rtn(bits=4,group_size=32)", ""),
        ({"in_features": 44}, "rtn(bits=8,group_size=0)+int_inputs(bits=8)", ""),
    ],
)
def test_vllm_refuses_by_its_own_rules(
    base: BaseModel, changes: dict, scheme: str, reason: str
) -> None:
    layer = replace(base.layout.layers[1], **changes)
    found = TARGETS["vllm"].refusal(layer, Scheme.parse(scheme))
    assert reason in found
    assert bool(reason) == bool(found)


@pytest.mark.parametrize("name", ["mixed_precision", "joint"])
@pytest.mark.parametrize("target", [t for t in TARGETS if t != "any"])
def test_every_allocation_of_a_restricted_space_can_be_exported(
    target: str, name: str, base: BaseModel
) -> None:
    space = space_for(target, name, base)
    layers = {layer.name: layer for layer in base.layout.layers}
    for choice in space.choices:
        for option in choice.options:
            for layer, scheme in zip(choice.layers, option.schemes, strict=True):
                assert TARGETS[target].refusal(layers[layer], scheme) == ""
    assert space.baselines()


def test_the_target_is_a_setting_that_a_resumed_study_keeps() -> None:
    settings = SearchSettings("m", target="vllm")
    assert SearchSettings.from_json(settings.to_json()) == settings
    older = {k: v for k, v in settings.to_json().items() if k != "target"}
    assert SearchSettings.from_json(older).target == "any"
    with pytest.raises(UsageError, match="target"):
        require_same_study(settings, SearchSettings("m"))
