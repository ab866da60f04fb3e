"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from ftlit.peft.parts import beside_text
from ftlit.peft.selective import SelectiveStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(SelectiveStrategy):
    """Train every weight of the model that text runs through."""

    @override
    def apply(self, model: PreTrainedModel) -> None:
        model.requires_grad_(True)
        for name in beside_text(model):
            model.get_submodule(name).requires_grad_(False)

    @override
    def notes(self, model: PreTrainedModel) -> list[str]:
        names = beside_text(model)
        return [f"frozen, as text does not run through it: {', '.join(names)}"] if names else []


__all__ = ["Full"]
