"""`ftlit generate` with many questions."""

import json
from pathlib import Path

import pytest


def answers(ftlit, *args):
    assert ftlit("generate", *args, "--max_new_tokens", "6", "--json") == 0
    return [json.loads(line) for line in ftlit.out.splitlines()]


@pytest.mark.parametrize("more", [[], ["--temperature", "1"]])
def test_the_batch_changes_nothing(ftlit, tiny_model_folder, more):
    Path("q.txt").write_text("Hi\nWhat is 2 plus 2, and why is it so?\n\n你好\nA\n")
    one = answers(ftlit, tiny_model_folder, "--prompts", "q.txt", "--batch_size", "1", *more)
    assert [row["prompt"] for row in one] == ["Hi", "What is 2 plus 2, and why is it so?", "你好", "A"]
    for size in ("3", "16"):
        assert answers(ftlit, tiny_model_folder, "--prompts", "q.txt", "--batch_size", size, *more) == one
    if more:
        assert answers(ftlit, tiny_model_folder, "--prompts", "q.txt", "--seed", "1", *more) != one


def test_rows_as_prompts_and_a_file_of_answers(ftlit, tiny_model_folder, rows):
    args = ["--prompts", rows, "--output", "out.jsonl", "--max_new_tokens", "4", "--prompt", "First?"]
    assert ftlit("generate", tiny_model_folder, *args) == 0
    assert "13 answers in out.jsonl" in ftlit.out
    made = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert made[0]["prompt"] == "First?"
    assert made[6]["prompt"] == [{"role": "user", "content": "What is 5 plus 5?"}]  # its own answer is left out
    (alone,) = answers(ftlit, tiny_model_folder, "--prompt", "What is 5 plus 5?")
    assert alone["answer"].startswith(made[6]["answer"].rstrip("\ufffd"))


def test_a_row_keeps_its_system_turn(ftlit, tiny_model_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "ftlit.data.templating.ChatTemplate.prompt_ids", lambda self, turns, *more: seen.append(list(turns)) or [5, 6]
    )
    turns = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]
    Path("s.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    answers(ftlit, tiny_model_folder, "--prompts", "s.jsonl", "--prompt", "Hi", "--system", "Given.")
    assert [tuple(turns[0][:2]) for turns in seen] == [("system", "Given."), ("system", "Own.")]


def test_a_file_without_a_question(ftlit, tiny_model_folder):
    Path("empty.txt").write_text("\n \n")
    assert ftlit("generate", tiny_model_folder, "--prompts", "empty.txt") == 1
    assert "holds no question" in ftlit.err


def test_where_and_how_answers_are_drawn_and_where_they_stop(ftlit, tiny_model_folder):
    asked = [tiny_model_folder, "--prompt", "Hi", "--temperature", "1"]
    (free,) = answers(ftlit, *asked)
    (placed,) = answers(ftlit, *asked, "--device", "cpu", "--dtype", "float32")
    assert placed == free
    (likeliest,) = answers(ftlit, tiny_model_folder, "--prompt", "Hi")
    assert answers(ftlit, *asked, "--top_k", "1") == [likeliest]
    assert answers(ftlit, *asked, "--min_p", "1.0") == [likeliest]
    stop = likeliest["answer"][1]
    (stopped,) = answers(ftlit, tiny_model_folder, "--prompt", "Hi", "--stop", "never", "--stop", stop)
    assert stopped["answer"] == likeliest["answer"][: likeliest["answer"].index(stop)]
    answers(ftlit, *asked, "--dtype", "bfloat16")
    for wrong, says in (
        (["--top_k", "0"], "--top_k: must be at least 1"),
        (["--min_p", "2"], "--min_p: must be in [0, 1]"),
        (["--stop", ""], "--stop: must have a character"),
        (["--dtype", "int8"], "--dtype: invalid choice"),
        (["--device", "nowhere"], "--device: 'nowhere' is no device of this machine"),
    ):
        assert ftlit("generate", *asked, *wrong) == 1
        assert says in ftlit.err


def test_answers_keep_their_white_space(ftlit, tiny_model_folder, monkeypatch):
    from ftlit.data.templating import ChatTemplate
    from ftlit.rollout import generate as module

    said = "    indented\n\tcode . here\n"
    monkeypatch.setattr(
        module,
        "generate",
        lambda lm, strategy, tokenizer, prompts, **more: [tokenizer(said)["input_ids"]] * len(prompts),
    )
    monkeypatch.setattr(ChatTemplate, "prompt_ids", lambda *args, **more: [5])
    assert answers(ftlit, tiny_model_folder, "--prompt", "Hi")[0]["answer"] == said
    assert ftlit("generate", tiny_model_folder, "--prompt", "Hi", "--stop", "\\n") == 0
    assert ftlit.out == "> Hi\n    indented\n\n"
