"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is first imported."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# `python -m pytest` puts the working directory there: transformers would import our kernels/ as Hugging Face's package.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
