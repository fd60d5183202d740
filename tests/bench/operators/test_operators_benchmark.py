"""``pytest bench``: the cases under pytest-benchmark, comparable between runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import DEVICE

ROOT = Path(__file__).parents[3]


def run(*args):
    command = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", "-q", "--benchmark-only", *args]
    # Without the marks of a pytest-xdist worker, under which pytest-benchmark would not time.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    environment["PYTHONSAFEPATH"] = "1"
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_two_runs_compare(tmp_path):
    pytest.importorskip("pytest_benchmark")
    chosen = ["-k", "bias_gelu and T1024 and forward and not backward", f"--benchmark-storage=file://{tmp_path}"]
    if DEVICE == "cuda":
        chosen[1] = "bias_gelu and T8192 and forward and not backward"
    first = run(*chosen, "--benchmark-save=old")
    assert first.returncode == 0, first.stdout + first.stderr
    (saved,) = tmp_path.rglob("*old.json")
    found = json.loads(saved.read_text())
    names = {b["params"]["contestant_name"] for b in found["benchmarks"]}
    assert {"fusebert", "torch eager", "torch, bias in the product"} <= names
    assert len({b["group"] for b in found["benchmarks"]}) == 1
    for b in found["benchmarks"]:
        assert b["extra_info"]["bytes"] > 0
        assert b["extra_info"]["verdict"]["status"] in ("right", "coarse")
        assert b["stats"]["rounds"] >= 7

    for row in found["benchmarks"]:  # as if the old commit had been a thousand times faster
        for name in ("min", "max", "mean", "median"):
            row["stats"][name] /= 1000
    saved.write_text(json.dumps(found))
    second = run(*chosen, "--benchmark-compare", "--benchmark-compare-fail=median:300%")
    assert second.returncode != 0
    assert "Performance has regressed" in second.stdout + second.stderr
    assert "fusebert" in second.stdout
