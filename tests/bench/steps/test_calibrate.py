"""``fusebert bench calibrate``: what is written, in which order, and what a failing kernel does. A made-up clock."""

import dataclasses
import json

import bench_results as made
import pytest
import torch

pytest.importorskip("triton")

from fusebert.bench.compiled.aot import Launch
from fusebert.bench.measure.ceilings import Ceilings
from fusebert.bench.measure.result import CalibrationResult, read_result
from fusebert.bench.measure.settings import CalibrateOptions
from fusebert.bench.measure.statistics import Timing
from fusebert.bench.steps import calibrate
from fusebert.train.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "capability", "given", "found"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "auto", "h100"),
        ("NVIDIA H200", (9, 0), "auto", "h200"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "auto", "a100"),
        ("NVIDIA B200", (10, 0), "auto", "b200"),
        ("NVIDIA H20", (9, 0), "h100", "h100"),
    ],
)
def test_the_rates_of_a_gpu(monkeypatch, device, capability, given, found):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert calibrate.rates_of(torch.device("cuda"), given) == found


@pytest.mark.parametrize(
    ("device", "given", "words"),
    [
        ("cpu", "auto", "no GPU to measure on"),
        ("cuda", "auto", "no rates for NVIDIA L4: give the nearest as --gpu, a100, h100"),
        ("cuda", "v100", "--gpu v100: choose one of auto, a100"),
        ("cuda", "h100", "H100 SXM is sm_90, NVIDIA L4 sm_89"),
    ],
)
def test_gpus_that_cannot_be_calibrated(monkeypatch, device, given, words):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    with pytest.raises(UserError, match=words):
        calibrate.rates_of(torch.device(device), given)


class Function:
    """Stands for a Triton function."""

    def __init__(self, error=None):
        self.error, self.calls = error, 0

    def __getitem__(self, grid):
        def run(**arguments):
            if self.error:
                raise self.error
            self.calls += 1

        return run


@pytest.fixture
def stand_ins(monkeypatch):
    """A prediction of three kernels, the second of which takes most of a step and the third fails; 12 µs a call."""
    prediction = made.typed(made.predict())
    functions = [Function(), Function(), Function(RuntimeError("out of\nmemory"))]
    first, _, slow = prediction.kernels
    kernels = [
        dataclasses.replace(first, launches=1),
        dataclasses.replace(slow, launches=9),
        dataclasses.replace(first, launches=2, call="failing"),
    ]

    def predicted(options, gpu, *, show, keep):
        for function in functions:
            keep(Launch(None, "", (1,), function, {"x_ptr": torch.empty(8)}, {}))
        return dataclasses.replace(prediction, kernels=kernels)

    def interleave(works, device, **options):
        for work in works.values():
            for i in range(3):
                work.run(work.prepare(i))
        return {name: Timing.of([0.012] * 9, [0.001] * 9, 3) for name in works}

    monkeypatch.setattr(calibrate, "predicted", predicted)
    monkeypatch.setattr(calibrate, "interleave", interleave)
    monkeypatch.setattr(calibrate, "rates_of", lambda device, name: "h100")
    monkeypatch.setattr(calibrate, "l2_bytes", lambda device: 64)
    monkeypatch.setattr(calibrate, "measure_ceilings", lambda *_, **__: Ceilings(1e12, 1e14, "bfloat16"))
    return functions


def test_the_table(stand_ins, tmp_path):
    out, shown = tmp_path / "calibrate.json", []
    result = calibrate.run(CalibrateOptions(out=out), CPU, show=shown.append)
    assert read_result(out, CalibrationResult) == result
    assert result.settings.gpu == "h100"
    assert [(x.prediction.kernel, x.prediction.call) for x in result.kernels] == [
        ("attn_short_backward", "attention_qkv"),  # 9 · 15 µs, of their sums
        ("attn_short_forward", "failing"),
        ("attn_short_forward", "attention_qkv"),
    ]
    first, failed, last = result.kernels
    assert (first.over_bound.median, first.over_sum.median) == pytest.approx((12 / 8, 12 / first.prediction.sum_us))
    assert last.over_bound.median == pytest.approx(12 / 4)
    assert (failed.timing, failed.failed) == (None, "RuntimeError: out of")
    assert result.problems == ["failing: attn_short_forward: RuntimeError: out of"]
    assert [function.calls for function in stand_ins] == [3, 3, 0]
    assert shown[-1] is result


def test_what_is_cut_short_is_written(stand_ins, tmp_path, monkeypatch):
    """As by the campaign's limit, in the second kernel."""
    out = tmp_path / "calibrate.json"
    original = calibrate.timed

    def interrupted(row, replay, device):
        if row.call == "failing":
            raise KeyboardInterrupt
        return original(row, replay, device)

    monkeypatch.setattr(calibrate, "timed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate.run(CalibrateOptions(out=out), CPU, show=lambda _: None)
    content = json.loads(out.read_text())
    assert [x["prediction"]["kernel"] for x in content["kernels"]] == ["attn_short_backward"]
    assert "seconds" not in content


def test_no_kernel_begins_after_the_time(stand_ins, tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(calibrate.time, "monotonic", lambda: next(clock))
    result = calibrate.run(CalibrateOptions(minutes=0.75), CPU, show=lambda _: None)
    assert len(result.kernels) == 1
    assert result.left_out == ["failing: attn_short_forward", "attention_qkv: attn_short_forward"]
