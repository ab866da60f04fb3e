"""The rate of a run that names none: that of its stage and strategy, whatever the order of the overlays."""

import itertools
from pathlib import Path

import pytest
import yaml

from ftlit.peft import Full, LoRA, PEFTStrategy, PrefixTuning, PromptTuning, SelectiveStrategy
from ftlit.shipped import config_dir
from ftlit.stages import DPO, PPO, SFT, Classification, RewardModel
from ftlit.stages.rates import default_rate
from ftlit.testing import tiny_lm


class OwnLoRA(LoRA):
    pass


class OwnPlain(PEFTStrategy):
    pass


class OwnWhole(SelectiveStrategy):
    trains_base = True


class OwnDPO(DPO):
    pass


class OwnSFT(SFT):
    pass


@pytest.mark.parametrize(
    ("stage", "strategy", "value", "why"),
    [
        (SFT, LoRA, 2e-4, "the default of SFT with LoRA"),
        (SFT, Full, 2e-5, "the default of SFT with Full"),
        (SFT, PrefixTuning, 5e-3, "the default of SFT with PrefixTuning"),
        (SFT, PromptTuning, 5e-3, "the default of SFT with PromptTuning"),
        (DPO, LoRA, 5e-5, "the default of DPO"),
        (DPO, Full, 5e-5, "the default of DPO"),
        (RewardModel, LoRA, 1e-5, "the default of RewardModel"),
        (PPO, LoRA, 1e-5, "the default of PPO"),
        (Classification, Full, 2e-5, "the default of Classification"),
        (OwnDPO, LoRA, 5e-5, "the default of DPO"),
        (OwnSFT, OwnLoRA, 2e-4, "the default of OwnSFT with LoRA"),
        (SFT, OwnPlain, 2e-4, "OwnPlain has no default of its own and takes that of LoRA"),
        (SFT, OwnWhole, 2e-5, "OwnWhole has no default of its own and takes that of Full"),
    ],
)
def test_the_table(stage, strategy, value, why):
    assert default_rate(stage, strategy) == (value, why)


def test_a_rate_that_is_named_wins():
    stage = SFT(policy=tiny_lm(), peft=LoRA(), lr=1e-3)
    assert (stage.lr, stage.rate_used.why) == (1e-3, "model.lr")
    assert "0.001 at its peak (model.lr), schedule cosine" in stage.rate_in_words()


def test_no_overlay_carries_a_rate():
    """Only the quickstart, which is a whole run, names one."""
    for path in config_dir().rglob("*.yaml"):
        if not path.stem.startswith("quickstart"):
            settings = (yaml.safe_load(path.read_text()).get("model") or {}).get("init_args", {})
            assert "lr" not in settings, path


CASES = {"sft": {"lora": 2e-4, "full": 2e-5, "prompt_tuning": 5e-3}, "dpo": {"lora": 5e-5, "full": 5e-5}}
CASES |= {"reward": {"lora": 1e-5}, "ppo": {"lora": 1e-5}, "classification": {"lora": 2e-5, "full": 2e-5}}
ALL = [(stage, peft, rate) for stage, rates in CASES.items() for peft, rate in rates.items()]


@pytest.mark.parametrize(("stage", "peft", "rate"), ALL)
def test_print_config_says_the_rate_of_the_stage(ftlit, stage, peft, rate):
    more = ["--model.policy", "x", "--data.train", "y"] + (["--model.reward", "a.b"] if stage == "ppo" else [])
    assert ftlit("fit", "--config", stage, "--config", f"peft/{peft}", *more, "--print_config") == 0
    assert yaml.safe_load(ftlit.out)["model"]["init_args"]["lr"] == rate
    assert ftlit("fit", "--config", stage, "--config", f"peft/{peft}", *more, "--model.lr", "1", "--print_config") == 0
    assert yaml.safe_load(ftlit.out)["model"]["init_args"]["lr"] == 1


def test_a_run_says_keeps_and_goes_on_with_its_rate(ftlit, rows_of_pairs, tiny_model_folder):
    args = ["--config", "dpo", "--config", "peft/lora", "--config", "trainer/cpu", "--model.policy", tiny_model_folder]
    args += ["--data.train", rows_of_pairs, "--model.schedule", "constant", "--model.warmup", "0", "--run", "r"]
    assert ftlit("fit", *args, "--trainer.max_steps", "1") == 0
    assert "rate       5e-05 at its peak (the default of DPO), schedule constant" in ftlit.out
    assert yaml.safe_load(Path("r/config.yaml").read_text())["model"]["init_args"]["lr"] == 5e-5
    on = ["--ckpt_path", "last", "--trainer.max_steps", "2"]
    assert ftlit("fit", "--config", "r/config.yaml", *on) == 0
    rows = Path("r/metrics.csv").read_text().splitlines()
    rates = [dict(zip(rows[0].split(","), row.split(","), strict=True))["train/lr"] for row in rows[1:]]
    assert [float(rate) for rate in rates if rate] == pytest.approx([5e-5, 5e-5])


@pytest.fixture
def rows_of_pairs(tmp_path):
    from tests.e2e.test_dpo import write_pairs

    return write_pairs(tmp_path / "pairs.jsonl")


def test_the_order_of_overlays_does_not_matter(ftlit):
    for order in itertools.permutations(["dpo", "peft/lora", "dpo/ipo"]):
        if order.index("dpo") < order.index("dpo/ipo"):
            configs = [part for name in order for part in ("--config", name)]
            assert ftlit("fit", *configs, "--model.policy", "x", "--data.train", "y", "--print_config") in (0, 1)
            if ftlit.out:
                assert yaml.safe_load(ftlit.out)["model"]["init_args"]["lr"] == 5e-5
