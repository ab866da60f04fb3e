"""The whole chain on real rows: SFT, then a reward model and PPO on it, and DPO; what each forgets, in one table.

    python scripts/study/chain.py --model FOLDER --data FOLDER [--out runs/chain]

Each stage starts where the last one ended: SFT is merged, and reward model, PPO and DPO start from that. The reward
model learns that the first sentence of an answer is better than the whole, so that everybody can see what PPO makes of
it. What the base model wrote itself before anything was trained is measured after every stage, so that losses add up.
The folder of data holds `alpaca_en_demo.json` and `dpo_en_demo.json`. Stages that are done are not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from preferences import shorter_pairs
from runs import callback, fit, samples, summary

SFT_ROWS, PROMPT_ROWS = 600, 250
STAGES = {
    "sft": ("val/loss", "loss of held-out answers"),
    "reward": ("val/accuracy", "accuracy on held-out pairs"),
    "ppo": ("val/reward", "score of held-out answers by the reward model"),
    "dpo": ("val/rewards/margins", "margin of held-out pairs"),
}


def stages(model: str, data: Path, out: Path) -> dict[str, tuple[str, ...]]:
    """Arguments of `ftlit fit` for each stage.

    Args:
        model: The base model.
        data: The folder of data.
        out: The folder of the chain, with the rows that `rows` wrote.
    """
    general = ("--seed_everything", "0", "--trainer.precision", "bf16-mixed", "--data.max_tokens", "2048")
    probe = callback(
        "ForgettingProbe", {"domains": json.dumps({"own": str(out / "own.jsonl")}), "max_tokens": 8192, "kl": "false"}
    )
    merged = ("--model.policy", str(out / "sft-model"))
    pairs = ("--data.train", str(data / "dpo_en_demo.json"), "--data.validation", "0.25", "--data.max_length", "256")
    return {
        "sft": (
            *("--config", "sft", "--config", "peft/lora", "--model.policy", model, "--model.lr", "3e-4", *general),
            *("--data.train", str(out / "sft.jsonl"), "--data.validation", "0.1", "--data.max_length", "384"),
            *("--data.batch_size", "8", "--trainer.max_steps", "40", "--trainer.max_epochs", "-1", *probe),
        ),
        "reward": (
            *("--config", "reward", "--config", "peft/lora", *merged, "--model.lr", "3e-4", *general),
            *("--data.train", str(out / "shorter.jsonl"), "--data.validation", "0.1", "--data.max_length", "256"),
            *("--data.batch_size", "8", "--trainer.max_steps", "20", "--trainer.max_epochs", "-1"),
        ),
        "ppo": (
            *("--config", "ppo", "--config", "peft/lora", *merged, "--model.lr", "3e-4", *general, *probe),
            *("--model.reward", "RewardScorer", "--model.reward.model", str(out / "reward")),
            *("--data.train", str(out / "prompts.jsonl"), "--data.validation", "0.2", "--data.batch_size", "16"),
            *("--model.num_answers", "2", "--model.max_new_tokens", "48", "--data.max_length", "96"),
            *("--model.shaping.whiten", "true", "--trainer.max_steps", "40", "--trainer.max_epochs", "-1"),
            *("--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "20"),
            *callback("RolloutSamples", {"rows": 64}),
        ),
        "dpo": (
            *("--config", "dpo", "--config", "peft/lora", *merged, "--model.lr", "5e-4", *general, *pairs, *probe),
            *("--data.batch_size", "8", "--trainer.max_epochs", "1"),
        ),
    }


def rows(model: str, data: Path, out: Path) -> None:
    """Writes the rows of SFT, the prompts of PPO, and what the base model says to further questions.

    Args:
        model: The base model.
        data: The folder of data.
        out: The folder of the chain.
    """
    known = json.loads((data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    parts = known[:SFT_ROWS], known[SFT_ROWS : SFT_ROWS + PROMPT_ROWS], known[SFT_ROWS + PROMPT_ROWS :]
    for name, part in zip(("sft", "prompts"), parts[:2], strict=True):
        _write(out / f"{name}.jsonl", part)
    shorter_pairs(data / "alpaca_en_demo.json", out / "shorter.jsonl")
    if (out / "own.jsonl").exists():
        return
    asked = ["\n".join(filter(None, [row["instruction"], row["input"]])) for row in parts[2]]
    _write(out / "questions.jsonl", [{"messages": [{"role": "user", "content": question}]} for question in asked])
    said = out / "said.jsonl"
    options = ("--temperature", "1", "--max_new_tokens", "96", "--output", str(said), "--batch_size", "32")
    _ftlit("generate", model, "--prompts", str(out / "questions.jsonl"), *options)
    answers = [json.loads(line)["answer"] for line in said.read_text(encoding="utf-8").splitlines()]
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(asked, answers, strict=True)
        if answer.strip()
    ]
    _write(out / "own.jsonl", [{"messages": some} for some in turns])


def _write(path: Path, found: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in found), encoding="utf-8")


def _ftlit(*args: str) -> None:
    print("$ ftlit " + " ".join(args), flush=True)
    if subprocess.run([sys.executable, "-m", "ftlit", *args], check=False).returncode:
        sys.exit(f"ftlit {args[0]} failed.")


def table(out: Path) -> list[str]:
    """What each stage learnt, and how far the base model's own text has gone, in that stage and since the beginning.

    The texts are cut to the `data.max_length` of the stage, so it is changes that are added up.
    """
    base = summary(out / "sft")
    assert base is not None
    own = "forgetting/own/change"
    lines = [f"{'stage':<8}{'':<48}{'before':>9}{'after':>9}{'own text':>10}{'since the base':>16}"]
    for name, (key, words) in STAGES.items():
        done = summary(out / name)
        if done is None:
            continue
        start, end = done["start"], done["end"]
        line = f"{name:<8}{words:<48}{start[key]:>9.3f}{end[key]:>9.3f}"
        if own in end:
            since = end[own] + (base["end"][own] if name != "sft" else 0.0)
            line += f"{math.expm1(end[own]):>+10.1%}{math.expm1(since):>+16.1%}"
        lines.append(line)
    return lines


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base model, a transformers folder")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of data")
    parser.add_argument("--out", type=Path, default=Path("runs/chain"), help="the folder of the chain")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out, data = args.out.resolve(), args.data.resolve()
    rows(args.model, data, out)
    for name, arguments in stages(args.model, data, out).items():
        if summary(out / name) is None:
            print(f"{name}: {fit(out / name, arguments, os.cpu_count() or 1):.0f} s", flush=True)
        if name == "sft" and not (out / "sft-model").exists():
            _ftlit("export", str(out / "sft"), "--to", str(out / "sft-model"))
    print("\n".join([*table(out), "PPO, held-out prompts", *samples(out / "ppo")]))


if __name__ == "__main__":
    main()
