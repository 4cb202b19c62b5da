"""A layer with correlated inputs, and what a scheme loses on it."""

import torch

from autocompress.core.scheme import Scheme
from autocompress.methods import LayerProblem, LayerStatistics, compress


def problem_of(o, d, n_tokens=1024, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, d, generator=generator)
    inputs = torch.randn(n_tokens, d, generator=generator)
    inputs = inputs @ torch.randn(d, d, generator=generator)
    return LayerProblem(weight, LayerStatistics(inputs.T @ inputs / n_tokens, n_tokens, "x"))


def loss_of(problem, text):
    compressed = compress(problem.weight, Scheme.parse(text), problem.statistics, problem=problem)
    return problem.loss(compressed.to_dense())
