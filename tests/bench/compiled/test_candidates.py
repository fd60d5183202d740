"""``fusebert bench tune --kernels rows``: that a candidate is launched, and what is said about it."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import bench_results as made
from compiled import environment
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.compiled import candidates
from fusebert.bench.measure.prediction import KernelPrediction
from fusebert.kernels.embedding import launch as embedding
from fusebert.kernels.rows import Config
from fusebert.train.errors import UserError

PROGRAM = """
import torch
from fusebert.bench.compiled import candidates
candidates.TOKENS = 4224
(race,) = [x for x in candidates.races() if (x.kernel, x.shape) == ("embed_layernorm_backward", "H=768")]
for config in (None, race.others[0]):
    row = candidates.predicted(race, config, 90, torch.bfloat16)
    print(row.kernel, row.spill_bytes, row.programs, row.us["shared"], row.sum_us)
"""


def test_a_candidate_that_the_prediction_favours():
    """Rows that are not loaded ahead of time do not pass through shared memory."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    launched, other = (line.split() for line in ran.stdout.splitlines())
    assert launched[:3] == other[:3] == ["embed_layernorm_backward", "0", "264"]
    assert float(other[3]) < 0.8 * float(launched[3])
    assert float(other[4]) < float(launched[4])


def test_only_within_the_block():
    (race,) = (x for x in candidates.races() if x.kernel == "embed_layernorm_backward" and x.shape == "H=1024")
    before = embedding.backward_config(1024)
    with race.launched_as(Config(1, 1024, 4)):
        assert embedding.backward_config(1024) == Config(1, 1024, 4)
    with race.launched_as(None):
        assert embedding.backward_config(1024) == before


def test_every_candidate_differs_from_what_is_launched():
    for race in candidates.races():
        assert race.others, race
        assert len(set(race.others)) == len(race.others), race


def test_what_is_printed(monkeypatch):
    row = made.typed(made.predict()).kernels[0]
    assert isinstance(row, KernelPrediction)
    asked = []

    def predicted(race, config, arch, dtype):
        asked.append((race.kernel, config))
        return row

    monkeypatch.setattr(candidates, "predicted", predicted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["tune", "--kernels", "rows", "--arch", "90"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "predicted for H100 SXM, 65,536 tokens: µs if all overlaps, µs if nothing does"
    assert len(lines) - 1 == len(asked) == sum(1 + len(race.others) for race in candidates.races())
    assert lines[1] == "attn_short_forward N=128 D=64 launched:     4.0 (hbm)     8.0, 2 blocks"


def test_other_kernels_are_an_error():
    done = CliRunner().invoke(app, ["tune", "--kernels", "norms"])
    assert isinstance(done.exception, UserError)
    assert "--kernels norms: choose one of attention, rows" in str(done.exception)
