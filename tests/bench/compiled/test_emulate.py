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
from fusebert.bench.compiled.sass import literals, parse
from fusebert.bench.compiled.traffic import bank_cycles

WARP = 32
PROGRAM = Path(__file__).parents[2] / "support" / "counted_kernels.py"


ARCHS = pytest.mark.parametrize("arch", [80, 90, 100, 120])


@functools.cache
def counted(arch):
    """`counted_kernels`, in a process in which Triton compiles."""
    command = [sys.executable, PROGRAM, str(arch)]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


@ARCHS
@pytest.mark.parametrize("n", [7, 32])
def test_a_loop_that_the_assembler_unrolls(n, arch):
    """n multiply-adds of 1024 elements, in an unrolled loop and one for the rest; two in one on sm_100."""
    (found,) = counted(arch)[f"multiply_adds {n}"]
    assert found["multiply-adds"] == n * 1024 / WARP
    assert found["bytes"] == {"x False": 4096, "y True": 4096}
    assert found["trips"] == [n // 4, n % 4] or sum(found["trips"]) <= n


@ARCHS
def test_special_functions_and_a_masked_last_tile(arch):
    for found in counted(arch)["exponentials"]:
        assert found["MUFU"] == 5 * 256 / WARP  # the last tile computes 256 elements, but loads 32
        assert found["bytes"]["x False"] == 4 * 1056


OWN = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@ARCHS
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 256), (128, 128, 256), (16, 32, 512)])
def test_flops_of_products(m, n, k, arch):
    """In instructions of a warp, of a warp group (64 rows), and of a block in tensor memory; pipelined by Triton."""
    (found,) = counted(arch)[f"product {m} {n} {k}"]
    assert found["matrix"] == ["HMMA" if m == 16 else OWN[arch]]
    assert found["flops"] == 2 * m * n * k
    assert found["bytes"] == {"a False": 2 * m * k, "b False": 2 * k * n, "c True": 4 * m * n}
    peeled = found["matrix"] == ["UTCHMMA"]  # the first trip; then loops that wait for a barrier, which never turn
    assert found["trips"] == ([k / 64 - 1, 0, 0, 0] if peeled else [k / 64])


@ARCHS
def test_nested_loops_and_an_early_exit(arch):
    """Segments of 2, 0 and 3 rows of 6 parts: the bounds come from memory."""
    found = counted(arch)["segments"]
    assert [each["bytes"].get("x False", 0) for each in found] == [rows * 6 * 128 * 4 for rows in (2, 0, 3)]
    assert found[1]["issued"] < 100 < found[0]["issued"]
    assert [each["trips"][0] for each in found] == [2, 0, 3]


@ARCHS
def test_a_branch_on_data_is_refused(arch):
    assert "depends on data" in counted(arch)["data"]


def run(text, threads=32, constants=None):
    lines = [f"        /*{16 * i:04x}*/ {line} ;" if not line.startswith(".") else line for i, line in enumerate(text)]
    return Emulator(parse("\n".join(lines)), constants or {0: bytes(0x300)}, threads).run((3, 0, 0))


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


def test_a_value_that_only_some_threads_have():
    """Warp 0 overwrites what was loaded, and branches on it; the other warps cannot."""
    code = ["S2R R0, SR_TID.X", "LDG.E R9, [R20.64]", "ISETP.GE.U32.AND P0, PT, R0, 0x20, PT", "@P0 BRA `(.L_a)"]
    code += ["MOV R9, 0x1", "ISETP.EQ.U32.AND P1, PT, R9, 0x1, PT", "@P1 BRA `(.L_a)", "FADD R5, R5, R5", ".L_a:"]
    assert run([*code, "EXIT"], threads=64).executed == [2, 2, 2, 2, 1, 1, 1, 0, 2]
    with pytest.raises(Unknown, match="depends on data"):
        run([*code, "ISETP.EQ.U32.AND P1, PT, R9, 0x1, PT", "@P1 EXIT", "EXIT"], threads=64)


def test_literals():
    """ptxas keeps some constants in a bank of their own (2 for sm_80)."""
    code = ["ULDC.64 UR4, c[0x2][0x8]", "ISETP.EQ.U32.AND P0, PT, RZ, UR4, PT", "@P0 EXIT", "FADD R5, R5, R5", "EXIT"]
    text = '.section .nv.constant2.kernel,"a"\n /*0000*/ .byte 0x1, 0x2, 0x0, 0x0\n .word 0x0, 0x5\n'
    assert literals(text + ".section .text.kernel\n") == {2: bytes([1, 2, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0])}
    four = ["LDCU.128 UR4, c[0x0][0x0]", "ISETP.EQ.U32.AND P0, PT, RZ, UR7, PT", *code[2:]]
    assert run(four, constants={0: bytes(12) + b"\x05" + bytes(3)}).executed[-2:] == [1, 1]
    assert run(code, constants={2: bytes(8) + b"\x05" + bytes(7)}).executed[-2:] == [1, 1]
    with pytest.raises(Unknown, match="depends on data"):
        run(code)


def test_a_call_is_a_jump_where_nothing_returns():
    """How ptxas leaves some loops for sm_80: three trips, then the call."""
    code = ["MOV R0, RZ", ".L_a:", "IADD3 R0, R0, 0x1, RZ", "ISETP.LT.AND P0, PT, R0, 0x3, PT"]
    code += ["@!P0 CALL.REL.NOINC `(.L_b)", "BRA `(.L_a)", ".L_b:", "FADD R5, R5, R5", "EXIT"]
    assert run(code).executed == [1, 3, 3, 3, 2, 1, 1]
    with pytest.raises(Unknown, match="calls"):
        run([*code, "RET.REL.NODEC R2 `(kernel)"])


# What tcgen05 compiles to: a warp takes columns of tensor memory, unless others hold them, and a thread multiplies.
TENSOR_MEMORY = """
S2R R0, SR_TID.X | ISETP.GE.U32.AND P1, PT, R0, 0x20, PT | @P1 BRA `(.L_wait) | LDS.U8 R3, [UR5+0x1c]
ISETP.NE.AND P0, PT, R3, RZ, PT | @P0 BRA `(.L_trap) | ELECT P0, URZ, PT | @!P0 BRA `(.L_wait)
UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR6, UR6 | BRA.U !UP0, `(.L_trap) | MOV R2, 0xf | ATOMS.OR RZ, [UR5+0x14], R2
UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR5], tmem[UR30], idesc[UR31], UPT | BRA `(.L_wait)
.L_trap: | CALL.REL.NOINC `($trap)
.L_wait: | SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], R8 | @!P0 BRA `(.L_wait)
LDS R4, [UR5+0x14] | ISETP.NE.AND P0, PT, R4, 0xf, PT | @P0 BRA `(.L_trap) | LDTM.x64 R4, tmem[UR5] | EXIT
"""


def test_tensor_memory():
    lines = [part.strip() for line in TENSOR_MEMORY.strip().splitlines() for part in line.split("|")]
    counts = run(["UMOV UR31, 0x8200490", *lines], threads=128)  # M, N = 128, 128
    executed = {x.words[0]: n for n, x in zip(counts.executed, counts.code, strict=True)}
    assert (executed["UTCHMMA"], executed["LDTM"], executed["CALL"]) == (1, 4, 0)
    assert counts.flops == 2 * 128 * 128 * 16
    with pytest.raises(Unknown, match="depends on data"):
        run(["LDG.E R9, [R20.64]", "R2UR UR31, R9", *lines], threads=128)


@pytest.mark.parametrize(("vote", "most"), [("VOTE.ANY P1, P0", 3), ("VOTE.ALL P1, P0", 1), ("VOTEU.ANY UP0, P0", 3)])
def test_votes_of_a_warp(vote, most):
    """P0 holds of threads 20 to 79: of some of warp 0, of all of warp 1, of some of warp 2."""
    code = ["S2R R0, SR_TID.X", "ISETP.GE.U32.AND P0, PT, R0, 0x14, PT", "ISETP.LT.U32.AND P0, PT, R0, 0x50, P0"]
    code += [vote, f"@!{'UP0' if 'UP0' in vote else 'P1'} EXIT", "FADD R5, R5, R5", "EXIT"]
    assert run(code, threads=128).executed[-2:] == [most, most]


def test_a_ballot_and_its_highest_bit():
    code = ["S2R R0, SR_TID.X", "ISETP.LT.U32.AND P0, PT, R0, 0x8, PT", "VOTE.ANY R2, PT, P0", "FLO.U32 R3, R2"]
    code += ["ISETP.EQ.U32.AND P0, PT, R2, 0xff, PT", "ISETP.EQ.U32.AND P0, PT, R3, 0x7, P0", "@P0 EXIT"]
    assert run([*code, "FADD R5, R5, R5", "EXIT"]).executed[-2:] == [0, 0]


@pytest.mark.parametrize(("how", "result"), [("ADD", 36), ("OR", 15), ("AND", 0), ("EXCH", 8), ("MAX", None)])
def test_atomic_operations_on_shared_memory(how, result):
    """Threads 1 to 8 on a word that is 0; MAX is not evaluated."""
    code = ["S2R R0, SR_TID.X", "STS [RZ+0x400], RZ", "ISETP.GE.U32.AND P0, PT, R0, 0x1, PT"]
    code += ["ISETP.LT.U32.AND P0, PT, R0, 0x9, P0", f"@P0 ATOMS.{how} RZ, [RZ+0x400], R0", "LDS R4, [RZ+0x400]"]
    code += [f"ISETP.EQ.U32.AND P0, PT, R4, {result or 0:#x}, PT", "@P0 EXIT", "FADD R5, R5, R5", "EXIT"]
    if result is None:
        with pytest.raises(Unknown, match="depends on data"):
            run(code)
    else:
        assert run(code).executed[-2:] == [0, 0]


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
    ("IADD R0, R1, -R2", {"R1": 5, "R2": 6}, {"R0": 0xFFFFFFFF}),
    ("IADD.64 R0, R2, -R4", {"R2": 5, "R3": 0, "R4": 6, "R5": 0}, {"R0": 0xFFFFFFFF, "R1": 0xFFFFFFFF}),
    ("IADD.64 R0, R2, UR4", {"R2": 0xFFFFFFFF, "R3": 1, "UR4": 1, "UR5": 2}, {"R0": 0, "R1": 4}),
    ("ISETP.LT.S64.AND P0, PT, R2, RZ, PT", {"R2": 0, "R3": 0x80000000}, {"P0": True}),
    ("ISETP.LT.U64.AND P0, PT, R2, UR4, PT", {"R2": 5, "R3": 1, "UR4": 4, "UR5": 2}, {"P0": True}),
    ("IMNMX.S64 PT, PT, R0, RZ, R2, !PT, !PT", {"R2": 7, "R3": 0xFFFFFFFF}, {"R0": 0, "R1": 0}),
    ("IMNMX.S64 PT, PT, R0, R2, UR4, PT, !PT", {"R2": 7, "R3": 1, "UR4": 8, "UR5": 0}, {"R0": 8, "R1": 0}),
    ("MOV.64 R0, UR4", {"UR4": 3, "UR5": 4}, {"R0": 3, "R1": 4}),
    ("SEL.64 R0, R2, RZ, P1", {"R2": 3, "R3": 4, "P1": True}, {"R0": 3, "R1": 4}),
    ("SEL R0, R1, R2, !P0", {"R1": 1, "R2": 2, "P0": True}, {"R0": 2}),
    ("VIMNMX R0, PT, PT, R1, R2, !PT", {"R1": 0xFFFFFFFF, "R2": 2}, {"R0": 2}),
    ("VIMNMX R0, R1, R2, !PT", {"R1": 0xFFFFFFFF, "R2": 2}, {"R0": 2}),
    ("PRMT R0, R1, 0x7632, R2", {"R1": 0x11112222, "R2": 0x33334444}, {"R0": 0x33331111}),
    ("SGXT R0, R1, 0x1", {"R1": 3}, {"R0": 0xFFFFFFFF}),
    ("HFMA2.MMA R0, -RZ, RZ, 0, 5.9604644775390625e-08", {}, {"R0": 1}),
    ("P2R R0, PR, R1, 0x2", {"R1": 0xF0, "P1": True}, {"R0": 0xF2}),
    ("R2P PR, R1, 0x6", {"R1": 4}, {"P1": False, "P2": True}),
]


@pytest.mark.parametrize(("instruction", "before", "after"), RULES)
def test_integer_instructions(instruction, before, after):
    emulator = Emulator(parse(f"        /*0000*/ {instruction} ;\n        /*0010*/ EXIT ;"), {}, 32)
    emulator._needed = [True, False]
    execute = emulator._execute

    def start(i, active):
        for name, value in before.items():
            emulator.registers.store(name, np.bool_(value) if "P" in name else np.uint64(value), active)
        execute(i, active)

    emulator._execute = start
    emulator.run((0, 0, 0))
    assert {name: int(np.broadcast_to(emulator.registers.value(name), 32)[5]) for name in after} == after


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
    emulator = Emulator(parse(text), {}, 32)
    emulator._needed = [True] * len(lines)
    execute = emulator._execute
    for a, b in ((0, 1), (11, 12), (12, 12), (99_999, 16), (2**31 - 1, 3), (2**31 - 1, 2**31 - 1), (1_000_003, 7)):

        def start(i, active, a=a, b=b):
            if i == 0:
                emulator.registers.store("R8", np.uint64(a), active)
                emulator.registers.store("R9", np.uint64(b), active)
            execute(i, active)

        emulator._execute = start
        emulator.run((0, 0, 0))
        assert int(np.broadcast_to(emulator.registers.value("R5"), 32)[0]) == a // b


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
