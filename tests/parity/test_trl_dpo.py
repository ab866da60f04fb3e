"""TRL 1.16 as the anchor of DPO with LoRA: the same loss, gradient norm and margin at every optimizer step."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from ftlit.testing import tiny_lm, tiny_tokenizer

pytest.importorskip("trl")

pytestmark = pytest.mark.xdist_group("trl_dpo")

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("dpo")
    finally:
        sys.path.remove(str(BENCH))
        for name in ("dpo", "peers", "measure"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def rows(bench, tmp_path_factory):
    """Twelve pairs of different lengths, every third after a longer conversation."""
    path = tmp_path_factory.mktemp("rows") / "pairs.json"
    made = []
    for i in range(12):
        turns = [{"from": "human", "value": "Say " + "ab" * (i * 5 % 9)}]
        if i % 3 == 0:
            turns += [{"from": "gpt", "value": "No."}, {"from": "human", "value": f"Again {i}"}]
        good, bad = "cd " * (1 + i * 7 % 11) + "!", "ef" * (1 + i * 3 % 7)
        made.append({"conversations": turns, "chosen": {"from": "gpt", "value": good},
                     "rejected": {"from": "gpt", "value": bad}})  # fmt: skip
    path.write_text(json.dumps(made))
    return bench.encode_pairs(str(path), tiny_tokenizer(), 12, 120)


@pytest.mark.parametrize(("cached", "micro"), [(False, 4), (False, 1), (True, 2)])
def test_every_step_agrees(bench, rows, cached, micro, monkeypatch, tmp_path):
    """Also where the token cap cuts ftlit's steps, and TRL accumulates over micro-batches."""
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path))
    settings = bench.Settings(lr=1e-3, batch_size=4, max_tokens=200, micro=micro)
    adapter = bench.initial_adapter(tiny_lm("llama"), settings.rank)
    ours, theirs = (
        run(rows, tiny_lm("llama"), tiny_tokenizer(), adapter, settings, cached)
        for run in (bench.run_ftlit, bench.run_trl)
    )
    assert ours[0].loss == pytest.approx(0.693147, abs=1e-6)
    assert ours[-1].loss < 0.693
    for a, b in zip(ours, theirs, strict=True):
        assert (a.loss, a.margin) == pytest.approx((b.loss, b.margin), abs=TOLERANCE)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=TOLERANCE)


def test_rows_of_a_ratio(bench, tmp_path):
    path = tmp_path / "pairs.json"
    row = {"prompt": "abcdefghijklmnop", "chosen": "12345", "rejected": "6789"}
    path.write_text(json.dumps([row]))
    ((prompt, better, worse),) = bench.encode_pairs(str(path), tiny_tokenizer(), 1, 120, ratio=4)
    assert (len(prompt), len(better), len(worse)) == (16, 4, 4)
