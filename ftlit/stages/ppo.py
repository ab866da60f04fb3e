"""Training on rewards: PPO, GRPO, RLOO and their relatives.

One rollout: prompts are answered by the present policy, the answers are rewarded, scored and turned into advantages;
then the policy is updated on them for `update_epochs` times `num_minibatches` optimizer steps. The rollouts are what
the training loader yields, so optimization is Lightning's own, and everything that counts steps counts optimizer steps:

- `trainer.max_steps`, `global_step`, schedules, `warmup`, `val_check_interval`, `every_n_steps`: optimizer steps;
- an epoch: as many optimizer steps as it takes to answer every prompt once, `prompts / (batch_size x accumulate x
  ranks)` rollouts, rounded up. Where `target_kl` cuts rollouts short, an epoch holds more rollouts instead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ftlit.batch import PackedBatch, StepTotals
from ftlit.callbacks.rollout_samples import RolloutSamples
from ftlit.data.datamodules import MAIN
from ftlit.data.prompts import PromptData, PromptOrder, PromptRow
from ftlit.errors import ConfigError
from ftlit.models.policy import disable_dropout
from ftlit.models.value import ValueHead
from ftlit.objectives.advantages import GAE, Advantage, Outcome, moments, sums
from ftlit.objectives.kl import KLPenalty, kl_estimate
from ftlit.objectives.policy_gradient import PolicyLoss, PPOClip, reduction_weights, value_loss
from ftlit.objectives.scores import TokenScores
from ftlit.rollout.experience import Experience, cut
from ftlit.rollout.generate import Answer, seed_of
from ftlit.rollout.generator import BatchedGenerator, Generator, Sampling
from ftlit.rollout.loader import RolloutLoader
from ftlit.rollout.rewards import RewardShaping, Rewards
from ftlit.rollout.verifiers import Verifier
from ftlit.stages.base import MicroLoss, Stage


class PPO(Stage):
    """Trains a policy on rewards of its own answers.

    Args:
        args: Arguments of every stage.
        reward: What an answer is worth: the import path of a function `(prompts, completions, **columns) ->
            list[float]` such as `mymodule.check`, a `Verifier`, or a list of those.
        reward_weights: One number for each reward; 1 each when left out.
        shaping: Clipping, whitening, terms of end and length.
        advantage: How rewards become advantages: `GAE` (with a value head, when left out), `GRPO`, `RLOO`, `ReMax`.
        loss: The policy's loss: `PPOClip` when left out, `DAPO`, `DrGRPO`, `GSPO`, `CISPO`.
        kl: The penalty on the distance from the start of the run.
        num_answers: Answers to each prompt.
        update_epochs: How often a rollout is gone through.
        num_minibatches: Optimizer steps each time; the answers to one prompt stay in one.
        max_new_tokens: Most tokens of an answer.
        temperature: Of the sampling. The update takes probabilities at temperature 1, so others make it inexact.
        top_p: Sample from the likeliest tokens that together have this probability; others than 1 likewise.
        generator: Who draws the answers.
        entropy_coef: Weight of the mean entropy of the policy (nats a token), which is to stay high.
        value_coef: Weight of the value's loss.
        value_clip: How far a value may move from what it was; None: any way.
        value_lr: Peak learning rate of the value head; `lr` when left out.
        value_detached: Whether the value's loss leaves the policy alone.
        target_kl: Policies further than this from the one that drew (`policy/approxkl`, nats a token) end the update;
            the next step begins a new rollout. None: never.
        kwargs: Arguments of every stage.

    Raises:
        ConfigError: If a number is out of range, or settings contradict each other.
    """

    monitored = ("val/reward", "max")

    def __init__(
        self,
        *args: Any,
        reward: Verifier | str | list[Verifier | str] | None = None,
        reward_weights: list[float] | None = None,
        shaping: RewardShaping | None = None,
        advantage: Advantage | None = None,
        loss: PolicyLoss | None = None,
        kl: KLPenalty | None = None,
        num_answers: int = 1,
        update_epochs: int = 2,
        num_minibatches: int = 2,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: Generator | None = None,
        entropy_coef: float = 0.0,
        value_coef: float = 0.1,
        value_clip: float | None = 0.2,
        value_lr: float | None = None,
        value_detached: bool = False,
        target_kl: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rewards = Rewards(reward if isinstance(reward, list) else [reward] if reward else [], reward_weights, shaping)
        self.advantage, self.policy_loss, self.kl = advantage or GAE(), loss or PPOClip(), kl or KLPenalty()
        self.num_answers, self.update_epochs, self.num_minibatches = num_answers, update_epochs, num_minibatches
        self.sampling = Sampling(num_answers, max_new_tokens, temperature, top_p)
        self.generator = generator or BatchedGenerator()
        self.entropy_coef, self.target_kl = entropy_coef, target_kl
        self.value_coef, self.value_clip, self.value_detached = value_coef, value_clip, value_detached
        self.value_lr = value_lr or self.lr
        self._check()
        self.value_head: ValueHead | None = None
        self.kl_coef = self.kl.coef
        self.samples: list[dict[str, Any]] = []
        self.rollouts: RolloutLoader | None = None
        self._resumed: tuple[Experience | None, int] = (None, 0)
        self._of_rollout: dict[str, float] = {}
        self._seconds = {"rollout": 0.0, "scoring": 0.0, "update": 0.0}
        self._val: dict[str, Tensor] = {}

    def _check(self) -> None:
        least = self.advantage.least_answers
        for name, value, lowest in (
            ("num_answers", self.num_answers, least),
            ("update_epochs", self.update_epochs, 1),
            ("num_minibatches", self.num_minibatches, 1),
            ("max_new_tokens", self.sampling.max_new_tokens, 1),
        ):
            if value < lowest:
                why = f" with {type(self.advantage).__name__}" if lowest > 1 else ""
                raise ConfigError(f"model.{name} must be at least {lowest}{why}, got {value}.")
        if self.sampling.temperature <= 0 or not 0 < self.sampling.top_p <= 1:
            raise ConfigError(
                "PPO draws its answers: model.temperature must be positive and top_p in (0, 1]; got "
                f"{self.sampling.temperature} and {self.sampling.top_p}."
            )
        for name in ("entropy_coef", "value_coef"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("value_clip", "value_lr", "target_kl"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"model.{name} must be positive or left out, got {value}.")

    # ---- model, optimizer, loader -----------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads the policy, remembers its start, and adds a value head where the advantage needs one."""
        if self.policy is not None:
            return
        super().configure_model()
        assert self.policy is not None
        if disable_dropout(self.policy):
            rank_zero_only(print)("dropout    is off: the update compares probabilities of the same tokens", flush=True)
        self.strategy.remember_start(self.policy.lm)
        if self.advantage.uses_values:
            dtype = torch.promote_types(self.policy.lm.dtype, torch.float32)
            self.value_head = ValueHead(self.policy.lm.config.hidden_size, self.value_detached, dtype)

    def configure_callbacks(self) -> list[L.Callback]:
        """Keeps the answers in `rollouts.jsonl`."""
        return [RolloutSamples()]

    def lr_factor(self, name: str) -> float:
        """The value head has a rate of its own."""
        return self.value_lr / self.lr if name.startswith("value_head.") else super().lr_factor(name)

    def setup(self, stage: str) -> None:
        """Checks that the data are prompts, and enough of them."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PromptData):
            raise ConfigError(f"PPO trains on prompts: use PromptData, not {type(data).__name__}.")
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ConfigError("PPO cannot answer with a model whose weights are sharded; use ddp.")
        prompts = data.batch_size * self.accumulate * self.trainer.world_size
        if stage == "fit" and prompts < self.num_minibatches:
            raise ConfigError(
                f"model.num_minibatches is {self.num_minibatches}, but a rollout has {prompts} prompts; raise "
                "data.batch_size."
            )

    @property
    def data(self) -> PromptData:
        """The prompts."""
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    @property
    def order(self) -> PromptOrder:
        """Which prompts each rollout takes."""
        return self.data.planner(self.accumulate, self.trainer.world_size)  # type: ignore[no-any-return]

    def _plan_length(self, data: Any) -> int:
        return len(data.planner(self.accumulate, self.trainer.world_size)) * self.update_epochs * self.num_minibatches

    def rollout_loader(self) -> RolloutLoader:
        """What the data module yields for training."""
        experience, first = self._resumed
        self.rollouts = RolloutLoader(
            self.collect, lambda: self.trainer.global_step, self._plan_length(self.data), self.update_epochs,
            self.data.seed, experience, first,
        )  # fmt: skip
        return self.rollouts

    def steps_in_words(self, data: Any) -> str:
        """What a run consists of."""
        prompts = data.batch_size * self.accumulate * self.trainer.world_size
        return (
            f"{self.num_steps:,} optimizer steps: {self.update_epochs} x {self.num_minibatches} for each rollout of "
            f"{prompts:,} prompts x {self.num_answers} answers"
        )

    # ---- a rollout --------------------------------------------------------------------------------------------------

    def collect(self, number: int) -> Experience:
        """Draws, rewards and scores the answers of one rollout, and estimates their advantages.

        Args:
            number: Which rollout of the run; it decides the prompts and all that is drawn.
        """
        assert self.policy is not None
        parts = [self.order.rollout(number)[m :: self.num_minibatches] for m in range(self.num_minibatches)]
        mine = [part[self.trainer.global_rank :: self.trainer.world_size] for part in parts]
        places = [place for part in mine for place, _ in part]
        rows = [self.data.rows["train"][row] for part in mine for _, row in part]
        with self._timed("rollout"):
            seeds = [seed_of(self.data.seed, place, k) for place in places for k in range(self.num_answers)]
            answers = self._draw(rows, seeds, self.sampling)
            said = self._reward(rows, answers, self.num_answers)
            baselines = self._greedy_rewards(rows) if self.advantage.uses_greedy else None
        with self._timed("scoring"):
            step = self.trainer.global_step
            found = Experience(
                number, step, [row.input_ids for row in rows], [row for part in mine for _, row in part],
                [one.drawn for one in answers], [i // self.num_answers for i in range(len(answers))],
            )  # fmt: skip
            self._cut(found, [len(part) for part in mine])
            tokens = self._score(found, [micro for one in found.steps for micro in one])
            self._estimate(found, tokens, said, answers, baselines)
        self._keep("train", rows, answers, said, found, self.num_answers)
        return found

    def _draw(self, rows: Sequence[PromptRow], seeds: Sequence[int], sampling: Sampling) -> list[Answer]:
        assert self.policy is not None
        if not rows:
            return []
        quiet = not self.trainer.is_global_zero
        with self.trainer.precision_plugin.forward_context():
            prompts = [row.input_ids for row in rows]
            return self.generator(self.policy.lm, self.strategy, self.tokenizer, prompts, seeds, sampling, quiet)

    def _reward(self, rows: Sequence[PromptRow], answers: Sequence[Answer], each: int) -> Tensor:
        """What each reward says, `[K, S]`."""
        repeated = [row for row in rows for _ in range(each)]
        names = sorted({name for row in repeated for name in row.columns})
        columns: dict[str, list[Any]] = {"reference": [row.reference for row in repeated]}
        columns |= {name: [row.columns.get(name) for row in repeated] for name in names}
        texts = [self._text(one) for one in answers]
        with isolate_rng():  # a reward may draw too
            return self.rewards([row.turns for row in repeated], texts, columns) if rows else torch.zeros(
                len(self.rewards.functions), 0
            )  # fmt: skip

    def _text(self, answer: Answer) -> str:
        return str(self.tokenizer.decode(answer.tokens, skip_special_tokens=True)).strip()

    def _greedy_rewards(self, rows: Sequence[PromptRow]) -> Tensor:
        """The shaped reward of the greedy answer to each prompt, once an answer, `[S]`."""
        greedy = self._draw(rows, [0] * len(rows), self.sampling._replace(num_answers=1, temperature=0.0))
        scores = self._shaped(self.rewards.weighted(self._reward(rows, greedy, 1)), greedy, learn=False)
        return scores.repeat_interleave(self.num_answers)

    def _shaped(self, scores: Tensor, answers: Sequence[Answer], learn: bool) -> Tensor:
        lengths = torch.tensor([len(one.drawn) for one in answers], dtype=torch.int64)
        ended = torch.tensor([one.ended for one in answers], dtype=torch.bool)
        return self.rewards.shaped(scores, lengths, ended, self._total, learn)

    def _cut(self, found: Experience, prompts: Sequence[int]) -> None:
        """Cuts a rollout into minibatches of whole prompts, and these into as many micro-batches on every rank."""
        stops = torch.tensor(prompts).cumsum(0).tolist()
        cuts, counts = [], []
        for start, stop in zip([0, *stops[:-1]], stops, strict=True):
            chosen = [i for i, owner in enumerate(found.owners) if start <= owner < stop]
            lengths = [len(found.answers[i]) for i in chosen]
            micros = cut(
                [found.owners[i] for i in chosen], [len(prompt) for prompt in found.prompts], lengths, self.data.max_tokens
            )
            cuts.append([tuple(chosen[i] for i in micro) for micro in micros])
            total = sum(lengths) + sum(len(prompt) for prompt in found.prompts[start:stop])
            counts.append([len(micros), sum(lengths), total, len(chosen)])
        ranks = self._gather(counts)
        for number, micros in enumerate(cuts):
            most = max(rank[number][0] for rank in ranks)
            found.steps.append([*micros, *[()] * (most - len(micros))])
            targets, tokens, answers = (sum(rank[number][i] for rank in ranks) for i in (1, 2, 3))
            found.totals.append(StepTotals(float(targets), targets, tokens, answers))

    @torch.no_grad()
    def _score(self, found: Experience, micros: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        """What policy and start say of each token, on the very path and in the very packs of the update."""
        assert self.policy is not None
        wanted = {"states"} if self.value_head is not None else set()
        filled = [micro for micro in micros if micro]
        parts: dict[str, list[Tensor]] = {"old_logps": [], "reference": [], "entropy": [], "values": []}
        with self.trainer.precision_plugin.forward_context():
            batches = [found.pack(micro).to(self.device) for micro in filled]
            for batch in batches:
                scores = self.policy(batch, needs=wanted, watch={"entropy"})
                parts["old_logps"].append(scores.logps)
                parts["entropy"].append(scores.entropy)
                if self.value_head is not None:
                    parts["values"].append(self.value_head(scores.states))
            with self.strategy.start(self.policy.lm):
                parts["reference"] += [self.policy(batch).logps for batch in batches]
        places = torch.cat([found.places(micro) for micro in filled]) if filled else torch.zeros(0, dtype=torch.int64)
        tokens = {}
        for name, values in parts.items():
            if values or not filled:
                flat = torch.cat(values).cpu() if values else torch.zeros(0)
                tokens[name] = torch.empty_like(flat).index_copy(0, places, flat)
        return tokens

    def _estimate(
        self,
        found: Experience,
        tokens: dict[str, Tensor],
        said: Tensor,
        answers: Sequence[Answer],
        baselines: Tensor | None,
    ) -> None:
        """Rewards become advantages; the weight of the KL penalty is steered; the metrics of the rollout are counted."""
        old, reference = tokens["old_logps"], tokens["reference"]
        owners, lengths, values = found.token_owners, found.lengths, tokens.get("values")
        raw = self.rewards.weighted(said)
        scores = self._shaped(raw, answers, learn=True).to(old.dtype)
        penalty = torch.zeros_like(old)
        if self.kl.place == "reward":
            penalty = -self.kl_coef * kl_estimate(old, reference, self.kl.estimator)
        baselines = None if baselines is None else baselines.to(old.dtype)
        outcome = Outcome(scores, penalty, owners, torch.tensor(found.owners, dtype=torch.int64), values, baselines)
        estimate = self.advantage(outcome, self._total)
        found.tokens = {"old_logps": old, "reference": reference, "advantages": estimate.advantages}
        if self.value_head is not None:
            assert values is not None and estimate.returns is not None
            found.tokens |= {"values": values, "returns": estimate.returns}
        weights = torch.zeros(len(old), dtype=torch.float64)
        for step, total in zip(found.steps, found.totals, strict=True):
            places = found.places(tuple(one for micro in step for one in micro))
            weights[places] = reduction_weights(
                self.policy_loss.reduction, lengths, owners[places], total.targets, total.examples,
                self.sampling.max_new_tokens,
            )  # fmt: skip
        found.tokens["weights"] = weights.to(old.dtype)

        apart = sums(old - reference, owners, len(answers))
        ended = torch.tensor([float(one.ended) for one in answers])
        means = {
            "objective/kl": apart, "objective/scores": raw, "objective/rlhf_reward": outcome.rewards,
            "answers/length": lengths, "answers/ended": ended, "policy/entropy": tokens["entropy"],
        }  # fmt: skip
        if len(said) > 1:
            means |= {f"rewards/{name}": one for name, one in zip(self.rewards.names, said, strict=True)}
        metrics = {name: float(moments(value, self._total)[1]) for name, value in means.items()}
        metrics["objective/scores_std"] = float(moments(raw, self._total)[2].sqrt())
        metrics["objective/kl_coef"] = self.kl_coef
        if estimate.returns is not None and values is not None:
            error, spread = (moments(one, self._total)[2] for one in (estimate.returns - values, estimate.returns))
            metrics["val/explained_variance"] = float(1 - error / spread) if spread > 0 else 0.0
        self.kl_coef = self.kl.adapted(self.kl_coef, metrics["objective/kl"])
        self._of_rollout = metrics

    # ---- the update -------------------------------------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[str]:
        """Hidden states for the value head, the entropy for its bonus."""
        states = {"states"} if self.value_head is not None else set()
        return frozenset(states | ({"entropy"} if self.entropy_coef else set()))

    def micro_loss(self, batch: PackedBatch, scores: TokenScores) -> MicroLoss:
        """Losses of policy, value, KL and entropy, each token weighted as the policy's loss says."""
        known, real = batch.extras, batch.target_weights
        owners = batch.target_segments.unique_consecutive(return_inverse=True)[1]
        policy = self.policy_loss(scores.logps, known["old_logps"], known["advantages"], owners)
        loss = policy.loss
        log_ratios = (scores.logps - known["old_logps"]).detach()
        ratios = log_ratios.exp()
        means = {
            "policy/approxkl": ratios - 1 - log_ratios,
            "policy/clipfrac": policy.clipped,
            "val/ratio": ratios,
        }
        totals = {"loss/policy": policy.loss}
        if self.kl.place == "loss" and self.kl_coef:
            loss = loss + self.kl_coef * kl_estimate(scores.logps, known["reference"], self.kl.estimator)
        if self.entropy_coef:
            assert scores.entropy is not None
            loss = loss - self.entropy_coef * scores.entropy
        if self.value_head is not None:
            assert scores.states is not None
            values = self.value_head(scores.states)
            of_value, clipped = value_loss(values, known["values"], known["returns"], self.value_clip)
            loss = loss + self.value_coef * of_value
            means["val/clipfrac"] = clipped
            totals["loss/value"] = of_value
        weights = known["weights"] * real
        sums_ = {name: (value.detach() * weights).sum() for name, value in {**totals, "loss": loss}.items()}
        sums_ |= {name: (value * real).sum() for name, value in means.items()}
        return MicroLoss((loss * weights).sum(), sums_)

    def total(self, totals: StepTotals) -> float:
        """The tokens of the step's answers."""
        return totals.weight

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps; ends the update where it has gone too far."""
        super().optimizer_step(*args, **kwargs)
        self._seconds["update"] += time.perf_counter() - self._started
        far = self.step_metrics["policy/approxkl"]
        if self.target_kl is not None and far > self.target_kl and self.rollouts is not None:
            assert self.rollouts.experience is not None
            self.rollouts.experience.cut = True

    def step_summary(self, means: dict[str, float]) -> dict[str, float]:
        """Adds what the rollout was, to the first of its steps, and where the time went."""
        spent = sum(self._seconds.values()) or 1.0
        shares = {f"time/{name}": seconds / spent for name, seconds in self._seconds.items()}
        rollout, self._of_rollout = self._of_rollout, {}
        return {**means, **rollout, **(shares if rollout else {})}

    # ---- validation and test ----------------------------------------------------------------------------------------

    def _validate_rows(self, loop: str, numbers: Sequence[int], which: int) -> None:
        """Answers some held-out prompts greedily and adds what became of them."""
        if not numbers:
            return
        name = self._names(loop)[which]
        rows = [self.data.rows["test" if loop == "test" else f"validation:{name}"][i] for i in numbers]
        answers = self._draw(rows, [0] * len(rows), self.sampling._replace(num_answers=1, temperature=0.0))
        said = self._reward(rows, answers, 1)
        found = Experience(-1, 0, [row.input_ids for row in rows], numbers, [one.drawn for one in answers], range(len(rows)))
        micros = cut(found.owners, [len(p) for p in found.prompts], [len(a) for a in found.answers], self.data.max_tokens)
        tokens = self._score(found, micros)
        apart = sums(tokens["old_logps"] - tokens["reference"], found.token_owners, len(rows))
        each = [self.rewards.weighted(said), apart, found.lengths, torch.tensor([one.ended for one in answers]), *said]
        counts = torch.stack([torch.tensor(float(len(rows))), *(one.sum().float() for one in each)]).double()
        self._val[name] = self._val.get(name, torch.zeros_like(counts)) + counts
        self._keep(name if loop == "val" else loop, rows, answers, said, found, 1)

    def _names(self, loop: str) -> list[str]:
        return self.data.validation_names if loop == "val" else [MAIN]

    def _log_validation(self, loop: str) -> None:
        keys = ["reward", "kl", "length", "ended", *(f"rewards/{name}" for name in self.rewards.names)]
        values: dict[str, float] = {}
        for name in self._names(loop):
            counts = self._total(self._val.get(name, torch.zeros(len(keys) + 1, dtype=torch.float64)))
            place = loop if name == MAIN else f"{loop}/{name}"
            means = dict(zip(keys, (counts[1:] / counts[0]).tolist(), strict=True))
            values |= {f"{place}/{key}": v for key, v in means.items() if "/" not in key or len(self.rewards.names) > 1}
        self._val = {}
        self.log_evaluation(loop, values)

    def validation_step(self, batch: list[int], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answers some held-out prompts."""
        self._validate_rows("val", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/reward`, `val/kl` (nats an answer), `val/length`, `val/ended`; of other sets `val/NAME/...`."""
        super().on_validation_epoch_end()
        self._log_validation("val")

    def test_step(self, batch: list[int], batch_idx: int) -> None:
        """Answers some test prompts."""
        self._validate_rows("test", batch, 0)

    def on_test_epoch_end(self) -> None:
        """Logs the same as `test/...`."""
        self._log_validation("test")

    # ---- small parts ------------------------------------------------------------------------------------------------

    def _keep(
        self,
        kind: str,
        rows: Sequence[PromptRow],
        answers: Sequence[Answer],
        said: Tensor,
        found: Experience,
        each: int,
    ) -> None:
        """Remembers answers with their rewards, for `RolloutSamples`."""
        for number, one in enumerate(answers):
            row = rows[number // each]
            self.samples.append(
                {
                    "step": self.trainer.global_step, "set": kind, "rollout": found.number, "prompt": row.turns,
                    "answer": self._text(one), "tokens": len(one.drawn), "ended": one.ended,
                    "reward": float(self.rewards.weighted(said)[number]),
                    **{f"reward/{name}": float(said[i, number]) for i, name in enumerate(self.rewards.names)},
                }  # fmt: skip
            )

    def _total(self, value: Tensor) -> Tensor:
        """Sum over the ranks."""
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value.to(self.device), reduce_op="sum").to(value.device)  # type: ignore[union-attr, no-any-return]

    def _gather(self, value: Any) -> list[Any]:
        """The value of every rank."""
        if self.trainer.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(found, value)
        return found

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - began

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the rollout that the run is in, of every rank, and what steers it."""
        super().on_save_checkpoint(checkpoint)
        present = None if self.rollouts is None else self.rollouts.experience
        checkpoint["ppo"] = {
            "rollouts": self._gather(None if present is None else present.state_dict()),
            "kl_coef": self.kl_coef,
            "running": self.rewards.running.state_dict(),
            "seconds": dict(self._seconds),
            "of_rollout": dict(self._of_rollout),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on in the same rollout; with another number of ranks at the beginning of the next."""
        super().on_load_checkpoint(checkpoint)
        own = checkpoint["ppo"]
        self.kl_coef, self._seconds = own["kl_coef"], dict(own["seconds"])
        self._of_rollout = dict(own["of_rollout"])
        self.rewards.running.load_state_dict(own["running"])
        ranks = own["rollouts"]
        if self._trainer is None or ranks[0] is None:
            return
        if len(ranks) == self._trainer.world_size:
            self._resumed = (Experience.from_state(ranks[self._trainer.global_rank]), 0)
        else:
            self._resumed = (None, ranks[0]["number"] + 1)
            rank_zero_only(print)("note       another number of ranks: the run goes on with a new rollout", flush=True)


__all__ = ["PPO"]
