"""Scores of whole conversations and texts, by any sequence classifier, with its own tokenizer and template."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from typing_extensions import override

from ftlit.batch import Example, pack
from ftlit.data.formats import Completion, Conversation, Message
from ftlit.data.formats.base import RowError
from ftlit.data.formats.turns import template_kwargs_of, tools_of
from ftlit.data.labels import Content, LabelTemplate, shortened, shortened_pair
from ftlit.data.rendering import wrong_option
from ftlit.data.sources import with_system
from ftlit.errors import ConfigError, nearest
from ftlit.export.opening import Opened, is_run, open_model
from ftlit.models.heads import ScalarPolicy, prepare_classifier, rated
from ftlit.models.load import is_classifier, load_classifier, load_tokenizer
from ftlit.peft.io import is_adapter
from ftlit.rollout.verifiers import Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SequenceScorer:
    """Runs a sequence classifier over conversations and texts.

    Packed where ftlit knows the architecture, else in padded batches as transformers does it.

    Args:
        opened: The classifier; changed to packed attention.
        max_length: Most tokens of an example; the model's own limit when left out.
        truncate: What a longer one loses: its `start`, or its `end`.
        max_tokens: Most tokens of a micro-batch.
        strict: Whether every text of a conversation must show, also what the template takes out of answers that it does
            not like; answers that a model wrote may hold anything.
    """

    def __init__(
        self,
        opened: Opened,
        max_length: int | None = None,
        truncate: str = "start",
        max_tokens: int = 4096,
        strict: bool = True,
    ) -> None:
        self.strict = strict
        self.lm: PreTrainedModel = opened.lm.eval()
        self.template = LabelTemplate(opened.tokenizer)
        self.truncate: Any = truncate
        self.max_tokens = max_tokens
        self.shortened = 0
        self._ends = self.template.ends()
        self._policy: ScalarPolicy | None = None
        try:
            prepare_classifier(self.lm)
            self._policy = ScalarPolicy.around(self.lm, opened.strategy).eval()
        except ConfigError:
            if opened.strategy is not None:
                raise
            with contextlib.suppress(ValueError):
                self.lm.set_attn_implementation("eager")
        limits = [max_length, self._limit(opened)]
        self.max_length = min((limit for limit in limits if limit), default=None)

    def _limit(self, opened: Opened) -> int | None:
        if self._policy is not None and self._policy.longest is not None:
            return self._policy.longest - getattr(opened.strategy, "num_virtual_tokens", 0)
        own = opened.tokenizer.model_max_length
        return int(own) if own and own < 1 << 30 else None

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        names = self.lm.config.id2label
        return [names[number] for number in range(len(names))]

    def tokens(self, content: Content, cut: bool = False) -> list[int]:
        """What the model reads of a conversation, a text, or a text with what goes on from it.

        Args:
            content: What is read.
            cut: Whether its last answer was cut, so that nothing closes it.

        Raises:
            DataError: If the template refuses it.
        """
        return self._tokens(content, cut)[0]

    def _tokens(self, content: Content, cut: bool = False) -> tuple[list[int], int]:
        """The same, and the number of tokens before the second of two texts, else 0."""
        border = self.template.border(content)
        if not isinstance(content, Conversation):
            ids = self.template.tokens(content)
            if cut and ids and ids[-1] == self.template.tokenizer.eos_token_id:
                ids = ids[:-1]
        else:
            text = self.template.render(
                content.messages, tools=content.tools, options=content.template_kwargs, texts=self.strict
            )
            if cut and (said := content.messages[-1].content.strip()) and said in text:
                text = text[: text.rindex(said) + len(said)]
            ids = list(self.template.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if self.max_length is not None and len(ids) > self.max_length:
            self.shortened += 1
            if border:
                between = self.template.between()
                return shortened_pair(ids, border, self.max_length, self.truncate, *self._ends, between)
            ids = shortened(ids, self.max_length, self.truncate, *self._ends)
        return ids, border

    @torch.no_grad()
    def __call__(self, contents: Sequence[Content], cut: Sequence[bool] | None = None) -> Tensor:
        """Logits of each, `[N, L]`, in their order; float32, on the CPU.

        Args:
            contents: What is read.
            cut: Whether the last answer of each was cut, so that nothing closes it; none was when left out.
        """
        cut = [False] * len(contents) if cut is None else cut
        found = [self._tokens(content, unclosed) for content, unclosed in zip(contents, cut, strict=True)]
        rows = [ids for ids, _ in found]
        borders = [border if self.template.has_types else 0 for _, border in found]
        if any(not row for row in rows):
            raise ConfigError("nothing can be scored that has no tokens; leave empty texts out.")
        out = torch.zeros(len(rows), len(self.outputs))
        for batch in _batches([len(row) for row in rows], self.max_tokens):
            out[batch] = self._run([rows[n] for n in batch], [borders[n] for n in batch]).float().cpu()
        return out

    def _run(self, rows: list[list[int]], borders: list[int]) -> Tensor:
        device = self.lm.get_input_embeddings().weight.device
        if self._policy is not None:
            examples = [Example(row, [0.0] * len(row)) for row in rows]
            batch = rated(pack(examples), range(len(rows)))
            return self._policy(batch.replace(extras={"borders": torch.tensor(borders)}).to(device))
        pad = self.lm.config.get_text_config().pad_token_id
        if pad is None:  # transformers takes one at a time then
            return torch.cat([self.lm(input_ids=torch.tensor([row], device=device)).logits for row in rows])
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        return self.lm(input_ids=ids, attention_mask=mask).logits


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Cuts rows into batches of at most so many places with padding, the longest first; a longer row goes alone."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def open_classifier(name: str, base: str | None = None, which: str = "last", trust_remote_code: bool = False) -> Opened:
    """Opens a sequence classifier: a run, an adapter folder, a folder, or a hub id.

    Args:
        name: What to open.
        base: The base model of an adapter folder, where not the one it names.
        which: `last` or `best` checkpoint of a run.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ConfigError: If it cannot be opened, or is no classifier.
    """
    if not is_run(name) and not is_adapter(name) and base is None:
        if not is_classifier(name):
            raise ConfigError(f"{name} is no sequence classifier; give a run of RewardModel or Classification, say.")
        lm, _ = load_classifier(name, trust_remote_code=trust_remote_code, packed=False)
        return Opened(lm.eval(), None, load_tokenizer(name, trust_remote_code), name)
    opened = open_model(name, base, which)
    if not opened.head:
        raise ConfigError(f"{name} is a language model, not a classifier; give a run of RewardModel, say.")
    return opened


class RewardScorer(Verifier):
    """Rates answers with a trained reward model, or any sequence classifier of transformers.

    The model reads the prompt and the answer through its own tokenizer and chat template, whatever the policy has; that
    of a run with the system turn it was trained with where there is none. An answer that was cut is not closed, and the
    thought with which the policy's template begins an answer is part of it. Its weights are loaded when it is first
    used.

    Args:
        model: A run of `RewardModel` or `Classification`, an exported folder, an adapter folder with a head, or the hub
            id or folder of a transformers sequence classifier.
        label: Of a classifier with several outputs the one whose logit is the reward: its name, or its number.
        max_length: Most tokens of prompt and answer; longer ones lose their start. The model's own limit when left out.
        max_tokens: Most tokens of a micro-batch.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ConfigError: At the first use, if the model cannot be opened, or has several outputs and none was named.
    """

    reads_plain = True  # texts without a template stay such

    def __init__(
        self,
        model: str,
        label: str | int | None = None,
        max_length: int | None = None,
        max_tokens: int = 4096,
        trust_remote_code: bool = False,
    ) -> None:
        if max_length is not None and max_length < 2:
            raise ConfigError(f"RewardScorer.max_length must be at least 2 tokens, got {max_length}.")
        if max_tokens < 1:
            raise ConfigError(f"RewardScorer.max_tokens must be at least 1 token, got {max_tokens}.")
        self.model, self.label = model, label
        self.max_length, self.max_tokens, self.trust_remote_code = max_length, max_tokens, trust_remote_code
        self._device: torch.device | str = "cpu"
        self._scorer: SequenceScorer | None = None
        self._output = 0
        self._system: str | None = None
        self._told = False

    def to(self, device: torch.device | str) -> RewardScorer:
        """Moves the model to a device, now or when it is loaded."""
        self._device = device
        if self._scorer is not None:
            self._scorer.lm.to(device)
        return self

    @property
    def scorer(self) -> SequenceScorer:
        """The model, loaded.

        Raises:
            ConfigError: If it cannot be, or has several outputs and none was named.
        """
        if self._scorer is None:
            opened = open_classifier(self.model, trust_remote_code=self.trust_remote_code)
            scorer = SequenceScorer(opened, self.max_length, "start", self.max_tokens, strict=False)
            self._output, self._system = self._number(scorer.outputs), opened.system
            scorer.lm.to(self._device)
            self._scorer = scorer
        return self._scorer

    def _number(self, outputs: list[str]) -> int:
        """Which output is the reward."""
        if self.label is None and len(outputs) == 1:
            return 0
        listed = ", ".join(outputs[:8])
        if self.label is None:
            raise ConfigError(f"RewardScorer: {self.model} has {len(outputs)} outputs ({listed}); set label to one.")
        if str(self.label) in outputs:
            return outputs.index(str(self.label))
        if isinstance(self.label, int) and 0 <= self.label < len(outputs):
            return self.label
        raise ConfigError(
            f"RewardScorer: {self.model} has no output {self.label!r}: {nearest(str(self.label), outputs)}"
        )

    @override
    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """The reward of each answer: the logit of the output.

        Args:
            prompts: The turns before each answer (messages, or mappings with role and content), of which the answer
                becomes the assistant's turn; or a text, which the answer goes on from.
            completions: The answers.
            columns: `tools`, which the chat template is handed, and `chat_template_kwargs`, of which it is handed what
                it reads; `truncated` and `prefilled`; others are not read.
        """
        if not completions:
            return []
        scorer, nothing = self.scorer, [None] * len(completions)
        tools, options = columns.get("tools") or nothing, columns.get("chat_template_kwargs") or nothing
        begun = columns.get("prefilled") or [""] * len(completions)
        contents = [
            self._content(prompt, first + text, given, own)
            for prompt, first, text, given, own in zip(prompts, begun, completions, tools, options, strict=True)
        ]
        scores = scorer(contents, columns.get("truncated"))[:, self._output].tolist()
        if scorer.shortened and not self._told:
            self._told = True
            rank_zero_only(print)(
                f"note       {self.model} reads {scorer.max_length} tokens: {scorer.shortened} of {len(contents)} "
                "texts are longer and lose their start",
                flush=True,
            )
        return scores

    def _content(self, prompt: str | Sequence[Any], completion: str, tools: Any, options: Any) -> Content:
        """A prompt with its answer."""
        if isinstance(prompt, str):
            return Completion(prompt, completion)
        turns = [turn if isinstance(turn, Message) else _message(turn) for turn in prompt]
        try:
            given = tools_of({"tools": tools})
        except RowError:  # a column of that name that holds something else
            given = None
        read = {
            name: value
            for name, value in (template_kwargs_of({"chat_template_kwargs": options}) or {}).items()
            if wrong_option(name, self.scorer.template.renderer.template(given)) is None
        }
        turns.append(Message("assistant", completion))
        made: Any = with_system(Conversation(tuple(turns), given, template_kwargs=read or None), self._system)
        return made


def _message(turn: Any) -> Message:
    more = {key: value for key, value in turn.items() if key not in ("role", "content")}
    return Message(turn["role"], turn["content"], more=more or None)


__all__ = ["Content", "RewardScorer", "SequenceScorer", "open_classifier"]
