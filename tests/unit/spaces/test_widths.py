"""Fewer neurons or heads in parts of blocks: what a space writes, and what each layer is given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autocompress.core import Scheme
from autocompress.core.errors import SpaceError
from autocompress.methods import (
    LayerProblem,
    LayerStatistics,
    compress,
    reader,
    unread_rows,
)
from autocompress.models import describe, overridden, weight_matrix
from autocompress.models.experts import separate_experts
from autocompress.spaces import load_space
from autocompress.testing.tiny_models import FAMILIES, tiny_batches, tiny_model

TIES = "ties: {sublayers: true}\n"
NARROW = """
  - roles: [query, key, value, qkv, output, gate, up, gate_up, down, cross_query, cross_key, cross_value, cross_output]
    optional: true
    options:
      - base
      - width: [{method: magnitude_sp, keep_ratio: 0.5}]
"""  # noqa: E501


def test_neurons_are_chosen_by_the_layer_that_reads_them(space_of):
    feed_forward = space_of(NARROW, TIES).choices[1]
    assert feed_forward.layers[-1].endswith("down_proj")
    narrow = feed_forward.options[0].schemes
    assert list(map(str, narrow)) == [
        "magnitude_sp(by=mlp.down_proj,keep=64,of=128)",
        "magnitude_sp(by=mlp.down_proj,keep=64,of=128)",
        "magnitude_sp(keep=64,of=128)",
    ]
    assert all(
        reader(name, scheme) in {None, feed_forward.layers[-1]}
        for name, scheme in zip(feed_forward.layers, narrow, strict=True)
    )
    assert feed_forward.options[0].storage_bytes == feed_forward.base_bytes // 2 + 3 * 128 // 8


def test_one_width_for_all_blocks_is_a_span(space_of):
    (feed_forward,) = space_of(
        NARROW.replace("    optional: true\n", "    optional: true\n    span: 9\n"), TIES
    ).choices[1:]
    narrow = dict(zip(feed_forward.layers, feed_forward.options[0].schemes, strict=True))
    assert len(narrow) == 6
    for name, scheme in narrow.items():
        by = reader(name, scheme)
        assert (
            by is None
            if "down" in name
            else by == name.replace("gate", "down").replace("up_", "down_")
        )
        assert "keep=64,of=128" in str(scheme)


def with_heads(layers, queries, keys):
    heads = {"query": queries, "output": queries, "key": keys, "value": keys}
    return [replace(layer, heads=heads.get(layer.role)) for layer in layers]


@pytest.mark.parametrize(
    ("queries", "keys", "expected"),
    [
        (4, 4, ["keep=2,of=4"] * 4),  # every head has its own keys
        (4, 2, ["keep=1,of=2"] * 4),  # two queries go with each
        (4, 1, ["keep=2,of=4", None, None, "keep=2,of=4"]),  # all queries share the keys
    ],
)
def test_heads_go_with_the_keys_that_they_alone_read(space_of, layers, queries, keys, expected):
    model = with_heads(layers, queries, keys)
    schemes = space_of(NARROW, TIES, model).choices[0].options[0].schemes
    found = [str(s) if not s.is_base else None for s in schemes]
    for text, counts in zip(found, expected, strict=True):
        assert (text is None) == (counts is None)
        assert text is None or counts in text


def test_a_model_that_does_not_tell_its_heads_keeps_them(space_of):
    found = space_of(NARROW, TIES)
    assert [option.label for option in found.choices[0].options] == ["base"]
    assert found.n_dropped == 2


@pytest.mark.parametrize(
    ("width", "ratio", "kept"), [(1536, 0.75, 1152), (1536, 0.7, 1088), (100, 0.5, 50), (7, 0.9, 6)]
)
def test_widths_are_multiples_of_64_where_that_leaves_a_choice(
    space_of, layers, width, ratio, kept
):
    sizes = {"gate": (width, 64), "up": (width, 64), "down": (64, width)}
    model = [
        replace(x, out_features=sizes[x.role][0], in_features=sizes[x.role][1])
        if x.role in sizes
        else x
        for x in layers
    ]
    text = NARROW.replace("0.5", str(ratio))
    narrow = space_of(text, TIES, model).choices[1].options[0]
    assert str(narrow.schemes[-1]) == f"magnitude_sp(keep={kept},of={width})"


@pytest.mark.parametrize(
    ("written", "ties", "message"),
    [
        ("{method: ziplm}", TIES, r"keep_ratio is the share.*but got None.*keep_ratio: 0\.75"),
        ("{method: ziplm, keep_ratio: 1}", TIES, "above 0 and below 1, but got 1"),
        ("{method: ziplm, keep_ratio: 0.5, keep: 3}", TIES, "also got keep. Leave keep out"),
        ("{method: ziplm, keep_ratio: 0.5}", "", r"ties\.sublayers is false.*sublayers: true"),
        ("{method: gptq, bits: 4}", TIES, "gptq.*kind 'quantize'.*Write it under `quantize:`"),
        ("{method: ziplm, keep_ratio: 0.5, rank: 3}", TIES, "no option 'rank'"),
    ],
)
def test_what_no_part_could_take_is_refused_at_its_place(space_of, written, ties, message):
    text = f"\n  - roles: [gate, up, down]\n    options:\n      - width: [{written}]\n"
    with pytest.raises(SpaceError, match=rf"(?s)mine\.yaml.*{message}"):
        space_of(text, ties)


def test_a_layer_in_no_part_of_a_block_is_refused(space_of):
    text = NARROW.replace("roles: [", "roles: [embedding, ")
    with pytest.raises(SpaceError, match=r"'model\.embed_tokens' \(role embedding\) is in none"):
        space_of(text, TIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_that_go_were_read_by_the_inputs_that_go_alone(family, tmp_path):
    """With the reader's columns gone, it makes no difference whether the others' rows are.

    Seen in forwards: of every architecture the heads and neurons are where the space says.
    """
    model = tiny_model(family).eval()
    separate_experts(model)
    layout = describe(model)
    path = tmp_path / "narrow.yaml"
    path.write_text(f"schema_version: 1\nname: n\ndescription: d\n{TIES}choices:\n{NARROW}")
    chosen = {
        name: scheme
        for choice in load_space(str(path), layout.layers).choices
        for name, scheme in zip(choice.layers, choice.options[0].schemes, strict=True)
        if not scheme.is_base
    }
    readers = {name for name, scheme in chosen.items() if reader(name, scheme) is None}
    assert readers
    assert readers != set(chosen)
    cut, whole = {}, {}
    for name, scheme in chosen.items():
        cut[name], unread = narrowed(model, layout, name, scheme)
        if name in readers:
            whole[name] = cut[name]
        else:  # only the outputs that go may change
            assert unread.any()
    batch = tiny_batches(family, n_batches=1, batch_size=2, length=12)[0]
    with torch.no_grad():
        with overridden(model, layout, whole):
            expected = model(**batch)[-1 if family == "bert-encoder" else "logits"]
        with overridden(model, layout, cut):
            found = model(**batch)[-1 if family == "bert-encoder" else "logits"]
        before = model(**batch)[-1 if family == "bert-encoder" else "logits"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, before, rtol=1e-5, atol=1e-6)


def narrowed(model, layout, name, scheme: Scheme):
    """The matrix of a layer without its units, and its outputs that are gone."""
    weight = weight_matrix(model, layout.layer(name))
    by = reader(name, scheme)
    read = None
    if by is not None:
        read = LayerProblem(weight_matrix(model, layout.layer(by)), LayerStatistics.none())
    found = compress(weight, scheme, LayerStatistics.none(), reader=read)
    return found.to_dense(), unread_rows(found.tensors, found.scheme, found.shape)
