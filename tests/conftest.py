"""Settings of all tests: no network, few threads, no state left behind."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from ftlit.__main__ import main
from ftlit.testing import tiny_lm, tiny_tokenizer


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """A tiny model with its tokenizer, saved as transformers saves one."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_lm("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def norms_in_float64(monkeypatch):
    """Llama's norms round to float32 inside; a comparison to the last digits of float64 needs them not to."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(norm, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture
def ftlit(tmp_path, monkeypatch, capfd):
    """Runs the command in a folder of its own; returns its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FTLIT_RUN", raising=False)

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["ftlit"])
        capfd.readouterr()
        try:
            status = main([str(a) for a in args])
        except SystemExit as end:
            status = end.code or 0
        out, err = capfd.readouterr()
        command.out, command.err = out, err
        return status

    path, modules = list(sys.path), set(sys.modules)
    yield command
    sys.path[:] = path
    for name in set(sys.modules) - modules:  # a user's own file of this test is not that of the next
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
