"""Prompts to be answered: rows of any format without their last answer, for training on rewards."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from typing_extensions import override

from ftlit.batch import Example
from ftlit.data.datamodules import SFTData, as_conversation
from ftlit.data.formats import Completion, Conversation, Message, Record, RowFormat, Text
from ftlit.data.sources import Source
from ftlit.errors import ConfigError, DataError

# Names of a reward's own arguments.
_TAKEN = ("prompts", "completions")


class PromptRow(NamedTuple):
    """A prompt and what is known of its answer.

    Attributes:
        input_ids: Its tokens, up to where the answer begins.
        messages: Its turns.
        reference: The answer that the row holds as its last assistant turn, or None.
        columns: The row's own columns.
        source: Where the row comes from.
        number: Its number there.
        plain: The prompt as text, where no template is put around it.
        tools: The tools that the chat template is handed, if any.
    """

    input_ids: list[int]
    messages: tuple[Message, ...]
    reference: str | None
    columns: Mapping[str, Any]
    source: Source
    number: int
    plain: str | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The turns as the chat APIs write them."""
        return [message.turn() for message in self.messages]

    @property
    def where(self) -> str:
        """File and row."""
        return self.source.where(self.number)


class PromptOrder:
    """An endless row of prompts, one epoch after the other; each rollout takes the next ones.

    So all rollouts are of one size, also across the end of an epoch, and nothing is left out.

    Args:
        num_prompts: Prompts of an epoch.
        per_rollout: Prompts of a rollout, on all ranks together.
        shuffle: Whether each epoch has an order of its own.
        seed: The order is a function of this and the epoch.
    """

    def __init__(self, num_prompts: int, per_rollout: int, shuffle: bool = True, seed: int = 0) -> None:
        self.num_prompts, self.per_rollout, self.shuffle, self.seed = num_prompts, per_rollout, shuffle, seed

    def __len__(self) -> int:
        """Rollouts in which every prompt comes up at least once."""
        return -(-self.num_prompts // self.per_rollout)

    def order(self, epoch: int) -> list[int]:
        """The order of the prompts in an epoch."""
        if not self.shuffle:
            return list(range(self.num_prompts))
        generator = torch.Generator("cpu").manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
        return torch.randperm(self.num_prompts, generator=generator, device="cpu").tolist()

    def rollout(self, start: int) -> list[tuple[int, int]]:
        """The prompts of a rollout.

        Args:
            start: How many prompts the run has taken before.

        Returns:
            For each its place in the endless row, which no other prompt of the run has, and the number of its row.
        """
        known, order = -1, list[int]()
        out = []
        for place in range(start, start + self.per_rollout):
            epoch, index = divmod(place, self.num_prompts)
            if epoch != known:
                known, order = epoch, self.order(epoch)
            out.append((place, order[index]))
        return out


class PromptData(SFTData):
    """Prompts for training on rewards.

    Rows have any format of `SFTData`; the last assistant turn of a row is left out of the prompt and handed to the
    rewards as `reference`, and every column of the row under its own name.

    Args:
        train: Rows to train on, as for `SFTData`: a file, a folder, a hub id, `sample:NAME`, or a list of those.
        validation: Held-out rows: a share of the training rows such as 0.1, a file, or several by name.
        test: Rows for `ftlit test`.
        format: How to read a row; chosen from the columns when left out.
        columns: Where columns have other names: the format's name to the file's.
        fill: Values for placeholders: `{name: Nova}` replaces `{{name}}` in every message.
        system: System turn for conversations that have none.
        chat_template: Jinja template (text or file) to use instead of the tokenizer's, or `plain`.
        chat_template_kwargs: Values for variables of the chat template, as for `SFTData`.
        max_length: Most tokens of a prompt; longer ones are left out and counted.
        batch_size: Prompts of a rollout: it takes `batch_size x trainer.accumulate_grad_batches x ranks`.
        max_tokens: Most tokens in a micro-batch of the update: bounds memory, changes no result. None: no bound.
        shuffle: Whether each epoch has an order of its own.
        seed: Seed of the split, of the orders and of the samples.
        on_bad_row: Whether a row that cannot be read is an `error`, or is listed, counted and left out (`skip`).

    Raises:
        ConfigError: If a setting is out of range.
    """

    needs_answers: ClassVar[bool] = False

    def __init__(
        self,
        train: str | list[str] | None = None,
        validation: float | str | dict[str, float | str] | None = None,
        test: str | None = None,
        format: RowFormat | None = None,  # noqa: A002 - the natural name in YAML
        columns: dict[str, str | None] | None = None,
        fill: dict[str, str] | None = None,
        system: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_length: int = 512,
        batch_size: int = 32,
        max_tokens: int | None = 4096,
        shuffle: bool = True,
        seed: int = 0,
        on_bad_row: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__(
            train=train, validation=validation, test=test, format=format, columns=columns, fill=fill, system=system,
            chat_template=chat_template, chat_template_kwargs=chat_template_kwargs, max_length=max_length,
            batch_size=batch_size, max_tokens=max_tokens, shuffle=shuffle, seed=seed, on_bad_row=on_bad_row,
        )  # fmt: skip
        self.rows: dict[str, list[PromptRow]] = {}
        self.lines: dict[str, str] = {}

    # ---- what Lightning calls -------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        if stage in ("fit", "validate"):
            if stage == "fit" or any(not isinstance(rows, str) for rows in self.validation.values()):
                self.load_train()
            self.load_validation()
        elif stage == "test" and "test" not in self.rows:
            self._keep("test", "test", self._read("test", [self.test_file]))
        elif stage == "predict":
            raise ConfigError(
                "PromptData has no rows for `ftlit predict`; use SFTData's data.predict, or `ftlit generate`."
            )

    @override
    def train_dataloader(self) -> Any:
        """The rollouts of the stage, one `StepBatch` an optimizer step."""
        stage: Any = getattr(self.trainer, "lightning_module", None)
        if not hasattr(stage, "rollout_loader"):
            raise ConfigError(f"PromptData goes with PPO, not with {type(stage).__name__}; use SFTData there.")
        return stage.rollout_loader()

    @override
    def planner(self, accumulate: int = 1, world: int = 1) -> Any:
        """The order of the prompts."""
        return PromptOrder(len(self.rows["train"]), self.batch_size * accumulate * world, self.shuffle, self.seed)

    @override
    def val_dataloader(self) -> Any:
        """One loader a validation set, in the order of `validation_names`."""
        state = getattr(self.trainer, "state", None)
        if not self.validation and state is not None and state.fn == "validate":
            raise ConfigError("data.validation is missing: give a file, or a share of the training rows such as 0.1.")
        return [self._prompt_loader(f"validation:{name}") for name in self.validation]

    @override
    def test_dataloader(self) -> Any:
        """The test rows."""
        return self._prompt_loader("test")

    def _prompt_loader(self, key: str) -> PromptLoader:
        world, rank = self._ranks()
        return PromptLoader(len(self.rows[key]), self.batch_size, rank, world)

    @property
    def known_columns(self) -> list[str]:
        """Names of the columns that rewards are handed, of all rows; `tools` where any row has some."""
        every = [row for rows in self.rows.values() for row in rows]
        names = dict.fromkeys(name for row in every for name in row.columns)
        return [*names, *(["tools"] if any(row.tools for row in every) and "tools" not in names else [])]

    # ---- reading --------------------------------------------------------------------------------------------------

    @override
    def load_train(self) -> None:
        """Reads and tokenizes the training prompts, less the share that validation takes.

        Raises:
            DataError: If there is none, or a row cannot be read.
        """
        if "train" in self.rows:
            return
        if not self.files:
            raise ConfigError("data.train is missing: give a file, a folder, a hub id, or a sample.")
        found = self._read("train", self.files)
        keep = np.ones(len(found), bool)
        for name, share in self.validation.items():
            if not isinstance(share, str):
                (taken,) = self._held_out([keep], float(share))
                self._keep(f"validation:{name}", f"validation ({name})", [found[i] for i in np.nonzero(taken)[0]])
                keep &= ~taken
        self._keep("train", "train", [found[i] for i in np.nonzero(keep)[0]])

    @override
    def load_validation(self) -> None:
        """Reads and tokenizes the validation files."""
        for name, file in self.validation.items():
            if isinstance(file, str) and f"validation:{name}" not in self.rows:
                self._keep(f"validation:{name}", f"validation ({name})", self._read("validation", [file]))

    @override
    def held_out(self, name: str) -> list[tuple[Source, int, Record]]:
        self.load_train()
        rows = self.rows[f"validation:{name}"]
        return [(row.source, row.number, self._record(row.source, row.number)) for row in rows]

    def _read(self, what: str, files: Sequence[str | None]) -> list[PromptRow]:
        """The rows of some files as prompts, of any length."""
        found: list[PromptRow] = []
        for source in self._open(what, files):
            refused: list[str] = []
            for index in range(len(source)):
                try:
                    found.append(self._row(source, index))
                except DataError as error:
                    if self.on_bad_row == "error":
                        raise
                    refused.append(str(error))
            self.list_skipped(source, refused)
        return found

    def _row(self, source: Source, index: int) -> PromptRow:
        record = self._record(source, index)
        with source.at(index):
            turns, ids = as_conversation(record), self.template.prompt_of(record)
        answered = source.answered(index)
        reference = None if answered is None else _answer_of(self._changed(source, answered))
        columns = {key: value for key, value in source.named(index).items() if key not in _TAKEN}
        text = record.given if isinstance(record, Completion) else record.text if isinstance(record, Text) else None
        return PromptRow(ids, turns.messages, reference, columns, source, index, text, turns.tools)

    def _keep(self, key: str, label: str, found: Sequence[PromptRow]) -> None:
        """Makes a set of the rows that are short enough, and counts it."""
        kept = [row for row in found if 1 <= len(row.input_ids) <= self.max_length]
        if not kept:
            raise DataError(
                f"{label}: none of {len(found)} rows is a prompt within data.max_length={self.max_length} tokens; "
                "raise it."
            )
        lengths = [len(row.input_ids) for row in kept]
        line = f"{label}: {len(kept):,} prompts, {sum(lengths):,} tokens, longest {max(lengths):,}"
        notes = []
        if len(kept) < len(found):
            notes.append(f"{len(found) - len(kept):,} rows longer than {self.max_length} tokens are left out")
        if unknown := sum(row.reference is None for row in kept):
            notes.append(
                f"{unknown:,} have no answer of their own" if unknown < len(kept) else "no answers of their own"
            )
        self.lines[key] = "; ".join([line, *notes])
        self.rows[key] = kept
        if key == "train":
            lengths_only: Any = kept
            self.sets[key] = lengths_only  # for who asks for the lengths of the training rows
        elif known := [example for row in kept for example in self._answered(row)]:
            self.sets[key] = known  # for who measures the target domain by its answers

    def _answered(self, row: PromptRow) -> list[Example]:
        """A prompt with the answer of its row, as training would see it; nothing without one."""
        record = row.source.answered(row.number)
        if record is None or row.reference is None:
            return []
        with row.source.at(row.number):
            made = self.template.encode(self._changed(row.source, record))
        return [
            example for example in made[-1:] if example.num_targets > 0 and len(example.input_ids) <= self.max_length
        ]

    # ---- what a user sees -----------------------------------------------------------------------------------------

    @override
    def where(self, index: int) -> str:
        """File and row of a training prompt."""
        return self.rows["train"][index].where

    @override
    def fingerprint(self) -> str:
        """A hash of the training prompts and of what orders them."""
        if not self._fingerprint:  # every checkpoint asks
            digest = hashlib.blake2b(digest_size=16)
            for row in self.rows["train"]:
                digest.update(np.asarray([len(row.input_ids), *row.input_ids], np.int64).tobytes())
            digest.update(repr((self.seed, self.shuffle)).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @override
    def describe(self) -> list[str]:
        """A line of counts for each set of prompts."""
        return [line for _, line in sorted(self.lines.items(), key=lambda item: item[0] != "train")]

    @override
    def report(self) -> list[str]:
        """The same."""
        return self.describe()

    @override
    def rendered(self, index: int = 0, opening: str = "⟦", closing: str = "⟧", most: int | None = None) -> str:
        """A training prompt as the model is fed it.

        Args:
            index: Which.
            opening: Not used: nothing of a prompt is trained.
            closing: Not used.
            most: Characters to show; the middle of a longer text is left out.
        """
        text = str(self.template.tokenizer.decode(self.rows["train"][index].input_ids))
        if most is None or len(text) <= most:
            return text
        return f"{text[: most // 2]}\n[... {len(text) - most:,} characters ...]\n{text[-most // 2 :]}"


class PromptLoader:
    """Yields the numbers of a rank's rows, some at a time; as often on every rank.

    Args:
        num_rows: Rows on all ranks.
        batch_size: Most rows at once.
        rank: Whose rows.
        world: Number of ranks.
    """

    def __init__(self, num_rows: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.rows = list(range(rank, num_rows, world))
        self.batch_size = batch_size
        self.batches = math.ceil(math.ceil(num_rows / world) / batch_size)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.batches * self.batch_size, self.batch_size):
            yield self.rows[start : start + self.batch_size]


def _answer_of(record: Record) -> str | None:
    """The last answer of a record, None without one."""
    if isinstance(record, Completion):
        return record.completion
    if isinstance(record, Conversation) and record.messages and record.messages[-1].role == "assistant":
        return record.messages[-1].content
    return None


__all__ = ["PromptData", "PromptLoader", "PromptOrder", "PromptRow"]
