"""What the benchmarks measure with: the work, the machine's own rate, memory, and the examples."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ftlit.batch import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_LENGTH = 512


class Settings(NamedTuple):
    """What all frameworks are told.

    Attributes:
        method: `lora`, on every linear layer but the output layer, or `full`.
        rank: Rank of the LoRA.
        alpha: Numerator of its scale.
        lr: Rate of the first step; it falls linearly to zero, without warm-up.
        clip: Largest norm of the gradient.
        batch_size: Examples in an optimizer step.
        max_tokens: ftlit's `data.max_tokens`: most tokens in one of its micro-batches.
        micro: Examples in one of a peer's micro-batches, the rest of a step is accumulated; 0 takes the whole step.
    """

    method: str = "lora"
    rank: int = 8
    alpha: int = 16
    lr: float = 1e-3
    clip: float = 1.0
    batch_size: int = 8
    max_tokens: int | None = 2048
    micro: int = 0


class StepRecord(NamedTuple):
    """One optimizer step.

    Attributes:
        loss: Mean over its trained tokens, nats.
        grad_norm: Before clipping.
        lr: The rate it was taken with.
        ended: When it was over, `time.perf_counter`, s.
        cpu: Processor time of all threads until then, `time.process_time`, s.
    """

    loss: float
    grad_norm: float
    lr: float
    ended: float
    cpu: float


class Difference(NamedTuple):
    """How far two runs are apart at one step.

    Attributes:
        loss: Absolute, nats.
        grad_norm: Relative.
        lr: Relative.
    """

    loss: float
    grad_norm: float
    lr: float


def differences(ours: Sequence[StepRecord], theirs: Sequence[StepRecord]) -> list[Difference]:
    """The differences of two runs, step by step; not a number where one of them is not.

    Raises:
        ValueError: If one has more steps.
    """
    return [
        Difference(
            abs(a.loss - b.loss),
            abs(a.grad_norm - b.grad_norm) / max(abs(b.grad_norm), 1e-12),
            abs(a.lr - b.lr) / max(abs(b.lr), 1e-12),
        )
        for a, b in zip(ours, theirs, strict=True)
    ]


def encode_rows(file: str, tokenizer: PreTrainedTokenizerBase, num: int, max_length: int = MAX_LENGTH) -> list[Example]:
    """The first rows of a file as ftlit's chat template encodes them.

    Args:
        file: A `.json` or `.jsonl` file.
        tokenizer: The model's tokenizer.
        num: How many rows.
        max_length: Longer examples are cut at the end; one with nothing left to train is left out.
    """
    from ftlit.data.sources import Source
    from ftlit.data.templating import ChatTemplate

    source, template = Source(file), ChatTemplate(tokenizer)
    encoded = [example for row in range(min(num, len(source))) for example in template.encode(source.record(row))]
    cut = [Example(ids[:max_length], weights[:max_length]) for ids, weights, *_ in encoded]
    return [example for example in cut if example.num_targets]


def of_length(examples: Sequence[Example], length: int, num: int) -> list[Example]:
    """Examples of exactly one length, cut out of a stream of others, so that only the length differs.

    Args:
        examples: Where tokens and their weights come from, over and over.
        length: Tokens of each.
        num: How many.
    """
    stream = [pair for example in examples for pair in zip(example.input_ids, example.weights, strict=True)]
    made = []
    for start in range(0, num * length, length):
        pairs = [stream[(start + place) % len(stream)] for place in range(length)]
        made.append(Example([token for token, _ in pairs], [0.0, *(weight for _, weight in pairs[1:])]))
    return made


def linears_of(lm: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer but the output layer."""
    head = lm.get_output_embeddings()
    return {n: m for n, m in lm.named_modules() if isinstance(m, nn.Linear) and m is not head}


def matmul_flops(lm: PreTrainedModel, examples: Sequence[Example], settings: Settings) -> float:
    """Floating-point operations of the matrix products: no padding, no recomputation, every example by itself.

    Full fine-tuning: `6 P T + 6 H T_s + 6 a sum(length^2)`. LoRA: `4 P T + 4 H T_s + 6 a sum(length^2) + 6 P_lora T`,
    because frozen matrices have no gradient of their own. The output layer runs on the trained tokens only, attention
    is causal and inside each example. (With LoRA the lowest layer's q, k, v need no gradient of their input either;
    that share of 1 / layers is left in.) Tokens that several examples share are counted for each of them.

    Args:
        lm: A bare model.
        examples: What is trained on.
        settings: Method and rank.
    """
    linears = linears_of(lm).values()
    config = lm.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lengths = [len(example.input_ids) for example in examples]
    tokens, trained = sum(lengths), sum(example.num_targets for example in examples)
    matrices = sum(linear.weight.numel() for linear in linears)
    head = lm.get_output_embeddings().weight.numel()
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * sum(n * n for n in lengths)
    if settings.method == "full":
        return 6 * matrices * tokens + 6 * head * trained + 6 * attention
    lora = sum(settings.rank * (linear.in_features + linear.out_features) for linear in linears)
    return (4 * matrices + 6 * lora) * tokens + 4 * head * trained + 6 * attention


def machine_rate(seconds: float = 1.0) -> tuple[float, float]:
    """What the machine gives at this moment: a float32 2048 x 576 x 1536 matrix product in a loop.

    Returns:
        GFLOP a second, and GFLOP a second of processor time.
    """
    left, right, out = torch.randn(2048, 576), torch.randn(576, 1536), torch.empty(2048, 1536)
    torch.mm(left, right, out=out)
    count, began, cpu = 0, time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - began) < seconds:
        torch.mm(left, right, out=out)
        count += 1
    gflop = 2 * 2048 * 576 * 1536 * count / 1e9
    return gflop / passed, gflop / (time.process_time() - cpu)


def reset_peak_memory() -> None:
    """Lets the peak of resident memory start anew, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak of memory cannot be reset here; it includes loading", file=sys.stderr)


def peak_memory() -> float:
    """Peak of resident memory since the reset, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def floor_ratios(run: Mapping[str, Any]) -> tuple[float, float]:
    """How many times longer than the matrix products alone at the rate measured around the run: wall, processor."""
    wall, cpu = ((before + after) / 2 for before, after in zip(run["rate_before"], run["rate_after"], strict=True))
    return run["seconds"] * wall / run["gflop"], run["cpu_seconds"] * cpu / run["gflop"]
