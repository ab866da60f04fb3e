"""Tools for tests, also for tests of extensions: tiny models, a tiny tokenizer, conformance suites."""

from typing import Any

from ftlit.testing.tiny import FAMILIES, tiny_examples, tiny_lm, tiny_tokenizer

__all__ = ["FAMILIES", "PEFTStrategySuite", "RowFormatSuite", "tiny_examples", "tiny_lm", "tiny_tokenizer"]


def __getattr__(name: str) -> Any:
    # The suites need pytest, which is not there at run time.
    if name in ("PEFTStrategySuite", "RowFormatSuite"):
        from ftlit.testing import row_format_suite, strategy_suite

        return getattr(strategy_suite if name == "PEFTStrategySuite" else row_format_suite, name)
    raise AttributeError(f"module 'ftlit.testing' has no attribute {name!r}")
