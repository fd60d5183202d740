"""The commands, run small for real: tables, result files, exit statuses, one-line errors."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from oracle import DEVICE
from small_corpus import make_corpus
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.measure.ceilings import Ceilings, Drift, measure_ceilings
from fusebert.bench.measure.settings import KernelsOptions, StepOptions
from fusebert.bench.operators import run as kernels
from fusebert.bench.report.terminal import show
from fusebert.bench.steps import parity as train_parity
from fusebert.bench.steps import step
from fusebert.model import BertForPreTraining
from fusebert.train.batches.batch_maker import BatchMaker, fit_shape
from fusebert.train.batches.dataset import PackedExamples
from fusebert.train.batches.loader import batches
from fusebert.train.corpus.reader import Corpus
from fusebert.train.errors import UserError

SMALL = ["--model", "tiny", "--tokens", "256", "--seqlen", "64", "--vocab-size", "512", "--device", DEVICE]


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def assert_environment(result):
    found = result["environment"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"] == DEVICE
    assert len(found["source_sha256"]) == 64
    assert ("gpu" in found) == (DEVICE == "cuda")


@pytest.fixture(scope="module")
def quick_kernels(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "kernels.json"
    done = invoke("kernels", "--quick", "--out", out, "--device", DEVICE)
    return done, json.loads(out.read_text())


def test_kernels_table(quick_kernels):
    done, result = quick_kernels
    assert done.exit_code == 0, done.output
    for op in kernels.OPERATORS:
        assert op in done.output
    for word in ("error", "× torch", "median", "spread", "time / ours", "roofline", "measured ceilings", "fusebert"):
        assert word in done.output
    assert ("CPU path" in done.output) == (DEVICE == "cpu")
    assert "pip install liger-kernel" in done.output or result["environment"]["versions"]["liger-kernel"]


def test_kernels_json(quick_kernels):
    _, result = quick_kernels
    assert (result["schema"], result["kind"]) == (1, "kernels")
    assert_environment(result)
    assert result["ceilings"]["copy_bytes_per_s"] > 1e8
    assert result["ceilings"]["matmul_flops_per_s"] > 1e8
    assert {measured["op"] for measured in result["results"]} == set(kernels.OPERATORS)
    for measured in result["results"]:
        assert measured["pass"] in ("forward", "inference", "backward", "forward+backward")
        assert measured["bytes"] > 0
        assert measured["floor_ms"] > 0
        ours = measured["contestants"][0]
        assert ours["role"] == "ours"
        assert ours["verdict"]["status"] == "right"
        assert ours["ratio_to_ours"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        for row in measured["contestants"]:
            if "timing" in row:
                timing = row["timing"]
                assert timing["p10_ms"] <= timing["median_ms"] <= timing["p90_ms"]
                assert len(timing["samples_ms"]) == timing["rounds"] >= 7
                assert row["roofline"] == pytest.approx(measured["floor_ms"] / timing["median_ms"])
                assert row["ratio_to_ours"]["low"] <= row["ratio_to_ours"]["median"] <= row["ratio_to_ours"]["high"]
                assert (row["peak_bytes"] is None) == (DEVICE == "cpu")
            else:
                assert row["verdict"]["detail"]


def test_costs_are_the_stated_ones():
    """BERT-base at N = 128, 64 k tokens: 4 N² D a head forward, 10 backward; four and seven tensors of T·H·D."""
    case = next(c for c in kernels.select_cases("attention", torch.device(DEVICE), torch.bfloat16, quick=True))
    shape = case.shape
    assert shape["longest"] == 128
    pairs = shape["segments"] * 128**2 * shape["heads"] * 64
    size = 2 * shape["tokens"] * shape["heads"] * 64
    assert case.passes["forward"].flops == 4 * pairs
    assert case.passes["forward"].bytes == 4 * size
    assert case.passes["forward+backward"].flops == 14 * pairs
    assert case.passes["forward+backward"].bytes == 11 * size
    floor = case.passes["forward+backward"].floor(Ceilings(4e12, 8e14, "bfloat16"))
    # Intensity 14 · 128 / 22 = 81 FLOPs a byte, below the ridge of 200: memory is the limit.
    assert floor.limit == "memory"
    assert floor.floor_ms == pytest.approx(1e3 * 11 * size / 4e12)


def test_most_valuable_cases_first_and_what_is_left_out_is_named(monkeypatch, tmp_path, capsys):
    """With no time at all the first case runs, and the others are named."""
    ran = []
    monkeypatch.setattr(kernels, "run_case", lambda case, *_, **__: ran.append(case) or [])
    monkeypatch.setattr(kernels, "measure_ceilings", lambda *_, **__: Ceilings(1.0, 1.0, "float32"))
    monkeypatch.setattr(kernels, "measure_drift", lambda *_: Drift(1.0, 1.0))
    device = torch.device(DEVICE)
    options = KernelsOptions(dtype="float32", minutes=1e-9, out=tmp_path / "x.json")
    result = kernels.run(options, device, show=show)
    everything = kernels.select_cases(None, device, torch.float32, quick=False)
    assert [case.value for case in everything] == sorted(case.value for case in everything)
    assert len(ran) + len(result.left_out) == len(everything)
    assert len(result.left_out) >= 1
    assert result.left_out[-1] in capsys.readouterr().out.splitlines()[-1]
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["kernels", "--op", "softmax"], "choose one of attention, layernorm, mlm_loss"),
        (["kernels", "--device", "cuda:99"], "give --device cpu"),
        (["kernels", "--device", "nonsense"], "no such device"),
        (["kernels", "--dtype", "int8"], "choose one of bf16, fp16, fp32"),
        (["step", "--dtype", "fp16"], "choose one of bf16, fp32"),
        (["step", "--model", "huge", "--device", "cpu"], "there is no preset 'huge'"),
        (["step", "--seqlen", "4", "--device", "cpu"], "seqlen must be in"),
        (["parity", "--steps", "2", "--device", "cpu"], "steps must be above 3"),
    ],
)
def test_bad_options(args, message):
    done = invoke(*args)
    assert done.exit_code != 0
    assert isinstance(done.exception, UserError | ValueError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_step(tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "step.json"
    done = invoke("step", "--quick", "--ragged", "--out", out, *SMALL)
    assert done.exit_code == 0, done.output
    assert "tokens/s" in done.output
    assert "MFU" in done.output
    result = json.loads(out.read_text())
    assert result["kind"] == "step"
    assert_environment(result)
    assert 0.2 < result["batch"]["padding_for_transformers"] < 0.8
    rows = {row["name"]: row for row in result["contestants"]}
    assert {"fusebert", "transformers", "transformers, masked rows only"} <= set(rows)
    for name in ("fusebert", "transformers", "transformers, masked rows only"):
        row = rows[name]
        assert row["verdict"]["status"] == "right", row
        tokens = result["batch"]["tokens"]
        assert row["tokens_per_s"] == pytest.approx(tokens / (1e-3 * row["timing"]["median_ms"]))
        share = result["batch"]["flops"] / tokens * row["tokens_per_s"] / result["ceilings"]["matmul_flops_per_s"]
        assert row["mfu"] == pytest.approx(share)
    assert "Our step by operator" in done.output
    operators = result["profile"]["operators"]
    assert sum(row["share"] for row in operators) == pytest.approx(1.0)
    assert 0 < result["profile"]["operator_ms"] <= result["profile"]["ms"]


def test_step_times_fp8_where_it_runs(monkeypatch):
    """As one more of ours, never the one that the others are compared with."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(step, "fp8_obstacle", lambda device: None)  # a CPU multiplies it too, slowly
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    sizes = {"model": "tiny", "tokens": 64, "seqlen": 32, "vocab_size": 64}
    multiplied = []
    scaled_mm = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kw: multiplied.append(1) or scaled_mm(*args, **kw))
    for dtype, timed in (("float32", False), ("bfloat16", True)):
        options = StepOptions(**sizes, compute_dtype=dtype, quick=True)
        result = step.run(options, torch.device(DEVICE), show=lambda _: None)
        rows = {row.name: row for row in result.contestants}
        assert ("fusebert, fp8" in rows) == bool(multiplied) == timed
    row = rows["fusebert, fp8"]
    assert row.verdict.status == "unchecked"
    assert row.time.timing.median_ms > 0
    assert rows["fusebert"].time.ratio_to_ours.median == 1.0
    assert not result.problems


def test_step_on_a_prepared_corpus(tmp_path):
    """Its vocabulary, its lengths: the batch that a run on it would begin with."""
    pytest.importorskip("transformers")
    corpus = make_corpus(tmp_path)
    out = tmp_path / "step.json"
    sizes = ["--model", "tiny", "--tokens", "256", "--seqlen", "32", "--device", DEVICE]
    done = invoke("step", "--quick", "--data", corpus, "--out", out, *sizes)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    opened = Corpus.open(corpus)
    assert result["settings"]["vocab_size"] == opened.vocab_size
    assert result["settings"]["data"] == str(corpus)
    shape = fit_shape(opened.split("train"), 256, 32)
    drawn = itertools.islice(
        batches(PackedExamples(BatchMaker(opened, "train", shape), seed=0), num_workers=0), step.BATCHES
    )
    assert result["batch"]["tokens"] == sum(batch.num_tokens for batch in drawn) / step.BATCHES
    assert result["batch"]["padding_for_transformers"] > 0


def test_a_step_that_computes_something_else_is_not_timed(monkeypatch):
    """Ours without the pair loss: the gradient is off, the run fails."""
    pytest.importorskip("transformers")
    forward = BertForPreTraining.forward

    def forgetful(self, batch):
        out = forward(self, batch)
        return out._replace(nsp_loss_sum=out.nsp_loss_sum.detach())

    monkeypatch.setattr(BertForPreTraining, "forward", forgetful)
    done = invoke("step", "--quick", *SMALL)
    assert done.exit_code == 1
    assert "fusebert is wrong" in done.output
    assert "WRONG" in done.output


def test_parity(tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "parity.json"
    pytest.importorskip("matplotlib")
    plot = tmp_path / "new" / "losses.png"
    done = invoke("parity", "--steps", "6", "--dtype", "fp32", "--out", out, "--plot", plot, *SMALL)
    assert done.exit_code == 0, done.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "the same run" in done.output
    result = json.loads(out.read_text())
    assert_environment(result)
    losses = {name: run["losses"] for name, run in result["runs"].items()}
    assert set(losses) == {"fusebert", "transformers"}
    assert all(len(x) == 6 for x in losses.values())
    assert losses["fusebert"][0] == pytest.approx(math.log(512) + math.log(2), rel=0.1)  # nothing is known yet
    assert result["verdict"]["largest_drift"] < 1e-3


def test_parity_notices_another_run():
    oracle = [10.0, 9.0, 8.0]
    assert train_parity.compare(oracle, oracle, None).right
    assert not train_parity.compare([10.0, 9.0, 8.02], oracle, None).right  # 2.5e-3 at one step
    theirs = [10.01, 8.99, 8.01]
    assert train_parity.compare([9.99, 9.01, 8.02], oracle, theirs).right
    assert not train_parity.compare([10.05, 9.05, 8.05], oracle, theirs).right
    assert not train_parity.compare([10.0, np.nan, 8.0], oracle, theirs).right


def test_ceilings_are_positive_and_matmul_counts_its_dtype():
    found = measure_ceilings(torch.device(DEVICE), torch.float32, quick=True)
    assert found.dtype == "float32"
    assert found.copy_bytes_per_s > 0 < found.matmul_flops_per_s
