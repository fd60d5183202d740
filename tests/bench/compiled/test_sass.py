"""Parsing nvdisasm's text, the control-flow graph and its loops."""

import pytest

from fusebert.bench.compiled.sass import Graph, described_shape, parse

# for (a) { if (b) continue; for (c) {} }  with a trap after the end, as ptxas emits it
NESTED = """
        .headerflags    @"EF_CUDA_SM90"
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64+0x10] ;
        /*0020*/               @P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0040*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/             @!UP3 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
.L_x_4:
"""


def test_instructions():
    code = parse(NESTED)
    assert [x.address for x in code] == list(range(0, 0x80, 0x10))
    load = code[1]
    assert (load.guard, load.opcode, load.operands) == ("!P0", "LDG.E.128", ("R4", "desc[UR4][R2.64+0x10]"))
    assert (load.pipe, load.access_bytes) == ("global", 16)
    assert code[5].target == 0x10
    assert code[3].matrix_flops == 2 * 64 * 128 * 16 / 4
    assert str(code[5]) == "0x0050: @!UP3 BRA `(.L_x_0)"


def test_blocks_joins_and_loops():
    graph = Graph(parse(NESTED))
    assert [(b.first, b.end) for b in graph.blocks] == [(0, 1), (1, 3), (3, 5), (5, 6), (6, 7), (7, 8)]
    assert [b.successors for b in graph.blocks] == [(1,), (3, 2), (2, 3), (1, 4), (), (5,)]
    assert graph.join[:5] == [1, 3, 3, 4, None]
    assert [(loop.header, loop.blocks) for loop in graph.loops] == [(1, {1, 2, 3}), (2, {2})]


def test_a_block_that_some_threads_leave_has_no_join():
    text = "        /*0000*/ @P0 EXIT ;\n        /*0010*/ NOP ;\n        /*0020*/ EXIT ;"
    assert Graph(parse(text)).join == [None, None]


@pytest.mark.parametrize(
    ("opcode", "pipe", "size"),
    [
        ("HMMA.16816.F32.BF16", "tensor", 0),
        ("HFMA2.MMA", "half", 0),
        ("MUFU.EX2", "xu", 0),
        ("IMAD.WIDE.U32", "imad", 0),
        ("FFMA.FTZ", "fma", 0),
        ("LOP3.LUT", "alu", 0),
        ("UIADD3.X", "uniform", 0),
        ("R2UR", "uniform", 0),
        ("SHFL.BFLY", "shared", 0),
        ("LDS.64", "shared", 8),
        ("LDSM.16.MT88.4", "shared", 16),
        ("STG.E.U16", "global", 2),
        ("LDGSTS.E.BYPASS.128", "global", 16),
        ("STL", "spill", 4),
        ("BAR.SYNC.DEFER_BLOCKING", "barrier", 0),
        ("ULDC.64", "constant", 0),
    ],
)
def test_pipes_and_bytes(opcode, pipe, size):
    (x,) = parse(f"        /*0000*/                   {opcode} R0, R1 ;")
    assert (x.pipe, x.access_bytes) == (pipe, size)


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [("HMMA.16816.F32.BF16", 4096), ("HMMA.1688.F32.TF32", 2048), ("QGMMA.64x64x32.F32.E4M3.E4M3", 65536), ("FFMA", 0)],
)
def test_flops_of_a_warp(opcode, flops):
    (x,) = parse(f"        /*0000*/                   {opcode} R0, R1 ;")
    assert x.matrix_flops == flops


def test_a_matrix_instruction_of_unknown_shape_is_refused():
    (x,) = parse("        /*0000*/                   UTCQMMA gdesc[UR10], tmem[UR7] ;")
    with pytest.raises(ValueError, match="unknown shape"):
        _ = x.matrix_flops


@pytest.mark.parametrize(
    ("descriptor", "shape"),
    [(0x8200490, (128, 128, 16)), (0x8110490, (128, 64, 16)), (0x4 << 24 | 0x4 << 17 | 0x900, (64, 32, 8))],
)
def test_shapes_in_instruction_descriptors(descriptor, shape):
    """Two that Triton compiles for tiles of 128 × 128 and 128 × 64 in bf16, one made for tf32 (PTX ISA, table 42)."""
    assert described_shape(descriptor) == shape


def test_sparse_products_are_refused():
    with pytest.raises(ValueError, match="sparse"):
        described_shape(0x8200494)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "no SASS"),
        ("        /*0000*/ BRA `(.L_x_9) ;", "unknown labels: .L_x_9"),
        ("        /*0000*/ EXIT ;\n        /*0000*/ EXIT ;", "several kernels"),
    ],
)
def test_text_that_cannot_be_read(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)
