"""What the stages with a head on whole examples share: the model, validation, what is saved with the weights."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from ftlit.batch import StepTotals
from ftlit.callbacks.generation_eval import GenerationEval
from ftlit.data.padding import pad_token
from ftlit.errors import ConfigError
from ftlit.forgetting import EWC, ForgettingBudget, ForgettingControl, ForgettingProbe
from ftlit.models.heads import ScalarPolicy, reads_first
from ftlit.models.load import load_classifier
from ftlit.models.policy import recompute_activations
from ftlit.stages.validation import ValidatedStage


class ScalarStage(ValidatedStage):
    """Base of the stages that train a sequence classifier of transformers: a trunk and a head on each example.

    The policy can be a language model (its head over tokens goes, a new one comes), an encoder, or a classifier.
    """

    zero_head: ClassVar[bool] = False
    """Whether a new head on a decoder starts at zero; else as transformers draws it."""

    # ---- what a stage says ----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def outputs(self) -> list[str]:
        """Names of the outputs of the head."""

    def total(self, totals: StepTotals) -> float:
        """The weight of the step's targets."""
        return totals.weight

    # ---- the model ------------------------------------------------------------------------------------------------

    @override
    def make_policy(self) -> Any:
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        lm, new = load_classifier(
            self.source,
            self.outputs,
            self._load_dtype(self.strategy),
            seed=seed,
            trust_remote_code=self.trust_remote_code,
        )
        if "score" in new and not reads_first(lm):
            lm.config.get_text_config().pad_token_id = pad_token(self.tokenizer)
            if self.zero_head:
                torch.nn.init.zeros_(lm.get_submodule("score").get_parameter("weight"))
        if self.gradient_checkpointing:
            recompute_activations(lm)
        policy = ScalarPolicy(lm, self.strategy, new)
        self._say_head(policy, new, seed)
        return policy

    @rank_zero_only
    def _say_head(self, policy: ScalarPolicy, new: list[str], seed: int) -> None:
        names = self.outputs
        outputs = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        kept = [name for name in policy.head if name not in new]
        how = "new, at zero" if self.zero_head and new == ["score"] else f"drawn anew with seed {seed}"
        parts = [f"{', '.join(new)} {how}"] if new else []
        parts += [f"{', '.join(kept)} from the checkpoint"] if kept else []
        place = "first token" if reads_first(policy.lm) else "last token"
        pad = policy.lm.config.get_text_config().pad_token_id
        count = "1 output" if len(names) == 1 else f"{len(names)} outputs"
        known = "" if pad is None or reads_first(policy.lm) else f" that is not the pad token {pad}"
        print(f"head       {'; '.join(parts)}; reads the {place}{known}; {count}: {outputs}", flush=True)

    def configure_callbacks(self) -> list[Any]:
        """Also refuses callbacks that ask the model for tokens; those that only look at its weights are fine.

        Lightning calls this before any callback prepares itself.

        Raises:
            ConfigError: Naming the first that is refused.
        """
        if self._trainer is None:
            return []
        for callback in self.trainer.callbacks:
            known = isinstance(callback, EWC | ForgettingBudget | ForgettingProbe | GenerationEval)
            if known or (isinstance(callback, ForgettingControl) and _reads_tokens(callback)):
                raise ConfigError(
                    f"{type(callback).__name__} cannot be used here: it needs scores of tokens or text, and the model "
                    f"that {type(self).__name__} trains has no output layer over tokens."
                )
        return super().configure_callbacks()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        assert self.policy is not None
        checkpoint["ftlit"]["classifier"] = self.about_head()

    def about_head(self) -> dict[str, Any]:
        """What is needed besides config and weights to make the model again."""
        assert self.policy is not None
        config = self.policy.lm.config
        return {
            "outputs": self.outputs,
            "pad_token_id": config.get_text_config().pad_token_id,
            "problem_type": config.problem_type,
        }

    def predict_step(self, batch: Any, batch_idx: int) -> list[str]:
        """Refused: a head on whole examples writes no answers.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{type(self).__name__} writes no answers, so there is nothing to predict; use ftlit score.")


def _reads_tokens(control: ForgettingControl) -> bool:
    kind, base = type(control), ForgettingControl
    return bool(control.needs) or kind.added_rows is not base.added_rows or kind.kl is not base.kl


__all__ = ["ScalarStage"]
