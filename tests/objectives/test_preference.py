"""The preference losses at values derived by hand, and what they promise about themselves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.errors import ConfigError
from ftlit.objectives import dpo, preference_sums, reference_free
from ftlit.objectives.dpo import AOT, KTO, APOZero, Sigmoid
from ftlit.objectives.preference import PreferenceLoss, PreferenceScores
from ftlit.objectives.preference_sums import NAMES, WPO, LengthDesensitized, WeightedSum, loss_of
from ftlit.objectives.reference_free import CPO, ORPO, ChosenNLL, SimPO, SLiC

LN2, LN3 = math.log(2), math.log(3)
LN15 = math.log(1.5)


def doubled(**more):
    """The pair of the docstrings of `dpo`: better answer twice as likely as under the reference, worse as likely."""
    logps = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.0 - LN2, -3.0], dtype=torch.float64)
    return PreferenceScores(logps, (1, 1), [(0, 1)], ref, **more)


def half_and_quarter():
    """That of `reference_free`: probabilities 1/2 and 1/4."""
    logps = torch.tensor([-LN2, -2 * LN2], dtype=torch.float64, requires_grad=True)
    return PreferenceScores(logps, (1, 1), [(0, 1)])


def sigma(x):
    return 1 / (1 + math.exp(-x))


WITH_REFERENCE = {
    "sigmoid": (dpo.Sigmoid(1.0), LN15),
    "conservative": (dpo.Sigmoid(1.0, label_smoothing=0.1), 0.9 * LN15 + 0.1 * LN3),
    "forward_kl": (dpo.Sigmoid(1.0, divergence="forward_kl"), -math.log(sigma(0.5))),
    "js_divergence": (dpo.Sigmoid(1.0, divergence="js_divergence"), math.log(7 / 4)),
    "alpha_divergence": (dpo.Sigmoid(1.0, divergence="alpha_divergence"), -math.log(sigma(2 - math.sqrt(2)))),
    "alpha_one": (dpo.Sigmoid(1.0, divergence="alpha_divergence", alpha=1.0), LN15),
    "hinge": (dpo.Hinge(1.0), 1 - LN2),
    "ipo": (dpo.IPO(1.0), (LN2 - 0.5) ** 2),
    "exo": (dpo.EXO(1.0, 0.1), 2 / 3 * math.log(2 / (3 * 0.9)) + 1 / 3 * math.log(1 / (3 * 0.1))),
    "robust": (dpo.Robust(1.0), (0.9 * LN15 - 0.1 * LN3) / 0.8),
    "discopop": (dpo.DiscoPOP(1.0, tau=1.0), LN15 / 3 + 1 / 3),
    "sigmoid_norm": (dpo.SigmoidNorm(1.0), LN15),
    "nca": (dpo.NCA(1.0), LN15 + LN3 / 2 + LN2 / 2),
    "bco": (dpo.BCO(1.0), LN15 + LN2),
    "sppo": (dpo.SPPO(1.0), (LN2 - 0.5) ** 2 + 0.25),
    "apo_zero": (dpo.APOZero(1.0), 1 / 3 + 1 / 2),
    "apo_down": (dpo.APODown(1.0), 1.0),
    "kto": (dpo.KTO(1.0), 1 / 3 + 1 / 2),
    "aot": (dpo.AOT(1.0), LN15),
    "aot_unpaired": (dpo.AOTUnpaired(1.0), LN15),
}
WITHOUT = {
    "chosen_nll": (ChosenNLL(), LN2),
    "simpo": (SimPO(1.0, gamma=0.0), LN15),
    "orpo": (ORPO(1.0), LN2 + math.log(4 / 3)),
    "cpo": (CPO(1.0), LN15 + LN2),
    "slic": (SLiC(1.0), 1 - LN2 + LN2),
}


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_values_of_the_docstrings_with_a_reference(name):
    loss, expected = WITH_REFERENCE[name]
    assert loss(doubled()).tolist() == pytest.approx([expected], abs=1e-12)
    assert loss.needs_reference


@pytest.mark.parametrize("name", WITHOUT)
def test_values_of_the_docstrings_without_a_reference(name):
    loss, expected = WITHOUT[name]
    assert loss(half_and_quarter()).tolist() == pytest.approx([expected], abs=1e-12)
    assert not loss.needs_reference


def test_every_class_has_a_value_here():
    tested = {type(loss) for loss, _ in [*WITH_REFERENCE.values(), *WITHOUT.values()]}
    wrappers = {WeightedSum, LengthDesensitized, WPO}
    modules = (dpo, reference_free, preference_sums)
    public = [getattr(module, name) for module in modules for name in module.__all__]
    known = {one for one in public if isinstance(one, type) and issubclass(one, PreferenceLoss)}
    assert known - {dpo.MarginLoss} == tested | wrappers


def test_value_of_a_length_desensitized_answer():
    """Answers of one and two tokens of probability 1/2: the second token of the longer one counts half."""
    logps = torch.full((3,), -LN2, dtype=torch.float64)
    scores = PreferenceScores(logps, (1, 2), [(0, 1)], torch.zeros(3, dtype=torch.float64))
    expected = -math.log(sigma(-LN2 + 1.5 * LN2))
    assert LengthDesensitized(Sigmoid(1.0), 0.5)(scores).item() == pytest.approx(expected)
    assert LengthDesensitized(Sigmoid(1.0), 1.0)(scores).item() == pytest.approx(Sigmoid(1.0)(scores).item())


def test_value_of_a_weighted_pair():
    """Two tokens of probability 1/2 where sum_v p^2 is 1/4: w = exp(ln(1/2) - ln(1/4)) = 2 for each answer."""
    logps = torch.full((4,), -LN2, dtype=torch.float64, requires_grad=True)
    quarter = torch.full((4,), -2 * LN2, dtype=torch.float64)
    scores = PreferenceScores(logps, (2, 2), [(0, 1)], logps.detach(), log_sum_sq=quarter)
    loss = WPO(Sigmoid(1.0))
    assert loss(scores).item() == pytest.approx(4 * LN2)
    assert loss.watch == {"log_sum_sq"}
    (gradient,) = torch.autograd.grad(loss(scores).sum(), logps)
    (plain,) = torch.autograd.grad(Sigmoid(1.0)(scores).sum(), logps)
    torch.testing.assert_close(gradient, 4 * plain)  # the weight carries none


def test_margin_is_the_offset_of_the_sigmoid():
    scores = doubled(margins=torch.tensor([LN2]))
    assert Sigmoid(1.0)(scores).item() == pytest.approx(LN2, abs=1e-6)
    assert [one.uses_margins for one in (Sigmoid(), WeightedSum(["sigmoid"]), dpo.IPO())] == [True, True, False]


def test_reference_point_of_kto_is_a_constant():
    point = torch.tensor(LN2, requires_grad=True)
    loss = KTO(1.0)(doubled(kl=point))
    assert loss.item() == pytest.approx(1 / 2 + (1 - sigma(LN2)), abs=1e-6)
    loss.sum().backward()
    assert point.grad is None


@pytest.mark.parametrize("make", [KTO, APOZero])
def test_single_answers(make):
    """A pair is the sum of its two answers taken alone; an answer that is not there leaves no gradient."""
    whole = doubled()
    both = make(1.0)(whole)
    alone = PreferenceScores(whole.logps, (1, 1), [(0, -1), (-1, 1)], whole.ref_logps)
    torch.testing.assert_close(make(1.0)(alone).sum(), both.sum())
    only = PreferenceScores(whole.logps, (1, 1), [(0, -1)], whole.ref_logps)
    (gradient,) = torch.autograd.grad(make(1.0)(only).sum(), whole.logps)
    assert [bool(number) for number in gradient] == [True, False]
    assert make.unpaired


def test_aot_sorts_over_the_batch():
    """Margins 3, 1 of the policy and 0, 2 of the reference: sorted, 1 - 0 and 3 - 2."""
    logps = torch.tensor([3.0, 0, 1, 0], dtype=torch.float64)
    ref = torch.tensor([0.0, 0, 2, 0], dtype=torch.float64)
    scores = PreferenceScores(logps, (1, 1, 1, 1), [(0, 1), (2, 3)], ref)
    assert AOT(1.0)(scores).tolist() == pytest.approx([-math.log(sigma(1))] * 2)
    assert dpo.AOTUnpaired(1.0)(scores).tolist() == pytest.approx([-math.log(sigma(-1)), -math.log(sigma(3))])
    assert (AOT.couples, AOT.aligned) == (True, False)


lengths = st.lists(st.integers(1, 6), min_size=2, max_size=5)


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(0, 1000))
def test_sums_and_pairs_of_a_ranking(sizes, seed):
    """Every quantity of a pair is that of its answers, by plain loops; taken apart, all losses stay the same."""
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(sum(sizes), generator=generator, dtype=torch.float64)
    ref = -torch.rand(sum(sizes), generator=generator, dtype=torch.float64)
    pairs = [(i, j) for i in range(len(sizes)) for j in range(i + 1, len(sizes))]
    scores = PreferenceScores(logps, sizes, pairs, ref, log_sum_sq=ref * 2)
    totals, place = [], 0
    for size in sizes:
        totals.append((sum(logps[place : place + size].tolist()), sum(ref[place : place + size].tolist())))
        place += size
    for number, (best, worst) in enumerate(pairs):
        assert scores.chosen[number].item() == pytest.approx(totals[best][0])
        assert scores.rejected_ratio[number].item() == pytest.approx(totals[worst][0] - totals[worst][1])
        assert scores.rejected_mean[number].item() == pytest.approx(totals[worst][0] / sizes[worst])
    apart = scores.apart()
    assert apart.pairs == tuple((2 * p, 2 * p + 1) for p in range(len(pairs)))
    for name in ("sigmoid", "ipo", "orpo", "bco_pair", "aot"):
        torch.testing.assert_close(loss_of(name)(apart), loss_of(name)(scores))
    torch.testing.assert_close(WPO()(apart), WPO()(scores))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_gradients_are_those_of_the_formula(name):
    """Differentiated by finite differences."""
    generator = torch.Generator().manual_seed(1)
    logps = -torch.rand(9, generator=generator, dtype=torch.float64, requires_grad=False).add_(0.2)
    logps.requires_grad_()
    ref = -torch.rand(9, generator=generator, dtype=torch.float64)
    loss = loss_of(name)

    def value(x):
        return loss(PreferenceScores(x, (2, 1, 4, 2), [(0, 1), (2, 3)], ref if loss.needs_reference else None)).sum()

    assert torch.autograd.gradcheck(value, (logps,))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("far", [(-3000.0, -50.0), (-50.0, -3000.0)])
def test_far_from_the_reference_nothing_overflows(divergence, far):
    for make in (dpo.Sigmoid, dpo.EXO):
        logps = torch.tensor(far, dtype=torch.float64, requires_grad=True)
        ref = torch.tensor([-100.0, -100.0], dtype=torch.float64)
        value = make(divergence=divergence)(PreferenceScores(logps, (1, 1), [(0, 1)], ref)).sum()
        value.backward()
        assert value.isfinite()
        assert logps.grad.isfinite().all()


def test_several_names_are_their_sum():
    loss = loss_of(["sigmoid", "sft"])
    assert isinstance(loss, WeightedSum)
    assert loss.weights == [1.0, 1.0]


def test_a_sum_needs_what_its_parts_need():
    loss = WeightedSum(["orpo", "kto", "aot"])
    assert (loss.needs_reference, loss.couples, loss.needs_kl, loss.aligned, loss.unpaired) == (
        True,
        True,
        True,
        False,
        False,
    )
    assert not WeightedSum(["simpo", "sft"]).needs_reference
    assert WeightedSum([WPO(), Sigmoid(0.3)]).watch == {"log_sum_sq"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Sigmoid(0), "Sigmoid's beta must be positive, got 0."),
        (lambda: Sigmoid(label_smoothing=0.5), "Sigmoid's label_smoothing must be in [0, 0.5), got 0.5."),
        (lambda: dpo.EXO(label_smoothing=0), "EXO's label_smoothing must be in (0, 0.5), got 0."),
        (lambda: Sigmoid(divergence="kl"), "got 'kl'"),
        (lambda: dpo.DiscoPOP(tau=0), "tau must be positive"),
        (lambda: KTO(desirable_weight=-1), "must not be negative"),
        (lambda: SimPO(gamma=-1), "gamma must not be negative"),
        (lambda: CPO(alpha=-1), "alpha must not be negative"),
        (lambda: SLiC(delta=-1), "must not be negative"),
        (lambda: WeightedSum([]), "at least one loss"),
        (lambda: WeightedSum(["sigmoid"], [1, 2]), "a weight a loss"),
        (lambda: WPO("aot"), "AOT does not keep apart"),
        (lambda: LengthDesensitized(alpha=2), "alpha must be in [0, 1]"),
        (lambda: loss_of("sigmod"), "did you mean 'sigmoid'?"),
        (lambda: Sigmoid()(half_and_quarter()), "there are no scores of one"),
    ],
)
def test_mistakes(make, sentence):
    with pytest.raises(ConfigError) as error:
        make()
    assert sentence in str(error.value)
