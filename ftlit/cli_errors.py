"""What the argument parser says of a mistake, as one sentence that names the nearest key or class."""

from __future__ import annotations

import contextlib
import json
import re
from argparse import ArgumentError
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ftlit.errors import ConfigError, FtlitError, nearest

# What people coming from TRL, PEFT, LLaMA-Factory and axolotl type first.
FOREIGN = {
    "lr": "model.lr",
    "peft": "model.peft",
    "policy": "model.policy",
    "epochs": "trainer.max_epochs",
    "batch_size": "data.batch_size",
    "train": "data.train",
    "weight_decay": "model.weight_decay",
    "optim": "model.optimizer",
    "optimizer": "model.optimizer",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "gpus": "trainer.devices",
    "devices": "trainer.devices",
    "precision": "trainer.precision",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "use_rslora": "rslora",
    "model_name_or_path": "model.policy",
    "base_model": "model.policy",
    "dataset_name": "data.train",
    "dataset": "data.train",
    "learning_rate": "model.lr",
    "lr_scheduler_type": "model.schedule",
    "warmup_ratio": "model.warmup",
    "warmup_steps": "model.warmup",
    "per_device_train_batch_size": "data.batch_size",
    "micro_batch_size": "data.batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "accumulate_grad_batches": "trainer.accumulate_grad_batches",
    "num_train_epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "max_steps": "trainer.max_steps",
    "max_epochs": "trainer.max_epochs",
    "max_grad_norm": "trainer.gradient_clip_val",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "beta": "model.loss.beta (of PPO model.kl.coef)",
    "kl_coef": "model.kl.coef",
    "init_kl_coef": "model.kl.coef",
    "num_generations": "model.num_answers",
    "num_iterations": "model.update_epochs",
    "num_ppo_epochs": "model.update_epochs",
    "num_mini_batches": "model.num_minibatches",
    "reward_funcs": "model.reward",
    "reward_model_path": "model.reward (RewardScorer)",
    "max_completion_length": "model.max_new_tokens",
    "response_length": "model.max_new_tokens",
    "max_prompt_length": "data.max_length",
    "missing_eos_penalty": "model.shaping.missing_end_penalty",
    "epsilon": "model.loss.clip",
    "epsilon_high": "model.loss.clip_high",
    "cliprange": "model.loss.clip",
    "cliprange_value": "model.value_clip",
    "vf_coef": "model.value_coef",
    "value_model_path": "model.value_model",
    "output_dir": "run",
    "seed": "seed_everything",
    "bf16": "trainer.precision (bf16-mixed)",
    "fp16": "trainer.precision (16-mixed)",
    "logging_steps": "trainer.log_every_n_steps",
    "eval_steps": "trainer.val_check_interval",
    "report_to": "config logger/wandb",
    "use_peft": "config peft/lora",
    "resume_from_checkpoint": "ckpt_path",
    "dpo_beta": "model.loss.beta",
    "pref_beta": "model.loss.beta",
    "loss_type": "model.loss",
    "pref_loss": "model.loss",
    "rl": "model.loss",
    "label_smoothing": "model.loss.label_smoothing (of Classification model.label_smoothing)",
    "dpo_label_smoothing": "model.loss.label_smoothing",
    "f_divergence_type": "model.loss.divergence",
    "simpo_gamma": "model.loss.gamma",
    "desirable_weight": "model.loss.desirable_weight",
    "undesirable_weight": "model.loss.undesirable_weight",
    "kto_chosen_weight": "model.loss.desirable_weight",
    "kto_rejected_weight": "model.loss.undesirable_weight",
    "loss_weights": "model.loss WeightedSum, with losses and weights",
    "rpo_alpha": "model.loss WeightedSum, with losses and weights",
    "pref_ftx": "model.loss WeightedSum, with losses and weights",
    "ld_alpha": "model.loss LengthDesensitized, with loss and alpha",
    "use_weighting": "model.loss WPO",
    "precompute_ref_log_probs": "model.cache_reference",
    "truncation_mode": "data.truncate",
    "center_rewards_coefficient": "model.objective.center",
    "class_weight": "model.class_weights",
}


# What has no counterpart to name.
ALWAYS = {
    "packing": "ftlit always packs; leave it out.",
    "padding_free": "ftlit always packs; leave it out.",
    "assistant_only_loss": "ftlit always trains the assistant turns only; leave it out.",
    "completion_only_loss": "ftlit always trains the assistant turns only; leave it out.",
    "ref_model": "the reference is the model at the start of the run; leave it out.",
    "sync_ref_model": "the reference is the model at the start of the run; leave it out.",
    "reference_free": "losses without a reference are simpo, orpo, cpo and slic: set model.loss to one.",
    "max_prompt_length": "data.max_length bounds prompt and answer together, and data.truncate says what is cut.",
    "num_labels": "the labels are those of the rows, or data.labels; leave it out.",
    "id2label": "the labels are those of the rows, or data.labels; leave it out.",
    "label2id": "the labels are those of the rows, or data.labels; leave it out.",
    "load_in_4bit": "ftlit cannot train quantized weights yet.",
    "load_in_8bit": "ftlit cannot train quantized weights yet.",
}


def rows_given(args: list[str]) -> list[str]:
    """Reads `--data.train a b c` as a list, as a shell's `*.jsonl` gives it.

    Args:
        args: The arguments of a verb.

    Raises:
        ConfigError: For rows given as `--data`, which takes a class.
    """
    read: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        key, equals, value = arg.partition("=")
        if key == "--data":
            _refuse_rows(value if equals else "".join(rest[:1]))
        read.append(arg)
        if arg == "--data.train":
            files: list[str] = []
            while rest and not rest[0].startswith("-"):
                files.append(rest.pop(0))
            read += [json.dumps(files)] if len(files) > 1 else files
    return read


def _refuse_rows(value: str) -> None:
    looks = value.startswith("sample:") or Path(value).suffix not in (".yaml", ".yml", "") or "/" in value
    if looks and "{" not in value and not re.fullmatch(r"[A-Za-z_][\w.]*\.[A-Z]\w*", value):
        raise ConfigError(f"--data names a class; give the rows as --data.train {value}.")


@contextlib.contextmanager
def explain(parser_of: Any) -> Iterator[None]:
    """Turns parse errors into a `ConfigError` of one sentence.

    Args:
        parser_of: Called without arguments for the parser of the verb, whose keys are suggested.
    """
    try:
        yield
    except FtlitError:
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        # A constructor's own refusal arrives wrapped: the parser tries every type of a union.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, FtlitError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, ArgumentError):
            raise ConfigError(sentence(str(error.message), _keys(parser_of()))) from None
        raise


def sentence(message: str, keys: list[str]) -> str:
    """The one sentence for a parser's message.

    Args:
        message: What jsonargparse said, nested as it is.
        keys: The keys of the verb.
    """
    if message.startswith("Problems parsing config"):
        return f"a config file is not valid YAML: {' '.join(message.split(':', 1)[1].split())}"
    if found := re.search(r"unrecognized arguments: --?([^\s=]+)", message):
        return _unknown(found[1].rstrip("+"), keys, "option --")
    if found := re.search(r"unrecognized arguments: (\S+)", message):
        return f"{found[1]} belongs to no option; several values are written as --option '[one, two]'."
    if found := re.search(r"does not accept option '([^']+)'", message):
        return _unknown(found[1], keys, "key ")
    path, owner, base, kinds, given = [], "", "", "", ""
    for line in message.splitlines():
        if found := re.search(r"Expected a path but ([\w.]+\.\w+) either", line):
            given = found[1]  # the next line says of which kind it should be
            continue
        if found := re.search(r'Parser key "([^"]+)"', line):
            path.append(found[1])
        elif found := re.search(r"Problem with given class_path '([^']+)'", line):
            owner = found[1]
            if wrong := _own_class(owner, base):
                return f"{'.'.join(path)}: {wrong}"
        elif found := re.search(r"Subtypes: \[(.*)\]$", line):
            names = re.findall(r"[\w.]+\.\w+", found[1].replace("typing.", "").replace("collections.abc.", ""))
            base = names[-1] if names else ""
            kinds = "" if names else found[1]
            if wrong := _own_class(given, base):
                return f"{'.'.join(path)}: {wrong}"
        elif kinds and (found := re.search(r"Given value: (.*)", line)):
            value = re.sub(r"^NestedArg\(key='.*', val=(.*)\)$", r"\1", found[1])
            return f"{'.'.join(path)} must be {_kinds(kinds)}, got {value.strip(chr(39))!r}."
        elif found := re.search(r"Option '([^']+)' is not accepted", line):
            known = _arguments(owner)
            word, name = found[1], owner.rsplit(".", 1)[-1]
            if name == "LightningDataModule":
                return f"data: nothing says yet which data this is: give --config sft before --data.{word}."
            if not known:
                return f"{'.'.join(path)}: {name} has no argument {word!r}, nor any other."
            hint = _foreign(word, known) or nearest(word, known)
            return f"{'.'.join(path)}: {name} has no argument {word!r}: {hint}"
        elif found := re.search(r"(?:dot import path string|(?:class|import) path format): (\S+)", line):
            kind = base.rsplit(".", 1)[-1]
            if kind == "Stage" and ("/" in found[1] or found[1].endswith(".gguf")):
                return f"model names the stage (SFT); give the model to train as --model.policy {found[1]}."
            hint = nearest(found[1], _subclasses(base))
            return f"{'.'.join(path)}: no {kind} class is called {found[1]!r}: {hint}"
        elif found := re.search(r"No module named '([^']+)'", line):
            return f"{'.'.join(path)}: there is no module {found[1]!r}, neither installed nor in the working directory."
        elif found := re.search(r"arguments are required: ([\w.]+)", line):
            key = ".".join([*path, found[1].partition(".")[2] or found[1]])
            return f"{key} is missing: give --{key}, or a config that sets it (--config sft)."
        elif (
            not kinds and "NoneType" not in line and (found := re.search(r"Expected an? (.+?)\. Got value: (.*)", line))
        ):
            return f"{'.'.join(path)} must be {_kind(found[1])}, got {found[2]!r}."
    return " ".join(message.split())


def _kind(expected: str) -> str:
    if found := re.fullmatch(r"<class '(\w+)'>", expected):
        return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}.get(
            found[1], found[1]
        )
    if found := re.fullmatch(r"typing\.Literal\[(.*)\]", expected):
        return f"one of {found[1]}"
    return expected


def _kinds(subtypes: str) -> str:
    """A union of plain types in words."""
    parts = re.findall(r"<class '\w+'>|typing\.Literal\[[^\]]*\]|(?:dict|list)\[[^\]]*\]", subtypes)
    words = [_kind(part) for part in parts if "NoneType" not in part]
    words += ["null"] if "NoneType" in subtypes else []
    return " or ".join(dict.fromkeys(words))


def _unknown(word: str, keys: list[str], what: str) -> str:
    if hint := _foreign(word.removeprefix("--"), keys):
        return f"there is no {what}{word}: {hint}"
    head, _, rest = word.partition(".")
    tops = sorted({key.split(".")[0] for key in keys})
    if rest and head not in tops:
        return f"there is no {what}{word}: {nearest(head, tops)}"
    return f"there is no {what}{word}: {nearest(word, keys)}"


def _foreign(word: str, known: list[str]) -> str:
    if word in ALWAYS:
        return ALWAYS[word]
    name = FOREIGN.get(word)
    if name is None or name == word:
        return ""
    last = name.rsplit(".", 1)[-1]
    return f"ftlit calls it {last if last in known else name}."


def _keys(parser: Any) -> list[str]:
    if parser is None:
        return []
    return [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]


def class_of(path: str) -> Any:
    """What an import path names; None where there is no such thing."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _named(name: str, kind: Any) -> str:
    """Where a class of a kind is that has a name; empty where none has."""
    below: list[type] = list(kind.__subclasses__()) if isinstance(kind, type) else []
    for one in below:
        if one.__name__ == name:
            return f"{one.__module__}.{name}"
        below += one.__subclasses__()
    return ""


def _own_class(class_path: str, base: str) -> str:
    """What is wrong with a class of the user's own; empty where nothing is, or where there is no such file."""
    module, _, name = class_path.rpartition(".")
    if not module:
        return ""
    try:
        found = import_module(module)
    except ImportError:
        return ""
    except SyntaxError as error:
        return f"{Path(error.filename or module).name}, line {error.lineno}: {error.msg}."
    except Exception as error:  # whatever a file of one's own does when it is imported
        return f"{module} cannot be imported: {type(error).__name__}: {error}."
    cls, kind = getattr(found, name, None), class_of(base)
    if cls is None:
        if elsewhere := _named(name, kind):
            return f"{module} has no {name}: did you mean {elsewhere!r}?"
        own = [key for key, value in vars(found).items() if isinstance(value, type) and value.__module__ == module]
        # A package may have only what is imported when it is first asked for.
        return f"{module} has no {name}: {nearest(name, own or [key for key in dir(found) if key[:1].isupper()])}"
    if not isinstance(cls, type) or not isinstance(kind, type):
        return ""
    if not issubclass(cls, kind):
        return f"{class_path} is no {kind.__name__}; let it be a subclass of {base.replace('.base.', '.')}."
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        return f"{class_path} lacks {', '.join(missing)}, which every {kind.__name__} must have."
    return ""


def _arguments(class_path: str) -> list[str]:
    cls = class_of(class_path)
    if cls is None:
        return []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, instantiate=False)
    return sorted({key.split(".")[0] for key in parser.get_defaults().keys()})  # noqa: SIM118 - a Namespace


def _subclasses(class_path: str) -> list[str]:
    base, found = class_of(class_path), set()
    todo = [] if base is None else [base]
    while todo:
        for sub in todo.pop().__subclasses__():
            todo.append(sub)
            if not sub.__name__.startswith("_") and not getattr(sub, "__abstractmethods__", None):
                found.add(sub.__name__)
    return sorted(found)
