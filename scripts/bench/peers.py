"""The frameworks: each trains the same examples in the same steps from the same first weights."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from measure import Settings, StepRecord, linears_of
from torch import Tensor, nn

from ftlit.batch import Example

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRL_CONFIGURATIONS = ("packed", "bucketed", "default")
PLAIN_CONFIGURATIONS = ("single", "padded")


def load_model(folder: str, framework: str) -> PreTrainedModel:
    """The model in float32 as a user of the framework would load it: peers keep transformers' SDPA.

    Args:
        folder: A transformers folder.
        framework: `ftlit`, `trl` or `plain`.
    """
    if framework == "ftlit":
        from ftlit.models.load import load_lm

        return load_lm(folder)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def quiet() -> None:
    """Silences what Lightning and transformers print at every run."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.*")


def initial_adapter(lm: PreTrainedModel, rank: int, seed: int = 0) -> dict[str, Tensor]:
    """A fresh LoRA of every linear layer but the output layer, under the names of PEFT's adapter file; B is zero.

    Args:
        lm: A bare model.
        rank: Rank of the LoRA.
        seed: Seed of A; the global generator is left as it was.
    """
    tensors: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, linear in linears_of(lm).items():
            down = torch.empty(rank, linear.in_features)
            nn.init.kaiming_uniform_(down, a=5**0.5)
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(linear.out_features, rank)
    return tensors


def peft_lora(settings: Settings) -> LoraConfig:
    """PEFT's settings of the same LoRA."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def load_into_peft(model: Any, adapter: Mapping[str, Tensor]) -> None:
    """Gives a PEFT model its first LoRA.

    Raises:
        ValueError: If a tensor has no place, or a place no tensor.
    """
    from peft import set_peft_model_state_dict

    loaded = set_peft_model_state_dict(model, dict(adapter))
    lost = [key for key in loaded.missing_keys if ".lora_" in key] + list(loaded.unexpected_keys)
    if lost:
        raise ValueError(f"PEFT adapts other layers than ftlit: {lost[0]}.")


def run_ftlit(
    examples: Sequence[Example],
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Mapping[str, Tensor],
    settings: Settings | None = None,
    on_start: Callable[[], None] | None = None,
) -> list[StepRecord]:
    """Trains one epoch with ftlit's stage and data module inside a `lightning.Trainer`.

    Args:
        examples: The tokenized examples, in the order of training.
        lm: A bare model; it is changed.
        tokenizer: Its tokenizer.
        adapter: The first LoRA, from `initial_adapter`.
        settings: What both frameworks are told.
        on_start: Called right before the first step.

    Returns:
        Every optimizer step.
    """
    import lightning

    from ftlit import SFT, LoRA, SFTData
    from ftlit.peft import Full

    settings = settings or Settings()
    records: list[StepRecord] = []

    class Recorder(lightning.Callback):
        def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            if on_start is not None:
                on_start()

        def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
            values = [pl_module.step_metrics[f"train/{name}"] for name in ("loss", "grad_norm", "lr")]
            records.append(StepRecord(*values, ended=time.perf_counter(), cpu=time.process_time()))

    lora = LoRA(rank=settings.rank, alpha=settings.alpha, dropout=0.0, target_modules="all-linear")
    stage = SFT(
        lm,
        peft=lora if settings.method == "lora" else Full(),
        lr=settings.lr,
        weight_decay=0.0,
        warmup=0,
        schedule="linear",
    )
    stage.tokenizer = tokenizer
    stage.configure_model()
    if settings.method == "lora":
        stage.strategy.load(lm, adapter)  # refuses a tensor too many or too few
    data = SFTData(batch_size=settings.batch_size, max_tokens=settings.max_tokens, shuffle=False)
    data.sets["train"] = list(examples)  # what `load_train` would make of a file
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        lightning.Trainer(
            accelerator="cpu",
            devices=1,
            precision="32-true",
            max_epochs=1,
            gradient_clip_val=settings.clip,
            callbacks=[Recorder()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(stage, datamodule=data)
    return records


def run_trl(
    examples: Sequence[Example],
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Mapping[str, Tensor],
    settings: Settings | None = None,
    on_start: Callable[[], None] | None = None,
    configuration: str = "bucketed",
) -> list[StepRecord]:
    """Trains one epoch with `trl.SFTTrainer` and a PEFT LoRA.

    Nothing is shifted or added on TRL's side. It gets `input_ids` and `labels` (-100 where nothing is trained), which
    it uses as they are: its own tokenization would differ, and would train a template's line break after the end token.
    Like transformers it predicts label t from position t - 1 and divides the sum over all micro-batches of a step by
    the labels in them, not counting a row's first, which nothing predicts; ftlit's examples never train that one. So
    its loss is, like ftlit's, the mean over the trained tokens of the whole step.

    Args:
        examples: The tokenized examples, in the order of training; weights 0 and 1 only.
        lm: A bare model; it is changed.
        tokenizer: Its tokenizer.
        adapter: The first LoRA, from `initial_adapter`.
        settings: What both frameworks are told.
        on_start: Called right before the first step.
        configuration: `packed` (a step end to end in one row: what `packing=True` also sets, but with the examples of
            an optimizer step kept together), `bucketed` (padded, longest with longest), or `default` (TRL's defaults:
            padded, bfloat16 autocast, gradient checkpointing).

    Returns:
        Every optimizer step.

    Raises:
        ValueError: If the configuration is unknown, or the adapter has no place in the model, or a weight has none.
    """
    from datasets import Dataset, disable_progress_bars
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if configuration not in TRL_CONFIGURATIONS:
        raise ValueError(f"TRL's configuration must be one of {', '.join(TRL_CONFIGURATIONS)}, got {configuration!r}.")
    if any(weight not in (0, 1) for example in examples for weight in example.weights):
        raise ValueError("TRL has no weights other than 0 and 1.")
    settings = settings or Settings()
    micro = settings.micro or settings.batch_size
    ends: list[tuple[float, float]] = []

    class Recorder(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if on_start is not None:
                on_start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append((time.perf_counter(), time.process_time()))

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    options: dict[str, Any] = {} if configuration == "default" else {"bf16": False, "gradient_checkpointing": False}
    if configuration == "packed":
        options |= {"padding_free": True, "max_length": None}
    rows = []
    for start in range(0, len(examples), settings.batch_size):
        step = sorted(examples[start : start + settings.batch_size], key=lambda example: -len(example.input_ids))
        rows += [
            {"input_ids": list(ids), "labels": [i if w else -100 for i, w in zip(ids, weights, strict=True)]}
            for ids, weights, *_ in step
        ]
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=lm,
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=settings.batch_size // micro,
                num_train_epochs=1,
                learning_rate=settings.lr,
                lr_scheduler_type="linear",
                warmup_steps=0,
                weight_decay=0.0,
                max_grad_norm=settings.clip,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **options,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_lora(settings) if settings.method == "lora" else None,
            callbacks=[Recorder()],
        )
        trainer.remove_callback(PrinterCallback)
        if settings.method == "lora":
            load_into_peft(trainer.model, adapter)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return [
        StepRecord(log["loss"], log["grad_norm"], log["learning_rate"], *end)
        for log, end in zip(logs, ends, strict=True)
    ]


def run_plain(
    examples: Sequence[Example],
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Mapping[str, Tensor],
    settings: Settings | None = None,
    on_start: Callable[[], None] | None = None,
    configuration: str = "single",
) -> list[StepRecord]:
    """Trains one epoch with transformers and PEFT in a loop of twenty lines, as one would write it by hand.

    Args:
        examples: The tokenized examples, in the order of training; weights 0 and 1 only.
        lm: A bare model; it is changed.
        tokenizer: Its tokenizer.
        adapter: The first LoRA, from `initial_adapter`.
        settings: What all frameworks are told.
        on_start: Called right before the first step.
        configuration: `single` (one example at a time, nothing is padded) or `padded` (right, to the longest of a
            micro-batch, longest with longest).

    Returns:
        Every optimizer step.

    Raises:
        ValueError: If the configuration is unknown.
    """
    if configuration not in PLAIN_CONFIGURATIONS:
        raise ValueError(f"the plain loop's configuration must be one of {', '.join(PLAIN_CONFIGURATIONS)}.")
    settings = settings or Settings()
    model: Any = lm
    if settings.method == "lora":
        from peft import get_peft_model

        model = get_peft_model(lm, peft_lora(settings))
        load_into_peft(model, adapter)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0, fused=True)
    steps = range(0, len(examples), settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    micro = 1 if configuration == "single" else settings.micro or settings.batch_size
    if on_start is not None:
        on_start()
    records = []
    for start in steps:
        step = sorted(examples[start : start + settings.batch_size], key=lambda example: -len(example.input_ids))
        targets = sum(example.num_targets for example in step)
        total = 0.0
        for first in range(0, len(step), micro):
            loss = model(**_padded(step[first : first + micro]), use_cache=False, num_items_in_batch=targets).loss
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(trained, settings.clip).item()
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        records.append(StepRecord(total, norm, rate, time.perf_counter(), time.process_time()))
    return records


def _padded(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A right-padded batch; a mask only where something is padded."""
    longest = max(len(example.input_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (tokens, weights, *_) in enumerate(examples):
        length = len(tokens)
        ids[row, :length] = torch.tensor(tokens)
        labels[row, :length] = torch.where(torch.tensor(weights) != 0, ids[row, :length], -100)
        mask[row, :length] = 1
    batch = {"input_ids": ids, "labels": labels}
    return batch if mask.all() else {**batch, "attention_mask": mask}
