"""What preferences teach, and what that costs: DPO with an adapter, of the whole model, on a budget; a reward model.

    python scripts/study/preferences.py run    --model FOLDER --data FOLDER [--only NAME ...] [--jobs 2]
    python scripts/study/preferences.py report

The folder of data holds `dpo_en_demo.json` (answers that people would choose or reject, with real differences) and
`alpaca_en_demo.json`, of which a preference is made that can be seen at once: the first sentence of an answer is better
than the whole; that is taught gently, at five times the rate, and at that rate on a budget. One row in five is held
out; reward models are trained three times, so that every pair is held out once. `run` trains what is not yet done and
can be stopped and started at will.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runs import callback, command_line, fit_all, logged, show, summary

from ftlit.metrics.intervals import wilson

PEOPLE, GENERAL = "dpo_en_demo.json", "alpaca_en_demo.json"
BUDGET = 0.02
REWARDS = ("reward-0", "reward-1", "reward-2")
SHORTER = ("shorter", "shorter-hard", "shorter-held")
_OWN = {"documents": 160, "new_tokens": 64}


def grid(model: str, data: Path, out: Path) -> dict[str, tuple[str, ...]]:
    """Arguments of `ftlit fit` for each run.

    Args:
        model: The start model.
        data: The folder of data.
        out: The folder of the study; rows made here are written to it.
    """
    common = (
        *("--model.policy", model, "--seed_everything", "0", "--trainer.precision", "bf16-mixed"),
        *("--data.validation", "0.2", "--data.batch_size", "8", "--data.max_tokens", "2048"),
    )
    domains = {"chat": str(data / GENERAL), "own": "self"}
    probe = callback(
        "ForgettingProbe",
        {"domains": json.dumps(domains), "max_tokens": 4096, "own_rows": _OWN["documents"], "kl": "false"}
        | {"own_new_tokens": _OWN["new_tokens"]},
    )
    people = (*common, "--data.train", str(data / PEOPLE))
    steps = ("--data.max_length", "384", "--trainer.max_steps", "30", "--trainer.max_epochs", "-1")
    pairs = ("--config", "dpo", *people, *steps, "--model.cache_reference", "true")  # one cache for all: one start
    lora = (*pairs, "--model.lr", "5e-4", *probe)
    replay = callback("Replay", {"num_rows": 96, "max_new_tokens": 64})
    held = callback("ForgettingBudget", {"max_increase": BUDGET, "steering_documents": 32, "probes": 8} | _OWN)
    asked = callback("GenerationEval", {"num_rows": 24, "max_new_tokens": 128})
    shorter = (
        *("--config", "dpo", *common, "--data.train", str(shorter_pairs(data / GENERAL, out / "shorter.jsonl"))),
        *(*steps, "--model.lr", "1e-4", *probe, *asked),
    )
    reward = {}
    for name, (train, rest) in zip(REWARDS, _folds(data / PEOPLE, out), strict=True):
        reward[name] = (
            *("--config", "reward", "--config", "peft/lora", *common, "--data.train", str(train)),
            *("--data.validation", str(rest), "--data.max_length", "384", "--model.lr", "3e-4"),
            *("--trainer.max_epochs", "2"),
        )
    return {
        "lora": lora,
        "full": (*pairs, "--config", "peft/full", "--model.lr", "2e-5", *probe),
        "budget": (*lora, *replay, *held),
        "shorter": shorter,
        "shorter-hard": (*shorter, "--model.lr", "5e-4"),
        "shorter-held": (*shorter, "--model.lr", "5e-4", *replay, *held),
        **reward,
    }


def _folds(rows: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    """Writes the rows in parts, so that each is held out once, the others being trained on."""
    known = json.loads(rows.read_text(encoding="utf-8"))
    for number in range(len(REWARDS)):
        paths = out / f"train-{number}.json", out / f"held-out-{number}.json"
        for path, held in zip(paths, (False, True), strict=True):
            part = [row for place, row in enumerate(known) if (place % len(REWARDS) == number) == held]
            path.write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
        yield paths


def shorter_pairs(rows: Path, path: Path) -> Path:
    """Writes pairs of the first sentence of an answer (chosen) and the whole (rejected)."""
    found = []
    for row in json.loads(rows.read_text(encoding="utf-8")):
        answer = row["output"].strip()
        first = re.match(r"[^\n]{20,200}?[.!?](?=\s|$)", answer)
        if first is None or len(answer.split()) < 40:
            continue
        prompt = "\n".join(filter(None, [row["instruction"], row["input"]]))
        turns = {"prompt": ("user", prompt), "chosen": ("assistant", first[0]), "rejected": ("assistant", answer)}
        found.append({key: [{"role": role, "content": text}] for key, (role, text) in turns.items()})
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in found), encoding="utf-8")
    return path


# ---- what was found ---------------------------------------------------------------------------------------------


def findings(out: Path) -> Iterator[str]:
    """What is known of the runs that are done, in lines."""
    for name in ("lora", "full", "budget", *SHORTER):
        folder = out / name
        if (done := summary(folder)) is not None:
            yield from _of_dpo(name, done, folder)
    for name in SHORTER:
        if summary(out / name) is not None:
            yield from _of_answers(name, out / name / "samples.jsonl")
    yield from _of_rewards(out)


def _of_rewards(out: Path) -> Iterator[str]:
    """Every part that is done, and these together: no pair was held out twice."""
    hits, pairs = 0.0, 0
    for number, name in enumerate(REWARDS):
        if (done := summary(out / name)) is None:
            continue
        start, end = done["start"], done["end"]
        held = len(json.loads((out / f"held-out-{number}.json").read_text(encoding="utf-8")))
        hits, pairs = hits + end["val/accuracy"] * held, pairs + held
        yield (
            f"{name}: held-out accuracy {start['val/accuracy']:.3f} -> {_bounded(end, 'val/accuracy')}, "
            f"loss {start['val/loss']:.4f} -> {end['val/loss']:.4f}, "
            f"calibration error {end['val/calibration_error']:.3f}"
        )
    if pairs:
        low, high = wilson(hits, pairs)
        yield f"reward models together: accuracy {hits / pairs:.3f} [{low:.3f}, {high:.3f}] on {pairs} pairs"


def _of_dpo(name: str, done: dict[str, Any], folder: Path) -> Iterator[str]:
    start, end = done["start"], done["end"]
    own, chat = (end[f"forgetting/{domain}/change"] for domain in ("own", "chat"))
    yield (
        f"{name}: {done['optimizer_steps']} steps, {done['seconds']:.0f} s; held out: loss {start['val/loss']:.4f} -> "
        f"{end['val/loss']:.4f}, margin {_bounded(end, 'val/rewards/margins')}, accuracy "
        f"{_bounded(end, 'val/rewards/accuracies')}, better answer likelier {start['val/logps/accuracies']:.3f} -> "
        f"{end['val/logps/accuracies']:.3f}; perplexity of own text {math.expm1(own):+.1%} "
        f"[{math.expm1(end['forgetting/own/change_low']):+.1%}, {math.expm1(end['forgetting/own/change_high']):+.1%}], "
        f"of general answers {math.expm1(chat):+.1%}"
    )
    verdict = [logged(folder, f"forgetting/budget/{key}") for key in ("verdict", "verdict_low", "verdict_high", "kept")]
    if all(verdict):
        value, low, high, kept = (values[-1][1] for values in verdict)
        yield (
            f"  budget {BUDGET:.0%}: {'met' if value <= math.log1p(BUDGET) else 'NOT met'}, "
            f"{math.expm1(value):+.1%} [{math.expm1(low):+.1%}, {math.expm1(high):+.1%}], kept {kept:.0%} of the gain"
        )


def _bounded(values: dict[str, float], key: str) -> str:
    return f"{values[key]:.3f} [{values[f'{key}_low']:.3f}, {values[f'{key}_high']:.3f}]"


def _of_answers(name: str, path: Path) -> Iterator[str]:
    """Lengths, and three answers, before and after."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first, last = min(row["step"] for row in rows), max(row["step"] for row in rows)
    sides = [{row["row"]: row for row in rows if row["step"] == step} for step in (first, last)]
    words = [statistics.mean(len(row["answer"].split()) for row in side.values()) for side in sides]
    yield f"{name}: {words[0]:.0f} words an answer before, {words[1]:.0f} after, {len(sides[0])} held-out questions"
    for number in list(sides[0])[:3]:
        prompt = sides[0][number]["prompt"]
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        yield f"  {' '.join(question.split())[:120]}"
        for label, side in zip(("before", "after"), sides, strict=True):
            yield f"    {label:<7} {' '.join(side[number]['answer'].split())[:220]}"


def draw(out: Path) -> None:
    """What each run learnt and what it lost, with intervals of 95 %."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = [(name, done["end"]) for name in ("lora", "full", "budget", "shorter") if (done := summary(out / name))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 1 + 0.5 * len(found)), sharey=True, layout="constrained")
    for axes, key in ((left, "val/rewards/margins"), (right, "forgetting/own/change")):
        for row, (_, end) in enumerate(found):
            value, low, high = (end[f"{key}{which}"] for which in ("", "_low", "_high"))
            axes.errorbar(value, row, xerr=[[value - low], [high - value]], fmt="o", capsize=4, color="C0")
        axes.axvline(0, color="grey", linewidth=0.8)
    left.set_xlabel("learnt: margin of held-out pairs")
    right.set_xlabel("lost: change of NLL on its own text, nats a token")
    right.axvline(math.log1p(BUDGET), color="C3", linestyle="--", linewidth=1, label=f"budget of {BUDGET:.0%}")
    figure.legend(loc="outside upper right", fontsize=8)
    left.set_yticks(range(len(found)), [name for name, _ in found])
    left.set_ylim(len(found) - 0.5, -0.5)
    figure.savefig(out / "preferences.png", dpi=150)
    plt.close(figure)


def main() -> None:
    """Reads the command line."""
    args = command_line(
        __doc__, "runs/preferences", f"runs: lora, full, budget, {', '.join((*SHORTER, *REWARDS))}; all when left out"
    )
    if args.mode == "run":
        runs = grid(args.model, args.data.resolve(), args.out)
        fit_all({name: runs[name] for name in args.only or runs}, args.out, args.jobs)
    show(args.out, findings(args.out), draw)


if __name__ == "__main__":
    main()
