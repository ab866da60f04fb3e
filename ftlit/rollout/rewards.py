"""Rewards: what an answer is worth, from one or several functions.

A reward has the contract of a verifier: `(prompts, completions, **columns) -> list[float]`. A Python function serves,
and so does a trained reward model that scores texts. It also is given `completion_ids`, the tokens of each answer with
its end token, and may say of an answer a list of numbers: one for each of these tokens. Where it says None it abstains,
and the sum is that of the others; an answer of which none says anything is not trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ftlit.errors import ConfigError
from ftlit.objectives.advantages import Total, alone, moments
from ftlit.rollout.asking import Answers, Caller, Prompt, ask_all, number
from ftlit.rollout.verifiers import Verifier, resolve

CutAnswers = Literal["as_is", "penalty", "mask"]

Reward = Verifier
"""The contract: see `Verifier`."""


@dataclass
class RewardShaping:
    """What is done to the weighted sum of the rewards of an answer, in this order.

    Rewards of single tokens stay where they are (divided by the same number); all else lies on the last token.

    Args:
        whiten: Whether it is divided by the running standard deviation of all rewards of the run, after their running
            mean is subtracted.
        clip: Bound on its absolute value; None: no bound.
        missing_end_penalty: Subtracted from answers that did not end by themselves.
        length_penalty: Subtracted for each token of an answer beyond `free_tokens`.
        free_tokens: Tokens that cost nothing.
        cut_answers: What becomes of answers that `max_new_tokens` cut: `as_is`: they are worth what the rewards say of
            what is there; `penalty`: that less `missing_end_penalty`; `mask`: they are as if they had not been drawn,
            neither trained nor compared with (DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.4). When left out
            `penalty` where there is one, else `as_is`.

    Raises:
        ConfigError: If a number is out of range, or a penalty contradicts `cut_answers`.
    """

    whiten: bool = False
    clip: float | None = None
    missing_end_penalty: float = 0.0
    length_penalty: float = 0.0
    free_tokens: int = 0
    cut_answers: CutAnswers | None = None

    def __post_init__(self) -> None:
        if self.cut_answers is None:
            self.cut_answers = "penalty" if self.missing_end_penalty else "as_is"
        if self.cut_answers not in get_args(CutAnswers):
            raise ConfigError(
                f"model.shaping.cut_answers is {', '.join(get_args(CutAnswers))}, or left out; got "
                f"{self.cut_answers!r}."
            )
        if (self.cut_answers == "penalty") != bool(self.missing_end_penalty):
            raise ConfigError(
                f"model.shaping has cut_answers {self.cut_answers!r} and missing_end_penalty "
                f"{self.missing_end_penalty}; a penalty needs both, cut_answers: penalty and a positive number."
            )
        if (self.clip is not None and self.clip <= 0) or self.missing_end_penalty < 0 or self.free_tokens < 0:
            raise ConfigError(
                "model.shaping needs a positive clip, missing_end_penalty >= 0 and free_tokens >= 0; got "
                f"{self.clip}, {self.missing_end_penalty} and {self.free_tokens}."
            )


class RunningMoments:
    """Mean and variance of everything seen so far (Chan et al. 1979, pairwise update)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, values: Tensor, total: Total = alone) -> None:
        """Adds the values of all ranks."""
        count, mean, variance = moments(values, total)
        if not count:
            return
        apart, together = float(mean) - self.mean, self.count + count
        self.squares += float(variance) * max(count - 1, 0) + apart**2 * self.count * count / together
        self.mean += apart * count / together
        self.count = together

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 1 before there are two different values."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Goes on from it."""
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])


class Said(NamedTuple):
    """What K rewards say of S answers with N tokens together, float32.

    Attributes:
        scores: Of each answer, `[K, S]`: the number, or the sum of those of its tokens; not a number where the reward
            abstained.
        tokens: The weighted sum of what was said of each token, `[N]`; it is part of the scores.
    """

    scores: Tensor
    tokens: Tensor

    @property
    def known(self) -> Tensor:
        """Whether any reward says something of an answer, bool `[S]`."""
        return ~self.scores.isnan().all(0)


class Rewards:
    """Several rewards with weights, and what is done to their sum.

    Args:
        rewards: Rewards, or import paths of functions such as `mymodule.check`.
        weights: One number a reward; 1 each when left out.
        shaping: What is done to the sum.

    Raises:
        ConfigError: If there is no reward, one cannot be found, or the weights do not fit.
    """

    def __init__(
        self,
        rewards: Sequence[Verifier | str | Any],
        weights: Sequence[float] | None = None,
        shaping: RewardShaping | None = None,
    ) -> None:
        if not rewards:
            raise ConfigError("model.reward is missing: give the import path of a function, such as mymodule.check.")
        self.functions = [resolve(reward) for reward in rewards]
        self.callers = [Caller(function) for function in self.functions]
        self.weights = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.functions) or not all(map(math.isfinite, self.weights)):
            raise ConfigError(
                f"model.reward_weights must be one number for each of {len(self.functions)} rewards, got {weights}."
            )
        self.shaping = shaping or RewardShaping()
        self.running = RunningMoments()
        self.names = _distinct([caller.name for caller in self.callers])

    def check(self, columns: Sequence[str]) -> None:
        """Checks that rows with these columns have what the rewards name.

        Raises:
            ConfigError: If they do not.
        """
        for caller in self.callers:
            caller.check([*columns, "reference", "completion_ids", "truncated", "prefilled"])

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        tokens: Sequence[Sequence[int]],
        plain: Sequence[tuple[str, str] | None] | None = None,
        where: Sequence[str] = (),
    ) -> Said:
        """What each reward says of each answer.

        Args:
            prompts: The turns before each answer.
            completions: The answers.
            columns: Columns of their rows, and `reference`.
            tokens: The tokens of each answer; the rewards know them as the column `completion_ids`.
            plain: Prompt and answer as the texts that they are, where there is no template; for rewards that say
                `reads_plain`, which are models.
            where: File and row of each.

        Raises:
            ConfigError: If a reward does not return one finite number an answer, or one for each of its tokens, or None
                to abstain.
        """
        scores = torch.full((len(self.functions), len(completions)), torch.nan)
        each = [torch.zeros(len(one), dtype=torch.float32) for one in tokens]
        asked = []
        for function in self.functions:
            before, said = list[Any](prompts), list(completions)
            if plain is not None and getattr(function, "reads_plain", False):
                for place, both in enumerate(plain):
                    before[place], said[place] = (before[place], said[place]) if both is None else both
            asked.append(Answers(before, said, {**columns, "completion_ids": tokens}, where))
        for which, values in enumerate(ask_all(self.callers, asked)):
            name, weight, answers = self.callers[which].name, self.weights[which], asked[which]
            for place, value in enumerate(values):
                if value is None:
                    continue
                if not isinstance(value, list | tuple) and not getattr(value, "shape", ()):
                    scores[which, place] = number(name, value, answers, place)
                    continue
                if len(value) != len(tokens[place]):
                    raise ConfigError(
                        f"reward {name} gave {len(value)} numbers for an answer of {len(tokens[place])} tokens; give "
                        "one for each of completion_ids, or one for the answer."
                    )
                found = torch.tensor([number(name, one, answers, place) for one in value], dtype=torch.float32)
                each[place] += weight * found
                scores[which, place] = found.sum()
        return Said(scores, torch.cat([*each, torch.zeros(0, dtype=torch.float32)]))

    def to(self, device: torch.device | str) -> None:
        """Moves the rewards that are models."""
        for function in self.functions:
            if hasattr(function, "to"):
                function.to(device)

    def weighted(self, scores: Tensor) -> Tensor:
        """The weighted sum of what was said, float64 `[S]`; 0 where every reward abstained."""
        return (torch.tensor(self.weights, dtype=torch.float64)[:, None] * scores.double()).nansum(0)

    @property
    def scale(self) -> float:
        """What shaping divides rewards by."""
        return self.running.std if self.shaping.whiten else 1.0

    @property
    def treatment(self) -> str:
        """What becomes of answers that were cut, in words."""
        said = {
            "as_is": "are worth what the rewards say of them",
            "penalty": f"lose {self.shaping.missing_end_penalty:g}",
            "mask": "are not trained",
        }
        return said[self.shaping.cut_answers or "as_is"]

    def shaped(
        self,
        scores: Tensor,
        lengths: Tensor,
        ended: Tensor,
        total: Total = alone,
        learn: bool = True,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Whitens, clips and adds the terms of length and end.

        Args:
            scores: The weighted sums, `[S]`.
            lengths: Tokens of each answer, with its end token, `[S]`.
            ended: Whether each ended by itself, bool `[S]`.
            total: Sums over the ranks.
            learn: Whether the running statistics take these scores in.
            counted: Which of them they take, bool `[S]`; all when left out.

        Returns:
            `[S]`.
        """
        shaping = self.shaping
        if shaping.whiten:
            if learn:
                self.running.update(scores if counted is None else scores[counted], total)
            scores = (scores - self.running.mean) / self.scale
        if shaping.clip is not None:
            scores = scores.clamp(-shaping.clip, shaping.clip)
        scores = scores - shaping.missing_end_penalty * (~ended).to(scores.dtype)
        return scores - shaping.length_penalty * (lengths - shaping.free_tokens).clamp(min=0).to(scores.dtype)


def _distinct(names: Sequence[str]) -> list[str]:
    """Names with a number where one comes twice."""
    return [f"{name}_{names[:place].count(name) + 1}" if names.count(name) > 1 else name
            for place, name in enumerate(names)]  # fmt: skip


__all__ = ["Reward", "RewardShaping", "Rewards", "RunningMoments", "Said"]
