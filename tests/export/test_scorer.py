"""Any sequence classifier of transformers as a reward, with its own tokenizer and template."""

import json

import pytest
import torch
import transformers

from ftlit.data.formats import Message, Text
from ftlit.errors import ConfigError, DataError
from ftlit.export.rating import contents_of
from ftlit.export.scorer import RewardScorer, SequenceScorer, open_classifier
from ftlit.rollout.verifiers import Verifier
from ftlit.testing import tiny_classifier, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'][0] + ': ' + m['content'] + '<|im_end|> ' }}{% endfor %}"
PROMPTS = [[{"role": "user", "content": text}] for text in ("hi", "what is the longest of these?", "b")]
ANSWERS = ["yes", "no, never", "c" * 30]


def saved(folder, lm, template=TEMPLATE):
    lm.save_pretrained(folder)
    tokenizer = tiny_tokenizer(template)
    tokenizer.pad_token_id = lm.config.pad_token_id
    tokenizer.save_pretrained(folder)
    return str(folder)


def plainly(folder, output=0):
    """What its model card would say: the template's text, one conversation at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        turns = [*prompt, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            found.append(lm(input_ids=ids).logits[0, output].item())
    return found


@pytest.mark.parametrize("family", ["llama", "roberta", "modernbert"])
def test_reads_through_its_own_template(family, tmp_path):
    folder = saved(tmp_path / "m", tiny_classifier(family, labels=1, pad_token_id=1 if family != "llama" else 290))
    scorer = RewardScorer(folder)
    assert isinstance(scorer, Verifier)
    assert scorer(PROMPTS, ANSWERS, reference=[None] * 3) == pytest.approx(plainly(folder), abs=1e-5)
    assert scorer.scorer._policy is not None
    messages = [[Message(turn["role"], turn["content"]) for turn in prompt] for prompt in PROMPTS]
    assert scorer(messages, ANSWERS) == scorer(PROMPTS, ANSWERS)
    one_by_one = [scorer([prompt], [answer])[0] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert one_by_one == pytest.approx(scorer(PROMPTS, ANSWERS), abs=1e-5)
    assert scorer([], []) == []


@pytest.mark.parametrize("pad", [1, None])
def test_a_model_that_cannot_be_packed_is_padded(tmp_path, pad):
    config = transformers.DebertaV2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
        num_labels=2, relative_attention=True, pos_att_type=["p2c", "c2p"], pad_token_id=1,
    )  # fmt: skip
    lm = transformers.DebertaV2ForSequenceClassification(config)
    folder = saved(tmp_path / "m", lm)
    if pad is None:
        settings = json.loads((tmp_path / "m/config.json").read_text())
        (tmp_path / "m/config.json").write_text(json.dumps({**settings, "pad_token_id": None}))
    scorer = RewardScorer(folder, label="LABEL_1")
    assert scorer(PROMPTS, ANSWERS) == pytest.approx(plainly(folder, 1), abs=1e-5)
    assert scorer.scorer._policy is None


def test_which_output_is_the_reward(tmp_path):
    lm = tiny_classifier("bert", labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    folder = saved(tmp_path / "m", lm)
    assert RewardScorer(folder, "good")(PROMPTS, ANSWERS) == pytest.approx(plainly(folder, 1), abs=1e-5)
    assert RewardScorer(folder, 1)(PROMPTS, ANSWERS) == RewardScorer(folder, "good")(PROMPTS, ANSWERS)
    with pytest.raises(ConfigError, match=r"has 2 outputs \(bad, good\); set label to one"):
        RewardScorer(folder)(PROMPTS, ANSWERS)
    with pytest.raises(ConfigError, match="has no output 'god': did you mean 'good'"):
        RewardScorer(folder, "god")(PROMPTS, ANSWERS)
    with pytest.raises(ConfigError, match="max_length must be at least 2"):
        RewardScorer(folder, max_length=1)


def test_too_long_loses_its_start_and_is_counted(tmp_path):
    folder = saved(tmp_path / "m", tiny_classifier("llama", labels=1, pad_token_id=290))
    scorer = SequenceScorer(open_classifier(folder), max_length=8)
    short, long = Text("12345678"), Text("abcdef12345678")
    first, second = scorer([short, long])
    assert torch.equal(first, second)
    assert scorer.shortened == 1
    end = SequenceScorer(open_classifier(folder), max_length=8, truncate="end")
    assert torch.allclose(end([long]), end([Text("abcdef12")]))
    short_bert = saved(tmp_path / "b", tiny_classifier("bert", max_position_embeddings=16))
    limited = SequenceScorer(open_classifier(short_bert))
    assert limited.max_length == 16
    assert limited([Text("x" * 40)]).isfinite().all()


def test_rows_to_score(tmp_path):
    def rows(name, *lines):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return contents_of(str(tmp_path / name))

    turn = {"role": "user", "content": "q"}
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in "cr")
    found = rows("a.jsonl", {"prompt": [turn], "chosen": chosen, "rejected": rejected})
    wanted = [(0, 1, "c"), (0, 2, "r")]
    assert [(one.row, one.shown["answer"], one.content.messages[-1].content) for one in found] == wanted
    (found,) = rows("b.jsonl", {"messages": [turn]})
    assert found.shown == {"messages": [turn]}
    (found,) = rows("c.jsonl", {"text": "t", "label": "x"})
    assert found.content == Text("t")
    (found,) = rows("d.jsonl", {"prompt": "p", "completion": "c"})
    assert found.shown == {"prompt": "p", "completion": "c"}
    found = rows("e.jsonl", {"prompt": "2+2=", "answers": ["5", "4"], "scores": [1, 9]})
    assert [(one.shown["answer"], one.shown["completion"]) for one in found] == [(1, "5"), (2, "4")]  # as in the row
    with pytest.raises(DataError, match="an answer is empty"):
        rows("f.jsonl", {"prompt": [turn], "chosen": chosen, "rejected": [{"role": "assistant", "content": " "}]})


def test_an_answer_that_was_cut_is_not_closed_and_begins_with_the_open_thought(tmp_path):
    folder = saved(tmp_path / "m", tiny_classifier("llama", labels=1, pad_token_id=290))
    scorer = RewardScorer(folder)
    read = []
    run = scorer.scorer._run
    scorer.scorer._run = lambda rows, borders: (read.extend(rows), run(rows, borders))[1]
    decode = scorer.scorer.template.tokenizer.decode
    prompts, texts = [PROMPTS[0]] * 3, ["yes", " yes\n", ""]
    columns = {"truncated": [False, True, True], "prefilled": ["", "<think>\n", ""]}
    whole = scorer(prompts, texts, **columns)
    closed = "u: hi<|im_end|> a: {}<|im_end|> "
    assert sorted(decode(row) for row in read) == sorted(
        [closed.format("yes"), "u: hi<|im_end|> a: <think>\n yes", closed.format("")]
    )
    assert whole[0] == pytest.approx(scorer(prompts[:1], ["yes"])[0], abs=1e-5)
    read.clear()
    scorer(["The sea is"] * 2, [" blue", " blue"], truncated=[False, True])
    assert [decode(row) for row in sorted(read, key=len)] == ["The sea is blue", "The sea is blue<|im_end|>"]
