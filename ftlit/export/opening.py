"""Opens a base model, a run or an adapter folder for use."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from argparse import ArgumentError
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentParser

from ftlit.data.padding import classifier_tokenizer
from ftlit.errors import ConfigError
from ftlit.export.beside import filled, has_tokenizer, system_of, tokenizer_of
from ftlit.models.heads import ScalarPolicy, head_names
from ftlit.models.load import is_classifier, load_classifier, load_lm, load_tokenizer
from ftlit.peft import Full, PEFTStrategy
from ftlit.peft.io import is_adapter, load_adapter, read_adapter, read_config
from ftlit.run_config import look_where_begun

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Tensors of an adapter file with as many rows as its classifier has outputs.
_LAST_LAYERS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


class Opened(NamedTuple):
    """A model ready to generate or to be written.

    Attributes:
        lm: The model with its trained weights, in eval mode.
        strategy: The strategy applied to it, or None for a base model.
        tokenizer: Its tokenizer, with the chat template that it was trained with.
        base: Name of the base model.
        system: The system turn of its training rows, if the run set one.
        head: Of a sequence classifier the modules that are its head; empty for a language model.
    """

    lm: PreTrainedModel
    strategy: PEFTStrategy | None
    tokenizer: PreTrainedTokenizerBase
    base: str
    system: str | None = None
    head: tuple[str, ...] = ()


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def place(lm: PreTrainedModel, device: str | None, dtype: str | None = None) -> None:
    """Moves a model to a device, its weights in a type.

    Args:
        lm: The model; changed.
        device: Where; the CPU when left out.
        dtype: A key of `DTYPES`; None: as it is. What is computed once, such as the frequencies of rotary positions,
            keeps its precision.
    """
    lm.to(torch.device(device or "cpu"))
    if dtype is not None:
        for parameter in lm.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
        lm.config.dtype = DTYPES[dtype]


def is_run(path: str | Path) -> bool:
    """Whether a path is a run folder."""
    return (Path(path) / "config.yaml").is_file()


def open_model(name: str, base: str | None = None, which: str = "last") -> Opened:
    """Opens a model.

    Args:
        name: A hub id, a model folder, a GGUF file, a run folder, or an adapter folder.
        base: The base model of an adapter folder or a run, where it is no longer the one that these name.
        which: `last` or `best` checkpoint of a run.

    Raises:
        ConfigError: If it cannot be opened.
    """
    if is_run(name):
        return _open_run(Path(name), base, which)
    if is_adapter(name):
        config = read_config(name)
        base = base or config.get("base_model_name_or_path")
        if not base:
            raise ConfigError(f"the adapter in {name} does not name its base model; give --base.")
        if config.get("task_type") == "SEQ_CLS":
            return _open_head_adapter(Path(name), base)
        lm = load_lm(base)
        strategy = load_adapter(lm, name)
        return Opened(lm.eval(), strategy, tokenizer_of(name, base), base, system_of(name))
    if base is not None:
        raise ConfigError(f"--base goes with a run or an adapter folder, and {name} is neither.")
    if is_classifier(name):
        lm, _ = load_classifier(name)
        return Opened(lm.eval(), None, load_tokenizer(name), name, system_of(name), tuple(head_names(lm)))
    return Opened(load_lm(name).eval(), None, load_tokenizer(name), name, system_of(name))


def _open_head_adapter(folder: Path, base: str) -> Opened:
    """An adapter with the head of a classifier; the shape of the head says how many outputs there are."""
    _, state = read_adapter(folder)
    outputs = [len(t) for key, t in state.items() if key.endswith(_LAST_LAYERS)]
    if not outputs:
        raise ConfigError(f"the adapter in {folder} is of a classifier, but holds no head ({', '.join(_LAST_LAYERS)}).")
    names = None if is_classifier(base) else [f"LABEL_{number}" for number in range(outputs[0])]
    lm, new = load_classifier(base, names)
    head = head_names(lm.eval(), new)
    strategy = load_adapter(lm, folder, head)
    tokenizer = tokenizer_of(folder, base)
    if has_tokenizer(folder):
        lm.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return Opened(lm, strategy, tokenizer, base, system_of(folder), tuple(head))


def _open_run(folder: Path, base: str | None, which: str) -> Opened:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        settings = config["model"]["init_args"]
        data = (config.get("data") or {}).get("init_args", {})
    except (yaml.YAMLError, UnicodeError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{folder / 'config.yaml'} is torn, or not the config of an ftlit run.") from None
    path = folder / "checkpoints" / f"{which}.ckpt"
    if not path.exists():
        kept = sorted(file.stem for file in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        raise ConfigError(f"run {folder} has no checkpoint {which!r}; it has: {', '.join(kept) or 'none'}.")
    policy = base or settings["policy"]
    if base is None and Path(policy).is_absolute() and not Path(policy).exists():
        raise ConfigError(f"run {folder} was trained on {policy}, which is not there (any more); give --base.")
    checkpoint = read_checkpoint(path)
    look_where_begun(folder / "config.yaml")
    strategy = _strategy(settings.get("peft"))
    strategy.start_state = checkpoint.get("ftlit", {}).get("start")
    trust = bool(settings.get("trust_remote_code"))
    about = checkpoint.get("ftlit", {}).get("classifier")
    if about is None:
        lm, head = load_lm(policy, trust_remote_code=trust), []
        strategy.apply(lm)
    else:
        lm, new = load_classifier(policy, about["outputs"], trust_remote_code=trust)
        lm.config.get_text_config().pad_token_id = about["pad_token_id"]
        lm.config.problem_type = about["problem_type"]
        head = ScalarPolicy(lm, strategy, new).head
    prefix = "policy.lm."  # a stage may train more, such as values
    state = {k.removeprefix(prefix): tensor for k, tensor in checkpoint["state_dict"].items() if k.startswith(prefix)}
    _copy(lm, strategy, state, path)
    # Of a run that went on from an adapter that one's, or where it has gone since, what lies beside the run's own.
    places = [getattr(strategy, "from_adapter", None), folder / "adapter" / which]
    place = next((one for one in places if has_tokenizer(one)), None) if places[0] else None
    tokenizer = load_tokenizer(policy, trust) if place is None else tokenizer_of(place, policy, trust)
    if data.get("chat_template") or data.get("chat_template_kwargs") or not tokenizer.chat_template:
        from ftlit.data.rendering import choose_template

        choose_template(tokenizer, data.get("chat_template"), data.get("chat_template_kwargs"))
    system = filled(data.get("system"), data.get("fill"))
    if head:
        tokenizer = classifier_tokenizer(tokenizer, about["pad_token_id"])
    return Opened(lm.eval(), strategy, tokenizer, policy, system, tuple(head))


def read_checkpoint(path: str | Path, *, checked: bool = False) -> dict[str, Any]:
    """The content of a checkpoint; nothing in it is executed.

    Args:
        path: The checkpoint.
        checked: Whether this command has checked it already: its checksums cost a read of the whole file.

    Raises:
        ConfigError: If it is torn, or no checkpoint of a run.
    """
    try:
        damaged = None
        if not checked:
            with zipfile.ZipFile(path) as file:  # every part has a checksum, which torch does not look at
                damaged = file.testzip()
        # Mapped, not read: a resume only asks whether the file is whole, and Lightning reads it after that.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        assert damaged is None
        assert isinstance(checkpoint["state_dict"], dict)
    except _TORN:
        raise ConfigError(f"{path} is torn, or not a checkpoint of an ftlit run.") from None
    return checkpoint


_TORN = (
    *(RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError, AssertionError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, AttributeError, IndexError, OverflowError),
)
"""What reading a damaged checkpoint raises."""


def _strategy(config: dict[str, Any] | None) -> PEFTStrategy:
    """The strategy that a config describes."""
    if config is None:
        return Full()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PEFTStrategy, "peft")
    try:
        return parser.instantiate_classes(parser.parse_object({"peft": config})).peft
    except (ArgumentError, ValueError, TypeError) as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(
            f"the strategy {config.get('class_path')} of this run cannot be made again ({last}); is its file in the "
            "working directory?"
        ) from None


@torch.no_grad()
def _copy(lm: PreTrainedModel, strategy: PEFTStrategy, state: dict[str, torch.Tensor], path: Path) -> None:
    own = strategy.trained(lm)
    if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in state.items()}:
        raise ConfigError(f"{path} does not fit the model and strategy in config.yaml; was the base model replaced?")
    for name, parameter in own.items():
        parameter.copy_(state[name])


__all__ = ["DTYPES", "Opened", "is_run", "open_model", "place"]
