"""The values of ``--precision``: dtype of the matrix products, settings, and hardware requirements.

    bf16    autocast to bfloat16
    fp16    autocast to float16, with a scaled loss
    fp32    float32 products of float32 operands
    tf32    float32 products with operands rounded to 10 bits of mantissa; Ampere and later
    fp8     bf16, with the four large linears of a layer in fp8 (`fusebert.model.fp8`); Ada, Hopper and later

Weights, moments and gradient sums are float32 in all of them.
"""

from __future__ import annotations

import torch

from ...model.fp8 import fp8_obstacle
from ..errors import UserError

COMPUTE_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp8": torch.bfloat16,
}
PRECISIONS = tuple(COMPUTE_DTYPES)


def default_precision(device: torch.device) -> str:
    """bf16 on a GPU that supports it, else fp32."""
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def check_precision(name: str, device: torch.device) -> None:
    """Raises UserError if ``device`` does not support the precision ``name``."""
    obstacle = fp8_obstacle(device) if name == "fp8" else None
    if name == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        obstacle = f"it needs an NVIDIA GPU of compute capability 8.0 or more (A100, RTX 30), not this {device.type}"
    if obstacle is not None:
        raise UserError(f"--precision {name}: {obstacle}; give --precision {default_precision(device)}")


def set_float32_products(name: str) -> None:
    """Turns TF32 for float32 products on GPUs on if ``name`` is "tf32", else off. Affects the whole process."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
