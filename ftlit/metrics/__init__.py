"""torchmetrics classes."""

from ftlit.metrics.token_nll import TokenNLL

__all__ = ["TokenNLL"]
