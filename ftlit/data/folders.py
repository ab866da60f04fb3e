"""Which files of a folder hold rows, and of which split: by the folder's card, or by names, as `datasets` has it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ftlit.data.reading import TEXTS, suffix_of
from ftlit.errors import DataError, nearest

Splits = dict[str, list[Path]]
"""The files of each split, in order; one split called `""` where the names say nothing of splits."""

# Words of file and folder names, as `datasets` reads them.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_BETWEEN = re.compile(r"[-._ 0-9]+")
_SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")

# Files that lie beside data without being data: texts by how their names begin, others by their whole names.
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|changelog|requirements|contributing|citation|authors|copying|credits|security"
    r"|code_of_conduct|dataset_?card|datasheet)([-_ .].*)?",
    re.IGNORECASE,
)
_BESIDE = ("dataset_info", "dataset_infos", "dataset_dict", "state", "config", "package", "croissant")


class Folder(NamedTuple):
    """The files of a folder.

    Attributes:
        splits: Those that hold rows.
        beside: Those that hold none, and those of no split where others have one.
    """

    splits: Splits
    beside: list[Path]


def read_folder(path: Path, name: str, config: str | None = None) -> Folder:
    """Sorts the files of a folder.

    Args:
        path: The folder.
        name: What to call it in errors.
        config: Which of the configs that its card declares; where there is one, or a default, it can be left out.

    Raises:
        DataError: If it has several configs and none was named, or a name stands for two splits.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file())
    rows = [file for file in files if _is_data(file, path)]
    if any(suffix_of(file) not in TEXTS for file in rows):
        rows = [file for file in rows if suffix_of(file) != ".md"]  # about the rows beside it
    declared = configs(path)
    splits = _declared(path, name, declared, config) if declared else _by_name(rows, path)
    taken = {file for part in splits.values() for file in part}
    return Folder(splits, [file for file in files if file not in taken])


def _is_data(file: Path, folder: Path) -> bool:
    if not (suffix := suffix_of(file)):
        return False
    if any(part.startswith((".", "__")) for part in file.relative_to(folder).parts):
        return False
    stem = file.name.split(".")[0]
    about = _ABOUT.fullmatch(stem)
    return not (about and (suffix in TEXTS or not about[2])) and not (suffix == ".json" and stem.lower() in _BESIDE)


# ---- by the card ----------------------------------------------------------------------------------------------------


def configs(path: Path) -> dict[str, dict[str, list[str]]]:
    """The configs that the card of a folder declares: for each the patterns of the files of each split."""
    found = {}
    for one in _card(path).get("configs") or []:
        files = one.get("data_files") if isinstance(one, dict) else None
        if files is not None:
            found[str(one.get("config_name", "default"))] = _patterns(files)
            if one.get("default"):
                found["default"] = found[str(one.get("config_name", "default"))]
    return found


def _card(path: Path) -> dict[str, Any]:
    """What stands between the lines of dashes at the top of a `README.md`."""
    import yaml

    file = path / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    parts = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        card = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def _patterns(files: Any) -> dict[str, list[str]]:
    """`data_files` of a card: a pattern, several, or objects of `split` and `path`."""
    found: dict[str, list[str]] = {}
    for one in files if isinstance(files, list) else [files]:
        split, paths = (one.get("split", "train"), one.get("path", "*")) if isinstance(one, dict) else ("train", one)
        found.setdefault(str(split), []).extend(map(str, paths if isinstance(paths, list) else [paths]))
    return found


def _declared(path: Path, name: str, declared: dict[str, dict[str, list[str]]], config: str | None) -> Splits:
    if config is None and len(declared) > 1 and "default" not in declared:
        known = list(declared)
        raise DataError(f"{name} has several configs ({', '.join(known)}); name one, such as {name}:{known[0]}.")
    chosen = declared[config or ("default" if "default" in declared else next(iter(declared)))]
    found = {
        split: sorted({file for pattern in patterns for file in path.glob(pattern) if suffix_of(file)})
        for split, patterns in chosen.items()
    }
    return {split: files for split, files in found.items() if files}


# ---- by names -------------------------------------------------------------------------------------------------------


def _by_name(files: Sequence[Path], folder: Path) -> Splits:
    """The splits that the names of files and folders say.

    Files of no split are trained on where no other file is; where every file is a text, names are only taken for
    splits if one says `train`: they are titles else.
    """
    splits: Splits = {}
    for file in files:
        splits.setdefault(_split_of(file, folder), []).append(file)
    texts = all(suffix_of(file) in TEXTS for file in files)
    if set(splits) == {""} or (texts and "train" not in splits):
        return {"": list(files)} if files else {}
    rest = splits.pop("", [])
    if rest and not any(split.startswith("train") for split in splits):
        splits["train"] = rest
    return splits


def _split_of(file: Path, folder: Path) -> str:
    """The split that a file's name or folder says, `""` where neither does."""
    *above, own = file.relative_to(folder).parts
    shard = _SHARD.fullmatch(own)
    if shard and (above[-1:] == ["data"] or _said(shard["split"], file)):
        return _SPLIT_OF.get(shard["split"], shard["split"])
    for part in (*reversed(above), own):
        if split := _said(part, file):
            return split
    return ""


def _said(text: str, file: Path) -> str:
    """The split that a name has a word for, `""` where it has none.

    Raises:
        DataError: If it has words for several.
    """
    found = dict.fromkeys(_SPLIT_OF[word] for word in _BETWEEN.split(text.lower()) if word in _SPLIT_OF)
    if len(found) > 1:
        raise DataError(
            f"{file}: the name {text!r} says {' and '.join(found)}, so it is not clear what it is for; give the file "
            "itself, or name it otherwise."
        )
    return next(iter(found), "")


# ---- choosing -------------------------------------------------------------------------------------------------------


def choose(name: str, known: Sequence[str], asked: str | None, prefer: str) -> str:
    """The split to take.

    Args:
        name: Whose splits, for errors.
        known: The splits.
        asked: The one that was asked for, if any.
        prefer: The one to take else.

    Raises:
        DataError: If there is no such split, or none was asked for and it is not clear which.
    """
    if asked is not None and asked not in known:
        if _SPLIT_OF.get(asked) in known:
            return _SPLIT_OF[asked]
        raise DataError(f"{name} has no split {asked!r}: {nearest(asked, known)}")
    if asked is None and len(known) > 1 and prefer not in known:
        raise DataError(f"{name} has several splits ({', '.join(known)}); name one, such as {name}:{known[0]}.")
    return asked or (prefer if prefer in known else known[0])


__all__ = ["Folder", "Splits", "choose", "configs", "read_folder"]
