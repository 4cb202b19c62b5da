"""Content-addressed store of packed layer × option."""

from autocompress.bank.bank import Bank

__all__ = ["Bank"]
