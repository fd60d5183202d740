"""The minimal BERT encoder, its heads, packing, Hugging Face interchange, and `fuse` for other people's models."""

from .batch import IGNORE, PackedBatch, pack_padded, to_padded
from .config import PRESETS, BertConfig
from .encoder import BertEncoder
from .fusion import FuseReport, fuse, register_attention, register_family, unfuse
from .hf import from_hf, save_hf
from .pretraining import BertForPreTraining, PreTrainingOutput

__all__ = [
    "IGNORE",
    "PRESETS",
    "BertConfig",
    "BertEncoder",
    "BertForPreTraining",
    "FuseReport",
    "PackedBatch",
    "PreTrainingOutput",
    "from_hf",
    "fuse",
    "pack_padded",
    "register_attention",
    "register_family",
    "save_hf",
    "to_padded",
    "unfuse",
]
