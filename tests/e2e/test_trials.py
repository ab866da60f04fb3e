"""What newcomers do first: mixed folders, other languages, odd columns, classes of their own, runs that moved."""

import csv
import json
import re
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from ftlit.testing import tiny_lm, tiny_tokenizer

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def fit(ftlit, tiny_model_folder):
    """Two LoRA steps on some rows; returns the exit status."""

    def fit(rows, *more, verb="fit"):
        options = ["--config", "sft", "--config", "trainer/cpu", "--model.policy", tiny_model_folder]
        if verb == "fit":
            options += ["--config", "peft/lora", "--trainer.max_steps", "2", "--run", "r"]
        return ftlit(verb, *options, "--data.train", rows, "--data.batch_size", "4", *more)

    return fit


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_csv(path, header, rows):
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def test_a_folder_of_mixed_files(ftlit, fit):
    Path("mixed/more").mkdir(parents=True)
    Path("mixed/chat.jsonl").write_text("".join(json.dumps(chat(f"Is it {i}?", "Yes.")) + "\n" for i in range(6)))
    Path("mixed/notes.txt").write_text("The sea is wide and blue. " * 4)
    Path("mixed/README.md").write_text("About these rows.")
    write_csv("mixed/faq.csv", ["Frage", "Antwort", "id"], [[f"How is {i}?", f"Fine {i}.", i] for i in range(4)])
    alpaca = {"instruction": ["Name it.", "Say it."], "input": ["", "b"], "output": ["a", "b"]}
    parquet.write_table(pyarrow.table(alpaca), "mixed/more/rows.parquet")
    assert fit("mixed") == 1
    assert "mixed/faq.csv: columns Antwort, Frage, id fit no known row format" in ftlit.err
    advice = re.search(r"data\.columns: (\{.*?\})", ftlit.err)[1]  # what it says can be typed as it is
    assert fit("mixed", "--data.columns", advice, verb="data") == 0, ftlit.err
    assert "1 of 5 files are not read as rows: README.md" in ftlit.out
    assert "1 file as Messages (6 rows), 2 files as Alpaca (6 rows), 1 file as RawText (1 row)" in ftlit.out
    assert "columns not read: id" in ftlit.out
    assert fit("mixed", "--data.columns", advice, "--data.validation", "0.2") == 0, ftlit.err
    assert "train: 10 rows" in ftlit.out
    assert "step 2/2" in ftlit.out


def test_a_chinese_alpaca_file(ftlit, fit):
    asked = [("北京是哪个国家的首都？", "", "北京是中国的首都。"), ("翻译成英文。", "我喜欢喝茶。", "I like tea.")]
    rows = [{"instruction": f"{q}{i}", "input": x, "output": a} for i in range(10) for q, x, a in asked]
    Path("alpaca.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    more = ["--config", "eval/generation", "--trainer.callbacks.max_new_tokens=4", "--data.validation", "0.2"]
    assert fit("alpaca.json", *more) == 0, ftlit.err
    assert "⟦" in ftlit.out
    assert "北京是哪个国家的首都？" in ftlit.out
    record = json.loads(Path("r/samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert record["reference"] in [a for _, _, a in asked]
    assert "翻译成英文" in Path("r/samples.jsonl").read_text(encoding="utf-8")  # readable, not escaped
    Path("gbk.csv").write_text("问题,回答\n好吗,好\n", encoding="gbk")
    assert fit("gbk.csv", "--run", "s") == 1
    assert "gbk.csv, line 1: not valid UTF-8" in ftlit.err


def test_a_csv_with_odd_column_names(ftlit, fit):
    rows = "".join(f'"Wie viel ist {i} + 1?";Das ist {i + 1}.;{i}\n' for i in range(8))
    Path("faq.csv").write_text("Frage;Antwort;Punkte\n" + rows, encoding="utf-8-sig")
    assert fit("faq.csv") == 1
    assert "such as data.columns: {instruction: Frage, output: Antwort}" in ftlit.err
    assert fit("faq.csv", "--data.columns", "{instruction: Frage, output: Antwrt}") == 1
    assert "did you mean 'Antwort'?" in ftlit.err
    assert fit("faq.csv", "--data.columns", "{instruction: Frage, output: Antwort}") == 0, ftlit.err
    assert "Wie viel ist" in ftlit.out
    assert "⟦Das ist" in ftlit.out


MISTAKES = {
    "mine.Bitfit": "model.peft: mine has no Bitfit: did you mean 'BitFit'?",
    "mine.Half": "model.peft: mine.Half lacks changes, start, which every PEFTStrategy must have.",
    "mine.Other": "model.peft: mine.Other is no PEFTStrategy; let it be a subclass of ftlit.peft.PEFTStrategy.",
    "torn.BitFit": "model.peft: torn.py, line 1: '(' was never closed.",
    "name.BitFit": "model.peft: name cannot be imported: NameError: name 'nothing' is not defined.",
    "absent.BitFit": "model.peft: there is no module 'absent', neither installed nor in the working directory.",
}


def test_a_strategy_in_a_file_of_ones_own(ftlit, rows):
    """The one of the README: trained, used, exported, and what is said when a hand slips."""
    tiny_lm("qwen2").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "class BitFit(" in b]
    more = "\n\nclass Half(PEFTStrategy):\n    def apply(self, model):\n        pass\n\n\nclass Other:\n    pass\n"
    Path("mine.py").write_text(f"from ftlit import PEFTStrategy\n{block}{more}")
    Path("torn.py").write_text("x = (")
    Path("name.py").write_text("nothing")
    args = ["fit", "--config", "sft", "--config", "trainer/cpu", "--model.policy", "model", "--data.train", rows]
    args += ["--data.validation", "0.25", "--trainer.max_steps", "2", "--model.lr", "0.01"]
    for name, said in MISTAKES.items():
        assert ftlit(*args, "--model.peft", name, "--run", "r") == 1
        assert ftlit.err == f"ftlit: {said}\n"
    assert ftlit(*args, "--model.peft", "mine.BitFit", "--run", "r") == 0, ftlit.err
    assert "BitFit: 64 trained" in ftlit.out
    assert ftlit("fit", "--config", "r/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "3") == 0, ftlit.err
    assert ftlit("generate", "r", "--prompt", "Hi", "--max_new_tokens", "2") == 0
    assert ftlit("export", "r", "--to", "whole") == 0
    assert Path("whole/model.safetensors").exists()


def test_going_on_elsewhere(ftlit, fit, rows, tmp_path):
    """On another machine run, model and rows lie at other paths; what is given there is what counts."""
    tiny_lm().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    assert fit(rows, "--model.policy", "model", "--data.validation", "0.25") == 0
    Path("elsewhere").mkdir()
    for name in ("r", "model", "rows.jsonl"):
        Path(name).rename(f"elsewhere/{name}")
    on = ["fit", "--config", "elsewhere/r/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "4"]
    assert ftlit(*on, "--data.train", "elsewhere/rows.jsonl") == 1
    assert f"model {tmp_path}/model does not exist" in ftlit.err
    assert ftlit(*on, "--model.policy", "elsewhere/model") == 1
    assert "rows.jsonl does not exist" in ftlit.err
    assert ftlit("generate", "elsewhere/r", "--prompt", "Hi") == 1
    assert ftlit.err.endswith(f"was trained on {tmp_path}/model, which is not there (any more); give --base.\n")
    assert ftlit("generate", "elsewhere/r", "--base", "elsewhere/model", "--prompt", "Hi", "--max_new_tokens", "2") == 0
    assert ftlit(*on, "--model.policy", "elsewhere/model", "--data.train", "elsewhere/rows.jsonl") == 0, ftlit.err
    assert "step 3/4" in ftlit.out
    assert not Path("r").exists()
    assert ftlit("generate", "elsewhere/r", "--prompt", "Hi", "--max_new_tokens", "2") == 0


def test_settings_given_when_a_run_goes_on_count(ftlit, fit, rows):
    """A longer schedule is that of its whole length at once, and rate and decay are those that are asked for."""
    assert fit(rows, "--model.schedule", "linear", "--model.warmup", "0", "--model.lr", "0.1") == 0
    on = ["fit", "--config", "r/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "4"]
    assert ftlit(*on, "--model.lr", "0.2", "--model.weight_decay", "0.5") == 0
    with Path("r/metrics.csv").open() as file:
        rates = [float(row["train/lr"]) for row in csv.DictReader(file) if row.get("train/lr")]
    assert rates == pytest.approx([0.1, 0.05, 0.1, 0.05])  # 0.2 from 2 of 4 steps on
    groups = torch.load("r/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert 0.5 in [group["weight_decay"] for group in groups]


def test_a_run_must_end(ftlit, fit, rows):
    assert fit(rows, "--trainer.max_steps", "-1", "--trainer.max_epochs", "-1") == 1
    assert "a run must end: set trainer.max_steps" in ftlit.err
