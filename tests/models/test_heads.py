"""Heads on packed rows say what transformers says of each example alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import Example, Segments, pack
from ftlit.errors import ConfigError
from ftlit.models.heads import ScalarPolicy, check_head, prepare_classifier, rated
from ftlit.models.load import load_classifier
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.testing import ENCODERS, tiny_classifier, tiny_examples, tiny_lm

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2")
STRATEGIES = {
    "LoRA": lambda: LoRA(rank=3),
    "Full": Full,
    "PrefixTuning": lambda: PrefixTuning(num_virtual_tokens=3, init_std=0.5),
    "PromptTuning": lambda: PromptTuning(num_virtual_tokens=3),
}


def row(lengths, seed=0):
    return [list(example.input_ids) for example in tiny_examples(lengths, seed=seed)]


def batch_of(rows):
    return rated(pack([Example(ids, [0.0] * len(ids)) for ids in rows]), range(len(rows)))


def alone(lm, ids):
    lm.set_attn_implementation("eager")
    return lm(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_packed_equals_alone(family):
    rows = row((9, 4, 4, 12, 7))
    ours = tiny_classifier(family, dtype=torch.float64)
    prepare_classifier(ours)
    policy = ScalarPolicy(ours, Full()).eval()
    theirs = tiny_classifier(family, dtype=torch.float64).eval()
    weights = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)
    got = policy(batch_of(rows))
    wanted = torch.stack([alone(theirs, ids) for ids in rows])
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)
    (got * weights).sum().backward()
    (wanted * weights).sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    family=st.sampled_from(["bert", "llama"]),
)
def test_no_example_sees_another(lengths, seed, family):
    rows = [ids[1:] for ids in row([length + 1 for length in lengths], seed)]
    lm = tiny_classifier(family)
    prepare_classifier(lm)
    policy = ScalarPolicy(lm, Full()).eval()
    together = policy(batch_of(rows))
    for ids, got in zip(rows, together, strict=True):
        torch.testing.assert_close(policy(batch_of([ids]))[0], got, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_answers_that_share_a_prompt(family):
    """Branches of one prompt score as the whole sequences do; the head reads each branch's end."""
    lm = tiny_classifier(family, labels=1)
    prepare_classifier(lm)
    policy = ScalarPolicy(lm, Full()).eval()
    prompt, first, second = row((6, 4, 5))
    flat = pack([Example(ids, [0.0] * len(ids)) for ids in (prompt, first, second)])
    positions = [*range(6), *range(6, 10), *range(6, 11)]
    branched = flat.replace(segments=Segments([6, 4, 5], [-1, 0, 0]), position_ids=torch.tensor([positions]))
    got = policy(rated(branched, [1, 2]))
    torch.testing.assert_close(got, policy(batch_of([prompt + first, prompt + second])), rtol=0, atol=2e-5)


def test_reads_the_last_token_that_is_no_padding():
    lm = tiny_classifier("llama", labels=1, pad_token_id=7)
    prepare_classifier(lm)
    policy = ScalarPolicy(lm, Full()).eval()
    theirs = tiny_classifier("llama", labels=1, pad_token_id=7).eval()
    rows = [[5, 7, 9, 7], [11, 12, 13], [7, 7], [4, 7]]
    for ids, got in zip(rows, policy(batch_of(rows)), strict=True):
        torch.testing.assert_close(got, alone(theirs, ids), rtol=0, atol=1e-5)
    branched = pack([Example(ids, [0.0] * len(ids)) for ids in ([5, 9], [7])]).replace(
        segments=Segments([2, 1], [-1, 0]), position_ids=torch.tensor([[0, 1, 2]])
    )
    torch.testing.assert_close(policy(rated(branched, [1]))[0], alone(theirs, [5, 9, 7]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_head_is_always_trained_and_never_adapted(family, name):
    lm = tiny_classifier(family, labels=2)
    prepare_classifier(lm)
    if family == "bert" and name == "PromptTuning":
        with pytest.raises(ConfigError, match="reads its first token"):
            ScalarPolicy(lm, STRATEGIES[name]())
        return
    policy = ScalarPolicy(lm, STRATEGIES[name]())
    head = {"llama": ["score"], "bert": ["classifier"]}[family]
    assert policy.head == head
    part = lm.get_submodule(head[0])
    assert type(part) is torch.nn.Linear
    policy(batch_of(row((5, 8)))).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in part.parameters())
    trunk = [n for n, p in lm.named_parameters() if p.requires_grad and not n.startswith(head[0])]
    assert (len(trunk) == sum(1 for n, _ in lm.named_parameters() if not n.startswith(head[0]))) == (name == "Full")
    assert trunk


def test_half_precision_keeps_a_wide_head():
    lm = tiny_classifier("llama", labels=1, dtype=torch.bfloat16)
    prepare_classifier(lm)
    policy = ScalarPolicy(lm, LoRA(rank=2))
    assert lm.score.weight.dtype == torch.float32
    assert lm.model.norm.weight.dtype == torch.bfloat16
    scores = policy(batch_of(row((5, 8))))
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert lm.score.weight.grad.dtype == torch.float32


def test_a_new_head_is_seeded(tmp_path):
    folder = str(tmp_path / "lm")
    tiny_lm("llama").save_pretrained(folder)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, again, other = (load_classifier(folder, ["reward"], seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.new == ["score"]
    assert torch.equal(one.lm.score.weight, again.lm.score.weight)
    assert not torch.equal(one.lm.score.weight, other.lm.score.weight)
    assert torch.equal(one.lm.model.norm.weight, tiny_lm("llama").model.norm.weight)


def test_a_model_built_in_python_lends_its_trunk():
    source = tiny_lm("llama")
    lm, new = load_classifier(source, ["reward"])
    assert lm.model is source.model
    assert new == ["score"]
    classifier = tiny_classifier("bert", labels=3)
    lm, new = load_classifier(classifier, ["a", "b", "c"])
    assert lm is classifier
    assert new == []
    assert lm.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_pooler_that_is_not_in_the_checkpoint_belongs_to_the_head(tmp_path):
    from transformers import BertForMaskedLM

    trunk = tiny_classifier("bert")
    BertForMaskedLM(trunk.config).save_pretrained(tmp_path)
    lm, new = load_classifier(str(tmp_path), ["a", "b"])
    policy = ScalarPolicy(lm, LoRA(rank=2), new)
    assert policy.head == ["classifier", "bert.pooler.dense"]
    assert lm.bert.pooler.dense.weight.requires_grad
    assert type(lm.bert.pooler.dense) is torch.nn.Linear


def test_what_cannot_be_is_refused(tmp_path):
    tiny_classifier("bert", labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(ConfigError, match=r"classifier with 3 outputs .* 1 are needed"):
        load_classifier(str(tmp_path / "three"), ["reward"])
    tiny_lm("cohere").save_pretrained(tmp_path / "cohere")
    with pytest.raises(ConfigError, match="no sequence classifier for cohere"):
        load_classifier(str(tmp_path / "cohere"), ["reward"])
    lm = tiny_classifier("bert", max_position_embeddings=16)
    prepare_classifier(lm)
    with pytest.raises(ConfigError, match="at most 16 tokens and an example has 17; set"):
        ScalarPolicy(lm, Full())(batch_of(row((3, 17))))
    policy = ScalarPolicy(lm, Full())
    with pytest.raises(ConfigError, match="no token scores"):
        policy(batch_of(row((3,))), needs={"entropy"})


def test_a_head_that_does_more_than_we_know_is_refused():
    lm = tiny_classifier("bert")
    prepare_classifier(lm)
    lm.config.pad_token_id = None
    lm.bert.pooler.register_forward_hook(lambda module, args, out: out * (2.0 if args[0].shape[1] > 1 else 1.0))
    with pytest.raises(ConfigError, match="other scores packed"):
        check_head(lm)
