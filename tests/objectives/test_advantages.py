"""Advantages against loops written from the papers, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.errors import ConfigError
from ftlit.objectives.advantages import GAE, GRPO, RLOO, Outcome, ReMax, bounds, gae, moments, sums, whiten

lengths_of = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def owners_of(lengths):
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def drawn(seed, size):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=50)
@given(lengths_of, st.integers(0, 999), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_sum_of_discounted_errors(lengths, seed, gamma, lam):
    """Schulman et al. 2016, equation 16, each token's sum written out."""
    owners = owners_of(lengths)
    rewards, values = drawn(seed, len(owners)), drawn(seed + 1, len(owners))
    found = gae(rewards, values, owners, gamma, lam).tolist()
    start = 0
    for length in lengths:
        r, v = rewards[start : start + length].tolist(), [*values[start : start + length].tolist(), 0.0]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, length))
            assert found[start + t] == pytest.approx(expected, abs=1e-10)
        start += length


def test_lambda_one_is_the_return_less_the_value_and_zero_the_one_step_error():
    owners = owners_of([3, 1])
    rewards, values = drawn(0, 4), drawn(1, 4)
    r, v = rewards.tolist(), values.tolist()
    assert gae(rewards, values, owners, 1.0, 1.0).tolist() == pytest.approx(
        [r[0] + r[1] + r[2] - v[0], r[1] + r[2] - v[1], r[2] - v[2], r[3] - v[3]]
    )
    assert gae(rewards, values, owners, 0.9, 0.0).tolist() == pytest.approx(
        [r[0] + 0.9 * v[1] - v[0], r[1] + 0.9 * v[2] - v[1], r[2] - v[2], r[3] - v[3]]
    )


def outcome(scores, lengths, groups, **more):
    owners = owners_of(lengths)
    given = {"token_rewards": torch.zeros(len(owners), dtype=torch.float64), **more}
    return Outcome(torch.tensor(scores, dtype=torch.float64), owners=owners, groups=torch.tensor(groups), **given)


def test_the_reward_lies_on_the_last_real_token():
    values = drawn(3, 5)
    penalties = drawn(4, 5)
    result = GAE(lam=1.0, whiten=False)(outcome([2.0, -1.0], [3, 2], [0, 1], values=values, token_rewards=penalties))
    p, v = penalties.tolist(), values.tolist()
    returns = [p[0] + p[1] + p[2] + 2, p[1] + p[2] + 2, p[2] + 2, p[3] + p[4] - 1, p[4] - 1]
    assert result.returns.tolist() == pytest.approx(returns)
    assert result.advantages.tolist() == pytest.approx([one - value for one, value in zip(returns, v, strict=True)])


def test_whitened_advantages_keep_their_returns():
    values = drawn(3, 5)
    plain = GAE(whiten=False)(outcome([2.0, -1.0], [3, 2], [0, 1], values=values))
    white = GAE()(outcome([2.0, -1.0], [3, 2], [0, 1], values=values))
    assert torch.equal(white.returns, plain.returns)
    torch.testing.assert_close(
        white.advantages, (plain.advantages - plain.advantages.mean()) / plain.advantages.std(), rtol=1e-7, atol=1e-7
    )


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-9, 9), min_size=2, max_size=5), min_size=1, max_size=4), st.booleans())
def test_grpo_and_rloo_compare_within_the_group(groups, shuffled):
    flat = [(number, score) for number, group in enumerate(groups) for score in group]
    if shuffled:
        flat = flat[::2] + flat[1::2]
    lengths = [1 + number % 3 for number in range(len(flat))]
    one = outcome([score for _, score in flat], lengths, [7 * number for number, _ in flat])
    first = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths).cumsum(0)[:-1]])
    for name, strategy in {"std": GRPO(), "mean": GRPO(std=False), "loo": RLOO()}.items():
        found = strategy(one).advantages[first].tolist()
        for (number, score), value in zip(flat, found, strict=True):
            group = groups[number]
            mean = sum(group) / len(group)
            expected = score - (sum(group) - score) / (len(group) - 1) if name == "loo" else score - mean
            if name == "std":
                expected /= (sum((x - mean) ** 2 for x in group) / (len(group) - 1)) ** 0.5 + 1e-4
            assert value == pytest.approx(expected, abs=1e-7)


def test_token_penalties_count_in_the_reward_of_an_answer():
    penalties = torch.tensor([-0.5, -0.25, -1.0], dtype=torch.float64)
    found = RLOO()(outcome([1.0, 3.0], [2, 1], [4, 4], token_rewards=penalties)).advantages
    assert found.tolist() == pytest.approx([0.25 - 2.0] * 2 + [2.0 - 0.25])
    base = torch.tensor([0.5, 4.0], dtype=torch.float64)
    found = ReMax()(outcome([1.0, 3.0], [2, 1], [4, 4], token_rewards=penalties, baselines=base)).advantages
    assert found.tolist() == pytest.approx([-0.25, -0.25, -2.0])


EVERY = {"grpo": GRPO(), "mean": GRPO(std=False), "rloo": RLOO(), "remax": ReMax(), "gae": GAE()}
ALIKE = {
    "a level": [1000.1] * 3,
    "a share": [0.1] * 7,
    "negative": [-1 / 3] * 6,
    "large": [-123456789.3] * 5,
    "nothing": [0.0] * 4,
    "rounded": [1000.1, 1000.1 + 6.1e-5, 1000.1 - 6.1e-5],  # neighbours in float32
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scores", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("kind", EVERY)
def test_rewards_that_are_alike_teach_exactly_nothing(kind, scores, dtype):
    """A mean of equal numbers is not that number in floating point, and std or whitening would blow the rest up."""
    rewards = torch.tensor(scores, dtype=dtype)
    owners = owners_of([1 + number % 3 for number in range(len(scores))])
    groups, none = torch.zeros(len(scores), dtype=torch.int64), torch.zeros(len(owners), dtype=dtype)
    one = Outcome(rewards, none, owners, groups, values=rewards[owners], baselines=rewards.flip(0))
    advantages = EVERY[kind](one).advantages
    assert advantages.dtype == dtype
    assert advantages.tolist() == [0.0] * len(owners)
    assert one.alike.all()


def test_the_same_sum_from_other_tokens_is_alike():
    """Rewards of single tokens, a penalty of the same size in other places, float32 as in a run."""
    pieces = [[0.1, 0.2, 0.7], [0.3, 0.7], [0.7, 0.1, 0.1, 0.1]]
    owners = owners_of([len(one) for one in pieces])
    tokens = torch.tensor([value for one in pieces for value in one])
    one = Outcome(torch.full((3,), 100.1), tokens, owners, torch.zeros(3, dtype=torch.int64))
    for kind in ("grpo", "mean", "rloo"):
        assert EVERY[kind](one).advantages.tolist() == [0.0] * 9
    assert one.alike.tolist() == [True]


def test_small_differences_beside_a_level_are_not_lost():
    one = outcome([1000.1, 1000.1, 1000.2], [1, 1, 1], [0, 0, 0])
    assert GRPO()(one).advantages.tolist() == pytest.approx([-0.577, -0.577, 1.153], abs=2e-3)
    assert one.alike.tolist() == [False]
    mixed = outcome([1.0, 1.0, 1000.1, 1000.1, 0.0, 2.0], [1] * 6, [3, 3, 1, 1, 2, 2])
    assert mixed.alike.tolist() == [True, False, True]  # in the order of the prompts' numbers
    assert RLOO()(mixed).advantages.tolist() == [0.0, 0.0, 0.0, 0.0, -2.0, 2.0]


@pytest.mark.parametrize("kind", EVERY)
def test_answers_that_do_not_count_are_as_if_they_had_not_been_drawn(kind):
    scores, lengths, groups = [1.0, 9.0, 2.0, 4.0, -7.0, 3.0], [2, 1, 3, 1, 2, 1], [0, 0, 0, 1, 1, 1]
    counted = torch.tensor([True, False, True, True, False, True])
    owners = owners_of(lengths)
    more = {
        "token_rewards": drawn(1, len(owners)), "values": drawn(2, len(owners)),
        "baselines": torch.full((6,), 0.5, dtype=torch.float64),
    }  # fmt: skip
    whole = outcome(scores, lengths, groups, **more, counted=counted)
    kept = counted[owners]
    rest = {name: values[kept if len(values) == len(owners) else counted] for name, values in more.items()}
    pick = lambda values: [value for value, keep in zip(values, counted.tolist(), strict=True) if keep]  # noqa: E731
    alone = outcome(pick(scores), pick(lengths), pick(groups), **rest)
    found = EVERY[kind](whole).advantages
    torch.testing.assert_close(found[kept], EVERY[kind](alone).advantages)
    assert found[~kept].tolist() == [0.0] * 3


def test_who_is_left_alone_has_nobody_to_be_compared_with():
    counted = torch.tensor([True, False, False, False])
    one = outcome([1.0, 9.0, 2.0, 4.0], [1, 1, 1, 1], [0, 0, 1, 1], counted=counted)
    for kind in ("grpo", "mean", "rloo"):
        assert EVERY[kind](one).advantages.tolist() == [0.0] * 4
    assert one.alike.tolist() == [True]  # the second prompt has no answer that counts


def test_whitening_over_ranks_of_what_is_alike():
    """The mean is that of all ranks; what each rank has is alike only together."""
    values = torch.full((5,), 0.1)
    assert whiten(values).tolist() == [0.0] * 5
    assert whiten(values + 1e-7 * torch.randn(5), beside=torch.full((5,), 1000.0)).tolist() == [0.0] * 5
    assert whiten(torch.tensor([0.1, 0.2])).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-4)


def test_one_answer_alone_cannot_be_compared():
    for strategy in (GRPO(), RLOO()):
        with pytest.raises(ValueError, match="two answers"):
            strategy(outcome([1.0, 2.0, 3.0], [1, 1, 1], [0, 0, 1]))
        assert strategy.least_answers == 2


@settings(deadline=None)
@given(st.lists(st.floats(-99, 99), min_size=2, max_size=30), st.integers(0, 5))
def test_statistics_over_ranks_are_those_of_all_values(values, share):
    """Two ranks that each know a part, one of them perhaps nothing."""
    values = torch.tensor(values, dtype=torch.float64)
    parts = [values[:share], values[share:]]

    def first(part):  # what each rank would send, collected
        return torch.stack([torch.tensor(float(part.numel())).double(), part.sum()])

    count, total = sum(first(part) for part in parts)
    mean = total / count
    squares = sum((part - mean).square().sum() for part in parts)
    answers = {2: torch.stack([count, total]), 0: squares}
    for part in parts:
        number, average, variance = moments(part, lambda tensor: answers[2] if tensor.ndim else answers[0])
        assert number == len(values)
        torch.testing.assert_close(average, values.mean(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(variance, values.var(), rtol=1e-9, atol=1e-9)
    white = torch.cat([whiten(part, lambda tensor: answers[2] if tensor.ndim else answers[0]) for part in parts])
    torch.testing.assert_close(white, whiten(values), rtol=1e-9, atol=1e-9)


def test_a_rank_without_answers():
    numbers, whole = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    empty = Outcome(numbers, numbers, whole, whole, numbers)
    for strategy in (GAE(), GRPO(), RLOO()):
        assert strategy(empty).advantages.shape == (0,)


def test_owners_must_lie_one_after_the_other():
    with pytest.raises(ValueError, match="without a gap"):
        bounds(torch.tensor([0, 0, 2]))
    with pytest.raises(ValueError, match="without a gap"):
        bounds(torch.tensor([0, 1, 0]))
    assert sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1]), 3).tolist() == [1.0, 6.0, 0.0]


def test_gae_refuses_what_is_no_discount():
    with pytest.raises(ConfigError, match="gamma and lam"):
        GAE(gamma=1.1)
