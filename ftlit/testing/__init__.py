"""Tools for tests, also for tests of extensions: tiny models, a tiny tokenizer, conformance suites."""

from importlib import import_module
from typing import Any

from ftlit.testing.tiny import (
    ENCODERS,
    FAMILIES,
    tiny_classifier,
    tiny_comparisons,
    tiny_examples,
    tiny_lm,
    tiny_tokenizer,
)

__all__ = [
    "ENCODERS",
    "FAMILIES",
    "ForgettingControlSuite",
    "PEFTStrategySuite",
    "RowFormatSuite",
    "VerifierSuite",
    "tiny_classifier",
    "tiny_comparisons",
    "tiny_examples",
    "tiny_lm",
    "tiny_tokenizer",
]

_SUITES = {
    "ForgettingControlSuite": "control_suite",
    "PEFTStrategySuite": "strategy_suite",
    "RowFormatSuite": "row_format_suite",
    "VerifierSuite": "verifier_suite",
}


def __getattr__(name: str) -> Any:
    # The suites need pytest, which is not there at run time.
    if name in _SUITES:
        return getattr(import_module(f"ftlit.testing.{_SUITES[name]}"), name)
    raise AttributeError(f"module 'ftlit.testing' has no attribute {name!r}")
