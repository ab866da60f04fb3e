"""`ftlit fit --config classification` with the real command: decoders, encoders, strategies, resume, ranks."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ftlit.data.formats import Text
from ftlit.export.scorer import RewardScorer, SequenceScorer, open_classifier
from ftlit.testing import tiny_classifier, tiny_lm, tiny_tokenizer

from .test_ranks import run

LETTERS = {"good": "aA", "bad": "bB", "so-so": "cC"}
TEXTS = ["a fine day 1", "awful", "x", "a plain and fair text that is longer than the others"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A decoder whose pad token is its end token, and an encoder without a classifier."""
    from tokenizers.processors import TemplateProcessing
    from transformers import BertForMaskedLM

    folder = tmp_path_factory.mktemp("models")
    tiny_lm("llama").save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    trunk = tiny_classifier("bert")  # large weights, of a known seed
    encoder = BertForMaskedLM(trunk.config)
    encoder.bert.load_state_dict(trunk.bert.state_dict(), strict=False)
    encoder.save_pretrained(folder / "bert")
    tokenizer = tiny_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save_pretrained(folder / "bert")
    return {name: str(folder / name) for name in ("llama", "bert")}


@pytest.fixture
def rows(tmp_path):
    lines = [
        {"text": f"{number} {letter * (3 + number % 4)}", "label": label}
        for number in range(8)
        for label, letters in LETTERS.items()
        for letter in letters
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def options(model, rows, peft="lora", *more):
    return [
        *("fit", "--config", "classification", "--config", "trainer/cpu", "--config", f"peft/{peft}"),
        *("--model.policy", model, "--data.train", rows, "--data.validation", "0.25", "--data.batch_size", "6"),
        *("--model.lr", "0.01", *more),
    ]


def metrics(folder):
    with (Path(folder) / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def plain_scores(folder):
    """What plain transformers says of the texts, padded into one batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return lm(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_learns_and_plain_transformers_gives_the_same_scores(ftlit, models, rows, family):
    more = ["--trainer.max_epochs", "8", "--model.lr", "0.003" if family == "bert" else "0.01"]
    assert ftlit(*options(models[family], rows, "full", *more, "--run", "r")) == 0
    assert "drawn anew with seed 0" in ftlit.out
    assert "3 outputs: bad, good, so-so" in ftlit.out
    assert "(nats a row)" in ftlit.out
    values = [row for row in metrics("r") if "val/loss" in row]
    assert values[-1]["val/accuracy"] > 0.8 > 0.6 > values[0]["val/accuracy"]
    assert values[-1]["val/accuracy_low"] < values[-1]["val/accuracy"] <= values[-1]["val/accuracy_high"]
    assert {"val/f1", "val/auroc"} <= values[-1].keys()
    assert ftlit("export", "r", "--to", "m") == 0
    ours = SequenceScorer(open_classifier("r"))([Text(text) for text in TEXTS])
    torch.testing.assert_close(plain_scores("m"), ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(SequenceScorer(open_classifier("m"))([Text(t) for t in TEXTS]), ours, rtol=0, atol=1e-5)
    assert ftlit("score", "r", "--rows", rows, "--output", "s.jsonl") == 0
    scored = [json.loads(line) for line in Path("s.jsonl").read_text().splitlines()]
    wanted = [json.loads(line)["label"] for line in Path(rows).read_text().splitlines()]
    assert sum(a["label"] == b for a, b in zip(scored, wanted, strict=True)) > 0.8 * len(wanted)
    assert sum(scored[0]["probabilities"].values()) == pytest.approx(1)
    assert ftlit("generate", "r", "--prompt", "hi") == 1
    assert "use ftlit score" in ftlit.err
    assert ftlit("predict", "--config", "r/config.yaml", "--data.predict", rows) == 1


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("peft", ["lora", "prefix_tuning", "prompt_tuning"])
def test_every_strategy_runs_or_is_refused(ftlit, models, rows, family, peft):
    args = options(models[family], rows, peft, "--trainer.max_steps", "3", "--run", "r")
    if (family, peft) == ("bert", "prompt_tuning"):
        assert ftlit(*args) == 1
        assert "reads its first token" in ftlit.err
        return
    assert ftlit(*args) == 0
    ours = SequenceScorer(open_classifier("r"))([Text(text) for text in TEXTS])
    assert ftlit("export", "r", "--to", "a", "--adapter") == 0
    for folder in ("a", "r/adapter/last"):
        again = SequenceScorer(open_classifier(folder))([Text(text) for text in TEXTS])
        torch.testing.assert_close(again, ours, rtol=0, atol=1e-6)
    if peft == "lora":
        assert ftlit("export", "r", "--to", "m") == 0
        torch.testing.assert_close(plain_scores("m"), ours, rtol=0, atol=1e-5)
    checkpoint = torch.load("r/checkpoints/last.ckpt", weights_only=True)
    head = {"llama": {"score"}, "bert": {"classifier", "bert.pooler.dense"}}[family]
    names = {name.removeprefix("policy.lm.").rsplit(".", 1)[0] for name in checkpoint["state_dict"]}
    assert head <= names


def test_several_labels_a_row(ftlit, models, tmp_path):
    lines = [
        {"text": f"{'fine ' * (n % 2)}{'long ' * (n % 3 > 0)}{n}", "label": ["f"] * (n % 2) + ["l"] * (n % 3 > 0)}
        for n in range(24)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ["--model.class_weights", "balanced", "--trainer.max_epochs", "12", "--run", "r"]
    assert ftlit(*options(models["llama"], str(path), "full", *more)) == 0
    assert [row for row in metrics("r") if "val/loss" in row][-1]["val/exact_match"] > 0.6
    assert ftlit("export", "r", "--to", "m") == 0
    assert AutoModelForSequenceClassification.from_pretrained("m").config.problem_type == "multi_label_classification"
    assert ftlit("score", "r", "--rows", str(path)) == 0
    scored = [json.loads(line) for line in ftlit.out.splitlines()]
    right = [set(a["labels"]) == set(b["label"]) for a, b in zip(scored, lines, strict=True)]
    assert sum(right) > 0.7 * len(lines)


def test_goes_on_as_if_never_stopped(ftlit, models, rows):
    """Stopped in the middle of an epoch, with dropout; bitwise."""
    args = options(models["bert"], rows, "lora", "--trainer.max_epochs", "2", "--model.label_smoothing", "0.1")
    args += ["--model.schedule", "constant", "--model.warmup", "1", "--model.peft.dropout", "0.1"]
    assert ftlit(*args, "--run", "whole") == 0
    assert ftlit(*args, "--run", "split", "--trainer.max_steps", "4") == 0
    assert ftlit(*args, "--run", "split", "--ckpt_path", "last") == 0
    one, two = (
        torch.load(f"{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "split")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_two_ranks_equal_one(models, rows, tmp_path):
    common = options(models["bert"], rows, "lora", "--trainer.max_epochs", "1")
    run([*common, "--run", "one", "--data.batch_size", "4"], tmp_path)
    for kind in ("ddp", "fsdp"):
        more = ["--config", f"trainer/{kind}", "--trainer.devices", "2", "--data.batch_size", "2", "--run", kind]
        run([*common, *more], tmp_path)
        one, two = (
            torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
            for name in ("one", kind)
        )
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-4, msg=name)
        for first, second in zip(metrics(tmp_path / "one"), metrics(tmp_path / kind), strict=True):
            for key in ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/auroc", "val/f1"):
                assert first.get(key) == pytest.approx(second.get(key), abs=1e-3)


def test_conversations_with_labels(ftlit, models, tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "yes" * (n % 2) + "no"}]}
        | {"label": n % 2, "weight": 1 + n % 3}
        for n in range(12)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    numbers = ["--data.labels", "[1, 0]", "--model.class_weights", "{0: 2}", "--trainer.max_steps", "3", "--run", "r"]
    assert ftlit(*options(models["llama"], str(path), "full", *numbers)) == 0
    assert "2 outputs: 1, 0" in ftlit.out
    assert yaml.safe_load(Path("r/config.yaml").read_text())["model"]["class_path"].endswith("Classification")
    assert ftlit("score", "r", "--rows", str(path)) == 0
    ours = [list(json.loads(line)["probabilities"].values()) for line in ftlit.out.splitlines()]
    assert ftlit("export", "r", "--to", "m") == 0
    tokenizer = AutoTokenizer.from_pretrained("m")
    lm = AutoModelForSequenceClassification.from_pretrained("m").eval()
    inputs = tokenizer.apply_chat_template(
        [line["messages"] for line in lines], padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        theirs = lm(**inputs).logits.softmax(1)
    torch.testing.assert_close(theirs, torch.tensor(ours), rtol=0, atol=1e-5)


def test_mistakes_are_one_sentence(ftlit, models, rows):
    assert ftlit(*options(models["llama"], rows, "lora", "--model.class_weights", "{fine: 2}", "--run", "a")) == 1
    assert "there is no label 'fine'" in ftlit.err
    for overlay in ("forgetting/replay", "forgetting/ewc", "forgetting/probe", "forgetting/budget", "eval/generation"):
        assert ftlit(*options(models["llama"], rows, "lora", "--config", overlay, "--run", "b")) == 1
        assert "no output layer over tokens" in ftlit.err
    assert ftlit("score", models["llama"], "--rows", rows) == 1
    assert "is no sequence classifier" in ftlit.err


@pytest.mark.parametrize("overlay", ["l2_to_init", "interpolate"])
def test_controls_of_weights_work(ftlit, models, rows, overlay):
    args = options(models["bert"], rows, "lora", "--config", f"forgetting/{overlay}", "--trainer.max_steps", "2")
    assert ftlit(*args, "--run", "r") == 0


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_scores(ftlit, models, tmp_path, family):
    """A regression of answers or of two texts; what comes of it rates rows."""
    rows = [{"sentence1": "aA"[n % 2] * (1 + n % 5), "sentence2": "bb", "label": 0.5 * (n % 5)} for n in range(30)]
    if family == "llama":
        asked = {"messages": [{"role": "user", "content": "Many?"}]}
        rows = [
            {"messages": [*asked["messages"], {"role": "assistant", "content": "a" * (1 + n % 5)}], "score": n % 5}
            for n in range(30)
        ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rate = "0.01" if family == "bert" else "0.03"
    more = ["--trainer.max_epochs", "12", "--model.lr", rate, "--run", "r"]
    assert ftlit(*options(models[family], str(path), "full", *more)) == 0, ftlit.err
    assert "1 output: score" in ftlit.out
    assert "(squared error a row)" in ftlit.out
    assert "scores of train: mean" in ftlit.out
    values = [row for row in metrics("r") if "val/loss" in row]
    assert {"val/pearson", "val/spearman"} <= values[-1].keys()
    assert values[-1]["val/loss"] < values[0]["val/loss"]
    if family == "llama":
        assert values[-1]["val/loss"] < 0.5 * values[0]["val/loss"]
        assert min(values[-1]["val/pearson"], values[-1]["val/spearman"]) > 0.7
    assert ftlit("score", "r", "--rows", str(path)) == 0, ftlit.err
    scored = [json.loads(line)["score"] for line in ftlit.out.splitlines()]
    wanted = [row.get("score", row.get("label")) for row in rows]
    if family == "llama":
        assert sum(abs(a - b) for a, b in zip(scored, wanted, strict=True)) < 0.5 * len(rows)
    assert ftlit("export", "r", "--to", "m") == 0
    plain = AutoModelForSequenceClassification.from_pretrained("m").eval()
    assert (plain.config.problem_type, plain.config.num_labels) == ("regression", 1)
    if family == "bert":
        tokenizer = AutoTokenizer.from_pretrained("m")
        with torch.no_grad():
            theirs = [
                float(plain(**tokenizer(r["sentence1"], r["sentence2"], return_tensors="pt")).logits) for r in rows
            ]
        assert scored == pytest.approx(theirs, abs=1e-4)


def test_answers_with_scores_make_a_reward_model(ftlit, models, tmp_path):
    """`--config classification` on answers and scores rates answers; `--config reward` says so."""
    rows = [{"prompt": "Many?", "completion": " " + "a" * (1 + n % 5), "score": float(n % 5)} for n in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ftlit(*options(models["llama"], str(path), "full", "--trainer.max_steps", "3", "--run", "r")) == 0, ftlit.err
    assert ftlit("score", "r", "--rows", str(path)) == 0, ftlit.err
    scored = [json.loads(line)["score"] for line in ftlit.out.splitlines()]
    rewards = RewardScorer("r")([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert rewards == pytest.approx(scored, abs=1e-4)
    assert len(set(rewards)) > 3

    grpo = ("fit", "--config", "grpo", "--config", "trainer/cpu", "--config", "peft/lora")
    reward = '{"class_path": "RewardScorer", "init_args": {"model": "r"}}'
    asked = ("--model.policy", models["llama"], "--data.train", str(path), "--model.reward", f"[{reward}]")
    small = ("--data.batch_size", "2", "--trainer.max_steps", "1", "--model.max_new_tokens", "4")
    assert ftlit(*grpo, *asked, *small, "--run", "g") == 0, ftlit.err

    wrong = ("fit", "--config", "reward", "--config", "trainer/cpu", "--model.policy", models["llama"])
    assert ftlit(*wrong, "--data.train", str(path), "--run", "w") != 0
    assert "--config classification" in ftlit.err
