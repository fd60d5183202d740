"""The least time that a launch's compiled code allows on a GPU, resource by resource. A prediction, not a measurement.

    issue     warp instructions / 4 schedulers                        fma     fp32 at 128 or 64 lanes, and integer
    alu       integers, logic, comparisons: 64 lanes                          multiply-adds, on half of them: 64 lanes
    special   special functions and conversions: 16 lanes             tensor  FLOPs at the matrix instruction's rate
    shared    128 bytes a clock, with bank conflicts; shuffles; the operands that HGMMA and UTCHMMA read; L1: 4 sectors
    l2        sectors that L1 does not keep, 64 bytes a clock and multiprocessor and l2_bytes in all
    hbm       each tensor once, at the copy rate

All but l2 and hbm are times of the multiprocessor with the most programs. Latency, barriers and the start of a program
are not counted, so a kernel with few resident warps can be slower than even the sum. Moves between registers and tensor
memory (sm_100) cost their issue slots only: NVIDIA publishes no rate.
"""

from __future__ import annotations

import math
from typing import Any

from ..measure.gpus import GPU, L1_BYTES, SCHEDULERS, SHARED_BYTES
from ..measure.prediction import KernelPrediction
from .aot import Launch
from .emulate import Counts, Unknown
from .launches import Work, work
from .sass import WARP, Instruction
from .traffic import SECTOR

INTEGER_LANES = 64
SPECIAL_LANES = 16
SHUFFLE_LANES = 32
L2_PORT_BYTES = 64  # a clock, from L2 to a multiprocessor


def _warps(counts: Counts, *pipes: str) -> float:
    return counts.total(lambda x: x.pipe in pipes)


def _fma_cycles(counts: Counts, gpu: GPU) -> float:
    """Integer multiply-adds run on half of Hopper's fp32 lanes, at 64 lanes on all GPUs."""
    integer = _warps(counts, "imad") * WARP / INTEGER_LANES
    floating = (_warps(counts, "fma", "half") + 2 * _warps(counts, "fma2")) * WARP / gpu.fp32_lanes
    return max(integer, floating + integer * INTEGER_LANES / gpu.fp32_lanes)


def _tensor_cycles(counts: Counts, gpu: GPU) -> float:
    def cycles(x: Instruction) -> float:
        share = 1.0 if x.words[0].endswith("GMMA") else gpu.mma_sync
        return x.matrix_flops / (gpu.tensor_flops * share)

    described = sum(2 * math.prod(shape) * n for (_, shape), n in counts.products.items())
    return counts.total(cycles) + described / gpu.tensor_flops


def _operand_bytes(x: Instruction) -> float:
    """Bytes of shared memory that a warp's part of HGMMA reads: B once for each warp group, A unless in registers."""
    if not x.words[0].endswith("GMMA") or x.matrix_shape is None:
        return 0
    m, n, k = x.matrix_shape
    size = 1 if x.words[0] == "QGMMA" else 2
    a_too = x.operands[1].startswith("gdesc")  # then one operand names both descriptors
    return size * k * (n + (m if a_too else 0)) / 4


def _described_bytes(counts: Counts) -> float:
    """As `_operand_bytes`, of all UTCHMMA: B, and A unless it is in tensor memory; K is 32 bytes of each."""
    total = 0
    for (i, (m, n, _)), products in counts.products.items():
        a_too = counts.code[i].operands[0].startswith("gdesc")
        total += products * 32 * (n + (m if a_too else 0))
    return total


def _shared_cycles(counts: Counts) -> float:
    cycles = (counts.total(_operand_bytes) + _described_bytes(counts)) / SHARED_BYTES
    cycles += counts.total(lambda x: x.words[0] in ("SHFL", "REDUX", "CREDUX")) * WARP / SHUFFLE_LANES
    for i, traffic in counts.traffic.items():
        x = counts.code[i]
        if x.pipe == "shared":
            cycles += traffic.units
        else:  # L1: four sectors a clock; copies to shared memory are also written there
            cycles += max(traffic.requests, traffic.units * SECTOR / SHARED_BYTES)
            if x.words[0] == "LDGSTS":
                cycles += traffic.thread_bytes / SHARED_BYTES
    return cycles


def _l2_bytes(found: Work, gpu: GPU, sizes: dict[str, int]) -> float:
    """Of the launch. A small tensor is read once a multiprocessor."""
    total = 0.0
    for key in {key for each in found.sampled for key in each.sectors}:
        moved = found.programs * found.mean(lambda counts, key=key: SECTOR * counts.sectors.get(key, 0))
        name, written = key
        if not written and sizes.get(name, L1_BYTES + 1) <= L1_BYTES:
            moved = min(moved, gpu.multiprocessors * sizes[name])
        total += moved
    return total


def times(found: Work, gpu: GPU) -> dict[str, float]:
    """Microseconds of each resource."""
    busiest = math.ceil(found.programs / gpu.multiprocessors)
    cycles: dict[str, float] = {
        "issue": found.mean(lambda counts: sum(counts.executed)) / SCHEDULERS,
        "alu": found.mean(lambda counts: _warps(counts, "alu")) * WARP / INTEGER_LANES,
        "fma": found.mean(lambda counts: _fma_cycles(counts, gpu)),
        "special": found.mean(lambda counts: _warps(counts, "xu")) * WARP / SPECIAL_LANES,
        "tensor": found.mean(lambda counts: _tensor_cycles(counts, gpu)),
        "shared": found.mean(_shared_cycles),
    }
    us = {name: 1e6 * busiest * value / gpu.clock_hz for name, value in cycles.items()}
    l2 = _l2_bytes(found, gpu, found.sizes)
    rate = min(gpu.l2_bytes, L2_PORT_BYTES * min(gpu.multiprocessors, found.programs)) * gpu.clock_hz
    us["l2"] = 1e6 * l2 / rate
    us["hbm"] = 1e6 * (found.read_bytes + found.written_bytes) / gpu.copy_bytes_per_s
    return us


def _tile(constants: dict[str, Any]) -> str:
    return " ".join(f"{name.removeprefix('BLOCK_')}={constants[name]}" for name in constants if name[:6] == "BLOCK_")


def predict(launch: Launch, gpu: GPU, *, call: str, sample: int) -> KernelPrediction:
    """The prediction of a launch. One that cannot be counted is a row with the reason in ``refused``."""
    r = launch.resources
    blocks = r.blocks_per_multiprocessor
    programs = math.prod(launch.grid)
    flops = slots = hbm = 0.0
    us: dict[str, float] = {}
    refused = None
    try:
        found = work(launch, sample)
        us = times(found, gpu)
        slots = programs * found.mean(lambda counts: sum(counts.executed))
        flops = programs * found.mean(lambda counts: counts.flops)
        hbm = found.read_bytes + found.written_bytes
    except (Unknown, ValueError) as error:
        us, refused = {}, str(error)
    return KernelPrediction(
        call=call,
        kernel=r.name,
        launches=1,
        tile=_tile(r.constants),
        warps=r.num_warps,
        registers=r.registers,
        spill_bytes=r.spill_bytes,
        shared_bytes=r.shared_bytes,
        blocks=blocks,
        programs=programs,
        waves=programs / (max(blocks, 1) * gpu.multiprocessors),
        issue_slots=slots,
        flops=flops,
        hbm_bytes=hbm,
        us=us,
        roofline_us=1e6 * max(flops / gpu.matmul_flops_per_s, hbm / gpu.copy_bytes_per_s),
        refused=refused,
    )
