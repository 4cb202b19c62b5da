"""Content-addressed store of packed layer × option."""

from autocompress.bank.bank import DEFAULT_DENSE_BYTES, Bank

__all__ = ["DEFAULT_DENSE_BYTES", "Bank"]
