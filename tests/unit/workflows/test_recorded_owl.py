"""A study's record keeps OWL's baselines, so that a resume has the same ones."""

from autocompress.core import Scheme
from autocompress.spaces import Choice, Option, SearchSpace
from autocompress.workflows.owl import recorded_owl


def test_recorded_levels_mean_the_same_allocations_again():
    texts = [f"wanda(sparsity=0.{tenth})" for tenth in (7, 5, 3)]
    options = tuple(Option(text, (Scheme.parse(text),)) for text in texts)
    space = SearchSpace("s", "made up", tuple(Choice(n, (n,), options) for n in "ab"))
    ((name, allocation),) = recorded_owl({"owl_baselines": {"owl-50%-sparse": [0, 2]}}, space)
    assert name == "owl-50%-sparse"
    assert allocation == space.decode({"a": 0, "b": 2})
    assert recorded_owl({}, space) == ()
