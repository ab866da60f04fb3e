"""The trained model: a transformers causal language model with a strategy applied, scoring packed batches."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftlit.batch import Example, PackedBatch, pack
from ftlit.errors import ConfigError
from ftlit.models.attention import NAME, packed_mask
from ftlit.models.divergence import token_kl
from ftlit.models.limits import PositionTables, check_length, longest_learned, remember_positions
from ftlit.models.prefixes import shared
from ftlit.models.score import Head, TokenScores, token_scores
from ftlit.peft.base import PEFTStrategy
from ftlit.peft.lora_layers import LoRALinear
from ftlit.peft.parts import experts, setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftlit.models.heads import ScalarPolicy


class Policy(nn.Module):
    """Runs packed batches through a causal language model.

    Under FSDP2 the weights of the root (embedding and output layer) are gathered around a call of the module: so it is
    called, `policy(batch)`, and whatever needs those weights happens inside.

    Args:
        lm: A transformers causal language model; the strategy is applied to it here.
        strategy: What is trained.

    Raises:
        ConfigError: If the model's attention cannot run packed segments.
    """

    def __init__(self, lm: PreTrainedModel, strategy: PEFTStrategy) -> None:
        super().__init__()
        use_segment_attention(lm)
        strategy.apply(lm)
        self.lm = lm
        self.strategy = strategy
        self.longest = longest_exact(lm)
        self.draws = has_dropout(lm)

    def forward(
        self,
        batch: PackedBatch,
        needs: AbstractSet[str] = frozenset(),
        watch: AbstractSet[str] = frozenset(),
        kl: Mapping[int, float] | None = None,
        temperature: float = 1.0,
    ) -> TokenScores:
        """Scores every target of a micro-batch.

        Args:
            batch: The micro-batch as the loader made it.
            needs: Further scores with their gradients (`entropy`, `mean_logps`), or `states`.
            watch: Further scores without gradients.
            kl: For some sources of rows the temperature of the divergence from the model at the start of the run to the
                present one; it costs a pass of the start model over their rows. Of rows that a control added for it
                nothing else is scored: their other scores are 0.
            temperature: All scores but `kl` are those of the distribution `softmax(logits / temperature)`.

        Returns:
            Log-probability (nats) and top-1 hit of each target, `[N]`, and what was asked for.

        Raises:
            ConfigError: If packing would not be exact for an example as long as this.
        """
        wanted = {source: temperature for source, temperature in (kl or {}).items() if source in batch.sources}
        hidden = self.hidden(batch)
        scored = _scored(batch, wanted)
        if scored is None:
            scores = token_scores(hidden, head_of(self.lm), batch.target_ids, needs, watch, temperature=temperature)
        else:
            few = hidden.index_select(0, scored), head_of(self.lm), batch.target_ids[scored]
            scores = token_scores(*few, needs, watch, temperature=temperature).spread(scored, len(hidden))
        if "states" in needs:
            scores = scores._replace(states=hidden)
        if kl is None:
            return scores
        divergences = torch.zeros_like(scores.logps)
        for source, temperature in wanted.items():
            rows = (batch.target_sources == source).nonzero()[:, 0]
            start, start_head = self._start(batch.only({source}))
            values = token_kl(hidden.index_select(0, rows), head_of(self.lm), start, start_head, temperature)
            divergences = divergences.index_copy(0, rows, values)
        return scores._replace(kl=divergences)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """The hidden states that predict the targets, `[N, D]`."""
        if longest_learned(self.lm) is not None:
            virtual = getattr(self.strategy, "num_virtual_tokens", 0)
            check_length(self.lm, batch.segments.longest, "an example", virtual)
        if batch.input_ids.device.type == "cpu" and self._repeats():
            batch = shared(batch)
        batch = self.strategy.prepare(self.lm, batch)
        if self.longest is not None and batch.segments.longest > self.longest:
            raise ConfigError(
                f"{type(self.lm).__name__} scales its positions by the longest example of a row beyond {self.longest} "
                f"tokens, so packing would not be exact; set data.max_length to at most {self.longest}."
            )
        return target_states(self.lm, batch, **self.strategy.attention_kwargs(self.lm, batch))

    @torch.no_grad()
    def _start(self, batch: PackedBatch) -> tuple[Tensor, Head]:
        """Hidden states and output layer of the model at the start of the run, without dropout."""
        with self.at_start():
            # Detached: the start context may put the trained values back into the same parameters when it ends.
            return self.hidden(batch), head_of(self.lm).detach()

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Context in which it is the model at the start of the run, in evaluation mode."""
        was = self.training
        self.eval()
        try:
            with self.strategy.start(self.lm):
                yield
        finally:
            self.train(was)

    def _repeats(self) -> bool:
        """Whether equal tokens after equal tokens have equal states: no dropout, no inputs of the strategy's own."""
        own = type(self.strategy).prepare is not PEFTStrategy.prepare
        return not own and not (self.draws and self.training) and self.longest is None


def _scored(batch: PackedBatch, kl: Mapping[int, float]) -> Tensor | None:
    """Places of the targets that need more than the divergence, int64 `[n]`; None: all do."""
    only = [source for source in kl if source]
    if not only:
        return None
    return (~torch.isin(batch.target_sources, torch.tensor(only, device=batch.target_sources.device))).nonzero()[:, 0]


def score_packed(
    lm: PreTrainedModel,
    batch: PackedBatch,
    needs: AbstractSet[str] = frozenset(),
    watch: AbstractSet[str] = frozenset(),
    **attention_kwargs: Any,
) -> TokenScores:
    """Scores every target of a prepared micro-batch with a bare model.

    Args:
        lm: A causal language model switched to packed attention.
        batch: The micro-batch; its `inputs_embeds` are used where it has them.
        needs: Further scores with their gradients.
        watch: Further scores without gradients.
        attention_kwargs: What every attention layer gets besides the segments.
    """
    return token_scores(target_states(lm, batch, **attention_kwargs), head_of(lm), batch.target_ids, needs, watch)


def target_states(lm: PreTrainedModel, batch: PackedBatch, **attention_kwargs: Any) -> Tensor:
    """The hidden states of a bare model that predict the targets of a prepared micro-batch, `[N, D]`.

    Args:
        lm: A causal language model switched to packed attention.
        batch: The micro-batch; its `inputs_embeds` are used where it has them.
        attention_kwargs: What every attention layer gets besides the segments.
    """
    inputs = {"input_ids": batch.input_ids} if batch.inputs_embeds is None else {"inputs_embeds": batch.inputs_embeds}
    hidden = lm.base_model(
        **inputs,
        position_ids=batch.position_ids,
        attention_mask=packed_mask(batch.input_ids.device),
        use_cache=False,
        segments=batch.segments,
        **attention_kwargs,
    ).last_hidden_state[0]
    # index_select: branches of one prompt share its last token, and on a CPU only this backward is repeatable then. (On
    # a GPU it adds in any order, so that runs agree up to rounding.)
    return hidden.index_select(0, batch.target_positions)


def head_of(lm: PreTrainedModel) -> Head:
    """The output layer of a causal language model with what its config does to the logits.

    Raises:
        ConfigError: If the model has no plain linear output layer.
    """
    linear = lm.get_output_embeddings()
    if not isinstance(linear, nn.Linear | LoRALinear):
        kind = "no output layer" if linear is None else f"a {type(linear).__name__} as output layer"
        raise ConfigError(f"{type(lm).__name__} has {kind}; ftlit trains causal language models with a linear one.")
    config = lm.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale *= float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:
        scale /= float(config.logits_scaling)
    low_rank = linear.low_rank if isinstance(linear, LoRALinear) else None
    return Head(linear.weight, linear.bias, scale, getattr(config, "final_logit_softcapping", None), low_rank)


def use_segment_attention(lm: PreTrainedModel) -> None:
    """Switches a model to packed attention.

    Raises:
        ConfigError: If the model has layers whose attention pattern packing does not implement.
    """
    layers = set(getattr(lm.config.get_text_config(), "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if layers:
        raise ConfigError(
            f"{type(lm).__name__} has {', '.join(sorted(layers))} layers, which packing does not support."
        )
    try:
        lm.set_attn_implementation(NAME)
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"{type(lm).__name__} cannot use packed attention: {error}") from None


def longest_exact(lm: PreTrainedModel) -> int | None:
    """The longest example that packing scores exactly, tokens; None: any.

    Dynamic and long-rope position embeddings take their factor from the largest position of the whole row.
    """
    config = lm.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    moving = [kind for kind in kinds if kind.get("rope_type", kind.get("type")) in ("dynamic", "longrope")]
    limits = [
        kind.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for kind in moving
    ]
    return int(min(limits)) if limits else None


def ignored_loss(lm: PreTrainedModel) -> str | None:
    """What the model's own loss has besides that of the tokens, in words; None: nothing."""
    config = lm.config.get_text_config()
    names = [name for name in vars(config) if re.fullmatch(r"(router_)?(aux|z)_loss_(coef\w*|alpha|weight)", name)]
    weights = {name: setting(config, name) for name in names}
    said = [f"{name} {value:g}" for name, value in weights.items() if isinstance(value, int | float) and value]
    if not said or not experts(lm):
        return None
    return f"the loss is that of the tokens alone: the router's own ({', '.join(said)}) is not added"


def has_dropout(lm: nn.Module) -> bool:
    """Whether a module drops anything at random while training."""
    return any(chance > 0 for module in lm.modules() for chance in _chances(module).values())


def _chances(module: nn.Module) -> dict[str, float]:
    """The chances of a module to drop something, by attribute: every model has names of its own for them."""
    said = {name: value for name, value in vars(module).items() if isinstance(value, float)}
    return {name: value for name, value in said.items() if name == "p" or re.search(r"dropout|layerdrop|pdrop", name)}


def disable_dropout(policy: Policy | ScalarPolicy) -> bool:
    """Sets every chance of dropping something to 0; returns whether one was not."""
    found = has_dropout(policy)
    for module in policy.modules():
        for name in _chances(module):
            setattr(module, name, 0.0)
    policy.draws = False
    return found


def recompute_activations(lm: PreTrainedModel) -> None:
    """Switches a model to recompute the activations of each layer in backward."""
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable  # before 5.20
    enable()


def _check_causal(lm: PreTrainedModel, ids: Tensor) -> None:
    """Another last token must change nothing before it."""
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    first, second = (lm(input_ids=given, use_cache=False).logits[0, :-1] for given in (ids, other))
    if (first - second).abs().max() > 1e-2 * max(1.0, first.abs().max().item()):
        raise ConfigError(f"{type(lm).__name__} is no causal language model: its tokens see those that follow.")


@torch.no_grad()
def check_packing(lm: PreTrainedModel) -> None:
    """Runs two tiny examples packed and one at a time through the model's own logits; they must agree.

    Catches models that ignore the segments, and output layers that do more than ftlit knows of, before anything is
    trained on wrong numbers. Costs five forward passes of a few tokens.

    Args:
        lm: The model, attention already switched, no strategy applied.

    Raises:
        ConfigError: If the two disagree.
    """
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    device = lm.get_input_embeddings().weight.device
    rows = [[(7 * i + 3 * j + 1) % vocabulary for j in range(length)] for i, length in enumerate((3, 5))]
    batch = pack([Example(row, [0] + [1] * (len(row) - 1)) for row in rows]).to(device)
    was, _ = lm.training, lm.eval()
    try:
        _check_causal(lm, torch.tensor(rows[1:], device=device))
        with PositionTables(batch.position_ids) as tables:
            packed = score_packed(lm, batch).logps
        remember_positions(lm, tables)
        singly = []
        for row in rows:
            ids = torch.tensor([row], device=device)
            logits = lm(input_ids=ids, use_cache=False).logits[0, :-1]
            logps = torch.log_softmax(logits.to(packed.dtype), dim=-1)
            singly.append(logps.gather(1, ids[0, 1:, None])[:, 0])
    except ConfigError:
        raise
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{type(lm).__name__} cannot run packed batches, so ftlit cannot train it (its code says: {first})."
        ) from None
    finally:
        lm.train(was)
    tolerance = 1e-3 if packed.dtype != torch.float32 or lm.dtype == torch.float32 else 0.25
    worst = (packed - torch.cat(singly)).abs().max().item()
    if not math.isfinite(worst):
        raise ConfigError(f"{type(lm).__name__} gives log-probabilities that are not finite; its weights are broken.")
    if worst > tolerance:
        raise ConfigError(
            f"{type(lm).__name__} gives other log-probabilities packed than one example at a time "
            f"(off by {worst:.3g} nats); ftlit cannot train it correctly yet."
        )
