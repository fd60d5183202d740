"""Attention's kernels as the compiler sees them, for GPUs that need not be here: every entry of the launch tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from compiled import environment

from fusebert.bench.compiled import aot, attention_cases
from fusebert.kernels import backend
from fusebert.kernels.attn import config as attention_config
from fusebert.kernels.backend import triton

RESULTS = Path(__file__).parents[3] / "bench" / "results"


def compile_attention(out: Path, *options: str):
    """(exit status, sm_<arch> -> rows) of the command that writes the tables, in processes where Triton may compile."""
    command = [sys.executable, "-m", "fusebert.bench.aot", "--heaviest", "--out", str(out), *options]
    command += ["--arch", *map(str, aot.LIMITS)]
    ran = subprocess.run(command, env=environment(), cwd=out, capture_output=True, text=True)
    assert ran.returncode in (0, 1), ran.stderr
    tables = {arch: json.loads(next(out.glob(f"*sm_{arch}.json")).read_text())["kernels"] for arch in aot.LIMITS}
    return ran.returncode, tables


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What BERT launches at 128 tokens."""
    return compile_attention(tmp_path_factory.mktemp("aot"), "--only", "attention bf16 D=64 N=128 ", "--jobs", "1")


def committed(arch: int):
    """(about, rows) of the newest table in bench/results."""
    newest = max(RESULTS.glob(f"*-aot-sm_{arch}.json"))
    table = json.loads(newest.read_text())
    return table["about"], table["kernels"]


def entries(arch: int) -> set[tuple[str, tuple[int, int], int]]:
    """(kernel, tile, BLOCK_D) of every long entry that the launcher can look up on sm_<arch>."""
    found = set()
    for dtype in (torch.bfloat16, torch.float32):
        for table in attention_cases.tables(arch, dtype):
            for kernel in ("long_forward", "long_backward_dq", "long_backward_dk_dv"):
                for head_dim, config in getattr(table, kernel).items():
                    found.add((f"attn_{kernel}", (config.block_m, config.block_n), head_dim))
    return found


# No tile of dQ in float32 at D = 256 was found on sm_120 that spills in no variant.
KNOWN_SPILLS = [
    (
        120,
        "attn_long_backward_dq",
        f"attention fp32 D=256 N=512 masked window dropout{tf32} groups=2",
        ["spills 8 bytes"],
    )
    for tf32 in ("", " tf32")
]


def check_rows(arch: int, rows: list[dict]) -> None:
    """Nothing spills, all fits, matrix instructions are the chip's, stores are wide, and no entry is missing."""
    rows = [row for row in rows if (arch, row["kernel"], row["case"], row["problems"]) not in KNOWN_SPILLS]
    wrong = [f"{row['case']}: {row['kernel']} {row['tile']}: {row['problems']}" for row in rows if row["problems"]]
    assert not wrong, "\n".join(wrong)
    rows = [row for row in rows if row["kernel"] != "attn_schedule_tiles"]  # which stores a few integers
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["blocks_per_multiprocessor"] >= 1, row
        # Tiles of few rows or columns may leave less than 16 bytes to a thread.
        few = 16 in row["tile"] or (max(row["tile"]) * 16 < 8 * 32 * row["warps"] and " D=16 " in row["case"])
        assert row["stores_128"] > 0 or few, row
    seen = {(row["kernel"], tuple(row["tile"]), int(row["case"].split("D=")[1].split()[0])) for row in rows}
    assert entries(arch) <= seen
    assert {"attn_short_forward", "attn_short_backward"} <= {row["kernel"] for row in rows}


@pytest.mark.parametrize("arch", aot.LIMITS)
def test_the_committed_table_is_whole_clean_and_of_these_kernels(arch):
    """Tests have no time to compile every variant of every entry: they read what the command wrote of these sources."""
    about, rows = committed(arch)
    assert about["attention_sources"] == attention_cases.sources(), (
        "attention's kernels or tables have changed: "
        "python -m fusebert.bench.aot --arch 80 90 100 120 --out bench/results"
    )
    rows = [row for row in rows if row["case"].startswith("attention")]
    assert {row["case"] for row in rows} == attention_cases.cases(arch).keys()
    check_rows(arch, rows)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*-aot-triton_*.json")), ids=lambda path: path.stem[11:])
def test_the_committed_tables_of_other_tritons_are_of_these_kernels(path, monkeypatch):
    """What `make aot` writes: whole, of these sources, and without spills up to D = 128."""
    table = json.loads(path.read_text())
    about, rows = table["about"], table["kernels"]
    assert about["attention_sources"] == attention_cases.sources(), (
        "attention's kernels or tables have changed: make aot"
    )
    version = tuple(map(int, about["triton"].split(".")[:2]))
    monkeypatch.setattr(backend, "triton_version", lambda: version)
    cases = attention_cases.cases(int(about["arch"].removeprefix("sm_")), heaviest=True)
    assert {row["case"] for row in rows} == {case for case in cases if "attention bf16" in case}
    assert [row["case"] for row in rows if row["spill_bytes"] and " D=256 " not in row["case"]] == []


@pytest.mark.parametrize("arch", aot.LIMITS)
def test_what_compiles_here_is_what_the_table_says(arch, compiled):
    about, rows = committed(arch)
    _, tables = compiled
    assert {row["kernel"] for row in tables[arch]} == {"attn_short_forward", "attn_short_backward"}
    assert not [row for row in tables[arch] if row["problems"] or row["spill_bytes"]]
    if about["triton"] == triton.__version__:
        assert [row for row in tables[arch] if row not in rows] == []


def test_the_status_says_whether_all_is_well(compiled):
    status, tables = compiled
    assert status == any(row["problems"] for rows in tables.values() for row in rows)


@pytest.mark.slow
def test_every_entry_compiles_as_meant(tmp_path):
    """One variant for each entry, with whatever Triton is installed."""
    _, tables = compile_attention(tmp_path, "--only", "attention")
    for arch in aot.LIMITS:
        check_rows(arch, tables[arch])


def test_what_is_compiled_for_80_also_fits_the_smaller_chips():
    """sm_86 and sm_89 run what was compiled for sm_80, of all operators, with 99 KiB of shared memory to a block."""
    _, rows = committed(80)
    assert [row for row in rows if row["shared_bytes"] > aot.LIMITS[120].shared_bytes] == []


def test_another_source_is_noticed(monkeypatch, tmp_path):
    before = attention_cases.sources()
    folder = Path(attention_config.__file__).parent
    (tmp_path / "attn").mkdir()
    for file in (folder.parent / "dropout.py", *folder.glob("*.py")):
        (tmp_path / file.relative_to(folder.parent)).write_text(file.read_text() + "# a comment\n")
    monkeypatch.setattr(attention_config, "__file__", str(tmp_path / "attn" / "config.py"))
    assert attention_cases.sources() == before
    changed = tmp_path / "attn" / "long.py"
    changed.write_text(changed.read_text().replace('float("-inf")', "-1e30", 1))
    assert attention_cases.sources() != before


def resources(**changes):
    constants = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 64, "FP32": False, "PRECISION": "ieee"}
    constants |= changes.pop("constants", {})
    fields = {"name": "attn_long_forward", "arch": 90, "num_warps": 8, "num_stages": 2, "registers": 200}
    fields |= {"spill_bytes": 0}
    fields |= {"shared_bytes": 65536, "tensor_memory_columns": 0, "instructions": {"HGMMA.64x64x16.F32": 8}}
    return aot.Resources(**(fields | changes), constants=constants)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory; there are 232448"),
        ({"instructions": {"HMMA.16816.F32": 8}}, "multiplies with HMMA, not HGMMA"),
        ({"constants": {"BLOCK_M": 32}}, "multiplies with HGMMA, not HMMA"),
        ({"name": "attn_long_backward_dk_dv", "constants": {"BLOCK_M": 32}}, None),
        ({"constants": {"FP32": True}}, "multiplies with HGMMA, not None"),
        ({"constants": {"FP32": True}, "instructions": {"FFMA": 99}}, None),
        ({"constants": {"FP32": True, "PRECISION": "tf32"}, "instructions": {"FFMA": 9}}, "multiplies with None"),
    ],
)
def test_what_counts_as_wrong(changes, words):
    found = attention_cases.problems(resources(**changes))
    assert found == [] if words is None else words in "; ".join(found)


@pytest.mark.parametrize(
    ("changes", "blocks", "by"),
    [
        ({}, 1, "registers"),
        ({"registers": 128}, 2, "registers"),
        ({"registers": 64, "shared_bytes": 120000}, 1, "shared memory"),
        ({"arch": 100, "registers": 64, "shared_bytes": 1024, "tensor_memory_columns": 256}, 2, "tensor memory"),
        ({"registers": 16, "shared_bytes": 0}, 8, "warps"),
    ],
)
def test_occupancy(changes, blocks, by):
    assert (resources(**changes).blocks_per_multiprocessor, resources(**changes).limited_by) == (blocks, by)


def test_a_new_entry_is_compiled(monkeypatch):
    """The cases come from the tables: an entry that is added brings its own."""
    before = attention_cases.cases(90, heaviest=True)
    table = attention_config.TABLES[90, 2]
    more = table._replace(**{name: {**getattr(table, name), 512: getattr(table, name)[256]} for name in table._fields})
    monkeypatch.setitem(attention_config.TABLES, (90, 2), more)
    monkeypatch.setitem(attention_config.MASKED, (90, 2), attention_config.NO_ENTRIES)
    added = attention_cases.cases(90, heaviest=True).keys() - before.keys()
    assert any("D=512 N=512 masked window dropout groups=2" in name for name in added)
