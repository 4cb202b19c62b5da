"""Reading space files: every mistake is one clear error that says where."""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml

from autocompress.core.errors import SpaceError, UnknownNameError
from autocompress.spaces import available_spaces, catalog, load_space, shipped_directory
from autocompress.spaces.catalog import find_space, read_space_file
from autocompress.spaces.schema import json_schema

ROOT = Path(__file__).parents[3]
SHIPPED = (
    "experts", "integer_inputs", "joint", "low_rank", "mixed_precision", "pruning", "quick",
    "sharing", "structure", "toolbox", "trellis",
)  # fmt: skip


def _read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    read_space_file(path)


HEAD = "schema_version: 1\nname: mine\ndescription: A test.\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "choices: [\n", r"mine\.yaml:5:1: .*line 5, column 1"),
        (HEAD + "choices:\n  - roles: [down\n    options: [base]\n", r"mine\.yaml:6:\d+: .*line 6"),
        (HEAD + "name: again\n", r"mine\.yaml:4: .*'name' is also on line 2"),
        ("", "must not be empty"),
        ("- 1\n", r"mine\.yaml:1: must be a mapping of keys to values, but got \[1\]"),
        (HEAD, "the key 'choices' is required"),
        (HEAD + "choices: []\n", r"mine\.yaml:4: choices: must not be empty"),
        (
            HEAD + "choices:\n- roles: [donw]\n  options: [base]\n",
            r"mine\.yaml:5: choices\[0\]\.roles\[0\]: unknown role 'donw'\. Did you mean 'down'",
        ),
        (
            HEAD + "choices:\n- roles: [down]\n  optoins: [base]\n",
            r"mine\.yaml:6: choices\[0\]\.optoins: unknown key 'optoins'\. Did you mean 'options'",
        ),
        (
            HEAD + "choices:\n- roles: [down]\n  options:\n  - quantise: [none]\n",
            r"mine\.yaml:7: choices\[0\]\.options\[0\]\.quantise: .*Did you mean 'quantize'",
        ),
        (
            HEAD + "choices:\n- roles: [down]\n  options:\n  - quantize: rtn(bits=4)\n",
            r"choices\[0\]\.options\[0\]\.quantize: must be a list, such as \[a, b\], but got 'rtn",
        ),
        (
            HEAD + "choices:\n- roles: [down]\n  options:\n  - quantize: [{method: rtn, g: {}}]\n",
            r"quantize\[0\]\.g: an option is a value or a list of values, but got \{\}",
        ),
        (
            HEAD + "choices:\n- roles: [down]\n  options:\n  - quantize: [{bits: 4}]\n",
            r"options\[0\]\.quantize\[0\]: the key 'method' is required",
        ),
        (
            HEAD + "choices:\n- options: [base]\n",
            r"mine\.yaml:5: choices\[0\]: needs at least one of roles, layers, blocks",
        ),
        (
            HEAD + "ties: {qvk: true}\nchoices:\n- roles: [down]\n  options: [base]\n",
            r"mine\.yaml:4: ties\.qvk: unknown key 'qvk'\. Did you mean 'qkv'",
        ),
        (
            HEAD + "ties: {qkv: 1}\nchoices:\n- roles: [down]\n  options: [base]\n",
            r"ties\.qkv: must be true or false, but got 1",
        ),
        (
            HEAD.replace("1", "2", 1) + "choices:\n- roles: [down]\n  options: [base]\n",
            r"mine\.yaml:1: schema_version: this version reads schema_version 1, but got 2",
        ),
        (HEAD + "choices: \x00\n", "mine.yaml: a space file is YAML text"),
    ],
)
def test_a_malformed_file_says_where_the_rule_and_the_nearest_right_answer(tmp_path, text, message):
    with pytest.raises(SpaceError, match=message) as caught:
        _read(tmp_path, text)
    assert "pydantic" not in str(caught.value)
    assert "validation error" not in str(caught.value)


def test_all_problems_of_a_file_are_shown_at_once(tmp_path):
    with pytest.raises(SpaceError) as caught:
        _read(tmp_path, HEAD + "tie: {}\nchoices:\n- roles: [donw]\n  options: []\n")
    assert len(str(caught.value).splitlines()) == 4  # three problems and the next step


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            "- roles: [cross_key]\n  options: [base]\n",
            r"mine\.yaml:5: choices\[0\]\.roles: .*none of cross_key does.*optional: true",
        ),
        (
            '- layers: ["*down_proj", "*down_prj"]\n  options: [base]\n',
            r"choices\[0\]\.layers\[1\]: .*'\*down_prj' matches none of 15\. "
            r"Did you mean '\*down_proj'",
        ),
        (
            '- layers: ["model.layers.*.mlp.donw_proj"]\n  options: [base]\n',
            r"Did you mean 'model\.layers\.\*\.mlp\.down_proj'",
        ),
        (
            "- blocks: [2]\n  options: [base]\n",
            r"choices\[0\]\.blocks\[0\]: a block is a number from -2 to 1, but got 2",
        ),
        (
            "- roles: [embedding]\n  blocks: [0]\n  options: [base]\n",
            r"choices\[0\]: .*no layer of the model meets all of its selectors",
        ),
        (
            "- roles: [down, up, gate]\n  options: [base]\n- roles: [down]\n  options: [base]\n",
            r"mine\.yaml:7: choices\[1\]: .*all 2 layers of this one belong to earlier choices",
        ),
        (
            "- roles: [query]\n  options: [base]\n- roles: [key, value]\n  options: [base]\n",
            r"mine\.yaml:7: choices\[1\]: ties\.qkv says that query, key and value .*qkv: false",
        ),
        (
            "- roles: [cross_key]\n  optional: true\n  options: [base]\n",
            r"mine\.yaml: a space must select at least one layer",
        ),
        (
            "- roles: [down]\n  options: [base, gptqq(bits=4)]\n",
            r"mine\.yaml:6: choices\[0\]\.options\[1\]: Unknown .*'gptqq'\. Did you mean 'gptq'",
        ),
        (
            "- roles: [down]\n  options: [gptq(bit=4)]\n",
            r"choices\[0\]\.options\[0\]: .*no option 'bit'.*Did you mean 'bits'",
        ),
        (
            "- roles: [down]\n  options:\n  - quantize: [{method: rtn, bits: [4, 9]}]\n",
            r"choices\[0\]\.options\[0\]: .*bits must be 2 to 8, but got 9",
        ),
        (
            "- roles: [down]\n  options: [gptq(bits=4,group_size=64)]\n",
            r"choices\[0\]\.options\[0\]: .*but got 'gptq\(bits=4'.*put quotes",
        ),
        (
            "- roles: [down]\n  options:\n  - sparsify: [gptq(bits=4]\n",
            r"choices\[0\]\.options\[0\]\.sparsify\[0\]: A stage is written",
        ),
        (
            "- roles: [down]\n  options:\n  - sparsify: [gptq(bits=4)]\n",
            r"options\[0\]\.sparsify: 'gptq' is a method of the kind 'quantize'",
        ),
        (
            "- roles: [down]\n  options: [svd(parameter_ratio=1.0)]\n",
            r"parameter_ratio is the share .* below 1 .*but got 1\.0",
        ),
        (
            '- roles: [down]\n  options: ["svd(parameter_ratio=0.5,rank=4)"]\n',
            "takes a rank or a parameter_ratio, but got both",
        ),
        (
            "- roles: [down]\n  options: [rtn(parameter_ratio=0.5)]\n",
            "parameter_ratio belongs to methods that factorize, but 'rtn'",
        ),
        (
            "- roles: [down]\n  options: [svd(rank=500)]\n",
            r"choices\[0\]\.options\[0\]: svd\(rank=500\) does not fit: .*down_proj",
        ),
        (
            "- roles: [down]\n  options: [rtn(bits=4)+svd(rank=4)]\n",
            r"choices\[0\]\.options\[0\]: The stages of a scheme come in the order",
        ),
    ],
)
def test_a_file_that_does_not_fit_the_model_or_the_methods_says_what_would(
    space_of, choices, message
):
    with pytest.raises(SpaceError, match=f"(?s){message}"):
        space_of(choices)


def test_an_optional_choice_may_select_nothing(space_of):
    space = space_of(
        "- roles: [cross_key]\n  optional: true\n  options: [base]\n"
        "- roles: [down]\n  options: [base, rtn(bits=4)]\n"
    )
    assert len(space.choices) == 2


def test_an_optional_choice_is_still_checked_for_methods_that_do_not_exist(space_of):
    with pytest.raises(SpaceError, match="gptqq"):
        space_of(
            "- roles: [cross_key]\n  optional: true\n  options: [gptqq]\n"
            "- roles: [down]\n  options: [base]\n"
        )


def test_an_unknown_space_names_the_nearest_and_says_how_to_give_a_file(layers):
    with pytest.raises(UnknownNameError, match=r"'jiont'\. Did you mean 'joint'.*\.yaml"):
        load_space("jiont", layers)
    with pytest.raises(UnknownNameError, match="Available: experts, integer_inputs, joint"):
        load_space("", layers)


def test_a_missing_an_unreadable_and_a_binary_file_are_clear_errors(tmp_path, layers):
    with pytest.raises(SpaceError, match=r"No such file.*one of: experts, integer_inputs, joint"):
        load_space(str(tmp_path / "none.yaml"), layers)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(SpaceError, match="must be readable"):
        load_space(str(tmp_path / "folder.yaml"), layers)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpaceError, match="UTF-8"):
        load_space(str(tmp_path / "bytes.yaml"), layers)


def test_the_shipped_spaces_are_listed_with_one_line_each():
    listed = available_spaces()
    assert tuple(listed) == SHIPPED
    assert all(line and "\n" not in line for line in listed.values())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_space_bears_the_name_of_its_file_and_obeys_the_json_schema(name):
    data = yaml.safe_load((ROOT / "search_spaces" / f"{name}.yaml").read_text())
    assert data["name"] == name
    jsonschema.validate(data, json.loads(json_schema()))
    assert f"[`{name}`]({name}.yaml)" in (ROOT / "search_spaces" / "README.md").read_text()


def test_the_example_of_the_readme_loads(tmp_path, layers):
    readme = (ROOT / "search_spaces" / "README.md").read_text()
    path = tmp_path / "example.yaml"
    path.write_text(readme.split("```yaml\n")[1].split("```")[0])
    space = load_space(str(path), layers)
    assert len(space.searched_layers) == 15
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(json_schema()))


def test_the_json_schema_refuses_what_the_loader_refuses():
    validator = jsonschema.Draft202012Validator(json.loads(json_schema()))
    data = yaml.safe_load((ROOT / "search_spaces" / "joint.yaml").read_text())
    assert validator.is_valid(data)
    assert not validator.is_valid({**data, "tie": {}})
    assert not validator.is_valid({**data, "schema_version": 2})
    assert not validator.is_valid({**data, "choices": [{"roles": ["donw"], "options": ["base"]}]})


def test_the_committed_json_schema_is_that_of_the_code():
    committed = files("autocompress.spaces").joinpath("space.schema.json").read_text()
    assert committed == json_schema(), (
        "Write autocompress.spaces.schema.json_schema() to space.schema.json."
    )


def test_an_installed_package_reads_its_own_copy_and_a_checkout_the_folder_at_the_top(
    tmp_path, monkeypatch
):
    assert shipped_directory() in (
        ROOT / "search_spaces",
        ROOT / "autocompress" / "spaces" / "shipped",
    )
    package = tmp_path / "site-packages" / "autocompress" / "spaces"
    (package / "shipped").mkdir(parents=True)
    monkeypatch.setattr(catalog, "files", lambda _: package)
    with pytest.raises(SpaceError, match="Install the package again"):
        shipped_directory()
    text = (ROOT / "search_spaces" / "quick.yaml").read_text()
    (package / "shipped" / "quick.yaml").write_text(text)
    assert shipped_directory() == package / "shipped"
    assert find_space("quick").spec.name == "quick"


def test_the_package_list_in_pyproject_is_the_tree_and_the_shipped_spaces():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tree = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "autocompress").rglob("*.*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sorted(settings["packages"]) == sorted(tree | {"autocompress.spaces.shipped"}), (
        "List the folder in [tool.setuptools] packages, or the wheel will lack it."
    )
    assert settings["package-dir"] == {"autocompress.spaces.shipped": "search_spaces"}
    assert settings["package-data"]["autocompress.spaces.shipped"] == ["*.yaml"]
