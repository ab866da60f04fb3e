"""The controller: what it does to a plant that forgets, and its corners."""

import math

import pytest

from ftlit.errors import ConfigError
from ftlit.forgetting.controller import IntegralController


def settle(controller, forgets, steps=200):
    """A plant whose forgetting goes half the way to `forgets / (1 + weight)` between two measurements."""
    value, values = 0.0, []
    for _ in range(steps):
        value += 0.5 * (forgets / (1 + controller.weight) - value)
        controller.update(value)
        values.append(value)
    return values


@pytest.mark.parametrize("forgets", [0.05, 0.1, 0.3])
def test_settles_at_the_limit(forgets):
    controller = IntegralController(0.02)
    values = settle(controller, forgets)
    assert values[-1] == pytest.approx(0.02, rel=0.02)
    assert controller.weight == pytest.approx(forgets / 0.02 - 1, rel=0.05)
    assert not controller.out_of_reach


@pytest.mark.parametrize("power", [0.4, 1.0, 1.5])
def test_settles_whatever_the_power(power):
    """What is forgotten falls as a power of the weight, and follows it slowly."""
    controller, value = IntegralController(0.02), 0.0
    for _ in range(300):
        value += 0.3 * (0.1 / (1 + 4 * controller.weight) ** power - value)
        controller.update(value)
    assert value == pytest.approx(0.02, rel=0.02)


def test_falls_to_zero_where_there_is_slack():
    controller = IntegralController(0.02)
    settle(controller, 0.01, 30)
    assert controller.weight == 0


def test_slack_early_does_not_switch_it_off():
    """A measurement far below what is allowed costs a factor, not the weight."""
    controller = IntegralController(0.02, integral=0.5)
    assert [controller.update(0.0) for _ in range(3)] == pytest.approx([math.exp(-0.5 * n) for n in (1, 2, 3)])


def test_what_is_allowed_grows_with_the_share():
    controller = IntegralController(0.02)
    assert controller.update(0.005, share=0.25) == pytest.approx(1.0)
    assert controller.update(0.005 * math.e, share=0.25, elapsed=0.3) == pytest.approx(math.exp(0.3))


def test_slack_is_not_paid_back():
    """After a long slack the weight answers at once, and is back after some measurements."""
    controller = IntegralController(0.02)
    for _ in range(100):
        controller.update(0.0)
    assert controller.update(0.2) > 0
    for _ in range(3):
        controller.update(0.2)
    assert controller.weight > 1


def test_says_when_it_is_at_its_end():
    controller = IntegralController(0.02, most=3.0)
    settle(controller, 1.0, 10)
    assert controller.weight == 3.0
    assert controller.out_of_reach
    settle(controller, 0.03, 60)
    assert not controller.out_of_reach


@pytest.mark.parametrize(("probes", "gain"), [(10, 0.5), (30, 0.5), (30, 0.2)])
def test_a_limit_out_of_reach_is_said_early_and_one_within_reach_is_not(probes, gain):
    """What is measured goes to `plain / (1 + weight)`, at its own pace and with noise."""
    for plain in (0.03, 0.06, 0.1, 0.5, 1.0):
        controller, value, said = IntegralController(0.02), 0.0, []
        for number in range(probes):
            value += gain * (plain / (1 + controller.weight) - value)
            controller.update(
                value + 0.003 * math.sin(2.4 * number), elapsed=10 / probes, left=10 * (probes - 1 - number) / probes
            )
            said += [number] if controller.out_of_reach else []
        assert bool(said) == (plain > 0.1), plain
        assert not said or said[0] <= (5 if probes == 10 else 9)


def test_first_measurements_by_hand():
    controller = IntegralController(0.1, integral=0.5, first=2.0)
    assert controller.update(0.15) == pytest.approx(2 * 1.5**0.5)
    assert controller.update(10.0) == pytest.approx(2 * 1.5**0.5 * math.e)  # the excess is clipped at 2
    assert controller.update(-1.0) == pytest.approx(2 * 1.5**0.5 * math.exp(0.5))  # and at -1
    assert [controller.update(10.0) for _ in range(3)][-1] == 20.0
    assert controller.update(-1.0) == pytest.approx(20 * math.exp(-0.5))  # nothing was wound up


def test_goes_on_from_its_state():
    first, second = IntegralController(0.02), IntegralController(0.02)
    settle(first, 0.1, 7)
    second.load_state_dict(first.state_dict())
    assert all(isinstance(value, int | float) for value in first.state_dict().values())
    assert [first.update(x) for x in (0.03, 0.01)] == [second.update(x) for x in (0.03, 0.01)]


def test_noise_of_a_fifth_of_the_budget_leaves_the_mean_at_the_limit():
    controller, value, values = IntegralController(0.02), 0.0, []
    for step in range(400):
        value += 0.5 * (0.1 / (1 + controller.weight) - value)
        controller.update(value + 0.004 * math.sqrt(2) * math.sin(2.4 * step))
        values.append(value)
    assert sum(values[100:]) / 300 == pytest.approx(0.02, rel=0.1)


def test_numbers_out_of_range():
    for options in ({"limit": 0.0}, {"limit": 1.0, "most": 0.0}, {"limit": 1.0, "first": 30.0}):
        with pytest.raises(ConfigError, match="controller needs"):
            IntegralController(**options)
