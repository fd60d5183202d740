"""What is counted in compiled kernels against counts that follow from their source."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

from compiled import environment

from fusebert.bench.compiled.emulate import Emulator, Unknown
from fusebert.bench.compiled.sass import parse
from fusebert.bench.compiled.traffic import bank_cycles

WARP = 32
PROGRAM = Path(__file__).parents[2] / "support" / "counted_kernels.py"


@functools.cache
def counted():
    """`counted_kernels`, in a process in which Triton compiles."""
    ran = subprocess.run([sys.executable, PROGRAM], env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("n", [7, 32])
def test_a_loop_that_the_assembler_unrolls(n):
    """n multiply-adds of 1024 elements, in an unrolled loop and one for the rest."""
    (found,) = counted()[f"multiply_adds {n}"]
    assert found["FFMA"] == n * 1024 / WARP
    assert found["bytes"] == {"x False": 4096, "y True": 4096}
    assert found["trips"] == [n // 4, n % 4] or sum(found["trips"]) <= n


def test_special_functions_and_a_masked_last_tile():
    for found in counted()["exponentials"]:
        assert found["MUFU"] == 5 * 256 / WARP  # the last tile computes 256 elements, but loads 32
        assert found["bytes"]["x False"] == 4 * 1056


@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 256), (16, 32, 512)])
def test_flops_of_products(m, n, k):
    """In warp-group instructions (64 rows), and in those of a warp; pipelined by Triton."""
    (found,) = counted()[f"product {m} {n} {k}"]
    assert found["flops"] == 2 * m * n * k
    assert found["bytes"] == {"a False": 2 * m * k, "b False": 2 * k * n, "c True": 4 * m * n}
    assert found["trips"] == [k / 64]


def test_nested_loops_and_an_early_exit():
    """Segments of 2, 0 and 3 rows of 6 parts: the bounds come from memory."""
    found = counted()["segments"]
    assert [each["bytes"].get("x False", 0) for each in found] == [rows * 6 * 128 * 4 for rows in (2, 0, 3)]
    assert found[1]["issued"] < 100 < found[0]["issued"]
    assert [each["trips"][0] for each in found] == [2, 0, 3]


def test_a_branch_on_data_is_refused():
    assert "depends on data" in counted()["data"]


def run(text, threads=32, constants=bytes(0x300)):
    lines = [f"        /*{16 * i:04x}*/ {line} ;" if not line.startswith(".") else line for i, line in enumerate(text)]
    return Emulator(parse("\n".join(lines)), constants, threads).run((3, 0, 0))


def test_threads_that_part_meet_again():
    """Half of a warp takes the branch: both sides are issued once, and what follows once."""
    code = ["S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x10, PT", "@P0 BRA `(.L_a)", "FADD R1, R1, R1"]
    code += [".L_a:", "FMUL R1, R1, R1", "EXIT"]
    counts = run(code)
    assert counts.executed == [1, 1, 1, 1, 1, 1]
    assert run(code, threads=128).executed == [4, 4, 4, 1, 4, 4]


@pytest.mark.parametrize("known", [True, False])
def test_values_pass_through_shared_memory(known):
    """Each thread stores its number and reads its neighbour's, which decides a branch."""
    value = "R0" if known else "R9"
    code = ["S2R R0, SR_TID.X", "LDG.E R9, [R20.64]", "SHF.L.U32 R1, R0, 0x2, RZ", f"STS [R1], {value}"]
    code += ["LOP3.LUT R2, R1, 0x4, RZ, 0x3c, !PT", "LDS R3, [R2]", "ISETP.EQ.U32.AND P0, PT, R3, 0x1, PT"]
    code += ["@P0 BRA `(.L_a)", "FADD R5, R5, R5", ".L_a:", "EXIT"]
    if known:
        counts = run(code, threads=64)
        assert counts.executed[-2:] == [2, 2]  # thread 0 alone reads a 1: both warps add
        assert counts.traffic[5].units == 2
    else:
        with pytest.raises(Unknown, match="depends on data"):
            run(code, threads=64)


@pytest.mark.parametrize(("how", "least"), [("MIN", 32), ("MAX", 63), ("SUM", sum(range(32, 64)))])
def test_reductions_of_a_warp(how, least):
    code = ["S2R R0, SR_TID.X", f"REDUX.{how}.S32 UR4, R0", "MOV R2, UR4"]
    code += ["ISETP.GE.U32.AND P0, PT, R0, 0x20, PT", f"ISETP.EQ.U32.AND P0, PT, R2, {least:#x}, P0"]
    code += ["@!P0 EXIT", "FADD R5, R5, R5", "EXIT"]
    assert run(code, threads=64).executed[-2:] == [1, 1]


def test_an_endless_loop_is_refused(monkeypatch):
    monkeypatch.setattr("fusebert.bench.compiled.emulate.MOST_BLOCKS", 100)
    with pytest.raises(Unknown, match="no end"):
        run(
            [
                "MOV R0, RZ",
                ".L_a:",
                "IADD3 R0, R0, 0x1, RZ",
                "ISETP.GE.AND P0, PT, R0, RZ, PT",
                "@P0 BRA `(.L_a)",
                "EXIT",
            ]
        )


# (instruction, registers before, register → value after)
RULES = [
    ("IADD3 R0, P0, R1, R2, RZ", {"R1": 0xFFFFFFFF, "R2": 1}, {"R0": 0, "P0": True}),
    ("IADD3 R0, P0, R1, -R2, RZ", {"R1": 5, "R2": 6}, {"R0": 0xFFFFFFFF, "P0": False}),
    ("IADD3 R0, P0, R1, -R2, RZ", {"R1": 5, "R2": 0}, {"R0": 5, "P0": True}),
    ("IADD3.X R0, R1, ~R2, RZ, P0, !PT", {"R1": 5, "R2": 0, "P0": True}, {"R0": 5}),
    ("IMAD.WIDE R0, R2, 0x4, R4", {"R2": 0xFFFFFFFF, "R4": 8, "R5": 0}, {"R0": 4, "R1": 0}),
    ("IMAD.WIDE.U32 R0, R2, 0x4, R4", {"R2": 0xFFFFFFFF, "R4": 8, "R5": 0}, {"R0": 4, "R1": 4}),
    ("IMAD.HI.U32 R0, R1, R2, R4", {"R1": 0x80000000, "R2": 6, "R4": 0, "R5": 7}, {"R0": 10}),
    ("IMAD.X R0, R1, 0x1, R2, P0", {"R1": 3, "R2": 4, "P0": True}, {"R0": 8}),
    ("LEA R0, P0, R1, R2, 0x2", {"R1": 0x40000001, "R2": 0xFFFFFFFF}, {"R0": 3, "P0": True}),
    ("LEA.HI R0, R1, R2, RZ, 0x1d", {"R1": 0xFF, "R2": 7}, {"R0": 0x1F + 7}),
    ("LEA.HI.X R0, R1, R2, R3, 0x1, P0", {"R1": 0x80000000, "R2": 9, "R3": 2, "P0": True}, {"R0": 15}),
    ("LEA.HI.X.SX32 R0, R1, R2, 0x2, P0", {"R1": 0xFFFFFFFF, "R2": 9, "P0": False}, {"R0": 8}),
    ("SHF.R.S32.HI R0, RZ, 0x1f, R1", {"R1": 0x80000000}, {"R0": 0xFFFFFFFF}),
    ("SHF.R.U32.HI R0, RZ, 0x4, R1", {"R1": 0x80000000}, {"R0": 0x08000000}),
    ("SHF.L.U64.HI R0, R1, 0x4, R2", {"R1": 0xF0000000, "R2": 1}, {"R0": 0x1F}),
    ("LOP3.LUT R0, R1, 0x3, R2, 0xf8, !PT", {"R1": 4, "R2": 9}, {"R0": 5}),
    ("LOP3.LUT P0, RZ, R1, 0x8, RZ, 0xc0, !PT", {"R1": 7}, {"P0": False}),
    ("PLOP3.LUT P0, PT, P1, PT, PT, 0x8, 0x0", {"P1": True}, {"P0": False}),
    ("PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0", {"UP0": True}, {"P0": True}),
    ("ISETP.GE.AND P0, PT, R1, 0x1, PT", {"R1": 0xFFFFFFFF}, {"P0": False}),
    ("ISETP.GE.U32.AND P0, PT, R1, 0x1, PT", {"R1": 0xFFFFFFFF}, {"P0": True}),
    ("ISETP.GT.AND.EX P0, PT, R1, R2, PT, P1", {"R1": 4, "R2": 4, "P1": True}, {"P0": True}),
    ("ISETP.GT.AND.EX P0, PT, R1, R2, PT, P1", {"R1": 3, "R2": 4, "P1": True}, {"P0": False}),
    ("SEL R0, R1, R2, !P0", {"R1": 1, "R2": 2, "P0": True}, {"R0": 2}),
    ("VIMNMX R0, R1, R2, !PT", {"R1": 0xFFFFFFFF, "R2": 2}, {"R0": 2}),
    ("PRMT R0, R1, 0x7632, R2", {"R1": 0x11112222, "R2": 0x33334444}, {"R0": 0x33331111}),
    ("SGXT R0, R1, 0x1", {"R1": 3}, {"R0": 0xFFFFFFFF}),
    ("HFMA2.MMA R0, -RZ, RZ, 0, 5.9604644775390625e-08", {}, {"R0": 1}),
    ("P2R R0, PR, R1, 0x2", {"R1": 0xF0, "P1": True}, {"R0": 0xF2}),
    ("R2P PR, R1, 0x6", {"R1": 4}, {"P1": False, "P2": True}),
]


@pytest.mark.parametrize(("instruction", "before", "after"), RULES)
def test_integer_instructions(instruction, before, after):
    emulator = Emulator(parse(f"        /*0000*/ {instruction} ;\n        /*0010*/ EXIT ;"), b"", 32)
    emulator._needed = [True, False]
    execute = emulator._execute

    def start(i, active):
        emulator._state.update({k: np.bool_(v) if "P" in k else np.uint64(v) for k, v in before.items()})
        execute(i, active)

    emulator._execute = start
    emulator.run((0, 0, 0))
    assert {name: int(np.broadcast_to(emulator._state[name], 32)[5]) for name in after} == after


def test_division_by_a_number_that_only_the_launch_gives():
    """ptxas divides by a float reciprocal and two corrections: the sequence of attention's program index."""
    code = """
    IABS R0, R9 | I2F.RP R2, R0 | MUFU.RCP R2, R2 | IADD3 R4, R2, 0xffffffe, RZ | F2I.FTZ.U32.TRUNC.NTZ R5, R4
    MOV R4, RZ | IADD3 R6, RZ, -R5, RZ | IMAD R7, R6, R0, RZ | IMAD.HI.U32 R5, R5, R7, R4 | IMAD.HI.U32 R5, R5, R8, RZ
    IADD3 R6, -R5, RZ, RZ | IMAD R6, R0, R6, R8 | ISETP.GT.U32.AND P0, PT, R0, R6, PT
    @!P0 IADD3 R6, R6, -R0, RZ | @!P0 IADD3 R5, R5, 0x1, RZ | ISETP.GE.U32.AND P1, PT, R6, R0, PT
    @P1 IADD3 R5, R5, 0x1, RZ | EXIT
    """.replace("\n", "|").split("|")
    lines = [line.strip() for line in code if line.strip()]
    text = "\n".join(f"        /*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))
    emulator = Emulator(parse(text), b"", 32)
    emulator._needed = [True] * len(lines)
    execute = emulator._execute
    for a, b in ((0, 1), (11, 12), (12, 12), (99_999, 16), (2**31 - 1, 3), (2**31 - 1, 2**31 - 1), (1_000_003, 7)):

        def start(i, active, a=a, b=b):
            if i == 0:
                emulator._state.update({"R8": np.uint64(a), "R9": np.uint64(b)})
            execute(i, active)

        emulator._execute = start
        emulator.run((0, 0, 0))
        assert int(np.broadcast_to(emulator._state["R5"], 32)[0]) == a // b


@pytest.mark.parametrize(
    ("opcode", "stride", "cycles"),
    [
        ("LDS", 4, 1),
        ("LDS", 8, 2),
        ("LDS", 128, 32),
        ("LDS", 0, 1),
        ("LDS.64", 8, 2),
        ("LDS.128", 16, 4),
        ("LDSM.16.M88.4", 16, 4),
        ("LDSM.16.M88.4", 128, 32),
    ],
)
def test_bank_conflicts(opcode, stride, cycles):
    (x,) = parse(f"        /*0000*/ {opcode} R0, [R4] ;")
    address = (1024 + stride * np.arange(WARP)).astype(np.uint64)[None]
    assert bank_cycles(address, np.ones((1, WARP), bool), x) == cycles
