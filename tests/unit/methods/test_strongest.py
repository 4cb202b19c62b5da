import pytest

from autocompress.core import LayerSpec, Scheme
from autocompress.methods import METHODS, canonical, footprint, strongest


def layer(o=48, d=64):
    return LayerSpec("up", "up", 0, o, d, "linear", "bfloat16", "up", o * d)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("rtn(bits=3,group_size=16)", "quantease(bits=3,group_size=16)"),
        ("rtn(bits=4,symmetric=false)", "quantease(bits=4,symmetric=false)"),
        ("svd(rank=8)+rtn(bits=4)", "svd_llm(rank=8)+quantease(bits=4)"),
        ("magnitude(sparsity=0.5)+rtn(bits=4)", "wanda(sparsity=0.5)+quantease(bits=4)"),
        ("gptq(actorder=false,bits=2,damping=0.1)", "quantease(actorder=false,bits=2,damping=0.1)"),
        ("quantease(bits=2,rounds=9)", "quantease(bits=2,rounds=9)"),
    ],
)
def test_each_method_gives_way_to_its_stronger_one_at_the_same_bytes(scheme, expected):
    before, after = Scheme.parse(scheme), strongest(layer(), Scheme.parse(scheme))
    assert after == canonical(Scheme.parse(expected))
    assert footprint(layer(), before) == footprint(layer(), after)


def test_a_method_whose_stronger_one_stores_another_number_of_weights_stays():
    scheme = canonical(Scheme.parse("magnitude(sparsity=0.3)"))
    assert footprint(layer(), scheme) != footprint(layer(), Scheme.parse("wanda(sparsity=0.3)"))
    assert strongest(layer(), scheme) == scheme


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_stronger_method_is_of_the_same_kind_and_there_is_a_strongest(name):
    seen = [name]
    while stronger := METHODS[seen[-1]].stronger:
        assert METHODS[stronger].kind == METHODS[name].kind
        assert stronger not in seen
        seen.append(stronger)
