"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from ftlit.peft.selective import SelectiveStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(SelectiveStrategy):
    """Train every weight of the model."""

    trains_base: ClassVar[bool] = True

    @override
    def apply(self, model: PreTrainedModel) -> None:
        model.requires_grad_(True)


__all__ = ["Full"]
