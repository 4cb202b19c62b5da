"""Every method that layers share, put through its contract kit. A new one adds one row here."""

import pytest

from autocompress.methods import METHODS, Sharing
from autocompress.testing.method_contract import MethodExamples
from autocompress.testing.sharing_contract import SHARING_CONTRACT

EXAMPLES = {
    "autoencoder": MethodExamples(
        schemes=(
            "autoencoder(blocks=0/1/2,piece=8,latents=5,hidden=0,rounds=0,steps=2)",
            "autoencoder(blocks=0/1/2,piece=4,latents=5,steps=2)+eora(rank=3)+int_inputs",
        ),
        ladder=tuple(
            f"autoencoder(blocks=0/1/2,piece=2,latents={bits},steps=2)" for bits in (2, 4, 6)
        ),
        bad_options={
            "piece": "autoencoder(blocks=0/1,piece=1)",
            "latents": "autoencoder(blocks=0/1,latents=17)",
            "hidden": "autoencoder(blocks=0/1,hidden=-1)",
            "steps": "autoencoder(blocks=0/1,steps=-1)",
            "rounds": "autoencoder(blocks=0/1,rounds=-1)",
            "blocks": "autoencoder(blocks=4)",
        },
    ),
    "basis_sharing": MethodExamples(
        schemes=(
            "basis_sharing(blocks=0/1/2,rank=9)",
            "basis_sharing(blocks=0/1/2,rank=17)+gptq(bits=4,group_size=16,symmetric=false)",
            "basis_sharing(blocks=0/1/2,rank=8)+wanda(sparsity=0.5)+rtn+eora(rank=2)",
        ),
        ladder=tuple(f"basis_sharing(blocks=0/1/2,rank={rank})" for rank in (1, 4, 9, 17, 24)),
        bad_options={
            "rank": "basis_sharing(blocks=0/1/2,rank=0)",
            "blocks": "basis_sharing(blocks=1/0)",
        },
    ),
    "merged": MethodExamples(
        schemes=(
            "merged(experts=0/1/2)",
            "merged(experts=0/1/2,to=busiest)+gptq(bits=4,group_size=16)+eora(rank=3,bits=8)",
            "merged(experts=0/1/2)+svd_llm(rank=9)+rtn+eora(rank=2)+int_inputs",
        ),
        ladder=tuple(
            f"merged(experts=0/1/2)+rtn(bits=6)+eora(rank={r})" for r in (1, 4, 9, 17, 30)
        ),
        bad_options={"to": "merged(experts=0/1,to=last)", "experts": "merged(experts=4/1)"},
    ),
    "tied": MethodExamples(
        schemes=(
            "tied(blocks=0/1/2)",
            "tied(blocks=0/1/2,to=first)+gptq(bits=4,group_size=16)+eora(rank=3,bits=8)",
            "tied(blocks=0/1/2)+wanda(sparsity=0.5)+rtn(symmetric=false)+lq_lora(rank=2)",
            "tied(blocks=0/1/2)+svd_llm(rank=9)+rtn+eora(rank=2)+int_inputs",
        ),
        ladder=tuple(f"tied(blocks=0/1/2)+rtn(bits=6)+eora(rank={r})" for r in (1, 4, 9, 17, 30)),
        bad_options={"to": "tied(blocks=0/1,to=last)", "blocks": "tied(blocks=4)"},
    ),
}
SHARED = [name for name in METHODS if isinstance(METHODS[name], Sharing)]


def test_every_method_that_layers_share_is_covered():
    assert set(EXAMPLES) == set(SHARED)


@pytest.mark.parametrize("check", SHARING_CONTRACT.values(), ids=SHARING_CONTRACT)
@pytest.mark.parametrize("method", SHARED)
def test_sharing_contract(method, check):
    check(EXAMPLES[method])


@pytest.mark.parametrize("method", SHARED)
def test_every_shared_method_has_a_one_line_summary(method):
    assert METHODS[method].summary
    assert "\n" not in METHODS[method].summary
