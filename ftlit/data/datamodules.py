"""From files to loaders: rows are read, rendered, tokenized, split, counted and planned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from ftlit.batch import Example
from ftlit.data.formats import Conversation, RowFormat
from ftlit.data.packing import EvalLoader, StepLoader, StepPlanner
from ftlit.data.sources import Source, fill, refuse_placeholders, with_system
from ftlit.data.templating import ChatTemplate, mark
from ftlit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAIN = "main"


class Statistics:
    """Counts of one set of rows: nothing is lost and nothing skipped without being counted here."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = 0
        self.examples = 0
        self.split_rows = 0
        self.truncated = 0
        self.dropped = 0
        self.tokens = 0
        self.targets = 0
        self.longest = 0

    def line(self) -> str:
        """The counts in one line."""
        notes = [f"{self.rows:,} rows"]
        if self.split_rows:
            notes.append(f"{self.split_rows:,} of them split by answer")
        if self.dropped:
            notes.append(f"{self.dropped:,} dropped (nothing left to train on after cutting)")
        if self.truncated:
            notes.append(f"{self.truncated:,} cut to max_length")
        share = self.targets / max(1, self.tokens)
        return (
            f"{self.name}: {', '.join(notes)}; {self.tokens:,} tokens, {self.targets:,} trained ({share:.0%}), "
            f"longest {self.longest:,}"
        )


class SFTData(L.LightningDataModule):
    """Conversations for supervised fine-tuning.

    Args:
        train: Rows to train on: a `.json` or `.jsonl` file, several, or `sample:NAME` for rows that ship with ftlit.
        validation: Held-out rows: a share of the training rows such as 0.1, a file, or several by name, such as
            `{main: 0.1, general: sample:general}` (logged as `val/loss` and `val/general/loss`).
        test: Rows for `ftlit test`.
        predict: Rows for `ftlit predict`; the last answer of each is left out and generated.
        format: How to read a row; chosen from the columns when left out.
        fill: Values for placeholders: `{name: Nova}` replaces `{{name}}` in every message.
        system: System turn for conversations that have none. Left out, the model's chat template decides, and some
            templates put in one of their own.
        chat_template: Jinja template (text or file) to use instead of the tokenizer's.
        max_length: Most tokens of an example; longer ones are cut at the end and counted.
        batch_size: Examples in a micro-batch. An optimizer step holds
            `batch_size x trainer.accumulate_grad_batches x ranks` examples.
        max_tokens: Most tokens in a micro-batch: bounds memory, changes no result. None: no bound.
        shuffle: Whether each epoch has an order of its own.
        seed: Seed of the split and of the orders.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        validation: float | str | dict[str, float | str] | None = None,
        test: str | None = None,
        predict: str | None = None,
        format: RowFormat | None = None,  # noqa: A002 - the natural name in YAML
        fill: dict[str, str] | None = None,
        system: str | None = None,
        chat_template: str | None = None,
        max_length: int = 1024,
        batch_size: int = 8,
        max_tokens: int | None = 4096,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.files = [train] if isinstance(train, str) else list(train or [])
        if validation is None:
            validation = {}
        self.validation = validation if isinstance(validation, dict) else {MAIN: validation}
        self.test_file, self.predict_file = test, predict
        self.row_format, self.fill, self.system, self.chat_template = format, fill or {}, system, chat_template
        self.max_length, self.batch_size, self.max_tokens = max_length, batch_size, max_tokens
        self.shuffle, self.seed = shuffle, seed
        self.statistics: list[Statistics] = []
        self.sets: dict[str, list[Example]] = {}
        self.prompts: list[tuple[Conversation, list[int]]] = []
        self._template: ChatTemplate | None = None
        self._check()

    def _check(self) -> None:
        for name, value, least, unit in (
            ("max_length", self.max_length, 2, "tokens"),
            ("batch_size", self.batch_size, 1, "examples"),
            ("max_tokens", self.max_tokens, 1, "tokens"),
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

    # ---- what Lightning calls -------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Reads and tokenizes what a verb needs, once."""
        if stage in ("fit", "validate"):
            if stage == "fit" or any(not isinstance(rows, str) for rows in self.validation.values()):
                self.load_train()
            self.load_validation()
        elif stage == "test" and "test" not in self.sets:
            self.sets["test"] = self._encode("test", self._rows("test", self.test_file))
        elif stage == "predict" and not self.prompts:
            self._load_prompts()

    def train_dataloader(self) -> StepLoader:
        """One `StepBatch` an optimizer step."""
        world, rank = self._ranks()
        stage = getattr(self.trainer, "lightning_module", None)
        accumulate = getattr(stage, "accumulate", 1)
        loader = StepLoader(self.sets["train"], self.planner(accumulate, world), rank)
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
            max_tokens=self.max_tokens,
            shuffle=self.shuffle,
            seed=self.seed,
        )

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
        self._template = ChatTemplate(tokenizer, self.chat_template)

    def load_train(self) -> None:
        """Reads and tokenizes the training rows, less the share that validation takes.

        Raises:
            DataError: If there is none, or a row cannot be read.
        """
        if "train" in self.sets:
            return
        if not self.files:
            raise ConfigError("data.train is missing: give a .json or .jsonl file, or sample:identity.")
        rows = [row for file in self.files for row in self._rows("train", file)]
        for name, share in self.validation.items():
            if not isinstance(share, str):
                rows, held_out = self._split(rows, float(share))
                self.sets[f"validation:{name}"] = self._encode(f"validation ({name})", held_out)
        self.sets["train"] = self._encode("train", rows)

    def load_validation(self) -> None:
        """Reads and tokenizes the validation files."""
        for name, file in self.validation.items():
            if isinstance(file, str) and f"validation:{name}" not in self.sets:
                label = f"validation ({name})"
                self.sets[f"validation:{name}"] = self._encode(label, self._rows(label, file))

    def _load_prompts(self) -> None:
        for source, index, conversation in self._rows("predict", self.predict_file):
            messages = conversation.messages
            if messages[-1].role == "assistant":
                messages = messages[:-1]
            with source.at(index):
                self.prompts.append((Conversation(messages), self.template.prompt_ids(messages)))

    def _rows(self, what: str, file: str | None) -> list[tuple[Source, int, Conversation]]:
        if file is None:
            raise ConfigError(f"data.{what} is missing: give a .json or .jsonl file.")
        source = Source(file, self.row_format)
        rows = []
        for index in range(len(source)):
            conversation = fill(with_system(source.conversation(index), self.system), self.fill)
            if source.is_sample:
                with source.at(index):
                    refuse_placeholders(conversation)
            rows.append((source, index, conversation))
        return rows

    def _split(self, rows: list[Any], share: float) -> tuple[list[Any], list[Any]]:
        held_out = max(1, round(share * len(rows)))
        if held_out >= len(rows):
            raise DataError(f"data.validation takes {held_out} of {len(rows)} rows and leaves none to train on.")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        taken = set(order[:held_out])
        return [r for i, r in enumerate(rows) if i not in taken], [r for i, r in enumerate(rows) if i in taken]

    def _encode(self, name: str, rows: Sequence[tuple[Source, int, Conversation]]) -> list[Example]:
        counts = Statistics(name)
        examples = []
        for source, index, conversation in rows:
            with source.at(index):
                made = self.template.encode(conversation)
            counts.rows += 1
            counts.split_rows += len(made) > 1
            for example in made:
                if len(example.input_ids) > self.max_length:
                    counts.truncated += 1
                    example = Example(example.input_ids[: self.max_length], example.weights[: self.max_length])
                if not example.num_targets:
                    counts.dropped += 1
                    continue
                counts.tokens += len(example.input_ids)
                counts.targets += example.num_targets
                counts.longest = max(counts.longest, len(example.input_ids))
                examples.append(example)
        counts.examples = len(examples)
        self.statistics.append(counts)
        if not examples:
            raise DataError(
                f"{name}: none of {counts.rows} rows has a trained token within data.max_length={self.max_length} "
                "tokens; raise it."
            )
        return examples

    def _ranks(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _eval_loader(self, examples: list[Example]) -> EvalLoader:
        world, rank = self._ranks()
        return EvalLoader(examples, self.batch_size, self.max_tokens, rank, world)

    # ---- what a user sees -----------------------------------------------------------------------------------------

    def describe(self) -> list[str]:
        """A line of counts for each set of rows."""
        return [counts.line() for counts in self.statistics]

    def rendered(self, index: int = 0, opening: str = "⟦", closing: str = "⟧", most: int | None = None) -> str:
        """A training example as text with its trained tokens marked.

        Args:
            index: Which.
            opening: Mark before a trained stretch.
            closing: Mark after it.
            most: Characters to show; the middle of a longer text is left out.
        """
        text = mark(self.template.tokenizer, self.sets["train"][index], opening, closing)
        if most is None or len(text) <= most:
            return text
        return f"{text[: most // 2]}\n[... {len(text) - most:,} characters ...]\n{text[-most // 2 :]}"


__all__ = ["MAIN", "SFTData", "Statistics"]
