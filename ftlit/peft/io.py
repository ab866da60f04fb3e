"""Adapter folders in the PEFT library's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ftlit.errors import ConfigError
from ftlit.files import replacing, write_text
from ftlit.peft.base import PEFTStrategy
from ftlit.peft.hidden import without
from ftlit.peft.matching import is_in
from ftlit.ranks import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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


def _prefix(names: Iterable[str]) -> str:
    """What the PEFT library puts before the names of modules that are saved whole: less where nothing is wrapped."""
    wrapped = "base_model.model."
    return wrapped if any(name.startswith(wrapped) for name in names) else "base_model."


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
    path = Path(folder) / WEIGHTS
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {WEIGHTS}; the adapter was not written completely.") from None
    except SafetensorError as error:
        raise ConfigError(f"{path} is torn or no safetensors file ({error}).") from None
    return config, state


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
    strategy = _class_of(config).from_peft(config, state)
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
        raise ConfigError(f"adapter method {kind!r} is not one that ftlit has: {', '.join(sorted(kinds))}.")
    return kinds[kind]


def _subclasses(cls: Any) -> Iterator[type[PEFTStrategy]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


__all__ = ["CONFIG", "WEIGHTS", "is_adapter", "load_adapter", "read_adapter", "read_config", "save_adapter"]
