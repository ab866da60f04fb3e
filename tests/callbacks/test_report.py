import csv
import json
import math

import pytest

from ftlit.callbacks.report import before_and_after, curves, draw, moving_mean
from ftlit.callbacks.tables import finite, number, table


def write(folder, rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def drawn(folder, monkeypatch):
    """Draws, and returns the panels as `{label: (x, y)}`."""
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    assert draw(folder) == folder / "loss.png"
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    figure = plt.gcf()
    panels = [{line.get_label(): line for line in axes.get_lines()} for axes in figure.axes]
    monkeypatch.undo()
    plt.close("all")
    return panels


def test_validation_sets_are_told_apart_and_answers_have_a_panel(tmp_path, monkeypatch):
    rows = [{"step": 0, "val/loss": 3, "val/other/loss": 4, "gen/f1": 0.1, "gen/verifier": 0.5, "gen/length": 7}]
    rows[0] |= {"gen/verifier_low": 0.2, "gen/verifier_high": 0.8}
    rows += [{"step": step, "train/loss": 3 - step / 10} for step in (1, 2, 3)]
    write(tmp_path, rows)
    losses, scores = drawn(tmp_path, monkeypatch)
    assert set(losses) == {"train/loss", "val/loss", "val/other/loss"}
    assert list(losses["train/loss"].get_ydata()) == [2.9, 2.8, 2.7]
    assert len({line.get_color() for line in losses.values()}) == 3
    assert losses["val/loss"].get_marker() != losses["val/other/loss"].get_marker()
    assert set(scores) == {"gen/f1", "gen/verifier"}


def test_a_run_without_validation_has_one_panel_and_one_step_can_be_seen(tmp_path, monkeypatch):
    write(tmp_path, [{"step": 1, "train/loss": 2.5}])
    (losses,) = drawn(tmp_path, monkeypatch)
    assert set(losses) == {"train/loss"}
    assert losses["train/loss"].get_marker() == "."


def test_a_long_run_is_smoothed(tmp_path, monkeypatch):
    write(tmp_path, [{"step": step, "train/loss": step % 2} for step in range(1, 101)])
    (losses,) = drawn(tmp_path, monkeypatch)
    assert list(losses["train/loss, smoothed"].get_ydata())[10:] == [0.5] * 90


def test_nothing_to_draw(tmp_path):
    assert draw(tmp_path) is None
    write(tmp_path, [{"step": 1, "train/lr": 2.5}])
    assert draw(tmp_path) is None


def test_values_that_are_not_finite_are_left_out(tmp_path):
    write(tmp_path, [{"step": 1, "train/loss": "nan", "val/loss": 1}, {"step": 2, "train/loss": "inf", "val/loss": 2}])
    assert curves(tmp_path / "metrics.csv") == {"val/loss": [(1, 1.0), (2, 2.0)]}


def test_moving_mean():
    assert moving_mean([4, 2, 6, 0], 2) == [4, 3, 4, 3]
    assert moving_mean([], 3) == []


def test_before_and_after():
    start = {"val/loss": 2.0, "val/perplexity": 7.4, "gen/verifier": 0.0}
    end = {
        "gen/verifier": 0.5,
        "gen/verifier_low": 0.1,
        "gen/verifier_high": 0.9,
        "val/loss": 1.5,
        "val/new/loss": None,
    }
    lines = before_and_after(start, end)
    assert [line.split()[0] for line in lines] == ["before", "val/loss", "val/new/loss", "gen/verifier"]
    assert lines[1].split()[:3] == ["val/loss", "2.0000", "1.5000"]
    assert lines[2].split()[:3] == ["val/new/loss", "-", "-"]
    assert lines[3].endswith("95 % interval 0.1000 to 0.9000 afterwards")
    assert len({line.index(".") for line in (lines[1], lines[3])}) == 1
    assert before_and_after({}, {}) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.12344, "0.1234"), (999.5, "999.5000"), (12345.6, "12,346"), (-2e9, "-2e+09"), (None, "-"), (math.nan, "nan")],
)
def test_number(value, shown):
    assert number(value) == shown


def test_table_puts_the_interval_behind_its_mean():
    (line,) = table({"gen/verifier": 0.5, "gen/verifier_low": 0.25, "gen/verifier_high": 0.75})
    assert line.split() == ["gen/verifier", "0.5000", "95", "%", "interval", "0.2500", "to", "0.7500"]


def test_json_has_no_infinity():
    assert json.dumps(finite({"a": math.inf, "b": math.nan, "c": 1.0})) == '{"a": null, "b": null, "c": 1.0}'
