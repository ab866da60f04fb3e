"""Writes a model folder that transformers loads, or an adapter folder that the PEFT library loads."""

from __future__ import annotations

from pathlib import Path

from ftlit.errors import ConfigError
from ftlit.export.opening import DTYPES, Opened
from ftlit.models.load import make_saveable
from ftlit.peft.io import save_adapter
from ftlit.rollout.generate import end_tokens


def prepare_folder(to: str | Path) -> Path:
    """An empty folder to write to.

    Raises:
        ConfigError: If it already holds something.
    """
    folder = Path(to)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{folder} already holds something; give another --to, or delete it.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_model(opened: Opened, to: str | Path, dtype: str = "float32") -> None:
    """Merges the adapter and writes weights (safetensors), config, tokenizer and chat template.

    Args:
        opened: The model; changed in place.
        to: An empty folder, or one that does not exist yet.
        dtype: Type of the written weights, a key of `DTYPES`.

    Raises:
        ConfigError: If the strategy cannot be merged.
    """
    if opened.strategy is not None:
        opened.strategy.merge(opened.lm)  # raises before anything is written
    folder = prepare_folder(to)
    lm = opened.lm.to(DTYPES[dtype])
    lm.set_attn_implementation("sdpa")
    make_saveable(lm)
    if not opened.head:  # the template's end token may not be the tokenizer's: others must stop there too
        lm.generation_config.eos_token_id = end_tokens(lm, opened.tokenizer) or None
    lm.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)


def write_adapter(opened: Opened, to: str | Path) -> None:
    """Writes the adapter folder.

    Args:
        opened: The model with its strategy.
        to: An empty folder, or one that does not exist yet.

    Raises:
        ConfigError: If there is no adapter, or it has no PEFT format.
    """
    if opened.strategy is None:
        raise ConfigError("a base model has no adapter to export.")
    base = str(Path(opened.base).resolve()) if Path(opened.base).exists() else opened.base
    config = opened.strategy.peft_config(opened.lm)  # raises before anything is written
    assert config
    folder = prepare_folder(to)
    save_adapter(opened.strategy, opened.lm, folder, base, head=opened.head)
    if opened.head:  # its pad token says where a text ends
        opened.tokenizer.save_pretrained(folder)
