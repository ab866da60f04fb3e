"""From the rows of a source to its tokenized examples: once, in several processes where there is much, and cached."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from ftlit.batch import Example
from ftlit.cache import cache_dir
from ftlit.data.formats import Comparison, Conversation, Record, Text
from ftlit.data.sources import Source
from ftlit.data.store import Examples
from ftlit.data.templating import ChatTemplate
from ftlit.errors import ConfigError, DataError

VERSION = 5
CHUNK = 256
# Characters from which a source is worth a cache file, and worth starting processes for.
CACHED_FROM = 1_000_000
PARALLEL_FROM = 8_000_000
# Records of a source with no more rows are kept from the first pass for the second.
_KEPT_ROWS = 50_000


_Encoded = tuple[Examples, dict[int, str]]


class Tokenized(NamedTuple):
    """A source and its examples.

    Attributes:
        source: Where the rows came from.
        examples: Its examples, not cut.
        digests: 16 bytes a row that equal rows share, `[rows, 2]` uint64; 0 for a row that could not be read.
        refused: Rows that could not be read or rendered, with their sentences.
        split: For each row the number of its examples, int32.
        uses_template: Whether a row went through the chat template.
        compares: Whether the rows compare answers; the examples are then the pieces of comparisons.
        no_system: Which rows are conversations without a system turn, bool `[rows]`; none where no row has one.
    """

    source: Source
    examples: Examples
    digests: np.ndarray
    refused: dict[int, str]
    split: np.ndarray
    uses_template: bool
    compares: bool = False
    no_system: np.ndarray | None = None


def tokenize(
    source: Source,
    template: ChatTemplate,
    change: Callable[[Record], Record] = lambda record: record,
    *,
    skip: bool = False,
    workers: int | None = None,
    cache: bool = True,
    quiet: bool = False,
) -> Tokenized:
    """Tokenizes a source.

    Rows are read and hashed first. The cache is asked for exactly these records under exactly this tokenizer, template
    and choice of trained tokens, so no change of a file, of a format's code or of a setting can bring stale tokens.

    Args:
        source: The rows.
        template: What turns them into tokens.
        change: Done to every record first (placeholders, system turns).
        skip: Whether a row that cannot be read or rendered is counted and left out; else it is an error.
        workers: Processes; None: one a core for much text, none for little. 0: none.
        cache: Whether to look into the cache and to write to it.
        quiet: Whether to show no progress.

    Raises:
        DataError: For the first row that cannot be read or rendered, unless `skip`.
    """
    read = _Reading(source, change, skip)
    digests = read.all(quiet)
    for remark in source.remarks():
        _say(remark, quiet)
    if cache and read.characters >= CACHED_FROM:
        examples, refused = _through_cache(read, digests, template, workers, quiet)
    else:
        examples, refused = _encode(read, template, workers, quiet)
    if refused and not skip:
        row = min(refused)
        raise DataError(f"{source.where(row)}: {refused[row]}")
    refused = {**read.refused, **{row: f"{source.where(row)}: {sentence}" for row, sentence in refused.items()}}
    split = np.bincount(examples.rows, minlength=len(source)).astype(np.int32)
    refused = dict(sorted(refused.items()))
    return Tokenized(
        source, examples, digests, refused, split, read.uses_template, read.compares, read.without_system()
    )


def _through_cache(
    read: _Reading, digests: np.ndarray, template: ChatTemplate, workers: int | None, quiet: bool
) -> _Encoded:
    signature = hashlib.blake2b(template.signature().encode(), digest_size=16).hexdigest()
    key = hashlib.blake2b(f"{VERSION} {signature}".encode() + digests.tobytes(), digest_size=16).hexdigest()
    folder = cache_dir() / "tokens" / key
    lock = contextlib.ExitStack()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.enter_context(FileLock(f"{folder}.lock"))  # the other ranks, and other runs, wait and read
    except OSError as error:
        _say(f"tokens are not kept: {folder.parent} cannot be written ({error.strerror})", quiet)
        return _encode(read, template, workers, quiet)
    with lock:
        if (loaded := _cached(folder, quiet)) is not None:
            return loaded
        examples, refused = _encode(read, template, workers, quiet)
        if read.skip or not refused:  # else it stopped at the first refusal
            try:
                examples.save(folder, refused={str(row): sentence for row, sentence in refused.items()})
            except OSError as error:
                _say(f"tokens are not kept: {folder} cannot be written ({error.strerror or error})", quiet)
        return examples, refused


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, flush=True)


def _cached(folder: Any, quiet: bool) -> tuple[Examples, dict[int, str]] | None:
    if not folder.exists():
        return None
    try:
        examples, more = Examples.load(folder)
        return examples, {int(row): sentence for row, sentence in more["refused"].items()}
    except (ValueError, KeyError, AttributeError) as error:
        _say(f"the cached tokens in {folder} are torn ({error}) and are made again", quiet)
        return None


class _Reading:
    """The records of a source, read once or twice."""

    def __init__(self, source: Source, change: Callable[[Record], Record], skip: bool) -> None:
        self.source, self.change, self.skip = source, change, skip
        self.refused: dict[int, str] = {}
        self.characters = 0
        self.uses_template = self.compares = False
        self.systems = np.zeros(len(source), np.int8)  # 1: a conversation with a system turn, -1: one without
        self._kept: dict[int, Record] | None = {} if len(source) <= _KEPT_ROWS else None

    def _record(self, row: int) -> Record:
        record = self.source.record(row)
        with self.source.at(row):
            return self.change(record)

    def all(self, quiet: bool) -> np.ndarray:
        """Reads every row; returns 16 bytes of hash a row."""
        digests = np.zeros((len(self.source), 2), np.uint64)
        progress = Progress(len(self.source), f"reading {self.source.name}", quiet)
        for row in range(len(self.source)):
            progress.update(1)
            try:
                record = self._record(row)
            except DataError as error:
                if not self.skip:
                    raise
                self.refused[row] = str(error)
                continue
            self.compares = self.compares or isinstance(record, Comparison)
            kind = record.answers[0] if isinstance(record, Comparison) else record
            if isinstance(kind, Conversation):
                self.uses_template = True
                self.systems[row] = 1 if kind.messages and kind.messages[0].role == "system" else -1
            content = f"{type(record).__name__} {tuple(record)!r}".encode(errors="surrogatepass")
            self.characters += len(content)
            digests[row] = np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), np.uint64)
            if self._kept is not None:
                self._kept[row] = record
        progress.close()
        return digests

    def without_system(self) -> np.ndarray | None:
        """Conversations without a system turn, where others have one."""
        return self.systems < 0 if (self.systems > 0).any() else None

    def chunks(self) -> Iterator[list[tuple[int, Record]]]:
        """The records that could be read, some at a time."""
        chunk: list[tuple[int, Record]] = []
        for row in range(len(self.source)):
            if row in self.refused:
                continue
            chunk.append((row, self._kept[row] if self._kept is not None else self._record(row)))
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def _encode(read: _Reading, template: ChatTemplate, workers: int | None, quiet: bool) -> _Encoded:
    if workers is None:
        workers = cores() if read.characters >= PARALLEL_FROM and cores() > 1 else 0
    progress = Progress(len(read.source), f"tokenizing {read.source.name}", quiet)
    parts: list[Examples] = []
    refused: dict[int, str] = {}
    made = _parallel(read, template, workers) if workers else (_chunk(template, chunk) for chunk in read.chunks())
    for examples, bad, rows in made:
        parts.append(examples)
        refused.update(bad)
        progress.update(rows)
        if refused and not read.skip:
            break
    progress.close()
    return Examples.joined(parts), refused


def _chunk(template: ChatTemplate, chunk: list[tuple[int, Record]]) -> tuple[Examples, dict[int, str], int]:
    examples: list[Example] = []
    rows: list[int] = []
    windowed: list[bool] = []
    refused: dict[int, str] = {}
    for row, record in chunk:
        try:
            made = template.encode(record)
        except DataError as error:
            refused[row] = str(error)
            continue
        examples += made
        rows += [row] * len(made)
        windowed += [isinstance(record, Text)] * len(made)
    return Examples.of(examples, rows, windowed), refused, len(chunk)


_worker_template: ChatTemplate | None = None


def _start_worker(template: ChatTemplate) -> None:
    global _worker_template
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process; and its threads do not survive a fork
    _worker_template = template


def _work(chunk: list[tuple[int, Record]]) -> tuple[Examples, dict[int, str], int]:
    assert _worker_template is not None
    return _chunk(_worker_template, chunk)


def _parallel(read: _Reading, template: ChatTemplate, workers: int) -> Iterator[tuple[Examples, dict[int, str], int]]:
    """The chunks in order, a few ahead for each process."""
    method = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, _start_worker, (template,)) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for chunk in read.chunks():
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ConfigError(
                "a tokenizing process died, perhaps for want of memory; set data.num_workers to less, or to 0."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """A bar on a terminal, a line now and then elsewhere, nothing for what is over soon.

    Args:
        total: Rows.
        label: What is done to them.
        quiet: Whether to show nothing.
    """

    SOON, EVERY = 2.0, 15.0

    def __init__(self, total: int, label: str, quiet: bool = False) -> None:
        self.total, self.label, self.quiet = total, label, quiet
        self._done = self._unseen = 0
        self._began = self._said = time.monotonic()
        self._bar: Any = None

    def update(self, rows: int) -> None:
        """Counts rows."""
        self._done += rows
        self._unseen += rows
        if self.quiet or self._unseen < 64:  # the clock costs more than a row
            return
        self._unseen = 0
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._done - self._bar.n)
        elif now - self._began < self.SOON:
            return
        elif sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, initial=self._done, desc=self.label, unit=" rows", leave=False)
        elif now - self._said > self.EVERY:
            self._said = now
            rate = self._done / (now - self._began)
            left = (self.total - self._done) / rate
            print(
                f"{self.label}: {self._done:,} of {self.total:,} rows, {rate:,.0f} a second, {left:,.0f} s to go",
                flush=True,
            )

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
