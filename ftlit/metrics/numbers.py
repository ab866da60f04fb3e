r"""Numbers as people and models write them.

Signs of any shape (`-5`, `−5`), currency (`-$5`), thousands (`1,234`, `1'234`, `12,34,567`, `1{,}234`), decimals
(`.5`), exponents (`1.5e3`, `1.5 × 10^{3}`, `10³`), fractions (`3/4`, `\frac{3}{4}`, `1 3/4`, `1½`) and percent.
"""

from __future__ import annotations

import math
import re
import unicodedata
from fractions import Fraction
from typing import Any, NamedTuple

WIDE = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
"""Han with extensions and compatibility forms, kana; what a class of a regular expression holds."""

UNSPACED = WIDE + "\u0e00-\u0e7f\u0e80-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
"""The scripts that write no spaces: besides them Thai, Lao, Tibetan, Burmese, Khmer."""

# Where a minus sign is one: after a character of such a script, too, but not after a unit: "3元-5元" goes up to 5.
SIGN_PLACE = rf"(?<![^\W{UNSPACED}])" + "".join(rf"(?<!\d[{UNSPACED}]{{{unit}}})" for unit in (1, 2, 3))

_MOST_DIGITS = 1000  # more are no answer, and slow to compute with

# ---- one way to write what has several ------------------------------------------------------------------------------

_DASHES = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"
_SUPERSCRIPTS = {ord(c): n for c, n in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-", strict=True)}
_PLAIN: list[tuple[re.Pattern[str], Any]] = [
    (re.compile("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))"), ""),  # a space that separates thousands
    (re.compile("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])"), " "),  # 1½ is not 11/2
    (re.compile("(?<=[\\w)])([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)"), lambda found: "^" + found[1].translate(_SUPERSCRIPTS)),
    (re.compile(f"[{_DASHES}](?=\\s?[.\\d$€£¥₹\\\\])|(?<=\\d)[{_DASHES}]"), "-"),
]
_LATEX = [
    (re.compile(r"\\[!,;: ](?=\d{3}(?!\d))|\\!|\\left|\\right"), ""),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\times|\\cdot"), "×"),
    (re.compile(r"=\s*-\s+(?=[.\d$\\])"), "= -"),
]


def plain_numbers(text: str) -> str:
    """Text in Unicode's compatibility form, in which the numbers are what they were: `1½` is `1 1/2`, `10²` is `10^2`.

    A dash of any kind before or after a digit is `-`, and a superscript an exponent.

    Example:
        >>> plain_numbers("−5 or 1½, ２ × 10² m²")
        '-5 or 1 1/2, 2 × 10^2 m^2'
    """
    for pattern, instead in _PLAIN:
        text = pattern.sub(instead, text)
    return unicodedata.normalize("NFKC", text).replace("\u2044", "/")


# ---- reading --------------------------------------------------------------------------------------------------------

_DIGITS = r"(?:\d{1,3}(?:[,'’_]\d{3})+(?!\d)|\d{1,3}(?:,\d{2})+,\d{3}(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|(?<![^\W\d_])\.\d+)"  # of "Rs.50" the point is none of the number's
# A minus sign counts where it does not follow a number or a word: "3-5" ends in 5.
_SIGN = SIGN_PLACE.join((r"(?P<sign>(?<![.)\]}%])", r"-(?:\s*[$€£¥₹]\s*)?)?"))
_NUMBER = re.compile(
    rf"""{_SIGN}(?:
      (?P<whole>\d{{1,9}})?\s?\\frac\s*(?:\{{\s*(?P<above>-?{_DECIMAL})\s*\}}|(?P<one>\d))
                               \s*(?:\{{\s*(?P<below>-?{_DECIMAL})\s*\}}|(?P<other>\d))
    | (?P<ahead>\d{{1,9}})\s(?P<top>\d{{1,9}})/(?P<bottom>\d{{1,9}})(?!\s?/?\d)
    | (?<!\d/)(?P<over>{_DECIMAL})\s?/\s?(?P<under>{_DECIMAL})(?!\s?/\s?\d|[\w.]*\d)
    | (?P<mantissa>{_DECIMAL})(?:[eE](?P<exponent>[+-]?\d{{1,3}})(?![\w.]*\w)
                               |\s*[×*x\u00b7\u22c5]\s*10\s?(?:\^|\*\*)\s?\{{?\s?(?P<tens>[+-]?\d{{1,3}})\}}?)
    | (?P<base>{_DECIMAL})(?:\^|\*\*(?=\d))\{{?\s?(?P<power>[+-]?\d{{1,3}})\}}?
    | (?P<number>{_DECIMAL})
    )(?P<percent>\s?%|\s?percent\b)?""",
    re.VERBOSE,
)
# An exponent or an index is no number of its own: m^2, x_1, \log_{10}.
_RAISED = re.compile(r"(?:\^|[^\W\d_]_|\)_)\{?\s?[+-]?$")


class Number(NamedTuple):
    """A number in a text.

    Attributes:
        value: What it is as it stands, percent or not.
        percent: Whether a percent sign follows.
    """

    value: Fraction
    percent: bool = False

    @property
    def decimal(self) -> float:
        """The value in floating point."""
        try:
            return float(self.value)
        except OverflowError:
            return math.inf if self.value > 0 else -math.inf

    def same(self, other: Number) -> bool:
        """Whether both are one number: `50%` is 50 (its unit left out) and also 0.5."""
        if self.value == other.value or self.percent == other.percent:
            return self.value == other.value
        share, number = (self, other) if self.percent else (other, self)
        return share.value / 100 == number.value


def numbers_in(text: str) -> list[Number]:
    """Every number of a text, in its order."""
    text = plain_numbers(text)
    for pattern, instead in _LATEX:
        text = pattern.sub(instead, text)
    found = []
    for match in _NUMBER.finditer(text):
        if _RAISED.search(text, max(0, match.start() - 8), match.start()):
            continue
        value = _value(match)
        if value is not None:
            found.append(Number(-value if match["sign"] else value, match["percent"] is not None))
    return found


def _value(match: re.Match[str]) -> Fraction | None:
    """What a match stands for, without its sign."""
    if len(match[0]) > _MOST_DIGITS:
        return None
    if match["number"]:
        return _decimal(match["number"])
    if match["mantissa"]:
        return _decimal(match["mantissa"]) * Fraction(10) ** int(match["exponent"] or match["tens"])
    if match["base"]:
        base, power = _decimal(match["base"]), int(match["power"])
        return base**power if base or power >= 0 else None
    whole = match["whole"] or match["ahead"] or "0"
    above = match["above"] or match["one"] or match["top"] or match["over"]
    below = _decimal(match["below"] or match["other"] or match["bottom"] or match["under"])
    return Fraction(whole) + _decimal(above) / below if below else None


def _decimal(digits: str) -> Fraction:
    return Fraction(re.sub("[,'’_]", "", digits))


# ---- the answer -----------------------------------------------------------------------------------------------------

_BOXED = re.compile(r"\\(?:f?boxed|fbox)\s*\{")


def answer_number(text: str) -> Number | None:
    r"""The number that a text gives as its answer; None without one.

    The first number after the last `####`, or the last in the last `\boxed{...}`, whichever comes later; without such a
    mark, or a number there, the last number of the text.
    """
    before, mark, rest = text.rpartition("####")
    boxed = _last_box(text)
    places = []
    if mark:
        places.append((len(before), numbers_in(rest)[:1]))
    if boxed is not None:
        places.append((boxed[0], numbers_in(boxed[1])[-1:]))
    for _, found in sorted(places, key=lambda one: -one[0]):
        if found:
            return found[0]
    every = numbers_in(text)
    return every[-1] if every else None


def _last_box(text: str) -> tuple[int, str] | None:
    """Where the last box begins, and what is in it; one that was cut off has all that is left."""
    starts = list(_BOXED.finditer(text))
    if not starts:
        return None
    first = starts[-1].end()
    depth = 1
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return starts[-1].start(), text[first:place]
    return starts[-1].start(), text[first:]


__all__ = ["SIGN_PLACE", "UNSPACED", "WIDE", "Number", "answer_number", "numbers_in", "plain_numbers"]
