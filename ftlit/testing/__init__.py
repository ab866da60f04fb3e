"""Tools for tests, also for tests of extensions: tiny models, a tiny tokenizer, conformance suites."""

from ftlit.testing.tiny import FAMILIES, tiny_lm, tiny_tokenizer

__all__ = ["FAMILIES", "tiny_lm", "tiny_tokenizer"]
