"""What lies beside the weights of an adapter or a model: tokenizer, chat template, and the system turn of its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ftlit.files import write_text
from ftlit.models.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ABOUT = "ftlit.json"
_TEMPLATE = "chat_template.jinja"


def write_beside(folder: str | Path, tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
    """Writes tokenizer, chat template and system turn into the folder of an adapter or a model.

    Args:
        folder: The folder.
        tokenizer: The tokenizer, with the chat template that was trained with.
        system: The system turn of the training rows, if the run set one.
    """
    tokenizer.save_pretrained(str(folder))
    about = Path(folder) / ABOUT
    if system is None:
        about.unlink(missing_ok=True)
    else:
        write_text(about, json.dumps({"system": system}, ensure_ascii=False, indent=2) + "\n")


def has_tokenizer(folder: str | Path | None) -> bool:
    """Whether a folder holds a tokenizer of its own."""
    names = ("tokenizer.json", "tokenizer_config.json")
    return folder is not None and any((Path(folder).expanduser() / name).is_file() for name in names)


def tokenizer_of(folder: str | Path, base: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of an adapter: its own where it has one, else its base model's; its own chat template in any case.

    Args:
        folder: The adapter folder.
        base: The base model.
        trust_remote_code: Run tokenizer code that comes with them.

    Raises:
        ConfigError: If there is none.
    """
    tokenizer = load_tokenizer(str(folder) if has_tokenizer(folder) else base, trust_remote_code)
    template = Path(folder).expanduser() / _TEMPLATE
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def system_of(folder: str | Path) -> str | None:
    """The system turn that was written beside an adapter or a model."""
    try:
        found = json.loads((Path(folder).expanduser() / ABOUT).read_text(encoding="utf-8")).get("system")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def filled(system: str | None, values: dict[str, str] | None) -> str | None:
    """A system turn with its placeholders replaced, as the training rows had it.

    Args:
        system: `data.system`.
        values: `data.fill`.
    """
    for key, value in (values or {}).items():
        system = system and system.replace("{{" + key + "}}", value)
    return system


__all__ = ["ABOUT", "filled", "has_tokenizer", "system_of", "tokenizer_of", "write_beside"]
