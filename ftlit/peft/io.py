"""Adapter folders in the PEFT library's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ftlit.errors import ConfigError
from ftlit.files import replacing, write_text
from ftlit.peft.base import MERGE_IT_THERE, PEFTStrategy
from ftlit.peft.hidden import without
from ftlit.peft.matching import is_in
from ftlit.peft.vocabulary import take_vocabulary
from ftlit.ranks import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Methods of the PEFT library that change what a model is given, not its weights, or have nothing to say which they are.
_NEVER_MERGED = (None, "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE")
CONFIG, WEIGHTS, OLDER = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def is_adapter(folder: str | Path) -> bool:
    """Whether a path is an adapter folder."""
    return (Path(folder) / CONFIG).is_file()


def save_adapter(
    strategy: PEFTStrategy,
    model: PreTrainedModel,
    folder: str | Path,
    base: str,
    write: bool = True,
    head: Sequence[str] = (),
) -> None:
    """Writes an adapter folder that ftlit and `peft.PeftModel.from_pretrained` read.

    Args:
        strategy: The strategy that was applied to the model.
        model: The model.
        folder: Where to write; made if needed.
        base: Name or path of the base model, for `base_model_name_or_path`.
        write: False on all ranks but one: they only help to put sharded tensors together.
        head: Modules of a sequence classifier that are trained beside the strategy and saved whole with it.

    Raises:
        ConfigError: If the strategy has no such format.
        DiskFullError: If there is no space left; an adapter that was there before is kept.
    """
    config = {
        **strategy.peft_config(model),
        "base_model_name_or_path": base,
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "inference_mode": True,
    }
    state = {name: tensor for name, tensor in strategy.state(model).items() if not is_in(name, head)}
    state |= _brought(strategy, model, _prefix(state))
    if head:
        config["modules_to_save"] = [*(config.get("modules_to_save") or []), *head]
        inside = _prefix(state)
        parts = {name: model.get_submodule(name) for name in head}
        state |= {f"{inside}{name}.{own}": p.detach() for name, m in parts.items() for own, p in m.named_parameters()}
    folder = Path(folder)
    tensors = {name: whole(tensor).cpu().contiguous() for name, tensor in state.items()}
    if not write:
        return
    with replacing(folder / WEIGHTS) as scratch:
        scratch.write_bytes(save(tensors, metadata={"format": "pt"}))
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _brought(strategy: PEFTStrategy, model: PreTrainedModel, inside: str) -> dict[str, Tensor]:
    """The frozen weights that came with the adapter, as the PEFT library writes them."""
    found = {}
    for name in strategy.brought:
        path, _, own = name.rpartition(".")
        adapted = hasattr(model.get_submodule(path), "parts")
        # A copy: both ends may be one weight, and a file cannot hold that twice.
        found[f"{inside}{path}.{'base_layer.' if adapted else ''}{own}"] = model.get_parameter(name).detach().clone()
    return found


def _prefix(names: Iterable[str]) -> str:
    """What the PEFT library puts before the names of modules that are saved whole: less where nothing is wrapped."""
    wrapped, names = "base_model.model.", list(names)
    return (
        wrapped
        if "prompt_embeddings" not in names and any(name.startswith(wrapped) for name in names)
        else "base_model."
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `adapter_config.json` of a folder.

    Raises:
        ConfigError: If there is none, or it is not JSON.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        own = Path(folder) / "adapter" / "last"
        hint = f"; give {own}" if own.is_dir() else ""
        raise ConfigError(f"{folder} is not an adapter folder: it has no {CONFIG}{hint}.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(config).__name__}.")
    return config


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter folder.

    Raises:
        ConfigError: If it cannot be read.
    """
    config = read_config(folder)
    path, older = Path(folder) / WEIGHTS, Path(folder) / OLDER
    if not path.exists() and older.exists():
        return config, _read_older(older)
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {WEIGHTS}; the adapter was not written completely.") from None
    except SafetensorError as error:
        raise ConfigError(f"{path} is torn or no safetensors file ({error}).") from None
    return config, state


def _read_older(path: Path) -> dict[str, Tensor]:
    """The tensors of an `adapter_model.bin`, as older versions of the PEFT library wrote it; nothing is executed.

    Raises:
        ConfigError: If it is torn, or holds anything but tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError, IndexError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise ConfigError(f"{path} is torn, or holds more than tensors ({first}).") from None
    if not isinstance(state, dict) or not all(isinstance(one, Tensor) for one in state.values()):
        raise ConfigError(f"{path} holds more than tensors by name; it is no adapter of the PEFT library.")
    return state


def load_adapter(model: PreTrainedModel, folder: str | Path, head: Sequence[str] = ()) -> PEFTStrategy:
    """Applies the strategy that an adapter folder describes and loads its weights.

    Args:
        model: The base model, changed in place.
        folder: A folder written by ftlit or by the PEFT library.
        head: Modules of a sequence classifier that were saved whole beside the adapter; the strategy sees nothing of
            them.

    Returns:
        The strategy.

    Raises:
        ConfigError: If the folder cannot be read, its method is unknown, or it belongs to another model.
    """
    config, state = read_adapter(folder)
    saved, state = _of_head(state, head)
    if head:  # the PEFT library names both of the usual ones in every file
        others = [name for name in config.get("modules_to_save") or [] if name not in (*head, "classifier", "score")]
        config = {**config, "modules_to_save": others or None}
    kind = _class_of(config)
    with without(model, head):
        state, brought = take_vocabulary(model, state, _prefix(state), config.get("modules_to_save") or ())
    strategy = kind.from_peft(config, state)
    strategy.brought = brought
    with without(model, head):
        try:
            strategy.apply(model)
        except ConfigError as error:
            raise ConfigError(f"the adapter in {folder} does not belong to this model: {error}") from None
        strategy.load(model, state)
    _load_head(model, head, saved, folder)
    return strategy


def _of_head(state: dict[str, Tensor], head: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the head by their names in the model, and the others as they are."""
    inside = _prefix(state)
    plain = {name: name.removeprefix(inside) for name in state}
    mine = {own: state[name] for name, own in plain.items() if is_in(own, head)}
    return mine, {name: tensor for name, tensor in state.items() if not is_in(plain[name], head)}


@torch.no_grad()
def _load_head(model: PreTrainedModel, head: Sequence[str], saved: dict[str, Tensor], folder: str | Path) -> None:
    own = {f"{name}.{part}": p for name in head for part, p in model.get_submodule(name).named_parameters()}
    if {name: p.shape for name, p in own.items()} != {name: t.shape for name, t in saved.items()}:
        raise ConfigError(
            f"the adapter in {folder} has a head that does not fit this model: {sorted(saved)} in the file, "
            f"{sorted(own)} in the model."
        )
    for name, parameter in own.items():
        parameter.data = saved[name].to(parameter.device)


def _class_of(config: dict[str, Any]) -> type[PEFTStrategy]:
    # Only classes that name the method themselves: a user's subclass of LoRA does not take over LoRA's files.
    kinds = {str(cls.peft_type): cls for cls in _subclasses(PEFTStrategy) if vars(cls).get("peft_type")}
    kind = config.get("peft_type")
    if kind not in kinds:
        hint = "" if kind in _NEVER_MERGED else f"; {MERGE_IT_THERE}"
        raise ConfigError(f"adapter method {kind!r} is not one that ftlit has ({', '.join(sorted(kinds))}){hint}.")
    return kinds[kind]


def _subclasses(cls: Any) -> Iterator[type[PEFTStrategy]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


__all__ = ["CONFIG", "WEIGHTS", "is_adapter", "load_adapter", "read_adapter", "read_config", "save_adapter"]
