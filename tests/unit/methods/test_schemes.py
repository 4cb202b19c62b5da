import dataclasses

import pytest

from autocompress.core.errors import SchemeError, UnknownNameError
from autocompress.core.scheme import BASE_SCHEME, Scheme
from autocompress.methods import Needs, canonical, check, needs
from autocompress.testing.method_contract import example_layer

LAYER = dataclasses.replace(example_layer(36, 90).spec, name="model.layers.3.mlp.up_proj")


def test_defaults_are_spelled_out_so_that_equal_schemes_are_equal_values():
    short, long = Scheme.parse("rtn"), Scheme.parse("rtn(symmetric=true,bits=4,group_size=128)")
    assert canonical(short) == canonical(long) == long
    assert canonical(short).digest == canonical(long).digest


def test_the_base_scheme_is_canonical_and_fits_every_layer():
    assert canonical(BASE_SCHEME) == BASE_SCHEME
    check(LAYER, BASE_SCHEME)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base", Needs.NONE),
        ("magnitude", Needs.NONE),
        ("rtn", Needs.DIAGONAL),
        ("svd(rank=4)+wanda", Needs.DIAGONAL),
        ("magnitude+gptq", Needs.HESSIAN),
        ("svd_llm(rank=4)+rtn", Needs.HESSIAN),
    ],
)
def test_a_scheme_needs_the_most_that_any_of_its_stages_needs(text, expected):
    assert needs(Scheme.parse(text)) is expected


def test_stages_out_of_order_are_refused_with_the_right_order():
    with pytest.raises(SchemeError, match=r"Write wanda\(sparsity=0\.5\)\+gptq\("):
        canonical(Scheme.parse("gptq+wanda"))


def test_two_stages_of_a_kind_are_refused():
    with pytest.raises(SchemeError, match=r"at most one stage of each kind, but rtn and gptq"):
        canonical(Scheme.parse("rtn+gptq"))


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"Unknown compression method 'gtpq'.*'gptq'"):
        canonical(Scheme.parse("gtpq(bits=4)"))


def test_an_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(SchemeError, match=r"gptq has no option 'groupsize'.*'group_size'"):
        canonical(Scheme.parse("gptq(groupsize=4)"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtn(bits=4.5)", r"rtn: bits must be an integer, but got 4\.5"),
        ("rtn(bits=many)", r"rtn: bits must be an integer, but got 'many'"),
        ("rtn(bits=inf)", r"rtn: bits must be an integer, but got inf"),
        ("rtn(symmetric=2)", r"rtn: symmetric must be true or false, but got 2"),
        ("wanda(sparsity=half)", r"wanda: sparsity must be a number, but got 'half'"),
        ("wanda(sparsity=nan)", r"sparsity must be above 0 and below 1"),
        ("gptq(damping=nan)", r"damping must be above 0"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_by_name(text, message):
    with pytest.raises(SchemeError, match=message):
        canonical(Scheme.parse(text))


@pytest.mark.parametrize(
    ("loose", "strict"),
    [
        ("gptq(damping=1)", "gptq(damping=1.0)"),
        ("rtn(bits=4.0)", "rtn(bits=4)"),
        ("rtn(symmetric=0)", "rtn(symmetric=false)"),
    ],
)
def test_equal_values_mean_the_same_whatever_their_type(loose, strict):
    assert Scheme.parse(loose) == Scheme.parse(strict)
    assert str(canonical(Scheme.parse(loose))) == str(canonical(Scheme.parse(strict)))


@pytest.mark.parametrize(("rank", "nearest"), [(26, 25), (1000, 25)])
def test_a_rank_at_break_even_or_above_is_refused_with_the_layer_and_the_largest(rank, nearest):
    # 36 * 90 / (36 + 90) = 25.7
    with pytest.raises(
        SchemeError,
        match=rf"model\.layers\.3\.mlp\.up_proj \(36 x 90\).*break-even 25\.7.* got {rank} in "
        rf".*nearest legal value is {nearest}\.",
    ):
        check(LAYER, Scheme.parse(f"svd_llm(rank={rank})+gptq"))


def test_the_largest_rank_below_break_even_is_legal():
    check(LAYER, Scheme.parse("svd(rank=25)"))


def test_a_rank_exactly_at_break_even_is_refused():
    square = dataclasses.replace(LAYER, out_features=64, in_features=64)
    check(square, Scheme.parse("svd(rank=31)"))
    with pytest.raises(SchemeError, match=r"nearest legal value is 31"):
        check(square, Scheme.parse("svd(rank=32)"))


def test_a_layer_too_small_to_factorize_says_so():
    row = dataclasses.replace(LAYER, out_features=1, in_features=64)
    with pytest.raises(SchemeError, match=r"up_proj \(1 x 64\) is too small to factorize"):
        check(row, Scheme.parse("svd(rank=1)"))


def test_a_bad_option_is_refused_with_the_name_of_the_layer():
    with pytest.raises(SchemeError, match=r"Layer model\.layers\.3\.mlp\.up_proj: .*bits must be"):
        check(LAYER, Scheme.parse("rtn(bits=16)"))
