import pytest
import torch

from ftlit.metrics.calibration import calibration_error, draw_reliability, reliability
from ftlit.metrics.intervals import wilson


def test_bins_by_a_loop():
    differences = torch.tensor([-3.0, -0.1, 0.0, 0.05, 0.4, 0.6, 1.5, 2.5, 4.0, 9.0])
    bins = {}
    for gap in differences.tolist():
        sure = 1 / (1 + 2.718281828459045 ** -abs(gap))
        bins.setdefault(min(9, int((sure - 0.5) * 20)), []).append((sure, 0.5 if gap == 0 else float(gap > 0)))
    found = reliability(differences)
    assert len(found) == len(bins)
    for one, number in zip(found, sorted(bins), strict=True):
        sure, right = zip(*bins[number], strict=True)
        assert one.pairs == len(sure)
        assert one.confidence == pytest.approx(sum(sure) / len(sure), abs=1e-6)
        assert one.accuracy == sum(right) / len(right)
        assert (one.low, one.high) == wilson(sum(right), len(right))
    wanted = sum(o.pairs * abs(o.confidence - o.accuracy) for o in found) / 10
    assert calibration_error(differences) == pytest.approx(wanted)


def test_a_model_that_knows_how_sure_it_is_has_no_error():
    """Pairs drawn with the probability that the model gives them."""
    generator = torch.Generator().manual_seed(0)
    gaps = torch.rand(40_000, generator=generator) * 4
    wins = torch.rand(40_000, generator=generator) < gaps.sigmoid()
    assert calibration_error(torch.where(wins, gaps, -gaps)) < 0.01
    assert calibration_error(torch.where(wins, 3 * gaps, -3 * gaps)) > 0.1


def test_the_figure(tmp_path):
    draw_reliability(torch.randn(50), tmp_path / "c.png", "a run")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
