"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ftlit.errors import FtlitError

# No space, over the quota, over the largest size of a file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Seconds after which what a process was making counts as left behind.
_STALE = 3600.0


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
        clean(path.parent, f".{path.name}.*.tmp")
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


def clean(folder: Path, pattern: str) -> None:
    """Removes what processes that were killed left of the files and folders they were making.

    Only what is older than an hour, and whose process is not running here: another machine may share the folder.

    Args:
        folder: Where to look.
        pattern: Names with a process number between dots or dashes, such as `.last.ckpt.*.tmp`.
    """
    for left in folder.glob(pattern):
        number = re.search(r"[.-](\d+)[.-]", left.name)
        with contextlib.suppress(OSError):
            if number is None or _is_running(int(number[1])) or time.time() - left.stat().st_mtime < _STALE:
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def allow_as_usual(folder: Path) -> None:
    """Gives the files of a folder the permissions that a new file has here; safetensors keeps its own to the owner."""
    umask = os.umask(0o022)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found = zlib.crc32(block, found)
    return found


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file whole or not at all, as UTF-8."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def keep_copy(path: Path, copy: Path) -> None:
    """Makes `copy` a second name of the file at `path`, at no cost of space; where names cannot be linked, moves it."""
    if path.is_file():
        _link(path, copy, otherwise=lambda _: os.replace(path, copy))


def second_name(path: Path, name: Path) -> None:
    """Makes `name` a second name of the file at `path`; where names cannot be linked, a copy of it."""
    _link(path, name, otherwise=lambda scratch: os.replace(shutil.copyfile(path, scratch), name))


def _link(path: Path, name: Path, otherwise: Callable[[Path], object]) -> None:
    """Gives a file a second name, which takes the place of what had it before.

    Args:
        path: The file.
        name: The second name.
        otherwise: Done with a path beside `name` where names cannot be linked.
    """
    scratch = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    scratch.unlink(missing_ok=True)
    try:
        os.link(path, scratch)
        os.replace(scratch, name)
    except OSError:
        otherwise(scratch)


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
