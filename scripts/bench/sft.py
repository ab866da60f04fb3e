"""ftlit against TRL 1.16 at supervised fine-tuning with LoRA: the same numbers first, then the speed.

Both frameworks get the same token ids, the same trained tokens, the same examples in every optimizer step, the same
first adapter, the same rates. Two modes:

    python scripts/bench/sft.py parity --model FOLDER --rows FILE.json
    python scripts/bench/sft.py speed  --model FOLDER --rows FILE.json

`parity` trains both in float32 and compares loss and gradient norm of every step; the exit status is 1 where they
differ. `speed` runs them in turn (A B, B A, ...), each in a process of its own, and times the optimizer steps.
TRL comes with `pip install ftlit[peers]`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# Before torch is imported: no look-ups on the network, and threads that sleep at barriers (another process on the same
# cores would otherwise slow spinning threads far more than its share).
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn

from ftlit.batch import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_LENGTH = 512
TOLERANCE = 1e-3
# `default` runs under bfloat16 autocast: its loss was 1.4e-3 off on SmolLM2-135M.
BF16_TOLERANCE = 1e-2
TRL_CONFIGURATIONS = ("packed", "bucketed", "default")
# What `--trl best` tries: how many examples TRL takes at once matters as much as how it lays them out.
TRL_MICROS = (8, 2, 1)
FTLIT, TRL = "ftlit", "trl"


class Settings(NamedTuple):
    """What both frameworks are told.

    Attributes:
        rank: Rank of the LoRA.
        alpha: Numerator of its scale.
        lr: Rate of the first step; it falls linearly to zero, without warm-up.
        clip: Largest norm of the gradient.
        batch_size: Examples in an optimizer step.
        max_tokens: ftlit's `data.max_tokens`: most tokens in one of its micro-batches.
        micro: Examples in one of TRL's micro-batches, the rest of a step is accumulated; 0 takes the whole step.
    """

    rank: int = 8
    alpha: int = 16
    lr: float = 1e-3
    clip: float = 1.0
    batch_size: int = 8
    max_tokens: int | None = 2048
    micro: int = 0


class StepRecord(NamedTuple):
    """One optimizer step.

    Attributes:
        loss: Mean over its trained tokens, nats.
        grad_norm: Before clipping.
        lr: The rate it was taken with.
        ended: When it was over, `time.perf_counter`, s.
        cpu: Processor time of all threads until then, `time.process_time`, s.
    """

    loss: float
    grad_norm: float
    lr: float
    ended: float
    cpu: float


# ---- what both train on -----------------------------------------------------------------------------------------


def encode_rows(file: str, tokenizer: PreTrainedTokenizerBase, num: int, max_length: int = MAX_LENGTH) -> list[Example]:
    """The first rows of a file as ftlit's chat template encodes them.

    Args:
        file: A `.json` or `.jsonl` file.
        tokenizer: The model's tokenizer.
        num: How many rows.
        max_length: Longer examples are cut at the end; one with nothing left to train is left out.
    """
    from ftlit.data.sources import Source
    from ftlit.data.templating import ChatTemplate

    source, template = Source(file), ChatTemplate(tokenizer)
    encoded = [example for row in range(min(num, len(source))) for example in template.encode(source.conversation(row))]
    cut = [Example(ids[:max_length], weights[:max_length]) for ids, weights in encoded]
    return [example for example in cut if example.num_targets]


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
        for name, linear in _linears(lm).items():
            down = torch.empty(rank, linear.in_features)
            nn.init.kaiming_uniform_(down, a=5**0.5)
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(linear.out_features, rank)
    return tensors


def _linears(lm: PreTrainedModel) -> dict[str, nn.Linear]:
    head = lm.get_output_embeddings()
    return {n: m for n, m in lm.named_modules() if isinstance(m, nn.Linear) and m is not head}


def matmul_flops(lm: PreTrainedModel, examples: Sequence[Example], rank: int) -> float:
    """Floating-point operations that LoRA training cannot do without: no padding, no recomputation.

    `4 P T + 4 H T_s + 6 a sum(length^2) + 6 P_lora T`: frozen matrices have no gradient of their own, the output layer
    runs on the trained tokens only, attention is causal and inside each example. (The lowest layer's q, k, v need no
    gradient of their input either; that share of 1 / layers is left in.)

    Args:
        lm: A bare model.
        examples: What is trained on.
        rank: Rank of the LoRA.
    """
    linears = _linears(lm).values()
    config = lm.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lengths = [len(example.input_ids) for example in examples]
    tokens, trained = sum(lengths), sum(example.num_targets for example in examples)
    frozen = sum(linear.weight.numel() for linear in linears)
    lora = sum(rank * (linear.in_features + linear.out_features) for linear in linears)
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * sum(n * n for n in lengths)
    return (4 * frozen + 6 * lora) * tokens + 4 * lm.get_output_embeddings().weight.numel() * trained + 6 * attention


# ---- the two frameworks -----------------------------------------------------------------------------------------


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

    settings = settings or Settings()
    records: list[StepRecord] = []

    class Recorder(lightning.Callback):
        def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            if on_start is not None:
                on_start()

        def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
            values = [pl_module.step_metrics[f"train/{name}"] for name in ("loss", "grad_norm", "lr")]
            records.append(StepRecord(*values, ended=time.perf_counter(), cpu=time.process_time()))

    stage = SFT(
        lm,
        peft=LoRA(rank=settings.rank, alpha=settings.alpha, dropout=0.0, target_modules="all-linear"),
        lr=settings.lr,
        weight_decay=0.0,
        warmup=0,
        schedule="linear",
    )
    stage.tokenizer = tokenizer
    stage.configure_model()
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
    from peft import LoraConfig, set_peft_model_state_dict
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
            for ids, weights in step
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
            peft_config=LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            callbacks=[Recorder()],
        )
        trainer.remove_callback(PrinterCallback)
        loaded = set_peft_model_state_dict(trainer.model, dict(adapter))
        lost = [key for key in loaded.missing_keys if ".lora_" in key] + list(loaded.unexpected_keys)
        if lost:
            raise ValueError(f"PEFT adapts other layers than ftlit: {lost[0]}.")
        trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return [
        StepRecord(log["loss"], log["grad_norm"], log["learning_rate"], *end)
        for log, end in zip(logs, ends, strict=True)
    ]


def load_model(folder: str, framework: str) -> PreTrainedModel:
    """The model in float32 as a user of the framework would load it: TRL keeps transformers' SDPA.

    Args:
        folder: A transformers folder.
        framework: `ftlit` or `trl`.
    """
    if framework == FTLIT:
        from ftlit.models.load import load_lm

        return load_lm(folder)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _quiet() -> None:
    """Silences what Lightning and transformers print at every run."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.*")


# ---- parity -----------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """How far two runs are apart at one step.

    Attributes:
        loss: Absolute, nats.
        grad_norm: Relative.
        lr: Relative.
    """

    loss: float
    grad_norm: float
    lr: float


def differences(ours: Sequence[StepRecord], theirs: Sequence[StepRecord]) -> list[Difference]:
    """The differences of two runs, step by step; not a number where one of them is not.

    Raises:
        ValueError: If one has more steps.
    """
    return [
        Difference(
            abs(a.loss - b.loss),
            abs(a.grad_norm - b.grad_norm) / max(abs(b.grad_norm), 1e-12),
            abs(a.lr - b.lr) / max(abs(b.lr), 1e-12),
        )
        for a, b in zip(ours, theirs, strict=True)
    ]


def parity(args: argparse.Namespace) -> int:
    """Compares every step of the two frameworks.

    Returns:
        The exit status: 1 where they differ by more than `TOLERANCE`.
    """
    _quiet()
    tokenizer = load_tokenizer(args.model)
    examples = encode_rows(args.rows, tokenizer, args.num)
    settings = _settings(args)
    print(_describe(examples), flush=True)
    lm = load_model(args.model, FTLIT)
    adapter = initial_adapter(lm, settings.rank)
    ours = run_ftlit(examples, lm, tokenizer, adapter, settings)
    del lm
    theirs = run_trl(examples, load_model(args.model, TRL), tokenizer, adapter, settings, configuration=args.trl)
    apart = differences(ours, theirs)
    print(f"{'':4}  {'loss, nats a trained token':^35}  {'gradient norm':^35}  {'rate':^9}")
    both = f"{'ftlit':>11} {'TRL':>11}"
    print(f"{'step':>4}  {both} {'|diff|':>11}  {both} {'rel. diff':>11}  {'both':>9}")
    for number, (a, b, d) in enumerate(zip(ours, theirs, apart, strict=True), start=1):
        print(
            f"{number:4}  {a.loss:11.6f} {b.loss:11.6f} {d.loss:11.1e}  "
            f"{a.grad_norm:11.6f} {b.grad_norm:11.6f} {d.grad_norm:11.1e}  {b.lr:9.2e}"
        )
    # Not `max(d) > TOLERANCE`: what is not a number has to fail too.
    failed = [n for n, d in enumerate(apart, start=1) if not all(value <= TOLERANCE for value in d)]
    if failed:
        print(f"FAILED: ftlit and TRL ({args.trl}) differ by more than {TOLERANCE:g} at step {failed[0]}.")
        return 1
    print(f"ftlit and TRL ({args.trl}) agree to {TOLERANCE:g} at all {len(apart)} steps.")
    return 0


# ---- speed ------------------------------------------------------------------------------------------------------


class Peer(NamedTuple):
    """How TRL runs.

    Attributes:
        configuration: One of `TRL_CONFIGURATIONS`.
        micro: Examples in a micro-batch; 0 takes the whole step.
    """

    configuration: str
    micro: int

    def __str__(self) -> str:
        return f"{self.configuration} x{self.micro or Settings().batch_size}"


def machine_rate(seconds: float = 1.0) -> tuple[float, float]:
    """What the machine gives at this moment: a float32 2048 x 576 x 1536 matrix product in a loop.

    Returns:
        GFLOP a second, and GFLOP a second of processor time.
    """
    left, right, out = torch.randn(2048, 576), torch.randn(576, 1536), torch.empty(2048, 1536)
    torch.mm(left, right, out=out)
    count, began, cpu = 0, time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - began) < seconds:
        torch.mm(left, right, out=out)
        count += 1
    gflop = 2 * 2048 * 576 * 1536 * count / 1e9
    return gflop / passed, gflop / (time.process_time() - cpu)


def reset_peak_memory() -> None:
    """Lets the peak of resident memory start anew, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak of memory cannot be reset here; it includes loading", file=sys.stderr)


def peak_memory() -> float:
    """Peak of resident memory since the reset, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def child(args: argparse.Namespace) -> int:
    """One run in a process of its own; prints one line of JSON.

    The time is that of all steps but the first, from the end of the first to the end of the last: loading of batches,
    forward, backward, step and log.
    """
    _quiet()
    torch.set_num_threads(args.threads)
    examples = [Example(*example) for example in json.loads(Path(args.examples).read_text())]
    tokenizer, lm = load_tokenizer(args.model), load_model(args.model, args.framework)
    settings = _settings(args)
    timed = examples[settings.batch_size :]
    result: dict[str, Any] = {
        "framework": args.framework,
        "configuration": str(Peer(args.trl, settings.micro)) if args.framework == TRL else f"<= {settings.max_tokens}",
        "threads": torch.get_num_threads(),
        "tokens": sum(len(example.input_ids) for example in timed),
        "trained_tokens": sum(example.num_targets for example in timed),
        "gflop": matmul_flops(lm, timed, settings.rank) / 1e9,
    }
    adapter = initial_adapter(lm, settings.rank)

    def on_start() -> None:
        result["rate_before"] = machine_rate()
        reset_peak_memory()

    if args.framework == FTLIT:
        records = run_ftlit(examples, lm, tokenizer, adapter, settings, on_start)
    else:
        records = run_trl(examples, lm, tokenizer, adapter, settings, on_start, configuration=args.trl)
    result |= {
        "peak_rss_mib": round(peak_memory()),
        "rate_after": machine_rate(),
        "steps": len(records) - 1,
        "seconds": records[-1].ended - records[0].ended,
        "cpu_seconds": records[-1].cpu - records[0].cpu,
        "losses": [record.loss for record in records],
        "grad_norms": [record.grad_norm for record in records],
    }
    print(json.dumps(result), flush=True)
    return 0


def _spawn(args: argparse.Namespace, framework: str, examples: str, peer: Peer) -> dict[str, Any]:
    """Runs `child` and reads its line.

    Raises:
        SystemExit: If it failed.
    """
    command = [sys.executable, __file__, "child", "--model", args.model, "--examples", examples]
    command += ["--framework", framework, "--threads", str(args.threads), "--max_tokens", str(args.max_tokens)]
    command += ["--trl", peer.configuration, "--trl_micro", str(peer.micro)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"framework"')]
    if done.returncode or not lines:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        raise SystemExit(f"the run of {framework} failed with exit status {done.returncode}.")
    return json.loads(lines[-1])


def _floor_ratios(run: Mapping[str, Any]) -> tuple[float, float]:
    """How many times longer than the matrix products alone at the rate measured around the run: wall, processor."""
    wall, cpu = ((before + after) / 2 for before, after in zip(run["rate_before"], run["rate_after"], strict=True))
    return run["seconds"] * wall / run["gflop"], run["cpu_seconds"] * cpu / run["gflop"]


def _best(args: argparse.Namespace, examples: Sequence[Example], folder: str) -> Peer:
    """TRL's fastest good setting, from one timed step of each.

    By processor time: the wall clock of one step says more about who else is on the machine.
    """
    few = Path(folder) / "few.json"
    few.write_text(json.dumps(examples[: 2 * Settings().batch_size]))
    micros = [args.trl_micro] if args.trl_micro else TRL_MICROS
    seconds = {}
    for peer in [Peer(configuration, micro) for micro in micros for configuration in ("packed", "bucketed")]:
        run = _spawn(args, TRL, str(few), peer)
        seconds[peer] = run["cpu_seconds"]
        print(f"one step of TRL {peer}: {run['seconds']:.1f} s, processor {run['cpu_seconds']:.1f} s", flush=True)
    return min(seconds, key=lambda peer: seconds[peer])


def speed(args: argparse.Namespace) -> int:
    """Times both in turn and prints runs, ratios and floors.

    Returns:
        The exit status: 1 if the two do not train the same thing.
    """
    examples = encode_rows(args.rows, load_tokenizer(args.model), args.num)
    if len(examples) <= Settings().batch_size:
        print(f"{len(examples)} examples are one optimizer step, and the first is not timed: give a larger --num.")
        return 1
    print(f"{_describe(examples)}, {args.threads} threads, load {os.getloadavg()[0]:.2f}", flush=True)
    ratios: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "examples.json"
        file.write_text(json.dumps(examples))
        peer = _best(args, examples, folder) if args.trl == "best" else Peer(args.trl, args.trl_micro)
        tolerance = BF16_TOLERANCE if peer.configuration == "default" else TOLERANCE
        print(
            f"{'':4} {'':<21} {'wall':>7} {'cpu':>7} {'tokens/s':>9} {'trained':>9} {'peak':>6} "
            f"{'GFLOP/s':>13} {'x floor':>11}  {'loss at step':^23}\n"
            f"{'pair':>4} {'run':<21} {'s':>7} {'s':>7} {'':>9} {'tokens/s':>9} {'MiB':>6} "
            f"{'before':>6} {'after':>6} {'wall':>5} {'cpu':>5}  {'1':>7} {'2':>7} {'last':>7}"
        )
        for pair in range(1, args.pairs + 1):
            runs = {}
            for framework in (FTLIT, TRL) if pair % 2 else (TRL, FTLIT):
                runs[framework] = _spawn(args, framework, str(file), peer)
                print(f"{pair:4} {_line(runs[framework])}", flush=True)
            ours, theirs = runs[FTLIT], runs[TRL]
            apart = abs(ours["losses"][0] - theirs["losses"][0])
            if not apart <= tolerance:
                print(
                    f"No timing: the losses of the first step, {ours['losses'][0]:.6f} of ftlit and "
                    f"{theirs['losses'][0]:.6f} of TRL, differ by more than {tolerance:g}, so they do not train the "
                    "same thing."
                )
                return 1
            ratios.append((theirs["seconds"] / ours["seconds"], theirs["cpu_seconds"] / ours["cpu_seconds"]))
            rates = [run[when][0] for run in runs.values() for when in ("rate_before", "rate_after")]
            if max(rates) > 1.1 * min(rates):
                print(f"     (the machine's own rate moved by {max(rates) / min(rates) - 1:.0%} during this pair)")
    print(f"tokens/s of ftlit over TRL ({peer}), each pair and median:")
    for clock, values in zip(("wall", "processor"), zip(*ratios, strict=True), strict=True):
        each = ", ".join(f"{ratio:.2f}" for ratio in values)
        print(f"  by {clock} time: {each}; median {statistics.median(values):.2f}")
    return 0


def _line(run: Mapping[str, Any]) -> str:
    losses, floors = run["losses"], _floor_ratios(run)
    return (
        f"{run['framework'] + ' ' + run['configuration']:<21} {run['seconds']:7.2f} {run['cpu_seconds']:7.2f} "
        f"{run['tokens'] / run['seconds']:9.0f} {run['trained_tokens'] / run['seconds']:9.0f} "
        f"{run['peak_rss_mib']:6} {run['rate_before'][0]:6.0f} {run['rate_after'][0]:6.0f} "
        f"{floors[0]:5.2f} {floors[1]:5.2f}  {losses[0]:7.4f} {losses[1]:7.4f} {losses[-1]:7.4f}"
    )


# ---- the command line -------------------------------------------------------------------------------------------


def _describe(examples: Sequence[Example]) -> str:
    tokens, trained = sum(len(e.input_ids) for e in examples), sum(e.num_targets for e in examples)
    steps = -(-len(examples) // Settings().batch_size)
    return (
        f"{len(examples)} examples, {tokens:,} tokens, {trained:,} trained, {steps} optimizer steps of "
        f"{Settings().batch_size}"
    )


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(max_tokens=args.max_tokens or None, micro=args.trl_micro)


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    for name, run, summary in (
        ("parity", parity, "the same loss and gradient norm at every step?"),
        ("speed", speed, "time of the optimizer steps, in pairs"),
        ("child", child, "one run of `speed`; started by it"),
    ):
        mode = modes.add_parser(name, help=summary, description=summary)
        mode.set_defaults(run=run)
        mode.add_argument("--model", required=True, help="a transformers folder")
        mode.add_argument("--max_tokens", type=int, default=2048, help="ftlit's data.max_tokens; 0: no bound")
        mode.add_argument("--trl_micro", type=int, default=0, help="examples in a micro-batch of TRL; 0: a whole step")
    for name, num in (("parity", 32), ("speed", 64)):
        modes.choices[name].add_argument("--rows", required=True, help="a .json or .jsonl file of conversations")
        modes.choices[name].add_argument("--num", type=int, default=num, help="how many of its rows")
    for name in ("speed", "child"):
        modes.choices[name].add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each run")
    modes.choices["parity"].add_argument("--trl", choices=("bucketed", "packed"), default="bucketed")
    modes.choices["speed"].add_argument("--pairs", type=int, default=3, help="runs of each framework")
    modes.choices["speed"].add_argument("--trl", choices=("best", *TRL_CONFIGURATIONS), default="best")
    modes.choices["child"].add_argument("--trl", choices=TRL_CONFIGURATIONS, default="bucketed")
    modes.choices["child"].add_argument("--framework", choices=(FTLIT, TRL), required=True)
    modes.choices["child"].add_argument("--examples", required=True, help="a file that `speed` wrote")
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
