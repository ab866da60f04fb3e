"""Batched generation with any strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ftlit.data.templating import ChatTemplate
from ftlit.errors import DataError
from ftlit.peft.base import PEFTStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_tokens(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's, the chat template's, those of the model's generation config."""
    ends = getattr(lm.generation_config, "eos_token_id", None)
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        # A template that cannot be trained on (it closes no answer, say) adds nothing.
        with contextlib.suppress(DataError):
            ends.update(ChatTemplate(tokenizer).end_tokens())
    return sorted(ends)


@torch.no_grad()
def generate(
    lm: PreTrainedModel,
    strategy: PEFTStrategy | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    streamer: Any = None,
) -> list[list[int]]:
    """Answers prompts.

    Args:
        lm: The model; training mode is restored afterwards.
        strategy: The strategy applied to it, if any.
        tokenizer: Its tokenizer.
        prompts: Tokens of each prompt.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token each time.
        top_p: Sample from the likeliest tokens that together have this probability.
        streamer: A transformers streamer, for one prompt.

    Returns:
        The tokens of each answer, without its end token.
    """
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "streamer": streamer,
    }
    if strategy is None or strategy.pads_prompts:
        return _generate(lm, strategy, tokenizer, prompts, **options)
    answers: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):
        alike = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        for i, answer in zip(
            alike, _generate(lm, strategy, tokenizer, [prompts[i] for i in alike], **options), strict=True
        ):
            answers[i] = answer
    return answers


def _generate(
    lm: PreTrainedModel,
    strategy: PEFTStrategy | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    streamer: Any,
) -> list[list[int]]:
    """One padded batch."""
    ends = end_tokens(lm, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    width = max(len(prompt) for prompt in prompts)
    device = lm.get_input_embeddings().weight.device
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if strategy is not None:
        inputs = strategy.generation_kwargs(lm, ids, mask)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    was = lm.training
    lm.eval()
    try:
        out = lm.generate(
            **inputs, **sampling, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad,
            streamer=streamer,
        )  # fmt: skip
    finally:
        lm.train(was)
    fed = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    answers = []
    for row in out[:, fed:].tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers
