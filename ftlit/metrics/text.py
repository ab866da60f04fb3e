"""Scores of generated text against a reference. Plain functions: answers are gathered whole from all ranks first.

Words are runs of letters, marks and digits; a character of a script that writes no spaces (Chinese, Japanese, Thai,
Lao, Tibetan, Burmese, Khmer) is a word of its own. Everything works offline.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from ftlit.metrics.numbers import SIGN_PLACE, UNSPACED, WIDE, plain_numbers

BleuTokenizer = Literal["13a", "zh", "intl", "char"]

_HAN = re.compile(f"[{WIDE}]")
_PIECES = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
_PUNCTUATION = frozenset(string.punctuation)

# An article stands before a word of its language: the A of "vitamin A", "A) Paris" and "A or B" is none.
_ARTICLES = re.compile(rf"\b(?:a|an|the)\b(?=\s+[^\w\s]*[^\W{UNSPACED}])(?!\s+(?:is|was|or|and|because|since)\b)")
# What belongs to a number, and what only stands beside it.
_THOUSANDS = re.compile(
    r"(?<!\d)(?<!\d[,.'’])(?:\d{1,3}(?:[,'’_]\d{3})+|\d{1,3}(?:,\d{2})+,\d{3})(?!\d|[,'’]\d|\.\d+[.,]\d)"
)
_SIGNED = re.compile(rf"(?:{SIGN_PLACE}-\$?)?(?:(?<!\w)\.)?\d+(?:[^\w\s]+\d+)*(?:e[+-]?\d+(?!\w))?|[a-z][+#]+(?!\w)")
_BETWEEN = re.compile(r"(?<=\d)[^\w\s]+(?=\d)")
_JOINS = frozenset("-./:^*+=<>")
_ZEROS = re.compile(r"(-?\d+)(?:\.0+|(\.\d*?[1-9])0+)")


def normalize(text: str, gap: str = "") -> str:
    """Text as SQuAD compares it: lower case, no punctuation, no English articles, single spaces.

    Rajpurkar et al. 2016, arXiv:1606.05250, with Unicode's own case folding, compatibility forms and punctuation.

    What makes a number another number stays: its sign, its decimal point, what stands between two numbers (`3-5`,
    `10:30`, `1/2`). Thousands separators and trailing zeros of a decimal go. So does what follows a letter in C++ and
    C# stay. An article is one only where a word follows.

    Args:
        text: The text.
        gap: What is put in the place of punctuation.

    Example:
        >>> normalize("The  Answer: 42!")
        'answer 42'
        >>> normalize("It's −1,250.50, not 125,050: a B.")
        'its -1250.5 not 125050 b'
    """
    folded = plain_numbers(text).casefold()
    folded = _ARTICLES.sub(" ", folded)
    folded = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), folded)
    kept, place = [], 0
    for found in _SIGNED.finditer(folded):
        kept += [_without_punctuation(folded[place : found.start()], gap), _number(found[0])]
        place = found.end()
    kept.append(_without_punctuation(folded[place:], gap))
    return " ".join("".join(kept).split())


def _without_punctuation(text: str, gap: str) -> str:
    return "".join(
        c if c not in _PUNCTUATION and not unicodedata.category(c).startswith("P") else "" if c in "'’" else gap
        for c in text
    )


def _number(text: str) -> str:
    """A number, or several that punctuation joins, in the one form that is compared."""
    text = text.replace("$", "", 1) if text.startswith("-$") else text
    text = f"0{text}" if text.startswith(".") else text.replace("-.", "-0.", 1) if text.startswith("-.") else text
    text = _BETWEEN.sub(lambda found: "".join(c for c in found[0] if c in _JOINS) or " ", text.replace("e+", "e"))
    plain = _ZEROS.fullmatch(text)
    return text if plain is None else plain[1] + (plain[2] or "")


def pieces(text: str) -> list[str]:
    """The words of a normalized text; a character of a script that writes no spaces is one of its own."""
    return _PIECES.findall(text)


def contains(text: str, part: str) -> bool:
    """Whether a text holds another, as whole words after `normalize`: 5 is not in 15, nor in -5 or 5.5.

    Words may be joined by punctuation (`answer=Paris`). Where the part is punctuation only, it is sought as written.
    """
    if not pieces(normalize(part)):
        return bool(part.strip()) and part.strip() in text
    for gap in ("", " "):
        ours, theirs = pieces(normalize(text, gap)), pieces(normalize(part, gap))
        if any(ours[place : place + len(theirs)] == theirs for place in range(len(ours) - len(theirs) + 1)):
            return True
    return False


def words(text: str) -> list[str]:
    """The words of a text in lower case; what is neither letter, mark nor digit separates them.

    On ASCII text these are the tokens of the `rouge_score` package without its stemmer.

    Example:
        >>> words("Don't, 北京2024!")
        ['don', 't', '北', '京', '2024']
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    spaced = "".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in folded)
    return _PIECES.findall(spaced)


def exact_match(answer: str, reference: str, strict: bool = False) -> float:
    """1 where the two are the same after `normalize` (`strict`: but for white space around them), else 0."""
    if strict:
        return float(answer.strip() == reference.strip())
    return float(normalize(answer) == normalize(reference))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words that both have, in `[0, 1]` (SQuAD's F1, arXiv:1606.05250).

    Two texts without a word are alike; a text without one and a text with one have nothing in common.
    """
    ours, theirs = pieces(normalize(answer)), pieces(normalize(reference))
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1(sum((Counter(ours) & Counter(theirs)).values()), len(ours), len(theirs))


def rouge_n(answer: str, reference: str, n: int) -> float:
    """F1 of the n-grams that both have, in `[0, 1]` (Lin 2004, https://aclanthology.org/W04-1013/)."""
    ours, theirs = Counter(_ngrams(words(answer), n)), Counter(_ngrams(words(reference), n))
    return _f1(sum((ours & theirs).values()), sum(ours.values()), sum(theirs.values()))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in `[0, 1]` (Lin 2004), over the whole text as one sentence."""
    ours, theirs = words(answer), words(reference)
    return _f1(_longest_common(ours, theirs), len(ours), len(theirs))


def bleu(answers: Sequence[str], references: Sequence[str], tokenize: BleuTokenizer | None = None) -> float:
    """Corpus BLEU-4 in `[0, 1]`, unsmoothed, tokenized as sacreBLEU does (Post 2018, arXiv:1804.08771).

    Args:
        answers: The texts.
        references: One reference each.
        tokenize: sacreBLEU's tokenizer; None: `zh` where a reference holds Chinese or Japanese, else `13a`.

    Returns:
        0 where no 4-gram is shared.
    """
    from torchmetrics.functional.text import sacre_bleu_score

    kind = tokenize or ("zh" if any(_HAN.search(text) for text in references) else "13a")
    if not any(text.strip() for text in answers) or not any(text.strip() for text in references):
        return 0.0
    return float(sacre_bleu_score(list(answers), [[text] for text in references], tokenize=kind))


def distinct_n(answers: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of all answers, in `[0, 1]` (Li et al. 2016, arXiv:1510.03055).

    Low where answers repeat themselves or each other. 0 where no answer has n words.
    """
    counts = Counter(gram for text in answers for gram in _ngrams(words(text), n))
    return len(counts) / max(1, sum(counts.values()))


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): a row of the table is one whole number."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


__all__ = [
    "BleuTokenizer",
    "bleu",
    "contains",
    "distinct_n",
    "exact_match",
    "normalize",
    "pieces",
    "rouge_l",
    "rouge_n",
    "token_f1",
    "words",
]
