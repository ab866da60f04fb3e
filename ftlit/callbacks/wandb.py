"""Weights & Biases: a run folder and its W&B run tell the same."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from ftlit.errors import ConfigError

_AXIS = "trainer/global_step"


class WandB(WandbLogger):
    """Logs to Weights & Biases.

    The step of W&B is the optimizer step, as in `metrics.csv`. The whole config, every metric, `summary.json` and the
    answers of `GenerationEval` (a table) are logged. A run that goes on from a checkpoint goes on under its id, which
    the run folder keeps; what W&B already has of a step is not logged again, because its history cannot be rewritten.
    Without a key the run is logged offline, to be uploaded with `wandb sync`.

    Args:
        project: Project of the run.
        name: Name of the run; that of the run folder when left out.
        entity: Team or user.
        group: Group of the run.
        job_type: Kind of the run inside its group.
        tags: Tags.
        notes: Notes, as long as you like.
        id: Id of the run; a new one, kept in the run folder, when left out.
        offline: Whether to log into the run folder only.
        log_adapter: Upload this adapter folder as an artifact when the run has ended.
        save_dir: The run folder; set by ftlit.

    Raises:
        ConfigError: If wandb is not installed.
    """

    def __init__(
        self,
        project: str = "ftlit",
        name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        id: str | None = None,  # noqa: A002 - W&B's own name
        offline: bool = False,
        log_adapter: Literal["last", "best"] | None = None,
        save_dir: str = ".",
    ) -> None:
        self.folder = Path(save_dir)
        self.log_adapter = log_adapter
        self._known: dict[int, set[str]] = {}
        self._best: Mapping[str, Any] | None = None
        self._history: list[dict[str, Any]] = []
        self._forked: dict[str, Any] = {}
        given = {"entity": entity, "group": group, "job_type": job_type, "tags": tags, "notes": notes}
        # Not Lightning's `offline`: it sets WANDB_MODE for the whole process.
        mode: dict[str, Any] = {"mode": "offline" if offline else os.environ.get("WANDB_MODE")}
        if mode["mode"] == "offline":
            mode["settings"] = {"quiet": True}
        try:
            super().__init__(name=name, project=project, id=id, save_dir=save_dir, **given, **mode)
        except ModuleNotFoundError:
            raise ConfigError("the WandB logger needs wandb: pip install wandb.") from None

    @rank_zero_only
    def go_on(self, resumed: bool, back_to: int | None = None) -> None:
        """Finds the id of the run; where it goes on, also what W&B already has.

        A run that goes back to an earlier checkpoint, such as its best, is a new one of W&B, with the history up to
        there: W&B takes nothing more of steps that it has passed.

        Args:
            resumed: Whether the run goes on from a checkpoint.
            back_to: The optimizer step that it goes back to, where that is not its last checkpoint.
        """
        from wandb.sdk.lib.runid import generate_id

        keeper = self.folder / "wandb" / "run_id"
        kept = keeper.read_text(encoding="utf-8").strip() if resumed and keeper.exists() else None
        given = self._wandb_init["id"]
        if kept and given in (None, kept):
            self._known = _logged(self.folder / "metrics.csv")
        newest = max(self._known, default=0)
        if kept and back_to is not None and newest > back_to:
            kept = self._fork(kept, given, back_to, newest)
        self._id = self._wandb_init["id"] = given or kept or generate_id()
        keeper.parent.mkdir(parents=True, exist_ok=True)
        keeper.write_text(f"{self._id}\n", encoding="utf-8")

    def _fork(self, kept: str, given: str | None, back_to: int, newest: int) -> str | None:
        """Begins a new run of W&B with the history up to a step; with an id that was named there is none to begin."""
        if given is not None:
            print(
                f"W&B: run {given} is at step {newest}: what is logged up to there is lost; give another id.",
                flush=True,
            )
            return kept
        self._known, self._forked = {}, {"run": kept, "step": back_to}
        self._history = [row for row in _rows(self.folder / "metrics.csv") if row["step"] <= back_to]
        print(
            f"W&B: run {kept} is at step {newest}, and its history cannot be rewritten; what comes after step "
            f"{back_to} is a new run, with the history up to there.",
            flush=True,
        )
        return None

    def _tell_history(self) -> None:
        """What a new run has behind it."""
        history, self._history = self._history, []
        if history:
            self.experiment.config.update({"forked_from": self._forked}, allow_val_change=True)
        for row in history:
            self.experiment.log({**{k: v for k, v in row.items() if k != "step"}, _AXIS: row["step"]}, step=row["step"])

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        step = 0 if step is None else step
        fresh = {k: v for k, v in metrics.items() if k != "epoch" and not self._has(k, step)}
        if fresh:
            self._tell_history()
            # W&B's own step too: then every plot and export has the optimizer step without being told.
            self.experiment.log({**fresh, _AXIS: step}, step=step)

    def _has(self, key: str, step: int) -> bool:
        """Whether W&B already has a metric, or a table of the same metrics, from before the run went on."""
        stem = key.removesuffix("samples")
        have = self._known.get(step, set())
        return key in have or (stem != key and any(name.startswith(stem) for name in have))

    @rank_zero_only
    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Adds `summary.json` to the summary of the run, where W&B itself keeps the last value of each metric."""
        for key, value in summary.items():
            if not isinstance(value, Mapping):
                self.experiment.summary[key] = value
        for key, value in summary["start"].items():
            self.experiment.summary[f"start/{key}"] = value
        for key, value in (summary["best"] or {}).items():
            self.experiment.summary[f"best/{key}"] = value
        self._best = summary["best"]

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        run: Any = getattr(self, "_experiment", None)
        if run is None:
            return
        if status == "success" and self.log_adapter is not None:
            self._upload(self.folder / "adapter" / self.log_adapter)
        # Each run of a process is a run of its own; Lightning would leave this one open for the next.
        run.finish(exit_code=0 if status == "success" else 1)
        self._experiment: Any = None

    def _upload(self, adapter: Path) -> None:
        """Logs an adapter folder as an artifact."""
        import wandb

        if not adapter.is_dir():
            print(f"W&B: there is no {adapter} to upload (this strategy has no adapter folder).", flush=True)
            return
        about = {"which": self.log_adapter, **((self._best or {}) if self.log_adapter == "best" else {})}
        artifact = wandb.Artifact(f"adapter-{self._id}", type="model", metadata=about)
        artifact.add_dir(str(adapter))
        self.experiment.log_artifact(artifact, aliases=[str(self.log_adapter)])


def _rows(table: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.csv`, of each what was measured; not a last one that a killed run may have torn."""
    rows: list[dict[str, Any]] = []
    if not table.exists():
        return rows
    with table.open(newline="", encoding="utf-8") as file:
        whole = [line.replace("\0", "") for line in file if line.endswith("\n")]
    for row in csv.DictReader(whole):
        step = row.get("step") or ""
        if step.isdigit() and None not in row:
            measured = {key: float(value) for key, value in row.items() if value and key != "step"}
            rows.append({"step": int(step), **measured})
    return rows


def _logged(table: Path) -> dict[int, set[str]]:
    """Which metrics `metrics.csv` has of which step."""
    known: dict[int, set[str]] = {}
    for row in _rows(table):
        known.setdefault(row["step"], set()).update(key for key in row if key != "step")
    return known


__all__ = ["WandB"]
