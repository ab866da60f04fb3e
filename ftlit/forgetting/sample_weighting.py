"""SampleWeighting: examples that the start model finds easy count more."""

from __future__ import annotations

import numpy as np
from typing_extensions import override

from ftlit.errors import ConfigError
from ftlit.forgetting.start_weighting import StartWeighting


class SampleWeighting(StartWeighting):
    """FLOW (Sanyal et al. 2025, arXiv:2502.02797): an example counts `w_i = exp(-l_i / tau)`.

    `l_i` is its loss under the start model, nats a trained token, and tau the median of all `l_i`; the weights are
    normalised so that the mean over all trained tokens is 1.

    Args:
        temperature: tau in units of the median; larger: more alike.
        name: What it is called in the log.

    Raises:
        ConfigError: If the temperature is not positive.
    """

    def __init__(self, temperature: float = 1.0, name: str | None = None) -> None:
        super().__init__(name)
        if not 0 < temperature <= float("inf"):
            raise ConfigError(f"SampleWeighting.temperature must be positive, got {temperature}.")
        self.temperature = temperature

    @override
    def factors(self, nll: np.ndarray, counts: np.ndarray) -> np.ndarray:
        some = counts > 0
        owners = np.repeat(np.arange(len(counts)), counts)
        losses = np.bincount(owners, weights=nll, minlength=len(counts))[some] / counts[some]
        tau = self.temperature * float(np.median(losses))
        # Less the smallest: the same after the normalisation, and no example underflows that need not.
        weights = np.zeros(len(counts))
        weights[some] = np.exp(-(losses - losses.min()) / max(tau, 1e-12))
        factors = np.maximum(weights[owners], np.finfo(np.float32).tiny)
        factors = factors * len(factors) / factors.sum()
        low, middle, high = np.quantile(factors, [0.05, 0.5, 0.95])
        self.note = (
            f"{int(some.sum()):,} examples count by their loss under the start model (median {tau:.2f} nats a token): "
            f"{low:.2f} to {high:.2f} times for nine tenths of the tokens, {middle:.2f} in the middle"
        )
        return factors


__all__ = ["SampleWeighting"]
