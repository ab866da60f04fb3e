"""Finished runs side by side, and one after the other."""

import json
import math

import pytest

from ftlit.__main__ import main
from ftlit.compare import draw, in_sequence, read, side_by_side
from ftlit.errors import ConfigError


def write(folder, start, end, seconds=10.0):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"start": start, "end": end, "seconds": seconds}))
    return str(folder)


def domain(name, start, end):
    change = end - start
    side = {"nll": end, "change": change, "change_low": change - 0.01, "change_high": change + 0.01}
    return {f"forgetting/{name}/nll": start}, {f"forgetting/{name}/{key}": value for key, value in side.items()}


def run(folder, loss=(2.0, 1.5), more=None, **domains):
    start, end = {"val/loss": loss[0]}, {"val/loss": loss[1], **(more or {})}
    for name, (before, after) in domains.items():
        first, last = domain(name, before, after)
        start |= first
        end |= last if name != "worst" else {key: value for key, value in last.items() if not key.endswith("nll")}
    return write(folder, start, end)


@pytest.fixture
def two(tmp_path):
    verdict = {"limit": math.log(1.05), "verdict": math.log(1.03), "met": 1.0, "alpha": 0.94, "kept": 0.97}
    held = {f"forgetting/budget/{key}": value for key, value in verdict.items()}
    plain = run(tmp_path / "plain", own=(2.5, 2.5 + math.log(1.2)), worst=(2.5, 2.5 + math.log(1.2)))
    budget = run(tmp_path / "budget", (2.0, 1.6), held, own=(2.5, 2.52), worst=(2.5, 2.52))
    return [plain, budget]


def test_runs_side_by_side(two, capsys):
    assert main(["compare", *two]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["before", "after", "own", "budget", "time"]
    assert [line.split()[0] for line in lines[2:4]] == ["plain", "budget"]
    assert "+20.0% [+18.8%, +21.2%]" in lines[2]  # 1.2 exp(-0.01), 1.2 exp(0.01)
    assert "met, +3.0%, alpha 0.94, kept 97%" in lines[3]
    assert not any(line.startswith("note") for line in lines)


def test_runs_that_began_elsewhere_are_pointed_out(tmp_path):
    runs = read([run(tmp_path / "a", (2.0, 1.5), own=(2.5, 2.6)), run(tmp_path / "b", (2.3, 1.5), own=(2.5, 2.6))])
    notes = [line for line in side_by_side(runs) if line.startswith("note")]
    assert len(notes) == 1
    assert "b began with val/loss 2.3000, a with 2.0000" in notes[0]


def test_picture(two, tmp_path):
    path = tmp_path / "picture.png"
    assert main(["compare", *two, "--labels", "one run", "another", "--picture", str(path)]) == 0
    assert path.stat().st_size > 5000


def test_picture_needs_a_probe(tmp_path):
    with pytest.raises(ConfigError, match="bare had no ForgettingProbe"):
        draw(read([run(tmp_path / "bare")]), tmp_path / "picture.png")


@pytest.fixture
def chain(tmp_path):
    """Three tasks; every loss written out, the start of each run being the end of the last."""
    losses = [
        {"a": 3.0, "b": 4.0, "c": 5.0},
        {"a": 1.0, "b": 3.8, "c": 5.1},
        {"a": 1.6, "b": 2.0, "c": 4.9},
        {"a": 1.9, "b": 2.2, "c": 2.5},
    ]
    names = ["first", "second", "third"]
    return [
        run(tmp_path / name, **{task: (before[task], after[task]) for task in "abc"})
        for name, before, after in zip(names, losses, losses[1:], strict=False)
    ]


def test_tasks_one_after_the_other(chain, capsys):
    assert main(["compare", *chain, "--tasks", "a", "b", "c"]) == 0
    out = capsys.readouterr().out
    found = {line.split()[0]: line for line in out.splitlines()}
    assert found["ACC"].split()[1] == "+2.2000"  # (1.9 + 2.2 + 2.5) / 3
    assert found["BWT"].split()[1] == "-0.5500"  # -(0.9 + 0.2) / 2
    assert found["FWT"].split()[1] == "+0.1500"  # (4.0 - 3.8 + 5.0 - 4.9) / 2
    assert found["Forgetting"].split()[1] == "+0.5500"
    assert "after second" in out
    assert not any(line.startswith("note") for line in out.splitlines())


def test_a_run_that_went_on_elsewhere_is_pointed_out(chain):
    runs = read([chain[0], chain[2]])
    (note,) = [line for line in in_sequence(runs, ["a", "c"]) if line.startswith("note")]
    assert "third did not begin where first ended: its loss of a differs by +0.6000." in note


def test_runs_of_one_name(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    same = [run(tmp_path / name / "seed0", a=(3.0, 2.0), b=(4.0, 3.0)) for name in ("a", "b")]
    assert main(["compare", *same, "--tasks", "a", "b"]) == 0
    assert capsys.readouterr().out.count("after seed0") >= 2


def test_mistakes_are_one_sentence(two, chain, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    listed = run(tmp_path / "list")
    (tmp_path / "list" / "summary.json").write_text("[1]")
    for args, said in (
        ([*two, "--labels", "one"], "--labels: 1 for 2 runs"),
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([str(tmp_path / "empty")], "holds no summary.json"),
        ([*chain, "--tasks", "a", "b"], "--tasks: 2 for 3 runs"),
        ([*chain, "--tasks", "a", "b", "d"], "first did not measure 'd': known: a, b, c."),
        ([run(tmp_path / "bare"), "--tasks", "a"], "had no ForgettingProbe"),
        ([*two, "--picture", str(tmp_path / "x.nothing")], "--picture"),
        ([listed], "is not a summary that ftlit wrote"),
        ([*chain, "--tasks", "a", "b", "c", "--picture", "x.png"], "leave out --tasks"),
    ):
        assert main(["compare", *args]) == 1, args
        assert said in capsys.readouterr().err
