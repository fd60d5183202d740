"""``fusebert bench tune --kernels rows``: that a candidate is launched, and what is said about it."""

import dataclasses
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
from fusebert.bench.measure.result import RaceResult, read_result
from fusebert.bench.measure.settings import TuneOptions
from fusebert.bench.measure.statistics import Timing
from fusebert.kernels.embedding import launch as embedding
from fusebert.kernels.rows import Config
from fusebert.train.errors import UserError

PROGRAM = """
import torch
from fusebert.bench.compiled import candidates
from fusebert.bench.measure.gpus import GPUS
candidates.TOKENS = 4224
(race,) = [x for x in candidates.races() if (x.kernel, x.shape) == ("embed_layernorm_backward", "H=768")]
for config in (None, race.others[0]):
    row = candidates.predicted(race, config, GPUS["h100"], torch.bfloat16)
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


@pytest.fixture
def predictions(monkeypatch):
    """Predicted sums in the order of the races: each candidate of the last race saves more than any other."""
    row = made.typed(made.predict()).kernels[0]
    numbers = [(i, j) for i, race in enumerate(candidates.races()) for j in range(1 + len(race.others))]
    rows = [dataclasses.replace(row, us=row.us | {"issue": 9000.0 - (i**3 + j if j else 0)}) for i, j in numbers]
    monkeypatch.setattr(candidates, "predictions", lambda gpu, dtype: iter(rows))
    return rows


def test_what_is_predicted_without_a_gpu(predictions, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "race.json"
    done = CliRunner().invoke(app, ["tune", "--kernels", "rows", "--arch", "90", "--out", str(out)])
    assert done.exit_code == 0, done.output
    result = read_result(out, RaceResult)
    races = candidates.races()
    assert sum(len(case.contestants) for case in result.races) == len(predictions)
    assert result.gpu == "H100 SXM"
    gains = [case.expected_gain_us for case in result.races]
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] == races[0].per_step * len(races[0].others)
    case = next(x for x in result.races if (x.kernel, x.shape) == ("attn_short_backward", "N=128 D=64"))
    others = ["M=128 N=128 warps=8 stages=1 maxnreg=128", "persistent warps=8 stages=2"]
    assert [row.config for row in case.contestants] == ["launched", *others]
    assert all(row.timing is None for row in case.contestants)
    assert f"attn_short_backward, N=128 D=64: expected gain {case.expected_gain_us:,.0f} µs a step" in done.output


def test_kernelsin_sequence_are_one_row():
    """One kernel takes the place of two: what those take together is what it is compared with."""
    one = made.typed(made.predict()).kernels[0]
    two = dataclasses.replace(one, registers=one.registers + 1, spill_bytes=8, blocks=1)
    both = candidates.in_sequence("attn_long_backward", [one, two])
    assert both.us == {name: 2 * time for name, time in one.us.items()}
    assert both.sum_us == 2 * one.sum_us
    assert (both.kernel, both.registers, both.spill_bytes, both.blocks) == ("attn_long_backward", two.registers, 8, 1)
    assert candidates.in_sequence("attn_long_backward", [one]) is one


def test_what_is_measured(predictions, monkeypatch, tmp_path):
    """With a made-up clock: each configuration is launched as itself; one that fails does not end the race."""
    launched = []

    def call(device, dtype):
        def run():
            config = embedding.backward_config(768)
            launched.append(config)
            if config == Config(1, 1024, 2):
                raise RuntimeError("does not fit")

        return run

    def interleave(works, device, **options):
        for work in works.values():
            with work.context():
                work.run(work.prepare(0))
        return {name: Timing.of([1.0 if name == "launched" else 0.5] * 7, [0.1] * 7, 3) for name in works}

    others = Config(2, 1024, 8), Config(1, 1024, 2)
    race = candidates.Race("embed", "H=768", 1, call, embedding, "backward_config", others)
    default = embedding.backward_config(768)
    monkeypatch.setattr(candidates, "races", lambda: [race])
    monkeypatch.setattr(candidates, "interleave", interleave)
    monkeypatch.setattr(candidates, "gpu_here", lambda arch: torch.device("cpu"))
    out = tmp_path / "race.json"
    result = candidates.race(TuneOptions(out=out), 90, torch.bfloat16, lambda _: None)
    assert launched == [default, *others, default, others[0]]
    (case,) = result.races
    assert [row.config for row in case.contestants] == [
        "launched",
        "M=2 H=1024 warps=8 stages=1",
        "M=1 H=1024 warps=2 stages=1",
    ]
    assert [row.ratio_to_launched and row.ratio_to_launched.median for row in case.contestants] == [1.0, 0.5, None]
    assert case.contestants[2].failed == "RuntimeError: does not fit"
    assert read_result(out, RaceResult) == result
    result = candidates.race(TuneOptions(minutes=1e-9), 90, torch.bfloat16, lambda _: None)
    assert (result.races, result.left_out) == ([], ["embed H=768"])


@pytest.mark.parametrize("option", [("--out", "x.json"), ("--minutes", "1")])
def test_options_of_a_race_alone(option):
    done = CliRunner().invoke(app, ["tune", *option])
    assert isinstance(done.exception, UserError)
    assert "--out and --minutes go with --kernels rows" in str(done.exception)


def test_other_kernels_are_an_error():
    done = CliRunner().invoke(app, ["tune", "--kernels", "norms"])
    assert isinstance(done.exception, UserError)
    assert "--kernels norms: choose one of attention, rows" in str(done.exception)
