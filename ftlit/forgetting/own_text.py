"""Text that the start model writes itself: what it knew before training, in its own words.

The model's own generations are the best rows to measure and to hold on to what it knew: they lie where its probability
lies, so that keeping its distribution on them costs the target least (pseudo-rehearsal, Robins 1995; for language
models SSR, Huang et al. 2024, arXiv:2403.01244; Marek et al. 2026, arXiv:2605.26097).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from ftlit.batch import Example
from ftlit.cache import cache_dir
from ftlit.data.formats import Message
from ftlit.data.templating import ChatTemplate
from ftlit.errors import ConfigError
from ftlit.files import write_text
from ftlit.forgetting.fingerprint import fingerprint
from ftlit.rollout.generate import answer, seed_of

if TYPE_CHECKING:
    from ftlit.stages.base import Stage

VERSION = 2
BLOCK = 32
"""Texts that are made, shared between ranks and kept together."""

_EVERY = 10.0  # seconds between two lines of progress
_MARK = "3f9c51"  # stands for a user's text while the turns around it are looked for


class _Text(NamedTuple):
    """A prompt and what the model wrote after it, as tokens."""

    prompt: list[int]
    own: list[int]


def own_text(
    stage: Stage,
    prompts: Sequence[Sequence[int]] | None,
    num: int,
    *,
    max_new_tokens: int = 128,
    seed: int = 0,
    skip: int = 0,
    temperature: float = 1.0,
    template: ChatTemplate | None = None,
) -> list[Example]:
    """Texts that the model wrote as it was at the start of the run; made once, then read from the cache.

    Text number i is a function of the model, the settings and i alone. So calls that differ in `num` and `skip` only
    share what they have in common, and sets without common numbers are disjoint: probe A `num=600`, probe B
    `num=600, skip=600`, replay `skip=1200`.

    Args:
        stage: The stage, attached to its trainer, its model on its device. It may have been trained already: the texts
            are written by the model of `strategy.start`. All ranks must call; they share the work and agree.
        prompts: Tokens of each prompt, such as `template.prompt_ids(turns)` gives; text i continues prompt
            `i % len(prompts)`. None: the model writes the questions too, as users would ask them (Xu et al. 2024,
            arXiv:2406.08464), or where its tokenizer has no chat template, whole documents from their first token.
        num: How many texts.
        max_new_tokens: Most tokens of an answer; a question of its own has at most half as many.
        seed: Seed of the samples.
        skip: Number of the first text.
        temperature: 1 draws from the model's own distribution.
        template: The chat template for questions of its own and for the end of an answer; that of the run's data, else
            of `stage.tokenizer`, when left out.

    Returns:
        `num` examples, whose trained tokens are what the model wrote (of a conversation, the answer).

    Raises:
        ConfigError: If a number is out of range, the model's weights are sharded, or there is nothing to write after.
    """
    _check(num=(num, 1), max_new_tokens=(max_new_tokens, 2), skip=(skip, 0))
    if temperature <= 0:
        raise ConfigError(
            f"own_text needs a positive temperature, else all texts of a prompt are the same; got {temperature}."
        )
    if prompts is not None and not prompts:
        raise ConfigError("own_text needs at least one prompt, got none; give None to let the model write its own.")
    assert stage.policy is not None
    author = _Author(stage, prompts, max_new_tokens, seed, temperature, template)
    with stage.strategy.start(stage.policy.lm):
        texts = _blocks(stage, author, range(skip // BLOCK, -(-(skip + num) // BLOCK)))
    first = skip - skip // BLOCK * BLOCK
    return [Example(t.prompt + t.own, [0.0] * len(t.prompt) + [1.0] * len(t.own)) for t in texts[first : first + num]]


def _check(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise ConfigError(f"own_text: {name} must be at least {least}, got {value}.")


class _Author:
    """Writes texts by number.

    Args:
        stage: The stage.
        prompts: Prompts to continue, or None.
        room: Most tokens of an answer.
        seed: Seed of the samples.
        temperature: Temperature of the samples.
        template: The chat template.
    """

    def __init__(
        self,
        stage: Stage,
        prompts: Sequence[Sequence[int]] | None,
        room: int,
        seed: int,
        temperature: float,
        template: ChatTemplate | None,
    ) -> None:
        self.stage, self.room, self.seed, self.temperature = stage, room, seed, temperature
        self.prompts = None if prompts is None else [[int(token) for token in prompt] for prompt in prompts]
        self.template = template or _template(stage)
        self.chats = self.template is not None and not self.template.is_assumed
        self.end = self._end()
        self.opening = [] if self.prompts is not None else self._opening()

    def _end(self) -> list[int]:
        """The token that ends what the model writes, if there is one."""
        if self.chats:
            assert self.template is not None
            return self.template.end_tokens()
        end = self.stage.tokenizer.eos_token_id
        return [] if end is None else [int(end)]

    def _opening(self) -> list[int]:
        """What stands before a user's first word; without a chat template, before a document's."""
        tokenizer = self.stage.tokenizer
        if not self.chats:
            begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            if begin is None:
                raise ConfigError("this model's tokenizer has no token that begins a text: give own_text prompts.")
            return [int(begin)]
        assert self.template is not None
        text = self.template.render([Message("user", _MARK)])
        place = text.find(_MARK)
        if place < 1:
            raise ConfigError("the chat template shows nothing before a user's turn: give own_text prompts.")
        return [int(token) for token in tokenizer(text[:place], add_special_tokens=False)["input_ids"]]

    def key(self) -> str:
        """A name for everything that decides the texts."""
        assert self.stage.policy is not None
        model = fingerprint(self.stage.policy.lm, self.stage.strategy)
        shown = None if self.template is None else self.template.signature()
        settings = [VERSION, model, self.prompts, self.opening, self.room, self.seed, self.temperature, shown]
        return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()

    def write(self, block: int) -> list[_Text]:
        """The texts of a block."""
        numbers = range(block * BLOCK, (block + 1) * BLOCK)
        if self.prompts is not None:
            prompts = [self.prompts[number % len(self.prompts)] for number in numbers]
        else:
            prompts = [self.opening] * len(numbers)
            if self.chats:
                assert self.template is not None
                questions = self._continue(prompts, numbers, 0, max(1, self.room // 2))
                decoded = [self.stage.tokenizer.decode(own, skip_special_tokens=True).strip() for own in questions]
                prompts = [
                    self.template.prompt_ids([Message("user", str(question))], texts=False) for question in decoded
                ]
        answers = self._continue(prompts, numbers, 1, self.room)
        return [_Text(list(prompt), own) for prompt, own in zip(prompts, answers, strict=True)]

    def _continue(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], turn: int, room: int
    ) -> list[list[int]]:
        """What the model writes after each prompt, with the end token where it came to an end."""
        stage = self.stage
        assert stage.policy is not None
        with stage.trainer.precision_plugin.forward_context():
            made = answer(
                stage.policy.lm,
                stage.strategy,
                stage.tokenizer,
                prompts,
                max_new_tokens=room,
                temperature=self.temperature,
                seeds=[seed_of(self.seed, number, turn) for number in numbers],
            )
        return [one.tokens + (self.end if one.ended else []) for one in made]


def _template(stage: Stage) -> ChatTemplate | None:
    data: Any = getattr(stage.trainer, "datamodule", None)
    template = getattr(data, "template", None)
    if isinstance(template, ChatTemplate):
        return template
    return ChatTemplate(stage.tokenizer) if stage.tokenizer.chat_template else None


def _blocks(stage: Stage, author: _Author, wanted: Sequence[int]) -> list[_Text]:
    """The texts of some blocks, from the cache where it has them; the same on all ranks."""
    trainer = stage.trainer
    world, rank = trainer.world_size, trainer.global_rank
    folder = cache_dir() / "own_text" / author.key()
    have: dict[int, list[_Text]] = {}
    if rank == 0:
        have = {block: texts for block in wanted if (texts := _read(folder / f"{block}.json")) is not None}
    have = trainer.strategy.broadcast(have)
    missing = [block for block in wanted if block not in have]
    if not missing:
        return [text for block in wanted for text in have[block]]
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ConfigError(
            "a model whose weights are sharded cannot write text: run once with --trainer.strategy ddp or on one "
            "device; later runs read its text from the cache."
        )
    made = dict(_written(author, missing[rank::world], folder, len(missing), quiet=rank != 0))
    shares: list[Any] = [made]
    if world > 1:
        shares = [None] * world
        torch.distributed.all_gather_object(shares, made)
    have |= {block: texts for share in shares for block, texts in share.items()}
    return [text for block in wanted for text in have[block]]


def _written(
    author: _Author, blocks: Sequence[int], folder: Path, total: int, quiet: bool
) -> Iterator[tuple[int, list[_Text]]]:
    """Writes blocks and keeps each at once, so that nothing is made twice when a run is stopped."""
    world = author.stage.trainer.world_size
    say: Callable[[str], None] = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    say(f"own text   {total * BLOCK:,} texts are written by the start model, once (kept in {folder})")
    began = said = time.monotonic()
    kept = True
    for number, block in enumerate(blocks, start=1):
        texts = author.write(block)
        try:
            write_text(folder / f"{block}.json", json.dumps(texts))
        except OSError as error:
            if kept:
                say(f"own text   is not kept: {folder} cannot be written ({error.strerror or error})")
            kept = False
        now = time.monotonic()
        if now - said > _EVERY or number == len(blocks):
            said = now
            left = (now - began) / number * (len(blocks) - number)
            say(f"own text   {min(total, number * world) * BLOCK:,} of {total * BLOCK:,}, {left:,.0f} s to go")
        yield block, texts


def _read(path: Path) -> list[_Text] | None:
    """A block of the cache; None where there is none, or a torn one."""
    try:
        texts = [_Text(list(prompt), list(own)) for prompt, own in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None
    return texts if len(texts) == BLOCK else None


__all__ = ["BLOCK", "own_text"]
