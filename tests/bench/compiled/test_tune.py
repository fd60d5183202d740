"""``fusebert bench tune``: which candidate it takes, and that what it prints is the table."""

import math

import pytest
import torch
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.compiled import tune
from fusebert.kernels.attn.config import MASKED, TABLES, Config, Table
from fusebert.train.errors import UserError

ARCH, DTYPE = 80, torch.bfloat16  # no GPU of the tests' is one: the compiler decides, which is stood in for


def derive(monkeypatch, spills):
    monkeypatch.setattr(tune, "spilled_bytes", lambda kernel, config, *_: spills(kernel, config, *_))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = []
    return *tune.derive(ARCH, DTYPE, lines.append, head_dims=[64]), lines


def test_the_first_candidate_that_spills_nothing(monkeypatch):
    second = tune.CANDIDATES[2]["long_forward"][1]
    table, masked, lines = derive(
        monkeypatch, lambda kernel, config, *_: 8 if kernel == "long_forward" and config != second else 0
    )
    assert table.long_forward == {64: second}
    assert table.long_backward_dq == {64: tune.CANDIDATES[2]["long_backward_dq"][0]}
    assert masked == ({}, {}, {}, {}, {})
    assert not any("spills" in line for line in lines)


def test_a_limit_of_registers_before_smaller_tiles(monkeypatch):
    first = tune.CANDIDATES[2]["long_forward"][0]
    table, _, _ = derive(monkeypatch, lambda kernel, config, *_: 8 if config == first else 0)
    assert table.long_forward == {64: first._replace(maxnreg=255)}


def test_the_least_spill_where_all_spill_and_never_what_does_not_fit(monkeypatch):
    least = tune.CANDIDATES[2]["long_backward_dk_dv"][-1]

    def spills(kernel, config, *_):
        return 0 if kernel != "long_backward_dk_dv" else 24 if config == least else math.inf

    table, _, lines = derive(monkeypatch, spills)
    assert table.long_backward_dk_dv == {64: least}
    assert f"long_backward_dk_dv D=64: {tuple(least)}, spills 24 bytes" in lines


def test_the_short_route_ends_before_the_first_length_that_spills(monkeypatch):
    table, _, _ = derive(
        monkeypatch, lambda kernel, config, head_dim, seqlen, *_: kernel == "short_backward" and seqlen >= 64
    )
    assert table.short_forward == {64: max(tune.SHORT_LENGTHS)}
    assert table.short_backward == {64: 32}


def test_an_entry_of_its_own_where_a_mask_makes_it_spill(monkeypatch):
    first, second = tune.CANDIDATES[2]["long_forward"][:2]

    def spills(kernel, config, head_dim, seqlen, arch, dtype, masked):
        return masked and ((config and config[:4] == first[:4]) or (kernel == "short_backward" and seqlen >= 128))

    table, masked, _ = derive(monkeypatch, spills)
    assert table.long_forward == {64: first}
    assert table.short_backward == {64: 128}
    assert masked == Table({}, {64: 64}, {64: second}, {}, {})


@pytest.mark.parametrize("tables", [TABLES, MASKED])
def test_what_is_printed_is_the_table(tables):
    for (arch, size), table in tables.items():
        code = tune.as_code(arch, {2: torch.bfloat16, 4: torch.float32}[size], table)
        assert eval(f"{{{code}}}", {"Table": Table, "Config": Config}) == {(arch, size): table}


def test_only_the_kernel_in_question_is_changed():
    wanted = Config(64, 32, 4, 2)
    table = tune.table_for("long_backward_dq", wanted, 64)
    assert table.long_backward_dq == {64: wanted}
    assert table.long_forward[64] != wanted
    assert (table.short_forward, table.short_backward) == ({64: 0}, {64: 0})
    assert tune.table_for("short_forward", None, 64).short_forward == {64: max(tune.SHORT_LENGTHS)}


def test_an_architecture_that_cannot_be_compiled_for():
    done = CliRunner().invoke(app, ["tune", "--arch", "70"])
    assert isinstance(done.exception, UserError)
    assert "--arch 70: choose one of 80, 90, 100, 120" in str(done.exception)
