"""Damage inside files of the right size is found, or changes nothing."""

import os
import random
import time
from pathlib import Path

import pytest
import torch

from ftlit.batch import Example
from ftlit.data.store import Examples
from ftlit.errors import ConfigError
from ftlit.export.opening import read_checkpoint
from ftlit.files import replacing
from ftlit.stages.checkpoint_io import AtomicCheckpointIO


def flipped(path, place, bit):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_of_a_checkpoint_is_found_or_harmless(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(40, generator=generator), "b": torch.randn(3, 7, generator=generator)}
    whole = {"state_dict": weights, "global_step": 7, "ftlit": {"step_metrics": {"train/loss": 1.5}}}
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(whole, path)
    good, draw, found = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        path.write_bytes(good)
        flipped(path, draw.randrange(len(good)), draw.randrange(8))
        try:
            read = read_checkpoint(path)
        except ConfigError as error:
            found += "is torn, or not a checkpoint" in str(error)
            continue
        assert read["global_step"] == 7
        assert read["ftlit"] == whole["ftlit"]
        assert all(torch.equal(read["state_dict"][name], value) for name, value in weights.items())
    assert found > 20


def test_every_flipped_weight_is_found(tmp_path):
    path = tmp_path / "last.ckpt"
    weights = torch.full((64,), 0.5)
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": weights}}, path)
    good = path.read_bytes()
    begin = good.index(weights.numpy().tobytes())
    for place in range(begin, begin + 256, 5):
        path.write_bytes(good)
        flipped(path, place, place % 8)
        with pytest.raises(ConfigError, match="is torn"):
            read_checkpoint(path)


@pytest.mark.parametrize("name", ["ids.npy", "weights.npy", "starts.npy", "index.json"])
def test_a_flipped_bit_of_cached_tokens_is_found(tmp_path, name):
    many = [Example([1, 2, 3, n], [0.0, 1.0, 1.0, 0.5]) for n in range(60)]
    folder = tmp_path / "x"
    Examples.of(many, range(60), [False] * 60).save(folder, refused={"3": "why"})
    good, draw = (folder / name).read_bytes(), random.Random(1)
    for _ in range(50):
        (folder / name).write_bytes(good)
        flipped(folder / name, draw.randrange(len(good)), draw.randrange(8))
        with pytest.raises(ValueError, match=r"damaged|Expecting|utf|sum|Extra|Invalid"):
            Examples.load(folder)


def old(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_what_killed_processes_left_is_cleaned(tmp_path):
    """Only theirs, only after an hour, only of the file that is written."""
    gone = 2**22 + 1  # no process has such a number
    stale, fresh, running, other = (
        tmp_path / f".last.ckpt.{gone}.tmp",
        tmp_path / f".last.ckpt.{gone + 1}.tmp",
        tmp_path / f".last.ckpt.{os.getppid()}.tmp",
        tmp_path / f".best.ckpt.{gone}.tmp",
    )
    for path in (stale, fresh, running, other):
        path.write_bytes(b"x")
    for path in (stale, running, other):
        old(path, 7200)
    with replacing(tmp_path / "last.ckpt") as scratch:
        scratch.write_bytes(b"y")
    assert not stale.exists()
    assert fresh.exists()
    assert running.exists()
    assert other.exists()

    left = tmp_path / f".making-{gone}-abc"
    (left / "new").mkdir(parents=True)
    old(left, 7200)
    Examples.of([], [], []).save(tmp_path / "tokens")
    assert not left.exists()
    assert Path(tmp_path / "tokens" / "index.json").exists()
