"""Differentiable search: a distribution over the options of each choice, trained by gradients.

DNAS (Wu et al. 2018, arXiv 1812.00090) and AQ-BERT (Zhao et al. 2021, arXiv 2112.14938) search bit
widths by gradient descent through a Gumbel-softmax mixture of quantized weights. `mixture` is the
differentiable layer, `training` the descent, `sampler` what proposes trials from its results.
"""
