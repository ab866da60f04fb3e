"""What the stages with a head on whole examples share: the model, validation, what is saved with the weights."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from ftlit.batch import StepTotals
from ftlit.data.padding import pad_token
from ftlit.errors import ConfigError
from ftlit.forgetting.base import ForgettingControl
from ftlit.models.heads import ScalarPolicy, reads_first
from ftlit.models.load import load_classifier
from ftlit.models.policy import recompute_activations
from ftlit.stages.validation import ValidatedStage


class ScalarStage(ValidatedStage):
    """Base of the stages that train a sequence classifier of transformers: a trunk and a head on each example.

    The policy can be a language model (its head over tokens goes, a new one comes), an encoder, or a classifier.
    """

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
        self._refuse_controls()
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        lm, new = load_classifier(
            self.source, self.outputs, self._load_dtype(), seed=seed, trust_remote_code=self.trust_remote_code
        )
        if "score" in new and not reads_first(lm):
            lm.config.get_text_config().pad_token_id = pad_token(self.tokenizer)
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
        parts = [f"{', '.join(new)} drawn anew with seed {seed}"] if new else []
        parts += [f"{', '.join(kept)} from the checkpoint"] if kept else []
        place = "first token" if reads_first(policy.lm) else "last token"
        pad = policy.lm.config.get_text_config().pad_token_id
        known = "" if pad is None or reads_first(policy.lm) else f" that is not the pad token {pad}"
        print(f"head       {'; '.join(parts)}; reads the {place}{known}; {len(names)} outputs: {outputs}", flush=True)

    def _refuse_controls(self) -> None:
        for control in self.controls if self._trainer is not None else ():
            rows = type(control).added_rows is not ForgettingControl.added_rows
            if rows or control.needs or type(control).kl is not ForgettingControl.kl:
                raise ConfigError(
                    f"{type(control).__name__} cannot be used here: it scores tokens, and the model that "
                    f"{type(self).__name__} trains has no output layer over tokens."
                )

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


__all__ = ["ScalarStage"]
