import csv

import pytest
import torch

from ftlit.callbacks.metrics_csv import MetricsCSV
from ftlit.callbacks.wandb import _logged


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.csv"


def logger_of(path, **settings):
    return MetricsCSV(path.parent, **settings)


def read(path):
    """Rows as the file has them; every row must have a cell for every column."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    assert len(set(header)) == len(header)
    assert all(len(row) == len(header) for row in rows)
    return header, rows


def test_rows_are_written_at_once(path):
    logger = logger_of(path)
    logger.log_metrics({"train/loss": 2.5, "train/lr": 0.125}, step=0)
    assert path.read_text(encoding="utf-8").splitlines() == ["step,train/loss,train/lr", "0,2.5,0.125"]
    logger.log_metrics({"train/lr": 0.25, "train/loss": 2.0}, step=1)
    assert path.read_text(encoding="utf-8").splitlines()[1:] == ["0,2.5,0.125", "1,2.0,0.25"]


def test_new_columns_rewrite_the_header_and_old_rows_stay(path):
    logger = logger_of(path)
    logger.log_metrics({"a": 1}, step=0)
    logger.log_metrics({"a": 2, "b": 3}, step=1)
    logger.log_metrics({"c": 4}, step=2)
    assert read(path) == (
        ["step", "a", "b", "c"],
        [["0", "1.0", "", ""], ["1", "2.0", "3.0", ""], ["2", "", "", "4.0"]],
    )


def test_other_metrics_of_the_same_step_join_its_row(path):
    logger = logger_of(path)
    logger.log_metrics({"a": 1}, step=0)
    logger.log_metrics({"b": 2}, step=0)
    logger.log_metrics({"a": 3, "b": 4}, step=1)
    logger.log_metrics({"a": 5}, step=2)
    logger.log_metrics({"b": 6}, step=2)
    assert read(path) == (["step", "a", "b"], [["0", "1.0", "2.0"], ["1", "3.0", "4.0"], ["2", "5.0", "6.0"]])


def test_the_same_metric_of_the_same_step_gets_a_row_of_its_own(path):
    logger = logger_of(path)
    logger.log_metrics({"a": 1}, step=3)
    logger.log_metrics({"a": 2}, step=3)
    assert read(path)[1] == [["3", "1.0"], ["3", "2.0"]]


def test_epoch_is_left_out_and_tensors_are_numbers(path):
    logger = logger_of(path)
    logger.log_metrics({"epoch": 1, "a": torch.tensor(0.1, dtype=torch.float64), "b": True, "c": float("nan")}, step=0)
    assert read(path) == (["step", "a", "b", "c"], [["0", "0.1", "1.0", "nan"]])


def test_values_keep_every_digit(path):
    logger_of(path).log_metrics({"a": 0.1 + 0.2, "b": 1e-300}, step=0)
    assert [float(cell) for cell in read(path)[1][0][1:]] == [0.1 + 0.2, 1e-300]


def test_no_step_is_step_0(path):
    logger_of(path).log_metrics({"a": 1})
    assert read(path)[1] == [["0", "1.0"]]


def test_file_is_valid_after_every_call(path):
    logger = logger_of(path)
    calls = [
        ({"a": 1}, 0),
        ({"a": 2}, 1),
        ({"b": 1}, 1),
        ({"a": 3}, 2),
        ({"a": 4, "c": 1}, 3),
        ({"b": 2}, 3),
        ({"a": 5}, 4),
    ]
    for number, (metrics, step) in enumerate(calls):
        logger.log_metrics(metrics, step=step)
        header, rows = read(path)
        known = {name for earlier, _ in calls[: number + 1] for name in earlier}
        assert set(header) == {"step", *known}
        last = dict(zip(header, rows[-1], strict=True))
        assert last["step"] == str(step)
        assert {name: float(last[name]) for name in metrics} == metrics
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4"]


def logged(path, steps, **settings):
    logger = logger_of(path, **settings)
    for step in steps:
        logger.log_metrics({"a": 10 + step, **({"val": step} if step % 2 else {})}, step=step)
    return logger


def test_resumed_run_drops_rows_from_its_step_on_and_keeps_earlier(path):
    logged(path, range(5))
    logger = logger_of(path, last={"step": 2})
    logger.log_metrics({"a": 99}, step=3)
    assert read(path) == (
        ["step", "a", "val"],
        [["0", "10.0", ""], ["1", "11.0", "1.0"], ["2", "12.0", ""], ["3", "99.0", ""]],
    )
    logger.log_metrics({"new": 1}, step=4)
    assert read(path)[0] == ["step", "a", "val", "new"]
    assert read(path)[1][1] == ["1", "11.0", "1.0", ""]
    assert read(path)[1][4] == ["4", "", "", "1.0"]


def test_interrupted_and_resumed_equals_uninterrupted(path, tmp_path):
    whole = tmp_path / "whole" / "metrics.csv"
    logged(whole, range(7))
    logged(path, range(5))
    logged(path, range(3, 6), last={"step": 2})
    logged(path, range(6, 7), last={"step": 5})
    assert read(path) == read(whole)


def test_a_validation_done_again_takes_the_place_of_the_first(path):
    logger = logger_of(path)
    for step in range(4):
        logger.log_metrics({"a": step}, step=step)
    logger.log_metrics({"val": 7}, step=3)
    again = logger_of(path, last={"step": 3})
    again.log_metrics({"val": 8}, step=3)
    again.log_metrics({"a": 4}, step=4)
    assert read(path)[1][3:] == [["3", "3.0", "8.0"], ["4", "4.0", ""]]


def test_a_row_that_was_saved_but_not_logged_is_there_after_going_on(path, tmp_path):
    logged(path, range(3))
    logged(path, range(4, 5), last={"step": 3, "a": 13, "val": 3})
    logged(tmp_path / "whole/metrics.csv", range(5))
    assert read(path) == read(tmp_path / "whole/metrics.csv")


def test_resumed_run_without_a_file_starts_one(path):
    logged(path, [4], last={"step": 3})
    assert read(path) == (["step", "a"], [["4", "14.0"]])


def test_resumed_run_with_an_empty_file_starts_one(path):
    path.parent.mkdir(parents=True)
    path.touch()
    logged(path, [4], last={"step": 3})
    assert read(path) == (["step", "a"], [["4", "14.0"]])


def test_resumed_run_reads_a_file_whose_last_line_was_torn(path):
    path.parent.mkdir(parents=True)
    path.write_bytes(b"step,a\r\n0,10.0\r\n" + b"\0" * 8)  # what a power cut leaves
    logged(path, [2], last={"step": 1})
    assert read(path)[1] == [["0", "10.0"], ["2", "12.0"]]


def test_new_run_starts_a_new_file(path):
    logged(path, range(5))
    logged(path, [0])
    assert read(path) == (["step", "a"], [["0", "10.0"]])


def test_nothing_is_touched_before_the_first_metric(path):
    logged(path, range(3))
    before = path.read_bytes()
    logger = logger_of(path, last={"step": 2})
    logger.log_hyperparams({"lr": 1})
    assert path.read_bytes() == before
    assert (logger.name, logger.version) == ("", "")
    assert logger.save_dir == logger.log_dir == str(path.parent)


def test_a_row_costs_one_short_write_however_many_there_are(path, monkeypatch):
    """Also where a validation joins the row of its step; old rows are neither kept in memory nor written again."""
    logger = logger_of(path)
    logger.log_metrics({"a": 1, "val": 1}, step=0)
    monkeypatch.setattr(logger, "_write_all", None)
    for step in range(1, 300):
        logger.log_metrics({"a": step}, step=step)
        logger.log_metrics({"val": -step}, step=step)
    assert read(path)[1][1:] == [[str(step), f"{step}.0", f"-{step}.0"] for step in range(1, 300)]
    assert sum(isinstance(value, list) and len(value) > 10 for value in vars(logger).values()) == 0


def test_a_row_that_gets_shorter_leaves_nothing_behind(path):
    logger_of(path).log_metrics({"a": 0.123456789, "b": 1}, step=2)
    logger = logger_of(path, last={"step": 2})
    logger.log_metrics({"a": 1}, step=2)
    logger.log_metrics({"a": 2}, step=3)
    assert read(path)[1] == [["2", "1.0", "1.0"], ["3", "2.0", ""]]


@pytest.mark.parametrize("torn", ["3,0.25,1.2e-", "3,0.25,-", "3,0.25,1.2", "3", "3,", "\0\0\0"])
def test_wandb_passes_over_a_row_that_was_torn(torn, path):
    path.parent.mkdir()
    path.write_text(f"step,a,b\r\n1,0.5,\r\n2,0.25,nan\r\n{torn}", encoding="utf-8")
    assert _logged(path) == {1: {"a"}, 2: {"a", "b"}}
