"""What the studies share: runs of `ftlit fit`, each in a process of its own, stopped and started at will."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def command_line(words: str | None, out: str, names: str, data: bool = True) -> argparse.Namespace:
    """Reads the command line of a study: `run` or `report`, and where things are; makes the folder of the study.

    Args:
        words: What the study is, for `--help`.
        out: Its folder, when none is given.
        names: What `--only` may name, in words.
        data: Whether it takes a folder of data.
    """
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("run", "report"))
    parser.add_argument("--model", help="the start model, a transformers folder")
    if data:
        parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of data")
    parser.add_argument("--out", type=Path, default=Path(out), help="the folder of the study")
    parser.add_argument("--only", nargs="*", help=names)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores")
    args = parser.parse_args()
    if args.mode == "run" and args.model is None:
        parser.error("run needs --model")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def callback(name: str, settings: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The arguments that add a callback.

    Args:
        name: Its class.
        settings: Its arguments.
    """
    given = (f"--trainer.callbacks.{key}={value}" for key, value in (settings or {}).items())
    return (f"--trainer.callbacks+={name}", *given)


def fit(folder: Path, args: Sequence[str], threads: int) -> float:
    """Trains one run, or goes on with it; returns its seconds.

    Args:
        folder: Its folder; what it prints is kept beside it, in a file of the same name that ends in `.log`.
        args: Arguments of `ftlit fit`.
        threads: Threads to compute with.

    Raises:
        RuntimeError: If it fails.
    """
    again = ["--ckpt_path", "last"] if (folder / "checkpoints").exists() else []
    command = [sys.executable, "-m", "ftlit", "fit", *args, "--run", str(folder), *again]
    where = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(where)}
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    began = time.time()
    log = folder.with_name(folder.name + ".log")
    with log.open("a", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, env=env).returncode
    if status:
        raise RuntimeError(f"{folder.name} ended with {status}: see {log}")
    return time.time() - began


def fit_all(runs: Mapping[str, Sequence[str]], out: Path, jobs: int = 1) -> None:
    """Trains what is not yet done.

    Where none is done the first is alone: it writes the texts and scores that others only read.

    Args:
        runs: Arguments of `ftlit fit` by the name of the run.
        out: The folder of the runs.
        jobs: Runs at a time; they share the cores.

    Raises:
        RuntimeError: If one fails.
    """
    todo = [name for name in runs if not (out / name / "summary.json").exists()]
    cores = os.cpu_count() or 1

    def one(name: str, threads: int) -> None:
        print(f"{name}: {fit(out / name, runs[name], threads):.0f} s", flush=True)

    if len(todo) == len(runs):
        one(todo.pop(0), cores)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda name: one(name, max(1, cores // jobs)), todo))


def show(out: Path, found: Iterable[str], draw: Callable[[Path], None]) -> None:
    """Prints what was found and draws it; ends where no run is done.

    Args:
        out: The folder of the study.
        found: What was found, in lines.
        draw: Draws it into the folder.
    """
    lines = list(found)
    if not lines:
        sys.exit(f"{out} holds no finished run.")
    draw(out)
    print("\n".join(lines))


def summary(folder: Path) -> dict[str, Any] | None:
    """What a run left in `summary.json`; None where it is not done."""
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def logged(folder: Path, key: str) -> list[tuple[int, float]]:
    """A metric over the steps, from `metrics.csv`."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [(int(row["step"]), float(row[key])) for row in csv.DictReader(file) if row.get(key)]


def samples(folder: Path, num: int = 4) -> Iterator[str]:
    """What a run of PPO answered to some held-out prompts before and after it, with the rewards, in lines.

    Args:
        folder: Its folder.
        num: How many prompts.
    """
    lines = (folder / "rollouts.jsonl").read_text(encoding="utf-8").strip().split("\n")
    rows: list[dict[str, Any]] = [row for row in map(json.loads, lines) if row["set"] != "train"]
    steps = [row["step"] for row in rows]
    first, last = ([row for row in rows if row["step"] == step][:num] for step in (min(steps), max(steps)))
    for before, after in zip(first, last, strict=True):
        yield "  " + " ".join(before["prompt"][-1]["content"].split())
        for label, row in (("before", before), ("after", after)):
            yield f"    {label:<7}{row['reward']:6.2f}  {' '.join(row['answer'].split())[:240]}"


__all__ = ["callback", "command_line", "fit", "fit_all", "logged", "samples", "show", "summary"]
