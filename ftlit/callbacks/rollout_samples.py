"""The answers of rollouts, for people: `rollouts.jsonl`, and a table of W&B; of a test alone: `test-answers.jsonl`."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L

from ftlit.files import write_text

_TABLE = ("step", "set", "prompt", "answer", "reward", "tokens", "ended")


class RolloutSamples(L.Callback):
    """Writes the answers that a rollout or a validation brought, with their rewards, to the run folder.

    `ftlit validate` and `ftlit test` write all of theirs, to `validate-answers.jsonl` and `test-answers.jsonl`.

    Args:
        rows: Most answers of each rollout, and of each validation set of a training run; the first of the first rank.
    """

    def __init__(self, rows: int = 16) -> None:
        self.rows = rows
        self._wrote = False
        self._resumed_at: int | None = None
        self._validated = False

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Notes where a run goes on, and whether it was validated there."""
        self._resumed_at = trainer.global_step if trainer.ckpt_path else None
        self._validated = pl_module.validated_at == trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keeps the answers of a rollout after its first step."""
        self._keep(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keeps the answers to the held-out prompts."""
        if trainer.state.fn != "fit":
            self._write_all(trainer, pl_module)
        elif not (trainer.sanity_checking and trainer.ckpt_path):
            self._keep(trainer, pl_module)
        pl_module.rollouts.samples.clear()

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Writes the answers to the test prompts."""
        self._write_all(trainer, pl_module)
        pl_module.rollouts.samples.clear()

    def _write_all(self, trainer: L.Trainer, stage: Any) -> None:
        ranks = stage.rollouts.gather(stage.rollouts.samples)
        if trainer.is_global_zero:
            records: list[dict[str, Any]] = []
            for name in dict.fromkeys(record["set"] for some in ranks for record in some):
                shares = [[record for record in some if record["set"] == name] for some in ranks]
                records += [one for row in zip_longest(*shares) for one in row if one]  # ranks take rows in turn
            write_text(Path(trainer.default_root_dir) / f"{trainer.state.fn.value}-answers.jsonl", _lines(records))

    def _keep(self, trainer: L.Trainer, stage: Any) -> None:
        records, seen = [], dict[str, int]()
        for record in stage.rollouts.samples:
            seen[record["set"]] = seen.get(record["set"], 0) + 1
            if seen[record["set"]] <= self.rows:
                records.append(record)
        stage.rollouts.samples.clear()
        if not records or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        path = Path(trainer.default_root_dir) / "rollouts.jsonl"
        if not self._wrote:
            write_text(path, "".join(f"{line}\n" for line in self._before(path)))
        self._wrote = True
        with path.open("a", encoding="utf-8") as file:
            file.write(_lines(records))
        for name in seen:  # a rollout and the validations of one step have tables of their own
            some = [record for record in records if record["set"] == name]
            columns = [*_TABLE, *(key for key in some[0] if key.startswith("reward/"))]
            rows = [[_text(one["prompt"]) if key == "prompt" else one[key] for key in columns] for one in some]
            for logger in trainer.loggers:
                if hasattr(logger, "log_table"):
                    logger.log_table(key=f"rollouts/{name}", columns=columns, data=rows, step=trainer.global_step)

    def _before(self, path: Path) -> list[str]:
        """Whole lines of what a run that goes on has behind it; a killed run may have torn its last."""
        kept = []
        if self._resumed_at is not None and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    record = json.loads(line)
                    last = self._resumed_at if self._validated and record["set"] != "train" else self._resumed_at - 1
                    if record["step"] <= last:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue
        return kept


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)


def _text(turns: list[dict[str, Any]]) -> str:
    """A prompt for reading."""
    return turns[0]["content"] if len(turns) == 1 else "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


__all__ = ["RolloutSamples"]
