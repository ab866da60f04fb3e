import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text import rouge_score

from ftlit.metrics.text import bleu, contains, distinct_n, exact_match, normalize, rouge_l, rouge_n, token_f1, words


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Answer: 42!", "answer 42"),
        ("an apple a day", "apple day"),
        ("Theme and another", "theme and another"),  # articles are whole words
        ("  \n\t ", ""),
        ("", ""),
        ("Größe STRASSE straße", "grösse strasse strasse"),
        ("北京，是首都。", "北京是首都"),
        ("ＡＢＣ１２３", "abc123"),
        ("$1,000.50", "1000.5"),
        ("«Ça» – déjà‽", "ça déjà"),
        # what makes a number another one
        ("1.5", "1.5"),
        ("(3.14).", "3.14"),
        (".5 and -.5", "0.5 and -0.5"),
        ("5.00 or 1.50", "5 or 1.5"),
        ("10.0.0.1", "10.0.0.1"),
        ("−5, –5, -5, -$5 and $-5", "-5 -5 -5 -5 and -5"),
        ("3-5, 3–5 and $3-$5", "3-5 3-5 and 3-5"),
        ("10:30, 1/2 and 1½", "10:30 1/2 and 1 1/2"),
        ("1,2,3", "1 2 3"),
        ("12,34,567 and 1'234", "1234567 and 1234"),
        ("1.2e-5, 1.2E+5, 10² and 10^{-2}", "1.2e-5 1.2e5 10^2 and 10^-2"),
        ("x² m²", "x2 m2"),
        ("COVID-19, twenty-one, No.5, - 5", "covid19 twentyone no5 5"),
        # articles that are none
        ("A", "a"),
        ("The A", "a"),
        ("Vitamin A", "vitamin a"),
        ("A) a cat", "a cat"),
        ("A or B", "a or b"),
        ("The", "the"),
        ("C++, C# and C", "c++ c# and c"),
    ],
)
def test_normalize(text, plain):
    assert normalize(text) == plain


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop-me, 24/7", ["don", "t", "stop", "me", "24", "7"]),
        ("我爱 Python3！", ["我", "爱", "python3"]),
        ("カタカナとひらがな", list("カタカナとひらがな")),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # marks belong to their letters
        ("한국어 문장", ["한국어", "문장"]),
        ("🙂 !", []),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "loose", "strict"),
    [
        ("Paris", "Paris", 1, 1),
        (" Paris\n", "Paris", 1, 1),
        ("the paris.", "Paris", 1, 0),
        ("Paris, France", "Paris", 0, 0),
        ("北京。", "北京", 1, 0),
        ("", "", 1, 1),
        ("", "Paris", 0, 0),
        ("...", "", 1, 0),
        ("15", "1.5", 0, 0),
        ("5", "-5", 0, 0),
        ("314", "3.14", 0, 0),
        ("$29.00", "29", 1, 0),
        ("3-5", "35", 0, 0),
        ("1030", "10:30", 0, 0),
        ("the", "A", 0, 0),
        ("(a)", "A", 1, 0),
        ("Vitamin", "Vitamin A", 0, 0),
        ("C", "C++", 0, 0),
    ],
)
def test_exact_match(answer, reference, loose, strict):
    assert exact_match(answer, reference) == loose
    assert exact_match(answer, reference, strict=True) == strict


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("red green blue", "red blue", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("red red red", "red", 2 * (1 / 3) / (1 / 3 + 1)),  # a word counts as often as both have it
        ("red", "blue", 0),
        ("", "", 1),
        ("", "blue", 0),
        ("blue", "", 0),
        ("The blue!", "a BLUE", 1),
        ("我爱北京", "我爱南京", 3 / 4),
        ("it is 1.5", "it is 15", 2 / 3),
        ("กรุงเทพ", "กรุงไทย", 5 / 7),
    ],
)
def test_token_f1(answer, reference, f1):
    assert token_f1(answer, reference) == pytest.approx(f1, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "part", "inside"),
    [
        ("1.5", "15", False),
        ("答案是-5", "5", False),
        ("答案是-5", "-5", True),
        ("15", "1.5", False),
        ("It costs $1,234.50!", "1234.5", True),
        ("it is -5", "5", False),
        ("it is 5", "-5", False),
        ("it is −5", "-5", True),
        ("5.5 or 5-7", "5", False),
        ("x=5", "5", True),
        ("The answer is A.", "A", True),
        ("(A) Paris", "A", True),
        ("This is a tricky one: B", "A", False),
        ("它是北京。", "北京", True),
        ("東京タワー", "東京", True),
        ("กรุงเทพมหานคร", "กรุงเทพ", True),
        ("我用Python3写", "Python3", True),
        ("我用Python3写", "Python", False),
        ("I am Novak.", "Nova", False),
        ("answer=Paris", "paris", True),
        ("New-York", "New York", True),
        ("I can't", "can", False),
        ("It is C", "C++", False),
        ("a > b", ">", True),
        ("anything", "", False),
        ("", "x", False),
    ],
)
def test_contains(text, part, inside):
    assert contains(text, part) == inside


def test_rouge_by_hand():
    answer, reference = "the cat sat on mat", "the cat lay on the mat"
    assert rouge_n(answer, reference, 1) == pytest.approx(2 * 4 / (5 + 6))  # the, cat, on, mat
    assert rouge_n(answer, reference, 2) == pytest.approx(2 * 1 / (4 + 5))  # the cat
    assert rouge_l(answer, reference) == pytest.approx(2 * 4 / (5 + 6))  # the cat on mat
    assert rouge_l("北京是首都", "南京是古都") == pytest.approx(2 * 3 / 10)  # 京是都
    for empty in (("", "a b"), ("a b", ""), ("", ""), ("!", "?")):
        assert rouge_l(*empty) == rouge_n(*empty, 1) == 0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000))
def test_rouge_equals_torchmetrics_on_ascii(seed):
    random.seed(seed)
    answer, reference = (
        " ".join(random.choice(["a", "the", "cat,", "Dog", "x-y", "7"]) for _ in range(random.randint(0, 70)))
        for _ in range(2)
    )
    theirs = rouge_score(answer, reference, rouge_keys=("rouge1", "rouge2", "rougeL"))
    ours = (rouge_n(answer, reference, 1), rouge_n(answer, reference, 2), rouge_l(answer, reference))
    for one, key in zip(ours, ("rouge1", "rouge2", "rougeL"), strict=True):
        assert one == pytest.approx(float(theirs[f"{key}_fmeasure"]), abs=1e-6)


def test_bleu_by_hand():
    # Of 7 / 6 / 5 / 4 n-grams 6 / 5 / 4 / 3 are in the reference; the answer is longer, so there is no penalty.
    precisions = [6 / 7, 5 / 6, 4 / 5, 3 / 4]
    expected = math.exp(sum(map(math.log, precisions)) / 4)
    assert bleu(["the cat sat on the mat now"], ["the cat sat on the mat"]) == pytest.approx(expected, abs=1e-6)
    # Corpus, not the mean of sentences: counts are added before they are divided, and the penalty is that of the whole.
    answers, references = ["a b c d", "e f g h i"], ["a b c d z z", "e f g h i"]
    assert bleu(answers, references) == pytest.approx(math.exp(1 - 11 / 9), abs=1e-6)
    assert bleu(["我是中国人民的儿子"], ["我是中国人民的女儿"]) == pytest.approx(
        math.exp(sum(map(math.log, [8 / 9, 6 / 8, 5 / 7, 4 / 6])) / 4), abs=1e-6
    )


@pytest.mark.parametrize(("answers", "references"), [([""], ["a"]), (["a"], [""]), (["", ""], ["", ""]), ([], [])])
def test_bleu_of_nothing_is_0(answers, references):
    assert bleu(answers, references) == 0


def test_bleu_tokenizes_punctuation():
    assert bleu(["Yes, it is so."], ["Yes , it is so ."]) == 1
    assert bleu(["abcdef"], ["abcdex"]) == 0
    assert bleu(["abcdef"], ["abcdex"], tokenize="char") == pytest.approx(
        (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25, abs=1e-6
    )


def test_distinct():
    assert distinct_n(["a b a b"], 1) == 2 / 4
    assert distinct_n(["a b a b"], 2) == 2 / 3
    assert distinct_n(["a b", "A b!"], 2) == 1 / 2  # over all answers together
    assert distinct_n(["我我你"], 1) == 2 / 3
    assert distinct_n(["", "a"], 2) == 0
    assert distinct_n([], 1) == 0


@given(st.text(max_size=40), st.text(max_size=40))
def test_scores_of_any_text_are_shares(answer, reference):
    for score in (exact_match, token_f1, rouge_l):
        assert 0 <= score(answer, reference) <= 1
        assert score(answer, reference) == pytest.approx(score(reference, answer))
    assert exact_match(answer, answer) == token_f1(answer, answer) == 1
    assert rouge_l(answer, answer) == bool(words(answer))
