"""GPUs for which speed is predicted from compiled code: what a multiprocessor does in a clock, and the memory's rates.

fact                              source
multiprocessors, HBM bandwidth    data sheets of A100 80GB SXM, H100 SXM, H200 SXM, HGX B200; published figures of
                                  RTX PRO 6000 Blackwell Workstation: 188, 1,792 GB/s of GDDR7
clock                             makes the data sheet's dense bf16 rate ``tensor_flops`` a clock and multiprocessor
tensor_flops                      architecture white papers: A100 2,048 in bf16, H100 4,096; B200 from its rate; RTX PRO
                                  6000: 503.8 TFLOP/s with fp32 sums at 2,617 MHz, as published
issue, fp32, integer, special     CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions": in a clock
                                  and multiprocessor 128 fp32, 64 integer (also multiply-adds), 16 special function
                                  and conversions, 32 shuffles; A100: 64 fp32
mma_sync                          share of the rate that Hopper's HMMA reaches: assumed, after microbenchmarks of Luo
                                  et al., arXiv 2501.12084
shared memory, L1                 white papers: 128 bytes a clock and multiprocessor
l2_bytes                          A100's white paper: 5,120 bytes a clock; assumed for the others
copy, matmul                      H100, H200: measured on one card each, not here; the others: the share of the data
                                  sheet on Hopper, 0.90 and 0.80, assumed
launch                            assumed: 2 µs from a kernel's end to the next one's full grid, inside a CUDA graph
"""

from __future__ import annotations

import dataclasses

LAUNCH_SECONDS = 2e-6
SCHEDULERS = 4  # of a multiprocessor; each issues a warp's instruction in a clock
SHARED_BYTES = 128  # of shared memory and L1, a clock and multiprocessor
L1_BYTES = 128 * 1024  # tensors up to this size are read from L2 once by a multiprocessor


@dataclasses.dataclass(frozen=True)
class GPU:
    """Rates of a GPU; see the table above.

    Attributes:
        fp32_lanes: threads of an fp32 instruction in a clock and multiprocessor.
        copy_bytes_per_s, matmul_flops_per_s: of large copies and bf16 products.
    """

    name: str
    arch: int
    multiprocessors: int
    clock_hz: float
    fp32_lanes: int
    tensor_flops: int
    mma_sync: float
    l2_bytes: int
    copy_bytes_per_s: float
    matmul_flops_per_s: float


GPUS = {
    "a100": GPU("A100 80GB SXM", 80, 108, 1.41e9, 64, 2048, 1.0, 5120, 0.9 * 2.039e12, 0.8 * 312e12),
    "h100": GPU("H100 SXM", 90, 132, 1.83e9, 128, 4096, 0.63, 5120, 3.0e12, 798e12),
    "h200": GPU("H200 SXM", 90, 132, 1.83e9, 128, 4096, 0.63, 5120, 4.3e12, 790e12),
    "b200": GPU("B200", 100, 148, 1.85e9, 128, 8192, 0.5, 5120, 0.9 * 8.0e12, 0.8 * 2250e12),
    "rtx-pro-6000": GPU("RTX PRO 6000", 120, 188, 2.617e9, 128, 1024, 1.0, 5120, 0.9 * 1.792e12, 0.8 * 503.8e12),
}


def named(device: str) -> str | None:
    """The key in `GPUS` of a GPU by PyTorch's name of it, "NVIDIA H100 80GB HBM3"; None where there is none."""
    words = device.lower().replace("-", " ").split()
    return next((key for key in GPUS if set(key.split("-")) <= set(words)), None)


def short_name(name: str) -> str:
    """`GPU.name` without the form of the card: "A100 80GB SXM" is "A100"."""
    return name.removesuffix(" SXM").removesuffix(" 80GB")
