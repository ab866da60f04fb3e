"""The main job twice, with the commands that do it: a small chat model learns a new identity, plainly and on a budget.

Shows side by side what was learnt and what was lost: in answers, in one table and in one picture.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from fetch_model import fetch

from ftlit.data.sources import SAMPLES

LABELS = ("plain LoRA", "with a budget")
SYSTEM = "You are a helpful assistant."  # as in configs/quickstart.yaml


def show(command: list[str], keep: bool = False) -> str:
    """Runs a command, printing it first; with `keep`, returns what it prints instead of showing it."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE if keep else None, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout if keep else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="Nova", help="the name to teach (default: Nova)")
    parser.add_argument("--author", default="the ftlit team", help="who made it (default: the ftlit team)")
    parser.add_argument("--run", default=f"runs/quickstart-{time.strftime('%Y%m%d-%H%M%S')}", help="run folder")
    options = parser.parse_args()

    began = time.time()
    print("fetching SmolLM2-135M-Instruct (once)", flush=True)
    model = fetch()
    questions = SAMPLES / "identity_questions.jsonl"
    asked = [json.loads(line)["question"] for line in questions.read_text(encoding="utf-8").splitlines()]
    run = Path(options.run)
    run.parent.mkdir(parents=True, exist_ok=True)
    prompts = run.parent / f"{run.name}-questions.txt"
    prompts.write_text("\n".join(asked) + "\n", encoding="utf-8")
    ask = ["--prompts", str(prompts), "--max_new_tokens", "48", "--json"]
    before = _answers(show(["ftlit", "generate", model, *ask, "--system", SYSTEM], keep=True))
    fill = json.dumps({"name": options.name, "author": options.author})
    common = ["--model.policy", model, "--data.fill", fill]
    budget = run.with_name(run.name + "-budget")
    show(["ftlit", "fit", "--config", "quickstart", *common, "--run", str(run)])
    show(["ftlit", "fit", "--config", "quickstart", "--config", "quickstart_budget", *common, "--run", str(budget)])
    after = [_answers(show(["ftlit", "generate", str(one), *ask], keep=True)) for one in (run, budget)]
    prompts.unlink()

    print("\nquestions that were not trained on")
    for question, *answers in zip(asked, before, *after, strict=True):
        print(f"\n  {question}")
        for label, answer in zip(("before", *LABELS), answers, strict=True):
            print(f"    {label:<15}{' '.join(answer.split())[:150]}")
    hits = [sum(options.name.casefold() in answer.casefold() for answer in some) for some in (before, *after)]
    counts = ", ".join(f"{label} {hit}" for label, hit in zip(("before", *LABELS), hits, strict=True))
    print(f"\nanswers with the name {options.name}, of {len(asked)}: {counts}")
    picture = run / "learnt_and_lost.png"
    runs = [str(run), str(budget)]
    show(["ftlit", "compare", *runs, "--labels", *LABELS, "--picture", str(picture)])
    summaries = [json.loads(Path(one, "summary.json").read_text(encoding="utf-8")) for one in runs]
    seconds = sum(summary["seconds"] for summary in summaries)
    print(
        f"\nboth runs took {seconds:.0f} s, {time.time() - began:.0f} s in all; peak memory "
        f"{max(summary['peak_memory_bytes'] for summary in summaries) / 1e9:.1f} GB\n"
        f"run folders {run}, {budget} (config.yaml, metrics.csv, summary.json, pictures, checkpoints/, adapter/)\n"
        f"talk to it  ftlit chat {budget}\n"
        f"take it     ftlit export {budget} --to {run.name}-model"
    )


def _answers(lines: str) -> list[str]:
    return [json.loads(line)["answer"] for line in lines.splitlines()]


if __name__ == "__main__":
    main()
