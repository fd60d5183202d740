"""`fuse` and `unfuse`: the fused kernels in models that other libraries define."""

from .attention_interface import register_attention
from .families import register_family
from .install import fuse, unfuse
from .report import FuseReport

__all__ = ["FuseReport", "fuse", "register_attention", "register_family", "unfuse"]
