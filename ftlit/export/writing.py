"""Writes a model folder that transformers loads, or an adapter folder that the PEFT library loads."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlit.errors import ConfigError, FtlitError
from ftlit.export.beside import write_beside
from ftlit.export.opening import DTYPES, Opened
from ftlit.files import DiskFullError, allow_as_usual, clean, is_full
from ftlit.models.load import make_saveable
from ftlit.peft.io import save_adapter
from ftlit.rollout.generate import end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def whole_folder(to: str | Path) -> Iterator[Path]:
    """Gives a folder to write to that takes the place of `to` when all is written; else nothing is left.

    Args:
        to: An empty folder, or one that does not exist yet.

    Raises:
        ConfigError: If it already holds something, or what is written cannot be.
        DiskFullError: If there is no space left.
    """
    folder = Path(to)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{folder} already holds something; give another --to, or delete it.")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    clean(folder.parent, f".{folder.name}.*.tmp")
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    scratch.mkdir()
    try:
        yield scratch
        allow_as_usual(scratch)
        os.replace(scratch, folder)
    except FtlitError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        if is_full(error):
            raise DiskFullError(f"there is no space left to write {folder}; nothing was written.") from error
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{folder} cannot be written: {first} Nothing was written.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_model(opened: Opened, to: str | Path, dtype: str = "float32") -> None:
    """Merges the adapter and writes weights (safetensors), config, tokenizer and chat template, all or nothing.

    Args:
        opened: The model; changed in place.
        to: An empty folder, or one that does not exist yet.
        dtype: Type of the written weights, a key of `DTYPES`.

    Raises:
        ConfigError: If the strategy cannot be merged, or the model cannot be written.
    """
    if opened.strategy is not None:
        opened.strategy.merge(opened.lm)  # raises before anything is written
    with whole_folder(to) as folder:
        lm = opened.lm.to(DTYPES[dtype])
        lm.set_attn_implementation("sdpa")
        make_saveable(lm)
        if not opened.head:  # the template's end token may not be the tokenizer's: others must stop there too
            lm.generation_config.eos_token_id = end_tokens(lm, opened.tokenizer) or None
        settle_generation(lm)
        lm.save_pretrained(folder)
        write_beside(folder, opened.tokenizer, opened.system)


def settle_generation(lm: PreTrainedModel) -> None:
    """Makes a generation config that transformers would refuse to write one that it writes, and says so.

    Many models come with settings of sampling beside `do_sample: false`: what is meant is sampling. What contradicts
    itself otherwise loses all but its special tokens.

    Args:
        lm: The model; its generation config is changed.
    """
    config = getattr(lm, "generation_config", None)
    if config is None or (wrong := _contradiction(config)) is None:
        return
    if not config.do_sample:
        config.do_sample = True
        if _contradiction(config) is None:
            print(f"note       the generation config samples and says do_sample: false ({wrong}); true is written")
            return
    tokens = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    lm.generation_config = type(config)(**tokens)
    print(f"note       the generation config contradicts itself ({wrong}); its special tokens alone are written")


def _contradiction(config: Any) -> str | None:
    """What transformers would not write, in a line; None where it writes all."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        lines = [line.strip("- ") for line in str(error).splitlines() if line.strip("- ")]
        return next((line for line in lines if "`" in line), lines[0])[:160]
    return None


def write_adapter(opened: Opened, to: str | Path) -> None:
    """Writes the adapter folder with its tokenizer and chat template, all or nothing.

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
    with whole_folder(to) as folder:
        save_adapter(opened.strategy, opened.lm, folder, base, head=opened.head)
        write_beside(folder, opened.tokenizer, opened.system)


__all__ = ["DTYPES", "settle_generation", "whole_folder", "write_adapter", "write_model"]
