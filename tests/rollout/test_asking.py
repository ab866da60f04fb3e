"""Rewards as others write them: TRL's own, and functions of the shapes that public code has."""

import asyncio
import functools
import re
import traceback

import pytest
import torch

from ftlit.errors import ConfigError
from ftlit.rollout.asking import Answers, Caller, ask, ask_all, verify
from ftlit.rollout.rewards import Rewards
from ftlit.rollout.verifiers import FinalNumber

PROMPTS = [[{"role": "user", "content": "2 + 2?"}], [{"role": "user", "content": "3 + 3?"}]]
TEXTS = ["<think>\nTwo and two\n</think>\n4", "6"]
IDS = [[1, 2, 3, 4], [5, 5, 5, 5, 5, 5]]
COLUMNS = {"solution": ["4", "6"], "completion_ids": IDS, "truncated": [False, True], "reference": [None, None]}


# ---- as TRL hands them ----------------------------------------------------------------------------------------------


def test_rewards_of_trl_run_as_they_are():
    trl = pytest.importorskip("trl.rewards")
    made = {
        trl.think_format_reward: [1.0, 0.0],
        trl.get_soft_overlong_punishment(max_completion_len=6, soft_punish_cache=4): [-0.5, -1.0],
        trl.get_repetition_penalty_reward(ngram_size=2): [0.0, -0.8],
    }
    for function, expected in made.items():
        assert ask(function, PROMPTS, TEXTS, COLUMNS) == pytest.approx(expected)
        assert ask(function, PROMPTS, TEXTS, COLUMNS) == pytest.approx(
            function(prompts=PROMPTS, completions=[[{"role": "assistant", "content": t}] for t in TEXTS], **COLUMNS)
        )


def format_reward(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*</think>", text, re.DOTALL) else 0.0 for text in contents]


def accuracy_reward(completions: list[list[dict[str, str]]], solution: list[str], **kwargs):
    return [float(one[0]["content"].endswith(right)) for one, right in zip(completions, solution, strict=True)]


def cosine(longest):
    def cosine_scaled_reward(completions, solution, **kwargs):
        said = [one[-1]["content"] for one in completions]
        return [len(text) / longest for text, _ in zip(said, solution, strict=True)]

    return cosine_scaled_reward


async def code_reward(completions, num_parallel=1, **kwargs):
    await asyncio.sleep(0)
    return [float(len(one[0]["content"])) for one in completions]


class Judge:
    async def __call__(self, prompts, completions, **kwargs):
        return [float(text == "6") for text in completions]


class Rubric:
    """As environments of several turns have it: one row at a time."""

    def exact(self, completion, answer):
        return float(completion[-1]["content"] == answer)

    async def judged(self, prompt, completion, answer, **kwargs):
        return float(prompt[-1]["content"].startswith("3") and completion == answer)


def plain_names(texts, answers, *, solution):
    return [float(text == right) for text, right in zip(answers, solution, strict=True)]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (format_reward, [1.0, 0.0]),
        (accuracy_reward, [1.0, 1.0]),
        (cosine(10), [len(TEXTS[0]) / 10, 0.1]),
        (functools.partial(code_reward, num_parallel=2), [float(len(TEXTS[0])), 1.0]),
        (Judge(), [0.0, 1.0]),
        (lambda completions, **kwargs: torch.tensor([0.25, 0.5]), [0.25, 0.5]),
        (lambda **kwargs: [float(len(text)) for text in kwargs["completions"]], [float(len(TEXTS[0])), 1.0]),
        (lambda completion, solution: float(completion == solution), [0.0, 1.0]),
        (lambda completion, truncated, prompt="": truncated, [False, True]),
        (Rubric().exact, [0.0, 1.0]),
        (Rubric().judged, [0.0, 1.0]),
        (plain_names, [0.0, 1.0]),
        (lambda completions: [None, 1.0], [None, 1.0]),
    ],
)
def test_functions_of_public_shapes(function, expected):
    columns = {**COLUMNS, "answer": COLUMNS["solution"]}
    assert verify(function, PROMPTS, TEXTS, columns) == expected


def test_who_reads_turns_is_found_out_once(capsys):
    caller = Caller(format_reward)
    answers = Answers(PROMPTS, TEXTS, COLUMNS)
    for _ in range(2):
        assert ask_all([caller], [answers]) == [[1.0, 0.0]]
    assert capsys.readouterr().out.count("reward format_reward reads completions as lists of turns") == 1
    assert ask(format_reward, PROMPTS, ["", ""], COLUMNS) == [0.0, 0.0]  # an empty text has no first turn either
    assert Caller(accuracy_reward).turns
    assert not Caller(Judge()).turns


def test_who_reads_turns_by_a_method_is_found_out():
    def length(completions, **columns):
        return [len(one[-1].get("content")) for one in completions]

    assert ask(length, [[]], ["four"], {}) == [4]


def test_an_error_of_its_own_is_no_wish_for_turns():
    def parses(completions):  # what it parses is a text, and it says so of that
        return [{"a": text}["a"]["content"] for text in completions]

    with pytest.raises(TypeError, match="string indices"):
        ask(parses, PROMPTS, TEXTS, {})

    def both(completions):
        if not isinstance(completions[0], str):
            raise KeyError("turns")
        return [text["content"] for text in completions]

    with pytest.raises(TypeError, match="string indices"):  # the first error, not that of the attempt
        ask(both, PROMPTS, TEXTS, {})


# ---- awaited --------------------------------------------------------------------------------------------------------


def test_rewards_that_are_awaited_run_at_the_same_time():
    meeting = []

    def make(name):
        async def meets(completions, **columns):
            if not meeting:
                meeting.append(asyncio.Barrier(2))
            await asyncio.wait_for(meeting[0].wait(), 20)
            return [float(name)] * len(completions)

        return meets

    rewards = Rewards([make(1), lambda completions: [5.0] * len(completions), make(2)])
    assert rewards(PROMPTS, TEXTS, {}, IDS).scores.tolist() == [[1.0] * 2, [5.0] * 2, [2.0] * 2]


def test_rows_that_are_awaited_run_at_the_same_time():
    meeting = []

    async def meets(completion):
        if not meeting:
            meeting.append(asyncio.Barrier(2))
        await asyncio.wait_for(meeting[0].wait(), 20)
        return len(completion)

    assert ask(meets, PROMPTS, TEXTS, {}) == [len(text) for text in TEXTS]


def test_clients_keep_their_loop_and_a_notebook_has_one():
    loops = []

    async def remembers(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    ask(remembers, PROMPTS, TEXTS, {})

    async def notebook():
        return ask(remembers, PROMPTS, TEXTS, {})

    assert asyncio.run(notebook()) == [0.0, 0.0]
    assert loops[0] is loops[1]
    assert not loops[0].is_closed()


# ---- errors ---------------------------------------------------------------------------------------------------------

WHERE = ["rows.jsonl, row 7", "rows.jsonl, row 9"]


def divides(completions, **columns):
    return [1 / (len(text) - 1) for text in completions]


async def divides_later(completions, **columns):
    return divides(completions)


def divides_each(completion):
    return 1 / (len(completion) - 1)


@pytest.mark.parametrize("function", [divides, divides_later, divides_each])
def test_an_error_names_the_row_and_the_reward(function):
    with pytest.raises(ZeroDivisionError) as error:
        Rewards([format_reward, function])(PROMPTS, TEXTS, {}, IDS, where=WHERE)
    assert error.value.__notes__ == [f"reward {function.__name__} failed at rows.jsonl, row 9: '6'"]
    assert "divides" in "".join(traceback.format_exception(error.value))


def test_an_error_of_all_rows_together():
    def needs_two(completions):
        if len(completions) == 2:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(RuntimeError) as error:
        ask(needs_two, PROMPTS, TEXTS, {})
    assert error.value.__notes__ == ["reward needs_two failed at these answers together"]


def test_a_sentence_names_the_row():
    for function, columns, says in (
        (FinalNumber("solution"), {"solution": ["4", None]}, "row 9: FinalNumber: column 'solution' of answer 2"),
        (FinalNumber("solution"), {"solution": ["4", "x"]}, "row 9: FinalNumber: column 'solution' of answer 2"),
        (lambda completions: [0.0, float("inf")], {}, "row 9: verifier <lambda> returned inf for '6'"),
        (lambda completions: ["good", 1.0], {}, "row 7: verifier <lambda> must return numbers, got 'good'; say None"),
        (lambda completions: [[1.0] * 4, [None] * 6], {}, "row 9: verifier <lambda> must return numbers, got None"),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"rows.jsonl, {says}")):
            Rewards([function])(PROMPTS, TEXTS, columns, IDS, where=WHERE)


# ---- what cannot be called ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda texts: [0.0],
        lambda: [0.0],
        lambda reference, truncated: [0.0],
        lambda prompts, reference: [0.0],
        lambda queries, prompts, labels: [0.0],  # another order
        lambda texts, **columns: [0.0],
    ],
)
def test_a_function_without_completions_is_refused_where_it_is_made(function):
    with pytest.raises(ConfigError, match=r"reward <lambda>\(.*\) names no completions"):
        Rewards([function])


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda answer, solution: [0.0], r"<lambda>\(answer, solution\) names no completions"),
        (lambda prompts, solution: [0.0], r"<lambda>\(prompts, solution\) names no completions"),
        (lambda data_source, solution_str, truth: [0.0], r"names no completions"),
        (lambda completions, solutoin: [0.0], "no column 'solutoin': did you mean 'solution'"),
        (lambda completion, state: [0.0], "no column 'state'"),
    ],
)
def test_a_function_that_does_not_fit_the_rows_is_refused_before_anything_is_drawn(function, says):
    with pytest.raises(ConfigError, match=says):
        Rewards([function]).check(["answer", "solution", "data_source", "messages"])
    Rewards([lambda texts, said, solution, reference, truncated: [0.0]]).check(["solution"])


# ---- abstaining -----------------------------------------------------------------------------------------------------


def test_who_abstains_is_left_out_of_the_sum():
    rewards = Rewards(
        [lambda completions: [1.0, None], lambda completions: [None, None], lambda completions: [2.0, None]],
        [1.0, 5.0, 0.5],
    )
    said = rewards(PROMPTS, TEXTS, {}, IDS)
    assert said.known.tolist() == [True, False]
    assert rewards.weighted(said.scores).tolist() == [2.0, 0.0]
    tokens = Rewards([lambda completions: [[0.5] * 4, None]])(PROMPTS, TEXTS, {}, IDS)
    assert tokens.scores[0, 0] == 2.0
    assert tokens.known.tolist() == [True, False]
    assert tokens.tokens.tolist() == [0.5] * 4 + [0.0] * 6
