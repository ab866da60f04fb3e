"""The DPO stage: its reference, its sums, and what it refuses."""

import csv
import math

import lightning as L
import numpy as np
import pytest
import torch

from ftlit.batch import Example, pack
from ftlit.callbacks.metrics_csv import MetricsCSV
from ftlit.data.added import AddedRows
from ftlit.data.packing import EvalLoader, StepLoader, StepPlanner
from ftlit.data.store import Joined
from ftlit.errors import ConfigError
from ftlit.forgetting import Replay
from ftlit.forgetting.fingerprint import fingerprint
from ftlit.objectives import dpo
from ftlit.objectives.preference_sums import NAMES, WPO, LengthDesensitized, WeightedSum, loss_of
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.peft.io import save_adapter
from ftlit.stages import DPO
from ftlit.stages.dpo import summary
from ftlit.stages.reference import start_logps
from ftlit.testing import tiny_comparisons, tiny_examples, tiny_lm

SIZES = ((4, 5, 3), (9, 2, 7), (3, 6, 6), (5, 1, 4), (2, 8, 3), (7, 3, 2), (1, 2, 2))


class Data(L.LightningDataModule):
    def __init__(self, comparisons, validation=None, **plan):
        super().__init__()
        self.sets = {"train": Joined([comparisons])}
        if validation is not None:
            self.sets["validation:main"] = Joined([validation])
        self.validation_names = ["main"]
        self.options = {"batch_size": 4, "max_tokens": None, "shuffle": False, **plan}
        self.added_rows = []
        self.max_length = 512
        self.batch_size, self.max_tokens = self.options["batch_size"], self.options["max_tokens"]

    def planner(self, accumulate=1, world=1):
        return StepPlanner(
            self.sets["train"], accumulate=accumulate, world=world, added_rows=self.added_rows, **self.options
        )

    def train_dataloader(self):
        stage = self.trainer.lightning_module
        return StepLoader(self.sets["train"], self.planner(stage.accumulate, self.trainer.world_size))

    def val_dataloader(self):
        if "validation:main" not in self.sets:
            return []
        return [EvalLoader(self.sets["validation:main"], self.batch_size, self.max_tokens)]


class Record(L.Callback):
    def __init__(self):
        self.steps, self.grads = [], []

    def on_before_optimizer_step(self, trainer, stage, optimizer):
        self.grads.append({n: p.grad.clone() for n, p in stage.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx):
        self.steps.append(dict(stage.step_metrics))


def fit(strategy=None, *, comparisons=None, validation=None, trainer=None, lm=None, plan=None, **arguments):
    torch.manual_seed(0)
    arguments = {"lr": 1e-2, "warmup": 0, "schedule": "constant", **arguments}
    stage = DPO(policy=lm or tiny_lm("llama", torch.float64), peft=strategy or LoRA(rank=3), **arguments)
    record = Record()
    options = {"max_epochs": 2, "logger": False, **(trainer or {})}
    callbacks = [record, *options.pop("callbacks", [])]
    runner = L.Trainer(
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, precision="64-true", callbacks=callbacks, **options,
    )  # fmt: skip
    runner.fit(stage, Data(tiny_comparisons() if comparisons is None else comparisons, validation, **(plan or {})))
    return stage, record, runner


@pytest.mark.parametrize("make", [LoRA, Full], ids=lambda m: m.__name__)
def test_the_first_margin_is_zero_also_for_a_model_changed_in_memory(make):
    """The reference is the model as it is when the run starts, whatever its weights were read from."""
    lm = tiny_lm("llama", torch.float64)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    _, record, _ = fit(make(), lm=lm)
    assert record.steps[0]["train/loss"] == math.log(2)
    assert record.steps[0]["rewards/margins"] == 0
    assert record.steps[0]["rewards/chosen"] == 0
    assert record.steps[0]["rewards/accuracies"] == 0.5  # ties
    assert record.steps[1]["rewards/margins"] != 0
    assert record.steps[-1]["train/loss"] < math.log(2)


def test_the_reference_goes_on_from_an_adapter(tmp_path):
    """What a run continues from belongs to its reference."""
    lm, before = tiny_lm("llama", torch.float64), LoRA(rank=2)
    before.apply(lm)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_adapter(before, lm, tmp_path / "adapter", "base")
    batch = pack(tiny_comparisons()[:2])
    plain, _, _ = fit(LoRA(rank=2), trainer={"max_steps": 2})
    stage, record, _ = fit(LoRA(rank=2, from_adapter=str(tmp_path / "adapter")), trainer={"max_steps": 2})
    assert record.steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert (start_logps(stage.policy, batch) - start_logps(plain.policy, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("make", [LoRA, Full, PrefixTuning, PromptTuning], ids=lambda m: m.__name__)
def test_the_reference_stays_while_the_policy_moves(make):
    batch = pack(tiny_comparisons()[:4])
    fresh = DPO(policy=tiny_lm("llama", torch.float64), peft=make())
    fresh.configure_model()
    expected = start_logps(fresh.policy, batch)
    stage, _, _ = fit(make())
    torch.testing.assert_close(start_logps(stage.policy, batch), expected, rtol=0, atol=1e-12)
    assert (stage.policy(batch).logps - expected).abs().max() > 1e-3
    assert stage.policy.training


def test_dropout_never_touches_the_reference():
    stage, _, _ = fit(LoRA(rank=3, dropout=0.5), trainer={"max_steps": 1})
    batch = pack(tiny_comparisons()[:4])
    first, second = start_logps(stage.policy, batch), start_logps(stage.policy, batch)
    assert torch.equal(first, second)
    assert not torch.equal(stage.policy(batch).logps, stage.policy(batch).logps)
    lm = tiny_lm("llama", torch.float64, attention_dropout=0.5)
    stage, _, _ = fit(LoRA(rank=3), lm=lm, trainer={"max_steps": 1})
    assert torch.equal(start_logps(stage.policy, batch), first)


@pytest.mark.parametrize("name", ["sigmoid", "orpo", "ipo"])
def test_how_a_step_is_cut_does_not_matter(name):
    _, reference, _ = fit(loss=name)
    for plan, accumulate in [({"batch_size": 2}, 2), ({"batch_size": 1}, 4), ({"max_tokens": 25}, 1)]:
        _, record, _ = fit(loss=name, plan=plan, trainer={"accumulate_grad_batches": accumulate})
        for ours, theirs in zip(record.grads, reference.grads, strict=True):
            for key, gradient in theirs.items():
                torch.testing.assert_close(ours[key], gradient, rtol=0, atol=1e-9)
        for ours, theirs in zip(record.steps, reference.steps, strict=True):
            same = [key for key in theirs if not key.endswith("per_s")]
            assert {k: ours[k] for k in same} == pytest.approx({k: theirs[k] for k in same}, abs=1e-9)


def separate(stage, comparisons, index):
    """Reward and log-probability of each answer of a row, by whole sequences, and its pairs."""
    example = comparisons[index]
    own = len(example.input_ids) - sum(example.answers.lengths)
    begin, found = own, []
    for length in example.answers.lengths:
        ids = [*example.input_ids[:own], *example.input_ids[begin : begin + length]]
        batch = pack([Example(ids, [0.0] * own + [1.0] * length)])
        with torch.no_grad():
            policy = float(stage.policy(batch).logps.sum())
        found.append((policy, policy - float(start_logps(stage.policy, batch).sum()), length))
        begin += length
    return found, example.answers.pairs


def test_metrics_are_means_over_pairs_by_weight():
    shapes = [(4, 5, 3), (9, 2, 7, 4), (3, 6, 6)]
    comparisons = tiny_comparisons(shapes)
    comparisons.pieces.weights[comparisons.pieces.weights > 0] = 1.0
    first = slice(comparisons.pieces.starts[1], comparisons.pieces.stops[2])
    comparisons.pieces.weights[first] = 2.5  # the first row counts 2.5 times
    stage, _, _ = fit(comparisons=comparisons, validation=comparisons, trainer={"max_steps": 3})
    sums = dict.fromkeys(("w", "loss", "rc", "rr", "m", "acc", "lacc", "lc", "lr", "nc", "nr"), 0.0)
    for index in range(3):
        found, pairs = separate(stage, comparisons, index)
        for pair in pairs:
            assert pair.weight == (2.5 if index == 0 else 1.0)
            (lc, rc, nc), (lr, rr, nr) = found[pair.better], found[pair.worse]
            values = {
                "w": 1.0, "loss": math.log1p(math.exp(-0.1 * (rc - rr))), "rc": 0.1 * rc, "rr": 0.1 * rr,
                "m": 0.1 * (rc - rr), "acc": float(rc > rr), "lacc": float(lc > lr),
                "lc": lc, "lr": lr, "nc": nc, "nr": nr,
            }  # fmt: skip
            for key, value in values.items():
                sums[key] += pair.weight * value
    means = {key: value / sums["w"] for key, value in sums.items()}
    expected = {
        "val/loss": means["loss"], "val/rewards/chosen": means["rc"], "val/rewards/rejected": means["rr"],
        "val/rewards/margins": means["m"], "val/rewards/accuracies": means["acc"],
        "val/logps/accuracies": means["lacc"], "val/logps/chosen": means["lc"],
        "val/logps/rejected": means["lr"], "val/lengths/chosen": means["nc"], "val/lengths/rejected": means["nr"],
    }  # fmt: skip
    found = dict(stage.last_metrics)
    ends = {name: [found.pop(f"val/rewards/{name}_{end}") for end in ("low", "high")] for name in _BOUNDED}
    assert found == pytest.approx(expected, rel=1e-9)
    for name, (low, high) in ends.items():
        assert low <= expected[f"val/rewards/{name}"] <= high


_BOUNDED = ("margins", "accuracies")


EVERY = [*sorted(NAMES), "wpo", "desensitized", "mpo", "forward_kl"]


def every(name):
    made_of = {
        "wpo": WPO,
        "desensitized": LengthDesensitized,
        "mpo": lambda: WeightedSum(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
        "forward_kl": lambda: dpo.Sigmoid(divergence="forward_kl"),
    }
    return made_of[name]() if name in made_of else loss_of(name)


@pytest.mark.parametrize("name", EVERY)
def test_every_loss_goes_down(name):
    """Ten steps on the same rows: less than at the start, and better answers win.

    Likelihood alone has no worse answers, and DiscoPOP falls toward negative margins from where it starts: its slope at
    0 is `m'(0) (1 - ln 2) - 3/4 > 0` with `m'(0) = 1 / (4 tau) = 5`.
    """
    loss = every(name)
    _, record, _ = fit(loss=loss, trainer={"max_steps": 10, "max_epochs": -1}, plan={"batch_size": 7}, lr=5e-2)
    assert record.steps[-1]["train/loss"] < record.steps[0]["train/loss"]
    if name not in ("sft", "discopop"):
        assert record.steps[-1]["rewards/accuracies"] > 0.7
        assert record.steps[-1]["rewards/margins"] > record.steps[0]["rewards/margins"]
    assert ("train/kl" in record.steps[-1]) == (name == "kto")


def test_single_answers_with_labels():
    comparisons = tiny_comparisons([(6, 6)] * 8, grades=[(1.0,), (0.0,)] * 4)
    _, record, _ = fit(comparisons=comparisons, loss="kto", trainer={"max_steps": 10, "max_epochs": -1})
    assert record.steps[0]["train/loss"] == pytest.approx(0.5)
    assert record.steps[-1]["train/loss"] < 0.5
    last = record.steps[-1]
    assert last["rewards/margins"] == last["rewards/chosen"] - last["rewards/rejected"] > 0
    assert "rewards/accuracies" not in last


class Logger(MetricsCSV):
    """What any logger is handed, by step."""

    def __init__(self, folder):
        super().__init__(folder)
        self.handed = {}

    def log_metrics(self, metrics, step=None):
        super().log_metrics(metrics, step)
        self.handed.setdefault(step, set()).update(metrics)


class Watch(L.Callback):
    """Logs a metric of its own, and notes what monitors can see."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx):
        stage.log("own", 1.0)

    def on_train_batch_start(self, trainer, stage, batch, batch_idx):
        self.seen.append(set(trainer.callback_metrics))


@pytest.mark.parametrize(
    ("loss", "rows", "missing"),
    [
        ("kto", [(1.0,), (0.0,), (1.0,)], {1: "chosen", 0: "rejected", 2: "rejected"}),
        ("apo_zero", [(0.0,), (1.0,), (1.0,)], {0: "chosen", 1: "rejected", 2: "rejected"}),
        ("kto", [(1.0, 0.0), (1.0,), (0.0,)], {1: "rejected", 2: "chosen"}),
    ],
)
def test_metrics_of_a_step_without_their_rows_are_empty_in_every_logger(loss, rows, missing, tmp_path):
    comparisons = tiny_comparisons([(2, 3, 4)[: 1 + len(grades)] for grades in rows], grades=rows)
    logger, watch = Logger(tmp_path), Watch()
    plan = {"batch_size": 1}
    settings = {"logger": logger, "callbacks": [watch], "log_every_n_steps": 1, "max_steps": 3, "max_epochs": 1}
    fit(comparisons=comparisons, loss=loss, plan=plan, trainer=settings)
    with logger.path.open(newline="", encoding="utf-8") as file:
        written = {int(row["step"]): {name for name, cell in row.items() if cell} for row in csv.DictReader(file)}
    for step in range(3):
        metrics, absent = logger.handed[step + 1], missing.get(step)
        for group in ("rewards", "logps", "lengths"):
            assert {side for side in ("chosen", "rejected") if f"{group}/{side}" in metrics} == {
                "chosen", "rejected"
            } - {absent}  # fmt: skip
        assert ("rewards/accuracies" in metrics) == ("rewards/margins" in metrics) == (absent is None)
        assert written[step + 1] == {*metrics, "step"} - {"epoch"}
        assert {"train/loss", "own"} <= metrics
    assert all(f"rewards/{side}" not in watch.seen[step + 1] for step, side in missing.items() if step < 2)
    assert all("train/loss" in seen for seen in watch.seen[1:])


def kto(rows, *, steps=3, **cut):
    comparisons = tiny_comparisons(vocabulary=9)
    if rows == "labelled":
        comparisons = tiny_comparisons([(4, 5), (9, 2), (3, 6), (5, 1), (2, 8), (7, 3), (1, 2)],
                                       grades=[(1.0,), (1.0,), (0.0,), (1.0,), (1.0,), (1.0,), (1.0,)])  # fmt: skip
    loss = "kto" if rows == "labelled" else ["kto", "sft"]  # so that answers become likelier, whatever the prompt
    accumulate = cut.pop("accumulate", 1)
    return fit(
        comparisons=comparisons, validation=comparisons, loss=loss, plan={"batch_size": 7, **cut},
        trainer={"max_steps": steps, "max_epochs": -1, "accumulate_grad_batches": accumulate},
    )  # fmt: skip


@pytest.mark.parametrize("rows", ["pairs", "labelled"])
@pytest.mark.parametrize(
    "cut",
    [
        {"batch_size": 1, "accumulate": 7},  # every micro-batch has one row
        {"batch_size": 2, "accumulate": 4},  # the last one has
        {"batch_size": 6, "accumulate": 2},
        {"max_tokens": 12},
    ],
)
def test_reference_point_of_kto_does_not_depend_on_how_a_step_is_cut(rows, cut):
    whole, record, _ = kto(rows)
    other, again, _ = kto(rows, **cut)
    assert record.steps[-1]["train/kl"] > 0
    for key in ("train/loss", "train/kl", "train/grad_norm"):
        assert [step[key] for step in again.steps] == pytest.approx([step[key] for step in record.steps], abs=1e-12)
    for ours, theirs in zip(again.grads, record.grads, strict=True):
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-12)
    assert other.last_metrics == pytest.approx(whole.last_metrics, abs=1e-12)
    assert whole.last_metrics["val/kl"] > 0


def test_reference_point_of_kto():
    """The mean over all answers of log pi - log ref after prompts that they do not belong to, not below 0."""
    comparisons = tiny_comparisons(vocabulary=9)
    stage, _, _ = fit(comparisons=comparisons, loss=["kto", "sft"], trainer={"max_steps": 3})
    rows = stage.trainer.datamodule.sets["train"]
    batches = [pack(rows[:3], [0, 1, 2]), pack(rows[3:4], [3])]
    expected = []
    for number in range(4):
        prompt, donor = (rows[number + i] for i in (0, 1))
        starts = [len(one.input_ids) - sum(one.answers.lengths) for one in (prompt, donor)]
        answers = np.split(donor.input_ids[starts[1] :], np.cumsum(donor.answers.lengths)[:-1])
        for answer in answers:
            ids = [*prompt.input_ids[: starts[0]], *answer]
            alone = pack([Example(ids, [0.0] * starts[0] + [1.0] * len(answer))])
            with torch.no_grad():
                expected.append(float((stage.policy(alone).logps - start_logps(stage.policy, alone)).sum()))
    mean = sum(expected) / len(expected)
    assert float(stage._reference_point(batches, "train")) == pytest.approx(max(0.0, mean), abs=1e-9)
    assert mean > 0


def test_kto_needs_two_prompts():
    with pytest.raises(ConfigError, match="rows of at least two prompts"):
        fit(loss="kto", comparisons=tiny_comparisons([(4, 5, 3)]))


def test_wpo_weighs_by_log_probabilities_as_they_are():
    with pytest.raises(ConfigError, match=r"make it WPO\(LengthDesensitized"):
        LengthDesensitized(WPO())
    WPO(LengthDesensitized())


# ---- the cache of the reference -------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path))
    return tmp_path / "reference"


@pytest.mark.parametrize("make", [LoRA, Full], ids=lambda m: m.__name__)
def test_cached_scores_train_the_same(make, cache, monkeypatch):
    live, reference, _ = fit(make(), validation=tiny_comparisons(SIZES[:3]))
    stage, record, _ = fit(make(), validation=tiny_comparisons(SIZES[:3]), cache_reference=True)
    assert len(list(cache.glob("*.npy"))) == 2
    for ours, theirs in zip(record.grads, reference.grads, strict=True):
        for key, gradient in theirs.items():
            torch.testing.assert_close(ours[key], gradient, rtol=0, atol=1e-9)
    assert stage.last_metrics == pytest.approx(live.last_metrics, abs=1e-9)
    assert record.steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-12)

    def never(*args):
        raise AssertionError("the reference ran again")

    monkeypatch.setattr("ftlit.stages.reference.start_logps", never)
    monkeypatch.setattr("ftlit.stages.dpo.start_logps", never)
    _, second, _ = fit(make(), validation=tiny_comparisons(SIZES[:3]), cache_reference=True)
    assert [step["train/loss"] for step in second.steps] == [step["train/loss"] for step in record.steps]


def test_a_second_fit_does_not_take_the_scores_of_the_first(cache):
    stage, _, _ = fit(cache_reference=True, trainer={"max_steps": 1})
    other = tiny_comparisons([*reversed(SIZES)])
    L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, precision="64-true", max_steps=1,
    ).fit(stage, Data(other))  # fmt: skip
    batch = pack(other[:4])
    torch.testing.assert_close(stage.reference(batch, "train"), start_logps(stage.policy, batch), rtol=0, atol=1e-9)


def test_the_factor_of_the_adapter_that_a_run_goes_on_from_names_the_start(tmp_path):
    """The same tensors with another alpha are another model."""
    lm, before = tiny_lm("llama", torch.float64), LoRA(rank=2, alpha=4)
    before.apply(lm)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    names = []
    for alpha in (4, 4, 8):
        before.alpha = alpha
        save_adapter(before, lm, tmp_path / f"{len(names)}", "base")
        fresh, strategy = (
            tiny_lm("llama", torch.float64),
            LoRA(rank=2, alpha=alpha, from_adapter=str(tmp_path / f"{len(names)}")),
        )
        strategy.apply(fresh)
        strategy.remember_start(fresh)
        names.append(fingerprint(fresh, strategy))
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("change", ["weights", "config", "tokens", "mask", "torn"])
def test_stale_scores_are_never_used(change, cache):
    fit(cache_reference=True, trainer={"max_steps": 1})
    (file,) = cache.glob("*.npy")
    lm, comparisons = tiny_lm("llama", torch.float64), tiny_comparisons()
    if change == "weights":
        with torch.no_grad():
            next(iter(lm.parameters()))[7, 3] += 0.5
    elif change == "config":
        lm = tiny_lm("llama", torch.float64, rms_norm_eps=0.5)
    elif change == "tokens":
        comparisons.pieces.ids[0] += 1
    elif change == "mask":
        comparisons.pieces.weights[comparisons.pieces.starts[2]] = 0.0
    else:
        file.write_bytes(file.read_bytes()[:-8])
    _, record, _ = fit(lm=lm, comparisons=comparisons, cache_reference=True, trainer={"max_steps": 1})
    assert record.steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert len(list(cache.glob("*.npy"))) == (1 if change == "torn" else 2)


# ---- with other parts -----------------------------------------------------------------------------------------------


def test_replay_beside_pairs():
    """Rows that a control adds do not enter the loss of the pairs."""

    class Added(Data):
        def load_added(self, name, file):
            return tiny_examples((9, 4, 12))

    def run(callbacks):
        torch.manual_seed(0)
        stage = DPO(policy=tiny_lm("llama", torch.float64), peft=LoRA(rank=3), lr=1e-2)
        record = Record()
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, precision="64-true", callbacks=[record, *callbacks], max_steps=2,
        )  # fmt: skip
        trainer.fit(stage, Added(tiny_comparisons()))
        return record

    plain, beside = run([]), run([Replay("general.jsonl", "ce", ratio=0.5)])
    assert beside.steps[0]["train/loss"] == plain.steps[0]["train/loss"] == math.log(2)
    assert beside.steps[0]["forgetting/replay/tokens"] > 0
    assert beside.steps[0]["train/grad_norm"] != plain.steps[0]["train/grad_norm"]


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_replay_in_micro_batches_of_its_own(loss):
    """How a step is cut does not matter; nor whether the reference is cached."""
    runs = []
    for plan, cached in (({}, False), ({"max_tokens": 24}, False), ({"max_tokens": 24}, loss == "sigmoid")):
        alone = Alone()
        callbacks = [GivenReplay(ratio=1.0, weight=2.0), alone]
        stage, record, _ = fit(loss=loss, trainer={"callbacks": callbacks}, plan=plan, cache_reference=cached)
        assert alone.seen == bool(plan)
        runs.append((stage, record))
    (whole, reference), *others = runs
    for cut, record in others:
        for ours, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
        for ours, theirs in zip(record.steps, reference.steps, strict=True):
            for name in ("train/loss", "rewards/margins", "forgetting/replay/loss", "forgetting/replay/tokens"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-9), name


class Alone(L.Callback):
    """Whether a micro-batch had nothing but added rows."""

    seen = False

    def on_train_batch_start(self, trainer, stage, batch, batch_idx):
        self.seen |= any(0 not in micro.sources for micro in batch.micro_batches)


class GivenReplay(Replay):
    """Of rows made in code: as long as the longest that a micro-batch holds."""

    def __init__(self, **arguments):
        super().__init__(name="replay", **arguments)

    def added_rows(self, stage):
        self._added = AddedRows(self.name, tiny_examples((22, 19, 23, 20), seed=7), self.ratio, self.seed)
        return self._added


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "options", "sentence"),
    [
        ("sigmoid", {"sizes": [(2, 1)]}, "Sigmoid compares answers, and some rows have one answer with a label"),
        ("ipo", {"margin": 1.0}, "IPO does not use a margin column"),
        ("aot", {"weight": 2.0}, "AOT sorts its pairs"),
    ],
)
def test_rows_that_do_not_go_with_the_loss(loss, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        fit(loss=loss, comparisons=tiny_comparisons(**options))


@pytest.mark.parametrize("loss", ["aot", ["sigmoid", "aot_unpaired"]])
def test_rows_that_are_compared_with_others_need_others(loss):
    with pytest.raises(ConfigError, match=r"rows of a micro-batch with each other: set data.batch_size to at least 2"):
        fit(loss=loss, plan={"batch_size": 1})


def test_settings_that_do_not_go_together():
    with pytest.raises(ConfigError, match="SimPO needs no reference"):
        DPO(policy="x", loss="simpo", cache_reference=True)
    with pytest.raises(ConfigError, match="did you mean 'sigmoid'"):
        DPO(policy="x", loss="sigmod")


def test_summary_of_nothing_is_nothing():
    assert summary(dict.fromkeys(("weight", "chosen", "rejected", "both", "loss"), 0.0)) == {}
