"""One rank of a training run on tiny models: `ranks_worker.py JOBS.json RESULTS.pt`; also imported, for a run alone."""

import json
import logging
import sys
import warnings
from contextlib import contextmanager

import lightning as L
import torch

from ftlit import peft
from ftlit.data.packing import EvalLoader, StepLoader, StepPlanner
from ftlit.data.store import Joined
from ftlit.errors import ConfigError
from ftlit.forgetting import Interpolate, TargetKL
from ftlit.models.shard import gathered
from ftlit.rollout.generate import generate
from ftlit.stages import SFT, RewardModel
from ftlit.testing import tiny_comparisons, tiny_examples, tiny_lm, tiny_tokenizer

# 21 examples, eight a step: the last step of each epoch has five, which two ranks share unevenly.
LENGTHS = (9, 4, 4, 12, 2, 7, 15, 3, 6, 6, 11, 5, 8, 2, 3, 10, 4, 9, 7, 5, 6)


class Norms(peft.SelectiveStrategy):
    """Some of the weights, inside and outside of the layers."""

    def apply(self, model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)


class Swapping(Norms):
    """Gives weights other memory at the start, as is fine without shards."""

    @contextmanager
    def start(self, model):
        now = {name: p.data for name, p in self.trained(model).items()}
        for name, parameter in self.trained(model).items():
            parameter.data = now[name].clone()
        yield
        for name, parameter in self.trained(model).items():
            parameter.data = now[name]


METHODS = {
    "LoRA": lambda: peft.LoRA(rank=3),
    "Full": peft.Full,
    "PrefixTuning": lambda: peft.PrefixTuning(num_virtual_tokens=3),
    "PromptTuning": lambda: peft.PromptTuning(num_virtual_tokens=3),
    "Norms": Norms,
    "Swapping": Swapping,
}


class Data(L.LightningDataModule):
    def __init__(self, **plan):
        super().__init__()
        self.examples, self.plan = tiny_examples(LENGTHS), plan

    def planner(self, accumulate=1, world=1):
        return StepPlanner(self.examples, accumulate=accumulate, world=world, **self.plan)

    def train_dataloader(self):
        stage, trainer = self.trainer.lightning_module, self.trainer
        return StepLoader(self.examples, self.planner(stage.accumulate, trainer.world_size), trainer.global_rank)


class Comparisons(Data):
    """Eleven rows, one a ranking of three, eight a step; all of them are held out too."""

    def __init__(self, **plan):
        super().__init__(**plan)
        sizes = [(n % 5 + 1, n % 4 + 2, n % 3 + 1, *([4] if n == 3 else [])) for n in range(11)]
        self.examples = Joined([tiny_comparisons(sizes)])
        self.sets, self.validation_names = {"train": self.examples, "validation:main": self.examples}, ["main"]

    def val_dataloader(self):
        trainer = self.trainer
        return [EvalLoader(self.examples, self.plan["batch_size"], None, trainer.global_rank, trainer.world_size)]


class Record(L.Callback):
    keys = ("loss", "grad_norm", "lr")

    def __init__(self):
        self.steps, self.micro = [], []

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx):
        self.steps.append({key: stage.step_metrics[f"train/{key}"] for key in self.keys})
        self.micro.append(len(batch.micro_batches))


class Quietly(L.Callback):
    """Validates after the last step, before Lightning does, and logs nothing."""

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx):
        if trainer.global_step == stage.planned_steps:
            self.before, self.found = dict(stage.last_metrics), stage.validated()
            assert stage.last_metrics == self.before


def train(
    strategy="auto", *, method="LoRA", family="llama", batch_size=8, accumulate=1, max_tokens=None, world=1,
    float64=False, sgd=True, precision=None, steps=10, plugins=None, gradient_checkpointing=False,
    alpha=None, kl=False,
):  # fmt: skip
    """Ten steps, with a divergence to the start if `kl`, and back by `alpha`.

    Returns the trained weights (on the first rank), metrics, micro-batches; or what was refused.
    """
    torch.manual_seed(0)
    dtype = torch.float64 if float64 else torch.float32
    lm = tiny_lm(family, dtype)
    optimizer = (lambda groups: torch.optim.SGD(groups, lr=0.1)) if sgd else None
    schedule = lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=10)  # noqa: E731
    stage = SFT(
        policy=lm, peft=METHODS[method](), lr=0.01, warmup=2, optimizer=optimizer,
        lr_scheduler=schedule if sgd else None, gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    record = Record()
    callbacks = [record, *([] if alpha is None else [Interpolate(alpha)]), *([TargetKL(weight=0.5)] if kl else [])]
    if strategy == "fsdp":
        from ftlit.stages.fsdp import FSDP2

        strategy = FSDP2()
    options = {} if plugins else {"precision": precision or ("64-true" if float64 else "32-true")}
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_steps=steps, max_epochs=-1, gradient_clip_val=0.5,
        accumulate_grad_batches=accumulate, callbacks=callbacks, use_distributed_sampler=False, plugins=plugins,
        **options,
    )  # fmt: skip
    try:
        trainer.fit(stage, Data(batch_size=batch_size, max_tokens=max_tokens, seed=3))
    except ConfigError as error:
        return {"error": str(error)}
    trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    weights = trainer.strategy.lightning_module_state_dict()
    rank = trainer.global_rank  # ranks answer unequally many prompts
    prompts = [list(example.input_ids) for example in tiny_examples((5, 8, 3))[: 3 if rank == 0 else 1]]
    with gathered(stage.policy):
        answers = [
            generate(stage.policy.lm, stage.strategy, tiny_tokenizer(), [prompt], max_new_tokens=6)
            for prompt in prompts
        ]
    return {
        "answers": answers,
        "weights": {n: t.clone() for n, t in weights.items() if n in trained},
        "steps": record.steps,
        "micro": record.micro,
    }


def train_reward(strategy="auto", *, method="LoRA", batch_size=8, max_tokens=None, world=1, steps=6):
    """A reward model; returns the trained weights (on the first rank), and metrics of steps and validation."""
    torch.manual_seed(0)
    stage = RewardModel(
        policy=tiny_lm(), peft=METHODS[method](), lr=0.01, warmup=2,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
    )  # fmt: skip
    stage.tokenizer = tiny_tokenizer()
    record, quietly = Record(), Quietly()
    record.keys = ("loss", "grad_norm", "accuracy", "margin")
    if strategy == "fsdp":
        from ftlit.stages.fsdp import FSDP2

        strategy = FSDP2()
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_steps=steps, max_epochs=-1, gradient_clip_val=0.5,
        callbacks=[record, quietly], use_distributed_sampler=False, num_sanity_val_steps=0, precision="32-true",
    )  # fmt: skip
    trainer.fit(stage, Comparisons(batch_size=batch_size, max_tokens=max_tokens, seed=3))
    trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    weights = trainer.strategy.lightning_module_state_dict()
    values = {name: float(value) for name, value in stage.last_metrics.items()}
    weights = {n: t.clone() for n, t in weights.items() if n in trained}
    return {"weights": weights, "steps": record.steps, "quiet": quietly.found, **values}


def quiet():
    """No banners of Lightning."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    quiet()
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    results = [(train_reward if job.pop("reward", False) else train)(**job) for job in jobs]
    if torch.distributed.get_rank() == 0:
        torch.save(results, sys.argv[2])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # its threads can abort a process that ends with them
