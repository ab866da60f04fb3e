"""Settings of all tests: no network, few threads, no state left behind.

Tests may run side by side (`scripts/test.sh` runs two workers): each worker has one thread, a cache and fixtures of its
own. Files whose tests share a fixture that is dear, or start processes of their own, are a group.
"""

import os
import sys

# Before torch is imported; two workers with many threads each would wait for one another.
os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {})
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from ftlit.__main__ import main
from ftlit.testing import tiny_lm, tiny_tokenizer

# Every run draws the same; `scripts/property_search.sh` searches, and what it finds becomes an @example.
settings.register_profile("daily", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile("daily")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What ftlit keeps between runs is not read from the home of whoever tests, nor shared between workers."""
    before = os.environ.get("FTLIT_CACHE")
    os.environ["FTLIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["FTLIT_CACHE"]
    else:
        os.environ["FTLIT_CACHE"] = before


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
