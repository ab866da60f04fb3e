"""Short runs on tiny models, for the tests of the controls."""

import copy

import lightning as L
import torch

from ftlit.callbacks.checkpoint import SaveCheckpoint
from ftlit.data.packing import EvalLoader
from ftlit.peft import Full
from ftlit.stages import SFT
from ftlit.testing import tiny_examples, tiny_lm
from tests.stages.test_step import LENGTHS, Data, Record

HELD_OUT = (6, 9, 4, 8)


class WithValidation(Data):
    """Training rows and held-out ones."""

    def val_dataloader(self):
        return EvalLoader(tiny_examples(HELD_OUT, seed=5), 4)


def run(strategy=None, *, control=None, callbacks=(), folder=None, ckpt=None, stage=None, trainer=None, **plan):
    """Six steps in float64, with validation after each epoch, and checkpoints where a folder is given."""
    torch.manual_seed(0)
    family = plan.pop("family", "llama")
    module = SFT(policy=tiny_lm(family, torch.float64), peft=strategy or Full(), **{"lr": 1e-2, **(stage or {})})
    record = Record()
    saving = [] if folder is None else [SaveCheckpoint()]
    all_callbacks = [*([] if control is None else [control]), record, *callbacks, *saving]
    options = {"max_epochs": 2, "gradient_clip_val": 0.5, **(trainer or {})}
    runner = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=folder is not None, enable_progress_bar=False,
        enable_model_summary=False, precision="64-true", callbacks=all_callbacks, num_sanity_val_steps=0,
        default_root_dir=str(folder or "."), **options,
    )  # fmt: skip
    runner.fit(module, WithValidation(tiny_examples(LENGTHS), **plan), ckpt_path=ckpt)
    return module, record, runner


def changes(module):
    """The changes of all weights, dense."""
    return {one.name: one.materialize().detach() for one in module.strategy.changes(module.policy.lm)}


def start_of(module):
    """A plain model as the run's was at its start."""
    lm = copy.deepcopy(module.policy.lm)
    with torch.no_grad(), module.strategy.start(module.policy.lm):
        for ours, theirs in zip(lm.parameters(), module.policy.lm.parameters(), strict=True):
            ours.copy_(theirs)
    return lm


def held_out_loss(module):
    """NLL of the held-out rows now, one at a time."""
    from ftlit.batch import pack

    with torch.no_grad():
        logps = [module.policy(pack([row])).logps for row in tiny_examples(HELD_OUT, seed=5)]
    return -torch.cat(logps).mean().item()
