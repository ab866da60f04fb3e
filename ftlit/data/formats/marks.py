"""What a turn says of how much it is trained, whoever's mark it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlit.data.formats.base import RowError, note, number_of, show

# Marks that say yes or no: axolotl's and ours.
_SWITCHES = ("train", "training", "trainable")
# Marks that are a weight, where yes is 1: of OpenAI, Mistral and Together, of LLaMA-Factory, of ms-swift, of others.
_WEIGHTS = ("weight", "loss_weight", "loss_scale", "loss", "loss_mask")
# A mark that says the opposite: torchtune's.
_MASKED = "masked"
MARKS = (*_SWITCHES, *_WEIGHTS, _MASKED, "train_detail", "mask")
"""Every key of a turn that is a mark."""


def weight_of_turn(turn: Mapping[str, Any], place: str) -> float:
    """How much the tokens of a turn count: 1 where no mark says anything, 0 where one says that it is not trained.

    The marks are `weight`, `loss_weight`, `loss_scale`, `loss` and `loss_mask` (a number, or true or false), and
    `train`, `training` and `trainable` (true or false), and `masked`, which says the opposite.

    Args:
        turn: The turn.
        place: What to call it in an error.

    Raises:
        RowError: If a mark is of another kind, two contradict each other, or one cannot be followed.
    """
    if turn.keys().isdisjoint(MARKS):
        return 1.0
    _refuse_unclear(turn, place)
    said = {key: _said(turn, key, place) for key in (*_SWITCHES, _MASKED, *_WEIGHTS) if turn.get(key) not in (None, "")}
    if not said:
        return 1.0
    _refuse_contradiction(turn, said, place)
    return next((weight for weight in said.values() if weight != 1), 1.0)


def note_of_others(turn: Mapping[str, Any]) -> None:
    """Notes a turn of a user, a system or a tool that is marked as trained, which it is not."""
    if any(turn.get(key) in (True, 1) for key in (*_SWITCHES, "loss", "loss_mask")):
        note("turns that are no answers are marked as trained: data.train_on decides, and trains answers by itself")


def _said(turn: Mapping[str, Any], key: str, place: str) -> float:
    """The weight that one mark means."""
    value = turn[key]
    if key in (*_SWITCHES, _MASKED):
        if value not in (0, 1):
            raise RowError(f"{place}.{key}", "true or false", value)
        return float(not value if key == _MASKED else value)
    if isinstance(value, bool):
        return float(value)
    return number_of(turn, key, 1.0, f"{place}.{key}")


def _refuse_contradiction(turn: Mapping[str, Any], said: Mapping[str, float], place: str) -> None:
    """Stops where one mark says that a turn is trained and another that it is not, or two weights differ."""
    first, weight = next(iter(said.items()))
    for key, other in said.items():
        if bool(other) != bool(weight) or (other != weight and 1 not in (other, weight)):
            raise RowError(f"{place}.{key}", f"what the turn's {first} says ({show(turn[first])})", turn[key])
        if weight == 1:  # yes says nothing against a weight
            first, weight = key, other


def _refuse_unclear(turn: Mapping[str, Any], place: str) -> None:
    """Stops at marks that cannot be followed."""
    detail = turn.get("train_detail")
    if detail and not all(isinstance(part, Mapping) and part.get("train") is True for part in detail):
        raise RowError(
            f"{place}.train_detail",
            "nothing that leaves out a part of a turn: a turn is trained whole or not at all (train: false)",
            detail,
        )
    if turn.get("mask") not in (None, ""):
        raise RowError(
            f"{place}.mask",
            "nothing: does it mean trained, or left out? Call it train (true or false) or weight",
            turn["mask"],
        )
