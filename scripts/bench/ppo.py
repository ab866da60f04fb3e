"""Where the time of PPO goes: its rollouts beside `model.generate`, its update beside SFT on the same answers.

    python scripts/bench/ppo.py rollout --model FOLDER --rows FILE [--num 24] [--max_new_tokens 64] [--pairs 3]
    python scripts/bench/ppo.py update  --model FOLDER --rows FILE [--rollouts 3] [--pairs 3]

`rollout` answers the same prompts with a LoRA of rank 8 whose weights are not zero: ftlit as a run of PPO does,
`generate` of the same model in PEFT, and `generate` with the adapter merged. Greedily, so that all draw the same tokens
(which is checked: the share of equal answers is printed), up to `--max_new_tokens`; then with end tokens ignored, where
every answer has exactly that length; then so, but drawn at temperature 1, as rollouts are.

`update` trains PPO with a value head for some rollouts and prints where its time goes; then the answers of these
rollouts are trained by SFT with the same LoRA, as many a step: trained tokens a second of both, in turn, peak memory,
and how many times longer rollout, scoring and update take than their matrix products alone at the machine's own rate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))

import torch
from measure import Settings, encode_rows, machine_rate, matmul_flops
from peers import initial_adapter, load_into_peft, load_model, load_tokenizer, peft_lora, quiet
from runs import callback, fit, summary

from ftlit.data.templating import ChatTemplate


def rollout(args: argparse.Namespace) -> None:
    """Times drawing in turn."""
    from peft import get_peft_model

    from ftlit.peft import LoRA
    from ftlit.rollout.generator import BatchedGenerator, Sampling

    quiet()
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model)
    prompts = _prompts(args.rows, tokenizer, args.num)
    settings = Settings()
    ours = load_model(args.model, "ftlit")
    adapter = {name: torch.randn_like(one) * 0.02 for name, one in initial_adapter(ours, settings.rank).items()}
    strategy = LoRA(rank=settings.rank, alpha=settings.alpha, target_modules="all-linear")
    strategy.apply(ours)
    strategy.load(ours, adapter)
    theirs = get_peft_model(load_model(args.model, "plain"), peft_lora(settings))
    load_into_peft(theirs, adapter)
    again = get_peft_model(load_model(args.model, "plain"), peft_lora(settings))
    load_into_peft(again, adapter)
    alone: Any = again.merge_and_unload()
    generator = BatchedGenerator()
    widest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (widest - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (widest - len(one)) + [1] * len(one) for one in prompts])
    ends = tokenizer.eos_token_id

    def with_ftlit(stops: bool, draws: bool) -> list[list[int]]:
        kept = ours.generation_config.eos_token_id, tokenizer.eos_token_id, tokenizer.chat_template
        if not stops:
            ours.generation_config.eos_token_id = tokenizer.eos_token_id = tokenizer.chat_template = None
        try:
            sampling = Sampling(1, args.max_new_tokens, 1.0 if draws else 0.0)
            found = generator(ours, strategy, tokenizer, prompts, [*range(len(prompts))], sampling, quiet=True)
        finally:
            ours.generation_config.eos_token_id, tokenizer.eos_token_id, tokenizer.chat_template = kept
        return [one.tokens for one in found]

    def with_generate(lm: Any) -> Callable[[bool, bool], list[list[int]]]:
        def run(stops: bool, draws: bool) -> list[list[int]]:
            lm.generation_config.eos_token_id = ends if stops else None
            options = {"max_new_tokens": args.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
            if draws:
                options |= {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
            with torch.no_grad():
                out = lm.eval().generate(input_ids=ids, attention_mask=mask, do_sample=draws, **options)
            rows = out[:, widest:].tolist()
            return [row[: row.index(ends)] if stops and ends in row else row for row in rows]

        return run

    ways = {"ftlit": with_ftlit, "generate, PEFT": with_generate(theirs), "generate, merged": with_generate(alone)}
    print(f"{len(prompts)} prompts of {min(map(len, prompts))} to {widest} tokens, {args.threads} threads")
    for words, stops, draws in (
        ("with end tokens", True, False),
        ("of full length", False, False),
        ("of full length, drawn", False, True),
    ):
        took: dict[str, list[float]] = {name: [] for name in ways}
        answers: dict[str, list[list[int]]] = {}
        for number in range(args.pairs + 1):  # the first round warms up
            for name in list(ways)[:: -1 if number % 2 else 1]:
                began = time.perf_counter()
                answers[name] = ways[name](stops, draws)
                if number:
                    took[name].append(time.perf_counter() - began)
        for name, seconds in took.items():
            drawn = sum(map(len, answers[name]))
            same = statistics.mean(a == b for a, b in zip(answers[name], answers["ftlit"], strict=True))
            ratios = [one / base for one, base in zip(seconds, took["ftlit"], strict=True)]
            print(
                f"{words}: {name:<17} {statistics.median(seconds):6.2f} s, "
                f"{drawn:5} tokens, {drawn / statistics.median(seconds):6.1f} tokens/s; as ftlit {same:.0%}; takes "
                f"{statistics.median(ratios):.2f} times as long ({', '.join(f'{one:.2f}' for one in ratios)})",
                flush=True,
            )


def _prompts(rows: str, tokenizer: Any, num: int) -> list[tuple[int, ...]]:
    from ftlit.data.formats import Message

    lines = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()][:num]
    template = ChatTemplate(tokenizer)
    turns = [[Message(turn["role"], turn["content"]) for turn in line["messages"]] for line in lines]
    return [tuple(template.prompt_ids(one)) for one in turns]


def update(args: argparse.Namespace) -> None:
    """Trains with PPO and with SFT in turn."""
    common = (
        *("--config", "peft/lora", "--model.policy", args.model, "--model.lr", "1e-4", "--model.schedule", "constant"),
        *("--data.max_tokens", "2048", "--trainer.max_epochs", "-1", "--model.warmup", "0"),
    )
    ppo = (
        *("--config", "ppo", *common, "--model.reward", "brief.brief", "--data.train", args.rows, "--data.batch_size"),
        *(str(args.num), "--model.max_new_tokens", str(args.max_new_tokens)),
        *("--trainer.max_steps", str(4 * args.rollouts), "--trainer.limit_val_batches", "0"),
        *callback("RolloutSamples", {"rows": args.num}),
    )
    quiet()
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model)
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(args.pairs):
            rate = machine_rate()[0]
            fit(folder / f"ppo-{number}", ppo, args.threads)
            answers = folder / f"rows-{number}.jsonl"
            rows = _answers(folder / f"ppo-{number}" / "rollouts.jsonl", answers)
            steps = 2 * -(-len(rows) // (args.num // 2))  # two epochs, as the update of PPO
            sft = (
                *("--config", "sft", *common, "--data.train", str(answers)),
                *("--data.batch_size", str(args.num // 2), "--trainer.max_steps", str(steps)),
            )
            fit(folder / f"sft-{number}", sft, args.threads)
            rate = (rate + machine_rate()[0]) / 2
            first, other = (summary(folder / f"{kind}-{number}") for kind in ("ppo", "sft"))
            assert first is not None
            assert other is not None
            ratios.append(other["trained_tokens_per_s"] / first["trained_tokens_per_s"])
            examples = encode_rows(str(answers), tokenizer, len(rows))
            print(
                f"PPO {first['trained_tokens_per_s']:.0f} trained tokens/s in the update, SFT on the same answers "
                f"{other['trained_tokens_per_s']:.0f}: {ratios[-1]:.2f} times as long a token; peak memory "
                f"{first['peak_memory_bytes'] / 1e9:.2f} and {other['peak_memory_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
            lm = load_model(args.model, "plain")
            seconds = _seconds(folder / f"ppo-{number}")
            forward, both = (matmul_flops(lm, examples, Settings(method=method)) / 1e9 for method in ("full", "lora"))
            # Drawing reads every token once, scoring twice (policy and start), the update trains two epochs.
            floors = {"rollout": forward / 3, "scoring": 2 * forward / 3, "update": 2 * both}
            parts = [
                f"{name} {took:.1f} s" + (f" ({took * rate / floors[name]:.2f} x)" if name in floors else "")
                for name, took in seconds.items()
            ]
            print(f"  {', '.join(parts)}; x: times the matrix products alone at {rate:.0f} GFLOP/s", flush=True)
    print(f"median {statistics.median(ratios):.2f}")


def _seconds(folder: Path) -> dict[str, float]:
    """What each part of the run took."""
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return dict(saved["ppo"]["seconds"])


def _answers(path: Path, to: Path) -> list[dict[str, Any]]:
    """The answers that were trained on, as rows of SFT."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"messages": [*line["prompt"], {"role": "assistant", "content": line["answer"]}]}
        for line in lines
        if line["set"] == "train" and line["answer"].strip()
    ]
    to.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return rows


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("rollout", "update"))
    parser.add_argument("--model", required=True, help="a transformers folder")
    parser.add_argument("--rows", required=True, help="prompts as .jsonl, with the columns `messages` and `keyword`")
    parser.add_argument("--num", type=int, default=24, help="prompts of a rollout")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--rollouts", type=int, default=3, help="rollouts of a run (update)")
    parser.add_argument("--pairs", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads")
    args = parser.parse_args()
    {"rollout": rollout, "update": update}[args.mode](args)


if __name__ == "__main__":
    main()
