"""Rewards: weights, shaping, running statistics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.errors import ConfigError
from ftlit.rollout.rewards import Rewards, RewardShaping, RunningMoments
from ftlit.rollout.verifiers import Contains


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def column(prompts, completions, worth, **columns):
    return list(worth)


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-50, 50), max_size=6), min_size=1, max_size=6))
def test_running_moments_are_those_of_everything_seen(parts):
    running, seen = RunningMoments(), []
    for part in parts:
        running.update(torch.tensor(part, dtype=torch.float64))
        seen += part
        state = running.state_dict()
        running = RunningMoments()
        running.load_state_dict(state)
        every = torch.tensor(seen, dtype=torch.float64)
        if len(seen):
            assert running.mean == pytest.approx(every.mean().item(), abs=1e-9)
        if len(seen) > 1 and every.std() > 1e-6:
            assert running.std == pytest.approx(every.std().item(), rel=1e-6)
        elif len(seen) < 2:
            assert running.std == 1.0


def test_several_rewards_with_weights():
    rewards = Rewards([length, column, Contains("yes")], [0.5, 2.0, -1.0])
    said = rewards([[]] * 2, ["yes", "no no"], {"worth": [1, 4]}, [[7], [8, 9]])
    assert said.scores.tolist() == [[3.0, 5.0], [1.0, 4.0], [1.0, 0.0]]
    assert said.tokens.tolist() == [0.0] * 3
    assert rewards.weighted(said.scores).tolist() == [1.5 + 2 - 1, 2.5 + 8]
    assert rewards.names == ["length", "column", "Contains"]
    assert Rewards([length, length]).names == ["length_1", "length_2"]


def test_rewards_of_single_tokens():
    """Lists, arrays or numbers; the sum is the score of the answer."""

    def tokens(completion_ids, **columns):
        return [[0.1 * token for token in completion_ids[0]], torch.tensor(completion_ids[1]) / 10, 5.0]

    rewards = Rewards([tokens, length], [2.0, 1.0])
    said = rewards([[]] * 3, ["a", "bc", ""], {}, [[1, 2], [3], [4, 5]])
    torch.testing.assert_close(said.scores, torch.tensor([[0.3, 0.3, 5.0], [1.0, 2.0, 0.0]]))
    torch.testing.assert_close(said.tokens, torch.tensor([0.2, 0.4, 0.6, 0.0, 0.0]))
    with pytest.raises(ConfigError, match="<lambda> gave 2 numbers for an answer of 1 tokens"):
        Rewards([lambda completions: [[1.0, 2.0]]])([[]], ["a"], {}, [[1]])
    with pytest.raises(ConfigError, match="returned nan for 'a'"):
        Rewards([lambda completions: [[float("nan")]]])([[]], ["a"], {}, [[1]])


def test_shaping_in_its_order():
    shaping = RewardShaping(whiten=True, clip=1.0, missing_end_penalty=0.5, length_penalty=0.1, free_tokens=2)
    rewards = Rewards([length], shaping=shaping)
    scores, lengths = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1, 4, 3])
    ended = torch.tensor([True, True, False])
    mean, std = scores.mean().item(), scores.std().item()
    expected = [max(-1, min(1, (s - mean) / std)) for s in scores.tolist()]
    expected = [expected[0], expected[1] - 0.2, expected[2] - 0.5 - 0.1]
    assert rewards.shaped(scores, lengths, ended).tolist() == pytest.approx(expected, abs=1e-6)
    state = rewards.running.state_dict()
    rewards.shaped(scores, lengths, ended, learn=False)
    assert rewards.running.state_dict() == state
    rewards.shaped(scores, lengths, ended)
    assert rewards.running.count == 6


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Rewards([]), "model.reward is missing"),
        (lambda: Rewards([length], [1.0, 2.0]), "one number for each of 1 rewards"),
        (lambda: Rewards([length], [float("nan")]), "one number for each"),
        (lambda: Rewards(["nowhere.check"]), "no module 'nowhere'"),
        (lambda: RewardShaping(clip=-1), "positive clip"),
        (lambda: RewardShaping(missing_end_penalty=-1), "missing_end_penalty >= 0"),
        (lambda: RewardShaping(cut_answers="drop"), "cut_answers is as_is, penalty, mask, or left out; got 'drop'"),
        (
            lambda: RewardShaping(cut_answers="penalty"),
            "a penalty needs both, cut_answers: penalty and a positive number",
        ),
        (lambda: RewardShaping(1, cut_answers="mask", missing_end_penalty=1.0), "needs both"),
        (lambda: RewardShaping(cut_answers="as_is", missing_end_penalty=1.0), "needs both"),
        (
            lambda: Rewards([lambda p, c, **k: [1.0]])([[]] * 2, ["a", "b"], {}, [[1]] * 2),
            "must return a list of 2 numbers",
        ),
        (lambda: Rewards([lambda p, c, **k: [float("nan")]])([[]], ["a"], {}, [[1]]), "give a number"),
    ],
)
def test_mistakes(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
