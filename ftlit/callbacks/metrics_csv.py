"""`metrics.csv`: one row a logged step, continued when a run is resumed."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ftlit.files import replacing


class MetricsCSV(Logger):
    """Writes every metric to `metrics.csv` in the run folder, at once: a killed run keeps what it measured.

    Lightning's own CSV logger deletes the old file when a run is resumed. Here the rows after the step that the run
    goes on from are dropped, since they will be measured again, and the others stay.

    Args:
        folder: The run folder.
        last: The row of the optimizer step that the run goes on from, with its `step`: a run that was killed right
            after it saved had not logged it yet. None for a new run.
    """

    def __init__(self, folder: str | Path, last: dict[str, float] | None = None) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.last = last
        self.resumed_at = None if last is None else int(last["step"])
        self.columns = ["step"]
        self._row: dict[str, Any] = {}  # the last one of the file; the others are only there
        self._begins = 0  # where it begins, in bytes
        self._ready = False

    @property
    def name(self) -> str:
        """No sub-folder."""
        return ""

    @property
    def version(self) -> str:
        """No sub-folder."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` is the record."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds a row, or to the row of the same step."""
        step = 0 if step is None else step
        if not self._ready:
            self._begin()
        values = {key: float(value) for key, value in metrics.items() if key != "epoch"}
        fresh = [key for key in values if key not in self.columns]
        # What is measured again at the step that the run goes on from takes the place of what was there.
        merge = bool(self._row) and self._row["step"] == step
        merge = merge and (step == self.resumed_at or not set(values) & set(self._row))
        if fresh:
            self._widen(fresh)
        self._put({**self._row, **values} if merge else {"step": step, **values}, again=merge)

    def _begin(self) -> None:
        self._ready = True
        rows: list[dict[str, Any]] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.resumed_at is not None and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(line.replace("\0", "") for line in file)
                self.columns = list(reader.fieldnames or ["step"])
                old = [{key: value for key, value in row.items() if value} for row in reader]
            # A killed run may have torn its last row.
            whole = [row for row in old if str(row.get("step")).isdigit() and None not in row]
            rows = [{**row, "step": int(row["step"])} for row in whole if int(row["step"]) <= self.resumed_at]
        if self.last is not None and len(self.last) > 1:
            if not rows or rows[-1]["step"] != self.resumed_at:
                rows.append({"step": self.resumed_at})
            rows[-1] = {**{key: float(value) for key, value in self.last.items()}, **rows[-1]}
            self.columns += [key for key in self.last if key not in self.columns]
        self._write_all(rows)

    def _widen(self, fresh: list[str]) -> None:
        """Writes the file again with further columns."""
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.columns += fresh
        self._write_all(rows)

    def _write_all(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with replacing(self.path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows[:-1])
            self._begins = file.tell()
            writer.writerows(rows[-1:])
        if rows:
            self._row = {key: value for key, value in rows[-1].items() if value != ""}
            self._row["step"] = int(self._row["step"])

    def _put(self, row: dict[str, Any], *, again: bool) -> None:
        """Writes a row behind the last one, or over it: one short write, which a kill does not tear."""
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerow(row)
        with self.path.open("r+b") as file:
            self._begins = file.seek(self._begins) if again else file.seek(0, os.SEEK_END)
            file.write(text.getvalue().encode())
            file.truncate()
        self._row = row
