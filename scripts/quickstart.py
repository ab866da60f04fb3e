"""The main job twice, with the commands that do it: a small chat model learns a new identity, plainly and on a budget.

Shows side by side what was learnt and what was lost: in answers, in one table and in one picture.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    summaries = [json.loads((one / "summary.json").read_text(encoding="utf-8")) for one in (run, budget)]
    hits = [sum(options.name.casefold() in answer.casefold() for answer in some) for some in (before, *after)]
    _table(options.name, hits, len(asked), summaries)
    picture = run / "learnt_and_lost.png"
    _draw(picture, (run, budget))
    seconds = sum(summary["seconds"] for summary in summaries)
    print(
        f"\nboth runs took {seconds:.0f} s, {time.time() - began:.0f} s in all; peak memory "
        f"{max(summary['peak_memory_bytes'] for summary in summaries) / 1e9:.1f} GB\n"
        f"picture     {picture}\n"
        f"run folders {run}, {budget} (config.yaml, metrics.csv, summary.json, pictures, checkpoints/, adapter/)\n"
        f"talk to it  ftlit chat {budget}\n"
        f"take it     ftlit export {budget} --to {run.name}-model"
    )


def _answers(lines: str) -> list[str]:
    return [json.loads(line)["answer"] for line in lines.splitlines()]


def _table(name: str, hits: list[int], asked: int, summaries: list[dict[str, Any]]) -> None:
    """Learnt and lost, without and with the budget."""
    start, ends = summaries[0]["start"], [summary["end"] for summary in summaries]
    rows = [(f"answers with the name {name}", *(f"{hit} of {asked}" for hit in hits))]
    rows.append(("loss of held-out identity rows, nats a token", *(f"{v['val/loss']:.3f}" for v in (start, *ends))))
    changes = [end["forgetting/own/change"] for end in ends]
    ranges = [(end["forgetting/own/change_low"], end["forgetting/own/change_high"]) for end in ends]
    rows.append(("perplexity of its own text from before", "", *(f"{math.expm1(change):+.1%}" for change in changes)))
    bounds = (f"{math.expm1(low):+.1%} to {math.expm1(high):+.1%}" for low, high in ranges)
    rows.append(("  95 % interval", "", *bounds))
    print(f"\n{'':<46}{'before':>10}{LABELS[0]:>18}{LABELS[1]:>18}")
    for label, first, *others in rows:
        print(f"{label:<46}{first:>10}" + "".join(f"{other:>18}" for other in others))


def _draw(path: Path, runs: tuple[Path, Path]) -> None:
    """Where both runs ended: what they learnt to the right, what they lost upwards."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axhline(5, color="tab:red", linestyle="--", linewidth=1, label="budget: +5 %")
    axes.plot(0, 0, "o", color="black", label="before training")
    for folder, label, colour in zip(runs, LABELS, ("tab:orange", "tab:blue"), strict=True):
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        learnt = summary["start"]["val/loss"] - summary["end"]["val/loss"]
        keys = ("change", "change_low", "change_high")
        lost, low, high = (100 * math.expm1(summary["end"][f"forgetting/own/{key}"]) for key in keys)
        axes.errorbar(learnt, lost, yerr=[[lost - low], [high - lost]], fmt="o", capsize=4, color=colour, label=label)
        axes.annotate("", (learnt, lost), (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.5})
    axes.set_xlabel("learnt: fall of the loss on held-out identity rows, nats a token")
    axes.set_ylabel("lost: rise of the perplexity on\nthe model's own text from before, % (95 % interval)")
    axes.set_title("The same rows learnt, with and without a budget of forgetting")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
