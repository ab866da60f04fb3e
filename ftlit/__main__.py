"""The `ftlit` command. Light verbs and help answer without importing torch."""

from __future__ import annotations

import sys
from pathlib import Path

from ftlit import __version__
from ftlit.errors import FtlitError, nearest

TRAINING = {
    "fit": "train",
    "validate": "measure the loss on the validation rows",
    "test": "measure the loss on data.test",
    "predict": "answer the rows of data.predict",
    "data": "show what would be trained on",
}
MODELS = {
    "generate": "answer prompts with a model, a run or an adapter",
    "chat": "talk with a model, a run or an adapter",
    "score": "rate answers with a reward model, or label texts with a classifier",
    "export": "write the merged model or the adapter of a run",
    "compare": "show finished runs side by side: learnt and lost; or one after the other (--tasks)",
    "configs": "list the shipped configs",
}


def usage() -> str:
    """What `ftlit --help` prints."""
    verbs = {**TRAINING, **MODELS}
    lines = [f"  {verb:<10} {text}" for verb, text in verbs.items()]
    return "\n".join(
        [
            f"ftlit {__version__}: fine-tune language models on PyTorch Lightning, and see what they forget",
            "",
            "usage: ftlit VERB [options]      ftlit VERB --help lists the options of a verb",
            "",
            *lines,
            "",
            "a first run:",
            "  ftlit fit --config sft --config peft/lora --model.policy MODEL --data.train rows.jsonl",
            "  MODEL is a hub id, a folder, or a GGUF file. Add --print_config to see every setting as YAML.",
        ]
    )


def main(args: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        args: Its arguments; those of the process when left out.

    Returns:
        The exit status: 0, 1 for an error of the user, 130 when interrupted, 143 when terminated.
    """
    args = sys.argv[1:] if args is None else args
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help", "help"):
        print(usage())
        return 0
    if verb in ("-V", "--version"):
        print(f"ftlit {__version__}")
        return 0
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # classes in files of the working directory
    try:
        if verb in TRAINING:
            from ftlit.cli import run

            return run(args)
        if verb in MODELS:
            from ftlit.verbs import run as run_verb

            return run_verb(args)
    except FtlitError as error:
        print(f"ftlit: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"ftlit: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ftlit: interrupted", file=sys.stderr)
        return 130
    print(f"ftlit: there is no verb {verb!r}: {nearest(verb, [*TRAINING, *MODELS])}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
