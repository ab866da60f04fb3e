"""Supervised fine-tuning against TRL 1.16 and a plain loop: the same numbers first, then speed and memory.

All frameworks get the same token ids, the same trained tokens, the same examples in every optimizer step, the same
first weights, the same rates. Three modes:

    python scripts/bench/sft.py parity  --model FOLDER --rows FILE.json
    python scripts/bench/sft.py speed   --model FOLDER --rows FILE.json [--peers trl:best plain:best trl:default]
    python scripts/bench/sft.py lengths --model FOLDER --rows FILE.json [--peers trl:best]

`parity` trains ftlit and a peer in float32 and compares loss and gradient norm of every step; the exit status is 1
where they differ. `speed` runs ftlit and the peers in turn (A B C, C B A, ...), each in a process of its own, and times
the optimizer steps. `lengths` does the same for examples of exactly 128, 256, ... tokens. `--method full` trains every
weight instead of a LoRA.

A peer is `trl:CONFIGURATION` or `plain:CONFIGURATION` (see `peers.py`), with `:N` for N examples in a micro-batch;
`best` tries what there is, one timed step each. TRL comes with `pip install ftlit[peers]`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Before torch is imported: no look-ups on the network, and threads that sleep at barriers (another process on the same
# cores would otherwise slow spinning threads far more than its share).
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from measure import (
    Settings,
    StepRecord,
    differences,
    encode_rows,
    floor_ratios,
    machine_rate,
    matmul_flops,
    of_length,
    peak_memory,
    reset_peak_memory,
)
from peers import initial_adapter, load_model, load_tokenizer, quiet, run_ftlit, run_plain, run_trl

from ftlit.batch import Example

TOLERANCE = 1e-3
# TRL's defaults run under bfloat16 autocast: their loss was 1.4e-3 off on SmolLM2-135M.
BF16_TOLERANCE = 1e-2
LENGTHS = (128, 256, 512, 1024, 2048)


class Contender(NamedTuple):
    """A framework and how it runs.

    Attributes:
        framework: `ftlit`, `trl` or `plain`.
        configuration: One of the framework's, or `best`.
        micro: Examples in a micro-batch; 0 takes the whole step.
    """

    framework: str
    configuration: str = ""
    micro: int = 0

    def __str__(self) -> str:
        return ":".join([self.framework, *filter(None, [self.configuration, str(self.micro or "")])])

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Reads `framework:configuration:micro`.

        Raises:
            argparse.ArgumentTypeError: If it is none.
        """
        framework, _, rest = text.partition(":")
        configuration, _, micro = rest.partition(":")
        known = CONFIGURATIONS.get(framework, ())
        if configuration not in (*known, *(["best"] if len(known) > 1 else [])) or not (micro or "0").isdigit():
            raise argparse.ArgumentTypeError(f"{text!r} is no peer: give trl:packed:1, plain:best, trl:default, ...")
        return cls(framework, configuration, int(micro or 0))

    @property
    def tolerance(self) -> float:
        """How far its first loss may be from ftlit's."""
        return BF16_TOLERANCE if self.configuration == "default" else TOLERANCE

    def run(self, *args: Any) -> list[StepRecord]:
        """Trains; see `peers.py`."""
        runner: Callable[..., list[StepRecord]] = {"ftlit": run_ftlit, "trl": run_trl, "plain": run_plain}[
            self.framework
        ]
        return (runner if self.framework == "ftlit" else partial(runner, configuration=self.configuration))(*args)


CONFIGURATIONS = {"ftlit": ("",), "trl": ("packed", "bucketed", "default"), "plain": ("single", "padded")}
# What `best` tries: how many examples a peer takes at once matters as much as how it lays them out.
BEST = {
    "trl": [Contender("trl", c, n) for n in (8, 2, 1) for c in ("packed", "bucketed")],
    "plain": [Contender("plain", "single"), Contender("plain", "padded", 8), Contender("plain", "padded", 2)],
}
FTLIT = Contender("ftlit")


# ---- parity -----------------------------------------------------------------------------------------------------


def parity(args: argparse.Namespace) -> int:
    """Compares every step of ftlit and a peer.

    Returns:
        The exit status: 1 where they differ by more than the peer's tolerance.
    """
    quiet()
    peer: Contender = args.peer
    tokenizer = load_tokenizer(args.model)
    examples = encode_rows(args.rows, tokenizer, args.num)
    settings = _settings(args, peer)
    print(_describe(examples), flush=True)
    lm = load_model(args.model, "ftlit")
    adapter = initial_adapter(lm, settings.rank)
    ours = FTLIT.run(examples, lm, tokenizer, adapter, settings)
    del lm
    theirs = peer.run(examples, load_model(args.model, peer.framework), tokenizer, adapter, settings)
    apart = differences(ours, theirs)
    print(f"{'':4}  {'loss, nats a trained token':^35}  {'gradient norm':^35}  {'rate':^9}")
    both = f"{'ftlit':>11} {peer.framework:>11}"
    print(f"{'step':>4}  {both} {'|diff|':>11}  {both} {'rel. diff':>11}  {'both':>9}")
    for number, (a, b, d) in enumerate(zip(ours, theirs, apart, strict=True), start=1):
        print(
            f"{number:4}  {a.loss:11.6f} {b.loss:11.6f} {d.loss:11.1e}  "
            f"{a.grad_norm:11.6f} {b.grad_norm:11.6f} {d.grad_norm:11.1e}  {b.lr:9.2e}"
        )
    # Not `max(d) > tolerance`: what is not a number has to fail too.
    failed = [n for n, d in enumerate(apart, start=1) if not all(value <= peer.tolerance for value in d)]
    if failed:
        print(f"FAILED: ftlit and {peer} differ by more than {peer.tolerance:g} at step {failed[0]}.")
        return 1
    print(f"ftlit and {peer} agree to {peer.tolerance:g} at all {len(apart)} steps.")
    return 0


# ---- one run ----------------------------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> int:
    """One run in a process of its own; prints one line of JSON.

    The time is that of all steps but the first, from the end of the first to the end of the last: loading of batches,
    forward, backward, step and log.
    """
    quiet()
    torch.set_num_threads(args.threads)
    contender: Contender = args.contender
    examples = [Example(*example) for example in json.loads(Path(args.examples).read_text())]
    tokenizer, lm = load_tokenizer(args.model), load_model(args.model, contender.framework)
    settings = _settings(args, contender)
    timed = examples[settings.batch_size :]
    result: dict[str, Any] = {
        "contender": str(contender),
        "threads": torch.get_num_threads(),
        "tokens": sum(len(example.input_ids) for example in timed),
        "trained_tokens": sum(example.num_targets for example in timed),
        "gflop": matmul_flops(lm, timed, settings) / 1e9,
    }
    adapter = initial_adapter(lm, settings.rank)

    def on_start() -> None:
        result["rate_before"] = machine_rate()
        reset_peak_memory()

    records = contender.run(examples, lm, tokenizer, adapter, settings, on_start)
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


def _spawn(args: argparse.Namespace, contender: Contender, examples: Sequence[Example], folder: str) -> dict[str, Any]:
    """Runs `child` and reads its line.

    Raises:
        SystemExit: If it failed.
    """
    file = Path(folder) / "examples.json"
    file.write_text(json.dumps(examples))
    command = [sys.executable, __file__, "child", "--model", args.model, "--examples", str(file)]
    command += ["--contender", str(contender), "--threads", str(args.threads), "--max_tokens", str(args.max_tokens)]
    command += ["--method", args.method, "--batch_size", str(args.batch_size)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"contender"')]
    if done.returncode or not lines:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        raise SystemExit(f"the run of {contender} failed with exit status {done.returncode}.")
    return json.loads(lines[-1])


def _best(args: argparse.Namespace, peer: Contender, examples: Sequence[Example], folder: str) -> Contender:
    """A peer's fastest setting, from one timed step of each.

    By processor time: the wall clock of one step says more about who else is on the machine.
    """
    if peer.configuration != "best":
        return peer
    tried = [
        c for c in BEST[peer.framework] if (not peer.micro or c.micro == peer.micro) and c.micro <= args.batch_size
    ]
    seconds = {}
    for contender in tried:
        run = _spawn(args, contender, examples[: 2 * args.batch_size], folder)
        seconds[contender] = run["cpu_seconds"]
        print(f"one step of {contender}: {run['seconds']:.1f} s, processor {run['cpu_seconds']:.1f} s", flush=True)
    return min(tried, key=lambda contender: seconds[contender])


# ---- speed ------------------------------------------------------------------------------------------------------

HEADER = (
    f"{'':4} {'':<16} {'wall':>7} {'cpu':>7} {'tokens/s':>9} {'trained':>9} {'peak':>6} "
    f"{'GFLOP/s':>13} {'x floor':>11}  {'loss at step':^23}\n"
    f"{'pair':>4} {'run':<16} {'s':>7} {'s':>7} {'':>9} {'tokens/s':>9} {'MiB':>6} "
    f"{'before':>6} {'after':>6} {'wall':>5} {'cpu':>5}  {'1':>7} {'2':>7} {'last':>7}"
)


def _line(run: Mapping[str, Any]) -> str:
    losses, floors = run["losses"], floor_ratios(run)
    return (
        f"{run['contender']:<16} {run['seconds']:7.2f} {run['cpu_seconds']:7.2f} "
        f"{run['tokens'] / run['seconds']:9.0f} {run['trained_tokens'] / run['seconds']:9.0f} "
        f"{run['peak_rss_mib']:6} {run['rate_before'][0]:6.0f} {run['rate_after'][0]:6.0f} "
        f"{floors[0]:5.2f} {floors[1]:5.2f}  {losses[0]:7.4f} {losses[1]:7.4f} {losses[-1]:7.4f}"
    )


def _in_turn(
    args: argparse.Namespace, contenders: Sequence[Contender], examples: Sequence[Example], folder: str
) -> dict[Contender, list[dict[str, Any]]]:
    """Every contender `args.pairs` times, the order turned round each time.

    Raises:
        SystemExit: If one of them does not train the same thing as ftlit.
    """
    runs: dict[Contender, list[dict[str, Any]]] = {contender: [] for contender in contenders}
    print(HEADER)
    for pair in range(1, args.pairs + 1):
        for contender in contenders if pair % 2 else contenders[::-1]:
            runs[contender].append(_spawn(args, contender, examples, folder))
            print(f"{pair:4} {_line(runs[contender][-1])}", flush=True)
        ours = runs[FTLIT][-1]
        for peer in contenders[1:]:
            first, theirs = ours["losses"][0], runs[peer][-1]["losses"][0]
            if not abs(first - theirs) <= peer.tolerance:
                raise SystemExit(
                    f"No timing: the losses of the first step, {first:.6f} of ftlit and {theirs:.6f} of {peer}, differ "
                    f"by more than {peer.tolerance:g}, so they do not train the same thing."
                )
        rates = [run[-1][when][0] for run in runs.values() for when in ("rate_before", "rate_after")]
        if max(rates) > 1.1 * min(rates):
            print(f"     (the machine's own rate moved by {max(rates) / min(rates) - 1:.0%} during this pair)")
    return runs


def _compare(runs: Mapping[Contender, Sequence[Mapping[str, Any]]]) -> None:
    """Prints what ftlit gains over each peer: each pair and the median."""
    for peer, theirs in runs.items():
        if peer == FTLIT:
            continue
        print(f"ftlit against {peer}, each pair and median:")
        for name, key in (("times the tokens/s by wall time", "seconds"), ("by processor time", "cpu_seconds")):
            ratios = [b[key] / a[key] for a, b in zip(runs[FTLIT], theirs, strict=True)]
            print(f"  {name}: {', '.join(f'{r:.2f}' for r in ratios)}; median {statistics.median(ratios):.2f}")
        ours, others = (statistics.median(run["peak_rss_mib"] for run in side) for side in (runs[FTLIT], theirs))
        print(f"  peak memory: {ours:.0f} MiB against {others:.0f} MiB")


def speed(args: argparse.Namespace) -> int:
    """Times ftlit and the peers in turn and prints runs, ratios and floors.

    Returns:
        The exit status: 1 if there is too little to time.
    """
    examples = encode_rows(args.rows, load_tokenizer(args.model), args.num)
    if len(examples) <= args.batch_size:
        print(f"{len(examples)} examples are one optimizer step, and the first is not timed: give a larger --num.")
        return 1
    print(
        f"{_describe(examples, args)}, {args.method}, {args.threads} threads, load {os.getloadavg()[0]:.2f}", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        contenders = [FTLIT, *(_best(args, peer, examples, folder) for peer in args.peers)]
        _compare(_in_turn(args, contenders, examples, folder))
    return 0


def lengths(args: argparse.Namespace) -> int:
    """Times examples of several lengths, the same number of tokens of each, and prints a table."""
    stream = encode_rows(args.rows, load_tokenizer(args.model), 999, max_length=1 << 20)
    table: dict[int, dict[Contender, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for length in args.lengths:
            args.batch_size = max(1, args.tokens // length)
            examples = of_length(stream, length, args.batch_size * args.steps)
            print(f"{_describe(examples, args)}, each of {length} tokens", flush=True)
            contenders = [FTLIT, *(_best(args, peer, examples, folder) for peer in args.peers)]
            table[length] = _in_turn(args, contenders, examples, folder)
            _compare(table[length])
    print(f"{'length':>6}  {'run':<16} {'tokens/s':>9} {'cpu tokens/s':>12} {'x floor (cpu)':>13} {'peak MiB':>8}")
    for length, runs in table.items():
        for contender, each in runs.items():
            median = sorted(each, key=lambda run: run["cpu_seconds"])[len(each) // 2]
            print(
                f"{length:6}  {contender!s:<16} {median['tokens'] / median['seconds']:9.0f} "
                f"{median['tokens'] / median['cpu_seconds']:12.0f} {floor_ratios(median)[1]:13.2f} "
                f"{median['peak_rss_mib']:8}"
            )
    return 0


# ---- the command line -------------------------------------------------------------------------------------------


def _describe(examples: Sequence[Example], args: argparse.Namespace | None = None) -> str:
    tokens, trained = sum(len(e.input_ids) for e in examples), sum(e.num_targets for e in examples)
    size = Settings().batch_size if args is None else args.batch_size
    steps = -(-len(examples) // size)
    return f"{len(examples)} examples, {tokens:,} tokens, {trained:,} trained, {steps} optimizer steps of {size}"


def _settings(args: argparse.Namespace, contender: Contender) -> Settings:
    return Settings(
        method=args.method,
        lr=1e-3 if args.method == "lora" else 1e-5,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens or None,
        micro=contender.micro,
    )


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    for name, run, summary in (
        ("parity", parity, "the same loss and gradient norm at every step?"),
        ("speed", speed, "time and memory of the optimizer steps, in turn"),
        ("lengths", lengths, "the same for examples of one length each"),
        ("child", child, "one run of `speed`; started by it"),
    ):
        mode = modes.add_parser(name, help=summary, description=summary)
        mode.set_defaults(run=run)
        mode.add_argument("--model", required=True, help="a transformers folder")
        mode.add_argument("--method", choices=("lora", "full"), default="lora")
        mode.add_argument("--max_tokens", type=int, default=1024, help="ftlit's data.max_tokens; 0: no bound")
        mode.add_argument("--batch_size", type=int, default=8, help="examples in an optimizer step")
        if name != "child":
            mode.add_argument("--rows", required=True, help="a .json or .jsonl file of conversations")
        if name != "parity":
            mode.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each run")
    for name, num in (("parity", 32), ("speed", 64)):
        modes.choices[name].add_argument("--num", type=int, default=num, help="how many of the rows")
    for name, peers in (("speed", "trl:best"), ("lengths", "")):
        mode = modes.choices[name]
        mode.add_argument("--pairs", type=int, default=3, help="runs of each contender")
        default = [Contender.parse(peer) for peer in peers.split()]
        mode.add_argument(
            "--peers", type=Contender.parse, nargs="*", default=default, help="such as trl:best plain:best"
        )
    modes.choices["lengths"].add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    modes.choices["lengths"].add_argument("--tokens", type=int, default=4096, help="tokens in an optimizer step")
    modes.choices["lengths"].add_argument("--steps", type=int, default=3, help="optimizer steps, the first not timed")
    modes.choices["parity"].add_argument("--peer", type=Contender.parse, default=Contender("trl", "bucketed"))
    modes.choices["child"].add_argument("--contender", type=Contender.parse, required=True)
    modes.choices["child"].add_argument("--examples", required=True, help="a file that `speed` wrote")
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
