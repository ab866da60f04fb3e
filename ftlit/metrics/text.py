"""Scores of generated text against a reference. Plain functions: answers are gathered whole from all ranks first.

Words are runs of letters, marks and digits; a Chinese or Japanese character is a word of its own, as those scripts
write no spaces. Everything works offline.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal

BleuTokenizer = Literal["13a", "zh", "intl", "char"]

# Han with extensions and compatibility forms, kana.
_WIDE = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_HAN = re.compile(f"[{_WIDE}]")
_PIECES = re.compile(rf"[{_WIDE}]|[^\s{_WIDE}]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normalize(text: str) -> str:
    """Text as SQuAD compares it: lower case, no punctuation, no English articles, single spaces.

    Rajpurkar et al. 2016, arXiv:1606.05250, with Unicode's own case folding, compatibility forms and punctuation.

    Example:
        >>> normalize("The  Answer: 42!")
        'answer 42'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(c for c in folded if c not in _PUNCTUATION and not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", kept).split())


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
    ours, theirs = _PIECES.findall(normalize(answer)), _PIECES.findall(normalize(reference))
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


__all__ = ["BleuTokenizer", "bleu", "distinct_n", "exact_match", "normalize", "rouge_l", "rouge_n", "token_f1", "words"]
