"""Training on rewards: PPO, GRPO, RLOO and their relatives.

One rollout: prompts are answered by the present policy, the answers are rewarded, scored and turned into advantages;
then the policy is updated on them for `update_epochs` times `num_minibatches` optimizer steps. The rollouts are what
the training loader yields, so optimization is Lightning's own, and everything that counts steps counts optimizer steps:

- `trainer.max_steps`, `global_step`, schedules, `warmup`, `val_check_interval`, `every_n_steps`: optimizer steps;
- an epoch: as many optimizer steps as it takes to answer every prompt once, `prompts / (batch_size x accumulate x
  ranks)` rollouts, rounded up. Where `target_kl` cuts rollouts short, an epoch holds more rollouts instead.

What is logged of a step, under the names that other trainers use:

- of its rollout, means over answers: `objective/scores` (weighted rewards), `objective/rlhf_reward` (shaped, with the
  penalty where it is part of the reward), `objective/kl` (nats an answer), `objective/alike` (share of the prompts
  whose answers all have one such reward: nothing is learned from them in comparison), `answers/length`,
  `answers/ended`, `answers/trained` (not masked, and some reward did not abstain); over tokens: `policy/entropy`
  (nats), `val/explained_variance`;
- of itself, means over tokens: `policy/approxkl` (nats, from the policy that drew), `policy/clipfrac`, `val/ratio`,
  `val/clipfrac`, and `loss/policy`, `loss/value` as they are reduced; `train/tokens_per_s` is that of its update alone;
- of the run so far: the shares of time `time/rollout`, `time/rewards`, `time/scoring`, `time/update`.
"""

from __future__ import annotations

import copy
import time
from typing import Any, ClassVar, NoReturn

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ftlit.batch import PackedBatch, StepTotals
from ftlit.callbacks.rollout_samples import RolloutSamples
from ftlit.data.prompts import PromptData, PromptOrder
from ftlit.errors import ConfigError
from ftlit.models.policy import disable_dropout
from ftlit.models.value import ValueHead, ValueModel, load_value_model, new_head
from ftlit.objectives.advantages import GAE, Advantage
from ftlit.objectives.kl import KLPenalty, kl_estimate
from ftlit.objectives.policy_gradient import PolicyLoss, PPOClip, value_loss
from ftlit.objectives.scores import TokenScores
from ftlit.peft import Full, PEFTStrategy
from ftlit.rollout.experience import Experience
from ftlit.rollout.generator import BatchedGenerator, Generator, Sampling
from ftlit.rollout.loader import Added, Resumed, RolloutLoader
from ftlit.rollout.rewards import Rewards, RewardShaping, RunningMoments
from ftlit.rollout.verifiers import Verifier
from ftlit.stages.base import MicroLoss, Stage
from ftlit.stages.held_out import HeldOut
from ftlit.stages.rollouts import Rollouts


class PPO(Stage):
    """Trains a policy on rewards of its own answers.

    Args:
        args: Arguments of every stage.
        reward: What an answer is worth: the import path of a function `(prompts, completions, **columns) ->
            list[float]` such as `mymodule.check`, a `Verifier`, or a list of those. In the place of a number it may say
            a list: a reward for each token of the column `completion_ids`.
        reward_weights: One number for each reward; 1 each when left out.
        shaping: Clipping, whitening, terms of end and length.
        advantage: How rewards become advantages: `GAE` (with a value head, when left out), `GRPO`, `RLOO`, `ReMax`.
        loss: The policy's loss: `PPOClip` when left out, `DAPO`, `DrGRPO`, `GSPO`, `CISPO`.
        kl: The penalty on the distance from the start of the run; with prefix and prompt tuning from the model without
            virtual tokens, so that it does not begin at 0.
        num_answers: Answers to each prompt.
        update_epochs: How often a rollout is gone through.
        num_minibatches: Optimizer steps each time; the answers to one prompt stay in one.
        max_new_tokens: Most tokens of an answer.
        temperature: Of the sampling, and of every probability of the update: ratios, entropy and KL are those of the
            distribution that the answers were drawn from.
        top_p: Sample from the likeliest tokens that together have this probability. Below 1 the first ratio is still 1,
            but ratios, entropy and KL are those of the distribution before it was cut.
        top_k: Sample from so many of the likeliest tokens; the same holds.
        min_p: Sample from tokens of at least this share of the likeliest one's probability; the same holds.
        stop: Texts that end an answer. It ends, is rewarded and trained up to and with the token that completes one of
            them, and counts as ended; no end token is put after it, as the policy did not say one.
        generator: Who draws the answers.
        entropy_coef: Weight of the mean entropy of the policy (nats a token), which is to stay high.
        value_coef: Weight of the value's loss.
        value_clip: How far a value may move from what it was; None: any way.
        value_lr: Peak learning rate of the values; `lr` when left out.
        value_detached: Whether the loss of a value head leaves the policy alone.
        value_model: A model of its own for the values, instead of a head on the policy: the hub id or folder of a
            language model (the policy's again, say) or of a reward model, with the policy's tokenizer.
        value_peft: What of it is trained; every weight when left out.
        target_kl: Policies further than this from the one that drew (`policy/approxkl`, nats a token) end the update;
            the step that finds it is taken, the next begins a new rollout. None: never.
        kwargs: Arguments of every stage.

    Raises:
        ConfigError: If a number is out of range, or settings contradict each other.
    """

    best_by = ("val/reward", "max")
    progress: ClassVar[dict[str, str]] = {"reward": "objective/scores", "kl": "objective/kl"}

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
        top_k: int | None = None,
        min_p: float = 0.0,
        stop: list[str] | None = None,
        generator: Generator | None = None,
        entropy_coef: float = 0.0,
        value_coef: float = 0.1,
        value_clip: float | None = 0.2,
        value_lr: float | None = None,
        value_detached: bool = False,
        value_model: str | Any | None = None,
        value_peft: PEFTStrategy | None = None,
        target_kl: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rewards = Rewards(
            reward if isinstance(reward, list) else [reward] if reward else [], reward_weights, shaping
        )
        self.advantage, self.policy_loss, self.kl = advantage or GAE(), loss or PPOClip(), kl or KLPenalty()
        self.num_answers, self.update_epochs, self.num_minibatches = num_answers, update_epochs, num_minibatches
        self.sampling = Sampling(num_answers, max_new_tokens, temperature, top_p, top_k, min_p, tuple(stop or ()))
        self.drawn_tokens = num_answers * max_new_tokens
        self.generator = generator or BatchedGenerator()
        self.entropy_coef, self.target_kl = entropy_coef, target_kl
        self.value_coef, self.value_clip, self.value_detached = value_coef, value_clip, value_detached
        self.value_lr = self.lr if value_lr is None else value_lr
        built = value_model is not None and not isinstance(value_model, str)  # it may be the policy: a copy
        self.value_source = (copy.deepcopy(value_model) if built else value_model,)  # a tuple, so that it is no child
        self.value_strategy = value_peft
        self._check()
        self.critic: ValueHead | ValueModel | None = None
        self.rollouts, self.held_out = Rollouts(self), HeldOut(self)
        self.loader: RolloutLoader | None = None
        self._resumed = Resumed()

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
        self.sampling.check("model")
        for name in ("entropy_coef", "value_coef"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("value_clip", "value_lr", "target_kl"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"model.{name} must be positive or left out, got {value}.")
        own = self.value_source[0] is not None
        if own and not self.advantage.uses_values:
            raise ConfigError(f"model.value_model: {type(self.advantage).__name__} has no use for values; use GAE.")
        if own and self.value_detached:
            raise ConfigError("model.value_detached is for a value head on the policy, not for model.value_model.")
        if self.value_strategy is not None and not own:
            raise ConfigError("model.value_peft says what is trained of model.value_model, which is missing.")

    # ---- model, optimizer, loader -----------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads the policy, remembers its start, and adds a value head where the advantage needs one."""
        there = self.policy is not None
        super().configure_model()
        assert self.policy is not None
        if not there:
            if disable_dropout(self.policy):
                say = "dropout    is off: the update compares probabilities of the same tokens"
                rank_zero_only(print)(say, flush=True)
            rank_zero_only(print)(f"rewards    {self._rewards_in_words()}", flush=True)
            if said := self._sampling_in_words():
                rank_zero_only(print)(f"sampling   {said}", flush=True)
            self.strategy.remember_start(self.policy.lm)
            if self.advantage.uses_values:
                self.critic = self._make_critic()
        self.rollouts.check_room()

    def _rewards_in_words(self) -> str:
        """What rewards answers, and what becomes of those that were cut."""
        pairs = zip(self.rewards.names, self.rewards.weights, strict=True)
        named = [name if weight == 1 else f"{weight:g} x {name}" for name, weight in pairs]
        limit = self.sampling.max_new_tokens
        return f"{', '.join(named)}; answers cut at {limit:,} tokens {self.rewards.treatment}"

    def _sampling_in_words(self) -> str:
        """What is not drawn of the policy's own distribution, and where answers stop; empty where nothing is so."""
        how, parts = self.sampling, list[str]()
        cut = {"top_p": how.top_p if how.top_p < 1 else None, "top_k": how.top_k, "min_p": how.min_p or None}
        if set_ := [f"{name} {value:g}" for name, value in cut.items() if value is not None]:
            parts.append(f"{', '.join(set_)}; probabilities of the update are those before this cut")
        if how.stop:
            listed = ", ".join(map(repr, how.stop))
            parts.append(f"answers also end with {listed}, and have no end token then")
        return "; ".join(parts)

    def _make_critic(self) -> ValueHead | ValueModel:
        assert self.policy is not None
        (source,) = self.value_source
        if source is None:
            return new_head(self.policy.lm, self.value_detached)
        strategy = self.value_strategy or Full()
        critic = load_value_model(
            source, strategy, self.tokenizer, self._load_dtype(strategy), self.gradient_checkpointing,
            self.trust_remote_code,
        )  # fmt: skip
        rank_zero_only(print)(f"values     {type(critic.lm).__name__}: {critic.num_trained:,} trained", flush=True)
        return critic

    def configure_callbacks(self) -> list[L.Callback]:
        """Keeps the answers, see `RolloutSamples`."""
        found = super().configure_callbacks()
        own = any(isinstance(callback, RolloutSamples) for callback in self.trainer.callbacks)
        return found if own else [*found, RolloutSamples()]

    def lr_factor(self, name: str) -> float:
        """The values have a rate of their own."""
        if not name.startswith("critic."):
            return super().lr_factor(name)
        own = 1.0 if self.value_strategy is None else self.value_strategy.lr_factor(name)
        return own * self.value_lr / self.lr

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The values' own come last: the rate that is logged is the policy's."""
        value = set() if self.critic is None else set(map(id, self.critic.parameters()))
        return sorted(super().parameter_groups(), key=lambda group: {id(p) for p in group["params"]} <= value)

    def setup(self, stage: str) -> None:
        """Checks that the data are prompts, and enough of them."""
        super().setup(stage)
        self.loader = None
        if stage == "fit":  # it may have been trained before
            self.rollouts, self.held_out, self._resumed = Rollouts(self), HeldOut(self), Resumed()
            self.rewards.running = RunningMoments()
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PromptData):
            raise ConfigError(f"PPO trains on prompts: use PromptData, not {type(data).__name__}.")
        self.rewards.check(data.known_columns)
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
        return self.trainer.datamodule

    @property
    def order(self) -> PromptOrder:
        """Which prompts each rollout takes."""
        return self.data.planner(self.accumulate, self.trainer.world_size)

    def plan_length(self, data: Any) -> int:
        """Optimizer steps of an epoch."""
        return len(data.planner(self.accumulate, self.trainer.world_size)) * self.update_epochs * self.num_minibatches

    def rollout_loader(self) -> RolloutLoader:
        """What the data module yields for training."""
        if self.loader is not None and self.loader.experience is not None:  # asked again: the run goes on
            self._resumed = Resumed(self.loader.experience)
        added = None
        if self.data.added_rows:
            added = Added(self.data.added_rows, self.data.max_tokens, self.trainer.global_rank, self.trainer.world_size)
        self.loader = RolloutLoader(
            self.rollouts.collect, lambda: self.trainer.global_step, self.plan_length(self.data), self.update_epochs,
            self.data.seed, *self._resumed, added,
        )  # fmt: skip
        return self.loader

    def steps_in_words(self, data: Any) -> str:
        """What a run consists of."""
        prompts = data.batch_size * self.accumulate * self.trainer.world_size
        return (
            f"{self.num_steps:,} optimizer steps: {self.update_epochs} x {self.num_minibatches} for each rollout of "
            f"{prompts:,} prompts x {self.num_answers} answers"
        )

    # ---- the update -------------------------------------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[str]:
        """Hidden states for the value head, the entropy for its bonus."""
        states = {"states"} if isinstance(self.critic, ValueHead) else set()
        return frozenset(states | ({"entropy"} if self.entropy_coef else set()))

    def scoring(self, batch: PackedBatch) -> dict[str, Any]:
        """Answers are scored at the temperature that they were drawn at, rows that controls added at 1."""
        return {} if any(batch.sources) else {"temperature": self.sampling.temperature}

    def micro_loss(self, batch: PackedBatch, scores: TokenScores) -> MicroLoss:
        """Losses of policy, value, KL and entropy, each token weighted as the policy's loss says."""
        known, real = batch.extras, batch.target_weights.to(scores.logps.dtype)
        owners = batch.target_segments.unique_consecutive(return_inverse=True)[1]
        logps = scores.logps.where(real > 0, known["old_logps"])  # a filler must not overflow
        policy = self.policy_loss(logps, known["old_logps"], known["advantages"], owners)
        loss = policy.loss
        log_ratios = (logps - known["old_logps"]).detach()
        ratios = log_ratios.exp()
        means = {
            "policy/approxkl": ratios - 1 - log_ratios,
            "policy/clipfrac": policy.clipped,
            "val/ratio": ratios,
        }
        totals = {"loss/policy": policy.loss}
        if self.kl.place == "loss" and (coef := self.rollouts.metrics["objective/kl_coef"]):
            loss = loss + coef * kl_estimate(logps, known["reference"], self.kl.estimator)
        if self.entropy_coef:
            assert scores.entropy is not None
            loss = loss - self.entropy_coef * scores.entropy
        if self.critic is not None:
            values = self.critic(batch, scores)
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
        self.rollouts.seconds["update"] += time.perf_counter() - self._started
        too_far = self.target_kl is not None and self.step_metrics["policy/approxkl"] > self.target_kl
        if too_far and self.loader is not None and self.loader.experience is not None:
            self.loader.experience.cut = True

    def step_summary(self, means: dict[str, float]) -> dict[str, float]:
        """Adds what the rollout was that the step belongs to, and the shares of the time so far."""
        seconds = self.rollouts.seconds
        spent = sum(seconds.values())
        shares = {f"time/{name}": value / spent for name, value in seconds.items()}
        return {**means, **self.rollouts.metrics, **shares}

    @property
    def of_a_step(self) -> list[str]:
        """What the update, its rollout and the clock give."""
        names = ["loss", "loss/policy", "policy/approxkl", "policy/clipfrac", "policy/entropy", "val/ratio"]
        names += [f"objective/{name}" for name in ("kl", "scores", "rlhf_reward", "scores_std", "kl_coef")]
        names += ["answers/length", "answers/ended", "answers/trained"]
        names += [f"time/{name}" for name in self.rollouts.seconds]
        if self.sampling.num_answers > 1:
            names.append("objective/alike")
        if self.advantage.uses_values:
            names += ["loss/value", "val/clipfrac", "val/explained_variance"]
        each = self.rewards.names
        return [*names, *(f"rewards/{name}" for name in each)] if len(each) > 1 else names

    def logged_at_validations(self, trainer: L.Trainer) -> list[str]:
        """What the answers to held-out prompts give, of every set."""
        return self.held_out.logged("val")

    # ---- validation and test ----------------------------------------------------------------------------------------

    def validation_step(self, batch: list[int], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answers some held-out prompts."""
        self.held_out.answer("val", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/reward`, `val/kl`, `val/length`, `val/ended`; of other sets `val/NAME/...`.

        `val/kl` is by how much likelier the policy finds its greedy answers than the start does, nats an answer: as a
        rule more than the divergence `objective/kl` of drawn answers.
        """
        super().on_validation_epoch_end()
        self.held_out.log("val")

    def test_step(self, batch: list[int], batch_idx: int) -> None:
        """Answers some test prompts."""
        self.held_out.answer("test", batch)

    def on_test_epoch_end(self) -> None:
        """Logs the same as `test/...`."""
        self.held_out.log("test")

    def predict_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Nothing: prompts have no file to predict.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("PPO has no rows for `ftlit predict`; use `ftlit generate`.")

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the rollout that the run is in, of every rank, and what steers it."""
        super().on_save_checkpoint(checkpoint)
        loader = self.loader
        present = None if loader is None else loader.experience
        checkpoint["ppo"] = {
            **self.rollouts.state_dict(),
            "rollouts": self.rollouts.gather(None if present is None else present.state_dict()),
            "next": 0 if loader is None else loader.next,
            "trained": 0 if loader is None else loader.trained,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on in the same rollout; with another number of ranks at the beginning of the next.

        Raises:
            ConfigError: If it is of another stage.
        """
        super().on_load_checkpoint(checkpoint)
        if "ppo" not in checkpoint:
            raise ConfigError("this checkpoint is not of PPO: start from its weights with --model.policy instead.")
        own = checkpoint["ppo"]
        self.rollouts.load_state_dict(own)
        ranks = own["rollouts"]
        if self._trainer is None:
            return
        self._resumed = Resumed(None, own["next"], own["trained"])
        if ranks[0] is not None and len(ranks) == self._trainer.world_size:
            self._resumed = Resumed(Experience.from_state(ranks[self._trainer.global_rank]))
        elif ranks[0] is not None:
            rank_zero_only(print)("note       another number of ranks: the run goes on with a new rollout", flush=True)


__all__ = ["PPO"]
