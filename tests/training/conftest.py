"""Fixtures of this folder; the helpers that are not fixtures are imported by name."""

from conftest_training import adapted, base, rows, tokenizer

__all__ = ["adapted", "base", "rows", "tokenizer"]
