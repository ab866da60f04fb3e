"""TokenSelection: the tokens that surprise the start model most are not trained."""

from __future__ import annotations

import math

import numpy as np
from typing_extensions import override

from ftlit.errors import ConfigError
from ftlit.forgetting.start_weighting import StartWeighting


class TokenSelection(StartWeighting):
    """Selective token masking (STM, Wu et al. 2025, arXiv:2501.14315): leaves out tokens of high perplexity.

    Few tokens that the start model holds unlikely make most of the gradient and move the model most. They stay in the
    text, as context, and are not trained. The paper masks by perplexity (above 2.5, for models of billions of weights);
    how many that are depends on the model, so the share is given here. An example keeps at least its least surprising
    token.

    Args:
        share: Share of the trained tokens that are left out, in [0, 1).
        max_perplexity: Instead: leave out the tokens whose perplexity `1 / p_start` is above this, at least 1.
        name: What it is called in the log.

    Raises:
        ConfigError: If a number is out of range, or both are given.
    """

    def __init__(
        self, share: float | None = None, max_perplexity: float | None = None, name: str | None = None
    ) -> None:
        super().__init__(name)
        if share is not None and max_perplexity is not None:
            raise ConfigError("TokenSelection takes share or max_perplexity, not both.")
        if share is not None and not 0 <= share < 1:
            raise ConfigError(f"TokenSelection.share must be in [0, 1), got {share}.")
        if max_perplexity is not None and max_perplexity < 1:
            raise ConfigError(f"TokenSelection.max_perplexity must be at least 1, got {max_perplexity}.")
        self.share = 0.2 if share is None and max_perplexity is None else share
        self.max_perplexity = max_perplexity

    @override
    def factors(self, nll: np.ndarray, counts: np.ndarray) -> np.ndarray:
        keep = np.ones(len(nll))
        if self.share is not None:
            order = np.argsort(-nll, kind="stable")  # exactly so many, whatever is equal
            keep[order[: int(self.share * len(nll))]] = 0
        else:
            assert self.max_perplexity is not None
            keep[nll > math.log(self.max_perplexity)] = 0
        saved = 0
        stops = np.cumsum(counts)
        for start, stop in zip(stops - counts, stops, strict=True):
            if stop > start and not keep[start:stop].any():
                keep[start + int(nll[start:stop].argmin())] = 1
                saved += 1
        left_out = int((keep == 0).sum())
        above = f"; those above {nll[keep == 0].min():.2f} nats" if left_out else ""
        only = f"; {saved:,} examples keep one token only" if saved else ""
        self.note = (
            f"{left_out:,} of {len(nll):,} trained tokens ({left_out / max(1, len(nll)):.1%}) are not trained, because "
            f"they surprise the start model{above}{only}"
        )
        return keep


__all__ = ["TokenSelection"]
