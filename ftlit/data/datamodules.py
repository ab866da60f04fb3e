"""From sources to loaders: the rows of a run are tokenized, split, cut, counted and planned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from ftlit.batch import Example
from ftlit.data.added import AddedRows
from ftlit.data.formats import Comparison, Conversation, Message, Record, RowFormat, Text, detect, known_columns
from ftlit.data.mixing import Mixture
from ftlit.data.packing import EvalLoader, StepLoader, StepPlanner
from ftlit.data.plain import opening_tokens
from ftlit.data.sources import Source, fill, refuse_placeholders, with_system
from ftlit.data.statistics import CUT, EMPTY, LONG, Statistics, also_in, duplicates, table
from ftlit.data.store import Joined, Stored, Truncate, check_truncate
from ftlit.data.templating import ChatTemplate, TrainOn, mark
from ftlit.data.tokenizing import Tokenized, tokenize
from ftlit.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAIN = "main"
# Sentences of skipped rows that are printed before they are only counted.
_LISTED = 5


class SFTData(L.LightningDataModule):
    """Rows for supervised fine-tuning.

    Args:
        train: Rows to train on: a file (.json, .jsonl, .csv, .tsv, .parquet, .arrow, .txt, .md; text also with .gz), a
            folder of such files, a folder of `save_to_disk` (`folder:split`), a hub id (`org/name:split`), or
            `sample:NAME` for rows that ship with ftlit; several as a list; or several with weights, such as
            `{math.jsonl: 3, chat.jsonl: 1}`, which gives math three quarters of the trained tokens.
        validation: Held-out rows: a share of the training rows such as 0.1, a file, or several by name, such as
            `{main: 0.1, general: sample:general}` (logged as `val/loss` and `val/general/loss`).
        test: Rows for `ftlit test`.
        predict: Rows for `ftlit predict`; the last answer of each is left out and generated. It may be missing.
        format: How to read a row (Messages, ShareGPT, Alpaca, PromptCompletion, RawText or a class of your own);
            chosen from the columns when left out.
        columns: Where columns have other names: the format's name to the file's, such as
            `{instruction: question, output: answer}`; null leaves a column out.
        fill: Values for placeholders: `{name: Nova}` replaces `{{name}}` in every message.
        system: System turn for conversations that have none. Left out, the model's chat template decides, and some
            templates put in one of their own.
        chat_template: Jinja template (text or file) to use instead of the tokenizer's, or `plain` for the one that
            models without a template get.
        chat_template_kwargs: Values for variables of the chat template, such as `{enable_thinking: false}`; what a row
            says in a column of that name comes first. Whatever uses the run later renders prompts so too.
        train_on: Tokens that are trained: those of every `assistant` turn, of the `last` one, or `all`.
        max_length: Most tokens of an example; longer ones are cut and counted, raw text goes on in a further window.
        truncate: What is cut from a longer example: its `end`, its `start`, or all of it (`drop`).
        batch_size: Examples in a micro-batch. An optimizer step holds
            `batch_size x trainer.accumulate_grad_batches x ranks` examples.
        max_tokens: Most tokens in a micro-batch: bounds memory, changes no result. None: no bound.
        epoch_tokens: Trained tokens of an epoch where `train` has weights; left out, an epoch is as long as it takes
            to see every row at least once.
        shuffle: Whether each epoch has an order of its own.
        seed: Seed of the split and of the orders.
        on_bad_row: Whether a row that cannot be read is an `error`, or is listed, counted and left out (`skip`).
        num_workers: Processes that tokenize; left out, one a core where there is much text.
        cache: Whether tokens are kept on disk (`$FTLIT_CACHE` or `~/.cache/ftlit`) for the next run.

    Raises:
        ConfigError: If a setting is out of range.
    """

    step_loader: ClassVar[type[StepLoader]] = StepLoader
    eval_loader: ClassVar[type[EvalLoader]] = EvalLoader
    needs_answers: ClassVar[bool] = True
    """Whether rows must have an answer to train on."""

    def __init__(
        self,
        train: str | list[str] | dict[str, float] | None = None,
        validation: float | str | dict[str, float | str] | None = None,
        test: str | None = None,
        predict: str | None = None,
        format: RowFormat | None = None,  # noqa: A002 - the natural name in YAML
        columns: dict[str, str | None] | None = None,
        fill: dict[str, str] | None = None,
        system: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        train_on: TrainOn = "assistant",
        max_length: int = 1024,
        truncate: Truncate = "end",
        batch_size: int = 8,
        max_tokens: int | None = 4096,
        epoch_tokens: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        on_bad_row: Literal["error", "skip"] = "error",
        num_workers: int | None = None,
        cache: bool = True,
    ) -> None:
        super().__init__()
        self.files = [train] if isinstance(train, str) else list(train or [])
        self.weights = list(train.values()) if isinstance(train, dict) else None
        if validation is None:
            validation = {}
        self.validation = validation if isinstance(validation, dict) else {MAIN: validation}
        self.test_file, self.predict_file = test, predict
        self.row_format, self.columns, self.fill, self.system = format, columns or {}, fill or {}, system
        self.chat_template, self.chat_template_kwargs, self.train_on = chat_template, chat_template_kwargs, train_on
        self.max_length, self.truncate = max_length, truncate
        self.batch_size, self.max_tokens, self.epoch_tokens = batch_size, max_tokens, epoch_tokens
        self.shuffle, self.seed = shuffle, seed
        self.on_bad_row, self.num_workers, self.cache = on_bad_row, num_workers, cache
        self.statistics: list[Statistics] = []
        self.sources: dict[str, list[Statistics]] = {}
        self.sets: dict[str, Sequence[Example]] = {}
        self.prompts: list[tuple[Conversation, list[int]]] = []
        self.mixture: Mixture | None = None
        self.added_rows: list[AddedRows] = []
        self._template: ChatTemplate | None = None
        self._digests: dict[str, np.ndarray] = {}
        self._train_sources: list[Source] = []
        self._taken: dict[str, list[np.ndarray]] = {}
        self._said: set[str] = set()
        self._fingerprint = ""
        self._check()

    def _check(self) -> None:
        for name, value, least, unit in (
            ("max_length", self.max_length, 2, "tokens"),
            ("batch_size", self.batch_size, 1, "examples"),
            ("max_tokens", self.max_tokens, 1, "tokens"),
            ("epoch_tokens", self.epoch_tokens, 1, "trained tokens"),
            ("num_workers", self.num_workers, 0, "processes"),
        ):
            if value is not None and value < least:
                raise ConfigError(f"data.{name} must be at least {least} {unit}, got {value}.")
        for name, rows in self.validation.items():
            if isinstance(rows, float | int) and not 0 < rows < 1:
                raise ConfigError(f"data.validation ({name}) as a share must be between 0 and 1, got {rows}.")
        if sum(isinstance(rows, float | int) for rows in self.validation.values()) > 1:
            raise ConfigError(
                "data.validation can take only one share of the training rows; give files for the others."
            )
        for file, weight in zip(self.files, self.weights or [], strict=False):
            if isinstance(weight, bool) or not 0 < weight < float("inf"):
                raise ConfigError(f"data.train: the weight of {file} must be a positive number, got {weight}.")
        if self.epoch_tokens is not None and self.weights is None:
            raise ConfigError("data.epoch_tokens goes with weights in data.train, such as {a.jsonl: 3, b.jsonl: 1}.")
        if self.train_on not in ("assistant", "last", "all"):
            raise ConfigError(f"data.train_on must be assistant, last or all, got {self.train_on!r}.")
        if self.on_bad_row not in ("error", "skip"):
            raise ConfigError(f"data.on_bad_row must be error or skip, got {self.on_bad_row!r}.")
        check_truncate(self.truncate)

    # ---- what Lightning calls -------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Reads and tokenizes what a verb needs, once."""
        if stage in ("fit", "validate"):
            if stage == "fit" or any(not isinstance(rows, str) for rows in self.validation.values()):
                self.load_train()
            self.load_validation()
        elif stage == "test" and "test" not in self.sets:
            self._load("test", "test", self._tokenized("test", [self.test_file]))
        elif stage == "predict" and not self.prompts:
            self._load_prompts()

    def train_dataloader(self) -> StepLoader:
        """One `StepBatch` an optimizer step."""
        world, rank = self._ranks()
        stage = getattr(self.trainer, "lightning_module", None)
        accumulate = getattr(stage, "accumulate", 1)
        loader = self.step_loader(self.sets["train"], self.planner(accumulate, world), rank)
        loader.taken = getattr(self.trainer, "global_step", 0)
        loader.repeat = bool(getattr(self.trainer, "overfit_batches", 0))  # the same steps in every epoch
        return loader

    def planner(self, accumulate: int = 1, world: int = 1) -> StepPlanner:
        """The plan of the training rows."""
        return StepPlanner(
            self.sets["train"],
            batch_size=self.batch_size,
            accumulate=accumulate,
            world=world,
            max_tokens=self._cap(),
            shuffle=self.shuffle,
            seed=self.seed,
            mixture=self.mixture,
            added_rows=self.added_rows,
        )

    def _cap(self) -> int | None:
        """Most tokens in a micro-batch."""
        return self.max_tokens

    def val_dataloader(self) -> list[EvalLoader]:
        """One loader a validation set, in the order of `validation_names`."""
        state = getattr(self.trainer, "state", None)
        if not self.validation and state is not None and state.fn == "validate":
            raise ConfigError("data.validation is missing: give a file, or a share of the training rows such as 0.1.")
        return [self._eval_loader(self.sets[f"validation:{name}"]) for name in self.validation]

    def test_dataloader(self) -> EvalLoader:
        """The test rows."""
        return self._eval_loader(self.sets["test"])

    def predict_dataloader(self) -> DataLoader:
        """Prompts, a list a batch."""
        prompts: Any = [ids for _, ids in self.prompts]
        return DataLoader(prompts, batch_size=self.batch_size, collate_fn=list, shuffle=False)

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sets."""
        return list(self.validation)

    # ---- what it is made of ---------------------------------------------------------------------------------------

    @property
    def template(self) -> ChatTemplate:
        """The chat template with the tokenizer of the model being trained.

        Raises:
            ConfigError: If neither a trainer nor `use_tokenizer` gave one.
        """
        if self._template is None:
            if self.trainer is None:
                raise ConfigError(
                    "SFTData has no tokenizer yet: pass it to a Trainer, or call use_tokenizer(tokenizer)."
                )
            self.use_tokenizer(self.trainer.lightning_module.tokenizer)
        assert self._template is not None
        return self._template

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Gives the tokenizer by hand, where there is no trainer."""
        self._template = ChatTemplate(tokenizer, self.chat_template, self.train_on, self.chat_template_kwargs)

    def load_train(self) -> None:
        """Reads and tokenizes the training rows, less the share that validation takes.

        Raises:
            DataError: If there is none, or a row cannot be read.
        """
        if "train" in self.sets:
            return
        if not self.files:
            raise ConfigError("data.train is missing: give a file, a folder, a hub id, or sample:identity.")
        made = self._tokenized("train", self.files)
        keep = [_readable(one) for one in made]
        for name, share in self.validation.items():
            if not isinstance(share, str):
                self._taken[name] = held_out = self._held_out(keep, float(share))
                self._load(f"validation:{name}", f"validation ({name})", made, held_out)
                keep = [rows & ~taken for rows, taken in zip(keep, held_out, strict=True)]
        joined = self._load("train", "train", made, keep, refused=True)
        self._train_sources = [one.source for one in made]
        if self.weights is not None:
            self._mix(joined)

    def reweight(self, factors: np.ndarray) -> None:
        """Multiplies the weights of the trained tokens of the training rows, before they are planned.

        The fingerprint stays that of the rows: whoever reweights does it again when a run goes on.

        Args:
            factors: One for each trained token, example after example.
        """
        self.fingerprint()
        joined = self.sets["train"]
        assert isinstance(joined, Joined)
        self.sets["train"] = joined = joined.reweighted(factors)
        if self.weights is not None:
            self._mix(joined)

    def load_validation(self) -> None:
        """Reads and tokenizes the validation files."""
        for name, file in self.validation.items():
            if isinstance(file, str) and f"validation:{name}" not in self.sets:
                made = self._tokenized("validation", [file])
                self._load(f"validation:{name}", f"validation ({name})", made)
        if "train" not in self._digests:
            return
        for counts in self.statistics:
            key = counts.name.replace("validation (", "validation:").removesuffix(")")
            if key != "train" and key in self._digests:
                counts.in_train = also_in(self._digests[key], self._digests["train"])

    def load_added(self, name: str, file: str) -> Joined:
        """Reads and tokenizes rows that a control adds: in whatever format, without this run's system turn and columns.

        Args:
            name: Name of the control.
            file: A file, a folder, a hub id, or `sample:NAME`.
        """
        key = f"added:{name}"
        if key not in self.sets:
            source = Source(file, None, {}, "train", answers=True)
            for note in source.notes:
                self._say(note)
            self._load(key, f"added ({name})", [self._tokenize(source, own=False)])
        joined = self.sets[key]
        assert isinstance(joined, Joined)
        return joined

    def _mix(self, joined: Joined) -> None:
        assert self.weights is not None
        for counts in self.sources["train"]:
            if not counts.examples:
                raise DataError(f"data.train: {counts.name} has nothing left to train on; leave it out.")
        self.mixture = Mixture(
            [part.measures().targets for part in joined.parts],
            self.weights,
            seed=self.seed,
            shuffle=self.shuffle,
            epoch_tokens=self.epoch_tokens,
        )

    def _tokenized(self, what: str, files: Sequence[str | None]) -> list[Tokenized]:
        return [self._tokenize(source) for source in self._open(what, files)]

    def _tokenize(self, source: Source, own: bool = True) -> Tokenized:
        made = tokenize(
            source,
            self.template,
            lambda record: self._changed(source, record) if own else record,
            skip=self.on_bad_row == "skip",
            workers=self.num_workers,
            cache=self.cache,
            quiet=bool(self._ranks()[1]),
        )
        if made.uses_template and self.template.is_assumed:
            self._say(
                "this model's tokenizer has no chat template, so the plain one is used (### User: ... ### Assistant: "
                "...); data.chat_template gives another."
            )
        self.list_skipped(source, list(made.refused.values()))
        return made

    def _open(self, what: str, files: Sequence[str | None]) -> list[Source]:
        """Opens the sources of a set; of several, each may need only some of `data.columns`."""
        prefer = "test" if what == "predict" else what
        sources = []
        for file in files:
            if file is None:
                raise ConfigError(f"data.{what} is missing: give a file, a folder, or a hub id.")
            answers = self.needs_answers and what != "predict"
            wanted: dict[str, Any] = {"answers": answers, "choose": self._choose, "known": self._known}
            sources.append(Source(file, self.row_format, self.columns, prefer, **wanted))
            for note in sources[-1].notes:
                self._say(note)
        found = {column for source in sources for table in source.tables for column in table.columns}
        for name, column in self.columns.items():
            if what != "validation" and column is not None and column not in found:
                raise DataError(
                    f"data.columns gives {column!r} for {name!r}, but no file of data.{what} has such a column: "
                    f"{nearest(column, found)}"
                )
        return sources

    @staticmethod
    def _choose(columns: Iterable[str], where: str, *, answers: bool = True) -> RowFormat:
        """The format that fits some columns."""
        return detect(columns, where, answers=answers)

    @staticmethod
    def _known(columns: Iterable[str], row: Mapping[str, Any], *, answers: bool = True) -> Mapping[str, str]:
        """The columns that have one meaning under other names than the formats': those names to the file's."""
        return known_columns(columns, row, answers=answers)

    def _changed(self, source: Source, record: Record) -> Record:
        record = fill(with_system(record, self.system), self.fill)
        if source.is_sample:
            refuse_placeholders(record)
        return record

    def _load_prompts(self) -> None:
        (source,) = self._open("predict", [self.predict_file])
        refused = []
        for row in range(len(source)):
            try:
                record = self._record(source, row)
                with source.at(row):
                    self.prompts.append((as_conversation(record), self.template.prompt_of(record)))
            except DataError as error:
                if self.on_bad_row == "error":
                    raise
                refused.append(str(error))
        self.list_skipped(source, refused)
        if not self.prompts:
            raise DataError(f"predict: none of {len(source)} rows can be read.")

    def records(self, what: str, files: Sequence[str | None]) -> list[tuple[Source, int, Record]]:
        """The rows of some files, with the system turn and the placeholders of this run, not tokenized.

        Args:
            what: The argument that names the files, such as `test`.
            files: The files.

        Returns:
            For each row its source, its number there, and what it holds.

        Raises:
            DataError: If a row cannot be read and `on_bad_row` is `error`.
        """
        found = []
        for source in self._open(what, files):
            refused = []
            for row in range(len(source)):
                try:
                    found.append((source, row, self._record(source, row)))
                except DataError as error:
                    if self.on_bad_row == "error":
                        raise
                    refused.append(str(error))
            self.list_skipped(source, refused)
        return found

    def held_out(self, name: str) -> list[tuple[Source, int, Record]]:
        """The same for a validation set that is a share of the training rows."""
        self.load_train()
        return [
            (source, row, self._record(source, row))
            for source, taken in zip(self._train_sources, self._taken[name], strict=True)
            for row in np.nonzero(taken)[0].tolist()
        ]

    def _record(self, source: Source, row: int) -> Record:
        record = source.record(row)
        with source.at(row):
            return self._changed(source, record)

    def list_skipped(self, source: Source, sentences: list[str]) -> None:
        """Says which rows of a source are skipped."""
        if not sentences:
            return
        lines = [f"{source.name}: {len(sentences):,} of {len(source):,} rows cannot be read and are skipped:"]
        lines += [f"  {sentence}" for sentence in sentences[:_LISTED]]
        if len(sentences) > _LISTED:
            lines.append(f"  and {len(sentences) - _LISTED:,} more")
        self._say("\n".join(lines))

    def _say(self, text: str) -> None:
        if self._ranks()[1] == 0 and text not in self._said:
            self._said.add(text)
            print(text, flush=True)

    def _held_out(self, readable: list[np.ndarray], share: float) -> list[np.ndarray]:
        """For each source the rows that validation takes."""
        (rows,) = np.nonzero(np.concatenate(readable))
        count = max(1, round(share * len(rows)))
        if count >= len(rows):
            raise DataError(f"data.validation takes {count} of {len(rows)} rows and leaves none to train on.")
        generator = torch.Generator("cpu").manual_seed(self.seed)
        order = torch.randperm(len(rows), generator=generator, device="cpu").numpy()
        taken = np.zeros(sum(len(part) for part in readable), bool)
        taken[rows[order[:count]]] = True
        return np.split(taken, np.cumsum([len(part) for part in readable])[:-1])

    def _load(
        self,
        key: str,
        label: str,
        made: Sequence[Tokenized],
        rows: Sequence[np.ndarray] | None = None,
        *,
        refused: bool = False,
    ) -> Joined:
        """Makes a set of the chosen rows of some sources, and counts it."""
        chosen = [_readable(one) for one in made] if rows is None else list(rows)
        parts, each = [], []
        for name, one, taken in zip(_short([one.source.name for one in made]), made, chosen, strict=True):
            counts = Statistics(name)
            counts.refused = len(one.refused) if refused or rows is None else 0
            counts.rows = int(taken.sum()) + counts.refused
            counts.read_as, counts.unread = one.source.read_as(), one.source.unread()
            counts.drop(EMPTY, int((taken & (one.split == 0)).sum()))
            if one.no_system is not None:
                counts.note("without a system turn, which others have", int((taken & one.no_system).sum()))
            part = self._fitted(key, one, taken, counts)
            counts.measure(part.measures())
            parts.append(part)
            each.append(counts)
        total = Statistics(label)
        for counts in each:
            total.add(counts)
        self._digests[key] = np.concatenate([one.digests[taken] for one, taken in zip(made, chosen, strict=True)])
        total.duplicates = duplicates(self._digests[key])
        self.statistics.append(total)
        self.sources[label] = each
        self._refuse_nothing(total, made)
        self.sets[key] = joined = Joined(parts)
        return joined

    def _fitted(self, key: str, one: Tokenized, taken: np.ndarray, counts: Statistics) -> Stored:
        """The examples of the chosen rows of a source, fitted into `max_length`; what that changes is counted."""
        if one.compares:
            raise DataError(
                f"{one.source.name} holds answers to be compared: train on them with --config dpo (DPO and "
                "PreferenceData), or give a data.format that reads the chosen ones."
            )
        examples = one.examples.take(taken[one.examples.rows])
        documents = len(np.unique(examples.rows[examples.windowed]))
        counts.split_rows = int((taken & (one.split > 1)).sum())
        cut, over = examples.cut(self.max_length, self.truncate, opening_tokens(self.template.tokenizer))
        if self.truncate == "drop":
            counts.drop(LONG, int(over.sum()))
        else:
            counts.truncated = int(over.sum())
        windows = int(cut.windowed.sum())
        if windows > documents:
            counts.windowed_rows, counts.windows = documents, windows
        trained = cut.measures().targets > 0
        counts.drop(CUT, int((~trained).sum()))
        return cut.take(trained)

    def _refuse_nothing(self, counts: Statistics, made: Sequence[Tokenized]) -> None:
        if counts.examples:
            return
        if counts.refused and counts.refused == counts.rows:
            first = next(iter(next(one.refused for one in made if one.refused).values()))
            raise DataError(f"{counts.name}: none of {counts.rows} rows can be read; the first: {first}")
        if set(counts.drops) == {EMPTY}:
            raise DataError(
                f"{counts.name}: none of {counts.rows} rows has anything to train on: each has weight 0 or train false."
            )
        raise DataError(
            f"{counts.name}: none of {counts.rows} rows has a trained token within data.max_length={self.max_length} "
            "tokens; raise it."
        )

    def _ranks(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _eval_loader(self, examples: Sequence[Example]) -> EvalLoader:
        world, rank = self._ranks()
        return self.eval_loader(examples, self.batch_size, self._cap(), rank, world)

    # ---- what a user sees -----------------------------------------------------------------------------------------

    def where(self, index: int) -> str:
        """File and row of a training example, such as `rows.jsonl, row 7`."""
        joined = self.sets["train"]
        assert isinstance(joined, Joined)
        part, place = joined.find(index)
        return self._train_sources[part].where(int(joined.parts[part].rows[place]))

    def fingerprint(self) -> str:
        """A hash of the training examples, token by token, and of what orders them; not of the batch size."""
        if not self._fingerprint:  # every checkpoint asks
            joined = self.sets["train"]
            assert isinstance(joined, Joined)
            counts = None if self.mixture is None else self.mixture.counts
            order = (self.seed, self.shuffle, self.weights, counts)
            self._fingerprint = hashlib.blake2b(
                f"{joined.fingerprint()} {order!r}".encode(), digest_size=16
            ).hexdigest()
        return self._fingerprint

    def describe(self) -> list[str]:
        """A line of counts for each set of rows, and one for each source where they are mixed."""
        lines = [line for counts in self.statistics for line in (counts.line(), *self._shares(counts.name))]
        return lines + [line for counts in self.statistics for line in self._unread(counts.name)]

    def _unread(self, name: str) -> list[str]:
        """A line for each source of the training rows that has columns which nothing reads."""
        if name != "train":
            return []
        each = self.sources[name]
        return [f"{counts.name}: columns not read: {', '.join(counts.unread)}" for counts in each if counts.unread]

    def report(self) -> list[str]:
        """The counts as a page: a table of the sources, notes, and the lengths of the training examples."""
        lines: list[str] = []
        for total in sorted(self.statistics, key=lambda counts: counts.name != "train"):
            each = self.sources[total.name]
            rows = [_cells(counts) for counts in each]
            if len(each) > 1:
                rows.append(_cells(total, "together"))
            header = ("", "rows", "examples", "tokens", "trained", "", "longest")
            lines += [total.name, *(f"  {line}" for line in table((*header,), rows))]
            for counts in each:
                prefix = f"{counts.name}: " if len(each) > 1 else ""
                lines += [f"  {prefix}{note}" for note in counts.notes()]
                if counts.read_as:
                    lines.append(f"  {prefix}read {', '.join(counts.read_as)}")
                if counts.unread:
                    lines.append(f"  {prefix}columns not read: {', '.join(counts.unread)}")
            if total.duplicates:
                lines.append(f"  {total.duplicates:,} of the rows are equal to an earlier one")
            if total.in_train:
                lines.append(f"  warning: {total.in_train:,} of the rows are also in train, so this loss flatters")
            lines += [f"  {line}" for line in (*self._epoch(total.name), *total.histogram())]
            lines.append("")
        return lines

    def _shares(self, name: str) -> list[str]:
        """A line for what each source gives to an epoch, where they are mixed."""
        if name != "train" or self.mixture is None:
            return []
        given, mixture = self.mixture.shares(), self.mixture
        return [
            f"{counts.name}: {given[i]:.1%} of the trained tokens of the first epoch (asked for "
            f"{mixture.asked[i]:.1%}), {mixture.counts[i]:,} examples, each {mixture.repeats()[i]:.2f} times"
            for i, counts in enumerate(self.sources[name])
        ]

    def _epoch(self, name: str) -> list[str]:
        """The same as a table."""
        if name != "train" or self.mixture is None:
            return []
        mixture, given = self.mixture, self.mixture.shares()
        rows = [
            (
                counts.name,
                f"{mixture.asked[i]:.1%}",
                f"{given[i]:.1%}",
                f"{mixture.counts[i]:,}",
                f"{mixture.repeats()[i]:.2f}",
            )
            for i, counts in enumerate(self.sources[name])
        ]
        title = f"an epoch of {len(mixture):,} examples"
        return table((title, "trained tokens asked", "given in the first", "examples", "times each"), rows)

    def rendered(self, index: int = 0, opening: str = "⟦", closing: str = "⟧", most: int | None = None) -> str:
        """A training example as text with its trained tokens marked.

        Args:
            index: Which.
            opening: Mark before a trained stretch.
            closing: Mark after it.
            most: Characters to show; the middle of a longer text is left out.
        """
        text = mark(self.template.tokenizer, self.sets["train"][index], opening, closing)
        return shortened(text, most)


def shortened(text: str, most: int | None) -> str:
    """A text without its middle, where it is longer than `most` characters."""
    if most is None or len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[... {len(text) - most:,} characters ...]\n{text[-most // 2 :]}"


def _readable(made: Tokenized) -> np.ndarray:
    """Which rows of a source could be read."""
    rows = np.ones(len(made.source), bool)
    rows[list(made.refused)] = False
    return rows


def as_conversation(record: Record) -> Conversation:
    """A record as turns, for the file of the predictions."""
    if isinstance(record, Comparison):
        record = record.answers[0]
    if isinstance(record, Conversation):
        if not record.messages:
            raise DataError("holds no turn to answer.")
        return record
    assert not isinstance(record, Comparison)
    return Conversation((Message("user", record.text if isinstance(record, Text) else record.given),))


def _short(names: list[str]) -> list[str]:
    """Names of sources without their folders, where these are files and the short names differ."""
    short = [Path(name).name if Path(name).expanduser().exists() else name for name in names]
    return short if len(set(short)) == len(names) else names


def _cells(counts: Statistics, name: str | None = None) -> tuple[str, ...]:
    share = counts.targets / max(1, counts.tokens)
    return (
        name or counts.name,
        f"{counts.rows:,}",
        f"{counts.examples:,}",
        f"{counts.tokens:,}",
        f"{counts.targets:,}",
        f"{share:.0%}",
        f"{counts.longest:,}",
    )


__all__ = ["MAIN", "SFTData", "Statistics", "shortened"]
