"""What `config.yaml` of a run says so that it can be used from any folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

_BEGUN = "# begun in "
# Settings that name models, adapters, templates, rows, or folders.
_PLACES = {
    *("policy", "value_model", "from_adapter", "chat_template", "model", "dirpath"),
    *("train", "validation", "test", "predict", "rows", "domains"),
}


def absolute(config: Namespace) -> Namespace:
    """A config in which whatever it names by a relative path is named by its whole path.

    Args:
        config: A whole config; not changed.
    """
    found: Namespace = _absolute(config.clone(), "")
    return found


def _absolute(value: Any, key: str) -> Any:
    if isinstance(value, Namespace):
        for name, one in list(vars(value).items()):
            value[name] = _absolute(one, name)
        return value
    if isinstance(value, list):
        return [_absolute(one, key) for one in value]
    if key not in _PLACES:
        return value
    if isinstance(value, dict):  # rows with their shares, or sets by name
        return {_place(k) if isinstance(v, int | float) else k: _absolute(v, key) for k, v in value.items()}
    return _place(value) if isinstance(value, str) else value


def _place(name: str) -> str:
    """A relative path, with a split behind it or without, as a whole one; anything else as it is."""
    if not name or "{" in name or "\n" in name or name == "self" or Path(name).is_absolute():
        return name
    path = Path(name).expanduser()
    if path.exists():
        return os.path.abspath(path)
    head, colon, split = name.partition(":")
    if colon and head != "sample" and Path(head).expanduser().exists():
        return f"{os.path.abspath(Path(head).expanduser())}:{split}"
    return name


def with_place(text: str, path: Path) -> str:
    """A config with the folder that the run was begun in, where files with classes of one's own are.

    Args:
        text: The config.
        path: Where it will be written; what was there before says where a run was begun that goes on.
    """
    folder = _begun(path)
    return f"{_BEGUN}{Path.cwd() if folder is None else folder}\n{text}"


def _begun(config: str | Path) -> str | None:
    """The folder that a config says its run was begun in, where it is there."""
    try:
        with open(config, encoding="utf-8") as file:
            first = file.readline().strip()
    except (OSError, UnicodeError):
        return None
    folder = first.removeprefix(_BEGUN)
    return folder if folder != first and Path(folder).is_dir() else None


def look_where_begun(config: str | Path) -> None:
    """Finds classes of one's own also in the folder that a run was begun in.

    Args:
        config: A config; only that of a run says where it was begun.
    """
    folder = _begun(config)
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)


def run_of(config: Namespace) -> Path | None:
    """The folder of the run whose `config.yaml` was given, where nothing names another; it may have been moved."""
    for given in reversed(config.get("config") or []):
        folder = Path(str(given)).parent
        if Path(str(given)).name != "config.yaml" or not (folder / "checkpoints").is_dir():
            continue
        try:
            own = yaml.safe_load(Path(str(given)).read_text(encoding="utf-8"))
        except (OSError, UnicodeError, yaml.YAMLError):
            return None
        return folder if isinstance(own, dict) and own.get("run") == config.run else None
    return None


__all__ = ["absolute", "look_where_begun", "run_of", "with_place"]
