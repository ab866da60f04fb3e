import sys
from typing import ClassVar

import pytest

from ftlit.errors import ConfigError
from ftlit.rollout.verifiers import Contains, ExactMatch, FinalNumber, ask, final_number, resolve, verify
from ftlit.testing import VerifierSuite


class TestFinalNumber(VerifierSuite):
    columns: ClassVar = {"reference": ["3 + 4 = <<3+4=7>>7\n#### 7", "#### 1,234", "minus two: -2"]}
    right = ("So it is 7.", "In all $1234.00!", "It is -2")
    wrong = ("7 is not 8", "1.234", "2")

    def make(self):
        return FinalNumber()


class TestFinalNumberAsItIsWritten(VerifierSuite):
    columns: ClassVar = {"reference": ["−3/4", "1.5e3", "0.5", r"\boxed{-2}", "#### 7", "2 1/2"]}
    right = ("-0.75", "1,500", "50%", "so it is – 2, or −2", r"\boxed{7}, not 9", r"2\frac{1}{2}")
    wrong = ("3/4", "1.5", "50", "2", r"\boxed{9}, not 7", "1/2")

    def make(self):
        return FinalNumber()


class TestFinalNumberOfAColumn(VerifierSuite):
    columns: ClassVar = {"answer": [5, 2.5]}
    right = ("5", "2.50")
    wrong = ("", "none")

    def make(self):
        return FinalNumber(column="answer")


class TestContains(VerifierSuite):
    columns: ClassVar = {"reference": ["Nova", "北京"]}
    right = ("I am Nova!", "它是 北京 。")
    wrong = ("I am Novak.", "Peking")

    def make(self):
        return Contains()


class TestContainsNumbersAndChoices(VerifierSuite):
    columns: ClassVar = {"reference": ["1.5", "-5", "A", "北京", "C++"]}
    right = ("It is 1.5.", "(−5)", "The answer is A", "它是北京。", "C++, then")
    wrong = ("15", "5", "a cat", "它是南京。", "C")

    def make(self):
        return Contains()


class TestExactMatch(VerifierSuite):
    columns: ClassVar = {"reference": ["1.5", "A", "Vitamin A", "the cat", "-5"]}
    right = ("1.50", "(A)", "vitamin A.", "Cat", "−5")
    wrong = ("15", "the", "vitamin", "the dog", "5")

    def make(self):
        return ExactMatch()


class TestExactMatchAsWritten(VerifierSuite):
    columns: ClassVar = {"answer": ["Cat", 5]}
    right = (" Cat\n", "5")
    wrong = ("cat", "5.0")

    def make(self):
        return ExactMatch("answer", strict=True)


def shorter(prompts, completions, limit, **columns):
    return [float(len(text) < most) for text, most in zip(completions, limit, strict=True)]


class TestAFunction(VerifierSuite):
    columns: ClassVar = {"limit": [3, 5]}
    right = ("ab", "abcd")
    wrong = ("abc", "abcde")

    def make(self):
        return shorter


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("a 1 b 2.", 2),
        ("#### 18 of 20", 18),
        ("#### none, 18", 18),
        ("1,000,000", 1e6),
        ("12,34", 34),
        ("3-5", 5),
        ("it is -5", -5),
        ("x=-.5", -0.5),
        ("50%", 50),
        ("v1.2.3", 0.3),
        ("２０", 20),
        ("none", None),
        ("####", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_what_a_verifier_is_given_and_returns_is_checked():
    prompt = [{"role": "user", "content": "Hi"}]
    seen = []

    def check(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return (1 for _ in completions)

    assert verify(check, [prompt], ["a"], {"answer": [4]}) == [1.0]
    assert seen == [([prompt], ["a"], {"answer": [4]})]
    assert verify(lambda *args, **columns: [None], [prompt], ["a"], {}) == [None]
    for wrong, says in (
        ([1.0, 2.0], "a list of 1 numbers, got 2 values"),
        (1.0, "a list of 1 numbers, got float"),
        (None, "got NoneType"),
        (["good"], "must return numbers, got 'good'"),
        ([float("nan")], "returned nan for 'a'"),
    ):
        with pytest.raises(ConfigError, match=says):
            verify(lambda *args, _wrong=wrong, **columns: _wrong, [prompt], ["a"], {})


def test_a_function_is_given_what_it_names():
    prompts, columns = [[{"role": "user", "content": "Hi"}]], {"answer": [4], "reference": [None]}
    for function in (
        lambda completions, answer: [len(completions[0]) + answer[0]],
        lambda completions, **columns: [len(completions[0]) + columns["answer"][0]],
        lambda prompts, completions, answer, style="": [len(completions[0]) + answer[0]],
        lambda answer, completions, prompts: [len(completions[0]) + len(prompts) - 1 + answer[0]],
        lambda texts, answers, /, **columns: [len(answers[0]) + columns["answer"][0]],
        lambda *both, answer: [len(both[1][0]) + answer[0]],
    ):
        assert verify(function, prompts, ["abc"], columns) == [7.0]
    with pytest.raises(ConfigError, match=r"<lambda>: the rows have no column 'answr': did you mean 'answer'\?"):
        verify(lambda completions, answr: [0.0], prompts, ["abc"], columns)


def content_of(completion):
    return completion[0]["content"]


def test_who_expects_lists_of_turns_gets_them_or_is_told_what_completions_are():
    assert ask(lambda completions: [len(one[0]["content"]) for one in completions], [[]], ["good"], {}) == [4]
    with pytest.raises(TypeError) as error:  # its own code does not say what it reads
        ask(lambda completions: list(map(content_of, completions)), [[]], ["good"], {})
    assert "Say `completion` for `completion[0][...]`" in error.value.__notes__[1]
    with pytest.raises(TypeError) as error:
        ask(lambda completions: [one + 1 for one in completions], [[]], ["good"], {})
    assert len(error.value.__notes__) == 1


def test_missing_columns_are_one_sentence():
    with pytest.raises(ConfigError, match=r"no column 'answr': did you mean 'answer'\?"):
        verify(FinalNumber("answr"), [[]], ["1"], {"answer": ["1"]})
    with pytest.raises(ConfigError, match="'reference' of answer 2 is empty; end it with an assistant turn"):
        verify(Contains(), [[], []], ["1", "2"], {"reference": ["1", None]})
    with pytest.raises(ConfigError, match=r"answer 1 holds no number \('none'\)"):
        verify(FinalNumber(), [[]], ["1"], {"reference": ["none"]})


def test_resolve(tmp_path, monkeypatch):
    (tmp_path / "my_checks.py").write_text(
        "LIMIT = 3\ndef check(prompts, completions, **columns): return [1.0] * len(completions)\n"
        "class Check:\n    def __call__(self, prompts, completions, **columns): return [0.5] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_checks", raising=False)
    assert verify(resolve("my_checks.check"), [[]], ["a"], {}) == [1.0]
    assert verify(resolve("my_checks.Check"), [[]], ["a"], {}) == [0.5]
    own = FinalNumber()
    assert resolve(own) is own
    for name, says in (
        ("FinalNumbr", "did you mean 'FinalNumber'"),
        ("my_check.check", "no module 'my_check'"),
        ("my_checks.chekc", "did you mean 'check'"),
        ("my_checks.LIMIT", "is int and cannot be called"),
    ):
        with pytest.raises(ConfigError, match=says):
            resolve(name)
