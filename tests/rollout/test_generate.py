import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ftlit.errors import ConfigError
from ftlit.models.policy import Policy, use_segment_attention
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.rollout.generate import Stops, answer, batches, end_tokens, generate, pick, seed_of
from ftlit.testing import FAMILIES, tiny_examples, tiny_lm, tiny_tokenizer

STRATEGIES = {
    "none": None,
    "full": Full,
    "lora": lambda: LoRA(rank=2),
    "prefix": lambda: PrefixTuning(num_virtual_tokens=3, init_std=1.0),
    "prompt": lambda: PromptTuning(num_virtual_tokens=3),
}


def policy_of(family, strategy, dtype=torch.float64):
    lm = tiny_lm(family, dtype=dtype)
    use_segment_attention(lm)  # as every loaded model
    made = STRATEGIES[strategy]() if STRATEGIES[strategy] else None
    if made is not None:
        lm = Policy(lm, made).lm
        with torch.no_grad():
            for parameter in made.trained(lm).values():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return lm, made


def prompts_of(lengths, seed=0):
    return [list(example.input_ids) for example in tiny_examples(lengths, seed=seed)]


@torch.no_grad()
def one_at_a_time(lm, prompt, ends, new):
    """Greedy without cache, padding or batch: the whole text through the model for each token."""
    was, _ = lm.training, lm.eval()
    tokens = []
    while len(tokens) < new:
        logits = lm(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
        token = int(logits.argmax())
        if token in ends:
            break
        tokens.append(token)
    lm.train(was)
    return tokens


LENGTHS = (3, 11, 7, 2, 7, 18, 5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["none", "lora"])
def test_batches_equal_one_at_a_time(family, strategy):
    lm, made = policy_of(family, strategy)
    tokenizer, prompts = tiny_tokenizer(), prompts_of(LENGTHS)
    # End tokens that come up at different places, so that rows leave the batch at different times.
    free = [one_at_a_time(lm, prompt, [], 12) for prompt in prompts]
    lm.generation_config.eos_token_id = [free[0][9], free[1][5], free[2][3]]
    ends = end_tokens(lm, tokenizer)
    expected = [one_at_a_time(lm, prompt, ends, 12) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) > 1
    for size in (None, 1, 3):
        answers = answer(lm, made, tokenizer, prompts, max_new_tokens=12, batch_size=size)
        assert [one.tokens for one in answers] == expected
        assert [one.ended for one in answers] == [len(tokens) < 12 for tokens in expected]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "qwen3"])
@pytest.mark.parametrize("strategy", ["prefix", "prompt"])
def test_virtual_tokens_in_batches_equal_transformers_own_loop(family, strategy):
    lm, made = policy_of(family, strategy)
    tokenizer, prompts = tiny_tokenizer(), prompts_of(LENGTHS)
    ends = end_tokens(lm, tokenizer)
    ours = generate(lm, made, tokenizer, prompts, max_new_tokens=8)
    lm.eval()
    for prompt, tokens in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        inputs = made.generation_kwargs(lm, ids, torch.ones_like(ids))
        out = lm.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=ends, pad_token_id=ends[0])
        theirs = out[0, inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :].tolist()
        assert tokens == [token for token in theirs if token not in ends]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_half_precision_and_autocast(strategy, temperature):
    for dtype in (torch.bfloat16, torch.float32):
        lm, made = policy_of("llama", strategy, dtype=dtype)
        prompts = prompts_of((5, 9), seed=4)
        with torch.autocast("cpu", torch.bfloat16):
            first = answer(lm, made, tiny_tokenizer(), prompts, max_new_tokens=6, temperature=temperature, seeds=[1, 2])
            again = answer(lm, made, tiny_tokenizer(), prompts, max_new_tokens=6, temperature=temperature, seeds=[1, 2])
        assert first == again
        assert sum(len(one.tokens) for one in first) > 0


def test_training_mode_and_random_state_are_left_alone():
    lm, made = policy_of("llama", "lora")
    state = torch.get_rng_state()
    answer(lm.train(), made, tiny_tokenizer(), prompts_of((4, 6)), max_new_tokens=4, temperature=1.0, seeds=[1, 2])
    assert lm.training
    assert torch.equal(torch.get_rng_state(), state)
    answer(lm.eval(), made, tiny_tokenizer(), prompts_of((4, 6)), max_new_tokens=4)
    assert not lm.training


def test_samples_depend_on_the_seed_of_their_row_alone():
    lm, made = policy_of("llama", "none")
    prompts, seeds = prompts_of(LENGTHS), [seed_of(0, 5, row) for row in range(len(LENGTHS))]
    options = {"max_new_tokens": 9, "temperature": 1.3, "top_p": 0.9}
    whole = answer(lm, made, tiny_tokenizer(), prompts, seeds=seeds, **options)
    for size in (1, 2):
        assert answer(lm, made, tiny_tokenizer(), prompts, seeds=seeds, batch_size=size, **options) == whole
    part = answer(lm, made, tiny_tokenizer(), prompts[2:5][::-1], seeds=seeds[2:5][::-1], **options)
    assert part == whole[2:5][::-1]
    others = answer(lm, made, tiny_tokenizer(), prompts, seeds=[seed + 1 for seed in seeds], **options)
    assert others != whole
    torch.manual_seed(3)
    drawn = generate(lm, made, tiny_tokenizer(), prompts, **options)
    torch.manual_seed(3)
    assert generate(lm, made, tiny_tokenizer(), prompts, **options) == drawn


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.2, 3.0), st.floats(0.05, 1.0))
def test_pick_samples_the_nucleus_with_its_probabilities(seed, temperature, top_p):
    logits = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    count = 4000  # every quantile once: shares are exact to 1/count
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = pick(logits.expand(count, -1), temperature, top_p, uniform)
    shares = torch.bincount(tokens, minlength=6).double() / count
    probabilities = torch.softmax(logits / temperature, -1).tolist()
    kept, before = {}, 0.0
    for token in sorted(range(6), key=lambda i: -probabilities[i]):
        if before < top_p:
            kept[token] = probabilities[token]
        before += probabilities[token]
    expected = torch.tensor([kept.get(token, 0.0) / sum(kept.values()) for token in range(6)], dtype=torch.float64)
    torch.testing.assert_close(shares, expected, rtol=0, atol=2 / count)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000), st.floats(0.3, 2.0), st.floats(0.05, 1.0), st.one_of(st.none(), st.integers(1, 9)),
    st.floats(0, 1),
)  # fmt: skip
def test_pick_keeps_what_transformers_keeps(seed, temperature, top_p, top_k, min_p):
    """Its processors in its order: temperature, top_k, top_p of what is left, min_p."""
    logits = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    count = 4000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = pick(logits.expand(count, -1), temperature, top_p, uniform, top_k, min_p)
    shares = torch.bincount(tokens, minlength=6).double() / count
    scores = logits[None] / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    for warper in (TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)):
        scores = warper(None, scores)
    torch.testing.assert_close(shares, scores.softmax(-1)[0], rtol=0, atol=2 / count)


def stopped(tokenizer, tokens, stop):
    """The shortest beginning whose text holds a stop, one token more at a time."""
    for end in range(1, len(tokens) + 1):
        if any(one in tokenizer.decode(tokens[:end]) for one in stop):
            return tokens[:end]
    return None


@pytest.mark.parametrize("strategy", ["none", "prefix"])
def test_a_text_to_stop_at_ends_an_answer_with_its_last_token(strategy):
    lm, made = policy_of("llama", strategy)
    lm.generation_config.eos_token_id = list(range(3, 300, 40))
    tokenizer, prompts = tiny_tokenizer(), prompts_of(LENGTHS)
    options = {"max_new_tokens": 24, "temperature": 2.0, "seeds": list(range(2 * len(LENGTHS))), "num_answers": 2}
    free = answer(lm, made, tokenizer, prompts, **options)
    texts = [tokenizer.decode(one.tokens) for one in free]
    said = [letter for text in texts for letter in text[1:-1] if letter.isascii() and letter.isalnum()]
    stop = (said[0], said[-1], "never said")
    found = answer(lm, made, tokenizer, prompts, stop=stop, **options)
    assert found == answer(lm, made, tokenizer, prompts, stop=stop, batch_size=2, **options)
    short = 0
    for one, whole in zip(found, free, strict=True):
        tokens = stopped(tokenizer, whole.tokens, stop)
        if tokens is None:
            assert one == whole
            continue
        short += len(tokens) < len(whole.tokens)
        assert one.drawn == one.tokens == tokens
        assert one.ended
        assert one.end is None
    assert 1 < short < len(found)
    with pytest.raises(ConfigError, match="a text to stop at"):
        answer(lm, made, tokenizer, prompts, stop=("a", ""), **options)


def test_a_row_that_ran_on_is_cut_where_it_first_stops():
    """On a GPU rows are looked at now and then only."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer("one é\n\ntwo\n\nthree", add_special_tokens=False)["input_ids"]
    stops = Stops(tokenizer, ["\n\n", "three"])
    assert tokenizer.decode(ids[: stops.first(ids)]) == "one é\n\n"
    assert tokenizer.decode(ids[: Stops(tokenizer, ["é"]).first(ids)]) == "one é"
    assert Stops(tokenizer, ["four"]).first(ids) is None
    assert stops.first([]) is None


def test_pick_at_the_edges():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    nearly_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert pick(logits, 0.0, 1.0, None).tolist() == [1]
    zero = torch.zeros(1, dtype=torch.float64)
    assert pick(logits, 1.0, 1.0, zero).tolist() == [0]  # in the order of the vocabulary
    assert pick(logits, 1.0, 1.0, nearly_one).tolist() == [2]
    assert pick(logits, 1.0, 0.99, zero).tolist() == [1]  # the likeliest first
    assert pick(logits, 1.0, 0.99, nearly_one).tolist() == [0]
    assert pick(logits, 1.0, 1e-9, nearly_one).tolist() == [1]
    never = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert pick(never, 1.0, 1.0, zero).tolist() == [1]
    assert pick(never, 1.0, 1.0, nearly_one).tolist() == [2]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(1, 9)),
    st.integers(1, 500),
    st.booleans(),
)
def test_batches_hold_every_prompt_once_within_their_bounds(lengths, new, batch_size, max_tokens, alike):
    cut = list(batches(lengths, new, batch_size, max_tokens, alike))
    assert sorted(row for batch in cut for row in batch) == list(range(len(lengths)))
    for batch in cut:
        longest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or len(batch) * (longest + new) <= max_tokens
        assert batch_size is None or len(batch) <= batch_size
        assert not alike or len({lengths[row] for row in batch}) == 1
    order = [lengths[row] for batch in cut for row in batch]
    assert order == sorted(order, reverse=True)


def test_answers_that_ended_leave_the_batch(monkeypatch):
    """The work shrinks with the answers that are still open."""
    lm, _ = policy_of("llama", "none")
    lm.generation_config.eos_token_id = list(range(0, 300, 8))
    sizes = []
    forward = type(lm).forward
    monkeypatch.setattr(
        type(lm), "forward", lambda self, *a, **k: sizes.append(len(k["input_ids"])) or forward(self, *a, **k)
    )
    answers = answer(lm, None, tiny_tokenizer(), prompts_of(range(2, 26)), max_new_tokens=40)
    assert sizes[0] == 24
    for number, size in enumerate(sizes[1:], start=1):
        still = sum(len(one.tokens) >= number for one in answers)
        assert still <= size <= max(2 * still, 1) + 1


def test_a_streamer_sees_the_prompt_then_every_token():
    class Seen:
        def __init__(self):
            self.pieces, self.over = [], False

        def put(self, value):
            self.pieces.append(value.reshape(-1).tolist())

        def end(self):
            self.over = True

    lm, _ = policy_of("llama", "none")
    (prompt,), seen = prompts_of((5,)), Seen()
    (tokens,) = generate(lm, None, tiny_tokenizer(), [prompt], max_new_tokens=6, streamer=seen)
    assert seen.over
    assert seen.pieces == [prompt, *([token] for token in tokens)]


def test_no_prompts_and_empty_prompts():
    lm, _ = policy_of("llama", "none")
    assert generate(lm, None, tiny_tokenizer(), []) == []
    with pytest.raises(ConfigError, match="at least one token"):
        generate(lm, None, tiny_tokenizer(), [[1], []])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [None, 1, 7])
def test_several_answers_share_their_prompt(strategy, size, monkeypatch):
    """The same as asking each prompt as often, but the prompt is run once."""
    lm, made = policy_of("llama", strategy)
    prompts = prompts_of((3, 11, 7, 2))
    lm.generation_config.eos_token_id = list(range(0, 300, 11))
    seeds = [seed_of(7, row, k) for row in range(4) for k in range(3)]
    options = {"max_new_tokens": 9, "temperature": 1.0}
    repeated = [prompt for prompt in prompts for _ in range(3)]
    expected = answer(lm, made, tiny_tokenizer(), repeated, seeds=seeds, **options)
    places, forward = [], type(lm).forward
    count = lambda k: k["position_ids"].shape[1] * k["position_ids"].shape[0]  # noqa: E731
    monkeypatch.setattr(type(lm), "forward", lambda self, *a, **k: places.append(count(k)) or forward(self, *a, **k))
    brought = []
    found = answer(
        lm, made, tiny_tokenizer(), prompts, seeds=seeds, num_answers=3, batch_size=size, done=brought.append, **options
    )
    assert found == expected
    assert sum(brought) == 12
    assert any(one.ended for one in found)
    for one in found:
        assert one.ended == (one.end is not None)
        assert one.drawn == one.tokens + ([one.end] if one.ended else [])
        assert len(one.drawn) <= 9
    if size is None and strategy != "prefix":  # that one runs prompts of unequal length one by one
        assert places[0] == 4 * 11 + (4 * 3 if strategy == "prompt" else 0)
        assert places[1] == 12
