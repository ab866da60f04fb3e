"""Scores the same documents with the start model, once, and with the present model, as often as asked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import BadZipFile

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from ftlit.batch import Example, PackedBatch
from ftlit.cache import cache_dir
from ftlit.data.packing import EvalLoader
from ftlit.data.store import measure
from ftlit.files import replacing
from ftlit.forgetting.documents import Documents
from ftlit.forgetting.fingerprint import fingerprint
from ftlit.metrics.forgetting import PairedChange
from ftlit.models.divergence import token_kl
from ftlit.models.policy import Policy, head_of
from ftlit.models.score import Head, token_scores

if TYPE_CHECKING:
    from ftlit.stages.base import Stage

VERSION = 1


class Measured(NamedTuple):
    """What was measured on one set of documents.

    Attributes:
        paired: The change of NLL a token and what is known of its certainty.
        nll: NLL of the present model, nats a token.
        start_nll: That of the start model.
        low: Lower end of the 95 % interval of the change, nats a token.
        high: Its upper end.
        agreement: Share of the tokens whose likeliest choice is that of the start model.
        kl: Mean of KL(start || now), nats a token; None unless asked for.
    """

    paired: PairedChange
    nll: float
    start_nll: float
    low: float
    high: float
    agreement: float
    kl: float | None = None

    @property
    def change(self) -> float:
        """Change of NLL since the start, nats a token; above 0 is forgotten."""
        return self.paired.change

    def upper(self, confidence: float = 0.95) -> float:
        """The change is not larger than this, with this confidence (one-sided), nats a token."""
        return self.paired.upper(confidence)

    @property
    def documents(self) -> int:
        """How many documents were scored."""
        return self.paired.documents

    @property
    def tokens(self) -> int:
        """How many tokens were scored."""
        return self.paired.tokens

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity now over perplexity at the start; its interval is `exp(low)` to `exp(high)`."""
        return math.exp(min(self.change, 700.0))


class _Scores(NamedTuple):
    """What a model says of each scored token of some documents, `[tokens]` each."""

    nll: np.ndarray
    choice: np.ndarray
    kl: np.ndarray | None = None


class Meter:
    """Measures the change of NLL, agreement and KL on sets of documents.

    The start model's scores are made once and kept on disk, by the start weights, the tokens and the arithmetic, so
    that a run that goes on, and the next run on the same model, only read them. Ranks share the documents and agree.
    Nothing is trained: no gradient, no generator and no mode of a module is touched.

    Args:
        sets: Documents by name; a list of examples is a list of documents.
        batch_tokens: Most tokens scored at once: bounds memory.
        keep_states: Whether to keep the start model's hidden states of the scored tokens in memory, tokens times width
            numbers: KL then needs no pass of the start model. (Where weights are sharded it does, all the same.)
        resamples: Resamples of the bootstrap.
        seed: Its seed.
    """

    def __init__(
        self,
        sets: Mapping[str, Documents | Sequence[Example]],
        batch_tokens: int = 4096,
        keep_states: bool = False,
        resamples: int = 2000,
        seed: int = 0,
    ) -> None:
        self.sets = {name: one if isinstance(one, Documents) else Documents(one) for name, one in sets.items()}
        self.batch_tokens, self.keep_states = batch_tokens, keep_states
        self.resamples, self.seed = resamples, seed
        self._start: dict[str, _Scores] = {}
        self._states: dict[str, list[Tensor]] = {}
        self._start_head: Head | None = None

    def prepare(self, trainer: L.Trainer, stage: Stage) -> None:
        """Scores the start model, or reads what it scored earlier.

        Args:
            trainer: The trainer.
            stage: The stage, its model on its device; `remember_start` must have been called where the model itself is
                trained. All ranks must call.
        """
        policy = _policy_of(stage)
        name = fingerprint(policy.lm, stage.strategy)
        keep = self.keep_states and not isinstance(trainer.strategy, ModelParallelStrategy)
        arithmetic = f"{VERSION} {trainer.precision} {_device_of(policy).type} {torch.__version__}"
        for key, documents in self.sets.items():
            if key in self._start:
                continue
            digest = hashlib.blake2b(f"{name} {documents.fingerprint()} {arithmetic}".encode(), digest_size=16)
            path = cache_dir() / "start_scores" / f"{digest.hexdigest()}.npz"
            tokens = int(measure(documents.examples).targets.sum())
            found = trainer.strategy.broadcast(_read(path, tokens) if trainer.is_global_zero else None)
            if found is None or keep:
                with stage.strategy.start(policy.lm):
                    scored = self._score(trainer, stage, key, keep=keep)
                    self._start_head = head_of(policy.lm).detach()
                if found is None and trainer.is_global_zero:
                    _write(path, scored)
                found = found or scored
            self._start[key] = found

    def start_tokens(self, name: str) -> np.ndarray:
        """NLL of the start model for each scored token of a set, nats, `[tokens]`."""
        return self._start[name].nll

    def start_nll(self) -> dict[str, float]:
        """NLL of the start model on each set, nats a token."""
        return {name: float(scores.nll.mean()) for name, scores in self._start.items()}

    def measure(
        self, trainer: L.Trainer, stage: Stage, kl: bool = False, names: Sequence[str] | None = None
    ) -> dict[str, Measured]:
        """Scores the present model.

        Args:
            trainer: The trainer.
            stage: The stage, after `prepare`. All ranks must call; all get the same numbers.
            kl: Whether to compute the KL divergence too.
            names: The sets to measure; all when left out.
        """
        return {
            name: self._compare(name, self._score(trainer, stage, name, kl=kl))
            for name in (self.sets if names is None else names)
        }

    def _compare(self, name: str, now: _Scores) -> Measured:
        owners, start = self.sets[name].token_owners, self._start[name]
        counts = np.bincount(owners)
        paired = PairedChange(np.bincount(owners, weights=now.nll - start.nll), counts, self.resamples, self.seed)
        low, high = paired.interval()
        return Measured(
            paired,
            nll=float(now.nll.mean()),
            start_nll=float(start.nll.mean()),
            low=low,
            high=high,
            agreement=float((now.choice == start.choice).mean()),
            kl=None if now.kl is None else float(now.kl.mean()),
        )

    @torch.no_grad()
    def _score(self, trainer: L.Trainer, stage: Stage, name: str, *, kl: bool = False, keep: bool = False) -> _Scores:
        """What the model, as it is, says of every scored token; the same on all ranks.

        Args:
            trainer: The trainer.
            stage: The stage.
            name: The set.
            kl: Whether to compare with the start model.
            keep: Whether the model is the start model, and its hidden states are kept.
        """
        documents = self.sets[name]
        targets = measure(documents.examples).targets
        first = np.cumsum(targets) - targets
        found = np.zeros((3 if kl else 2, int(targets.sum())))
        loader = EvalLoader(documents.examples, _AT_ONCE, self.batch_tokens, trainer.global_rank, trainer.world_size)
        kept = self._states.get(name, []) if kl else []
        states: list[Tensor] = []
        policy = _policy_of(stage)
        device = _device_of(policy)
        with _scoring(trainer, policy):
            for number, batch in enumerate(loader):
                moved = batch.to(device)
                if kept or keep:
                    hidden = policy.hidden(moved)
                    head = head_of(policy.lm)
                    scores = token_scores(hidden, head, moved.target_ids, watch=_WATCH)
                    if keep:
                        states.append(hidden.cpu())
                    else:
                        assert self._start_head is not None
                        kl_now = token_kl(hidden, head, kept[number].to(device), self._start_head)
                        scores = scores._replace(kl=kl_now)
                else:
                    scores = policy(moved, watch=_WATCH, kl={0: 1.0} if kl else None)
                places, real = _places(batch, first)
                values = [value for value in (-scores.logps, scores.choice, scores.kl) if value is not None]
                found[:, places] = torch.stack([value.double() for value in values]).cpu().numpy()[:, real]
        if keep:
            self._states[name] = states
        if trainer.world_size > 1:  # every token was scored on one rank
            together = trainer.strategy.reduce(torch.from_numpy(found).to(device), reduce_op="sum")
            found = together.cpu().numpy()
        return _Scores(found[0], found[1].astype(np.int64), found[2] if kl else None)


_WATCH = frozenset({"choice"})
_AT_ONCE = 64  # most examples of a micro-batch


def _policy_of(stage: Stage) -> Policy:
    assert stage.policy is not None
    return stage.policy


def _device_of(policy: Policy) -> torch.device:
    """Where the model is: before training, the stage itself does not know yet."""
    return next(policy.parameters()).device


def _places(batch: PackedBatch, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the targets of a micro-batch lie among all tokens, and which of them are no filler's."""
    segments = batch.target_segments.numpy()
    examples = np.asarray(batch.examples)[segments]
    within = np.arange(len(segments)) - np.searchsorted(segments, segments)
    real = examples >= 0
    return first[examples[real]] + within[real], real


@contextmanager
def _scoring(trainer: L.Trainer, policy: Policy) -> Iterator[None]:
    """Evaluation mode and the run's precision; every module's own mode comes back."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        with trainer.precision_plugin.forward_context():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _read(path: Path, tokens: int) -> _Scores | None:
    """Scores of the cache; None where there are none, or torn ones."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            scores = _Scores(kept["nll"], kept["choice"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    fits = all(part is not None and part.shape == (tokens,) for part in scores[:2])
    return scores if fits else None


def _write(path: Path, scores: _Scores) -> None:
    try:
        with replacing(path) as scratch, scratch.open("wb") as file:
            np.savez(file, nll=scores.nll, choice=scores.choice)
    except OSError as error:
        print(f"forgetting the start scores are not kept: {path.parent} cannot be written ({error})", flush=True)


__all__ = ["Measured", "Meter"]
