"""Losses and gradients of the preference losses against TRL 1.16's own code, in float64, on the same log-probabilities.

TRL's `_compute_loss` is called as it is, with a stand-in for the trainer and for a model that returns what we say.
"""

import types
from pathlib import Path

import pytest
import torch

from ftlit.objectives.dpo import (
    AOT,
    BCO,
    EXO,
    IPO,
    KTO,
    NCA,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    Robust,
    Sigmoid,
    SigmoidNorm,
)
from ftlit.objectives.preference import PreferenceScores
from ftlit.objectives.preference_sums import NAMES, WPO, LengthDesensitized, WeightedSum
from ftlit.objectives.reference_free import CPO, ORPO, ChosenNLL, SimPO

trl = pytest.importorskip("trl", minversion="1.16")

CHOSEN, REJECTED = (5, 3, 9, 2), (4, 6, 1, 2)  # tokens of the answers of four pairs
PAIRS = len(CHOSEN)


class Accelerator:
    device = torch.device("cpu")

    def gather(self, value):
        return value

    gather_for_metrics = gather


class Metrics(dict):
    def __missing__(self, key):
        self[key] = []
        return self[key]


class Padded:
    """Random scores of answers as TRL holds them: padded rows, the better answers first, after prompts of 3 tokens."""

    def __init__(self, dtype=torch.float64, chosen=CHOSEN, rejected=REJECTED, seed=0):
        generator = torch.Generator().manual_seed(seed)
        lengths = [*chosen, *rejected]
        self.lengths = lengths
        width = 3 + max(lengths)
        self.mask = torch.zeros(len(lengths), width, dtype=torch.int64)
        for row, length in enumerate(lengths):
            self.mask[row, 3 : 3 + length] = 1
        shift = self.mask[:, 1:]
        options = {"generator": generator, "dtype": torch.float64}
        logps = -torch.rand(len(lengths), width - 1, **options) * 3
        self.ref = ((logps + torch.randn(logps.shape, **options) * 0.7) * shift).to(dtype)
        self.leaf = logps.to(dtype).requires_grad_()
        self.sum_sq = -torch.rand(logps.shape, **options).to(dtype) * 2

    @property
    def logps(self):
        return self.leaf * self.own

    @property
    def own(self):
        return self.mask[:, 1:].bool()

    def ours(self, values):
        """Tokens of the answers of each pair end to end: w_0, l_0, w_1, ..."""
        half = len(self.lengths) // 2
        rows = [row for pair in range(half) for row in (pair, half + pair)]
        return torch.cat([values[row][self.own[row]] for row in rows])

    def scores(self, **more):
        half = len(self.lengths) // 2
        lengths = [self.lengths[row] for pair in range(half) for row in (pair, half + pair)]
        pairs = [(2 * pair, 2 * pair + 1) for pair in range(half)]
        return PreferenceScores(
            self.ours(self.logps), lengths, pairs, self.ours(self.ref), log_sum_sq=self.ours(self.sum_sq), **more
        )


def trl_loss(padded, loss_types, weights=None, **settings):
    from trl.trainer.dpo_trainer import DPOTrainer

    def model(**kwargs):
        return types.SimpleNamespace(
            log_probs=padded.logps, entropy=torch.zeros_like(padded.logps), mean_logits=torch.zeros_like(padded.logps),
            is_top1=torch.zeros_like(padded.own), log_sum_sq_probs=padded.sum_sq,
        )  # fmt: skip

    trainer = types.SimpleNamespace(
        **{
            "model": torch.nn.Identity(), "accelerator": Accelerator(), "ld_alpha": None, "precompute_ref_logps": True,
            "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "label_smoothing": 0.0, "beta": 0.1,
            "loss_types": loss_types, "loss_weights": weights or [1.0] * len(loss_types), "use_weighting": False,
            "aux_loss_enabled": False, "_metrics": {"train": Metrics()}, "_total_train_tokens": 0, "_tp_size": 1,
            "args": types.SimpleNamespace(discopop_tau=0.05), **settings,
        }
    )  # fmt: skip
    ref = padded.ref
    if trainer.ld_alpha is not None:  # precomputed ones would not be length-desensitized; see the test of the defect
        lengths = padded.own.sum(1)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)
        factors = torch.tensor([trainer.ld_alpha, 1.0], dtype=torch.float64)
        ref = ref * factors[(padded.own.cumsum(1) <= shared[:, None]).long()]
    ref_chosen, ref_rejected = ref.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(padded.mask), "attention_mask": torch.ones_like(padded.mask),
        "completion_mask": padded.mask, "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected,
    }  # fmt: skip
    torch.set_default_dtype(padded.leaf.dtype)  # TRL makes a float32 constant of the label smoothing of EXO
    try:
        loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    finally:
        torch.set_default_dtype(torch.float32)
    return loss, trainer._metrics["train"]


def compare(padded, loss, theirs, tolerance=1e-8):
    (expected,) = torch.autograd.grad(theirs, padded.leaf)
    mine = loss(padded.scores()).mean()
    (gradient,) = torch.autograd.grad(mine, padded.leaf)
    torch.testing.assert_close(mine.double(), theirs.double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=tolerance)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("beta", [0.1, 1.3])
@pytest.mark.parametrize(
    ("name", "make", "settings"),
    [
        ("sigmoid", Sigmoid, {}),
        ("hinge", Hinge, {}),
        ("ipo", IPO, {}),
        ("exo_pair", lambda beta: EXO(beta, 0.05), {"label_smoothing": 0.05}),
        ("nca_pair", NCA, {}),
        ("robust", lambda beta: Robust(beta, 0.2), {"label_smoothing": 0.2}),
        ("bco_pair", BCO, {}),
        ("sppo_hard", SPPO, {}),
        ("aot", lambda beta: AOT(beta, 0.15), {"label_smoothing": 0.15}),
        ("aot_unpaired", lambda beta: AOTUnpaired(beta, 0.15), {"label_smoothing": 0.15}),
        ("apo_zero", APOZero, {}),
        ("apo_down", APODown, {}),
        ("discopop", DiscoPOP, {}),
        ("sigmoid_norm", SigmoidNorm, {}),
    ],
)
def test_losses_and_gradients(name, make, settings, beta):
    padded = Padded()
    theirs, metrics = trl_loss(padded, [name], beta=beta, **settings)
    compare(padded, make(beta), theirs)
    loss, scores = make(beta), padded.scores()
    rewards = loss.rewards(scores).detach()
    assert scores.better(rewards).mean().item() == pytest.approx(metrics["rewards/chosen"][0])
    assert scores.worse(rewards).mean().item() == pytest.approx(metrics["rewards/rejected"][0])
    assert scores.chosen.mean().item() == pytest.approx(metrics["logps/chosen"][0])


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
@pytest.mark.parametrize(
    ("name", "make", "smoothing"),
    [
        ("sigmoid", Sigmoid, 0.0),
        ("hinge", Hinge, 0.0),
        ("ipo", IPO, 0.0),
        ("exo_pair", EXO, 1e-3),
        ("robust", Robust, 0.1),
        ("discopop", DiscoPOP, 0.0),
        ("sigmoid_norm", SigmoidNorm, 0.0),
    ],
)
def test_divergences(name, make, smoothing, divergence):
    padded = Padded()
    theirs, _ = trl_loss(padded, [name], f_divergence_type=divergence, label_smoothing=smoothing)
    compare(padded, make(divergence=divergence), theirs)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_divergence_in_single_precision(alpha):
    """TRL has this one in float32 only: its clamp knows no float64."""
    padded = Padded(torch.float32)
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    theirs, _ = trl_loss(padded, ["sigmoid"], **settings)
    compare(padded, Sigmoid(divergence="alpha_divergence", alpha=alpha), theirs, 1e-6)
    if alpha != 1.0:
        with pytest.raises(KeyError):
            trl_loss(Padded(), ["sigmoid"], **settings)


@pytest.mark.parametrize("name", ["sigmoid", "apo_zero", "ipo"])
def test_length_desensitized(name):
    padded = Padded()
    theirs, _ = trl_loss(padded, [name], ld_alpha=0.3)
    compare(padded, LengthDesensitized(name, 0.3), theirs)


@pytest.mark.parametrize("name", ["sigmoid", "nca_pair", "sigmoid_norm"])
def test_wpo(name):
    padded = Padded()
    theirs, _ = trl_loss(padded, [name], use_weighting=True)
    compare(padded, WPO(name), theirs)


def test_weighted_sum():
    """MPO on answers of one length, where TRL's likelihood is the mean over answers, too."""
    padded = Padded(chosen=(4, 4, 4), rejected=(2, 5, 3))
    weights = [0.8, 0.2, 1.0]
    theirs, _ = trl_loss(padded, ["sigmoid", "bco_pair", "sft"], weights)
    compare(padded, WeightedSum(["sigmoid", "bco_pair", "sft"], weights), theirs)


def test_trl_likelihood_depends_on_the_cut():
    """Its `sft` is a mean over the tokens of a micro-batch: two halves do not give what the whole gives."""
    padded = Padded()
    whole, _ = trl_loss(padded, ["sft"])
    halves = []
    for rows in ((0, 1), (2, 3)):
        part = Padded()
        taken = [*rows, *(PAIRS + row for row in rows)]
        part.mask, part.ref, part.sum_sq = part.mask[taken], part.ref[taken], part.sum_sq[taken]
        part.leaf = padded.leaf.detach()[taken]
        halves.append(trl_loss(part, ["sft"])[0])
    assert abs(whole - sum(halves) / 2) > 1e-3
    ours = ChosenNLL()(padded.scores())
    means = [-(padded.logps[row].sum() / CHOSEN[row]) for row in range(PAIRS)]
    torch.testing.assert_close(ours, torch.stack(means))


def test_trl_ignores_label_smoothing_of_the_default_loss():
    padded = Padded()
    plain, _ = trl_loss(padded, ["sigmoid"])
    smoothed, _ = trl_loss(padded, ["sigmoid"], label_smoothing=0.3)
    assert plain == smoothed
    assert Sigmoid()(padded.scores()).mean().item() == pytest.approx(plain.item())
    # TRL's `aot_unpaired` on one pair is conservative DPO.
    single = Padded(chosen=(4,), rejected=(3,))
    theirs, _ = trl_loss(single, ["aot_unpaired"], label_smoothing=0.3)
    compare(single, Sigmoid(label_smoothing=0.3), theirs)


@pytest.mark.parametrize(("name", "make"), [("kto", KTO), ("apo_zero_unpaired", lambda *_: APOZero())])
@pytest.mark.parametrize("labels", [(1, 0, 0, 1, 1, 0, 1, 0), (1,) * 8, (0,) * 8])
def test_kto(name, make, labels):
    from trl.trainer.kto_trainer import KTOTrainer

    padded = Padded()
    policy_kl = torch.tensor([-2.0, 1.5], dtype=torch.float64)
    ref_kl = torch.tensor([-2.9, 1.2], dtype=torch.float64)

    def model(**kwargs):
        zeros = torch.zeros_like(padded.logps)
        return types.SimpleNamespace(log_probs=padded.logps, entropy=zeros, mean_logits=zeros)

    trainer = types.SimpleNamespace(
        model=torch.nn.Identity(), accelerator=Accelerator(), aux_loss_enabled=False, precompute_ref_logps=True,
        calculate_KL=name == "kto", loss_type=name, beta=0.1, desirable_weight=1.2, undesirable_weight=0.7,
        _metrics={"train": Metrics()}, _total_train_tokens=0, _tp_size=1,
        _compute_kl_logps=lambda *_: policy_kl,
    )  # fmt: skip
    if name != "kto":
        trainer.desirable_weight = trainer.undesirable_weight = 1.0
    inputs = {
        "input_ids": torch.zeros_like(padded.mask), "attention_mask": torch.ones_like(padded.mask),
        "completion_mask": padded.mask, "label": torch.tensor(labels).bool(),
        "ref_logps": padded.ref.sum(1), "ref_KL_logps": ref_kl,
    }  # fmt: skip
    theirs = KTOTrainer._compute_loss(trainer, model, inputs, False)
    (expected,) = torch.autograd.grad(theirs, padded.leaf)
    rows = range(len(labels))
    scores = PreferenceScores(
        torch.cat([padded.logps[row][padded.own[row]] for row in rows]),
        padded.lengths,
        [(row, -1) if labels[row] else (-1, row) for row in rows],
        torch.cat([padded.ref[row][padded.own[row]] for row in rows]),
        kl=(policy_kl - ref_kl).mean().clamp(min=0),
    )
    mine = make(0.1, 1.2, 0.7)(scores).mean()
    (gradient,) = torch.autograd.grad(mine, padded.leaf)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-8)


def cpo_trainer(loss_type, label_smoothing=0.0):
    return types.SimpleNamespace(
        loss_type=loss_type, alpha=0.0, beta=0.1, label_smoothing=label_smoothing, simpo_gamma=0.5,
        accelerator=Accelerator(),
    )  # fmt: skip


def test_simpo_and_cpo():
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    padded = Padded()
    lengths = torch.tensor(padded.lengths, dtype=torch.float64)

    def means():
        return (padded.logps.sum(1) / lengths).chunk(2)

    def sums():
        return padded.logps.sum(1).chunk(2)

    compare(padded, SimPO(0.1, 0.5), cpo.cpo_loss(cpo_trainer("simpo"), *means())[0].mean())
    compare(padded, CPO(0.1, alpha=0.0), cpo.cpo_loss(cpo_trainer("sigmoid"), *sums())[0].mean())
    compare(padded, CPO(0.1), cpo.cpo_loss(cpo_trainer("sigmoid"), *sums())[0].mean() - means()[0].mean())
    compare(padded, CPO(0.1, 0.0, 0.2), cpo.cpo_loss(cpo_trainer("sigmoid", label_smoothing=0.2), *sums())[0].mean())


def test_orpo():
    """TRL casts to float32 here."""
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    padded = Padded()
    means = (padded.logps.sum(1) / torch.tensor(padded.lengths, dtype=torch.float64)).chunk(2)
    trainer = types.SimpleNamespace(beta=0.3, accelerator=Accelerator())
    theirs = -means[0].mean() - orpo.odds_ratio_loss(trainer, *means)[0].mean()
    compare(padded, ORPO(0.3), theirs, 1e-6)


def test_every_name_of_trl_is_known():
    from trl.trainer import dpo_trainer

    source = Path(dpo_trainer.__file__).read_text()
    names = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"]
    names += ["aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
    assert all(f'"{name}"' in source for name in names)
    assert set(names) <= set(NAMES)
