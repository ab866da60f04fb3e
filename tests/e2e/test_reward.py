"""`ftlit fit --config reward` with the real command: pairs, rankings, what others load, resume, ranks."""

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ftlit.export.scorer import RewardScorer
from ftlit.testing import tiny_classifier, tiny_tokenizer

from .test_ranks import run


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def pair(number):
    good, bad = "yes" * (1 + number % 3), "no" * (1 + number % 4)
    return {"prompt": f"Is it {number}?", "chosen": turns("", good)[1:], "rejected": turns("", bad)[1:]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    rows = [pair(number) | ({"margin": 0.5, "weight": 2} if number % 3 == 0 else {}) for number in range(24)]
    return write(tmp_path / "pairs.jsonl", rows)


def options(model, rows, peft="lora", *more):
    return [
        *("fit", "--config", "reward", "--config", "trainer/cpu", "--config", f"peft/{peft}"),
        *("--model.policy", model, "--data.train", rows, "--data.validation", "0.25", "--data.batch_size", "3"),
        *("--model.lr", "0.01", *more),
    ]


def metrics(folder):
    with (Path(folder) / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def weights(folder):
    return torch.load(Path(folder) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def scores(ftlit, model, rows):
    assert ftlit("score", model, "--rows", rows) == 0
    return [json.loads(line) for line in ftlit.out.splitlines()]


@pytest.mark.parametrize("peft", ["lora", "full"])
def test_learns_and_others_load_it_to_the_same_scores(ftlit, pairs, tiny_model_folder, peft):
    args = options(tiny_model_folder, pairs, peft, "--trainer.max_epochs", "4", "--model.objective", "BradleyTerry")
    assert ftlit(*args, "--model.objective.center", "0.01", "--run", "r") == 0
    assert "score new, at zero; reads the last token that is not the pad token 0" in ftlit.out
    values = [row for row in metrics("r") if "val/loss" in row]
    assert values[-1]["val/accuracy"] == 1.0 > values[0]["val/accuracy"]
    assert values[0]["val/rewards/chosen"] == values[0]["val/rewards/rejected"] == 0  # a new head starts at zero
    assert values[0]["val/accuracy"] == 0.5
    assert 0.5 < values[-1]["val/accuracy_low"] < 1 == values[-1]["val/accuracy_high"]
    difference = values[-1]["val/rewards/chosen"] - values[-1]["val/rewards/rejected"]
    assert values[-1]["val/margin"] == pytest.approx(difference, abs=1e-5)
    assert Path("r/calibration.png").read_bytes()[:4] == b"\x89PNG"
    ours = scores(ftlit, "r", pairs)
    assert [(one["row"], one["answer"]) for one in ours[:4]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(chosen["score"] > rejected["score"] for chosen, rejected in zip(ours[::2], ours[1::2], strict=True))

    assert ftlit("export", "r", "--to", "m") == 0
    tokenizer = AutoTokenizer.from_pretrained("m")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    lm = AutoModelForSequenceClassification.from_pretrained("m").eval()
    assert lm.config.num_labels == 1
    inputs = tokenizer.apply_chat_template(
        [one["messages"] for one in ours], padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        theirs = lm(**inputs).logits[:, 0]
    torch.testing.assert_close(theirs, torch.tensor([one["score"] for one in ours]), rtol=0, atol=1e-5)

    prompts, answers = [one["messages"][:-1] for one in ours], [one["messages"][-1]["content"] for one in ours]
    for model in ("r", "m"):
        found = RewardScorer(model)(prompts, answers, reference=[None] * len(answers))
        assert found == pytest.approx([one["score"] for one in ours], abs=1e-5)
    if peft == "lora":
        assert ftlit("export", "r", "--to", "a", "--adapter") == 0
        assert RewardScorer("a")(prompts, answers) == pytest.approx([one["score"] for one in ours], abs=1e-5)


def test_training_scores_are_those_of_ftlit_score(ftlit, pairs, tiny_model_folder):
    """The means that validation logs are those of the scores of its rows, scored one by one."""
    held_out = write(Path("held.jsonl"), [pair(number) for number in range(30, 37)])
    args = options(tiny_model_folder, pairs, "prefix_tuning", "--trainer.max_steps", "4", "--run", "r")
    assert ftlit(*args, "--data.validation", held_out) == 0
    last = [row for row in metrics("r") if "val/loss" in row][-1]
    found = [one["score"] for one in scores(ftlit, "r", held_out)]
    assert sum(found[::2]) / 7 == pytest.approx(last["val/rewards/chosen"], abs=1e-5)
    assert sum(found[1::2]) / 7 == pytest.approx(last["val/rewards/rejected"], abs=1e-5)


def test_rankings_texts_and_encoders(ftlit, tiny_model_folder, tmp_path):
    rows = [{"prompt": f"Say {n}", "answers": ["a" * (n % 5 + 1), "b" * (n % 4 + 1), "cc"]} for n in range(12)]
    path = write(tmp_path / "ranks.jsonl", rows)
    args = ["--model.objective", "PlackettLuce", "--trainer.max_epochs", "4"]
    assert ftlit(*options(tiny_model_folder, path, "full", *args, "--run", "r")) == 0
    assert [row for row in metrics("r") if "val/loss" in row][-1]["val/accuracy"] > 0.9
    found = scores(ftlit, "r", path)
    assert RewardScorer("r")(["Say 0"], ["a"]) == pytest.approx([found[0]["score"]], abs=1e-5)
    tiny_classifier("bert", labels=1).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    bert = options(str(tmp_path / "bert"), path, "lora", "--trainer.max_steps", "4", "--run", "b")
    assert ftlit(*bert) == 0
    assert "from the checkpoint; reads the first token" in ftlit.out
    assert len(scores(ftlit, "b", path)) == 36


def test_prompt_tuning_goes_on_as_if_never_stopped(ftlit, pairs, tiny_model_folder):
    args = options(tiny_model_folder, pairs, "prompt_tuning", "--trainer.max_epochs", "2")
    args += ["--model.schedule", "constant", "--model.warmup", "1", "--data.max_tokens", "120"]
    assert ftlit(*args, "--run", "whole") == 0
    assert ftlit(*args, "--run", "split", "--trainer.max_steps", "4") == 0
    assert ftlit(*args, "--run", "split", "--ckpt_path", "last") == 0
    one, two = weights("whole"), weights("split")
    assert one.keys() == two.keys() >= {"policy.lm.score.weight"}
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_two_ranks_equal_one(pairs, tiny_model_folder, tmp_path):
    common = options(tiny_model_folder, pairs, "lora", "--trainer.max_epochs", "1")
    run([*common, "--run", "one", "--data.batch_size", "4"], tmp_path)
    more = ["--config", "trainer/ddp", "--trainer.devices", "2", "--data.batch_size", "2", "--run", "two"]
    run([*common, *more], tmp_path)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-4, msg=name)
    for first, second in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in ("train/loss", "train/accuracy", "train/margin", "val/loss", "val/accuracy", "val/margin"):
            assert first.get(key) == pytest.approx(second.get(key), abs=1e-3)


def test_mistakes_are_one_sentence(ftlit, pairs, rows, tiny_model_folder, tmp_path):
    assert ftlit(*options(tiny_model_folder, rows, "lora", "--data.class_path", "SFTData", "--run", "a")) == 1
    assert "set data to PreferenceData" in ftlit.err
    labelled = write(tmp_path / "l.jsonl", [pair(n) | {"completion": "x", "label": True} for n in range(8)])
    columns = ["--data.format", "Labelled"]
    assert ftlit(*options(tiny_model_folder, labelled, "lora", *columns, "--run", "b")) == 1
    assert "some rows have one answer with a label" in ftlit.err
    assert ftlit(*options(tiny_model_folder, pairs, "lora", "--trainer.max_steps", "1", "--run", "c")) == 0
    further = ["--model.peft.from_adapter", "c/adapter/last", "--run", "d"]
    assert ftlit(*options(tiny_model_folder, pairs, "lora", *further)) == 1
    assert "c/adapter/last is the adapter of a classifier, with its head" in ftlit.err
    assert ftlit(*options(tiny_model_folder, pairs, "lora", *further[:1], "c", "--run", "d")) == 1
    assert "it has no adapter_config.json; give c/adapter/last." in ftlit.err
    assert ftlit("score", "c", "--rows", pairs, "--device", "gpu") == 1
    assert "argument --device: 'gpu' is no device of this machine; give cpu or cuda" in ftlit.err
    assert ftlit("score", "c", "--rows", pairs, "--device", "cpu") == 0
    assert ftlit("score", tiny_model_folder, "--rows", pairs) == 1
    assert "is no sequence classifier" in ftlit.err
    assert ftlit("score", tiny_model_folder, "--rows", "nothing.jsonl") == 1
    assert "nothing.jsonl does not exist" in ftlit.err


def test_calibration_is_drawn_of_the_first_set_where_none_is_main(ftlit, pairs, tiny_model_folder):
    args = options(tiny_model_folder, pairs, "lora", "--trainer.max_steps", "1")
    assert ftlit(*args, "--data.validation", f"{{one: {pairs}, two: {pairs}}}", "--run", "named") == 0
    assert Path("named/calibration.png").exists()
