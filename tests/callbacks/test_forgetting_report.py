import math

import pytest

from ftlit.callbacks.forgetting_report import draw, learnt_and_lost, notes, verdict
from ftlit.forgetting import ForgettingProbe
from ftlit.forgetting.drift import OUTSIDE, Drift


def values(name, nll, change, half, kl=0.1, agreement=0.9):
    one = {"nll": nll, "change": change, "change_low": change - half, "change_high": change + half}
    one |= {"ppl_ratio": math.exp(change), "agreement": agreement, "kl": kl}
    return {f"forgetting/{name}/{key}": value for key, value in one.items()}


START = {"val/loss": 3.0, **values("general", 1.5, 0, 0), **values("target", 3.0, 0, 0), **values("code", 0.8, 0, 0)}
END = {
    **values("general", 1.7, 0.2, 0.05, kl=0.25),
    **values("code", 0.79, -0.01, 0.02, kl=None),
    **values("target", 1.0, -2.0, 0.1),
    "forgetting/worst/change": 0.2,
}


def test_the_table_says_what_was_learnt_and_what_was_lost():
    lines = learnt_and_lost(START, END)
    assert lines[0].startswith("what was learnt and what was lost (nats a token")
    assert lines[1].split() == [
        "before",
        "after",
        "change",
        "95",
        "%",
        "interval",
        "perplexity",
        "same",
        "choice",
        "KL",
    ]
    cells = [line.split() for line in lines[2:]]
    assert cells[0][:5] == ["the", "target", "3.0000", "1.0000", "-2.0000"]
    assert cells[0][-1] == "learnt"
    assert cells[1] == [
        *("general", "1.5000", "1.7000", "+0.2000", "+0.1500", "to", "+0.2500", "x", "1.221", "90.0%", "0.2500"),
        "forgotten",
    ]
    assert cells[2][-4:] == ["-", "no", "change", "seen"]
    assert len({line.index(".") for line in lines[2:]}) == 1, "the decimal points are in one column"


def test_a_loss_that_fell_is_not_called_good():
    end = {**END, **values("code", 0.7, -0.1, 0.02)}
    assert learnt_and_lost(START, end)[-1].endswith("loss fell"), "general says itself that something was lost"
    lines = learnt_and_lost(START, {**end, **values("general", 1.5, 0.0, 0.02)})
    assert lines[-2].endswith("loss fell")
    assert lines[-1].startswith("note       code: a lower loss does not mean that nothing was lost")


def test_nothing_measured_no_table():
    assert learnt_and_lost({"val/loss": 3.0}, {"val/loss": 1.0}) == []
    assert learnt_and_lost({}, END) == []


@pytest.mark.parametrize(
    ("low", "high", "target", "word"),
    [
        (0.01, 0.02, False, "forgotten"), (-0.02, -0.01, False, "loss fell"), (-0.01, 0.01, False, "no change seen"),
        (0.01, 0.02, True, "worse"), (-0.02, -0.01, True, "learnt"), (-0.01, 0.01, True, "no change seen"),
        (-math.inf, math.inf, False, "no change seen"), (0.0, 0.0, False, "no change seen"),
    ],
)  # fmt: skip
def test_verdict(low, high, target, word):
    assert verdict(low, high, target) == word


def test_notes():
    probe = ForgettingProbe()
    probe.seconds, probe.rounds = 4.4, 3
    assert notes(probe, 44.0) == ["probe      measured 3 times in 4 s, 10% of the run"]
    probe.drift = Drift(0.0123, {OUTSIDE: 0.5, 0: 0.01, 1: 0.02})
    assert notes(probe, 44.0)[0] == "weights    moved by 1.23% of their size, most in layer 1 (2.00%)"


# ---- pictures -------------------------------------------------------------------------------------------------------


def series(target=True):
    steps = (0, 2, 5, 10, 20, 40, 80)
    found = {}
    sets = [("general", 0.12, 0.02), ("code", 0.05, 0.04), *([("target", -2.0, 0.2)] if target else [])]
    for name, rate, half in sets:
        change = [(step, rate * (1 - math.exp(-step / 20))) for step in steps]
        found[f"forgetting/{name}/nll"] = [(step, 2 + value) for step, value in change]
        found[f"forgetting/{name}/change"] = change
        for end, sign in (("low", -1), ("high", 1)):
            found[f"forgetting/{name}/change_{end}"] = [(s, v + sign * half * (s > 0)) for s, v in change]
    for key in ("change", "change_low", "change_high"):
        found[f"forgetting/worst/{key}"] = found[f"forgetting/general/{key}"]
    found["forgetting/forgetting_budget/change"] = [(2, 5.0)]  # another callback's own numbers are no domain
    found["forgetting/weights/change"] = [(2, 0.01), (80, 0.02)]
    return found


def drawn(folder, monkeypatch, *given):
    """Draws, and returns the figures."""
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    files = draw(folder, *given)
    figures = [plt.figure(number) for number in plt.get_fignums()]
    monkeypatch.undo()
    plt.close("all")
    return files, figures


def test_each_domain_has_its_line_and_its_band(tmp_path, monkeypatch):
    files, (figure, plane) = drawn(tmp_path, monkeypatch, series(), math.log(1.02))
    assert [file.name for file in files] == ["forgetting.png", "learn_forget.png"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files)
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
    assert set(lines) == {"general", "code", "budget: +0.0198 nats, perplexity +2.0%"}
    assert list(lines["general"].get_xdata()) == [0, 2, 5, 10, 20, 40, 80]
    assert len(axes.collections) == 2
    assert "nats a token" in axes.get_ylabel()
    assert "optimizer step" in axes.get_xlabel()
    line = plane.axes[0].get_lines()[0]
    assert list(line.get_xdata()) == pytest.approx([-value for _, value in series()["forgetting/target/change"]])
    assert list(line.get_ydata()) == pytest.approx([value for _, value in series()["forgetting/worst/change"]])
    assert {"start", "step 80"} <= {text.get_text() for text in plane.axes[0].texts}


def test_where_likelihood_is_not_what_is_taught_the_validation_loss_is_drawn(tmp_path, monkeypatch):
    found = {**series(), "val/loss": [(0, 0.69), (40, 0.5), (80, 0.4)]}
    _, (_, plane) = drawn(tmp_path, monkeypatch, found, None, "nats a pair")
    line = plane.axes[0].get_lines()[0]
    assert list(line.get_xdata()) == pytest.approx([0, 0.19, 0.29])
    worst = dict(found["forgetting/worst/change"])
    assert list(line.get_ydata()) == pytest.approx([worst[0], worst[40], worst[80]])
    assert not learnt_and_lost(START, END, "nats a pair")[2].endswith("learnt")


def test_without_target_rows_there_is_no_plane(tmp_path, monkeypatch):
    files, _ = drawn(tmp_path, monkeypatch, series(target=False))
    assert [file.name for file in files] == ["forgetting.png"]


def test_nothing_to_draw(tmp_path):
    assert draw(tmp_path, {"val/loss": [(0, 1.0)]}) == []
    assert draw(tmp_path, {key: points[:1] for key, points in series().items()}) == []
