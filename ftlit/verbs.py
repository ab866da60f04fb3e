"""The verbs that use a model or finished runs: generate, chat, score, export, compare; and the list of shipped configs.

Arguments are parsed with the standard library, so help and mistakes answer before torch is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ftlit.errors import ConfigError

if TYPE_CHECKING:
    from ftlit.data.formats import Conversation, Message
    from ftlit.data.sources import Source
    from ftlit.export.opening import Opened


class _Parser(argparse.ArgumentParser):
    """Mistakes as one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.removeprefix('ftlit ')}: {message} (ftlit {self.prog.split()[-1]} --help).")


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _heat(text: str) -> float:
    if (value := float(text)) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def _share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {value}")
    return value


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def _part(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {value}")
    return value


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must have a character")
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _device(text: str) -> str:
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine; give cpu or cuda") from None
    return text


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="hub id, model folder, GGUF file, run folder, or adapter folder")
    parser.add_argument("--base", help="base model of a run or an adapter, where not the one it names")
    parser.add_argument("--which", choices=["last", "best"], default="last", help="checkpoint of a run (default: last)")
    parser.add_argument("--device", type=_device, help="where the model runs: cpu (default) or cuda")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights (float32)"
    )


def _answer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat_template_kwargs",
        type=_object,
        help="values for variables of the chat template as JSON, such as '{\"enable_thinking\": false}'; a run's own "
        "when left out",
    )
    parser.add_argument("--system", help="system turn; a run's own when left out, '' for none")
    parser.add_argument("--max_new_tokens", type=_count, default=256, help="most tokens of an answer (default: 256)")
    parser.add_argument(
        "--temperature", type=_heat, default=0.0, help="0 (default) takes the likeliest token each time"
    )
    parser.add_argument("--top_p", type=_share, default=1.0, help="sample from the likeliest of this probability")
    parser.add_argument("--top_k", type=_count, help="sample from so many of the likeliest; from all when left out")
    parser.add_argument("--min_p", type=_part, default=0.0, help="sample from this share of the likeliest or more")
    parser.add_argument(
        "--stop", action="append", default=[], type=_stop,
        help="a text that ends an answer and is left out of it; \\n is a line break; may be given several times",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")


def run(args: list[str]) -> int:
    """Runs one of these verbs.

    Args:
        args: The verb and its options.

    Returns:
        The exit status.

    Raises:
        FtlitError: For whatever the user can mend.
    """
    verbs = {
        "generate": _generate,
        "chat": _chat,
        "score": _score,
        "export": _export,
        "compare": _compare,
        "configs": _configs,
    }
    return verbs[args[0]](args[1:])


def _configs(args: list[str]) -> int:
    from ftlit.shipped import config_dir, names

    _Parser("ftlit configs", description="List the shipped configs.").parse_args(args)
    for name in names():
        first = (config_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:<22} {first.removeprefix('# ') if first.startswith('#') else ''}")
    return 0


def _open(options: argparse.Namespace, generates: bool = True) -> Opened:
    _quiet()
    from ftlit.export.opening import open_model, place

    opened = open_model(options.model, options.base, options.which)
    if opened.head and generates:
        raise ConfigError(f"{options.model} is a classifier and writes no text; use ftlit score.")
    if generates:
        place(opened.lm, options.device, options.dtype)
    return opened


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _with_system(opened: Opened, options: argparse.Namespace, asked: Conversation) -> Conversation:
    """A question with the system turn that was asked for, or that the run was trained with."""
    from ftlit.data.sources import with_system

    changed: Any = with_system(asked, opened.system if options.system is None else options.system or None)
    return changed


def _ask(
    opened: Opened,
    options: argparse.Namespace,
    asked: Sequence[Conversation],
    first: int = 0,
    streamer: Any = None,
) -> list[str]:
    """Answers some questions at once; `first` is the number of the first, for the seeds of the samples."""
    from ftlit.data.templating import ChatTemplate
    from ftlit.rollout.generate import generate, seed_of, text_of

    template = ChatTemplate(opened.tokenizer, options=options.chat_template_kwargs)
    asked = [_with_system(opened, options, one) for one in asked]
    if template.is_assumed and not first:
        print(
            "this model has no chat template, so the plain one is used (### User: ... ### Assistant: ...)",
            file=sys.stderr,
        )
    answers = generate(
        opened.lm,
        opened.strategy,
        opened.tokenizer,
        # In a chat the model's own answers stand in the prompt, and those may hold anything.
        [template.prompt_ids(one.messages, one.tools, one.template_kwargs, streamer is None) for one in asked],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        stop=options.stop,
        streamer=streamer,
        seeds=[seed_of(options.seed, first + number) for number in range(len(asked))],
    )
    return [_until(text_of(opened.tokenizer, answer), options.stop) for answer in answers]


def _until(text: str, stop: Sequence[str]) -> str:
    """A text up to where it comes to one to stop at."""
    return text[: min((place for one in stop if (place := text.find(one)) >= 0), default=len(text))]


class _Asked(NamedTuple):
    """A question, as it was given and as a conversation."""

    given: str | list[dict[str, Any]]
    asked: Conversation


def _conversation(source: Source, index: int) -> Conversation:
    """The turns of a row, up to its last answer.

    Raises:
        ConfigError: If it is no conversation.
    """
    from ftlit.data.formats import Conversation

    record = source.record(index)
    if not isinstance(record, Conversation):
        raise ConfigError(f"--prompts {source.where(index)}: a question must be a conversation (messages, say).")
    if record.messages[-1].role == "assistant":
        record = record._replace(messages=record.messages[:-1])
    return record


def _questions(options: argparse.Namespace) -> list[_Asked]:
    """The questions of the command line and of the file."""
    from ftlit.data.formats import Conversation, Message

    lines, rows = list(options.prompt), []
    if options.prompts:
        path = Path(options.prompts)
        if path.suffix in (".json", ".jsonl") or options.prompts.startswith("sample:"):
            from ftlit.data.sources import Source

            source = Source(options.prompts)
            for index in range(len(source)):
                asked = _conversation(source, index)
                rows.append(_Asked([turn.turn() for turn in asked.messages], asked))
        elif not path.is_file():
            raise ConfigError(f"--prompts {path} does not exist.")
        else:
            try:
                lines += [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            except UnicodeDecodeError:
                raise ConfigError(f"--prompts {path} is not valid UTF-8.") from None
    return [*(_Asked(line, Conversation((Message("user", line),))) for line in lines), *rows]


def _generate(args: list[str]) -> int:
    parser = _Parser("ftlit generate", description="Answer prompts with a model, a run or an adapter.")
    _model_arguments(parser)
    parser.add_argument("--prompt", action="append", default=[], help="a question; may be given several times")
    parser.add_argument(
        "--prompts", help="a file: a question a line, or rows as .json or .jsonl (their last answer is left out)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object a question")
    parser.add_argument("--output", help="write the JSON objects to this file instead")
    parser.add_argument("--batch_size", type=_count, default=16, help="questions answered at once (default: 16)")
    _answer_arguments(parser)
    options = parser.parse_args(args)
    if not options.prompt and not options.prompts:
        parser.error("give --prompt TEXT or --prompts FILE")
    questions = _questions(options)
    if not questions:
        raise ConfigError(f"--prompts {options.prompts} holds no question.")
    opened = _open(options)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(options.output, "w", encoding="utf-8")) if options.output else sys.stdout
        for first in range(0, len(questions), options.batch_size):
            part = questions[first : first + options.batch_size]
            for one, answer in zip(part, _ask(opened, options, [q.asked for q in part], first), strict=True):
                if options.json or options.output:
                    line = json.dumps({"prompt": one.given, "answer": answer}, ensure_ascii=False)
                else:
                    line = f"> {one.asked.messages[-1].content}\n{answer.rstrip()}\n"
                print(line, file=file, flush=True)
    if options.output:
        print(f"{len(questions)} answers in {options.output}")
    return 0


def _chat(args: list[str]) -> int:
    parser = _Parser("ftlit chat", description="Talk with a model, a run or an adapter.")
    _model_arguments(parser)
    _answer_arguments(parser)
    options = parser.parse_args(args)
    opened = _open(options)
    from transformers import TextStreamer

    from ftlit.data.formats import Conversation, Message

    print("Talk; /new starts over, /quit or Ctrl-D ends.")
    turns: list[Message] = []
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        if question in ("/quit", "/exit"):
            return 0
        if question == "/new":
            turns = []
        elif question:
            turns.append(Message("user", question))
            streamer = TextStreamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=True)
            (answer,) = _ask(opened, options, [Conversation(tuple(turns))], len(turns), streamer)
            turns.append(Message("assistant", answer))


def _score(args: list[str]) -> int:
    parser = _Parser(
        "ftlit score",
        description="Rate the answers of rows with a reward model, or label rows with a classifier: one JSON object a "
        "row, what was read with its score (label and probabilities).",
    )
    _model_arguments(parser)
    parser.add_argument(
        "--rows", required=True, help="conversations, preference rows or texts: a file (.json, .jsonl, .csv, ...)"
    )
    parser.add_argument("--output", help="write the JSON objects to this file instead of the screen")
    parser.add_argument("--max_length", type=_count, help="most tokens of a row; the model's own limit when left out")
    parser.add_argument(
        "--truncate", choices=["start", "end"], default="start", help="what a longer row loses (default: start)"
    )
    parser.add_argument("--max_tokens", type=_count, default=4096, help="most tokens of a batch (default: 4096)")
    options = parser.parse_args(args)
    from ftlit.export.opening import place
    from ftlit.export.rating import contents_of, rate
    from ftlit.export.scorer import SequenceScorer, open_classifier

    contents = contents_of(options.rows)  # before the model: mistakes answer at once
    _quiet()
    opened = open_classifier(options.model, options.base, options.which)
    place(opened.lm, options.device, options.dtype)
    scorer = SequenceScorer(opened, options.max_length, options.truncate, options.max_tokens)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(options.output, "w", encoding="utf-8")) if options.output else sys.stdout
        for line in rate(scorer, contents, opened.system):
            print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
    cut = f"; {scorer.shortened} lost their {options.truncate}" if scorer.shortened else ""
    if options.output:
        print(f"{len(contents)} rows scored in {options.output}{cut}")
    elif cut:
        print(f"{len(contents)} rows scored{cut}", file=sys.stderr)
    return 0


def _export(args: list[str]) -> int:
    parser = _Parser(
        "ftlit export", description="Write the merged model (safetensors, tokenizer, chat template) or the adapter."
    )
    _model_arguments(parser)
    parser.add_argument("--to", required=True, help="folder to write, empty or new")
    parser.add_argument("--adapter", action="store_true", help="write the adapter folder instead of the merged model")
    options = parser.parse_args(args)
    opened = _open(options, generates=False)
    from ftlit.export.opening import place
    from ftlit.export.writing import write_adapter, write_model

    # An adapter is merged in the precision that it was trained in; rounding comes after.
    place(opened.lm, options.device, options.dtype if options.adapter else None)
    if options.adapter:
        write_adapter(opened, options.to)
    else:
        write_model(opened, options.to, options.dtype)
    print(f"{'adapter' if options.adapter else 'model'} written to {options.to}")
    return 0


def _compare(args: list[str]) -> int:
    parser = _Parser(
        "ftlit compare",
        description="Finished runs side by side: what each learnt, what it lost, how its budget ended. With --tasks: "
        "runs that each went on where the last one ended, and what these tasks did to one another (ACC, BWT, FWT, "
        "Forgetting).",
    )
    parser.add_argument("run", nargs="+", help="run folders")
    parser.add_argument("--labels", nargs="+", help="what the runs are called (default: names of the folders)")
    parser.add_argument("--picture", help="draw where each ended, learnt against lost, to this file (.png, .svg, .pdf)")
    parser.add_argument(
        "--tasks", nargs="+", help="the domain of the probe that each run learnt, in the order of the runs"
    )
    options = parser.parse_args(args)
    if options.tasks and options.picture:
        parser.error("--picture shows runs side by side, not one after the other: leave out --tasks")
    from ftlit import compare

    runs = compare.read(options.run, options.labels)
    if options.tasks:
        print("\n".join(compare.in_sequence(runs, options.tasks)))
        return 0
    print("\n".join(compare.side_by_side(runs)))
    if options.picture:
        compare.draw(runs, options.picture)
        print(f"picture in {options.picture}")
    return 0
