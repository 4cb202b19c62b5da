"""Published allocators, re-implemented from their papers as samplers on our bank.

Importing this package registers them; scipy and scikit-learn are imported when one first solves.
"""

from autocompress.search.peers import amq, evopress, gradient_dp, gradient_lp, greedy_kl, hawq

__all__ = ["amq", "evopress", "gradient_dp", "gradient_lp", "greedy_kl", "hawq"]
