"""``fusebert bench predict --op``: an operator's passes against the formulas of its cost."""

import functools
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

from compiled import environment
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.measure.gpus import GPUS
from fusebert.bench.measure.result import OperatorPredictResult, read_result
from fusebert.bench.report.compare_predictions import compare_predictions

SHAPES = {"attention": "N=128,T=256,H=2,p=0.1; N=64,T=128,H=2", "mlm_loss": "M=64,H=128,V=1000"}
GPU = GPUS["h200"]


@functools.cache
def predicted(op):
    """The result, by a process in which Triton compiles."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predict.json"
        command = [sys.executable, "-m", "fusebert.bench.cli", "predict", "--gpu", "h200", "--op", op]
        command += ["--shapes", SHAPES[op], "--out", str(path)]
        ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert "Predicted from the code" in ran.stdout
        return read_result(path, OperatorPredictResult)


def test_passes_of_attention():
    """Two products forward and five backward of whole tiles; q, k, v and so on once through HBM."""
    found = predicted("attention")
    assert found.settings.shapes.startswith("N=128,T=256,H=2,D=64,lengths=equal,p=0.1; N=64,")
    sizes = [(128, 256, "forward"), (128, 256, "backward"), (64, 128, "forward"), (64, 128, "backward")]
    for row, (n, tokens, which) in zip(found.passes, sizes, strict=True):
        assert row.which == which
        (kernel,) = row.kernels
        products, tensors = (2, 4) if which == "forward" else (5, 7)
        flops, moved = 2 * products * 64 * 2 * tokens * n, tensors * tokens * 2 * 64 * 2
        assert kernel.flops == flops
        assert moved < kernel.hbm_bytes < 1.2 * moved
        assert row.floor_us == pytest.approx(1e6 * max(flops / GPU.matmul_flops_per_s, moved / GPU.copy_bytes_per_s))
        assert row.floor_us < row.bound_us < row.sum_us
        assert (row.bound_us, row.limiter, row.launches) == (kernel.bound_us, kernel.limiter, 1)


@pytest.mark.slow
def test_the_command_of_the_document(tmp_path):
    """FLOPs of whole tiles, but for two programs in a hundred that have no rows."""
    text = (Path(__file__).parents[3] / "docs" / "step.md").read_text(encoding="utf-8")
    line = next(line.strip() for line in text.splitlines() if line.startswith("    fusebert bench predict --op"))
    path = tmp_path / "predict.json"
    command = [sys.executable, "-m", "fusebert.bench.cli", *shlex.split(line)[2:], "--out", str(path)]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    forward, backward = read_result(path, OperatorPredictResult).passes
    pairs = 12 * 65536 * 512 * 64
    assert forward.kernels[0].flops == pytest.approx(4 * pairs, rel=0.02)
    assert sum(row.flops for row in backward.kernels) == pytest.approx(14 * pairs, rel=0.02)


def test_a_forward_that_computes_gradients_is_one_pass():
    (row,) = predicted("mlm_loss").passes
    assert row.which == "forward+backward"
    m, h, v = 64, 128, 1000
    assert sum(each.flops for each in row.others) == pytest.approx(3 * 2 * m * h * v, rel=0.05)  # V is rounded up
    assert row.bound_us == row.others_us + sum(each.launches * each.bound_us for each in row.kernels)


def test_equal_predictions_compare_as_the_same():
    found = predicted("attention")
    changes, remarks = compare_predictions(found, found, 0.01)
    assert {change.verdict for change in changes} == {"same"}
    assert len({change.name for change in changes}) == 4  # kernels of two shapes are told apart
    assert remarks == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--op", "softmax"], "choose one of attention, layernorm"),
        (["--op", "attention", "--shapes", "B=4"], "there is no key 'B'"),
        (["--op", "attention", "--seqlen", "512"], "--seqlen is a step's"),
        (["--op", "attention", "--gpu", "v100"], "choose one of a100, h100"),
        (["--shapes", "N=512"], "give --op"),
    ],
)
def test_options_that_are_not_allowed(options, words):
    done = CliRunner().invoke(app, ["predict", *options])
    assert done.exit_code != 0
    assert words in str(done.exception)
