"""What it costs to measure forgetting and to replay: the same training with and without, in turn.

    python scripts/bench/forgetting.py --model FOLDER --rows FILE [--steps 40] [--pairs 2]

Without: LoRA. With: `ForgettingProbe` (4,096 tokens of the start model's own text, every 20 steps of about 1,000 tokens
and at the end) and KL `Replay` of 10 % of the trained tokens, of the model's own text too. Texts and start scores are
made once, before, and kept, as they are for any further run on the same model. What is compared is all the time from
the first step to the end of the run; ratios of neighbours, and their median.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))

from runs import callback, fit, summary


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a transformers folder")
    parser.add_argument("--rows", required=True, help="rows to train on")
    parser.add_argument("--columns", help="their columns, as for data.columns")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--pairs", type=int, default=2, help="runs of each kind")
    parser.add_argument("--precision", default="32-true", help="as for trainer.precision")
    args = parser.parse_args()
    common = (
        *("--config", "sft", "--config", "peft/lora", "--model.policy", args.model, "--data.train", args.rows),
        *(("--data.columns", args.columns) if args.columns else ()),
        *("--data.max_length", "512", "--data.batch_size", "4", "--data.max_tokens", "1024"),
        *("--trainer.max_steps", str(args.steps), "--trainer.max_epochs", "-1"),
        *("--trainer.precision", args.precision),
    )
    probe = {"domains": "{own: self}", "max_tokens": 4096, "every_n_steps": 20, "own_rows": 64}
    more = (
        *callback("ForgettingProbe", probe | {"own_new_tokens": 64, "kl": "false"}),
        *callback("Replay", {"ratio": 0.1, "num_rows": 64, "max_new_tokens": 64}),
    )
    arms = {"without": common, "with": (*common, *more)}
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        fit(Path(folder, "first"), [*arms["with"], "--trainer.max_steps", "1"], cores)  # texts and scores are kept
        ratios, in_steps = [], []
        for number in range(args.pairs):
            seconds: dict[str, tuple[float, float]] = {}
            for name in sorted(arms, reverse=bool(number % 2)):
                fit(Path(folder, f"{name}-{number}"), arms[name], cores)
                done = summary(Path(folder, f"{name}-{number}"))
                assert done is not None
                seconds[name] = (done["seconds"], done["seconds_in_steps"])
            (all_with, steps_with), (all_without, steps_without) = seconds["with"], seconds["without"]
            ratios.append(all_with / all_without)
            in_steps.append(steps_with / steps_without)
            print(
                f"with {all_with:.1f} s, without {all_without:.1f} s: {ratios[-1]:.3f} (steps alone {in_steps[-1]:.3f})"
            )
    print(f"median {statistics.median(ratios):.3f}, steps alone {statistics.median(in_steps):.3f}")


if __name__ == "__main__":
    main()
