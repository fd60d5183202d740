"""What ``--precision`` means: the matrix products' dtype, what else has to be set for it, and where it can run.

    bf16    autocast to bfloat16; needs nothing else
    fp16    autocast to float16, the loss scaled
    fp32    float32, multiplied as float32
    tf32    float32, whose products round their operands to 10 bits of mantissa, from Ampere on
    fp8     bf16, and the four big linears of a layer in fp8 (`fusebert.model.fp8`), from Ada and Hopper on

Weights, moments and the sum of gradients are float32 in all of them.
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
    """bf16 on a GPU that has it, else fp32."""
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def check_precision(name: str, device: torch.device) -> None:
    """Raises UserError where ``device`` lacks the hardware."""
    obstacle = fp8_obstacle(device) if name == "fp8" else None
    if name == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        obstacle = f"it needs an NVIDIA GPU of compute capability 8.0 or more (A100, RTX 30), not this {device.type}"
    if obstacle is not None:
        raise UserError(f"--precision {name}: {obstacle}; give --precision {default_precision(device)}")


def set_float32_products(name: str) -> None:
    """Lets float32 products on a GPU round to TF32, for "tf32" alone. For the whole process."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"


__all__ = ["COMPUTE_DTYPES", "PRECISIONS", "check_precision", "default_precision", "set_float32_products"]
