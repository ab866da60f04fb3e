"""Running shared beginnings once changes no score and no gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import Example, pack
from ftlit.models.policy import Policy, score_packed, use_segment_attention
from ftlit.models.prefixes import SHORTEST, shared
from ftlit.peft import LoRA, PrefixTuning, PromptTuning
from ftlit.rollout.experience import branches
from ftlit.testing import tiny_lm

SYSTEM = list(range(30, 30 + SHORTEST + 2))


def example(ids, trained_from=1):
    return Example(ids, [0.0] * trained_from + [1.0] * (len(ids) - trained_from))


def lm_of(family, dtype=torch.float64):
    lm = tiny_lm(family, dtype)
    use_segment_attention(lm)
    return lm


@st.composite
def trees(draw):
    """Examples that share beginnings in several ways: none, all, some of them further, whole examples twice."""
    stretches = [SYSTEM, SYSTEM + list(range(60, 70)), SYSTEM + list(range(60, 69)) + [99], [5, 6], []]
    made = []
    for i in range(draw(st.integers(1, 5))):
        start = draw(st.sampled_from(stretches))
        rest = draw(st.lists(st.integers(100, 103), min_size=2, max_size=6))
        ids = [*start, *rest]
        trained_from = draw(st.integers(1, len(ids)))  # trained tokens inside the shared stretch, and none at all
        made.append(example(ids, trained_from))
        if i and draw(st.booleans()):
            made.append(made[0])
    return made


def check_same(lm, batch, fewer, atol):
    """Scores and gradients of both rows are the same."""
    plain, ours = score_packed(lm, batch).logps, score_packed(lm, fewer).logps
    torch.testing.assert_close(ours, plain, rtol=0, atol=atol)
    if len(plain):
        factor = torch.linspace(0.5, 2, len(plain), dtype=torch.float64)
        parameters = [p for p in lm.parameters() if p.requires_grad]
        for a, b in zip(
            torch.autograd.grad((ours * factor).sum(), parameters),
            torch.autograd.grad((plain * factor).sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # gradients of norms are rounded to float32


@given(examples=trees(), family=st.sampled_from(["llama", "mistral", "gemma3"]))
@settings(max_examples=40, deadline=None)
def test_scores_and_gradients_stay(examples, family):
    batch = pack(examples)
    fewer = shared(batch)
    assert fewer.num_tokens <= batch.num_tokens
    check_same(lm_of(family), batch, fewer, 1e-6 if family == "gemma3" else 1e-9)


@st.composite
def forests(draw):
    """Answers as branches of prompts: one and several, prompts of a token or two, the same answer twice."""
    prompts, answers, owners = [], [], []
    for owner in range(draw(st.integers(1, 4))):
        begin = draw(st.sampled_from([SYSTEM, SYSTEM[:3], []]))
        prompt = [*begin, *draw(st.lists(st.integers(100, 101), min_size=1, max_size=4))]
        drawn = [draw(st.lists(st.integers(100, 101), min_size=1, max_size=5)) for _ in range(draw(st.integers(1, 5)))]
        prompts += [prompt] * len(drawn)
        answers += drawn
        owners += [owner] * len(drawn)
    batch = branches(prompts, answers, owners, owners)
    if draw(st.booleans()):  # targets inside of prompts too
        own = torch.tensor(
            [place for place in range(1, batch.num_tokens) if place not in batch.segments.offsets], dtype=torch.int64
        )
        segment = torch.tensor([0] * batch.num_tokens)
        for number, (offset, length) in enumerate(zip(batch.segments.offsets, batch.segments.lengths, strict=True)):
            segment[offset : offset + length] = number
        batch = batch.replace(
            target_positions=own - 1,
            target_ids=batch.input_ids[0, own],
            target_segments=segment[own],
            target_weights=torch.ones(len(own)),
        )
    return batch


@given(batch=forests())
@settings(max_examples=60, deadline=None)
def test_branches_keep_their_scores_and_gradients(batch):
    check_same(lm_of("llama"), batch, shared(batch), 1e-6)


def test_prompts_of_branches_share_their_beginning_and_one_answer_needs_no_segment_of_its_own():
    one, two = [*SYSTEM, 60], [*SYSTEM, 61]
    batch = shared(branches([one, two, two], [[100, 101], [110, 111, 112], [120, 2]], [0, 1, 1], [5, 6, 6]))
    assert batch.input_ids[0].tolist() == [*SYSTEM, 60, 100, 61, 110, 111, 61, 120]
    assert (batch.segments.lengths, batch.segments.parents) == ((10, 2, 3, 2), (-1, 0, 0, 0))
    assert batch.target_positions.tolist() == [10, 11, 15, 13, 14, 15, 16]
    assert batch.target_segments.tolist() == [1, 1, 2, 2, 2, 3, 3]
    assert batch.examples == (5, 5, 6, 6)


@pytest.mark.usefixtures("norms_in_float64")
def test_gradients_are_equal_to_the_last_digits_where_norms_do_not_round():
    lm = lm_of("llama")
    rests = [[100 + i, *range(n)] for i, n in enumerate((5, 9, 70, 3))]
    batch = pack([example(SYSTEM + rest, len(SYSTEM)) for rest in rests])
    parameters = list(lm.parameters())
    ours, plain = (torch.autograd.grad(score_packed(lm, b).logps.sum(), parameters) for b in (shared(batch), batch))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * b.abs().max().item())


def test_the_row_that_is_run():
    """A shared stretch once, the last token of every example never: nothing is predicted from it."""
    batch = shared(pack([example([*SYSTEM, 100, 101, 102], 10), example([*SYSTEM, 110, 111], 10)]))
    assert batch.input_ids[0].tolist() == [*SYSTEM, 100, 101, 110]
    assert batch.position_ids[0].tolist() == [*range(len(SYSTEM)), 10, 11, 10]
    assert (batch.segments.lengths, batch.segments.parents) == ((10, 2, 1), (-1, 0, 0))
    assert batch.target_positions.tolist() == [9, 10, 11, 9, 12]
    assert batch.target_segments.tolist() == [1, 1, 1, 2, 2]
    assert batch.examples == (0, 0, 1)


def test_what_is_shared_by_some_is_found():
    longer = [*SYSTEM, *range(60, 72)]
    batch = shared(pack([example([*longer, 1, 1]), example([*SYSTEM, 9, 9]), example([*longer, 2, 2])]))
    assert (batch.segments.lengths, batch.segments.parents) == ((10, 12, 1, 1, 1), (-1, 0, 1, 1, 0))


def test_few_tokens_are_shared_where_that_saves_a_part_of_the_row():
    short = shared(branches([[5, 6, 7]] * 4, [[100 + i, 2] for i in range(4)], [0] * 4, [0] * 4))
    assert (short.segments.lengths, short.segments.parents) == ((3, 1, 1, 1, 1), (-1, 0, 0, 0, 0))
    number = range(400)
    prompts = [[5, 6, 7 + i // 10] for i in number]
    many = branches(prompts, [[100 + i, 101, 2] for i in number], [i // 10 for i in number], [0] * 400)
    assert shared(many).num_tokens <= many.num_tokens
    long = shared(pack([example([1, 100 + i, *range(60)]) for i in range(9)]))  # one token of all
    assert set(long.segments.parents) == {-1}


def test_too_little_in_common_is_left():
    batch = shared(pack([example([1, 2, 3, 4]), example([1, 2, 3, 5])]))
    assert batch.segments.lengths == (3, 3)
    batch = shared(pack([example([1, 2, *range(100, 150)]), example([1, 2, *range(110, 170)])]))
    assert batch.segments.lengths == (51, 61)


@pytest.mark.parametrize(
    ("strategy", "fewer"), [(LoRA(rank=2), True), (LoRA(rank=2, dropout=0.5), False), (PromptTuning(2), False)]
)
def test_only_where_equal_tokens_have_equal_states(strategy, fewer, monkeypatch):
    """Dropout draws for each example, and virtual tokens stand before each."""
    policy = Policy(tiny_lm("llama"), strategy).train()
    rows = []
    monkeypatch.setattr("ftlit.models.policy.shared", lambda batch: rows.append(batch) or shared(batch))
    policy(pack([example([*SYSTEM, 100, 101]), example([*SYSTEM, 110, 111])]))
    assert bool(rows) == fewer
    policy.eval()(pack([example([*SYSTEM, 100, 101])]))
    assert bool(rows) == (not isinstance(strategy, PromptTuning))


STRATEGIES = {
    "lora on the embedding": lambda: LoRA(rank=2, target_modules=["q_proj", "embed_tokens"]),
    "whole modules": lambda: LoRA(rank=2, modules_to_save=["embed_tokens", "norm"]),
    "the output layer": lambda: LoRA(rank=2, target_modules=["v_proj", "lm_head"]),
    "prefix": lambda: PrefixTuning(3),
    "dropout, but not now": lambda: LoRA(rank=2, dropout=0.5),
}
MIXED = [
    Example([*SYSTEM, 100, 101], [0.0] * 4 + [0.5] * 8),  # trained on the shared part, with a weight
    example([*SYSTEM, 100, 101, 102, 103], 11),  # goes on from the first
    Example([*SYSTEM, 100, 101], [0.0] * 4 + [2.0] * 8),  # the first again, with another weight
    example([*SYSTEM, *range(60, 75)], 12),
    example([*SYSTEM, *range(60, 75), 4, 5], 20),
    example(SYSTEM, 5),  # all of it shared
    example([7, 8, 9], 1),
]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_policy_scores_as_one_example_at_a_time(name, family):
    torch.manual_seed(0)
    policy = Policy(tiny_lm(family, torch.float64), STRATEGIES[name]()).train(name != "dropout, but not now")
    trained = [p for p in policy.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:  # a product that is zero would show nothing
            parameter += 0.1 * torch.randn_like(parameter)
    whole = pack(MIXED)
    assert shared(whole).num_tokens < whole.num_tokens
    ours = policy(whole).logps
    alone = torch.cat([policy(pack([one])).logps for one in MIXED])
    torch.testing.assert_close(ours, alone, rtol=0, atol=1e-6)  # norms round to float32
    gradients = [torch.autograd.grad((logps * whole.target_weights).sum(), trained) for logps in (ours, alone)]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9
