"""A stage as a callback sees it before training: attached to a trainer, its model built."""

import lightning as L
import torch

from ftlit.peft import LoRA
from ftlit.stages import SFT
from ftlit.testing import tiny_lm, tiny_tokenizer


def stage_of(peft=None, chat=True, seed=0, dtype=torch.float32, family="llama", precision="32-true"):
    stage = SFT(policy=tiny_lm(family, dtype, seed), peft=peft or LoRA(rank=2))
    stage.tokenizer = tiny_tokenizer() if chat else tiny_tokenizer(chat_template=None)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, precision=precision,
    )  # fmt: skip
    stage.trainer = trainer
    trainer.strategy.connect(stage)
    stage.configure_model()
    stage.strategy.remember_start(stage.policy.lm)
    return stage


@torch.no_grad()
def disturb(stage, size=1.0):
    """What training does to the weights."""
    generator = torch.Generator().manual_seed(1)
    for parameter in stage.strategy.trained(stage.policy.lm).values():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
