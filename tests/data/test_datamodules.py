import json
from types import SimpleNamespace

import datasets
import pytest
import torch

from ftlit.batch import StepBatch
from ftlit.data.datamodules import SFTData, Statistics
from ftlit.data.formats import Message, Messages
from ftlit.data.packing import EvalLoader, StepLoader
from ftlit.errors import ConfigError, DataError
from ftlit.testing import tiny_tokenizer
from ftlit.testing.tiny import CHAT_TEMPLATE

# A row of the tiny tokenizer has 20 tokens besides the bytes of question and answer; the answer's and one are trained.
FRAME = 20
REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def alpaca(question, answer, **more):
    return {"instruction": question, "output": answer, **more}


def numbered(count):
    return [alpaca(f"q{i:02}", f"a{i:02}") for i in range(count)]


def data_of(train, stage="fit", **settings):
    data = SFTData(train, **settings)
    data.use_tokenizer(tiny_tokenizer())
    data.setup(stage)
    return data


def texts(data, name):
    return [data.template.tokenizer.decode(example.input_ids) for example in data.sets[name]]


def numbers(data, name):
    return [int(text.split("<|im_end|>")[-2][-2:]) for text in texts(data, name)]


def test_rows_become_examples_without_a_trainer(write):
    data = data_of(write([alpaca("q", "a"), alpaca("qq", "aa", system="s")]))
    assert data.rendered() == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧"
    assert data.rendered(1, "[", "]").endswith("user\nqq<|im_end|>\n<|im_start|>assistant\n[aa<|im_end|>]")
    assert list(data.sets) == ["train"]


def test_several_files_follow_each_other(write):
    data = data_of([write([alpaca("q", "a")], "1.jsonl"), write([alpaca("r", "b")], "2.jsonl")])
    assert [text.count("q<") for text in texts(data, "train")] == [1, 0]
    assert data.describe()[0].startswith("train: 2 rows; ")


def test_setup_twice_reads_once(write, monkeypatch):
    path = write(numbered(4))
    data = data_of(path, validation={"main": 0.25, "other": path}, test=path, predict=path)
    for stage in ("fit", "validate", "test", "predict") * 2:
        data.setup(stage)
    assert [counts.name for counts in data.statistics] == [
        "validation (main)",
        "train",
        "validation (other)",
        "test",
    ]
    assert len(data.prompts) == 4


def test_validation_share_is_disjoint_and_in_file_order(write):
    data = data_of(write(numbered(20)), validation=0.25, max_length=64)
    held_out, train = numbers(data, "validation:main"), numbers(data, "train")
    assert (len(held_out), len(train)) == (5, 15)
    assert sorted(held_out + train) == list(range(20))
    assert held_out == sorted(held_out) != list(range(5))
    assert train == sorted(train)


def test_validation_share_follows_from_the_seed_alone(write):
    path = write(numbered(20))

    def held_out(seed, noise):
        torch.manual_seed(noise)
        return numbers(data_of(path, validation=0.25, seed=seed), "validation:main")

    assert held_out(0, 1) == held_out(0, 2)
    assert len({tuple(held_out(seed, 0)) for seed in range(5)}) == 5


@pytest.mark.parametrize(("rows", "share", "held_out"), [(3, 0.1, 1), (10, 0.3, 3), (10, 0.99, None), (1, 0.1, None)])
def test_validation_share_is_rounded_and_leaves_rows_to_train_on(write, rows, share, held_out):
    path = write(numbered(rows))
    if held_out is not None:
        assert len(data_of(path, validation=share).sets["validation:main"]) == held_out
        return
    with pytest.raises(DataError) as error:
        data_of(path, validation=share)
    assert str(error.value) == f"data.validation takes {rows} of {rows} rows and leaves none to train on."


def test_named_validation_sets_have_a_loader_each_in_order(write):
    path = write(numbered(8))
    other = write([alpaca("other", "b")] * 3, "other.jsonl")
    data = data_of(path, validation={"general": other, "main": 0.25}, batch_size=2)
    assert data.validation_names == ["general", "main"]
    general, main = data.val_dataloader()
    assert isinstance(general, EvalLoader)
    assert sum(len(batch.examples) for batch in general) == 3
    assert sum(len(batch.examples) for batch in main) == 2
    assert all("other" in text for text in texts(data, "validation:general"))
    assert len(data.sets["train"]) == 6


def test_validation_file_leaves_the_training_rows_alone(write):
    path = write(numbered(4))
    data = data_of(path, validation=path)
    assert data.validation_names == ["main"]
    assert numbers(data, "train") == numbers(data, "validation:main") == [0, 1, 2, 3]


def test_without_validation_there_is_no_loader(write):
    data = data_of(write(numbered(2)))
    assert data.validation_names == []
    assert data.val_dataloader() == []


def test_statistics_count_rows_tokens_targets_and_longest(write):
    data = data_of(write([alpaca("q", "a"), alpaca("qqq", "aaaaa")]))
    assert data.describe() == ["train: 2 rows; 50 tokens, 8 trained (16%), longest 28"]


def test_statistics_count_what_was_cut_and_what_was_dropped(write):
    rows = [alpaca("q", "a"), alpaca("q", "a" * 10), alpaca("q" * 30, "a")]
    data = data_of(write(rows), max_length=25)
    (counts,) = data.statistics
    assert (counts.rows, counts.examples, counts.truncated, counts.dropped) == (3, 2, 2, 1)
    assert (counts.tokens, counts.targets, counts.longest) == (22 + 25, 2 + 5, 25)
    assert counts.line() == (
        "train: 3 rows, 1 dropped (nothing left to train on after cutting), 2 cut to max_length; "
        "47 tokens, 7 trained (15%), longest 25"
    )


def test_statistics_count_rows_split_by_answer(write):
    turns = [("user", "q"), ("assistant", "<think>x</think>a"), ("user", "r"), ("assistant", "b")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    data = data_of(write(rows), chat_template=REASONING)
    assert data.statistics[0].examples == 2
    assert data.describe()[0].startswith("train: 1 rows, 1 of them split by answer; ")


def test_statistics_group_thousands_and_survive_nothing():
    counts = Statistics("train")
    assert counts.line() == "train: 0 rows; 0 tokens, 0 trained (0%), longest 0"
    counts.rows, counts.tokens, counts.targets, counts.longest = 1_234, 9_876_543, 5_000_000, 2_048
    assert counts.line() == "train: 1,234 rows; 9,876,543 tokens, 5,000,000 trained (51%), longest 2,048"


@pytest.mark.parametrize(("max_length", "cut"), [(22, 0), (21, 1)])
def test_max_length_cuts_from_the_end_and_only_what_is_longer(write, max_length, cut):
    data = data_of(write([alpaca("q", "a")]), max_length=max_length)
    assert data.statistics[0].truncated == cut
    (example,) = data.sets["train"]
    assert len(example.input_ids) == len(example.weights) == max_length
    assert example.num_targets == max_length - FRAME
    assert data.rendered().endswith("assistant\n⟦a<|im_end|>⟧" if not cut else "assistant\n⟦a⟧")


def test_everything_cut_is_refused(write):
    with pytest.raises(DataError) as error:
        data_of(write(numbered(3)), max_length=22)
    assert str(error.value) == ("train: none of 3 rows has a trained token within data.max_length=22 tokens; raise it.")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_length": 1}, "data.max_length must be at least 2 tokens, got 1."),
        ({"max_length": -5}, "data.max_length must be at least 2 tokens, got -5."),
        ({"batch_size": 0}, "data.batch_size must be at least 1 examples, got 0."),
        ({"max_tokens": 0}, "data.max_tokens must be at least 1 tokens, got 0."),
        ({"validation": 0.0}, "data.validation (main) as a share must be between 0 and 1, got 0.0."),
        ({"validation": 1}, "data.validation (main) as a share must be between 0 and 1, got 1."),
        ({"validation": {"x": -0.1}}, "data.validation (x) as a share must be between 0 and 1, got -0.1."),
        ({"validation": {"x": float("nan")}}, "data.validation (x) as a share must be between 0 and 1, got nan."),
        (
            {"validation": {"x": 0.1, "y": 0.2}},
            "data.validation can take only one share of the training rows; give files for the others.",
        ),
    ],
)
def test_bad_numbers_are_refused(settings, text):
    with pytest.raises(ConfigError) as error:
        SFTData("rows.jsonl", **settings)
    assert str(error.value) == text


def test_numbers_at_the_edge_are_accepted():
    assert SFTData(max_length=2, batch_size=1, max_tokens=1, validation=0.999).validation == {"main": 0.999}
    assert SFTData(max_tokens=None).max_tokens is None


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ("fit", "data.train is missing: give a file, a folder, a hub id, or sample:identity."),
        ("test", "data.test is missing: give a file, a folder, or a hub id."),
        ("predict", "data.predict is missing: give a file, a folder, or a hub id."),
    ],
)
def test_a_verb_without_its_rows_says_which(stage, text):
    with pytest.raises(ConfigError) as error:
        data_of(None, stage)
    assert str(error.value) == text


def test_validating_on_a_file_needs_no_training_rows(write):
    data = data_of(None, "validate", validation=write(numbered(2)))
    assert len(data.sets["validation:main"]) == 2


def test_without_a_tokenizer_it_says_how_to_give_one(write):
    with pytest.raises(ConfigError) as error:
        SFTData(write(numbered(2))).setup("fit")
    assert str(error.value) == ("SFTData has no tokenizer yet: pass it to a Trainer, or call use_tokenizer(tokenizer).")


def test_fill_and_system_are_applied_to_every_set(write):
    path = write([alpaca("who?", "{{name}}"), alpaca("you?", "{{name}}", system="own {{name}}")])
    data = data_of(path, validation=path, test=path, predict=path, fill={"name": "Nova"}, system="be kind")
    data.setup("test")
    data.setup("predict")
    system = "<|im_start|>system\n"
    for name in ("train", "validation:main", "test"):
        first, second = texts(data, name)
        assert first.startswith(system + "be kind<|im_end|>\n")
        assert second.startswith(system + "own Nova<|im_end|>\n")
        assert first.endswith("assistant\nNova<|im_end|>")
    first, second = (conversation.messages for conversation, _ in data.prompts)
    assert first == (Message("system", "be kind"), Message("user", "who?"))
    assert second == (Message("system", "own Nova"), Message("user", "you?"))


def test_fill_reaches_the_system_turn_that_was_given(write):
    data = data_of(write([alpaca("q", "a")]), fill={"name": "Nova"}, system="You are {{name}}.")
    assert data.rendered().startswith("<|im_start|>system\nYou are Nova.<|im_end|>\n")


def test_predict_prompts_leave_the_last_answer_out(write):
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in turns[:count]]} for count in (4, 3, 1)
    ]
    data = data_of(None, "predict", predict=write(rows), batch_size=2)
    decode = data.template.tokenizer.decode
    head = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    long = head + "a1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"
    assert [decode(ids) for _, ids in data.prompts] == [long, long, head]
    found = [[(m.role, m.content) for m in conversation.messages] for conversation, _ in data.prompts]
    assert found == [turns[:3]] * 2 + [turns[:1]]
    batches = list(data.predict_dataloader())
    assert [len(batch) for batch in batches] == [2, 1]
    assert [ids for batch in batches for ids in batch] == [ids for _, ids in data.prompts]


def test_bad_row_is_named_by_file_and_number(write):
    path = write([alpaca("q", "a"), alpaca("q", "")])
    with pytest.raises(DataError) as error:
        data_of(path)
    assert str(error.value) == f"{path}, row 2: column 'output' must hold non-empty text, got ''."


def test_row_that_the_template_refuses_is_named_by_file_and_number(write):
    path = write([{"messages": [{"role": "user", "content": "q"}]}])
    with pytest.raises(DataError) as error:
        data_of(path)
    assert str(error.value) == (
        f"{path}, row 1: a conversation needs at least one assistant turn to train on, got none."
    )


@pytest.mark.parametrize("stage", ["fit", "predict"])
def test_text_that_cannot_be_encoded_is_named_by_file_and_number(write, stage):
    path = write([alpaca("q", "a"), alpaca("half an emoji \ud83d", "a")])
    with pytest.raises(DataError) as error:
        data_of(path, stage, predict=path)
    assert str(error.value).startswith(f"{path}, row 2: ")


def test_format_by_name_and_template_by_file(write, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(CHAT_TEMPLATE, encoding="utf-8")
    row = {"chat": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    data = SFTData(write([row]), format=Messages(column="chat"), chat_template=str(file))
    data.use_tokenizer(tiny_tokenizer(None))
    data.setup("fit")
    assert data.rendered().endswith("⟦a<|im_end|>⟧")


def test_planner_takes_the_settings(write):
    data = data_of(write(numbered(12)), batch_size=2, max_tokens=30, shuffle=False, seed=7)
    planner = data.planner(accumulate=3, world=2)
    assert planner.examples_per_step == 12
    assert (planner.max_tokens, planner.shuffle, planner.seed) == (30, False, 7)
    assert [len(rank) for rank in planner.plan(0)[0].ranks] == [6, 6]


def test_train_loader_without_a_trainer_has_one_rank(write):
    data = data_of(write(numbered(5)), batch_size=2)
    loader = data.train_dataloader()
    assert isinstance(loader, StepLoader)
    assert len(loader) == 3
    step = next(iter(loader))
    assert isinstance(step, StepBatch)
    assert step.totals.examples == 2


def test_loaders_follow_ranks_and_accumulation_of_the_trainer(write):
    path = write(numbered(24))
    seen, evaluated = [], []
    for rank in range(2):
        data = SFTData(path, batch_size=2, max_tokens=None, validation=path, test=path)
        stage = SimpleNamespace(tokenizer=tiny_tokenizer(), accumulate=3)
        data.trainer = SimpleNamespace(lightning_module=stage, world_size=2, global_rank=rank)
        data.setup("fit")
        data.setup("test")
        loader = data.train_dataloader()
        assert len(loader) == 2
        seen.append([[batch.examples for batch in step.micro_batches] for step in loader])
        evaluated.append([i for batch in data.val_dataloader()[0] for i in batch.examples])
        assert [batch.examples for batch in data.test_dataloader()] == [
            batch.examples for batch in data.val_dataloader()[0]
        ]
    assert [len(step) for rank in seen for step in rank] == [3, 3, 3, 3]
    assert sorted(i for rank in seen for step in rank for part in step for i in part) == list(range(24))
    assert sorted(evaluated[0] + evaluated[1]) == list(range(24))
    assert not set(evaluated[0]) & set(evaluated[1])
