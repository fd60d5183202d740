"""``fusebert bench predict`` of a small step: its launches, FLOPs and bytes against formulas."""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

from compiled import environment
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.measure.result import PredictResult, read_result
from fusebert.bench.steps.batches import random_batches
from fusebert.bench.steps.contestants import preset
from fusebert.train.step.flops import batch_flops

TOKENS, SEQLEN, HIDDEN, HEADS = 256, 128, 128, 2  # of `tiny`, which has 2 layers
SEGMENTS = TOKENS // SEQLEN


@functools.cache
def predicted(gpu="h100", seqlen=SEQLEN):
    """The result, by a process in which Triton compiles."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predict.json"
        command = [sys.executable, "-m", "fusebert.bench.cli", "predict", "--model", "tiny", "--out", str(path)]
        command += ["--gpu", gpu, "--tokens", str(TOKENS), "--seqlen", str(seqlen), "--vocab-size", "1000"]
        ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert "Predicted from the code" in ran.stdout
        return read_result(path, PredictResult)


def kernel(call, name):
    return next(row for row in predicted().kernels if (row.call, row.kernel) == (call, name))


def test_no_kernel_is_refused():
    assert {row.kernel: row.refused for row in predicted().kernels if row.refused} == {}
    assert predicted().step is not None


@pytest.mark.slow
@pytest.mark.parametrize("seqlen", [SEQLEN, 256])
@pytest.mark.parametrize("gpu", ["a100", "b200", "rtx-pro-6000"])
def test_no_kernel_is_refused_on_other_architectures(gpu, seqlen):
    """Short and long attention; on B200 its products are in tensor memory."""
    found = predicted(gpu, seqlen)
    assert {row.kernel: row.refused for row in found.kernels if row.refused} == {}
    assert found.step is not None
    products = sum(row.flops for row in found.kernels if "attn_short" in row.kernel or "attn_long" in row.kernel)
    assert products >= 14 * TOKENS * seqlen * HIDDEN  # of the first layer; the last one multiplies fewer rows


def test_flops_of_the_products():
    """The model's count but for attention's part; the batch's read rows have a few slots to spare."""
    config = preset("tiny", 1000, seqlen=SEQLEN, dropout=0.1)
    (batch,) = random_batches(1000, TOKENS, SEQLEN, 1)
    read_rows = batch.num_masked + batch.num_pairs
    attention = 12 * HIDDEN * (SEGMENTS * SEQLEN**2 + read_rows * SEQLEN)
    expected = batch_flops(config, batch) - attention
    assert sum(row.flops for row in predicted().others) == pytest.approx(expected, rel=0.01)


def test_flops_of_attention():
    """Two products forward, five backward; both layers multiply whole tiles."""
    pairs = SEGMENTS * SEQLEN**2 * HIDDEN
    for call in ("attention_qkv", "attention"):
        forward = kernel(call, "attn_short_forward")
        backward = kernel(f"{call}_backward", "attn_short_backward")
        assert forward.launches == backward.launches == 1
        assert forward.programs == (SEGMENTS + 2) * HEADS  # of an unused segment and of the rows after the last, too
        assert (forward.flops, backward.flops) == (4 * pairs, 10 * pairs)


def test_bytes_of_dropout_add_layernorm():
    """x and the residual are read, s and y are written, 2 bytes an element; vectors and statistics are small."""
    row = kernel("dropout_add_layernorm", "layernorm_forward")
    assert row.launches == 2  # the first layer's; the last layer computes fewer rows
    activations = 4 * 2 * TOKENS * HIDDEN
    assert activations < row.hbm_bytes < 1.05 * activations


def test_sums():
    found = predicted()
    step = found.step
    assert step.launches == sum(row.launches for row in found.kernels) + sum(row.calls for row in found.others)
    assert step.kernels_bound_us == pytest.approx(sum(row.launches * max(row.us.values()) for row in found.kernels))
    assert step.floor_us < step.best_us < step.worst_us
    for row in found.kernels:
        assert row.roofline_us <= row.bound_us * (1 + 1e-9) <= row.sum_us * (1 + 1e-9), row.kernel


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--gpu", "v100"], "choose one of a100, h100"), (["--dtype", "fp32"], "only bf16 and fp16")],
)
def test_options_that_are_not_allowed(options, words):
    done = CliRunner().invoke(app, ["predict", *options])
    assert done.exit_code != 0
    assert words in str(done.exception)
