"""Rows with scores, two texts, labels under other names, and labels that look like numbers."""

import json

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from ftlit.data.classification import ClassificationData
from ftlit.data.formats import Completion, Conversation, Text
from ftlit.data.formats.base import RowError
from ftlit.data.formats.classification import Classification, LabelledRow, TextPair, known_labelled
from ftlit.data.labels import LabelTemplate, shortened_pair
from ftlit.errors import ConfigError, DataError
from ftlit.metrics.regression import RegressionMetric
from ftlit.models.heads import prepare_classifier, read_packed, read_places
from ftlit.testing import tiny_classifier, tiny_tokenizer


def data_of(tmp_path, rows, suffix="jsonl", tokenizer=None, **settings):
    path = tmp_path / f"rows.{suffix}"
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    data = ClassificationData(train=str(path), cache=False, shuffle=False, **settings)
    data.use_tokenizer(tokenizer or tiny_tokenizer())
    data.setup("fit")
    return data


def pair_tokenizer(between=1):
    """`<|im_start|> A <|im_end|> B <|im_end|>`, as BERT joins two texts; twice the end between them as RoBERTa does."""
    tokenizer = tiny_tokenizer(None)
    ends = " ".join(["<|im_end|>"] * between)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair=f"<|im_start|> $A {ends} $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    return tokenizer


# ---- labels that look like numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["①", "②", "1"], ["1", "①", "②"]),
        (["x²", "²", "10", "9"], ["9", "10", "x²", "²"]),
        (["٣", "3"], ["3", "٣"]),
        (["--5", "-5", "4"], ["-5", "4", "--5"]),
        (["9" * 5000, "8"], ["8", "9" * 5000]),
        ([10, 2, -1], ["-1", "2", "10"]),
        ([True, False], ["false", "true"]),
    ],
)
def test_labels_in_order(tmp_path, labels, order):
    data = data_of(tmp_path, [{"text": "a", "label": label} for label in labels])
    assert data.labels == order
    assert not data.regression


# ---- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "scores"),
    [
        ([{"text": "a", "score": 3}, {"text": "b", "score": 4}], [3, 4]),
        ([{"text": "a", "label": 3.8}, {"text": "b", "label": 5.0}], [3.8, 5]),
        ([{"text": "a", "rating": 4}, {"text": "b", "rating": 1}], [4, 1]),
        ([{"text": "a", "score": "-0.5"}, {"text": "b", "score": "1e-1"}], [-0.5, 0.1]),
        ([{"premise": "a", "hypothesis": "b", "label": number} for number in (0.0, 2.5)], [0, 2.5]),
        ("text,label\na,3.25\nb,4\n", [3.25, 4]),
        ("text,stars\na,3\nb,4\n", [3, 4]),
    ],
)  # fmt: skip
def test_scores_are_a_regression(tmp_path, rows, scores):
    data = data_of(tmp_path, rows, "csv" if isinstance(rows, str) else "jsonl")
    assert (data.regression, data.labels) == (True, ["score"])
    torch.testing.assert_close(data.sets["train"].labels, torch.tensor(scores, dtype=torch.float32))
    assert f"from {min(scores):.4g} to {max(scores):.4g}" in data.describe()[-1]
    assert data.rendered(0).endswith(f"⟦{scores[0]:g}⟧")


def test_what_is_a_score_can_be_said(tmp_path):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    assert data_of(tmp_path, rows).labels == ["1", "2"]
    assert data_of(tmp_path, rows, regression=True).labels == ["score"]
    versions = "text,label\na,1.5\nb,2.0\n"
    assert data_of(tmp_path, versions, "csv", regression=False).labels == ["1.5", "2.0"]
    assert data_of(tmp_path, "text,label\na,1.5\nb,new\n", "csv").labels == ["1.5", "new"]
    with pytest.raises(ConfigError, match=r"data\.labels names labels, and with data\.regression rows have scores"):
        data_of(tmp_path, rows, labels=["1", "2"], regression=True)


def test_a_number_that_is_not_whole_is_no_name(tmp_path):
    with pytest.raises(DataError, match="row 2: column 'label' must hold a label: text, a whole number"):
        data_of(tmp_path, [{"text": "a", "label": "good"}, {"text": "b", "label": 0.5}])


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a", "score": "high"}, "row 2: column 'score' must hold a finite number, got 'high'"),
        ({"text": "a", "score": float("inf")}, "row 2: column 'score' must hold a finite number, got inf"),
        ({"text": "a", "score": True}, "row 2: column 'score' must hold a finite number, got True"),
        ({"text": "a", "label": "high"}, "row 2: column 'label' must hold a number, as the scores of other rows are"),
        ({"text": "a"}, "row 2: column 'label' must hold"),
    ],
)
def test_scores_that_are_none(tmp_path, row, text):
    with pytest.raises(DataError, match=text):
        data_of(tmp_path, [{"text": "a", "score": 0.5}, row])


def test_what_has_a_score():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    chat = Classification()({"messages": turns, "score": 1})
    assert isinstance(chat.content, Conversation)
    asked = Classification()({"instruction": "Hi", "output": "Yo", "system": "Be.", "score": 1})
    assert asked.content.messages[1:] == chat.content.messages
    assert Classification()({"prompt": "Hi", "completion": " Yo", "score": 1}).content == Completion("Hi", " Yo")
    lists = {"prompt": turns[:1], "completion": turns[1:], "score": 1}
    assert Classification()(lists).content == chat.content
    assert Classification()({"text": "Hi", "score": 1}) == LabelledRow(Text("Hi"), ("1",), score=1.0, is_scored=True)


def test_metric_is_that_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30, generator=generator)
    wanted = (scores + torch.randn(30, generator=generator)).round()  # with ties
    metric = RegressionMetric()
    losses = (scores - wanted).square()
    for part in (slice(0, 7), slice(7, 30)):
        weights = torch.ones(30)[part]
        weights[0] = 0  # a filler
        metric.update(scores[part, None], wanted[part], losses[part], weights)
    keep = torch.tensor([i not in (0, 7) for i in range(30)])
    found = metric.compute()
    assert float(found["loss"]) == pytest.approx(float(losses[keep].mean()))
    assert float(found["pearson"]) == pytest.approx(float(pearson_corrcoef(scores[keep], wanted[keep])), abs=1e-5)
    assert float(found["spearman"]) == pytest.approx(float(spearman_corrcoef(scores[keep], wanted[keep])), abs=1e-5)


# ---- two texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "renamed"),
    [
        (["premise", "hypothesis", "label", "idx"], {"text": "premise", "text_pair": "hypothesis"}),
        (["sentence1", "sentence2", "label"], {"text": "sentence1", "text_pair": "sentence2"}),
        (["sentence_A", "sentence_B", "label"], {"text": "sentence_A", "text_pair": "sentence_B"}),
        (["question1", "question2", "label"], {"text": "question1", "text_pair": "question2"}),
        (["question", "sentence", "label"], {"text": "question", "text_pair": "sentence"}),
        (["text", "text_pair", "label"], {}),
        (["text", "labels"], {"label": "labels"}),
        (["sentence", "rating"], {"text": "sentence", "score": "rating"}),
        (["title", "content", "label"], {}),  # which of them?
        (["text", "emotion", "sentiment"], {}),
    ],
)
def test_known_columns(columns, renamed):
    assert known_labelled(columns) == renamed


@pytest.mark.parametrize("between", [1, 2])
def test_two_texts_are_joined_by_the_tokenizer(tmp_path, between):
    tokenizer = pair_tokenizer(between)
    tokenizer.model_input_names = ["input_ids", "token_type_ids"]
    rows = [{"premise": "It rains.", "hypothesis": "It is wet.", "label": label} for label in (0, 1)]
    data = data_of(tmp_path, rows, tokenizer=tokenizer)
    ids = tokenizer("It rains.", "It is wet.")["input_ids"]
    assert list(data.sets["train"][0].input_ids)[:-1] == ids
    assert data.sets["train"].borders.tolist() == [10 + between] * 2
    assert LabelTemplate(tokenizer, "plain").between() == between


@pytest.mark.parametrize("truncate", ["start", "end"])
@pytest.mark.parametrize("sizes", [(30, 5), (5, 30), (30, 30), (3, 3), (25, 26)])
def test_long_pairs_are_cut_as_transformers_does(truncate, sizes):
    tokenizer = pair_tokenizer(2)
    tokenizer.truncation_side = {"start": "left", "end": "right"}[truncate]
    texts = ["".join(chr(97 + i % 26) for i in range(size)) for size in sizes]
    ids, template = tokenizer(*texts)["input_ids"], LabelTemplate(tokenizer, "plain")
    border = template.border(TextPair(*texts))
    for length in (12, 20, 21, 40):
        if len(ids) <= length:
            continue
        short, place = shortened_pair(ids, border, length, truncate, *template.ends(), template.between())
        theirs = tokenizer(*texts, truncation=True, max_length=length)["input_ids"]
        assert len(short) == len(theirs) == length
        if abs(sizes[0] - sizes[1]) > 1:  # of equally long ones either may lose the last
            assert short == theirs
        assert short[place - 2 : place] == [2, 2]


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_scores_of_pairs_are_those_of_transformers(tmp_path, family):
    """Packed, with the types of tokens that a model tells two texts apart by."""
    lm = tiny_classifier(family, 2, **({"pad_token_id": 0} if family == "roberta" else {})).eval()
    tokenizer = pair_tokenizer(1)
    if family == "bert":
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    lm.config.pad_token_id = None if family == "llama" else lm.config.pad_token_id
    pairs = [("It rains.", "It is wet."), ("No", "A longer one here"), ("x", "y")]
    rows = [{"sentence1": a, "sentence2": b, "label": i % 2} for i, (a, b) in enumerate(pairs)]
    data = data_of(tmp_path, rows, tokenizer=tokenizer)
    theirs = []
    with torch.no_grad():
        for pair in pairs:
            inputs = tokenizer(*pair, return_tensors="pt")
            assert ("token_type_ids" in inputs) == (family == "bert")
            theirs.append(lm(**inputs).logits)
        prepare_classifier(lm)
        (batch,) = list(data._eval_loader(data.sets["train"]))
        ours = read_packed(lm, batch.replace(target_positions=read_places(lm, batch)))
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_transformers():
    lm = tiny_classifier("bert", 1, problem_type="regression").eval()
    ids, wanted = torch.tensor([[1, 5, 6, 2]]), torch.tensor([2.5])
    with torch.no_grad():
        out = lm(input_ids=ids, labels=wanted)
    assert float(out.loss) == pytest.approx(float((out.logits[:, 0] - wanted).square()))
    assert transformers.__version__


@pytest.mark.parametrize(
    "medium", [{"image": ["a.png"]}, {"images": ["a.png"]}, {"videos": ["v.mp4"]}, {"audio": {"path": "a"}}]
)
def test_media_are_refused(medium):
    with pytest.raises(RowError, match="ftlit trains on text alone"):
        Classification()({"text": "t", "label": 1, **medium})
