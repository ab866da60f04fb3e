"""The only place where it is decided which tokens are trained.

A conversation is rendered by the model's own chat template, cut where generation would start each answer, and tokenized
piece by piece: so the prompt of every trained answer is, token for token, what `generate` will be fed. Where a template
shows earlier turns differently once later ones follow (it drops old reasoning, say), or where an answer's first
characters would merge with the prompt, no single row can hold all answers exactly; the conversation is then split into
one example an answer, each with its own exact prompt. Nothing is found by searching for tokens, so it does not matter
that a model pads with its end token.

Where a template says itself with `{% generation %}` what is trained, its marks can narrow an answer (leave reasoning
out, say); marks outside the answers, or that leave the end token out, are refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from ftlit.batch import Example
from ftlit.data.cutting import Cut, Cutter
from ftlit.data.formats.base import (
    Comparison,
    Completion,
    Conversation,
    Message,
    Record,
    Text,
    unanswered,
)
from ftlit.data.plain import opening_tokens
from ftlit.data.rendering import Options, Renderer, Tools, choose_template
from ftlit.data.shown import Shown
from ftlit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last", "all"]
# What a text is tokenized after, where its first characters would merge with a prompt: the first that does not itself.
_LEADS = ("", "\n", ".", "a", "0")


class _Answer(NamedTuple):
    """One answer: the tokens that generation is fed, the tokens that follow, and which of those are trained.

    Attributes:
        before: Tokens of the prompt, from where they were asked for.
        own: Tokens of the answer, up to its end token.
        trained: For each of those whether it is trained.
        text: Prompt and answer up to the end token.
        end: The end token.
        apart: Whether the answer would merge with the prompt, and was tokenized by itself.
    """

    before: list[int]
    own: list[int]
    trained: list[bool]
    text: str
    end: str
    apart: bool


class ChatTemplate:
    """Turns what rows became into tokens and weights.

    Args:
        tokenizer: The model's tokenizer.
        template: A Jinja chat template, the path of one, or `plain`, to use instead of the tokenizer's. A tokenizer
            without one gets the plain one.
        train_on: `assistant`: every assistant turn with its end token; `last`: the last one only; `all`: every token.
        options: Values for variables of the template, such as `{enable_thinking: false}`; those of a row come first.

    Raises:
        ConfigError: If what is given is no template, it reads no variable of that name, or there is no end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        train_on: TrainOn = "assistant",
        options: Options = None,
    ) -> None:
        self.tokenizer, self.train_on = tokenizer, train_on
        self.is_assumed = choose_template(tokenizer, template, options)
        added = tokenizer.added_tokens_decoder
        self._special = set(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}
        self._opening: list[int] | None = None
        self.renderer = Renderer(tokenizer)
        self._shown = Shown(self.renderer)
        self._cut = Cutter(self.renderer, tokenizer, self._special)
        self.characters = 0
        """How many characters were tokenized."""

    # ---- text -----------------------------------------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[Message],
        *,
        prompt: bool = False,
        tools: Tools = None,
        options: Options = None,
        texts: bool = True,
    ) -> str:
        """The text of some messages; with `prompt`, up to where the next answer starts.

        Args:
            messages: The turns.
            prompt: Whether an answer is to follow.
            tools: The tools that the template is handed.
            options: Variables of the template.
            texts: Whether the text of each turn must show; else only every part of a turn must, whatever its text: of
                answers that a model wrote, the template may take out what it does not like.

        Raises:
            DataError: If the template refuses the messages, or does not show all of what they say.
        """
        text = self.renderer(messages, tools, prompt=prompt, options=options)
        self._shown.history(text if texts else None, messages, tools, options, prompt=prompt)
        return text

    # ---- tokens ---------------------------------------------------------------------------------------------------

    def end_tokens(self) -> list[int]:
        """The tokens that the template closes an answer with, which is what training teaches the model to end with."""
        closed = self.encode(Conversation((Message("user", "Hello"), Message("assistant", "Hello"))))
        return [int(closed[-1].input_ids[-1])]

    def prompt_ids(
        self, messages: Sequence[Message], tools: Tools = None, options: Options = None, texts: bool = True
    ) -> list[int]:
        """The tokens that generation is fed to answer some messages; see `render`."""
        return self._tokenize([self.render(messages, prompt=True, tools=tools, options=options, texts=texts)])[0]

    def prompt_of(self, record: Record) -> list[int]:
        """The tokens that generation is fed to go on from a record without its answer."""
        if isinstance(record, Comparison):
            record = unanswered(record)
        if isinstance(record, Conversation):
            return self.prompt_ids(record.messages, record.tools, record.template_kwargs)
        return self._opened(record.text if isinstance(record, Text) else record.given)

    def encode(self, record: Record) -> list[Example]:
        """The examples of a record: one as a rule, one an answer where one could not be exact, none if it weighs 0.

        A comparison becomes pieces: the prompt, with the margin as its value, and then each answer, with its grade.

        Raises:
            DataError: If a conversation has no assistant turn, or the template cannot be followed.
        """
        if not record.weight:
            return []
        if isinstance(record, Comparison):
            examples = self._comparison(record)
        elif isinstance(record, Text):
            examples = [self._document(record)]
        elif isinstance(record, Completion):
            examples = [self._completion(record)]
        else:
            examples = self._conversation(record)
        if record.weight == 1:
            return examples
        return [e._replace(weights=[weight * record.weight for weight in e.weights]) for e in examples]

    def _comparison(self, record: Comparison) -> list[Example]:
        """The prompt and the answers of a comparison as pieces; an empty answer has no tokens."""
        prompt: list[int] = []
        pieces: list[Example] = []
        for answer, grade in zip(record.answers, record.grades, strict=True):
            if isinstance(answer, Completion):
                prompt = self.prompt_of(answer)
                made = [self._completion(answer)] if answer.completion else []
            else:
                if any(message.weight not in (0, 1) for message in answer.messages):
                    raise DataError("in rows of preferences a message cannot have a weight of its own.")
                prompt = self.prompt_ids(answer.messages[: answer.given], answer.tools, answer.template_kwargs)
                made = self._conversation(answer) if len(answer.messages) > answer.given else []
            if len(made) > 1 or (made and list(made[0].input_ids[: len(prompt)]) != prompt):
                raise DataError(
                    "the chat template rewrites earlier turns, so these answers do not go on from one prompt; give "
                    "only the last turn as the answer."
                )
            if made:
                own = slice(len(prompt), None)
                pieces.append(Example(made[0].input_ids[own], made[0].weights[own], grade))
            else:
                pieces.append(Example([], [], grade))
        return [Example(prompt, [0.0] * len(prompt), record.margin), *pieces]

    def _conversation(self, conversation: Conversation) -> list[Example]:
        messages = conversation.messages
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            raise DataError("a conversation needs at least one assistant turn to train on, got none.")
        if self.train_on == "all":
            return [self._everything(conversation, answers)]
        if self.train_on == "last":
            answers = answers[-1:]
        answers = [i for i in answers if i >= conversation.given and messages[i].weight]
        if not answers:
            return []
        if all(message.role == "system" for message in messages[: answers[0]]):
            raise DataError("a conversation must open with a user turn, got an assistant turn.")
        whole = self._together(conversation, answers)
        made = [whole] if whole is not None else [self._one(conversation, answer) for answer in answers]
        return [example for example in made if example.num_targets]

    def _everything(self, conversation: Conversation, answers: list[int]) -> Example:
        """Every token but the first; answers with a weight of their own have it."""
        messages = conversation.messages
        if any(m.weight != 1 for m in messages if m.role != "assistant"):
            raise DataError("with data.train_on=all, only assistant turns can have a weight.")
        if all(messages[i].weight == 1 for i in answers):
            text = self.render(messages, tools=conversation.tools, options=conversation.template_kwargs)
            (ids,) = self._tokenize([text])
            return Example(ids, [0.0] + [1.0] * (len(ids) - 1))
        whole = self._together(conversation, answers, rest=1.0)
        if whole is None:
            raise DataError(
                "the chat template rewrites earlier turns, so that weights of messages cannot be had with "
                "data.train_on=all; train on the assistant turns."
            )
        return Example(whole.input_ids, [0.0, *whole.weights[1:]])

    def _completion(self, record: Completion) -> Example:
        ids: list[int] = []
        weights: list[float] = []
        text = ""
        stretches = [stretch for stretch in (*record.earlier, (record.prompt, False)) if stretch[0]] or [("", False)]
        for stretch, is_trained in stretches:
            own = self._following(ids, text, stretch)
            ids, text = [*ids, *own], text + stretch
            weights += [float(is_trained)] * len(own)
        own = self._ended(self._following(ids, text, record.completion, begun=True))
        if self.train_on == "all":
            return Example(ids + own, [0.0] + [1.0] * (len(ids) + len(own) - 1))
        return Example(ids + own, [0.0, *weights[1:], *[1.0] * len(own)] if ids else [1.0] * len(own))

    def _following(self, before: list[int], text: str, more: str, begun: bool = False) -> list[int]:
        """The tokens of a text that goes on from another one.

        Args:
            before: The tokens of the other one.
            text: The other one.
            more: What goes on from it.
            begun: Whether the other one may be empty.
        """
        whole = self._opened(text + more)
        if not (text or begun):
            return whole
        if whole[: len(before)] == before:
            return whole[len(before) :]
        own, _ = self._apart(before, more, whole)  # see _answer
        return own

    def _document(self, record: Text) -> Example:
        ids = self._ended(self._opened(record.text))
        return Example(ids, [0.0] + [1.0] * (len(ids) - 1))

    def _opened(self, text: str) -> list[int]:
        """The tokens of a text without a template, after what the tokenizer itself puts before every text.

        That is not put there again where the text has it already, as texts made by a chat template do.
        """
        if self._opening is None:
            self._opening = opening_tokens(self.tokenizer)
        (ids,) = self._tokenize([text])
        return ids if ids[: len(self._opening)] == self._opening else [*self._opening, *ids]

    def _ended(self, ids: list[int]) -> list[int]:
        """Some tokens with the end token after them, unless they have it; white space after it goes."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ConfigError("this model's tokenizer has no end token, so text without a chat template has no end.")
        if end in ids:
            last = len(ids) - ids[::-1].index(end)
            if not self.tokenizer.decode(ids[last:]).strip():
                return ids[:last]
        return [*ids, end]

    def _apart(self, before: list[int], text: str, whole: list[int]) -> tuple[list[int], str]:
        """The tokens of a text that goes on from a prompt with whose last token its first characters would merge.

        Many tokenizers (of Llama 2, Mistral, Phi 3) put a space before whatever they are given, so the text is
        tokenized after a character that it does not merge with, where it would not read as itself otherwise.

        Args:
            before: The tokens of the prompt.
            text: What goes on from it.
            whole: The tokens of both in one piece, which say how they read.

        Returns:
            The tokens, and what was put before the text to get them.
        """
        wanted = self.tokenizer.decode(whole, clean_up_tokenization_spaces=False)
        for lead in _LEADS:
            first, both = self._tokenize([lead, lead + text])
            own = both[len(first) :]
            read = self.tokenizer.decode(before + own, clean_up_tokenization_spaces=False)
            if both[: len(first)] == first and read == wanted:
                return own, lead
        return self._tokenize([text])[0], ""

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        self.characters += sum(map(len, texts))
        try:
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        except (TypeError, UnicodeError) as error:
            raise DataError(f"the text cannot be tokenized; is it valid Unicode? ({error})") from None

    def _trained(self, ids: list[int], text: str) -> tuple[int, str]:
        """How many tokens of a closed answer are trained, up to and with its last special token; and which that is."""
        trained = max((place + 1 for place, token in enumerate(ids) if token in self._special), default=0)
        end = self.tokenizer.convert_ids_to_tokens(ids[trained - 1]) if trained else ""
        if not end or text[text.rfind(end) + len(end) :].strip():
            raise DataError(
                f"the chat template closes an answer with no end token ({text[-30:]!r}), so the model could not learn "
                "to stop; give a data.chat_template that does."
            )
        return trained, str(end)

    def _together(self, conversation: Conversation, answers: list[int], rest: float = 0.0) -> Example | None:
        """All answers in one example, or None where that would not be exact for each."""
        messages, tools, options = conversation.messages, conversation.tools, conversation.template_kwargs
        self._shown.history(None, messages[: answers[-1]], tools, options, prompt=True)
        shown = self._shown.answers(messages[: answers[-1] + 1], answers, tools, options)
        ids: list[int] = []
        weights: list[float] = []
        last: _Answer | None = None
        cut: Cut | None = None
        for number, cut in zip(answers, self._cut(conversation, answers), strict=True):
            if last is not None and (last.apart or not cut.prompt.startswith(last.text)):
                return None
            shown.check(number, cut.text, cut.thought)
            answer = self._answer(cut, last, ids)
            if answer is None:
                return None
            weight = messages[number].weight
            ids += answer.before + answer.own
            weights += [rest] * len(answer.before) + [weight if trained else rest for trained in answer.trained]
            last = answer
        assert cut is not None
        self._shown.history(cut.prompt, messages[: answers[-1]], tools, options, prompt=True)
        return Example(ids, weights)

    def _one(self, conversation: Conversation, number: int) -> Example:
        """One answer with its exact prompt."""
        example = self._together(conversation, [number])
        assert example is not None
        return example

    def _answer(self, cut: Cut, last: _Answer | None, known: list[int]) -> _Answer | None:
        """The tokens of an answer and its prompt, from where `known` ends; None where they do not go on from `known`.

        A special token divides a text: what stands behind it is tokenized as if nothing but the token came before. So
        of a long conversation only what is new is tokenized.

        Args:
            cut: The answer.
            last: The answer before it, whose end token is the last of `known`.
            known: Tokens of what stands before.
        """
        start, head = (0, "") if last is None else (len(last.text), last.end)
        prompt = head + cut.prompt[start:]
        before, whole = self._tokenize([prompt, prompt + cut.text])
        if last is not None and not (self.tokenizer.is_fast and before[:1] == whole[:1] == known[-1:]):
            prompt, head = cut.prompt, ""
            before, whole = self._tokenize([prompt, prompt + cut.text])
            if before[: len(known)] != known:
                return None
        skip = 1 if head else len(known)
        apart = whole[: len(before)] != before
        if apart:  # its first characters would merge with the prompt's last, and generation cannot undo its prompt
            own, lead = self._apart(before, cut.text, whole)
        else:
            own, lead = whole[len(before) :], prompt
        trained, end = self._trained(own, cut.text)
        closed, own = len(own), own[:trained]
        text = cut.prompt + cut.text[: cut.text.rfind(end) + len(end)]
        if cut.marks is None:
            return _Answer(before[skip:], own, [True] * len(own), text, end, apart)
        places = [(start - len(lead), stop - len(lead)) for start, stop in self._places(lead + cut.text)[-closed:]]
        marked = self._marked(own, places[: len(own)], cut.marks)
        return _Answer(before[skip:], own, marked, text, end, apart)

    def _places(self, text: str) -> list[tuple[int, int]]:
        """Where each token lies in a text."""
        if not self.tokenizer.is_fast:
            raise ConfigError("a chat template with {% generation %} marks needs a fast tokenizer; this one is slow.")
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]

    def _marked(
        self, own: Sequence[int], places: Sequence[tuple[int, int]], marks: Sequence[tuple[int, int]]
    ) -> list[bool]:
        """Which tokens of an answer the template marks as trained."""
        trained = []
        for start, end in places:
            inside = any(first <= start and end <= last for first, last in marks)
            if not inside and any(start < last and first < end for first, last in marks):
                raise DataError(
                    "the chat template's {% generation %} marks cut through a token, so that what is trained cannot be "
                    "exact; put the marks where a special token or a line break is."
                )
            trained.append(inside)
        last = max((place for place, inside in enumerate(trained) if inside), default=-1)
        if last >= 0 and own[last] not in self._special:
            raise DataError(
                "the chat template's {% generation %} marks leave the end token of an answer out, so the model could "
                "not learn to stop; put it inside the marks."
            )
        return trained

    # ---- for a cache ----------------------------------------------------------------------------------------------

    def signature(self) -> str:
        """Everything of the tokenizer and the template that decides the tokens and weights of a record."""
        import tokenizers
        import transformers

        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            state = json.loads(backend.to_str())
            own = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
        else:
            own = {"vocabulary": tokenizer.get_vocab(), "settings": repr(tokenizer.init_kwargs)}
        template = json.dumps(tokenizer.chat_template, sort_keys=True)
        if "strftime_now" in template:  # a template that shows the date
            import datetime

            template += datetime.date.today().isoformat()
        versions = (transformers.__version__, tokenizers.__version__)
        kind = type(tokenizer).__name__
        return json.dumps(
            [kind, own, tokenizer.special_tokens_map, template, self.train_on, versions], sort_keys=True, default=str
        )


def terminal_marks() -> tuple[str, str, str]:
    """Opening mark, closing mark, and what to say of them: colour on a terminal, brackets in a file."""
    if sys.stdout.isatty():
        return "\x1b[1;32m", "\x1b[0m", "in green"
    return "⟦", "⟧", "between ⟦ ⟧"


def mark(tokenizer: PreTrainedTokenizerBase, example: Example, opening: str = "⟦", closing: str = "⟧") -> str:
    """An example as text with its trained stretches between marks."""
    parts: list[str] = []
    stretch: list[int] = []
    for place, token in enumerate(example.input_ids):
        if bool(example.weights[place]) != bool(place and example.weights[place - 1]):
            parts.append(tokenizer.decode(stretch))
            parts.append(opening if example.weights[place] else closing)
            stretch = []
        stretch.append(int(token))
    parts.append(tokenizer.decode(stretch))
    if len(example.weights) and example.weights[-1]:
        parts.append(closing)
    return "".join(parts)
