"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ftlit.errors import FtlitError

# No space, over the quota, over the largest size of a file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(FtlitError, OSError):
    """A file could not be written for lack of space; what was there before is untouched."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, which takes its place once it is on the disk.

    Whatever happens in between (an exception, a kill, a power cut), `path` is either the old file or the new one.

    Args:
        path: The file to write; its folder is made if needed.

    Yields:
        The path to write to.

    Raises:
        DiskFullError: If there is no space left.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's own writer says RuntimeError
        if is_full(error):
            raise DiskFullError(f"there is no space left to write {path}; what was there before is kept.") from error
        raise
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file whole or not at all, as UTF-8."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def keep_copy(path: Path, copy: Path) -> None:
    """Makes `copy` a second name of the file at `path`, at no cost of space; where names cannot be linked, moves it."""
    if not path.is_file():
        return
    scratch = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    scratch.unlink(missing_ok=True)
    try:
        os.link(path, scratch)
        os.replace(scratch, copy)
    except OSError:
        os.replace(path, copy)


def is_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync_folder(folder: Path) -> None:
    """Puts the new name itself on the disk."""
    with contextlib.suppress(OSError):  # some file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
