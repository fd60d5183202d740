"""The masked-LM loss and cross entropy. README.md has the equations."""

from .api import cross_entropy, masked_lm_loss

__all__ = ["cross_entropy", "masked_lm_loss"]
