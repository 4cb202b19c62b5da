"""Every export format, registered by import. Imports no torch."""

from __future__ import annotations

from autocompress.export import compressed_tensors, gguf, openvino  # noqa: F401
from autocompress.export.exporter import EXPORTERS

__all__ = ["EXPORTERS"]
