"""Replay: general rows beside the target rows, so that what they hold is not forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from typing_extensions import override

from ftlit.batch import Example, PackedBatch
from ftlit.data.added import AddedRows
from ftlit.errors import ConfigError
from ftlit.forgetting.base import ForgettingControl, Penalty
from ftlit.forgetting.own_text import own_text
from ftlit.objectives.scores import TokenScores

if TYPE_CHECKING:
    from ftlit.stages.base import Stage

OWN = "self"
FIRST_OWN = 1 << 16
"""Number of the first text of the model's own: those below are left to what measures, so that the two are disjoint."""


class Replay(ForgettingControl):
    """Trains general rows beside the rows of the run: `loss = target + weight * mean over replay tokens`.

    With `kl` each replay token costs the divergence `KL(p_start || p)` of the whole next-token distribution from that
    of the model at the start of the run; it asks the model to stay as it was, whatever the row says. With `ce` the row
    itself is trained. For chat models cross-entropy on text that is not their own can be worse than no replay at all.

    The number of replay tokens is `ratio` times the trained tokens of the run's own rows, on top of them and exact for
    any batch size (see `AddedRows`). The mean is over the tokens that are planned for a step, not those that a step
    happens to hold, so that every replay token counts the same. Logged as `forgetting/replay/loss` (nats a token) and
    `forgetting/replay/tokens`.

    Args:
        rows: What to replay: `self` (text that the model at its start writes, made once and kept on disk), a file, a
            folder, a hub id, or `sample:NAME`.
        objective: `kl` or `ce`.
        ratio: Replay tokens for each trained token of the run's own rows.
        weight: Factor on the mean loss of the replay tokens.
        num_rows: How many texts the model writes for `self` (256 when left out), or how many rows are taken, the first
            of the source (all when left out).
        max_new_tokens: Most tokens of each text of its own.
        seed: Seed of the order of the rows and of what is written.
        name: What it is called in the log.

    Raises:
        ConfigError: If a number is out of range.
    """

    of_a_step: ClassVar[tuple[str, ...]] = ("loss", "tokens")

    def __init__(
        self,
        rows: str = OWN,
        objective: Literal["kl", "ce"] = "kl",
        ratio: float = 0.1,
        weight: float = 1.0,
        num_rows: int | None = None,
        max_new_tokens: int = 128,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if objective not in ("kl", "ce"):
            raise ConfigError(f"Replay.objective must be kl or ce, got {objective!r}.")
        if not 0 < ratio <= 100:
            raise ConfigError(f"Replay.ratio must be in (0, 100] replay tokens a trained token, got {ratio}.")
        for key, value in (("num_rows", num_rows), ("max_new_tokens", max_new_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"Replay.{key} must be at least 1, got {value}.")
        self.rows, self.objective, self.ratio, self.seed = rows, objective, ratio, seed
        self.num_rows, self.max_new_tokens = num_rows, max_new_tokens
        self._added: AddedRows | None = None

    @override
    def added_rows(self, stage: Stage) -> AddedRows:
        data: Any = stage.trainer.datamodule
        if self.rows == OWN:
            assert stage.policy is not None
            stage.strategy.remember_start(stage.policy.lm)
            examples: Sequence[Example] = own_text(
                stage, None, self.num_rows or 256, max_new_tokens=self.max_new_tokens, seed=self.seed, skip=FIRST_OWN
            )
        else:
            examples = data.load_added(self.name, self.rows)
            examples = examples if self.num_rows is None else examples[: self.num_rows]
        self._added = AddedRows(self.name, examples, self.ratio, self.seed)
        return self._added

    @property
    @override
    def kl(self) -> Mapping[int, float]:
        return {self.source: 1.0} if self.objective == "kl" else {}

    @override
    def penalty(self, stage: Stage, batch: PackedBatch, scores: TokenScores) -> Penalty | None:
        mine = batch.target_sources == self.source
        weights = batch.target_weights[mine].to(scores.logps.dtype)
        losses = -scores.logps if scores.kl is None or self.objective == "ce" else scores.kl
        total = (losses[mine] * weights).sum()
        planned = self.ratio * stage.totals.targets
        return Penalty(total / planned, {"total": total.detach(), "tokens": torch.count_nonzero(weights).double()})

    @override
    def summary(self, sums: dict[str, float]) -> dict[str, float]:
        mean = {"loss": sums["total"] / sums["tokens"]} if sums["tokens"] else {}  # a small ratio leaves out steps
        return {**mean, "tokens": sums["tokens"]}

    @override
    def describe(self) -> str:
        assert self._added is not None
        count = len(self._added.examples)
        what = f"{count:,} texts of its own" if self.rows == OWN else f"{count:,} rows of {self.rows}"
        goal = "KL to the start" if self.objective == "kl" else "cross-entropy"
        return f"{self.name}: {what}, {goal}, {self.ratio:.3g} replay tokens a trained token, weight {self.weight:g}"


__all__ = ["FIRST_OWN", "OWN", "Replay"]
