"""Where the shipped configs are, and what `--config sft` means."""

from __future__ import annotations

import difflib
from pathlib import Path

from ftlit.errors import ConfigError

_PACKAGE = Path(__file__).parent


def config_dir() -> Path:
    """The folder of the shipped configs: inside an installed package, or beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Names of the shipped configs, such as `sft` and `peft/lora`."""
    root = config_dir()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def resolve(name: str) -> str:
    """The file behind a `--config` argument: a file as given, else a shipped one by name.

    Args:
        name: A path, or `sft`, `peft/lora`, `configs/sft.yaml`.

    Raises:
        ConfigError: If there is neither; says which name comes nearest.
    """
    if Path(name).is_file():
        return name
    short = name.removesuffix(".yaml").removesuffix(".yml").removeprefix("configs/")
    if short in names():
        return str(config_dir() / f"{short}.yaml")
    close = difflib.get_close_matches(short, names(), n=1)
    hint = f"did you mean {close[0]!r}?" if close else "ftlit configs lists those."
    raise ConfigError(f"config {name!r} is neither a file nor a shipped config: {hint}")


def resolve_all(args: list[str]) -> list[str]:
    """Command-line arguments with every `--config` (or `-c`) resolved.

    Raises:
        ConfigError: If one does not exist.
    """
    out: list[str] = []
    for argument in args:
        if out and out[-1] in ("--config", "-c"):
            argument = resolve(argument)
        elif argument.startswith("--config="):
            argument = f"--config={resolve(argument.removeprefix('--config='))}"
        out.append(argument)
    return out
