"""The command line."""

from autocompress.cli.app import app, run

__all__ = ["app", "run"]
