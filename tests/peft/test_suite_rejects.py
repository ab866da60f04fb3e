"""The conformance suite must reject strategies that are wrong in one place."""

from contextlib import contextmanager

import pytest
import torch

from ftlit.batch import Segments
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.peft.base import LowRankChange
from ftlit.testing import PEFTStrategySuite


class ForgetsToFreeze(LoRA):
    def apply(self, model):
        super().apply(model)
        model.get_input_embeddings().weight.requires_grad_(True)


class StartDoesNothing(LoRA):
    @contextmanager
    def start(self, model):
        yield


class StartDoesNotComeBack(LoRA):
    @contextmanager
    def start(self, model):
        for adapter in self._adapters(model).values():
            adapter.enabled = False
        yield
        for adapter in self._adapters(model).values():
            adapter.enabled = True


class MergesWithoutScale(LoRA):
    def merge(self, model):
        for adapter in self._adapters(model).values():
            adapter.scale = 1.0
        super().merge(model)


class ChangesWithoutScale(LoRA):
    def changes(self, model):
        for change in super().changes(model):
            yield LowRankChange(change.name, change.down, change.up, 1.0)


class ChangesMissALayer(LoRA):
    def changes(self, model):
        yield from list(super().changes(model))[1:]


class LoadsWhatFits(LoRA):
    @torch.no_grad()
    def load(self, model, state):
        for name, tensor in self.state(model).items():
            if name in state and state[name].shape == tensor.shape:
                tensor.copy_(state[name])


class SavesHalf(LoRA):
    def state(self, model):
        return {name: tensor for name, tensor in super().state(model).items() if "lora_A" in name}


class MergeLeavesAdapters(LoRA):
    @torch.no_grad()
    def merge(self, model):
        for adapter in self._adapters(model).values():
            adapter.weight += adapter.scale * adapter.lora_B @ adapter.lora_A
            adapter.enabled = False


class TargetsNotMoved(PromptTuning):
    def prepare(self, model, batch):
        return super().prepare(model, batch).replace(target_positions=batch.target_positions)


class OnePromptForTheRow(PromptTuning):
    def prepare(self, model, batch):
        joined = batch.replace(
            segments=Segments([sum(batch.segments.lengths)]), target_segments=batch.target_segments * 0
        )
        return super().prepare(model, joined)


class PositionsNotShifted(PrefixTuning):
    def prepare(self, model, batch):
        return batch


class PrefixNotGenerated(PrefixTuning):
    def generation_kwargs(self, model, input_ids, attention_mask):
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class StartIsNow(Full):
    @contextmanager
    def start(self, model):
        yield


class ScalesBothFactors(LoRA):
    def _interpolate(self, model, alpha):
        for name, adapter in self._adapters(model).items():
            for factor in adapter.factors:
                factor.mul_(alpha(f"{name}.lora_B"))


class ForgetsTheWayForward(LoRA):
    @contextmanager
    def at(self, model, alpha):
        self.interpolate(model, alpha)
        yield
        self.interpolate(model, 1 / alpha if alpha else 1.0)


class DropsTheLastLayer(LoRA):
    """Adapts all layers, but one adapter never acts."""

    def apply(self, model):
        super().apply(model)
        list(self._adapters(model).values())[-1].enabled = False


BROKEN = {
    ForgetsToFreeze: {"test_trains_what_it_saves_and_nothing_else", "test_state_round_trip"},
    StartDoesNothing: {"test_start_is_the_model_before_training"},
    StartDoesNotComeBack: {"test_start_is_the_model_before_training"},
    MergesWithoutScale: {"test_merge_keeps_the_output_and_leaves_no_trace", "test_changes_are_what_merging_adds"},
    ChangesWithoutScale: {"test_changes_are_what_merging_adds"},
    ChangesMissALayer: {"test_changes_are_what_merging_adds"},
    LoadsWhatFits: {"test_state_round_trip"},
    SavesHalf: {"test_trains_what_it_saves_and_nothing_else", "test_state_round_trip"},
    MergeLeavesAdapters: {"test_merge_keeps_the_output_and_leaves_no_trace"},
    TargetsNotMoved: {"test_packed_equals_one_at_a_time", "test_generation_agrees_with_scoring"},
    OnePromptForTheRow: {"test_packed_equals_one_at_a_time"},
    PositionsNotShifted: {"test_generation_agrees_with_scoring"},
    PrefixNotGenerated: {"test_generation_agrees_with_scoring"},
    StartIsNow: {"test_start_is_the_model_before_training"},
    ScalesBothFactors: {"test_part_of_the_way_is_part_of_every_change"},
    ForgetsTheWayForward: {"test_part_of_the_way_is_part_of_every_change"},
    DropsTheLastLayer: {"test_trains_what_it_saves_and_nothing_else"},
}


def _suite(strategy):
    class Suite(PEFTStrategySuite):
        identity_at_start = not issubclass(strategy, PromptTuning | PrefixTuning)

        def make(self):
            if issubclass(strategy, LoRA):
                return strategy(rank=3, alpha=5)
            if issubclass(strategy, PrefixTuning):
                return strategy(num_virtual_tokens=3, init_std=1.0)
            return strategy() if issubclass(strategy, Full) else strategy(num_virtual_tokens=3)

    return Suite()


NEED_A_FOLDER = ("test_adapter_folder_round_trip", "test_the_merged_model_saves_and_loads")


def _failures(strategy, tmp_path):
    suite = _suite(strategy)
    failed = set()
    for name in dir(suite):
        if name.startswith("test_"):
            try:
                getattr(suite, name)(*([tmp_path / name] if name in NEED_A_FOLDER else []))
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed.add(name)
    return failed


@pytest.mark.parametrize("strategy", list(BROKEN), ids=lambda s: s.__name__)
def test_a_broken_strategy_is_rejected_where_it_is_broken(strategy, tmp_path):
    failed = _failures(strategy, tmp_path)
    assert failed & BROKEN[strategy], f"only {sorted(failed)} failed"


@pytest.mark.parametrize("strategy", [LoRA, PrefixTuning, PromptTuning, Full], ids=lambda s: s.__name__)
def test_a_sound_strategy_is_not(strategy, tmp_path):
    assert _failures(strategy, tmp_path) == set()
