"""What forgetting depends on, and what holds it: a grid of short runs, claims about them, a table and pictures.

    python scripts/study/forgetting.py run    --model FOLDER --data FOLDER [--only GROUP ...] [--jobs 2]
    python scripts/study/forgetting.py report

`run` trains what is not yet done, each in a process of its own, and can be stopped and started at will. `report` reads
what is there: `runs.csv`, one picture a claim, and each claim with its numbers. The folder of data holds
`gsm8k_train.jsonl` (the target), `alpaca_en_demo.json` and `c4_demo.jsonl` (what is not to be forgotten).

Runs with one seed see the same rows in the same order, so differences between them are paired.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from runs import callback, command_line, fit_all, logged, summary

STEPS = 40
DOMAINS = {"chat": "general answers", "raw": "raw web text", "own": "its own text from before"}
SEEDS = (0, 1)
LR = 5e-4


class Run(NamedTuple):
    """One cell of the grid.

    Attributes:
        group: The claim it was made for; others use it too.
        name: Its folder.
        seed: Seed of the order of the rows and of the adapter.
        lr: Peak learning rate.
        value: What is varied in the group.
        args: Further arguments of `ftlit fit`.
    """

    group: str
    name: str
    seed: int
    lr: float
    value: float
    args: tuple[str, ...] = ()


def grid(data: Path) -> list[Run]:
    """All runs, the most needed first.

    Args:
        data: The folder of data.
    """
    runs = [Run("plain", f"plain-{seed}", seed, LR, 0.0, _judge()) for seed in SEEDS]
    runs += [Run("budget", f"budget-{share}", 0, LR, share, _budget(share)) for share in (0.01, 0.02, 0.05, 0.1)]
    runs += [
        Run("fixed", f"fixed-{w}", 0, LR, w, (*_replay(0.1, weight=w), *_judge())) for w in (0.3, 1.0, 3.0, 10.0, 30.0)
    ]
    runs += [
        Run("ratio", f"ratio-{ratio}-{seed}", seed, LR, ratio, _replay(ratio, weight=3.0))
        for ratio in (0.01, 0.05, 0.1)
        for seed in SEEDS
    ]
    chat = str(data / "alpaca_en_demo.json")
    runs += [Run("real", f"real-{seed}", seed, LR, 0.1, _replay(0.1, weight=3.0, rows=chat)) for seed in SEEDS]
    runs += [Run("rate", f"rate-{lr:g}-{seed}", seed, lr, lr) for lr in (1e-4, 2e-3) for seed in SEEDS]
    runs += [
        Run("l2", f"l2-{steps}", 0, LR, steps, callback("L2ToInit", {"half_life": steps})) for steps in (45, 15, 5)
    ]
    runs += [Run("decay", f"decay-{seed}", seed, LR, 0.1, ("--model.weight_decay", "0.1")) for seed in SEEDS]
    runs += [Run("between", f"alpha-{a}", 0, LR, a, callback("Interpolate", {"alpha": a})) for a in (0.5, 0.75)]
    return runs


def further(data: Path) -> list[Run]:
    """Runs for claims beyond the grid, made only when their group is named.

    Args:
        data: The folder of data.
    """
    raw, chat = str(data / "c4_demo.jsonl"), str(data / "alpaca_en_demo.json")
    runs = [
        Run("full", f"full-{lr:g}-{seed}", seed, lr, lr, ("--config", "peft/full"))
        for lr in (1e-5, 5e-5)
        for seed in SEEDS
    ]
    for objective in ("ce", "kl"):
        replay = (*_replay(0.1, weight=1.0, rows=raw), f"--trainer.callbacks.objective={objective}")
        runs += [Run("foreign", f"foreign-{objective}-{seed}", seed, LR, 0.1, replay) for seed in SEEDS]
    runs += [Run("select", f"{name}-{seed}", seed, LR, 0.0, callback(name)) for name in _CHOOSE for seed in SEEDS]
    ewc = (*callback("EWC"), f"--trainer.callbacks.rows={chat}")
    return [*runs, *(Run("ewc", f"ewc-{seed}", seed, LR, 0.0, ewc) for seed in SEEDS)]


_CHOOSE = ("TokenSelection", "SampleWeighting")


def _replay(ratio: float, weight: float, rows: str = "self") -> tuple[str, ...]:
    own = {"num_rows": 96, "max_new_tokens": 64} if rows == "self" else {}
    return callback("Replay", {"rows": rows, "ratio": ratio, "weight": weight, **own})


def _budget(share: float) -> tuple[str, ...]:
    settings = {"max_increase": share, "steering_documents": 32, "probes": 10}
    return (*_replay(0.1, weight=1.0), *callback("ForgettingBudget", settings | _DOCUMENTS))


def _judge() -> tuple[str, ...]:
    """Nothing is turned nor taken back: the documents of the verdict are read, that runs can be compared."""
    return callback("ForgettingBudget", {"controls": "[]", "project": "false", "probes": 1} | _DOCUMENTS)


_DOCUMENTS = {"documents": 240, "new_tokens": 64}


def arguments(run: Run, model: str, data: Path) -> tuple[str, ...]:
    """What `ftlit fit` is told for a cell.

    Args:
        run: The cell.
        model: The start model.
        data: The folder of data.
    """
    domains = {"chat": str(data / "alpaca_en_demo.json"), "raw": str(data / "c4_demo.jsonl"), "own": "self"}
    probe = {"domains": json.dumps(domains), "max_tokens": 6144, "at_validations": "false"}
    return (
        *("--config", "sft", "--config", "peft/lora", "--model.policy", model),
        *("--model.lr", str(run.lr), "--seed_everything", str(run.seed)),
        *("--data.train", str(data / "gsm8k_train.jsonl"), "--data.columns", "{instruction: question, output: answer}"),
        *("--data.seed", str(run.seed), "--data.validation", "0.006", "--data.max_length", "256"),
        *("--data.batch_size", "4", "--data.max_tokens", "1024", "--trainer.max_steps", str(STEPS)),
        *("--trainer.max_epochs", "-1", "--trainer.precision", "bf16-mixed"),
        *callback("ForgettingProbe", probe | {"own_rows": _DOCUMENTS["documents"], "own_new_tokens": 64}),
        *run.args,
    )


def results(data: Path, out: Path) -> Iterator[dict[str, Any]]:
    """What is known of each cell that is done."""
    for run in [*grid(data), *further(data)]:
        done = summary(out / run.name)
        if done is None:
            continue
        start, end = done["start"], done["end"]
        row: dict[str, Any] = {**run._asdict(), "args": " ".join(run.args), "seconds": round(done["seconds"])}
        row |= {"learnt": start["val/loss"] - end["val/loss"], "target_loss": end["val/loss"]}
        for domain in DOMAINS:
            for key in ("change", "change_low", "change_high", "kl"):
                row[f"{domain}_{key}"] = end[f"forgetting/{domain}/{key}"]
        row |= {key: end.get(f"forgetting/{key}") for key in ("target/kl", "weights/change")}
        for key in _VERDICT:
            values = logged(out / run.name, f"forgetting/budget/{key}")
            row[key] = values[-1][1] if values else None
        yield row


_VERDICT = ("verdict", "verdict_low", "verdict_high", "alpha", "kept")


# ---- claims -----------------------------------------------------------------------------------------------------


def claims(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Each claim of `research` that the runs which are done can speak of, as found."""
    by_name = {row["name"]: row for row in rows}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    plain = groups.get("plain", [])
    if not plain:
        return
    if "rate" in groups:
        found = sorted([*plain, *groups["rate"]], key=lambda row: row["lr"])
        yield "C1 forgetting rises with the rate: " + _each(found, "lr") + _steps(found, "lr")
    if "ratio" in groups:
        found = sorted([*plain, *groups["ratio"]], key=lambda row: row["value"])
        yield "C3 forgetting falls with the share of replay: " + _each(found, "value") + _steps(found, "value")
    if "real" in groups:
        pairs = [(by_name.get(f"ratio-0.1-{row['seed']}"), row) for row in groups["real"]]
        known = [(own, real) for own, real in pairs if own is not None]
        for domain in DOMAINS:
            shares = [
                f"own text {_removed(plain, own, domain)}, real rows {_removed(plain, real, domain)}"
                for own, real in known
            ]
            yield f"C4 share of the change on {domain} that KL replay removes: " + "; ".join(shares)
    if "l2" in groups:
        found = sorted([plain[0], *groups["l2"]], key=lambda row: -(row["value"] or math.inf))
        yield "C6 pull to the start, half-life in steps (0: none): " + _each(found, "value") + _steps(found, "value")
    if "decay" in groups:
        both = [(next(one for one in plain if one["seed"] == row["seed"]), row) for row in groups["decay"]]
        differences = "; ".join(_difference(before, after) for before, after in both)
        yield f"C6 weight decay 0.1, change of forgetting: {differences}"
    if "between" in groups:
        yield "C7 back toward the start: " + "; ".join(
            f"alpha {row['value']}: {row['own_change'] / plain[0]['own_change']:.0%} of the forgetting, "
            f"{row['learnt'] / plain[0]['learnt']:.0%} of what was learnt"
            for row in groups["between"]
        )
    yield from _further_claims(groups)
    if len(rows) > 2:
        lost = [row["own_change"] for row in rows]
        ranks = {key: _rank_correlation([row[key] for row in rows], lost) for key in ("target/kl", "weights/change")}
        yield (
            f"C8 rank correlation with the forgetting of its own text over {len(rows)} runs: KL on the target rows "
            f"{ranks['target/kl']:.2f}, change of the weights {ranks['weights/change']:.2f}"
        )
    fixed = groups.get("fixed", [])
    for row in groups.get("budget", []):
        limit = math.log1p(row["value"])
        best = max((one["learnt"] for one in [*plain[:1], *fixed] if one["verdict"] <= limit), default=math.nan)
        yield (
            f"C10 budget {row['value']:.0%}: {'met' if row['verdict'] <= limit else 'NOT met'}, perplexity "
            f"{math.expm1(row['verdict']):+.2%} [{math.expm1(row['verdict_low']):+.2%}, "
            f"{math.expm1(row['verdict_high']):+.2%}], alpha {row['alpha']:.2f}, learnt {row['learnt']:.4f} "
            f"({row['learnt'] / plain[0]['learnt']:.1%} of plain; the best fixed weight that meets it {best:.4f}, "
            f"{(best - row['learnt']) / plain[0]['learnt']:+.1%} of plain's gain)"
        )
    if fixed:
        yield "C10 fixed weights: " + "; ".join(
            f"{row['value']:g}: perplexity {math.expm1(row['verdict']):+.2%} [{math.expm1(row['verdict_low']):+.2%}, "
            f"{math.expm1(row['verdict_high']):+.2%}], learnt {row['learnt']:.4f}"
            for row in [*plain[:1], *fixed]
        )


def _further_claims(groups: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """What the groups beyond the grid can speak of, beside plain LoRA."""
    plain = groups["plain"]
    if "full" in groups:
        yield f"C2 LoRA: {_each(plain, 'lr')}; full fine-tuning: {_each(groups['full'], 'lr')}"
    for group, claim in (
        ("foreign", "C5 replay of raw web text, what is lost of general answers"),
        ("select", "C9 leaving out or weighing less what surprises, what is lost of its own text"),
        ("ewc", "EWC, what is lost of its own text"),
    ):
        domain = "chat" if group == "foreign" else "own"
        bases = {one["seed"]: one for one in plain}
        found = [
            f"{row['name']} {_difference(bases[row['seed']], row, domain)} against plain, learnt {row['learnt']:.4f}"
            for row in groups.get(group, [])
            if row["seed"] in bases
        ]
        if found:
            yield f"{claim}: {'; '.join(found)}"


def _difference(before: dict[str, Any], after: dict[str, Any], domain: str = "own") -> str:
    """How much more is lost, with an interval that is too wide: as if the documents of the two were not the same."""
    one, other = (row[f"{domain}_change"] for row in (before, after))
    half = math.hypot(*(_half(row, domain) for row in (before, after)))
    return f"{other - one:+.4f} [{other - one - half:+.4f}, {other - one + half:+.4f}]"


def _half(row: dict[str, Any], domain: str) -> float:
    return (row[f"{domain}_change_high"] - row[f"{domain}_change_low"]) / 2


def _steps(rows: Sequence[dict[str, Any]], value: str) -> str:
    """The differences from each value to the next, seed by seed."""
    lines = []
    for seed in SEEDS:
        own = [row for row in rows if row["seed"] == seed]
        found = [f"{a[value]:g} to {b[value]:g} {_difference(a, b)}" for a, b in itertools.pairwise(own)]
        lines += [f"seed {seed}: " + ", ".join(found)] if found else []
    return ". Differences: " + "; ".join(lines)


def _removed(plain: Sequence[dict[str, Any]], row: dict[str, Any], domain: str) -> str:
    """The share of plain's change that is not there, with its interval by the delta method."""
    base = next(one for one in plain if one["seed"] == row["seed"])
    before, after = base[f"{domain}_change"], row[f"{domain}_change"]
    half = math.hypot(_half(row, domain) / before, after * _half(base, domain) / before**2)
    share = 1 - after / before
    return f"{share:.0%} [{share - half:.0%}, {share + half:.0%}]"


def _rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def _each(rows: Sequence[dict[str, Any]], value: str) -> str:
    """What each lost of its own text, nats a token with its 95 % interval, and what it learnt."""
    return "; ".join(
        f"{row[value]:g}: lost {row['own_change']:+.4f} [{row['own_change_low']:+.4f}, {row['own_change_high']:+.4f}], "
        f"learnt {row['learnt']:.4f}"
        for row in rows
    )


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """All runs on the plane of what was learnt and what was lost, and each claim by itself."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    for domain in DOMAINS:
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        axes.axhline(0, color="grey", linewidth=0.8)
        for number, group in enumerate(dict.fromkeys(row["group"] for row in rows)):
            for seed, mark in zip(SEEDS, "os", strict=True):
                some = [row for row in rows if row["group"] == group and row["seed"] == seed]
                some.sort(key=lambda row: row["value"])
                changes = [100 * math.expm1(row[f"{domain}_change"]) for row in some]
                label = None if seed else group
                where = [row["learnt"] for row in some]
                axes.plot(where, changes, f"{mark}-", color=f"C{number}", alpha=0.7, label=label)
        axes.set_xlabel("learnt: fall of the loss on held-out target rows, nats a token")
        axes.set_ylabel("lost: rise of the perplexity, %")
        axes.set_title(f"Every run: learnt, and lost on {DOMAINS[domain]} (squares: second seed)")
        axes.legend()
        figure.savefig(out / f"plane-{domain}.png", dpi=150)
        plt.close(figure)
    figure, panels = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    _draw_claims(rows, panels.flat)
    figure.savefig(out / "claims.png", dpi=120)
    plt.close(figure)


def _draw_claims(rows: Sequence[dict[str, Any]], panels: Iterator[Any]) -> None:
    """What is lost of its own text, % more perplexity with its interval, over what each claim varies."""
    plain = [row for row in rows if row["group"] == "plain"]

    def of(*groups: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["group"] in groups]

    def curve(
        axes: Any, some: Sequence[dict[str, Any]], places: Sequence[float], label: str, mark: str = "o-",
        key: str = "own_change",
    ) -> None:  # fmt: skip
        middle, low, high = ([100 * math.expm1(row[f"{key}{end}"]) for row in some] for end in ("", "_low", "_high"))
        errors = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        axes.errorbar(places, middle, yerr=errors, fmt=mark, capsize=3, label=label)

    def over(axes: Any, some: Sequence[dict[str, Any]], key: str, title: str, words: str) -> None:
        for seed in SEEDS:
            own = sorted((row for row in some if row["seed"] == seed), key=lambda row: row[key])
            if own:
                curve(axes, own, [row[key] for row in own], f"seed {seed}")
        axes.set(title=title, xlabel=words)

    axes = next(panels)
    over(axes, [*plain, *of("rate")], "lr", "C1: a larger rate forgets more", "peak learning rate")
    axes.set_xscale("log")
    title = "C3: replay, a little is enough"
    over(next(panels), [*plain, *of("ratio")], "value", title, "replayed share of the trained tokens")
    axes = next(panels)
    kinds = {"none": plain, "its own text": [row for row in of("ratio") if row["value"] == 0.1], "rows": of("real")}
    for seed in SEEDS:
        some = [row for kind in kinds.values() for row in kind if row["seed"] == seed]
        curve(axes, some, [place + 0.1 * seed for place in range(len(some))], f"seed {seed}", "o")
    axes.set_xticks(range(len(kinds)), list(kinds))
    axes.set(title="C4: what is replayed", xlabel="10 % of the trained tokens")
    axes = next(panels)
    pulled = sorted(of("l2"), key=lambda row: -row["value"])
    curve(axes, [plain[0], *pulled], [plain[0]["learnt"], *(row["learnt"] for row in pulled)], "L2-to-init")
    replayed = sorted([plain[0], *of("fixed")], key=lambda row: row["learnt"])
    curve(axes, replayed, [row["learnt"] for row in replayed], "KL replay")
    curve(axes, of("decay"), [row["learnt"] for row in of("decay")], "weight decay", "s")
    axes.set(title="C6: the exchange of each control", xlabel="learnt, nats a token")
    axes = next(panels)
    between = [*sorted(of("between"), key=lambda row: row["value"]), plain[0]]
    whole = plain[0]
    for key, label in (("own_change", "lost"), ("learnt", "learnt")):
        shares = [0.0, *(100 * row[key] / whole[key] for row in between)]
        axes.plot([0, *(row["value"] for row in between[:-1]), 1], shares, "o-", label=label)
    axes.plot([0, 1], [0, 100], color="grey", linewidth=0.8)
    axes.set(title="C7: part of the way from the start", xlabel="alpha", ylabel="% of plain LoRA's")
    axes = next(panels)
    for group, label in (("fixed", "fixed weights"), ("budget", "budgets")):
        some = sorted([*(plain[:1] if group == "fixed" else []), *of(group)], key=lambda row: row["learnt"])
        curve(axes, some, [row["learnt"] for row in some], label, key="verdict")
    for row in of("budget"):
        axes.axhline(100 * row["value"], color="tab:red", linestyle="--", linewidth=0.6)
    axes.set(title="C10: budgets (dashed) beside fixed weights", xlabel="learnt, nats a token")
    for panel in axes.figure.axes:
        panel.grid(alpha=0.3)
        panel.set_ylabel(panel.get_ylabel() or "rise of perplexity of its own text, %")
        panel.legend()


def main() -> None:
    """Reads the command line."""
    args = command_line(
        __doc__, "runs/study", "groups of the grid, or full, foreign, select, ewc; the grid when left out"
    )
    if args.mode == "run":
        data = args.data.resolve()
        runs = sorted([*grid(data), *further(data)] if args.only else grid(data), key=lambda run: run.seed)
        todo = {run.name: arguments(run, args.model, data) for run in runs if not args.only or run.group in args.only}
        fit_all(todo, args.out, args.jobs)
    rows = list(results(args.data.resolve(), args.out))
    if not rows:
        sys.exit(f"{args.out} holds no finished run.")
    with (args.out / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.out)
    print("\n".join(claims(rows)))


if __name__ == "__main__":
    main()
