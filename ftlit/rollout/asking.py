"""How rewards and verifiers are asked: each is given what it names, in the way that it wants it.

A function names what it needs: `completions`, `prompts`, columns of the rows. One that names `completion` is asked row
by row. Completions are texts; who reads them as lists of turns, as TRL hands them, is given those. An `async` function
is awaited, all of them at once. None abstains.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import math
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import CodeType
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ftlit.errors import ConfigError, FtlitError, nearest

Prompt = list[dict[str, str]]
"""The turns before the answer: `[{"role": "user", "content": "..."}]`."""

# Who names one of these is called by name.
_NAMED = ("completions", "completion_ids")
# What is handed over beside the columns of the rows.
_BESIDE = ("reference", "completion_ids", "truncated", "prefilled")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Answers(NamedTuple):
    """What is asked about.

    Attributes:
        prompts: The turns before each answer, or a text.
        completions: The answers.
        columns: What else is known of each.
        where: What to call each in a message.
    """

    prompts: Sequence[Any]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    where: Sequence[str] = ()

    def row(self, place: int) -> Answers:
        """One answer alone."""
        columns = {name: [values[place]] for name, values in self.columns.items()}
        return Answers([self.prompts[place]], [self.completions[place]], columns, self.where[place : place + 1])

    def name(self, place: int) -> str:
        """What to call one in a message."""
        return self.where[place] if self.where else f"answer {place + 1}"


class Caller:
    """A reward or verifier, and how it is called.

    Args:
        function: It.

    Attributes:
        turns: Whether it is given completions as lists of turns.

    Raises:
        ConfigError: If it cannot be called with prompts and completions.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.name = function, name_of(function)
        try:
            self.parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # not written in Python
            self.parameters = [inspect.Parameter("more", inspect.Parameter.VAR_POSITIONAL)]
            self.parameters.append(inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD))
        names = {one.name for one in self.parameters if one.kind is not one.POSITIONAL_ONLY}
        self.each = "completion" in names and not names & {"completions", "completion_ids", "prompts"}
        self.named = self.each or bool(names & set(_NAMED))
        self.turns = any(
            one.name in ("completion", "completions") and "dict" in str(one.annotation).lower()
            for one in self.parameters
        )
        if not self.named:
            self._check_positional()

    def _check_positional(self) -> None:
        """Without names, prompts and completions come first."""
        first = [one.name for one in self.parameters if one.kind in _POSITIONAL]
        kinds = {one.kind for one in self.parameters}
        if not first and inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
            self.named = True
            return
        few = len(first) < 2 and inspect.Parameter.VAR_POSITIONAL not in kinds
        others = [name for name in first[:2] if name in _BESIDE] + [n for n in first[1:2] if n in ("prompt", "prompts")]
        if few or others:
            raise ConfigError(self._refusal(first))

    def _refusal(self, names: Sequence[str]) -> str:
        listed = ", ".join(names)
        return (
            f"reward {self.name}({listed}) names no completions, so that it would be called with the prompts and the "
            f"completions as its first two arguments; name what it reads: completions, prompts, columns of the rows."
        )

    def check(self, columns: Sequence[str]) -> None:
        """Checks that rows have what it names.

        Raises:
            ConfigError: If they do not, or if the first two arguments are columns and not prompts and completions.
        """
        positional = [] if self.named else [one for one in self.parameters if one.kind in _POSITIONAL][:2]
        if any(one.name in columns and one.kind is not one.POSITIONAL_ONLY for one in positional):
            raise ConfigError(self._refusal([one.name for one in self.parameters if one.kind in _POSITIONAL]))
        own = {"prompt", "completion"} if self.each else {"prompts", "completions"}
        for one in self.parameters:
            needed = one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
            if needed and one not in positional and one.name not in {*own, *columns}:
                raise ConfigError(f"{self.name}: the rows have no column {one.name!r}: {nearest(one.name, columns)}")

    def __call__(self, answers: Answers) -> Any:
        """What it says of some answers: a list, or something to be awaited that brings one."""
        self.check(list(answers.columns))
        if not self.each:
            return self._called(answers.prompts, answers.completions, answers.columns, "prompts", "completions")
        said = []
        for place, (prompt, completion) in enumerate(zip(answers.prompts, answers.completions, strict=True)):
            columns = {name: values[place] for name, values in answers.columns.items()}
            said.append(self._called(prompt, completion, columns, "prompt", "completion"))
        return _all_of(said) if any(map(inspect.isawaitable, said)) else said

    def _called(self, prompts: Any, completions: Any, columns: Mapping[str, Any], before: str, after: str) -> Any:
        if self.turns:
            completions = _as_turns(completions) if self.each else [_as_turns(text) for text in completions]
        elif not self.each:
            completions = list(completions)
        prompts = list(prompts) if isinstance(prompts, list | tuple) else prompts
        first = [] if self.named else [prompts, completions]
        given = {**columns, before: prompts, after: completions} if self.named else dict(columns)
        taken = 0 if self.named else 2
        parameters = [one for one in self.parameters if one.kind is not one.VAR_POSITIONAL]
        left = [one for one in parameters if one.kind in _POSITIONAL][taken:]
        left += [one for one in parameters if one.kind not in _POSITIONAL]
        if not any(one.kind is one.VAR_KEYWORD for one in left):
            given = {one.name: given[one.name] for one in left if one.name in given}
        return self.function(*first, **given)

    def expects_turns(self, error: BaseException) -> bool:
        """Whether an error is that of who reads a text as a list of turns: `text[0]["content"]`, `text[0].get`."""
        about = str(error)
        text_as_list = isinstance(error, TypeError) and "string indices" in about
        text_as_list |= isinstance(error, IndexError) and "string index" in about
        text_as_list |= isinstance(error, AttributeError) and about.startswith("'str' object has no attribute")
        return text_as_list and not self.turns and _mentions(_code(self.function), "content")


def _as_turns(text: str) -> Prompt:
    return [{"role": "assistant", "content": text}]


def _code(function: Any) -> CodeType | None:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not hasattr(function, "__code__"):
        function = getattr(type(function), "__call__", None)  # noqa: B004 - the method, not whether there is one
    return getattr(function, "__code__", None)


def _mentions(code: CodeType | None, word: str) -> bool:
    """Whether some code holds a word as a constant."""
    constants = () if code is None else code.co_consts
    return any(one == word or (isinstance(one, CodeType) and _mentions(one, word)) for one in constants)


def name_of(verifier: Callable[..., Any]) -> str:
    """What to call a reward or verifier."""
    if isinstance(verifier, functools.partial):
        return name_of(verifier.func)
    return str(getattr(verifier, "__name__", type(verifier).__name__))


# ---- asking ---------------------------------------------------------------------------------------------------------


def ask_all(callers: Sequence[Caller], asked: Sequence[Answers]) -> list[list[Any]]:
    """What each says of its answers; those that are awaited run at the same time.

    Args:
        callers: Whom to ask.
        asked: What each is asked about.

    Returns:
        A value an answer from each.

    Raises:
        ConfigError: If one wants a column that the rows do not have, or does not return a list with a value an answer.
    """
    said: list[Any] = [_attempt(caller, answers) for caller, answers in zip(callers, asked, strict=True)]
    waiting = [place for place, value in enumerate(said) if inspect.isawaitable(value)]
    for place, value in zip(waiting, _together([said[place] for place in waiting]), strict=True):
        said[place] = value
    return [_settled(*one) for one in zip(callers, asked, said, strict=True)]


def ask(
    verifier: Callable[..., Any],
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[Any]:
    """What one says of some answers, see `ask_all`."""
    return ask_all([Caller(verifier)], [Answers(prompts, completions, columns)])[0]


def _attempt(caller: Caller, answers: Answers) -> Any:
    """What a call brings, or the error that it raised."""
    try:
        return caller(answers)
    except Exception as error:  # a reward may raise anything
        return error


def _settled(caller: Caller, answers: Answers, said: Any) -> list[Any]:
    """The values; a function that turns out to read turns is asked again."""
    if isinstance(said, Exception) and caller.expects_turns(said):
        caller.turns = True
        again = _attempt(caller, answers)
        again = _together([again])[0] if inspect.isawaitable(again) else again
        if isinstance(again, Exception):
            caller.turns = False
        else:
            said = again
            say = f"note       reward {caller.name} reads completions as lists of turns, and is given those"
            rank_zero_only(print)(say, flush=True)
    if isinstance(said, Exception):
        raise _named(caller, answers, said)
    with contextlib.suppress(TypeError):
        said = list(said)
    if not isinstance(said, list) or len(said) != len(answers.completions):
        got = f"{len(said)} values" if isinstance(said, list) else type(said).__name__
        raise ConfigError(
            f"verifier {caller.name} must return a list of {len(answers.completions)} numbers, got {got}."
        )
    return said


def _named(caller: Caller, answers: Answers, error: Exception) -> Exception:
    """An error that says which reward raised it, and at which row: the first that alone raises one too."""
    place = None
    for one in range(len(answers.completions) if len(answers.completions) > 1 else 0):
        alone = _attempt(caller, answers.row(one))
        alone = _together([alone])[0] if inspect.isawaitable(alone) else alone
        if isinstance(alone, type(error)):
            place = one
            break
    place = 0 if len(answers.completions) == 1 else place
    if isinstance(error, FtlitError):
        return type(error)(f"{answers.where[place]}: {error}") if answers.where and place is not None else error
    at = "these answers together" if place is None else answers.name(place)
    text = "" if place is None else f": {answers.completions[place][:80]!r}"
    error.add_note(f"reward {caller.name} failed at {at}{text}")
    if "string indices" in str(error):
        error.add_note(
            "Completions are texts. Say `completion` for `completion[0][...]`, or annotate the argument "
            "`completions: list[list[dict]]` to be given lists of turns."
        )
    return error


# ---- what is awaited ------------------------------------------------------------------------------------------------


class _Loop:
    """An event loop that lives as long as the process: clients that a reward keeps are bound to theirs."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="ftlit rewards", daemon=True).start()


_running: list[_Loop] = []


def _together(waiting: Sequence[Awaitable[Any]]) -> list[Any]:
    """What each brings, or the error that it raised; all run at the same time, in a thread of their own."""
    if not waiting:
        return []
    if not _running or _running[0].process != os.getpid():
        _running[:] = [_Loop()]

    async def gathered() -> list[Any]:
        return await asyncio.gather(*waiting, return_exceptions=True)

    said = asyncio.run_coroutine_threadsafe(gathered(), _running[0].loop).result()
    for value in said:
        if isinstance(value, BaseException) and not isinstance(value, Exception):
            raise value
    return said


async def _all_of(said: Sequence[Any]) -> list[Any]:
    """Values of which some are awaited."""
    waiting = [place for place, value in enumerate(said) if inspect.isawaitable(value)]
    brought = dict(zip(waiting, await asyncio.gather(*(said[place] for place in waiting)), strict=True))
    return [brought.get(place, value) for place, value in enumerate(said)]


# ---- numbers --------------------------------------------------------------------------------------------------------


def verify(
    verifier: Callable[..., Any],
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    where: Sequence[str] = (),
) -> list[float | None]:
    """Calls a verifier and checks what it says.

    Raises:
        ConfigError: If that is not one finite number an answer, or None where it abstains.
    """
    answers = Answers(prompts, completions, columns, where)
    return finite(name_of(verifier), ask_all([Caller(verifier)], [answers])[0], answers)


def finite(name: str, values: Sequence[Any], answers: Answers) -> list[float | None]:
    """The values as numbers; None stays.

    Raises:
        ConfigError: If one is neither a finite number nor None.
    """
    return [None if value is None else number(name, value, answers, place) for place, value in enumerate(values)]


def number(name: str, value: Any, answers: Answers, place: int) -> float:
    """One value as a number.

    Raises:
        ConfigError: If it is no finite number.
    """
    at = f"{answers.where[place]}: " if answers.where else ""
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{at}verifier {name} must return numbers, got {value!r}; say None to abstain.") from None
    if not math.isfinite(found):
        text = answers.completions[place][:60]
        raise ConfigError(f"{at}verifier {name} returned {found} for {text!r}; give a number.")
    return found


__all__ = ["Answers", "Caller", "Prompt", "ask", "ask_all", "finite", "name_of", "number", "verify"]
