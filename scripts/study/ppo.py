"""Training on a reward that can be checked: PPO with three seeds, GRPO and RLOO, with curves and samples.

    python scripts/study/ppo.py run    --model FOLDER [--only NAME ...] [--jobs 2]
    python scripts/study/ppo.py report

The reward is `brief.brief`: what is asked about must be named in at most 12 words. The start model takes about 19.
Questions about things that no training prompt names are held out and answered greedily. The penalty on the distance
from the start is steered to 3 nats an answer; `free` is PPO without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from runs import callback, command_line, fit_all, logged, samples, show, summary

RUNS = ("ppo-0", "ppo-1", "ppo-2", "free", "grpo", "rloo")
ROLLOUTS, ANSWERS, EVERY = 16, 48, 4
THINGS = Path(__file__).with_name("things.txt").read_text(encoding="utf-8").split()
TARGET = 3  # nats an answer
HELD_OUT = 5  # every fifth thing
ASKED = "Answer in one short sentence."


def grid(model: str, out: Path) -> dict[str, tuple[str, ...]]:
    """Arguments of `ftlit fit` for each run.

    Args:
        model: The start model.
        out: The folder of the study; the prompts are written to it.
    """
    train = _prompts(out / "prompts.jsonl", [one for place, one in enumerate(THINGS) if place % HELD_OUT])
    held_out = _prompts(out / "held_out.jsonl", THINGS[::HELD_OUT])
    found = {}
    for name in RUNS:
        config, _, seed = name.replace("free", "ppo").partition("-")
        answers, epochs = (2, 2) if config == "ppo" else (4, 1)
        steps = _steps(name)
        free, held = {"coef": 0, "target": "null"}, {"target": TARGET, "rate": 0.5}  # 0.1 is slow for 16 rollouts
        if config != "ppo":  # two steps a rollout leave less time to steer it: it begins where it is needed
            held["coef"] = 0.2
        kl = [f"--model.kl.{key}={value}" for key, value in (free if name == "free" else held).items()]
        found[name] = (
            *("--config", config, "--config", "peft/lora", "--model.policy", model, "--model.reward", "brief.brief"),
            *("--seed_everything", seed or "0", "--data.seed", seed or "0", "--trainer.precision", "bf16-mixed"),
            *("--data.train", str(train), "--data.validation", str(held_out), "--data.max_tokens", "2048"),
            *(
                "--data.batch_size",
                str(ANSWERS // answers),
                "--model.num_answers",
                str(answers),
                "--model.max_new_tokens",
                "48",
            ),
            *("--model.update_epochs", str(epochs), "--model.num_minibatches", "2", *kl),
            *("--model.lr", "3e-4", "--trainer.max_steps", str(ROLLOUTS * steps), "--trainer.max_epochs", "-1"),
            *("--trainer.val_check_interval", str(EVERY * steps), "--trainer.check_val_every_n_epoch", "null"),
            *callback("ForgettingProbe", {"domains": "{own: self}", "max_tokens": 4096, "own_rows": 160}),
            "--trainer.callbacks.own_new_tokens=64",
        )
    return found


def _steps(name: str) -> int:
    """Optimizer steps of a rollout."""
    return 2 if name in ("grpo", "rloo") else 4


def _prompts(path: Path, things: list[str]) -> Path:
    turns = [[{"role": "user", "content": f"What is {_article(thing)} {thing}? {ASKED}"}] for thing in things]
    rows = [{"messages": turn, "keyword": thing} for turn, thing in zip(turns, things, strict=True)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def _article(thing: str) -> str:
    return "an" if thing[0] in "aeiou" else "a"


# ---- what was found ---------------------------------------------------------------------------------------------


def findings(out: Path) -> Iterator[str]:
    """What is known of the runs that are done, in lines."""
    for name in RUNS:
        done = summary(out / name)
        if done is None:
            continue
        start, end = done["start"], done["end"]
        yield (
            f"{name}: {done['seconds'] / 60:.1f} minutes, {done['optimizer_steps']} steps; held out: reward "
            f"{start['val/reward']:.3f} -> {end['val/reward']:.3f}, length {start['val/length']:.0f} -> "
            f"{end['val/length']:.0f} tokens, ended {start['val/ended']:.0%} -> {end['val/ended']:.0%}, "
            f"KL {end['val/kl']:.2f} nats an answer; own text {end['forgetting/own/change']:+.4f} nats a token, "
            f"KL {end['forgetting/own/kl']:.3f}, on the held-out prompts {end['forgetting/target/kl']:.3f} nats a token"
        )
        kl, coef = ([value for _, value in logged(out / name, f"objective/{key}")] for key in ("kl", "kl_coef"))
        yield (
            f"  rollouts: KL {max(kl):.2f} nats an answer at most, {kl[-1]:.2f} at the end; its weight "
            f"{coef[0]:.3f} -> {coef[-1]:.3f}"
        )
    for name in RUNS:
        if summary(out / name) is not None:
            yield f"{name}, held-out questions"
            yield from samples(out / name)
            break


def draw(out: Path) -> None:
    """Held-out reward, the reward of the rollouts, and KL over the rollouts."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(8, 9), sharex=True, layout="constrained")
    keys = ("val/reward", "objective/scores", "objective/kl")
    labels = ("reward of held-out prompts\n(greedy)", "reward of the rollouts", "KL to the start,\nnats an answer")
    for name in RUNS:
        if summary(out / name) is None:
            continue
        for one, key in zip(axes, keys, strict=True):
            points = logged(out / name, key)
            one.plot([step / _steps(name) for step, _ in points], [value for _, value in points], label=name)
    for one, label in zip(axes, labels, strict=True):
        one.set_ylabel(label)
    axes[-1].axhline(TARGET, color="0.4", ls="--", lw=1, label="target")
    axes[-1].legend()
    axes[0].legend()
    axes[-1].set_xlabel(f"rollouts of {ANSWERS} answers")
    figure.savefig(out / "rewards.png", dpi=150)
    plt.close(figure)


def main() -> None:
    """Reads the command line."""
    args = command_line(__doc__, "runs/ppo", f"runs: {', '.join(RUNS)}; all when left out", data=False)
    if args.mode == "run":
        runs = grid(args.model, args.out)
        fit_all({name: runs[name] for name in args.only or runs}, args.out, args.jobs)
    show(args.out, findings(args.out), draw)


if __name__ == "__main__":
    main()
