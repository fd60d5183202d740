"""The minimal BERT encoder, its heads, packing and Hugging Face interchange."""

from .config import PRESETS, BertConfig
from .encoder import BertEncoder
from .hf import from_hf, save_hf
from .packing import IGNORE, PackedBatch, pack_padded, to_padded
from .pretraining import BertForPreTraining, PreTrainingOutput

__all__ = [
    "IGNORE",
    "PRESETS",
    "BertConfig",
    "BertEncoder",
    "BertForPreTraining",
    "PackedBatch",
    "PreTrainingOutput",
    "from_hf",
    "pack_padded",
    "save_hf",
    "to_padded",
]
