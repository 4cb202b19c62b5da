"""Search spaces: which schemes each layer may take, read from YAML and resolved on a model."""

from autocompress.spaces.catalog import available_spaces, shipped_directory
from autocompress.spaces.load import load_space
from autocompress.spaces.match import READERS
from autocompress.spaces.space import Choice, Option, SearchSpace

__all__ = [
    "READERS",
    "Choice",
    "Option",
    "SearchSpace",
    "available_spaces",
    "load_space",
    "shipped_directory",
]
