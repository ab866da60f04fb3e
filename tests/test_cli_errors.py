import sys
from argparse import ArgumentError

import pytest
from jsonargparse import ArgumentParser

import ftlit.data.datamodules
import ftlit.data.formats
import ftlit.peft
import ftlit.stages  # noqa: F401 - its classes are suggested
from ftlit.__main__ import main
from ftlit.cli_errors import _own_class, explain, sentence
from ftlit.errors import ConfigError, nearest

KEYS = [
    "config",
    "seed_everything",
    "trainer",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.accumulate_grad_batches",
    "model",
    "data",
    "run",
    "ckpt_path",
]

# What jsonargparse 4.53 says, word for word: an error inside model or data comes nested in the errors of its union.
STAGE = "[<class 'ftlit.stages.base.Stage'>, <class 'NoneType'>]"
DATA = "[<class 'lightning.pytorch.core.datamodule.LightningDataModule'>, <class 'NoneType'>]"
PEFT = "[<class 'ftlit.peft.base.PEFTStrategy'>, <class 'NoneType'>]"


def nested(key, subtypes, owner, inner, given):
    """An error of an argument of a class."""
    inner = "\n".join("        " + line if line else "" for line in inner.splitlines())
    return (
        f'Parser key "{key}":\n'
        "  Does not validate against any of the Union subtypes\n"
        f"  Subtypes: {subtypes}\n"
        "  Errors:\n"
        f"    - Problem with given class_path '{owner}':\n"
        f"{inner}\n"
        "    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'jsonargparse._util.NestedArg'>\n"
        f"  Given value: NestedArg({given})"
    )


def in_model(inner, given):
    return nested("model", STAGE, "ftlit.SFT", inner, given)


def in_lora(inner, key, value):
    inner = nested("peft", PEFT, "ftlit.LoRA", inner, f"key='{key}', val='{value}'")
    return in_model(inner, f"key='peft.{key}', val='{value}'")


def in_data(inner, key, value):
    return nested("data", DATA, "ftlit.SFTData", inner, f"key='{key}', val='{value}'")


def unknown_class(key, subtypes, given):
    return (
        f'Parser key "{key}":\n'
        "\n"
        f"  - Expected a path but {given} either not accessible or invalid\n"
        "  - Does not validate against any of the Union subtypes\n"
        f"  Subtypes: {subtypes}\n"
        "  Errors:\n"
        f"    - Expected a dot import path string: {given}\n"
        "    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'str'>\n"
        f"  Given value: {given}"
    )


def union(key, subtypes, errors, given):
    lines = "".join(f"    - Expected a {error}\n" for error in errors)
    return (
        f'Parser key "{key}":\n'
        "  Does not validate against any of the Union subtypes\n"
        f"  Subtypes: [{subtypes}]\n"
        "  Errors:\n"
        f"{lines}"
        "  Given value type: <class 'str'>\n"
        f"  Given value: {given}"
    )


NONE = "<class 'NoneType'>"
LITERAL = "Expected a typing.Literal['cosine', 'linear', 'constant', 'wsd', 'inverse_sqrt']. Got value: cosin"
NO_POLICY = (
    'Parser key "model":\n'
    "  Does not validate against any of the Union subtypes\n"
    f"  Subtypes: {STAGE}\n"
    "  Errors:\n"
    "    - Problem with given class_path 'ftlit.SFT':\n"
    "        the following arguments are required: policy\n"
    "    - Expected a <class 'NoneType'>\n"
    "  Given value type: <class 'jsonargparse._namespace.Namespace'>\n"
    "  Given value: Namespace(class_path='ftlit.SFT', init_args=Namespace(objective=None, policy=None, "
    "peft=Namespace(class_path='ftlit.LoRA', init_args=Namespace(rank=8, alpha=16.0)), lr=0.0002))"
)

SENTENCES = {
    "argument-of-lora": (
        in_lora("Option 'rnak' is not accepted", "rnak", "4"),
        "model.peft: LoRA has no argument 'rnak': did you mean 'rank'?",
    ),
    "name-of-peft": (
        in_lora("Option 'lora_alpha' is not accepted", "lora_alpha", "4"),
        "model.peft: LoRA has no argument 'lora_alpha': ftlit calls it alpha.",
    ),
    "argument-of-data": (
        in_data("Option 'bach_size' is not accepted", "bach_size", "2"),
        "data: SFTData has no argument 'bach_size': did you mean 'batch_size'?",
    ),
    "argument-of-stage": (
        in_model("Option 'learning_rate' is not accepted", "key='learning_rate', val='1'"),
        "model: SFT has no argument 'learning_rate': ftlit calls it lr.",
    ),
    "class-of-strategy": (
        in_model(unknown_class("peft", PEFT, "Lora"), "key='peft', val='Lora'"),
        "model.peft: no PEFTStrategy class is called 'Lora': did you mean 'LoRA'?",
    ),
    "class-of-format": (
        in_data(
            unknown_class("format", f"[<class 'ftlit.data.formats.base.RowFormat'>, {NONE}]", "Alpacka"),
            "format",
            "Alpacka",
        ),
        "data.format: no RowFormat class is called 'Alpacka': did you mean 'Alpaca'?",
    ),
    "class-of-stage": (
        unknown_class("model", STAGE, "SFTT"),
        "model: no Stage class is called 'SFTT': did you mean 'SFT'?",
    ),
    "module": (
        in_model(
            'Parser key "peft":\n'
            "\n"
            "  - Expected a path but nomod.Cls either not accessible or invalid\n"
            "  - Does not validate against any of the Union subtypes\n"
            f"  Subtypes: {PEFT}\n"
            "  Errors:\n"
            "    - Problem with given class_path 'nomod.Cls':\n"
            "        No module named 'nomod'\n"
            "    - Expected a <class 'NoneType'>\n"
            "  Given value type: <class 'str'>\n"
            "  Given value: nomod.Cls",
            "key='peft', val='nomod.Cls'",
        ),
        "model.peft: there is no module 'nomod', neither installed nor in the working directory.",
    ),
    "whole-number": (
        in_lora("Parser key \"rank\":\n  Expected a <class 'int'>. Got value: abc", "rank", "abc"),
        "model.peft.rank must be a whole number, got 'abc'.",
    ),
    "number": (
        in_model("Parser key \"warmup\":\n  Expected a <class 'float'>. Got value: abc", "key='warmup', val='abc'"),
        "model.warmup must be a number, got 'abc'.",
    ),
    "bool": (
        in_data("Parser key \"shuffle\":\n  Expected a <class 'bool'>. Got value: 3", "shuffle", "3"),
        "data.shuffle must be true or false, got '3'.",
    ),
    "literal": (
        in_model(f'Parser key "schedule":\n  {LITERAL}', "key='schedule', val='cosin'"),
        "model.schedule must be one of 'cosine', 'linear', 'constant', 'wsd', 'inverse_sqrt', got 'cosin'.",
    ),
    "number-of-trainer": (
        "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: x",
        "trainer.max_steps must be a whole number, got 'x'.",
    ),
    "no-policy": (
        NO_POLICY,
        "model.policy is missing: give --model.policy, or a config that sets it (--config sft).",
    ),
    "no-data": (
        "the following arguments are required: fit.data, fit.model",
        "data is missing: give --data, or a config that sets it (--config sft).",
    ),
    "option": (
        "unrecognized arguments: --trainer.max_stepz 2",
        "there is no option --trainer.max_stepz: did you mean 'trainer.max_steps'?",
    ),
    "top-option": (
        "unrecognized arguments: --sed_everything 1",
        "there is no option --sed_everything: did you mean 'seed_everything'?",
    ),
    "option-with-equals": (
        "unrecognized arguments: --trainer.max_stepz=2",
        "there is no option --trainer.max_stepz: did you mean 'trainer.max_steps'?",
    ),
    "head-of-option": (
        "unrecognized arguments: --modle.init_args.lr 1",
        "there is no option --modle.init_args.lr: did you mean 'model'?",
    ),
    "foreign-option": (
        "unrecognized arguments: --learning_rate 1",
        "there is no option --learning_rate: ftlit calls it model.lr.",
    ),
    "foreign-option-that-is-a-key": (
        "unrecognized arguments: --gradient_accumulation_steps 4",
        "there is no option --gradient_accumulation_steps: ftlit calls it trainer.accumulate_grad_batches.",
    ),
    "far-option": (
        "unrecognized arguments: --zzz 1",
        "there is no option --zzz: known: ckpt_path, config, data, model, run, seed_everything, trainer, "
        "trainer.accumulate_grad_batches, trainer.max_epochs, trainer.max_steps.",
    ),
    "key-of-a-file": (
        "Subcommand 'fit' does not accept option 'modle.init_args.lr'",
        "there is no key modle.init_args.lr: did you mean 'model'?",
    ),
    "torn-yaml": (
        "Problems parsing config: while parsing a flow sequence\n"
        '  in "<unicode string>", line 3, column 9\n'
        "did not find expected ',' or ']'\n"
        '  in "<unicode string>", line 4, column 1',
        'a config file is not valid YAML: while parsing a flow sequence in "<unicode string>", line 3, column 9 '
        "did not find expected ',' or ']' in \"<unicode string>\", line 4, column 1",
    ),
    "anything-else": ("some other\n  complaint", "some other complaint"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_message_becomes_this_sentence(name):
    message, expected = SENTENCES[name]
    assert sentence(message, KEYS) == expected


# A value that may also be null, or of several types, has its error one level deeper.
OPTIONAL = {
    "data.max_tokens": (
        in_data(union("max_tokens", f"<class 'int'>, {NONE}", ["<class 'int'>", NONE], "abc"), "max_tokens", "abc"),
        "data.max_tokens must be a whole number",
        "'abc'",
    ),
    "model.peft.alpha": (
        in_lora(union("alpha", f"<class 'float'>, {NONE}", ["<class 'float'>", NONE], "abc"), "alpha", "abc"),
        "model.peft.alpha must be a number",
        "'abc'",
    ),
    "data.fill": (
        in_data(union("fill", f"dict[str, str], {NONE}", ["<class 'dict'>", NONE], "3"), "fill", "3"),
        "data.fill must be ",
        "'3'",
    ),
    "trainer.precision": (
        union(
            "trainer.precision",
            f"typing.Literal[64, 32, 16], typing.Literal['16-mixed', 'bf16-mixed'], {NONE}",
            ["<class 'int'>", "typing.Literal['16-mixed', 'bf16-mixed']", NONE],
            "foo",
        ),
        "trainer.precision must be ",
        "'foo'",
    ),
    "seed_everything": (
        union("seed_everything", "<class 'bool'>, <class 'int'>", ["<class 'bool'>", "<class 'int'>"], "abc"),
        "seed_everything must be ",
        "'abc'",
    ),
}


@pytest.mark.parametrize("key", OPTIONAL)
def test_wrong_type_of_a_value_with_several_types_is_one_sentence(key):
    message, start, got = OPTIONAL[key]
    text = sentence(message, KEYS)
    assert text.startswith(start)
    assert f"got {got}" in text
    assert "Subtypes" not in text


def test_unknown_optimizer_class_does_not_suggest_stages():
    subtypes = "[typing.Callable[[collections.abc.Iterable], torch.optim.optimizer.Optimizer], <class 'NoneType'>]"
    message = in_model(unknown_class("optimizer", subtypes, "Adamm"), "key='optimizer', val='Adamm'")
    text = sentence(message, KEYS)
    assert text.startswith("model.optimizer: no ")
    assert "Stage" not in text
    assert "SFT" not in text


def test_class_without_arguments_does_not_list_none():
    inner = nested("peft", PEFT, "ftlit.Full", "Option 'rank' is not accepted", "key='rank', val='4'")
    text = sentence(in_model(inner, "key='peft.rank', val='4'"), KEYS)
    assert text.startswith("model.peft: Full has no argument 'rank'")
    assert "known: ." not in text


def test_explain_turns_an_argument_error_into_a_config_error():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--batch_size", type=int)
    with pytest.raises(ConfigError) as error, explain(lambda: parser):
        raise ArgumentError(None, "unrecognized arguments: --bach_size 3")
    assert str(error.value) == "there is no option --bach_size: did you mean 'batch_size'?"
    assert error.value.__suppress_context__


def test_explain_works_before_there_is_a_parser_and_lets_other_errors_pass():
    with pytest.raises(ConfigError, match=r"^odd$"), explain(lambda: None):
        raise ArgumentError(None, "odd")
    with pytest.raises(KeyError), explain(lambda: None):
        raise KeyError("x")
    with explain(lambda: None):
        pass


PARSED = {
    "argument-of-lora": ["--model.peft.rnak", "4"],
    "name-of-peft": ["--model.peft.lora_alpha", "4"],
    "argument-of-data": ["--data.bach_size", "2"],
    "argument-of-stage": ["--model.learning_rate", "1"],
    "class-of-strategy": ["--model.peft", "Lora"],
    "class-of-format": ["--data.format", "Alpacka"],
    "class-of-stage": ["--model", "SFTT"],
    "module": ["--model.peft", "nomod.Cls"],
    "whole-number": ["--model.peft.rank", "abc"],
    "number": ["--model.warmup", "abc"],
    "bool": ["--data.shuffle", "3"],
    "literal": ["--model.schedule", "cosin"],
    "number-of-trainer": ["--trainer.max_steps", "x"],
    "option": ["--trainer.max_stepz", "2"],
    "head-of-option": ["--modle.init_args.lr", "1"],
    "foreign-option": ["--learning_rate", "1"],
    "data.max_tokens": ["--data.max_tokens", "abc"],
    "model.peft.alpha": ["--model.peft.alpha", "abc"],
    "data.fill": ["--data.fill", "3"],
    "seed_everything": ["--seed_everything", "abc"],
}


@pytest.fixture
def fit(capsys, monkeypatch):
    """Runs `ftlit fit` on LoRA; gives what the parser said and what the user is told."""
    heard = []
    monkeypatch.setattr(sys, "argv", ["ftlit"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("ftlit.cli_errors.sentence", lambda *args: heard.append(args[0]) or sentence(*args))

    def fit(*args):
        assert main(["fit", "--config", "sft", "--config", "peft/lora", *args]) == 1
        return heard, capsys.readouterr().err

    return fit


@pytest.mark.parametrize("name", PARSED)
def test_the_parser_still_says_these_messages(name, fit):
    message, *_ = {**SENTENCES, **OPTIONAL}[name]
    heard, told = fit("--model.policy", "x", *PARSED[name])
    assert heard == [message]
    assert told.startswith("ftlit: ")
    if name in SENTENCES:
        assert told.startswith(f"ftlit: {SENTENCES[name][1].split(': known')[0]}")


def test_a_run_without_a_policy_is_told_so(fit):
    assert fit()[1] == f"ftlit: {SENTENCES['no-policy'][1]}\n"


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("rnak", ["rank", "alpha"], "did you mean 'rank'?"),
        ("LORA", ["LoRA", "Full"], "did you mean 'LoRA'?"),
        ("x", ["b", "a"], "known: a, b."),
        ("x", [f"name{i:02}" for i in range(14)], "known: " + ", ".join(f"name{i:02}" for i in range(12)) + ", ...."),
    ],
)
def test_nearest_name_is_suggested_or_names_are_listed(word, known, expected):
    assert nearest(word, known) == expected


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("pref_loss", "ftlit calls it model.loss."),
        ("precompute_ref_log_probs", "ftlit calls it model.cache_reference."),
        ("ref_model", "the reference is the model at the start of the run; leave it out."),
        ("id2label", "the labels are those of the rows, or data.labels; leave it out."),
    ],
)
def test_words_of_other_programs_for_preferences_and_labels(word, said):
    assert sentence(f"unrecognized arguments: --{word}=1", KEYS) == f"there is no option --{word}: {said}"


@pytest.mark.parametrize(
    ("path", "base", "said"),
    [
        ("ftlit.WandB", "lightning.pytorch.loggers.Logger", "did you mean 'ftlit.callbacks.wandb.WandB'?"),
        ("ftlit.callbacks.LoRA", "ftlit.peft.base.PEFTStrategy", "did you mean 'ftlit.peft.lora.LoRA'?"),
        ("ftlit.peft.Prefix_Tuning", "ftlit.peft.base.PEFTStrategy", "did you mean 'PrefixTuning'?"),
        ("ftlit.Loar", "ftlit.peft.base.PEFTStrategy", "did you mean 'LoRA'?"),
    ],
)
def test_a_class_that_is_elsewhere_is_found(path, base, said):
    import ftlit.callbacks.wandb  # noqa: F401

    assert _own_class(path, base) == f"{path.rpartition('.')[0]} has no {path.rpartition('.')[2]}: {said}"
