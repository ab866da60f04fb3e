"""Tokens and positions that a model has no places for are one sentence at the start, not an IndexError."""

import numpy as np
import pytest

from ftlit.batch import Example, pack
from ftlit.data.store import Examples
from ftlit.errors import ConfigError
from ftlit.models.heads import longest_example, prepare_classifier
from ftlit.models.limits import check_examples, longest_learned
from ftlit.models.load import prepare
from ftlit.models.policy import Policy
from ftlit.peft import Full, PrefixTuning, PromptTuning
from ftlit.rollout.generate import answer
from ftlit.testing import tiny_classifier, tiny_comparisons, tiny_examples, tiny_lm, tiny_tokenizer
from tests.models.every_model import tiny


@pytest.mark.parametrize(
    ("kind", "places"),
    [("gpt2", 256), ("opt", 256), ("gpt_bigcode", 256), ("biogpt", 256), ("qwen3", None), ("gemma3", None)],
)
def test_learned_positions_are_found(kind, places):
    """Whatever the table is called, and however its first rows are used."""
    lm = tiny(kind)
    prepare(lm)
    assert longest_learned(lm) == places
    example = Example([5] * 257, [0.0] + [1.0] * 256)
    policy = Policy(lm, Full())
    if places is None:
        assert len(policy(pack([example])).logps) == 256
    else:
        with pytest.raises(ConfigError, match=r"has 257 tokens, and .* has learned 256 positions; set data.max_length"):
            policy(pack([example]))
        policy(pack([Example([5] * 256, [0.0] + [1.0] * 255)]))


@pytest.mark.parametrize(("family", "places"), [("bert", 512), ("roberta", 512), ("electra", 512), ("distilbert", 512)])
def test_learned_positions_of_encoders(family, places):
    lm = tiny_classifier(family)
    prepare_classifier(lm)
    assert longest_example(lm) == places


@pytest.mark.parametrize("strategy", [PromptTuning(3), PrefixTuning(3)])
def test_virtual_and_new_tokens_count(strategy):
    lm = tiny("gpt2")
    prepare(lm)
    policy = Policy(lm, strategy)
    examples = [Example([5] * 254, [0.0] + [1.0] * 253)]
    with pytest.raises(ConfigError, match=r"254 tokens and 3 virtual ones, .* set data.max_length to at most 253\."):
        check_examples(lm, examples, "train", 3)
    with pytest.raises(ConfigError, match=r"and 3 virtual ones"):
        policy(pack(examples))
    with pytest.raises(ConfigError, match=r"a prompt has 250 tokens and 3 virtual ones and up to 4 new ones"):
        answer(lm, strategy, tiny_tokenizer(), [[5] * 250], max_new_tokens=4)
    answer(lm.eval(), strategy, tiny_tokenizer(), [[5] * 249], max_new_tokens=4)


def test_the_longest_answer_counts_in_a_comparison():
    lm = tiny_lm("gpt2", max_position_embeddings=16)
    prepare(lm)
    check_examples(lm, tiny_comparisons([(10, 6, 6)]), "train")
    with pytest.raises(ConfigError, match=r"train, example 2, has 17 tokens"):
        check_examples(lm, tiny_comparisons([(10, 6, 6), (10, 7, 6)]), "train")


@pytest.mark.parametrize("kind", ["list", "arrays", "comparisons"])
def test_a_token_beyond_the_embedding(kind):
    lm = tiny_lm("llama", vocab_size=240)
    low, high = [Example([3, 239], [0.0, 1.0])], [Example([3, 240], [0.0, 1.0])]
    make = {
        "list": lambda some: some,
        "arrays": lambda some: Examples.of(some, range(len(some)), [False] * len(some)),
        "comparisons": lambda some: tiny_comparisons([(2, 2, 2)], vocabulary=240) if some is low else _high(),
    }[kind]
    check_examples(lm, make(low), "train")
    with pytest.raises(ConfigError, match=r"has the token number \d+, and LlamaForCausalLM embeds 240 tokens"):
        check_examples(lm, make(low + high) if kind != "comparisons" else make(high), "train")


def _high():
    comparisons = tiny_comparisons([(2, 2, 2)])
    comparisons.pieces.ids[3] = 240
    return comparisons


def test_rows_that_were_left_out_may_hold_any_token():
    lm = tiny_lm("llama", vocab_size=240)
    examples = Examples.of([Example([3, 239], [0, 1]), Example([3, 240], [0, 1])], [0, 1], [False, False])
    check_examples(lm, examples.take(np.array([0])), "train")


def test_a_prompt_with_a_token_beyond_the_embedding():
    lm = tiny_lm("llama", vocab_size=240).eval()
    with pytest.raises(ConfigError, match=r"a prompt has the token number 240, and LlamaForCausalLM embeds 240"):
        answer(lm, None, tiny_tokenizer(), [[3, 240]], max_new_tokens=2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_by_the_command_line(ftlit, tmp_path, family):
    """A tokenizer that knows more than the model; a row that is longer than the learned positions."""
    lm = tiny_lm(family, **({"max_position_embeddings": 32} if family == "gpt2" else {"vocab_size": 200}))
    lm.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What?", "completion": "%s"}\n' % ("a long answer ~ é" * 4) * 3)
    args = ["fit", "--config", "sft", "--config", "trainer/cpu", "--model.policy", tmp_path / "model"]
    assert ftlit(*args, "--data.train", tmp_path / "rows.jsonl", "--trainer.max_steps", "1", "--run", "r") == 1
    says = "has learned 32 positions" if family == "gpt2" else "embeds 200 tokens"
    assert says in ftlit.err
    assert "Traceback" not in ftlit.err


def test_examples_that_fit_pass():
    lm = tiny_lm("gpt2")
    prepare(lm)
    check_examples(lm, tiny_examples(), "train")
