"""One rollout of PPO: prompts are answered, the answers rewarded and scored, and turned into advantages."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ftlit.batch import StepTotals
from ftlit.data.cutting import prefilled
from ftlit.data.prompts import PromptRow
from ftlit.device import wait_for
from ftlit.errors import ConfigError
from ftlit.models.value import ValueHead
from ftlit.objectives.advantages import Outcome, moments, sums
from ftlit.objectives.kl import kl_estimate
from ftlit.objectives.policy_gradient import reduction_weights
from ftlit.rollout.experience import Experience, Micro, cut
from ftlit.rollout.generate import Answer, seed_of, text_of
from ftlit.rollout.generator import Sampling
from ftlit.rollout.rewards import Said

if TYPE_CHECKING:
    from ftlit.stages.ppo import PPO


class Answered:
    """Prompts with their answers and rewards.

    Attributes:
        rows: The prompts.
        answers: As many to each, prompt by prompt.
        texts: The answers as the rewards read them.
        said: What the rewards say of them.
        experience: The same as tokens.
    """

    def __init__(
        self,
        rows: Sequence[PromptRow],
        answers: Sequence[Answer],
        texts: Sequence[str],
        said: Said,
        found: Experience,
    ) -> None:
        self.rows, self.answers, self.texts, self.said, self.experience = rows, answers, texts, said, found

    @property
    def ended(self) -> Tensor:
        """Whether each answer ended by itself, bool `[S]`."""
        return torch.tensor([one.ended for one in self.answers], dtype=torch.bool)

    @property
    def counted(self) -> Tensor:
        """Whether each answer is trained and compared with, bool `[S]`."""
        counted = torch.ones(len(self.answers), dtype=torch.bool)
        counted[list(self.experience.masked)] = False
        return counted


class Rollouts:
    """Makes the rollouts of a stage.

    Args:
        stage: The stage, whose settings count.

    Attributes:
        kl_coef: The present weight of the KL penalty.
        taken: Prompts that the run has taken so far, on all ranks.
        metrics: What was measured of the present rollout.
        seconds: Time spent so far on drawing, rewarding, scoring and updating.
        samples: Answers for people that are not written yet.
    """

    def __init__(self, stage: PPO) -> None:
        self._stage = (stage,)  # a tuple, so that it is no child
        self.kl_coef, self.taken = stage.kl.coef, 0
        self.metrics: dict[str, float] = {}
        self.seconds = dict.fromkeys(("rollout", "rewards", "scoring", "update"), 0.0)
        self.samples: list[dict[str, Any]] = []

    @property
    def stage(self) -> PPO:
        """The stage."""
        return self._stage[0]

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on with."""
        return {
            "taken": self.taken,
            "kl_coef": self.kl_coef,
            "steered": self.stage.kl.target is not None,
            "running": self.stage.rewards.running.state_dict(),
            "seconds": dict(self.seconds),
            "metrics": dict(self.metrics),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with it; the weight of a penalty that is not steered is the one that is given now."""
        if state["steered"] and self.stage.kl.target is not None:
            self.kl_coef = state["kl_coef"]
        self.taken = state["taken"]
        self.seconds, self.metrics = dict(state["seconds"]), dict(state["metrics"])
        self.stage.rewards.running.load_state_dict(state["running"])

    def check_room(self) -> None:
        """Refuses answers that would go beyond the model: some models break there, others answer nonsense.

        Raises:
            ConfigError: If the longest prompt leaves too little room.
        """
        stage = self.stage
        assert stage.policy is not None
        rows = getattr(getattr(stage._trainer, "datamodule", None), "rows", {})
        longest = max((len(row.input_ids) for some in rows.values() for row in some), default=0)
        own = getattr(stage.policy.lm.config.get_text_config(), "max_position_embeddings", None)
        limits = [own, stage.policy.longest, getattr(stage.critic, "longest", None)]
        most = min((limit for limit in limits if limit), default=None)
        room = None if most is None else most - longest - getattr(stage.strategy, "num_virtual_tokens", 0)
        if room is not None and stage.sampling.max_new_tokens > room:
            raise ConfigError(
                f"model.max_new_tokens is {stage.sampling.max_new_tokens}, but the longest prompt has {longest} tokens "
                f"and the model takes {most} in all: set it to at most {max(room, 0)}, or lower data.max_length."
            )

    def collect(self, number: int) -> Experience:
        """One rollout of training.

        Args:
            number: Which of the run.
        """
        stage, trainer = self.stage, self.stage.trainer
        prompts = stage.order.rollout(self.taken)
        parts = [prompts[m :: stage.num_minibatches] for m in range(stage.num_minibatches)]
        mine = dealt(parts, trainer.global_rank, trainer.world_size)
        numbers = [row for part in mine for _, row in part]
        rows = [stage.data.rows["train"][row] for row in numbers]
        with self._timed("rollout"):
            each, seed = stage.sampling.num_answers, stage.data.seed
            seeds = [seed_of(seed, place, k) for part in mine for place, _ in part for k in range(each)]
            answers = self.draw(rows, seeds, stage.sampling)
            likeliest = self.draw(rows, [0] * len(rows), stage.sampling.greedy) if stage.advantage.uses_greedy else []
        with self._timed("rewards"):
            made = self.rewarded(rows, numbers, answers)
            greedy = self.rewarded(rows, numbers, likeliest) if stage.advantage.uses_greedy else None
        found = made.experience
        found.number, found.first_step = number, trainer.global_step
        with self._timed("rollout"):  # here ranks wait for the one that drew longest
            self._cut(found, [len(part) for part in mine])
        with self._timed("scoring"):
            tokens = self.score(found, [micro for step in found.steps for micro in step])
            self._estimate(made, tokens, greedy)
        self.keep("train", made)
        self.taken += len(prompts)
        return found

    # ---- answers and rewards ----------------------------------------------------------------------------------------

    def draw(self, rows: Sequence[PromptRow], seeds: Sequence[int], sampling: Sampling) -> list[Answer]:
        """Answers some prompts.

        Args:
            rows: The prompts.
            seeds: Seed of each answer.
            sampling: How to draw.

        Returns:
            `num_answers` to each, prompt by prompt.
        """
        stage, trainer = self.stage, self.stage.trainer
        assert stage.policy is not None
        if not rows:
            return []
        with trainer.precision_plugin.forward_context():
            answers = stage.generator(
                stage.policy.lm, stage.strategy, stage.tokenizer, [row.input_ids for row in rows], seeds, sampling,
                quiet=not trainer.is_global_zero,
            )  # fmt: skip
        if len(answers) != len(seeds) or not all(one.drawn for one in answers):
            raise ConfigError(
                f"{type(stage.generator).__name__} brought {len(answers)} answers, {sum(not a.drawn for a in answers)} "
                f"of them without a token, and should bring {len(seeds)}, each with at least its end token."
            )
        return answers

    def rewarded(self, rows: Sequence[PromptRow], numbers: Sequence[int], answers: Sequence[Answer]) -> Answered:
        """Rewards the answers to some prompts.

        Args:
            rows: The prompts.
            numbers: The number of each in its set.
            answers: As many to each, prompt by prompt.
        """
        stage = self.stage
        owners = [place * len(rows) // len(answers) for place in range(len(answers))]
        repeated = [rows[owner] for owner in owners]
        names = sorted({name for row in repeated for name in row.columns})
        columns: dict[str, list[Any]] = {"reference": [row.reference for row in repeated]}
        columns |= {name: [row.columns.get(name) for row in repeated] for name in names}
        if any(row.tools for some in stage.data.rows.values() for row in some):
            columns["tools"] = [row.tools for row in repeated]
        columns["truncated"] = [not one.ended for one in answers]
        columns["prefilled"] = [self._prefilled(row) for row in repeated]
        tokens, texts = [one.drawn for one in answers], list[str]()
        said = Said(torch.zeros(len(stage.rewards.functions), 0), torch.zeros(0))
        if rows:
            stage.rewards.to(stage.device)
            with isolate_rng(), _plain(stage.device):
                self._seed_rewards()
                texts = [self._decoded(one, row) for one, row in zip(answers, repeated, strict=True)]
                plain = [None if row.plain is None else (row.plain, text)
                         for row, text in zip(repeated, texts, strict=True)]  # fmt: skip
                where = [row.where for row in repeated]
                said = stage.rewards([row.turns for row in repeated], texts, columns, tokens, plain, where)
        masks_cut = stage.rewards.shaping.cut_answers == "mask"
        known = said.known.tolist()
        masked = [i for i, one in enumerate(answers) if (masks_cut and not one.ended) or not known[i]]
        found = Experience([row.input_ids for row in rows], numbers, tokens, owners, masked=masked)
        return Answered(rows, answers, texts, said, found)

    def _seed_rewards(self) -> None:
        """A reward may draw too: others in every rollout and on every rank, and the same when a run goes on."""
        trainer = self.stage.trainer
        seed = seed_of(self.stage.data.seed, trainer.global_step, trainer.global_rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def _decoded(self, answer: Answer, row: PromptRow) -> str:
        """An answer as text; where it goes on from a text, with the space between them, which some tokenizers drop."""
        return text_of(self.stage.tokenizer, answer.tokens, row.input_ids if row.plain is not None else ())

    def _prefilled(self, row: PromptRow) -> str:
        """The text with which the chat template begins an answer."""
        return "" if row.plain is not None else prefilled(str(self.stage.tokenizer.decode(row.input_ids[-16:])))

    def _shaped(self, made: Answered, learn: bool) -> Tensor:
        rewards = self.stage.rewards
        scores, found = rewards.weighted(made.said.scores), made.experience
        return rewards.shaped(scores, found.lengths, made.ended, self.total, learn, made.counted)

    # ---- tokens -----------------------------------------------------------------------------------------------------

    def _cut(self, found: Experience, prompts: Sequence[int]) -> None:
        """Cuts a rollout into minibatches of whole prompts, and these into as many micro-batches on every rank.

        Args:
            found: The rollout.
            prompts: How many prompts each minibatch has here.
        """
        cuts, counts, start = [], [], 0
        lengths = [len(prompt) for prompt in found.prompts]
        for count in prompts:
            chosen = [i for i, owner in enumerate(found.owners) if start <= owner < start + count]
            answers = [len(found.answers[i]) for i in chosen]
            micros = cut([found.owners[i] for i in chosen], lengths, answers, self.stage.data.max_tokens)
            cuts.append([tuple(chosen[i] for i in micro) for micro in micros])
            trained = [len(found.answers[i]) for i in chosen if i not in found.masked]
            tokens = sum(answers) + sum(lengths[start : start + count])
            counts.append([len(micros), sum(trained), tokens, len(trained)])
            start += count
        ranks = self.gather(counts)
        for number, step in enumerate(cuts):
            most = max(rank[number][0] for rank in ranks)
            found.steps.append([*step, *[()] * (most - len(step))])
            targets, tokens, examples = (sum(rank[number][i] for rank in ranks) for i in (1, 2, 3))
            # A step whose answers are all masked is divided by 1: it is 0, and not 0 / 0.
            targets, examples = max(targets, 1), max(examples, 1)
            found.totals.append(StepTotals(float(targets), targets, tokens, examples))

    @torch.no_grad()
    def score(self, found: Experience, micros: Sequence[Micro]) -> dict[str, Tensor]:
        """What the policy and the start of the run say of each token, in the very packs and on the path of the update.

        Args:
            found: The answers.
            micros: Which lie together.

        Returns:
            `old_logps`, `reference`, `entropy` and where it has any `values`, each `[N]`, on the CPU.
        """
        stage, critic = self.stage, self.stage.critic
        assert stage.policy is not None
        filled = [micro for micro in micros if micro]
        if not filled:
            names = ("old_logps", "reference", "entropy", *(("values",) if critic is not None else ()))
            return dict.fromkeys(names, torch.zeros(0))
        parts: dict[str, list[Tensor]] = {"old_logps": [], "reference": [], "entropy": [], "values": []}
        with stage.trainer.precision_plugin.forward_context():
            batches = [found.pack(micro).to(stage.device) for micro in filled]
            for batch in batches:
                scores = stage.policy(
                    batch, needs=stage.needs - {"entropy"}, watch=frozenset({"entropy"}), **stage.scoring(batch)
                )
                assert scores.entropy is not None
                parts["old_logps"].append(scores.logps)
                parts["entropy"].append(scores.entropy)
                if critic is not None:
                    parts["values"].append(critic(batch, scores))
            with stage.strategy.start(stage.policy.lm):
                parts["reference"] += [stage.policy(batch, **stage.scoring(batch)).logps for batch in batches]
        places = torch.cat([found.places(micro) for micro in filled])
        flat = {name: torch.cat(values).cpu() for name, values in parts.items() if values}
        return {name: torch.empty_like(values).index_copy(0, places, values) for name, values in flat.items()}

    def _estimate(self, made: Answered, tokens: dict[str, Tensor], greedy: Answered | None) -> None:
        """Rewards become advantages; the metrics are counted, and the weight of the KL penalty is steered by them."""
        stage, found = self.stage, made.experience
        old, reference, values = tokens["old_logps"], tokens["reference"], tokens.get("values")
        owners, lengths = found.token_owners, found.lengths
        penalty = torch.zeros_like(old)
        if stage.kl.place == "reward":
            penalty = -self.kl_coef * kl_estimate(old, reference, stage.kl.estimator)
        scores = self._shaped(made, learn=True)
        baselines, counted = None, made.counted
        if greedy is not None:  # where it does not count there is nothing to compare with
            baselines, known = (
                one.repeat_interleave(stage.sampling.num_answers)
                for one in (self._shaped(greedy, learn=False), greedy.counted)
            )
            counted = counted & known
        apart = made.said.tokens.double() / stage.rewards.scale  # what lies on its token, and not on the last
        outcome = Outcome(
            scores=scores - sums(apart, owners, len(scores)),
            token_rewards=penalty + apart.to(old.dtype),
            owners=owners,
            groups=torch.tensor(found.owners, dtype=torch.int64),
            values=values,
            baselines=baselines,
            counted=counted,
        )
        if values is not None and isinstance(stage.critic, ValueHead) and stage.critic.new:
            # From 0 a short run is spent on learning the level, and not on telling tokens apart.
            each = outcome.rewards_to_go(stage.advantage.gamma)[made.counted[owners]]
            values = stage.critic.start_at(moments(each, self.total)[1], values)
            outcome = outcome._replace(values=values)
        estimate = stage.advantage(outcome, self.total)
        weights = torch.zeros(len(old), dtype=torch.float64)
        for step, total in zip(found.steps, found.totals, strict=True):
            places = found.places(tuple(one for micro in step for one in micro))
            weights[places] = reduction_weights(
                stage.policy_loss.reduction, lengths, owners[places], total.targets, total.examples,
                stage.sampling.max_new_tokens,
            )  # fmt: skip
        found.tokens = {
            "old_logps": old,
            "reference": reference,
            "advantages": estimate.advantages,
            "weights": weights.to(old.dtype),
        }
        if values is not None and estimate.returns is not None:
            found.tokens |= {"values": values, "returns": estimate.returns}
        self._measure(made, outcome, tokens, estimate.returns)
        self.kl_coef = stage.kl.adapted(self.kl_coef, self.metrics["objective/kl"])

    def _measure(self, made: Answered, outcome: Outcome, tokens: dict[str, Tensor], returns: Tensor | None) -> None:
        """Means over the answers and tokens of all ranks."""
        rewards, found, known = self.stage.rewards, made.experience, made.said.known
        raw = rewards.weighted(made.said.scores)[known]
        means = {
            "objective/kl": sums(tokens["old_logps"] - tokens["reference"], outcome.owners, len(made.answers)),
            "objective/scores": raw,
            "objective/rlhf_reward": outcome.rewards[known],
            "policy/entropy": tokens["entropy"],
            "answers/length": found.lengths,
            "answers/ended": made.ended,
            "answers/trained": made.counted,
        }
        if len(rewards.names) > 1:
            pairs = zip(rewards.names, made.said.scores, strict=True)
            means |= {f"rewards/{name}": one[~one.isnan()] for name, one in pairs}
        if self.stage.sampling.num_answers > 1:
            means["objective/alike"] = outcome.alike  # prompts that teach nothing
        metrics = {name: self._mean(value) for name, value in means.items()}
        metrics["objective/scores_std"] = float(moments(raw, self.total)[2].sqrt())
        metrics["objective/kl_coef"] = self.kl_coef
        if returns is not None and outcome.values is not None:
            error, spread = (moments(one, self.total)[2] for one in (returns - outcome.values, returns))
            metrics["val/explained_variance"] = float(1 - error / spread) if spread > 0 else 0.0
        self.metrics = metrics

    def _mean(self, values: Tensor) -> float:
        """Over all ranks; not a number without values."""
        count, mean, _ = moments(values, self.total)
        return float(mean) if count else float("nan")

    # ---- small parts ------------------------------------------------------------------------------------------------

    def keep(self, kind: str, made: Answered) -> None:
        """Remembers answers with their rewards, for people.

        Args:
            kind: What they are from.
            made: The answers.
        """
        rewards, found = self.stage.rewards, made.experience
        scores = rewards.weighted(made.said.scores).masked_fill(~made.said.known, torch.nan).tolist()
        for place, (one, text, score) in enumerate(zip(made.answers, made.texts, scores, strict=True)):
            record = {
                "step": self.stage.trainer.global_step,
                "set": kind,
                "prompt": made.rows[found.owners[place]].turns,
                "answer": text,
                "tokens": len(one.drawn),
                "ended": one.ended,
                "reward": _said(score),
            }
            if len(rewards.names) > 1:
                record |= {
                    f"reward/{name}": _said(float(said[place]))
                    for name, said in zip(rewards.names, made.said.scores, strict=True)
                }
            self.samples.append(record)

    def total(self, value: Tensor) -> Tensor:
        """Sum over the ranks."""
        trainer: Any = self.stage.trainer
        if trainer.world_size == 1:
            return value
        return trainer.strategy.reduce(value.to(self.stage.device), reduce_op="sum").to(value.device)

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank."""
        if self.stage.trainer.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.stage.trainer.world_size
        torch.distributed.all_gather_object(found, value)
        return found

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        wait_for(self.stage.device)
        began = time.perf_counter()
        yield
        wait_for(self.stage.device)
        self.seconds[what] += time.perf_counter() - began


def _said(score: float) -> float | None:
    """A score; None where nothing was said."""
    return None if math.isnan(score) else score


def dealt(parts: Sequence[Sequence[Any]], rank: int, world: int) -> list[list[Any]]:
    """A rank's share of each part, dealt like cards: no rank has more than one more than another, of all together.

    Args:
        parts: What is dealt.
        rank: Whose share.
        world: Number of ranks.
    """
    before, mine = 0, []
    for part in parts:
        mine.append([*part[(rank - before) % world :: world]])
        before += len(part)
    return mine


@contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """Context in which the precision of the run is not that of other models; a validation is inside of the run's."""
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(was)


__all__ = ["Answered", "Rollouts", "dealt"]
