"""Batched generation with any strategy.

A loop of its own, not `model.generate`: answers that ended leave the batch, each row draws its samples from its own
seed (so that batches, ranks and training cannot change them), and nothing in a model's generation config (a repetition
penalty, a top-k) changes what is measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from ftlit.data.templating import ChatTemplate
from ftlit.errors import ConfigError, DataError
from ftlit.models.limits import check_length, check_token
from ftlit.peft.base import PEFTStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Answer(NamedTuple):
    """One generated answer.

    Attributes:
        tokens: Its tokens, without the end token.
        ended: Whether the model ended it, or it came to a text to stop at; False where `max_new_tokens` ended it.
        end: The end token that it ended with; None where it did not.
    """

    tokens: list[int]
    ended: bool
    end: int | None = None

    @property
    def drawn(self) -> list[int]:
        """Every token that the model drew, the end token included."""
        return self.tokens if self.end is None else [*self.tokens, self.end]


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


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], after: Sequence[int] = ()) -> str:
    """The text of an answer, with all its white space and without special tokens.

    Args:
        tokenizer: The tokenizer.
        tokens: Tokens of the answer.
        after: Tokens of a text that it goes on from: the space between the two is the answer's, which some tokenizers
            drop.
    """

    def decode(ids: Sequence[int]) -> str:
        text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    if after:
        before, both = decode(after), decode([*after, *tokens])
        if both.startswith(before):
            return both[len(before) :]
    return decode(tokens)


def seed_of(*parts: int) -> int:
    """A seed that is a function of some whole numbers, such as (seed, step, row), in `[0, 2^63)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generate(
    lm: PreTrainedModel,
    strategy: PEFTStrategy | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    streamer: Any = None,
    batch_size: int | None = None,
    max_tokens: int = 16384,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """Answers prompts; the same as `answer`, of which it returns the tokens only.

    Returns:
        The tokens of each answer, without its end token.
    """
    answers = answer(
        lm, strategy, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        top_k=top_k, min_p=min_p, stop=stop, streamer=streamer, batch_size=batch_size, max_tokens=max_tokens,
        seeds=seeds,
    )  # fmt: skip
    return [one.tokens for one in answers]


@torch.no_grad()
def answer(
    lm: PreTrainedModel,
    strategy: PEFTStrategy | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    streamer: Any = None,
    batch_size: int | None = None,
    max_tokens: int = 16384,
    seeds: Sequence[int] | None = None,
    num_answers: int = 1,
    done: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answers prompts in batches of similar length, the longest first.

    Args:
        lm: The model; training mode is restored afterwards, and no global random state is used where `seeds` are given.
        strategy: The strategy applied to it, if any.
        tokenizer: Its tokenizer.
        prompts: Tokens of each prompt.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token each time.
        top_p: Sample from the likeliest tokens that together have this probability.
        top_k: Sample from so many of the likeliest; None: from all. It is applied before `top_p`.
        min_p: Sample from tokens of at least this share of the likeliest one's probability.
        stop: Texts that end an answer: it ends with the token that completes one of them, and has no end token.
        streamer: A transformers streamer, for one prompt.
        batch_size: Most answers in a batch (but all to one prompt); None: as many as `max_tokens` allows.
        max_tokens: Most places of a batch (prompts with padding, and room for the answers): bounds memory.
        seeds: Seed of each answer's samples; drawn from torch's global generator when left out.
        num_answers: Answers to each prompt; the prompt is run once for all of them.
        done: Called with the number of answers that each batch brought.

    Returns:
        The answers in the order of the prompts, `num_answers` to the first, then as many to the second.

    Raises:
        ConfigError: If a prompt has no tokens, or the model no places for it, or a text to stop at is empty.
    """
    if any(not prompt for prompt in prompts):
        raise ConfigError("a prompt must have at least one token, got none.")
    check_token(lm, max((max(prompt) for prompt in prompts), default=0), "a prompt")
    virtual = getattr(strategy, "num_virtual_tokens", 0)
    check_length(lm, max(map(len, prompts), default=0), "a prompt", virtual, max_new_tokens)
    if temperature > 0 and seeds is None:
        seeds = torch.randint(1 << 62, (len(prompts) * num_answers,), device="cpu").tolist()
    draws = None
    if temperature > 0 and seeds is not None:
        draws = [_draws(seed, max_new_tokens) for seed in seeds]
    ends, stops = end_tokens(lm, tokenizer), Stops(tokenizer, stop) if stop else None

    def choose(logits: Tensor, uniform: Tensor | None) -> Tensor:
        return pick(logits, temperature, top_p, uniform, top_k, min_p)

    alike_only = strategy is not None and not strategy.pads_prompts
    found: list[Answer | None] = [None] * (len(prompts) * num_answers)
    if batch_size is not None:
        batch_size = max(1, batch_size // num_answers)
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        lengths = [len(prompt) for prompt in prompts]
        for rows in batches(lengths, max_new_tokens, batch_size, max_tokens // num_answers, alike_only):
            part = _Batch(lm, strategy, [prompts[row] for row in rows], ends, max_new_tokens, num_answers, stops)
            places = [row * num_answers + number for row in rows for number in range(num_answers)]
            uniform = None if draws is None else torch.stack([draws[place] for place in places])
            for place, one in zip(places, part.run(choose, uniform, streamer), strict=True):
                found[place] = one
            if done is not None:
                done(len(places))
    finally:
        for module, mode in modes:
            module.training = mode
    return [one for one in found if one is not None]


def batches(
    lengths: Sequence[int], new: int, batch_size: int | None, max_tokens: int, alike_only: bool = False
) -> Iterator[list[int]]:
    """Cuts prompts into batches of similar length.

    Args:
        lengths: Tokens of each prompt.
        new: Most tokens of an answer.
        batch_size: Most prompts in a batch; None: no bound.
        max_tokens: Most places of a batch: prompts times (longest prompt + `new`); one prompt is always allowed.
        alike_only: Whether all prompts of a batch must have the same length.

    Yields:
        Indices of prompts, the longest first, so that what does not fit into memory shows at once.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = batch and (
            (batch_size is not None and len(batch) >= batch_size)
            or (len(batch) + 1) * (lengths[batch[0]] + new) > max_tokens
            or (alike_only and lengths[row] != lengths[batch[0]])
        )
        if full:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def pick(
    logits: Tensor,
    temperature: float,
    top_p: float,
    uniform: Tensor | None,
    top_k: int | None = None,
    min_p: float = 0.0,
) -> Tensor:
    """The next token of each row.

    Args:
        logits: `[B, V]`.
        temperature: 0 takes the likeliest.
        top_p: Only the likeliest tokens are kept whose likelier ones have less than this probability together
            (Holtzman et al. 2020, arXiv:1904.09751).
        uniform: A number in [0, 1) for each row, float64 `[B]`: where in the distribution the sample lies.
        top_k: Only so many of the likeliest are kept; `top_p` is a share of their probability then, as in transformers.
        min_p: Only tokens of at least this share of the likeliest one's probability are kept (Nguyen et al. 2024,
            arXiv:2407.01082).

    Returns:
        Tokens, int64 `[B]`.
    """
    if temperature == 0 or uniform is None:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p == 1 and not top_k and not min_p:
        # In the order of the vocabulary: sorting it would take longer than the model.
        upto = probabilities.cumsum(-1)
        mass = upto[:, -1:]
        last = (upto < mass).sum(-1, keepdim=True)  # the last token that has a probability
        return torch.searchsorted(upto, uniform[:, None] * mass, right=True).minimum(last)[:, 0]
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    upto = ordered.cumsum(-1)
    most = min(top_k or ordered.shape[-1], ordered.shape[-1])
    keep = (upto - ordered) < top_p * upto[:, most - 1 : most]  # at least one: nothing comes before the likeliest
    keep &= ordered >= min_p * ordered[:, :1]
    kept = keep[:, :most].sum(-1, keepdim=True)
    mass = upto.gather(-1, kept - 1)
    place = torch.searchsorted(upto, uniform[:, None] * mass, right=True).minimum(kept - 1)
    return tokens.gather(-1, place)[:, 0]


def _draws(seed: int, count: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")


class Stops:
    """Texts that end an answer.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.

    Raises:
        ConfigError: If one is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        if any(not text for text in texts):
            raise ConfigError("a text to stop at must have a character, got an empty one.")
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.window = max(len(text.encode()) for text in texts) + 2
        """Tokens that a text can be spread over, as each has a byte or more, and what is before them."""

    def within(self, tokens: Sequence[int]) -> bool:
        """Whether the text of some tokens holds one of them."""
        text = str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
        return any(one in text for one in self.texts)

    def first(self, tokens: Sequence[int]) -> int | None:
        """How many tokens there are with the one that completes the first; None where there is none."""
        if not self.within(tokens):
            return None
        ends = range(1, len(tokens) + 1)
        return next((end for end in ends if self.within(tokens[max(0, end - self.window) : end])), None)


class _Batch:
    """Some left-padded prompts on their way to answers, `copies` to each."""

    def __init__(
        self,
        lm: PreTrainedModel,
        strategy: PEFTStrategy | None,
        prompts: Sequence[Sequence[int]],
        ends: Sequence[int],
        max_new_tokens: int,
        copies: int = 1,
        stops: Stops | None = None,
    ) -> None:
        self.stops = stops
        self.lm, self.ends, self.new, self.copies = lm, ends, max_new_tokens, copies
        self.device = lm.get_input_embeddings().weight.device
        width = max(len(prompt) for prompt in prompts)
        pad = ends[0] if ends else 0  # masked, so any token will do
        self.ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        inputs: dict[str, Any] = {"input_ids": self.ids, "attention_mask": mask}
        if strategy is not None:
            inputs = dict(strategy.generation_kwargs(lm, self.ids, mask))
        mask = inputs.pop("attention_mask")
        self.cache: Any = inputs.pop("past_key_values", None)
        if self.cache is None:
            self.cache = DynamicCache(config=lm.config)
        known = self.cache.get_seq_length()  # a prefix: its places hold fillers
        self.first = {name: value[:, known:] for name, value in inputs.items()}
        self.positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, known:]
        self.mask = torch.cat([mask, mask.new_ones(len(mask), max_new_tokens)], dim=1)
        self.filled = mask.shape[1]
        self.keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(lm.forward).parameters else {}

    def _forward(self, **inputs: Tensor) -> Tensor:
        """Logits of the last place of each row, `[B, V]`."""
        out = self.lm(
            **inputs,
            attention_mask=self.mask[:, : self.filled],
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            **self.keep,
        )
        return out.logits[:, -1]

    def run(
        self, choose: Callable[[Tensor, Tensor | None], Tensor], uniform: Tensor | None, streamer: Any
    ) -> list[Answer]:
        """Generates until every row has ended or has `max_new_tokens`; `choose` picks the next token of each."""
        if streamer is not None:
            streamer.put(self.ids.cpu())
        total = len(self.ids) * self.copies
        out = torch.zeros(total, self.new, dtype=torch.int64, device=self.device)
        ended = torch.zeros(total, dtype=torch.bool, device=self.device)
        rows = torch.arange(total, device=self.device)  # which prompts are still in the batch
        ends = torch.tensor(self.ends, dtype=torch.int64, device=self.device)
        uniform = None if uniform is None else uniform.to(self.device)
        # Asking a GPU whether a row has ended waits for it: rows that ran on are cut at their end token below.
        every = 8 if self.device.type == "cuda" and streamer is None else 1
        inputs, made = self.first, 0
        while made < self.new:
            logits = self._forward(**inputs)
            if made == 0 and self.copies > 1:
                logits = self._multiply(logits)
            token = choose(logits, None if uniform is None else uniform[rows, made])
            out[rows, made] = token
            ended[rows] |= torch.isin(token, ends)
            made += 1
            if made % every == 0:
                if self.stops is not None:
                    since = max(0, made - self.stops.window - every)
                    found = [self.stops.within(row) for row in out[rows, since:made].tolist()]
                    ended[rows] |= torch.tensor(found, device=self.device)
                alive = (~ended[rows]).nonzero()[:, 0]
                if streamer is not None and len(alive):
                    streamer.put(token.cpu())
                if not len(alive):
                    break
                if len(alive) <= len(rows) // 2:  # halving keeps what is copied below what is saved
                    rows, token = rows[alive], token[alive]
                    self._leave(alive)
            self.positions = self.positions[:, -1:] + 1
            self.filled += 1
            inputs = {"input_ids": token[:, None]}
        if streamer is not None:
            streamer.end()
        return [self._answer(row[:made]) for row in out.tolist()]

    def _multiply(self, logits: Tensor) -> Tensor:
        """Goes on from each prompt as often as it is to be answered."""
        self.cache.batch_repeat_interleave(self.copies)
        self.mask, self.positions, logits = (
            each.repeat_interleave(self.copies, dim=0) for each in (self.mask, self.positions, logits)
        )
        return logits

    def _leave(self, alive: Tensor) -> None:
        """Lets the rows that ended go."""
        self.cache.batch_select_indices(alive)
        self.mask, self.positions = self.mask[alive], self.positions[alive]

    def _answer(self, tokens: list[int]) -> Answer:
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        stop = None if self.stops is None else self.stops.first(tokens[:end])
        if stop is not None:
            return Answer(tokens[:stop], True)
        return Answer(tokens, False) if end is None else Answer(tokens[:end], True, tokens[end])
