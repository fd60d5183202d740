"""Read and write Hugging Face BERT folders, without Transformers.

A folder is config.json, model.safetensors (or shards with an index) and the tokenizer's files. Its parameters
correspond one to one to ours, with three exceptions:

- a layer's query, key and value matrices are one [3H, H] matrix here;
- the MLM decoder is the word embeddings, and its bias is ``cls.predictions.bias``. A file may have copies of both under
  ``cls.predictions.decoder``, which must be equal; `save_hf` writes none;
- files converted from TensorFlow name LayerNorm's weight and bias ``gamma`` and ``beta``, and some contain the buffer
  ``position_ids``, which is 0, 1, 2, ….
"""

from .format import parameter_names
from .load import from_hf
from .save import save_hf

__all__ = ["from_hf", "parameter_names", "save_hf"]
