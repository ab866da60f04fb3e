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


def mixed(write, **settings):
    first = write([alpaca("q", "a" * (i + 1)) for i in range(8)], "first.jsonl")
    second = write([{"text": "x" * (40 + i)} for i in range(4)], "second.jsonl")
    return data_of({first: 3, second: 1}, **settings)


def test_weights_are_shares_of_the_trained_tokens(write):
    data = mixed(write, batch_size=1, max_length=32)
    planner = data.planner()
    taken = {"first": 0, "second": 0}
    for epoch in range(40):
        for step in planner.plan(epoch):
            for index in step.ranks[0][0]:
                name = "first" if "first.jsonl" in data.where(index) else "second"
                taken[name] += data.sets["train"][index].num_targets
    assert taken["first"] / (taken["first"] + taken["second"]) == pytest.approx(0.75, abs=0.01)
    train = data.describe()
    assert train[0].startswith("train: 12 rows, 4 of them cut into 8 windows; ")
    assert train[1].startswith("first.jsonl: ")
    assert "(asked for 75.0%), " in train[1]
    assert "each 1.00 times" in train[2]
    assert any(
        line.split()[:6] == ["an", "epoch", "of", f"{len(data.mixture):,}", "examples", "trained"]
        for line in data.report()
    )


def test_weights_and_validation_go_together(write):
    data = mixed(write, validation=0.25)
    assert len(data.sets["validation:main"]) == 3
    assert len(data.mixture.targets[0]) + len(data.mixture.targets[1]) == len(data.sets["train"]) == 9


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"train": {"a.jsonl": 0}}, "data.train: the weight of a.jsonl must be a positive number, got 0."),
        ({"train": {"a.jsonl": float("nan")}}, "data.train: the weight of a.jsonl must be a positive number, got nan."),
        (
            {"train": "a.jsonl", "epoch_tokens": 5},
            "data.epoch_tokens goes with weights in data.train, such as {a.jsonl: 3, b.jsonl: 1}.",
        ),
        ({"epoch_tokens": 0, "train": {"a": 1}}, "data.epoch_tokens must be at least 1 trained tokens, got 0."),
        ({"num_workers": -1}, "data.num_workers must be at least 0 processes, got -1."),
        ({"truncate": "middle"}, "data.truncate must be end, start or drop, got 'middle'."),
        ({"train_on": "some"}, "data.train_on must be assistant, last or all, got 'some'."),
        ({"on_bad_row": "ignore"}, "data.on_bad_row must be error or skip, got 'ignore'."),
    ],
)
def test_bad_settings_are_refused(settings, text):
    with pytest.raises(ConfigError) as error:
        SFTData(**settings)
    assert str(error.value) == text


def test_where_names_file_and_row_of_an_example(write):
    long = [{"text": "x" * 50}, {"text": "y" * 50}]
    data = data_of([write(numbered(3), "a.jsonl"), write(long, "b.jsonl")], validation=0.2, max_length=32, seed=1)
    names = [data.where(i).rpartition("/")[2] for i in range(len(data.sets["train"]))]
    held_out = {"a.jsonl, row 1", "a.jsonl, row 2", "a.jsonl, row 3", "b.jsonl, row 1", "b.jsonl, row 2"} - set(names)
    assert len(held_out) == 1
    for index, name in enumerate(names):
        number = int(name[-1]) - 1
        wanted = f"q{number:02}" if name.startswith("a") else "xy"[number]
        assert wanted in texts(data, "train")[index]
    assert names == sorted(names)


def test_the_fingerprint_follows_the_tokens_and_the_order_and_not_the_batch(write):
    path = write(numbered(6))
    first = data_of(path).fingerprint()
    assert data_of(path, batch_size=3, max_tokens=99, num_workers=0, cache=False).fingerprint() == first
    assert data_of(write(numbered(6), "copy.jsonl")).fingerprint() == first
    others = [
        data_of(path, seed=1),
        data_of(path, shuffle=False),
        data_of(path, max_length=24),
        data_of(path, train_on="all"),
        data_of(write(numbered(5), "less.jsonl")),
        data_of({path: 1.0}),
        data_of({path: 1.0}, epoch_tokens=8),
    ]
    assert len({first, *(data.fingerprint() for data in others)}) == 8


def test_bad_rows_are_listed_and_counted(write, capsys):
    path = write([alpaca("q", "a"), *[alpaca("q", "")] * 7, alpaca("r", "b")])
    data = data_of(path, on_bad_row="skip", validation=0.5)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{path}: 7 of 9 rows cannot be read and are skipped:"
    assert said[1] == f"  {path}, row 2: column 'output' must hold non-empty text, got ''."
    assert said[-1] == "  and 2 more"
    assert len(said) == 7
    assert [(c.rows, c.refused, c.examples) for c in data.statistics] == [(1, 0, 1), (8, 7, 1)]
    with pytest.raises(DataError, match=r"train: none of 2 rows can be read; the first: .*row 1: column 'output'"):
        data_of(write([alpaca("q", "")] * 2), on_bad_row="skip")


def test_bad_rows_to_be_answered_are_skipped_too(write, capsys):
    path = write([{"instruction": "q"}, {"instruction": ""}])
    data = data_of(None, "predict", predict=path, on_bad_row="skip")
    assert len(data.prompts) == 1
    assert "1 of 2 rows cannot be read" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"row 2: column 'instruction'"):
        data_of(None, "predict", predict=path)


def test_prompts_without_a_template(write):
    data = data_of(None, "predict", predict=write([{"prompt": "Once upon"}]))
    ((conversation, ids),) = data.prompts
    assert data.template.tokenizer.decode(ids) == "Once upon"
    assert conversation.messages == (Message("user", "Once upon"),)


def test_a_row_of_nothing_to_answer_is_refused(write):
    path = write([{"messages": [{"role": "assistant", "content": "hello"}]}])
    with pytest.raises(DataError, match=r"row 1: holds no turn to answer"):
        data_of(None, "predict", predict=path)


def test_duplicates_and_rows_that_are_also_in_train_are_counted(write):
    path = write([*numbered(3), *numbered(2), alpaca("q00", "a00", note="other")])
    data = data_of(path, validation=write(numbered(5)[1:], "held.jsonl"))
    train, held_out = data.statistics
    assert (train.duplicates, held_out.duplicates, held_out.in_train) == (3, 0, 2)
    assert "3 duplicates" in train.line()
    assert "2 of them also in train (!)" in held_out.line()
    page = "\n".join(data.report())
    assert "3 of the rows are equal to an earlier one" in page
    assert "warning: 2 of the rows are also in train" in page
    assert "columns not read: note" in page


@pytest.mark.parametrize(
    ("truncate", "shown", "counts"),
    [("end", "⟦aaaaa⟧", (1, 0)), ("start", "⟦aaaaaaaaaa<|im_end|>⟧", (1, 0)), ("drop", "⟦b<|im_end|>⟧", (0, 1))],
)
def test_what_is_cut_can_be_chosen(write, truncate, shown, counts):
    data = data_of(write([alpaca("q", "a" * 10), alpaca("q", "b")]), max_length=25, truncate=truncate)
    assert data.rendered(0).endswith(shown)
    assert (data.statistics[0].truncated, data.statistics[0].drops.get("longer than max_length", 0)) == counts


def test_a_model_without_a_template_is_told_once(write, capsys):
    path = write(numbered(2))
    data = SFTData(path, validation=path)
    data.use_tokenizer(tiny_tokenizer(None))
    data.setup("fit")
    assert data.rendered() == "### User:\nq00\n\n### Assistant:\n⟦a00<|im_end|>⟧"
    assert capsys.readouterr().out.count("has no chat template, so the plain one is used") == 1
    data = SFTData(write([{"text": "raw"}]))
    data.use_tokenizer(tiny_tokenizer(None))
    data.setup("fit")
    assert capsys.readouterr().out == ""


def test_nothing_but_untrained_rows_is_refused(write):
    with pytest.raises(DataError, match="none of 2 rows has anything to train on: each has weight 0 or train false"):
        data_of(write([alpaca("q", "a", weight=0)] * 2))
    with pytest.raises(DataError, match=r"data\.train: b\.jsonl has nothing left to train on; leave it out\."):
        data_of({write([alpaca("q", "a")], "a.jsonl"): 1, write([alpaca("q", "a", weight=0)], "b.jsonl"): 1})


def test_only_a_system_turn_is_refused(write):
    with pytest.raises(DataError, match=r"row 1: a conversation needs at least one assistant turn"):
        data_of(write([{"messages": [{"role": "system", "content": "s"}]}]))


def test_columns_that_no_file_has_are_refused_and_files_that_need_none_are_read(write):
    odd = write([{"Frage": "q", "Antwort": "a"}], "odd.jsonl")
    names = {"instruction": "Frage", "output": "Antwort"}
    data = data_of([write(numbered(2)), odd], columns=names, validation=write(numbered(2), "held.jsonl"))
    assert len(data.sets["train"]) == 3
    with pytest.raises(DataError) as error:
        data_of(write(numbered(2)), columns={"output": "outputs"})
    assert str(error.value) == (
        "data.columns gives 'outputs' for 'output', but no file of data.train has such a column: did you mean 'output'?"
    )
