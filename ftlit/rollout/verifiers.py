"""Verifiers: functions that say how good an answer is. The contract is that of a reward."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from typing_extensions import override

from ftlit.errors import ConfigError, nearest
from ftlit.metrics.numbers import answer_number
from ftlit.metrics.text import contains, exact_match
from ftlit.rollout.asking import Prompt, ask, finite, name_of, verify


class Verifier(ABC):
    """Scores answers. A function with the same arguments serves as well; a class can have settings in the YAML.

    A function is given what it names: `(completions, answer)` and `(completions, **columns)` will do, and
    `(completion, answer)`, which is asked row by row. It may be `async`. One that reads completions as lists of turns,
    as those written for TRL do, is given such: it is known by its annotation (`list[list[dict]]`), or by its error.

    `ftlit.testing.VerifierSuite` tests one in four lines.
    """

    @abstractmethod
    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        """Scores some answers.

        Args:
            prompts: The turns before each answer.
            completions: The answers as they were said, with all white space.
            columns: The columns of the rows (None where a row lacks one), under the names that they have and those that
                `data.columns` gives them; and `reference`: the answer that the row holds as its last assistant turn, or
                None; a column of that name wins. Besides `completion_ids`, the tokens of each answer with its end
                token; `truncated`, whether it was cut; `prefilled`, the text with which the chat template begins it,
                such as an open `<think>`.

        Returns:
            One finite number an answer, as a rule 1 for right and 0 for wrong; None where it does not apply.
        """


class FinalNumber(Verifier):
    r"""1 where the last number of the answer is the last number of the reference, as GSM8K is scored.

    What follows `####` counts where there is such a mark (Cobbe et al. 2021, arXiv:2110.14168), or what is in the last
    `\boxed{}`. Numbers are compared by value, however they are written: `-$1,234.50`, `−3/4`, `1.5e3`, `2½`; and 50%
    is 50 as well as 0.5. See `ftlit.metrics.numbers`.

    Args:
        column: Column with the reference; the row's own answer when left out.
    """

    def __init__(self, column: str = "reference") -> None:
        self.column = column

    @override
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        scores = []
        given = column_of(columns, self.column, "FinalNumber")
        for place, (text, reference) in enumerate(zip(completions, given, strict=True)):
            wanted, found = answer_number(str(reference)), answer_number(text)
            if wanted is None:
                raise ConfigError(
                    f"FinalNumber: column {self.column!r} of answer {place + 1} holds no number "
                    f"({str(reference)[:60]!r}); name another column."
                )
            scores.append(float(found is not None and found.same(wanted)))
        return scores


class Contains(Verifier):
    """1 where the answer contains a text as whole words, compared as `ftlit.metrics.text.normalize` does.

    That is in lower case and without punctuation, but with what makes a number another number: 1.5 is not in 15.

    Args:
        text: The text; the content of `column` when left out.
        column: Column with the text; the row's own answer when left out.
    """

    def __init__(self, text: str | None = None, column: str = "reference") -> None:
        self.text, self.column = text, column

    @override
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        if self.text is not None:
            wanted: Sequence[Any] = [self.text] * len(completions)
        else:
            wanted = column_of(columns, self.column, "Contains")
        return [float(contains(text, str(part))) for text, part in zip(completions, wanted, strict=True)]


class ExactMatch(Verifier):
    """1 where the answer is the reference, as the metric `exact_match` compares them.

    Args:
        column: Column with the reference; the row's own answer when left out.
        strict: Whether they are compared as written, but for white space around them.
    """

    def __init__(self, column: str = "reference", strict: bool = False) -> None:
        self.column, self.strict = column, strict

    @override
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        wanted = column_of(columns, self.column, "ExactMatch")
        return [exact_match(text, str(one), self.strict) for text, one in zip(completions, wanted, strict=True)]


def final_number(text: str) -> float | None:
    r"""The last number of a text, or the first after its last `####`, or that in its last box; None without one.

    Example:
        >>> final_number("48 + 24 = 72 clips.\n#### 1,072.0 (in all 3 months)")
        1072.0
        >>> final_number(r"So it is \boxed{-\frac{3}{4}}, not 4.")
        -0.75
    """
    found = answer_number(text)
    return None if found is None else found.decimal


def column_of(columns: Mapping[str, Sequence[Any]], name: str, verifier: str) -> Sequence[Any]:
    """A column that a verifier needs.

    Raises:
        ConfigError: If the rows do not have it, or one holds nothing in it.
    """
    if name not in columns:
        raise ConfigError(f"{verifier}: the rows have no column {name!r}: {nearest(name, columns)}")
    for place, value in enumerate(columns[name]):
        if value is None:
            hint = "end it with an assistant turn, or name a column" if name == "reference" else "fill it"
            raise ConfigError(f"{verifier}: column {name!r} of answer {place + 1} is empty; {hint}.")
    return columns[name]


def resolve(verifier: Verifier | str) -> Callable[..., Any]:
    """The function behind a `verifier:` setting.

    Args:
        verifier: A verifier, or the import path of a function or class such as `mymodule.check`.

    Raises:
        ConfigError: If there is no such thing.
    """
    if not isinstance(verifier, str):
        return verifier
    module, _, name = verifier.rpartition(".")
    if not module:
        known = [kind.__name__ for kind in Verifier.__subclasses__()]
        raise ConfigError(f"there is no verifier {verifier!r} ({nearest(verifier, known)} Or give mymodule.function.)")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"verifier {verifier!r}: there is no module {error.name!r}, neither installed nor in the working directory."
        ) from None
    found = getattr(loaded, name, None)
    if found is None:
        public = [word for word in vars(loaded) if not word.startswith("_")]
        raise ConfigError(f"verifier {verifier!r}: {module} has no {name!r}: {nearest(name, public)}")
    if isinstance(found, type):
        found = found()
    if not callable(found):
        raise ConfigError(f"verifier {verifier!r} is {type(found).__name__} and cannot be called; give a function.")
    return found


__all__ = [
    "Contains",
    "ExactMatch",
    "FinalNumber",
    "Prompt",
    "Verifier",
    "ask",
    "final_number",
    "finite",
    "name_of",
    "resolve",
    "verify",
]
