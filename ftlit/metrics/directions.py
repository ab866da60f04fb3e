"""Which way a metric is better: one table for checkpoints, adapters, early stops, W&B and the report."""

from __future__ import annotations

from typing import Literal

Mode = Literal["min", "max"]

# By the last part of a name, or by the last two where the last alone says too little. Lengths, entropies, rates and
# rewards of one side have no better end: whoever watches them says which he wants.
_DIRECTIONS: dict[str, Mode] = {
    "loss": "min",
    "nll": "min",
    "perplexity": "min",
    "ppl_ratio": "min",
    "change": "min",
    "kl": "min",
    "calibration_error": "min",
    "seconds_per_answer": "min",
    "accuracy": "max",
    "f1": "max",
    "auroc": "max",
    "pearson": "max",
    "spearman": "max",
    "exact_match": "max",
    "bleu": "max",
    "rouge_1": "max",
    "rouge_2": "max",
    "rouge_l": "max",
    "verifier": "max",
    "distinct_1": "max",
    "distinct_2": "max",
    "end_rate": "max",
    "tokens_per_s": "max",
    "trained_tokens_per_s": "max",
    "margin": "max",
    "rewards/margins": "max",
    "rewards/accuracies": "max",
    "logps/accuracies": "max",
    "reward": "max",
    "ended": "max",
    "agreement": "max",
    "objective/scores": "max",
    "objective/rlhf_reward": "max",
    "val/explained_variance": "max",
}


def direction(name: str) -> Mode | None:
    """Whether a small or a large value of one of ftlit's metrics is better.

    Args:
        name: Its whole name in the log, such as `val/code/accuracy`; the ends of an interval go with their mean.

    Returns:
        None where neither end is the better one.

    Example:
        >>> direction("val/loss"), direction("val/code/accuracy_low"), direction("val/length")
        ('min', 'max', None)
    """
    stem = name.removesuffix("_low").removesuffix("_high")
    last = stem.rsplit("/", 1)[-1]
    pair = "/".join(stem.split("/")[-2:])
    return _DIRECTIONS.get(pair, _DIRECTIONS.get(last))


__all__ = ["Mode", "direction"]
