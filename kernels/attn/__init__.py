"""Bidirectional attention for packed segments and padded batches. README.md: the equations and a map of the files."""

from .api import attention, attention_varlen, attention_varlen_separate
from .dropout_tile import attention_dropout_mask

__all__ = ["attention", "attention_dropout_mask", "attention_varlen", "attention_varlen_separate"]
