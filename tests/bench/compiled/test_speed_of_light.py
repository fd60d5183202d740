"""Counts to microseconds: each resource of a program with instructions written by hand."""

import dataclasses

import pytest

from fusebert.bench.compiled.emulate import Emulator
from fusebert.bench.compiled.launches import Work
from fusebert.bench.compiled.sass import parse
from fusebert.bench.compiled.speed_of_light import times
from fusebert.bench.compiled.traffic import Region
from fusebert.bench.measure.gpus import GPU, GPUS, named, short_name

CLOCK = 1e9  # a cycle is a nanosecond
BASE = 0x10000
THREADS, WARPS, MULTIPROCESSORS = 256, 8, 10


def gpu(**changes):
    made = GPU("test", 90, MULTIPROCESSORS, CLOCK, 128, 4096, 0.5, 256, 1e12, 1e14)
    return dataclasses.replace(made, **changes)


def cycles(*instructions, programs=MULTIPROCESSORS, on=None, size=1 << 30):
    """Cycles of each resource; each warp of a program runs the instructions once."""
    code = [*instructions, "EXIT"]
    text = "\n".join(f"        /*{16 * i:04x}*/ {line} ;" for i, line in enumerate(code))
    emulator = Emulator(parse(text), {}, THREADS, [Region("x", BASE, size)])
    counts = emulator.run((0, 0, 0))
    read = written = 0.0
    for (_, is_written), sectors in counts.sectors.items():
        moved = min(size, 32.0 * sectors * programs)
        read, written = (read, written + moved) if is_written else (read + moved, written)
    found = Work(parse(text), programs, (counts,), read, written, {"x": size})
    return {name: 1e3 * us for name, us in times(found, on or gpu()).items()}


@pytest.mark.parametrize(
    ("instruction", "resource", "expected"),
    [
        ("FFMA R0, R1, R2, R3", "fma", WARPS * 32 / 128),
        ("IMAD R0, R1, R2, R3", "fma", WARPS * 32 / 64),
        ("LOP3.LUT R0, R1, R2, R3, 0xc0, !PT", "alu", WARPS * 32 / 64),
        ("MUFU.EX2 R0, R1", "special", WARPS * 32 / 16),
        ("HMMA.16816.F32.BF16 R0, R4, R8, R0", "tensor", WARPS * 4096 / (0.5 * 4096)),
        ("FFMA2 R0, R2, R4, R6", "fma", WARPS * 2 * 32 / 128),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", "tensor", 2 * (2 * 64 * 128 * 16) / 4096),
        ("SHFL.BFLY PT, R0, R1, 0x1, 0x1f", "shared", WARPS),
        ("FADD R0, R1, R2", "issue", (WARPS + WARPS) / 4),  # and EXIT
    ],
)
def test_instructions(instruction, resource, expected):
    assert cycles(instruction)[resource] == pytest.approx(expected)


def test_half_of_the_lanes_serve_both_integers_and_floats():
    """8 of each: integers take 4 cycles of one half of the lanes; together they fill 2 + 2 cycles of all."""
    assert cycles("FFMA R0, R1, R2, R3", "IMAD R0, R1, R2, R3")["fma"] == pytest.approx(4)
    assert cycles(*["FFMA R0, R1, R2, R3"] * 4, "IMAD R0, R1, R2, R3")["fma"] == pytest.approx(10)


def test_operands_of_warp_group_products_come_from_shared_memory():
    """B, 128 × 16 elements of 2 bytes, for each of two warp groups; A too unless it is in registers."""
    b, a = 2 * 128 * 16, 2 * 64 * 16
    registers = cycles("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24")
    both = cycles("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24")
    assert registers["shared"] == pytest.approx(2 * b / 128)
    assert both["shared"] == pytest.approx(2 * (a + b) / 128)


def test_products_in_tensor_memory():
    """Each of 8 warps multiplies 128 × 128 × 16 at the full rate; A and B are read once, A not from tensor memory."""
    shape = "UMOV UR31, 0x8200490"
    both = cycles(shape, "UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR5], tmem[UR30], idesc[UR31], UPT")
    one = cycles(shape, "UTCHMMA tmem[UR8], gdesc[UR10], tmem[UR5], tmem[UR30], idesc[UR31], UPT")
    assert both["tensor"] == one["tensor"] == pytest.approx(WARPS * 2 * 128 * 128 * 16 / 4096)
    assert both["shared"] == 2 * one["shared"] == pytest.approx(WARPS * 2 * (2 * 128 * 16) / 128)


LOAD = ["S2R R0, SR_TID.X", "SHF.L.U32 R2, R0, 0x4, RZ", f"IADD3 R2, R2, {BASE:#x}, RZ", "MOV R3, RZ"]
LOAD += ["LDG.E.128 R4, [R2.64]"]  # 256 threads, 16 bytes each: 4,096 bytes


def test_global_memory():
    found = cycles(*LOAD)
    assert found["shared"] == pytest.approx(4096 / 128)  # L1
    assert found["l2"] == pytest.approx(MULTIPROCESSORS * 4096 / 256)
    assert found["hbm"] == pytest.approx(MULTIPROCESSORS * 4096 / 1e12 * 1e9)
    # A tensor of one program's size: from L2 once a multiprocessor, from HBM once.
    again = cycles(*LOAD, programs=5 * MULTIPROCESSORS, size=4096)
    assert again["l2"] == pytest.approx(found["l2"])
    assert again["hbm"] == pytest.approx(found["hbm"] / MULTIPROCESSORS)


def test_the_busiest_multiprocessor_counts():
    one = cycles("MUFU.EX2 R0, R1", programs=1)["special"]
    assert cycles("MUFU.EX2 R0, R1", programs=MULTIPROCESSORS)["special"] == one
    assert cycles("MUFU.EX2 R0, R1", programs=MULTIPROCESSORS + 1)["special"] == 2 * one


@pytest.mark.parametrize(
    ("name", "flops"),
    [("a100", 312e12), ("h100", 989e12), ("h200", 989e12), ("b200", 2250e12), ("rtx-pro-6000", 503.8e12)],
)
def test_rates_agree_with_the_data_sheets(name, flops):
    of = GPUS[name]
    assert of.multiprocessors * of.tensor_flops * of.clock_hz == pytest.approx(flops, rel=0.01)
    assert 0.7 * flops < of.matmul_flops_per_s < flops


@pytest.mark.parametrize(
    ("device", "key", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", "H100"),
        ("NVIDIA A100-SXM4-80GB", "a100", "A100"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000", "RTX PRO 6000"),
        ("NVIDIA RTX 6000 Ada Generation", None, None),
    ],
)
def test_a_gpu_by_its_name(device, key, short):
    assert named(device) == key
    assert key is None or short_name(GPUS[key].name) == short
