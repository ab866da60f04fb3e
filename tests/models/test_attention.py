import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import PackedBatch, Segments, pack
from ftlit.errors import ConfigError
from ftlit.models.attention import segment_attention
from ftlit.models.policy import check_packing, head_of, score_packed, use_segment_attention
from ftlit.models.score import token_scores
from ftlit.testing import FAMILIES, tiny_examples, tiny_lm

# Families whose norms or softmax round to float32 inside.
TOLERANCE = {"gemma2": 1e-5}


def padded_dtype(family):
    """transformers' eager Gemma 2 makes NaN of padding in float64: its mask value overflows its float32 softmax."""
    return torch.float32 if family == "gemma2" else torch.float64


def plain(family, dtype=torch.float64):
    """The same model on transformers' own attention: eager has soft-caps and windows."""
    lm = tiny_lm(family, dtype)
    lm.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    return lm.eval()


def switched(family, dtype=torch.float64):
    lm = tiny_lm(family, dtype).eval()
    use_segment_attention(lm)
    return lm


def logps_of(lm, ids):
    logits = lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[1:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_transformers_one_at_a_time(family):
    examples = tiny_examples((9, 4, 4, 12, 2, 7))
    packed = score_packed(switched(family), pack(examples)).logps
    lm = plain(family)
    single = torch.cat([logps_of(lm, e.input_ids)[torch.tensor(e.weights[1:]) != 0] for e in examples])
    torch.testing.assert_close(packed, single, rtol=0, atol=TOLERANCE.get(family, 1e-9))


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_without_segments_are_transformers_own(family):
    ids = torch.tensor([e.input_ids for e in tiny_examples((11, 11))])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    dtype = padded_dtype(family)
    ours = switched(family, dtype)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    theirs = plain(family, dtype)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=TOLERANCE.get(family, 1e-9))


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_transformers_own(family):
    ids = torch.tensor([e.input_ids for e in tiny_examples((11, 11))])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    dtype = padded_dtype(family)
    assert torch.equal(switched(family, dtype).generate(ids, **options), plain(family, dtype).generate(ids, **options))


@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=6),
    family=st.sampled_from(["llama", "mistral", "qwen3", "gemma3"]),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
def test_nothing_leaks_between_examples(lengths, family, data):
    lm = switched(family)
    examples = tiny_examples(lengths)
    spared = data.draw(st.integers(0, len(lengths) - 1))
    others = tiny_examples(lengths, seed=1)
    mixed = [e if i == spared else others[i] for i, e in enumerate(examples)]
    batch, changed = pack(examples), pack(mixed)
    keep = batch.target_segments == spared
    a, b = score_packed(lm, batch).logps, score_packed(lm, changed).logps
    assert torch.equal(a[keep], b[keep])


def branches(prompt, answers):
    """A prompt as parent and answers as branches, and the same as separate examples."""
    ids = prompt + [t for answer in answers for t in answer]
    lengths = [len(prompt), *map(len, answers)]
    positions, targets, owners, offset = list(range(len(prompt))), [], [], len(prompt)
    for number, answer in enumerate(answers, start=1):
        positions += range(len(prompt), len(prompt) + len(answer))
        targets += [len(prompt) - 1, *range(offset, offset + len(answer) - 1)]
        owners += [number] * len(answer)
        offset += len(answer)
    chosen = [t for answer in answers for t in answer]
    return PackedBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        segments=Segments(lengths, [-1] + [0] * len(answers)),
        target_positions=torch.tensor(targets),
        target_ids=torch.tensor(chosen),
        target_weights=torch.ones(len(chosen)),
        target_segments=torch.tensor(owners),
        examples=(0,) * len(lengths),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_of_a_shared_prompt_equal_separate_sequences(family):
    tokens = [list(e.input_ids) for e in tiny_examples((8, 3, 6, 6))]
    packed = score_packed(switched(family), branches(tokens[0], tokens[1:])).logps
    lm = plain(family)
    single = torch.cat([logps_of(lm, tokens[0] + answer)[-len(answer) :] for answer in tokens[1:]])
    torch.testing.assert_close(packed, single, rtol=0, atol=TOLERANCE.get(family, 1e-9))


def test_gradients_through_branches_equal_separate_sequences():
    lm = switched("mistral")
    tokens = [list(e.input_ids) for e in tiny_examples((8, 3, 6))]
    parameters = list(lm.parameters())
    packed = torch.autograd.grad(score_packed(lm, branches(tokens[0], tokens[1:])).logps.sum(), parameters)
    single = torch.autograd.grad(
        sum(logps_of(lm, tokens[0] + answer)[-len(answer) :].sum() for answer in tokens[1:]), parameters
    )
    for a, b in zip(packed, single, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # gradients of norms are rounded to float32


def test_a_grandchild_sees_its_whole_line():
    lm = switched("llama")
    tokens = [list(e.input_ids) for e in tiny_examples((4, 3, 5))]
    ids = [token for part in tokens for token in part]
    batch = branches(tokens[0], tokens[1:]).replace(
        position_ids=torch.arange(len(ids))[None],
        segments=Segments([4, 3, 5], [-1, 0, 1]),
        target_positions=torch.arange(len(ids) - 1),
        target_ids=torch.tensor(ids[1:]),
    )
    torch.testing.assert_close(score_packed(lm, batch).logps, logps_of(plain("llama"), ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_the_models_own(family):
    lm = plain(family)
    ids = torch.tensor([tiny_examples((9,))[0].input_ids])
    hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    ours = token_scores(hidden, head_of(lm), ids[0, 1:]).logps
    torch.testing.assert_close(ours, logps_of(lm, ids[0].tolist()), rtol=0, atol=TOLERANCE.get(family, 1e-9))


def test_strange_arguments_are_refused():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ConfigError, match="position_bias"):
        segment_attention(torch.nn.Module(), q, q, q, None, segments=Segments([4]), position_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="parents need causal"):
        segment_attention(torch.nn.Module(), q, q, q, None, segments=Segments([2, 2], [-1, 0]), is_causal=False)


def test_a_model_that_ignores_segments_is_refused():
    lm = tiny_lm("llama")
    lm.set_attn_implementation("sdpa")  # never told of segments: it would attend across examples
    with pytest.raises(ConfigError, match="other log-probabilities packed"):
        check_packing(lm)


def test_a_head_that_does_more_than_we_know_is_refused():
    lm = tiny_lm("llama")
    use_segment_attention(lm)
    lm.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)
    with pytest.raises(ConfigError, match="other log-probabilities packed"):
        check_packing(lm)


def test_unknown_layer_types_are_refused():
    lm = tiny_lm("llama")
    lm.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="linear_attention"):
        use_segment_attention(lm)
