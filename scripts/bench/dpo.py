"""Direct preference optimization against TRL 1.16: the same numbers first, then speed and memory.

Both get the same token ids, the same pairs in every optimizer step, the same first weights and rates, in float32 with
a LoRA. Two modes:

    python scripts/bench/dpo.py parity --model FOLDER --rows FILE.json
    python scripts/bench/dpo.py speed  --model FOLDER --rows FILE.json [--reference cached] [--micro 4 2 1]

`parity` compares loss, gradient norm and reward margin of every step; the exit status is 1 where they differ. `speed`
runs ftlit and TRL in turn (A B, B A, ...), each in a process of its own, and times the optimizer steps. TRL runs with
the best of `--micro` pairs in a micro-batch, from one timed step of each. With `--reference cached` both read the
reference's scores instead of computing them; making them is not timed. `--ratio 8` cuts prompts and answers so that a
prompt has 8 times the tokens of an answer. TRL comes with `pip install ftlit[peers]`.
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

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before torch is imported; see sft.py
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from measure import Settings, machine_rate, peak_memory, reset_peak_memory
from peers import initial_adapter, load_into_peft, load_model, load_tokenizer, peft_lora, quiet
from torch import Tensor

from ftlit.batch import Example
from ftlit.data.comparisons import Comparisons
from ftlit.data.store import Examples, Joined

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOLERANCE = 1e-3
Row = tuple[list[int], list[int], list[int]]
"""Tokens of a prompt, of its better answer, and of its worse one."""


class PairStep(NamedTuple):
    """One optimizer step.

    Attributes:
        loss: Mean over its pairs, nats.
        grad_norm: Before clipping.
        margin: Mean reward margin of its pairs.
        ended: When it was over, `time.perf_counter`, s.
        cpu: Processor time of all threads until then, `time.process_time`, s.
    """

    loss: float
    grad_norm: float
    margin: float
    ended: float
    cpu: float


def encode_pairs(file: str, tokenizer: PreTrainedTokenizerBase, num: int, max_length: int, ratio: int = 0) -> list[Row]:
    """The first rows of a file as ftlit's chat template encodes them, cut at the end as TRL does.

    Args:
        file: Rows of preferences.
        tokenizer: The model's tokenizer.
        num: How many.
        max_length: Most tokens of a prompt and an answer.
        ratio: Tokens of a prompt for each of an answer, to which both are cut; 0 leaves them as they are.
    """
    from ftlit.data.formats import detect_preference
    from ftlit.data.sources import Source
    from ftlit.data.templating import ChatTemplate

    source, template = Source(file, choose=detect_preference), ChatTemplate(tokenizer)
    encoded = [template.encode(source.record(row)) for row in range(min(num, len(source)))]
    rows = [(list(p.input_ids), list(w.input_ids), list(r.input_ids)) for p, w, r in (e[:3] for e in encoded)]
    if ratio:
        rows = [_cut(row, ratio) for row in rows]
    fitted, _ = comparisons_of(rows).fit(max_length, "end")
    return [_row(example) for example in fitted]


def comparisons_of(rows: Sequence[Row]) -> Comparisons:
    """Rows as ftlit holds them."""
    pieces = [
        Example(ids, [float(place > 0)] * len(ids), (0.0, 1.0, 0.0)[place])
        for row in rows
        for place, ids in enumerate(row)
    ]
    return Comparisons(Examples.of(pieces, [i // 3 for i in range(len(pieces))], [False] * len(pieces)))


def _cut(row: Row, ratio: int) -> Row:
    """The end of the prompt and the beginnings of the answers, the one `ratio` times as long as each of the others."""
    prompt, better, worse = row
    length = max(1, min(len(better), len(worse), len(prompt) // ratio))
    return prompt[-ratio * length :], better[:length], worse[:length]


def _row(example: Example) -> Row:
    assert example.answers is not None
    ids = [int(token) for token in example.input_ids]
    better, worse = example.answers.lengths
    own = len(ids) - better - worse
    return ids[:own], ids[own : own + better], ids[own + better :]


# ---- the two frameworks -----------------------------------------------------------------------------------------


def run_ftlit(
    rows: Sequence[Row],
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Mapping[str, Tensor],
    settings: Settings,
    cached: bool = False,
    on_start: Callable[[], None] | None = None,
) -> list[PairStep]:
    """Trains one epoch with ftlit.

    Args:
        rows: In the order of training.
        lm: A bare model; it is changed.
        tokenizer: Its tokenizer.
        adapter: The first LoRA, from `initial_adapter`.
        settings: What both frameworks are told.
        cached: Whether the reference is scored before training.
        on_start: Called right before the first step.
    """
    import lightning

    from ftlit import DPO, LoRA, PreferenceData

    records: list[PairStep] = []

    class Recorder(lightning.Callback):
        def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
            if on_start is not None:
                on_start()

        def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
            values = [pl_module.step_metrics[name] for name in ("train/loss", "train/grad_norm", "rewards/margins")]
            records.append(PairStep(*values, ended=time.perf_counter(), cpu=time.process_time()))

    lora = LoRA(rank=settings.rank, alpha=settings.alpha, dropout=0.0, target_modules="all-linear")
    stage = DPO(lm, peft=lora, lr=settings.lr, warmup=0, schedule="linear", cache_reference=cached)
    stage.tokenizer = tokenizer
    stage.configure_model()
    stage.strategy.load(lm, adapter)
    data = PreferenceData(batch_size=settings.batch_size, max_tokens=settings.max_tokens, shuffle=False)
    data.sets["train"] = Joined([comparisons_of(rows)])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        os.environ["FTLIT_CACHE"] = folder  # scores of an earlier run are not taken
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
    rows: Sequence[Row],
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Mapping[str, Tensor],
    settings: Settings,
    cached: bool = False,
    on_start: Callable[[], None] | None = None,
) -> list[PairStep]:
    """Trains one epoch with `trl.DPOTrainer` and a PEFT LoRA; arguments as of `run_ftlit`.

    TRL gets token ids instead of texts (`_prepare_dataset` is skipped), pairs sorted by length within a step, no
    bfloat16 and no gradient checkpointing.
    """
    from datasets import Dataset, disable_progress_bars
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    micro = settings.micro or settings.batch_size
    ends: list[tuple[float, float]] = []

    class Recorder(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if on_start is not None:
                on_start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append((time.perf_counter(), time.process_time()))

    class InOrder(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    table = []
    for start in range(0, len(rows), settings.batch_size):
        step = sorted(rows[start : start + settings.batch_size], key=lambda row: -len(row[0]) - len(row[1]))
        table += [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in step]
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=lm,
            args=DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=settings.batch_size // micro,
                num_train_epochs=1,
                learning_rate=settings.lr,
                lr_scheduler_type="linear",
                warmup_steps=0,
                weight_decay=0.0,
                max_grad_norm=settings.clip,
                max_length=None,
                precompute_ref_log_probs=cached,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(table),
            processing_class=tokenizer,
            peft_config=peft_lora(settings),
            callbacks=[Recorder()],
        )
        trainer.remove_callback(PrinterCallback)
        load_into_peft(trainer.model, adapter)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return [
        PairStep(log["loss"], log["grad_norm"], log["rewards/margins"], *end)
        for log, end in zip(logs, ends, strict=True)
    ]


RUNNERS: dict[str, Callable[..., list[PairStep]]] = {"ftlit": run_ftlit, "trl": run_trl}


# ---- modes ------------------------------------------------------------------------------------------------------


def parity(args: argparse.Namespace) -> int:
    """Compares every step; 1 where they differ."""
    quiet()
    tokenizer = load_tokenizer(args.model)
    rows = encode_pairs(args.rows, tokenizer, args.num, args.max_length, args.ratio)
    print(_describe(rows), flush=True)
    adapter, runs = None, []
    for framework, runner in RUNNERS.items():
        lm = load_model(args.model, framework)
        adapter = adapter or initial_adapter(lm, Settings().rank)
        runs.append(runner(rows, lm, tokenizer, adapter, _settings(args), args.reference == "cached"))
    worst = worst_difference(*runs)
    for number, (ours, theirs) in enumerate(zip(*runs, strict=True), start=1):
        print(
            f"step {number}: loss {ours.loss:.6f} {theirs.loss:.6f}, gradient norm {ours.grad_norm:.6f} "
            f"{theirs.grad_norm:.6f}, margin {ours.margin:.6f} {theirs.margin:.6f} (ftlit, TRL)"
        )
    agree = worst <= TOLERANCE
    print(f"{'They agree' if agree else 'FAILED: they differ'}: by at most {worst:.1e} (allowed {TOLERANCE:g}).")
    return 0 if agree else 1


def worst_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """The largest difference of losses, of margins, and (relative) of gradient norms, over the steps."""
    return max(
        max(abs(loss - other), abs(norm / other_norm - 1), abs(margin - other_margin))
        for (loss, norm, margin, *_), (other, other_norm, other_margin, *_) in zip(ours, theirs, strict=True)
    )


def child(args: argparse.Namespace) -> int:
    """One run in a process of its own; prints one line of JSON. The first step is not timed."""
    quiet()
    torch.set_num_threads(args.threads)
    rows = [tuple(row) for row in json.loads(Path(args.examples).read_text())]
    tokenizer, lm = load_tokenizer(args.model), load_model(args.model, args.framework)
    result: dict[str, Any] = {"contender": f"{args.framework}:{args.micro[0]}", "pairs": len(rows) - args.batch_size}

    def on_start() -> None:
        result["rate_before"] = machine_rate()[0]
        reset_peak_memory()

    adapter = initial_adapter(lm, Settings().rank)
    cached = args.reference == "cached"
    records = RUNNERS[args.framework](rows, lm, tokenizer, adapter, _settings(args), cached, on_start)
    result |= {
        "peak_rss_mib": round(peak_memory()),
        "rate_after": machine_rate()[0],
        "seconds": records[-1].ended - records[0].ended,
        "cpu_seconds": records[-1].cpu - records[0].cpu,
        "steps": [record[:3] for record in records],
    }
    print(json.dumps(result), flush=True)
    return 0


def speed(args: argparse.Namespace) -> int:
    """Times both in turn and prints runs and ratios; 1 if there is too little to time."""
    rows = encode_pairs(args.rows, load_tokenizer(args.model), args.num, args.max_length, args.ratio)
    if len(rows) <= args.batch_size:
        print(f"{len(rows)} pairs are one optimizer step, and the first is not timed: give a larger --num.")
        return 1
    print(f"{_describe(rows)}, {args.threads} threads, load {os.getloadavg()[0]:.2f}", flush=True)
    runs: dict[str, list[dict[str, Any]]] = {"ftlit": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        tried = {}
        for micro in args.micro if len(args.micro) > 1 else []:
            tried[micro] = _spawn(args, "trl", micro, rows[: 2 * args.batch_size], folder)["cpu_seconds"]
            print(f"one step of TRL with {micro} pairs in a micro-batch: processor {tried[micro]:.1f} s", flush=True)
        best = min(tried, key=lambda micro: tried[micro]) if tried else args.micro[0]
        for pair in range(args.pairs):
            for framework in ("ftlit", "trl")[:: -1 if pair % 2 else 1]:
                run = _spawn(args, framework, best, rows, folder)
                runs[framework].append(run)
                print(
                    f"{pair + 1} {framework:<6} {run['seconds']:8.2f} s, processor {run['cpu_seconds']:8.2f} s, "
                    f"{run['pairs'] / run['seconds']:7.3f} pairs/s, peak {run['peak_rss_mib']:6} MiB, machine "
                    f"{run['rate_before']:.0f} {run['rate_after']:.0f} GFLOP/s, losses "
                    + " ".join(f"{loss:.4f}" for loss, *_ in run["steps"]),
                    flush=True,
                )
            apart = worst_difference(*(side[-1]["steps"] for side in runs.values()))
            print(f"  losses, gradient norms and margins of all steps differ by at most {apart:.1e}", flush=True)
            if not apart <= 10 * TOLERANCE:
                raise SystemExit("No timing: they do not train the same thing.")
    for name, key in (("by wall time", "seconds"), ("by processor time", "cpu_seconds")):
        ratios = [theirs[key] / ours[key] for ours, theirs in zip(runs["ftlit"], runs["trl"], strict=True)]
        print(f"times TRL {name}: {', '.join(f'{r:.2f}' for r in ratios)}; median {statistics.median(ratios):.2f}")
    ours, theirs = (statistics.median(run["peak_rss_mib"] for run in side) for side in runs.values())
    print(f"peak memory: {ours:.0f} MiB against {theirs:.0f} MiB, {ours / theirs:.2f}")
    return 0


def _spawn(args: argparse.Namespace, framework: str, micro: int, rows: Sequence[Row], folder: str) -> dict[str, Any]:
    """Runs `child` and reads its line.

    Raises:
        SystemExit: If it failed.
    """
    file = Path(folder) / "rows.json"
    file.write_text(json.dumps(rows))
    command = [sys.executable, __file__, "child", "--model", args.model, "--examples", str(file)]
    command += ["--framework", framework, "--micro", str(micro), "--threads", str(args.threads)]
    command += ["--max_tokens", str(args.max_tokens), "--batch_size", str(args.batch_size)]
    command += ["--reference", args.reference]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"contender"')]
    if done.returncode or not lines:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        raise SystemExit(f"the run of {framework} failed with exit status {done.returncode}.")
    return json.loads(lines[-1])


def _describe(rows: Sequence[Row]) -> str:
    once, twice = (sum(times * len(row[0]) + len(row[1]) + len(row[2]) for row in rows) for times in (1, 2))
    return f"{len(rows)} pairs, {twice:,} tokens with every prompt twice, {once:,} with it once"


def _settings(args: argparse.Namespace) -> Settings:
    micro = args.micro[0] if args.micro else args.batch_size
    return Settings(lr=5e-5, batch_size=args.batch_size, max_tokens=args.max_tokens or None, micro=micro)


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    for name, run, summary in (
        ("parity", parity, "the same loss, gradient norm and margin at every step?"),
        ("speed", speed, "time and memory of the optimizer steps, in turn"),
        ("child", child, "one run of `speed`; started by it"),
    ):
        mode = modes.add_parser(name, help=summary, description=summary)
        mode.set_defaults(run=run)
        mode.add_argument("--model", required=True, help="a transformers folder")
        mode.add_argument("--reference", choices=("live", "cached"), default="live")
        mode.add_argument("--max_tokens", type=int, default=2048, help="ftlit's data.max_tokens; 0: no bound")
        mode.add_argument("--batch_size", type=int, default=4, help="pairs in an optimizer step")
        mode.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each run")
        default = [4, 2, 1] if name == "speed" else [0]
        mode.add_argument("--micro", type=int, nargs="+", default=default, help="TRL's pairs in a micro-batch")
        if name == "child":
            mode.add_argument("--framework", choices=tuple(RUNNERS), required=True)
            mode.add_argument("--examples", required=True, help="a file that `speed` wrote")
        else:
            mode.add_argument("--rows", required=True, help="a file of preference rows")
            mode.add_argument("--num", type=int, default=16, help="how many of the rows")
            mode.add_argument("--max_length", type=int, default=1024, help="most tokens of a prompt and an answer")
            mode.add_argument("--ratio", type=int, default=0, help="tokens of a prompt for each of an answer")
    modes.choices["speed"].add_argument("--pairs", type=int, default=3, help="runs of each framework")
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
