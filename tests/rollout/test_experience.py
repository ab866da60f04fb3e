"""Answers as branches of their prompts score what they score alone, however they are cut; and the loader of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import Example, StepTotals, pack
from ftlit.data.added import AddedRows
from ftlit.models.policy import Policy
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.rollout.experience import Experience, branches, cut
from ftlit.rollout.loader import Added, RolloutLoader
from ftlit.testing import tiny_examples, tiny_lm

STRATEGIES = [Full, lambda: LoRA(rank=2), lambda: PrefixTuning(num_virtual_tokens=3), lambda: PromptTuning(3)]


def drawn(prompts, answers):
    tokens = lambda lengths, seed: [list(map(int, e.input_ids)) for e in tiny_examples(lengths, seed=seed)]  # noqa: E731
    return tokens(prompts, 0), tokens(answers, 1)


@pytest.mark.parametrize("make", STRATEGIES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_branches_score_what_each_answer_scores_alone(make, family):
    prompts, answers = drawn((9, 2, 5), (4, 1, 7, 2, 1, 3))
    owners = [0, 0, 0, 1, 2, 2]
    torch.manual_seed(0)
    policy = Policy(tiny_lm(family, torch.float64), make())
    batch = branches([prompts[i] for i in owners], answers, owners, owners)
    found = policy(batch).logps
    alone = []
    for owner, answer in zip(owners, answers, strict=True):
        example = Example(prompts[owner] + answer, [0.0] * len(prompts[owner]) + [1.0] * len(answer))
        alone.append(policy(pack([example])).logps)
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-7)
    assert batch.target_ids.tolist() == [token for answer in answers for token in answer]
    assert batch.num_tokens == sum(map(len, prompts)) + sum(max(1, len(answer) - 1) for answer in answers)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_cut_holds_every_answer_once_within_its_bound(data):
    prompts = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    each = data.draw(st.integers(1, 4))
    owners = [number for number in range(len(prompts)) for _ in range(each)]
    answers = data.draw(st.lists(st.integers(1, 15), min_size=len(owners), max_size=len(owners)))
    bound = data.draw(st.one_of(st.none(), st.integers(1, 90)))
    micros = cut(owners, prompts, answers, bound)
    assert sorted(one for micro in micros for one in micro) == list(range(len(owners)))
    for micro in micros:
        tokens = sum(answers[one] for one in micro) + sum(prompts[owner] for owner in {owners[one] for one in micro})
        assert bound is None or len(micro) == 1 or tokens <= bound
    if bound is None or bound >= sum(prompts) + sum(answers):
        assert len(micros) == 1
    assert cut([], prompts, [], bound) == [()]


def experience(**more):
    prompts, answers = drawn((3, 4), (2, 5, 3, 2))
    tokens = {"old_logps": -torch.arange(12.0), "advantages": torch.arange(12.0)}
    totals = [StepTotals(7.0, 7, 10, 2), StepTotals(5.0, 5, 9, 2)]
    given = {"steps": [[(0,), (1,)], [(2, 3), ()]], "totals": totals, "tokens": tokens, "number": 4, **more}
    return Experience(prompts, [30, 31], answers, [0, 0, 1, 1], **given)


def test_packs_carry_the_numbers_of_their_tokens():
    made = experience()
    first, second = made.pack((1,)), made.pack((3, 2))
    assert first.extras["advantages"].tolist() == [2, 3, 4, 5, 6]
    assert second.extras["advantages"].tolist() == [10, 11, 7, 8, 9]
    assert second.target_ids.tolist() == made.answers[3] + made.answers[2]
    assert second.examples == (31, 31, 31)
    filler = made.pack(())
    assert filler.target_weights.tolist() == [0.0]
    assert filler.examples == (-1, -1)
    assert filler.extras["old_logps"].tolist() == [0.0]
    selected = second.select(torch.tensor([True, False, False, False, True]))
    assert selected.extras["advantages"].tolist() == [10, 9]
    assert second.to("cpu").extras["advantages"].tolist() == [10, 11, 7, 8, 9]


def test_it_survives_a_checkpoint(tmp_path):
    made = experience(first_step=9, trained=123, cut=True)
    torch.save(made.state_dict(), tmp_path / "state.pt")
    again = Experience.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.state_dict().keys() == made.state_dict().keys()
    for step, other in zip(made.steps, again.steps, strict=True):
        for micro, same in zip(step, other, strict=True):
            one, two = made.pack(micro), again.pack(same)
            assert torch.equal(one.input_ids, two.input_ids)
            assert all(torch.equal(one.extras[name], two.extras[name]) for name in one.extras)
    assert (again.first_step, again.trained, again.cut, again.totals) == (9, 123, True, made.totals)


def test_the_loader_follows_the_steps_taken():
    """A pass has its length; rollouts are drawn when the one before is done or cut, wherever passes begin and end."""
    taken, numbers = [0], []

    def collect(number):
        numbers.append(number)
        return experience(number=number, first_step=taken[0])

    loader = RolloutLoader(collect, lambda: taken[0], length=5, update_epochs=2)
    seen = []
    for _ in range(2):
        for batch in loader:
            seen.append((loader.experience.number, batch.totals.targets))
            taken[0] += 1
            loader.experience.cut = taken[0] == 6
    assert len(loader) == 5
    assert [number for number, _ in seen] == [0] * 4 + [1] * 2 + [2] * 4
    assert [targets for _, targets in seen[:2]] == [7, 5]
    assert sorted(targets for _, targets in seen[2:4]) == [5, 7]
    assert numbers == [0, 1, 2]
    assert loader.experience.trained == 2 * 12 + 12
    # Going on in the middle of the last: the same steps.
    taken[0] = 7
    again = RolloutLoader(collect, lambda: taken[0], 5, 2, experience=experience(number=2, first_step=6))
    assert next(iter(again)).totals.targets == seen[7][1]
    assert numbers == [0, 1, 2]


@given(st.integers(1, 3), st.integers(0, 40), st.integers(1, 40))
@settings(deadline=None, max_examples=30)
def test_added_rows_are_shared_by_the_ranks(world, before, more):
    rows = AddedRows("replay", tiny_examples((9, 4, 6)), ratio=0.7)
    like = {"old_logps": torch.zeros(3)}
    ranks = [Added([rows], 12, rank, world)(before, before + more, like) for rank in range(world)]
    assert len({len(one) for one in ranks}) == 1
    found = [row for one in ranks for batch in one for row in batch.examples if row >= 0]
    assert sorted(found) == sorted(rows.between(before, before + more))
    for batch in (batch for one in ranks for batch in one):
        assert set(batch.sources) == {1}
        assert batch.extras["old_logps"].shape == batch.target_ids.shape
