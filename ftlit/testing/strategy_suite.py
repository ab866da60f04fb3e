"""What every strategy must hold. A strategy outside ftlit gets these tests from a subclass of four lines."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from ftlit.batch import Example, pack
from ftlit.errors import ConfigError
from ftlit.models.policy import Policy, recompute_activations
from ftlit.peft.base import PEFTStrategy
from ftlit.peft.io import load_adapter, save_adapter
from ftlit.rollout.generate import generate
from ftlit.testing.tiny import tiny_examples, tiny_lm, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPE = torch.float64


class PEFTStrategySuite(ABC):
    """Conformance of a strategy, in float64 on tiny models, with its parameters moved away from their first values.

    Example:
        ```python
        class TestBitFit(PEFTStrategySuite):
            def make(self):
                return BitFit()
        ```

    Attributes:
        identity_at_start: Whether the freshly applied strategy leaves the model's output as it was.
        family: The tiny model to test on, a key of `ftlit.testing.FAMILIES`.
        tolerance: Largest difference between packed and single; some families round to float32 inside.
    """

    identity_at_start: bool = True
    family: str = "llama"
    tolerance: float = 1e-9

    @abstractmethod
    def make(self) -> PEFTStrategy:
        """A new strategy."""

    # ---- helpers --------------------------------------------------------------------------------------------------

    def base(self) -> PreTrainedModel:
        """The unadapted model."""
        return tiny_lm(self.family, DTYPE)

    def policy(self, *, moved: bool = True, seed: int = 1) -> Policy:
        """The adapted model; `moved`: its parameters carry noise, so that no zero hides a mistake."""
        torch.manual_seed(seed)
        lm = self.base()
        policy = Policy(lm, self.make())
        policy.strategy.remember_start(lm)
        if moved:
            generator = torch.Generator("cpu").manual_seed(seed)
            with torch.no_grad():
                for parameter in policy.strategy.trained(lm).values():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(0.2 * noise.to(parameter.dtype))
        return policy

    def logps(self, policy: Policy, examples: list[Example]) -> Tensor:
        """Packed log-probabilities, `[N]`."""
        return policy(pack(examples)).logps

    def base_logps(self, examples: list[Example]) -> Tensor:
        """What the unadapted model says, one example at a time through its own logits."""
        return _plain_logps(self.base(), examples)

    # ---- what is trained ------------------------------------------------------------------------------------------

    def test_trains_what_it_saves_and_nothing_else(self) -> None:
        """Gradients reach every trained parameter and no other, and the state holds exactly the trained ones."""
        policy = self.policy()
        self.logps(policy, tiny_examples()).sum().backward()
        trained = policy.strategy.trained(policy.lm)
        assert trained, "the strategy trains nothing"
        for name, parameter in policy.lm.named_parameters():
            if name in trained:
                assert parameter.grad is not None, f"no gradient reaches {name}"
                assert parameter.grad.abs().sum() > 0, f"the gradient of {name} is zero"
            else:
                assert parameter.grad is None, f"{name} is not trained but gets a gradient"
        saved = sum(tensor.numel() for tensor in policy.strategy.state(policy.lm).values())
        assert saved == sum(parameter.numel() for parameter in trained.values())

    def test_output_before_training(self) -> None:
        """A fresh strategy leaves the output as it was, where it says so."""
        examples = tiny_examples()
        off = (self.logps(self.policy(moved=False), examples) - self.base_logps(examples)).abs().max()
        assert (off < 1e-6) == self.identity_at_start

    def test_output_after_training(self) -> None:
        """Moved parameters move the output."""
        examples = tiny_examples()
        assert (self.logps(self.policy(), examples) - self.base_logps(examples)).abs().max() > 1e-3

    # ---- packing --------------------------------------------------------------------------------------------------

    def test_packed_equals_one_at_a_time(self) -> None:
        """Log-probabilities and gradients do not depend on what an example is packed with."""
        examples = tiny_examples((9, 4, 4, 12, 2, 7))
        policy = self.policy()
        packed = self.logps(policy, examples)
        trained = list(policy.strategy.trained(policy.lm).values())
        coefficients = torch.linspace(0.5, 2.0, len(packed), dtype=DTYPE)
        packed_grads = torch.autograd.grad((packed * coefficients).sum(), trained)
        singly = torch.cat([self.logps(policy, [example]) for example in examples])
        single_grads = torch.autograd.grad((singly * coefficients).sum(), trained)
        torch.testing.assert_close(packed, singly, rtol=0, atol=self.tolerance)
        for ours, theirs in zip(packed_grads, single_grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=self.tolerance, atol=self.tolerance)

    def test_order_in_the_row_does_not_matter(self) -> None:
        """Each example scores the same wherever it lies."""
        examples = tiny_examples()
        policy = self.policy()
        forth, back = self.logps(policy, examples), self.logps(policy, examples[::-1])
        counts = [example.num_targets for example in examples]
        turned = torch.cat(list(back.split(counts[::-1]))[::-1])
        torch.testing.assert_close(forth, turned, rtol=0, atol=self.tolerance)

    def test_gradient_checkpointing_changes_nothing(self) -> None:
        """Layers that run again in backward see the same segments and the same prefix."""
        examples = tiny_examples()
        grads = []
        for checkpointing in (False, True):
            policy = self.policy()
            if checkpointing:
                recompute_activations(policy.lm)
            trained = list(policy.strategy.trained(policy.lm).values())
            grads.append(torch.autograd.grad(self.logps(policy, examples).sum(), trained))
        for plain, again in zip(*grads, strict=True):
            torch.testing.assert_close(plain, again, rtol=self.tolerance, atol=self.tolerance)

    # ---- start, changes, merge ------------------------------------------------------------------------------------

    def test_start_is_the_model_before_training(self) -> None:
        """Inside `start` the output is that of the start, outside it is the present one, also after an exception."""
        examples = tiny_examples()
        policy, first = self.policy(), self.policy(moved=False)
        now = self.logps(policy, examples)
        expected = self.base_logps(examples) if self.identity_at_start else None
        with policy.strategy.start(policy.lm):
            started = self.logps(policy, examples)
        if expected is None:
            with first.strategy.start(first.lm):
                expected = self.logps(first, examples)
            torch.testing.assert_close(expected, self.base_logps(examples), rtol=0, atol=1e-6)
        torch.testing.assert_close(started, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(self.logps(policy, examples), now, rtol=0, atol=0)
        with pytest.raises(KeyError), policy.strategy.start(policy.lm):
            raise KeyError
        torch.testing.assert_close(self.logps(policy, examples), now, rtol=0, atol=0)

    def test_part_of_the_way_is_part_of_every_change(self) -> None:
        """At `alpha` each weight has changed by `alpha` times its change; at 0 the model is at its start.

        Afterwards it is bitwise what it was, also after an exception; what cannot stand between says why.
        """
        policy, examples = self.policy(), tiny_examples()
        strategy, lm = policy.strategy, policy.lm
        if strategy.not_between(lm) is not None:
            with pytest.raises(ConfigError), strategy.at(lm, 0.5):
                pass
            return
        dense = {change.name: change.materialize().detach() for change in strategy.changes(lm)}
        now = {name: parameter.detach().clone() for name, parameter in lm.named_parameters()}
        before = self.logps(policy, examples)
        for alpha in (0.0, 0.3, 1.0):
            with strategy.at(lm, alpha):
                for change in strategy.changes(lm):
                    expected = alpha * dense[change.name]
                    torch.testing.assert_close(change.materialize(), expected, rtol=1e-9, atol=1e-12)
                if alpha == 0:
                    with strategy.start(lm):
                        expected = self.logps(policy, examples)
                    torch.testing.assert_close(self.logps(policy, examples), expected, rtol=0, atol=1e-9)
        first = next(iter(dense))
        trained = first.rpartition(".")[0]  # one layer alone
        with strategy.at(lm, lambda name: 0.5 if name.rpartition(".")[0] == trained else 1.0):
            for change in strategy.changes(lm):
                share = 0.5 if change.name.rpartition(".")[0] == trained else 1.0
                torch.testing.assert_close(change.materialize(), share * dense[change.name], rtol=1e-9, atol=1e-12)
        with pytest.raises(KeyError), strategy.at(lm, 0.5):
            raise KeyError
        for name, parameter in lm.named_parameters():
            assert torch.equal(parameter, now[name]), f"{name} is not what it was"
        torch.testing.assert_close(self.logps(policy, examples), before, rtol=0, atol=0)
        strategy.interpolate(lm, 0.5)
        for change in strategy.changes(lm):
            torch.testing.assert_close(change.materialize(), 0.5 * dense[change.name], rtol=1e-9, atol=1e-12)

    def test_changes_are_what_merging_adds(self) -> None:
        """Each change is merged weight minus base weight; norms and ranks agree with the dense change."""
        policy, base = self.policy(), _weights(self.base())
        changes = {change.name: change for change in policy.strategy.changes(policy.lm)}
        assert policy.strategy.num_changed(policy.lm) == sum(base[name].numel() for name in changes)
        dense = {name: change.materialize().detach() for name, change in changes.items()}
        owners = {name: type(module).__name__ for name, module in self.base().named_modules()}
        for name, change in changes.items():  # what these layers multiply from the left
            stored_by_input = re.search(r"Conv1D|Embedding", owners[name.rpartition(".")[0]])
            assert change.input_dim == (0 if stored_by_input and name.endswith(".weight") else 1), name
        for name, change in changes.items():
            assert change.shape == dense[name].shape == base[name].shape
            torch.testing.assert_close(change.sq_norm(), dense[name].square().sum())
            if dense[name].ndim == 2:
                matrix = dense[name] if change.input_dim == 1 else dense[name].t()
                x = torch.randn(7, matrix.shape[1], dtype=DTYPE)
                weighted = change.sq_norm(x.t() @ x / len(x))
                torch.testing.assert_close(weighted, (x @ matrix.t()).square().sum(1).mean())
                assert torch.linalg.matrix_rank(dense[name]) <= change.rank
        trained = policy.strategy.trained(policy.lm)
        if changes:
            norm = torch.stack([change.sq_norm() for change in changes.values()]).sum()
            grads = torch.autograd.grad(norm, list(trained.values()), allow_unused=True)
            assert all(grad is not None for grad in grads), "the norm of the changes does not depend on every parameter"
        if policy.strategy.mergeable:
            merged = copy.deepcopy(policy)
            merged.strategy.merge(merged.lm)
            # Weights that are one tensor under several names change together; an adapter may part them.
            now = _weights(merged.lm)
            moved = {id(now[name]): delta for name, delta in dense.items()}
            for name, weight in now.items():
                delta = (weight - base[name]).detach()
                torch.testing.assert_close(delta, moved.get(id(weight), torch.zeros_like(delta)))
        else:
            assert not changes, "what changes weights can be merged"

    def test_merge_keeps_the_output_and_leaves_no_trace(self) -> None:
        """The merged model is a plain model with the adapted output; what cannot be merged says so."""
        examples = tiny_examples()
        policy = self.policy()
        adapted = self.logps(policy, examples)
        if not policy.strategy.mergeable:
            with pytest.raises(ConfigError, match="cannot be merged"):
                policy.strategy.merge(policy.lm)
            return
        policy.strategy.merge(policy.lm)
        plain = _plain_logps(policy.lm, examples)
        torch.testing.assert_close(plain, adapted, rtol=0, atol=1e-6)
        assert list(_weights(policy.lm)) == list(_weights(self.base()))
        assert [type(m) for m in policy.lm.modules()] == [type(m) for m in self.base().modules()]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in policy.lm.modules())

    def test_the_merged_model_saves_and_loads(self, tmp_path: Path) -> None:
        """What transformers writes of the merged model is read back as it was, shared weights included."""
        from transformers import AutoModelForCausalLM

        policy = self.policy()
        if not policy.strategy.mergeable:
            return
        policy.strategy.merge(policy.lm)
        policy.lm.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=DTYPE)
        examples = tiny_examples()
        expected = _plain_logps(policy.lm, examples)
        torch.testing.assert_close(_plain_logps(again, examples), expected, rtol=0, atol=self.tolerance)

    # ---- saving ---------------------------------------------------------------------------------------------------

    def test_state_round_trip(self) -> None:
        """A state loaded into a new model gives the same output; a state of another shape is refused whole."""
        examples = tiny_examples()
        policy, fresh = self.policy(), self.policy(seed=2)
        state = {name: tensor.clone() for name, tensor in policy.strategy.state(policy.lm).items()}
        before = self.logps(fresh, examples)
        key = next(iter(state))
        for wrong in (
            {k: v for k, v in state.items() if k != key},
            {**state, "not.a.tensor": torch.zeros(1)},
            {**state, key: torch.zeros(3, 3, 3)},
        ):
            with pytest.raises(ConfigError):
                fresh.strategy.load(fresh.lm, wrong)
            torch.testing.assert_close(self.logps(fresh, examples), before, rtol=0, atol=0)
        fresh.strategy.load(fresh.lm, state)
        torch.testing.assert_close(self.logps(fresh, examples), self.logps(policy, examples), rtol=0, atol=0)

    def test_adapter_folder_round_trip(self, tmp_path: Path) -> None:
        """An adapter folder makes the same strategy again, where there is such a format; else it says so."""
        policy = self.policy()
        if policy.strategy.peft_type is None:
            with pytest.raises(ConfigError):
                save_adapter(policy.strategy, policy.lm, tmp_path, "base")
            return
        save_adapter(policy.strategy, policy.lm, tmp_path, "base")
        other = Policy(self.base(), _Nothing())
        other.strategy = load_adapter(other.lm, tmp_path)
        examples = tiny_examples()
        torch.testing.assert_close(self.logps(other, examples), self.logps(policy, examples), rtol=0, atol=1e-6)

    # ---- generation -----------------------------------------------------------------------------------------------

    def test_generation_agrees_with_scoring(self) -> None:
        """Greedy answers are what packed scoring finds likeliest, for prompts of unequal length in one batch."""
        policy = self.policy()
        prompts = [list(example.input_ids) for example in tiny_examples((3, 8, 5))]
        answers = generate(policy.lm, policy.strategy, tiny_tokenizer(), prompts, max_new_tokens=5)
        assert policy.lm.training
        assert sum(len(answer) for answer in answers) >= 5, "the tiny model ended at once; nothing was compared"
        for prompt, answer in zip(prompts, answers, strict=True):
            if answer:
                example = Example(prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer))
                assert policy(pack([example])).correct.all()


def _weights(lm: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters by name, those with several names under each."""
    return dict(lm.named_parameters(remove_duplicate=False))


class _Nothing(PEFTStrategy):
    """Placeholder until an adapter is loaded."""

    def apply(self, model: PreTrainedModel) -> None:
        """Nothing."""

    def changes(self, model: PreTrainedModel) -> Any:
        """Nothing."""

    def start(self, model: PreTrainedModel) -> Any:
        """Nothing."""


@torch.no_grad()
def _plain_logps(lm: PreTrainedModel, examples: list[Example]) -> Tensor:
    out = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logps = torch.log_softmax(lm(input_ids=ids, use_cache=False).logits[0, :-1].double(), -1)
        chosen = logps.gather(1, ids[0, 1:, None])[:, 0]
        out.append(chosen[torch.tensor(example.weights[1:]) != 0])
    return torch.cat(out)
