"""The main job once, with the commands that do it: teaches a small chat model a new identity and shows the outcome."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from fetch_model import fetch

from ftlit.data.sources import SAMPLES


def show(command: list[str], keep: bool = False) -> str:
    """Runs a command, printing it first; with `keep`, returns what it prints instead of showing it."""
    print("\n$ " + " ".join(part if part.replace("/", "").replace("_", "").isalnum() or part[:2] == "--" else
                            f"'{part}'" if " " in part else part for part in command), flush=True)  # fmt: skip
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
    system = "You are a helpful assistant."
    before = show(["ftlit", "generate", model, *ask, "--system", system], keep=True)
    fill = json.dumps({"name": options.name, "author": options.author})
    show(["ftlit", "fit", "--config", "quickstart", "--model.policy", model, "--data.fill", fill, "--run", str(run)])
    after = show(["ftlit", "generate", str(run), *ask], keep=True)

    hits = [0, 0]
    print("\nquestions that were not trained on")
    for first, second in zip(before.splitlines(), after.splitlines(), strict=True):
        answers = [json.loads(first)["answer"], json.loads(second)["answer"]]
        hits = [h + (options.name.casefold() in a.casefold()) for h, a in zip(hits, answers, strict=True)]
        print(f"\n  {json.loads(first)['prompt']}")
        for label, answer in zip(("before", "after"), answers, strict=True):
            print(f"    {label:<7}{' '.join(answer.split())[:150]}")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    rows = [
        (f"answers with the name {options.name}", f"{hits[0]} of {len(asked)}", f"{hits[1]} of {len(asked)}"),
        *(
            (
                f"loss, held-out {label} rows (nats a token)",
                f"{summary['start'][key]:.3f}",
                f"{summary['end'][key]:.3f}",
            )
            for label, key in (("identity", "val/loss"), ("general", "val/general/loss"))
        ),
    ]
    print(f"\n{'':<46}{'before':>10}{'after':>10}")
    for name, first, second in rows:
        print(f"{name:<46}{first:>10}{second:>10}")
    print(
        f"\n{summary['optimizer_steps']} steps in {summary['seconds']:.0f} s ({summary['tokens_per_s']:.0f} tokens/s, "
        f"peak memory {summary['peak_memory_bytes'] / 1e9:.1f} GB), {time.time() - began:.0f} s in all\n"
        f"run folder  {run} (config.yaml, metrics.csv, loss.png, summary.json, checkpoints/, adapter/)\n"
        f"talk to it  ftlit chat {run}\n"
        f"take it     ftlit export {run} --to {run.name}-model"
    )
    prompts.unlink()


if __name__ == "__main__":
    main()
