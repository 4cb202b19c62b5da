from __future__ import annotations

import dataclasses

import pytest

from autocompress.core import BASE_ALLOCATION, BASE_SCHEME, Allocation, Scheme, Stage
from autocompress.core.errors import SchemeError


def test_a_stage_prints_its_options_sorted_by_name():
    stage = Stage.of("gptq", {"group_size": 64, "bits": 4, "symmetric": True, "damping": 0.01})
    assert str(stage) == "gptq(bits=4,damping=0.01,group_size=64,symmetric=true)"
    assert str(Stage.of("wanda")) == "wanda"


def test_a_stage_keeps_the_types_of_its_options():
    stage = Stage.parse("m(a=4,b=0.5,c=true,d=false,e=per_row,f=1e-3)")
    assert dict(stage.options) == {
        "a": 4, "b": 0.5, "c": True, "d": False, "e": "per_row", "f": 0.001,
    }  # fmt: skip
    assert [type(value) for _, value in stage.options] == [int, float, bool, bool, str, float]


@pytest.mark.parametrize(
    "text", [" svd_llm( rank = 96 ) + gptq( bits=4 ) ", "svd_llm(rank=96)+gptq(bits=4)"]
)
def test_spaces_in_a_scheme_do_not_matter(text):
    assert str(Scheme.parse(text)) == "svd_llm(rank=96)+gptq(bits=4)"


@pytest.mark.parametrize(
    "text", ["", "gptq(", "gptq)bits=4(", "4bit", "gptq(bits=4)x", "rtn+", "a(b(c=1))"]
)
def test_a_scheme_that_cannot_be_read_is_refused_with_an_example(text):
    with pytest.raises(SchemeError, match=r"Example: gptq\(bits=4,group_size=128\)"):
        Scheme.parse(text)


def test_an_option_without_a_value_is_named():
    with pytest.raises(SchemeError, match=r"name=value, but got 'bits' in 'gptq\(bits\)'"):
        Scheme.parse("gptq(bits)")


def test_the_base_scheme_is_empty_and_prints_as_base():
    assert str(BASE_SCHEME) == "base"
    assert BASE_SCHEME.is_base
    assert Scheme.parse(" base ") is BASE_SCHEME
    assert not Scheme.parse("rtn(bits=8)").is_base


def test_schemes_of_several_stages_keep_their_order():
    scheme = Scheme.parse("svd(rank=8)+wanda(sparsity=0.5)+rtn(bits=4)")
    assert [stage.method for stage in scheme.stages] == ["svd", "wanda", "rtn"]
    assert scheme.digest != Scheme.parse("rtn(bits=4)+wanda(sparsity=0.5)+svd(rank=8)").digest


def test_an_allocation_is_a_mapping_that_leaves_out_uncompressed_layers():
    rtn = Scheme.parse("rtn(bits=4)")
    allocation = Allocation.of({"b": rtn, "a": BASE_SCHEME, "c": rtn})
    assert list(allocation) == ["b", "c"]
    assert len(allocation) == 2
    assert allocation["b"] == rtn
    assert "a" not in allocation
    assert allocation.scheme("a") is BASE_SCHEME
    assert allocation.scheme("nowhere") is BASE_SCHEME
    assert allocation.to_json() == {"b": "rtn(bits=4)", "c": "rtn(bits=4)"}
    with pytest.raises(KeyError):
        allocation["a"]


def test_the_base_allocation_compresses_nothing():
    assert len(BASE_ALLOCATION) == 0
    assert Allocation.of({"a": BASE_SCHEME}) == BASE_ALLOCATION
    assert Allocation.from_json({}) == BASE_ALLOCATION


def test_equal_allocations_are_one_key():
    one = Allocation.from_json({"a": "rtn(bits=4)", "b": "wanda(sparsity=0.5)"})
    two = Allocation.from_json({"b": "wanda(sparsity=0.5)", "a": "rtn( bits=4 )"})
    assert {one: 1}[two] == 1
    assert one.digest == two.digest
    assert one.digest != Allocation.from_json({"a": "rtn(bits=4)"}).digest


def test_values_cannot_be_changed():
    for value, name in (
        (Stage.of("rtn"), "method"), (Scheme(), "stages"), (BASE_ALLOCATION, "items_"),
    ):  # fmt: skip
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
