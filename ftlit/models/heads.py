"""Scalar and task heads: one score, or one number a label, for each whole example.

The model is a transformers `...ForSequenceClassification`: a trunk and a head. Decoders are read at the last token of
an example, encoders at the first, exactly where transformers reads them; so what is trained here is an ordinary
checkpoint. A strategy is applied to the trunk; the head is trained beside it, always, in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ftlit.batch import Example, PackedBatch, Segments, pack
from ftlit.errors import ConfigError
from ftlit.models.attention import packed_mask
from ftlit.models.fused import fuse
from ftlit.models.limits import PositionTables, longest_learned, remember_positions
from ftlit.models.policy import has_dropout, longest_exact, use_segment_attention
from ftlit.models.prefixes import shared
from ftlit.peft.base import PEFTStrategy
from ftlit.peft.full import Full
from ftlit.peft.hidden import without
from ftlit.peft.prompt_tuning import PromptTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The parts of a head in the order in which transformers' classifiers call them; each has some of them.
_PARTS = ("pre_classifier", "head", "drop", "dropout", "classifier", "score")


class ScalarPolicy(nn.Module):
    """Runs packed batches through a sequence classifier.

    Args:
        lm: A transformers sequence classifier, prepared by `prepare_classifier`; the strategy is applied to its trunk
            here.
        strategy: What is trained of the trunk.
        new: Further modules of the trunk that were not in its checkpoint, such as a pooler: trained with the head.

    Attributes:
        head: Names of the modules that are trained besides what the strategy trains.

    Raises:
        ConfigError: If the strategy cannot be used with such a model.
    """

    def __init__(self, lm: PreTrainedModel, strategy: PEFTStrategy, new: Sequence[str] = ()) -> None:
        super().__init__()
        if isinstance(strategy, PromptTuning) and reads_first(lm):
            raise ConfigError(
                f"{type(lm).__name__} reads its first token, which PromptTuning would push away; "
                "use PrefixTuning, LoRA or Full."
            )
        self._hold(lm, strategy, head_names(lm, new))
        with without(lm, self.head):
            strategy.apply(lm)
        for name in self.head:
            train_head(lm.get_submodule(name))

    @classmethod
    def around(cls, lm: PreTrainedModel, strategy: PEFTStrategy | None) -> ScalarPolicy:
        """A policy of a classifier that already has its strategy and its trained head.

        Args:
            lm: The classifier, prepared by `prepare_classifier`.
            strategy: The strategy that was applied to it, if any.
        """
        policy = cls.__new__(cls)
        nn.Module.__init__(policy)
        policy._hold(lm, strategy or Full(), head_names(lm))
        return policy

    def _hold(self, lm: PreTrainedModel, strategy: PEFTStrategy, head: list[str]) -> None:
        self.head, self.lm, self.strategy = head, lm, strategy
        self.bidirectional = bidirectional(lm)
        self.exact = longest_exact(lm)
        self.longest = longest_example(lm)
        self.draws = has_dropout(lm)

    def forward(
        self,
        batch: PackedBatch,
        needs: AbstractSet[str] = frozenset(),
        watch: AbstractSet[str] = frozenset(),
        kl: Mapping[int, float] | None = None,
    ) -> Tensor:
        """Reads the examples of a micro-batch.

        Args:
            batch: The micro-batch; each of its targets stands for one example: `target_segments` says which segment
                ends it. Their places in the row are found here.
            needs: Scores of tokens, of which there are none.
            watch: The same.
            kl: The same.

        Returns:
            What the head says of each target, `[N, L]`, at least float32.

        Raises:
            ConfigError: If an example is longer than the model can take, or scores of tokens are asked for.
        """
        lm = self.lm
        if needs or watch or kl:
            raise ConfigError(f"{type(lm).__name__} has no output layer over tokens, so there are no token scores.")
        if self.bidirectional:
            batch = unbranched(batch)
        self._check_length(batch.segments)
        return self.read(batch.replace(target_positions=read_places(lm, batch)))

    def read(self, batch: PackedBatch) -> Tensor:
        """What the head says at the places of the targets, `[N, L]`."""
        if batch.input_ids.device.type == "cpu" and self._repeats():
            batch = shared(batch)
        batch = self.strategy.prepare(self.lm, batch)
        return read_packed(self.lm, batch, **self.strategy.attention_kwargs(self.lm, batch))

    def _check_length(self, segments: Segments) -> None:
        if self.longest is None:
            return
        line = [[*segments.ancestors(number), number] for number in range(len(segments))]
        longest = max(sum(segments.lengths[part] for part in parts) for parts in line)
        virtual = getattr(self.strategy, "num_virtual_tokens", 0)
        if longest + virtual > self.longest:
            raise ConfigError(
                f"{type(self.lm).__name__} takes at most {self.longest - virtual} tokens and an example has {longest}; "
                f"set data.max_length to at most {self.longest - virtual}."
            )

    def _repeats(self) -> bool:
        """Whether equal tokens after equal tokens have equal states: no dropout, no inputs of the strategy's own."""
        own = type(self.strategy).prepare is not PEFTStrategy.prepare
        return not own and not (self.draws and self.training) and not self.bidirectional and self.exact is None


def read_packed(lm: PreTrainedModel, batch: PackedBatch, **attention_kwargs: Any) -> Tensor:
    """What a bare classifier says of each target of a prepared micro-batch, `[N, L]`.

    Args:
        lm: A sequence classifier switched to packed attention.
        batch: The micro-batch; its `inputs_embeds` are used where it has them.
        attention_kwargs: What every attention layer gets besides the segments.
    """
    inputs = {"input_ids": batch.input_ids} if batch.inputs_embeds is None else {"inputs_embeds": batch.inputs_embeds}
    types = token_types(lm, batch)
    hidden = lm.base_model(
        **inputs,
        **({} if types is None else {"token_type_ids": types}),
        position_ids=batch.position_ids + first_position(lm),
        attention_mask=packed_mask(batch.input_ids.device),
        use_cache=False,
        segments=batch.segments,
        **attention_kwargs,
    ).last_hidden_state[0]
    return apply_head(lm, hidden.index_select(0, batch.target_positions))


def token_types(lm: PreTrainedModel, batch: PackedBatch) -> Tensor | None:
    """1 for each token of a second text, `[1, T]`, where a model tells two texts apart; None where there are none."""
    borders = batch.extras.get("borders")
    embeddings: Any = getattr(lm.base_model, "embeddings", None)
    table = getattr(embeddings, "token_type_embeddings", None)
    if borders is None or table is None or len(table.weight) < 2:
        return None
    types = torch.zeros_like(batch.input_ids)
    for segment, border in zip(batch.target_segments.tolist(), borders.tolist(), strict=True):
        start = batch.segments.offsets[segment]
        if border:
            types[:, start + border : start + batch.segments.lengths[segment]] = 1
    return types


def apply_head(lm: PreTrainedModel, states: Tensor) -> Tensor:
    """The head on the states that it reads.

    Args:
        lm: A sequence classifier.
        states: One state an example, `[N, D]`.

    Returns:
        `[N, L]`, at least float32: autocast would round scores that differ little to one number.
    """
    with torch.autocast(states.device.type, enabled=False):
        pooler = getattr(lm.base_model, "pooler", None)
        if pooler is not None:
            states = pooler(states.to(_dtype(pooler))[:, None])
        for name in _PARTS:
            part = getattr(lm, name, None)
            if part is None:
                continue
            states = states.to(_dtype(part, states.dtype))
            # A head of several layers takes whole sequences and reads their first place.
            whole = name == "classifier" and not isinstance(part, nn.Linear)
            states = part(states[:, None]) if whole else part(states)
            if name == "pre_classifier":
                states = F.relu(states)
        return states.to(torch.promote_types(states.dtype, torch.float32))


def _dtype(module: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """Type of a module's weights."""
    return next((parameter.dtype for parameter in module.parameters()), default)


def reads_first(lm: nn.Module) -> bool:
    """Whether a classifier reads the first token of an example (encoders), not the last (decoders)."""
    return not hasattr(lm, "score")


def bidirectional(lm: nn.Module) -> bool:
    """Whether tokens see what comes after them."""
    return any(getattr(module, "is_causal", None) is False for module in lm.modules())


def first_position(lm: PreTrainedModel) -> int:
    """The position of a first token: 0, but the pad token's number plus one in models of RoBERTa's kind."""
    embeddings: Any = getattr(lm.base_model, "embeddings", None)
    return embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0


def longest_example(lm: PreTrainedModel) -> int | None:
    """The longest example that the model can take packed, tokens; None: any."""
    limits = [limit for limit in (longest_learned(lm), longest_exact(lm)) if limit is not None]
    return min(limits, default=None)


def read_places(lm: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Where in the row each target's example is read.

    Encoders: its first token. Decoders: its last token that is not the pad token of the model's config, as
    transformers does; for a model whose end token is its pad token that is the token before the end.

    Args:
        lm: A sequence classifier.
        batch: The micro-batch.

    Returns:
        Places, int64 `[N]`.
    """
    segments, device = batch.segments, batch.input_ids.device
    owners = torch.arange(len(segments), device=device).repeat_interleave(torch.tensor(segments.lengths, device=device))
    starts = torch.tensor(segments.offsets, device=device)
    if reads_first(lm):
        return starts[batch.target_segments]
    pad = lm.config.get_text_config().pad_token_id
    if pad is None:
        return (starts + torch.tensor(segments.lengths, device=device) - 1)[batch.target_segments]
    place = torch.where(batch.input_ids[0] == pad, -1, torch.arange(batch.num_tokens, device=device))
    last = torch.full((len(segments),), -1, device=device).scatter_reduce(0, owners, place, "amax")
    for number, parent in enumerate(segments.parents):  # a branch of nothing but pad tokens ends in its parent
        last[number] = torch.where(last[number] < 0, last[parent] if parent >= 0 else starts[number], last[number])
    return last[batch.target_segments]


def rated(batch: PackedBatch, segments: Sequence[int], weights: Sequence[float] | None = None) -> PackedBatch:
    """The same row with one target for each of some segments: what a `ScalarPolicy` is to read.

    Args:
        batch: A micro-batch.
        segments: The segments that end the examples.
        weights: How much each counts; 1 when left out.
    """
    device = batch.input_ids.device
    chosen = torch.tensor(list(segments), dtype=torch.int64, device=device)
    count = [1.0] * len(chosen) if weights is None else list(weights)
    return batch.replace(
        target_positions=torch.zeros_like(chosen),
        target_ids=torch.zeros_like(chosen),
        target_weights=torch.tensor(count, dtype=torch.float32, device=device),
        target_segments=chosen,
    )


def unbranched(batch: PackedBatch) -> PackedBatch:
    """Every target's example as a segment of its own, with its parents' tokens before its own.

    For encoders, where a shared prompt would have to see all that goes on from it.

    Args:
        batch: A micro-batch; returned as it is where no segment has a parent.
    """
    segments, device = batch.segments, batch.input_ids.device
    if all(parent < 0 for parent in segments.parents):
        return batch
    leaves = list(dict.fromkeys(batch.target_segments.tolist()))
    stretches, lengths = [], []
    for leaf in leaves:
        parts = [*segments.ancestors(leaf), leaf]
        ends = [(segments.offsets[part], segments.offsets[part] + segments.lengths[part]) for part in parts]
        stretches += [torch.arange(start, stop, device=device) for start, stop in ends]
        lengths.append(sum(segments.lengths[part] for part in parts))
    taken = torch.cat(stretches)
    new = {leaf: number for number, leaf in enumerate(leaves)}
    return batch.replace(
        input_ids=batch.input_ids[:, taken],
        position_ids=torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        segments=Segments(lengths),
        target_segments=torch.tensor([new[leaf] for leaf in batch.target_segments.tolist()], device=device),
        examples=tuple(batch.examples[leaf] for leaf in leaves),
    )


# ---- the head and the strategy --------------------------------------------------------------------------------------


def head_names(lm: PreTrainedModel, new: Sequence[str] = ()) -> list[str]:
    """The modules that are the head of a classifier: all with weights beside the trunk, and those new in the trunk."""
    trunk = lm.base_model_prefix
    own = [name for name, part in lm.named_children() if name != trunk and next(part.parameters(), None) is not None]
    return own + [name for name in new if name.startswith(trunk + ".")]


def train_head(part: nn.Module) -> None:
    """Trains a part of the head, in float32 at least: half precision would lose small updates."""
    for parameter in part.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)


# ---- loading --------------------------------------------------------------------------------------------------------


def prepare_classifier(lm: PreTrainedModel) -> None:
    """Switches a classifier to packed attention and faster layers, and checks that packing is right for it.

    Raises:
        ConfigError: If it is not.
    """
    lm.config.get_text_config().use_cache = True
    use_segment_attention(lm)
    fuse(lm)
    check_head(lm)


@torch.no_grad()
def check_head(lm: PreTrainedModel) -> None:
    """Runs two tiny examples packed and one at a time through the model's own forward; they must agree.

    Catches classifiers whose attention, positions or head ftlit does not know, before anything is trained on wrong
    numbers.

    Args:
        lm: A sequence classifier, attention already switched, no strategy applied.

    Raises:
        ConfigError: If the two disagree.
    """
    vocabulary, device = lm.get_input_embeddings().weight.shape[0], lm.get_input_embeddings().weight.device
    rows = [[(7 * i + 3 * j + 5) % vocabulary for j in range(length)] for i, length in enumerate((3, 5))]
    batch = rated(pack([Example(row, [0.0] * len(row)) for row in rows]), [0, 1]).to(device)
    was, _ = lm.training, lm.eval()
    try:
        with PositionTables(batch.position_ids) as tables:
            packed = read_packed(lm, batch.replace(target_positions=read_places(lm, batch)))
        remember_positions(lm, tables)
        singly = torch.cat([lm(input_ids=torch.tensor([row], device=device)).logits for row in rows]).to(packed.dtype)
    except ConfigError:
        raise
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{type(lm).__name__} cannot run packed batches, so ftlit cannot train it (its code says: {first})."
        ) from None
    finally:
        lm.train(was)
    worst = (packed - singly).abs().max().item() if packed.shape == singly.shape else math.inf
    if math.isnan(worst):
        raise ConfigError(f"{type(lm).__name__} gives scores that are not finite; its weights are broken.")
    size = max(1.0, singly.abs().max().item())
    if worst > size * (1e-3 if lm.dtype in (torch.float32, torch.float64) else 0.05):
        raise ConfigError(
            f"{type(lm).__name__} gives other scores packed than one example at a time (off by {worst:.3g}); "
            "ftlit cannot train it correctly yet."
        )


__all__ = [
    "ScalarPolicy",
    "apply_head",
    "bidirectional",
    "check_head",
    "head_names",
    "prepare_classifier",
    "rated",
    "read_packed",
    "read_places",
    "reads_first",
    "train_head",
    "unbranched",
]
