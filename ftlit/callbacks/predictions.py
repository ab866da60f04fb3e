"""Answers of `ftlit predict` as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter


class WritePredictions(BasePredictionWriter):
    """Writes `predictions.jsonl` into the run folder: the messages of each row with the generated answer."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        """Writes all rows at once; every rank has answered all of them."""
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule
        answers = [answer for batch in predictions for answer in batch]
        path = Path(trainer.default_root_dir) / "predictions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for (conversation, _), answer in zip(
                data.prompts, answers, strict=False
            ):  # fewer answers with limit_predict_batches
                turns = [message.turn() for message in conversation.messages]
                turns.append({"role": "assistant", "content": answer})
                file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
        print(f"{len(answers)} answers in {path}")
