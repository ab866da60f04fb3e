"""What bfloat16 does to the training of a LoRA: ftlit and a plain loop of transformers + PEFT, each beside float32.

    python scripts/bench/half.py --model FOLDER --rows FILE [--num 64] [--lr 5e-4]

All get the same ids, first adapter, order and rates; the base is float32 under autocast, the LoRA and Adam are float32.
Printed is the loss of every optimizer step. Where a layer's output is rounded to bfloat16 before the LoRA's product is
added, most of a small product is rounded away, every time in the same direction: the model does not see it.
"""

from __future__ import annotations

import argparse

import torch
from measure import Settings, encode_rows
from peers import initial_adapter, load_model, load_tokenizer, quiet, run_ftlit, run_plain

RUNS = {"float32": ("ftlit", False), "ftlit, bfloat16": ("ftlit", True), "PEFT, bfloat16": ("plain", True)}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a transformers folder")
    parser.add_argument("--rows", required=True, help="rows to train on")
    parser.add_argument("--num", type=int, default=64, help="how many")
    parser.add_argument("--lr", type=float, default=5e-4, help="rate of the first step; it falls linearly to zero")
    args = parser.parse_args()
    quiet()
    tokenizer = load_tokenizer(args.model)
    examples = encode_rows(args.rows, tokenizer, args.num, 256)
    adapter = initial_adapter(load_model(args.model, "plain"), Settings().rank)
    settings = Settings(lr=args.lr)
    losses = {}
    for name, (framework, half) in RUNS.items():
        run = run_ftlit if framework == "ftlit" else run_plain
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            records = run(examples, load_model(args.model, framework), tokenizer, adapter, settings)
        losses[name] = [record.loss for record in records]
    print("| step | " + " | ".join(RUNS) + " |\n|" + "---|" * (len(RUNS) + 1))
    for step, values in enumerate(zip(*losses.values(), strict=True), 1):
        print(f"| {step} | " + " | ".join(f"{value:.4f}" for value in values) + " |")


if __name__ == "__main__":
    main()
