"""The gated half of a transformer's feed-forward layer: `activation(x @ w_gate) * (x @ w_up)`."""

from ..tiles.lazy import files_of

__getattr__ = files_of(__name__)
