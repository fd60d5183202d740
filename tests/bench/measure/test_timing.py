"""The statistics that every figure rests on."""

import math

import numpy as np
import pytest
import torch
from oracle import DEVICE

from fusebert.bench.measure.serialise import to_json
from fusebert.bench.measure.statistics import Timing, ratio
from fusebert.bench.measure.timing import MIN_ROUNDS, Work, interleave


def noisy(rng, median, rounds, drift):
    """Samples with 2 % noise around ``median`` on a machine that slows down by ``drift``."""
    return tuple(median * drift * rng.normal(1.0, 0.02, rounds))


def test_median_and_spread():
    timing = Timing.of((3.0, 1.0, 2.0, 100.0, 2.5), host=(0.1,) * 5, calls=4)
    assert timing.median_ms == 2.5  # one disturbed round does not move it
    samples = tuple(np.linspace(90, 110, 101))
    assert Timing.of(samples, samples, 1).spread == pytest.approx(0.16)  # (108 − 92) / 100


def test_host_bound_is_said_where_issuing_takes_as_long_as_running():
    assert Timing.of((1.0, 1.0, 1.0), (0.99, 0.99, 0.99), 1).host_bound
    assert not Timing.of((1.0, 1.0, 1.0), (0.2, 0.2, 0.2), 1).host_bound
    assert not Timing.of((1.0, 1.0), (1.0, 1.0), 1).host_bound  # a CPU: one clock


def test_ratio_covers_the_truth_although_the_machine_drifts():
    """Taken within rounds, a drift that both suffer cancels: the interval is far narrower than the samples' spread."""
    rng = np.random.default_rng(1)
    drift = np.linspace(1.0, 3.0, 40)
    found = ratio(noisy(rng, 2.0, 40, drift), noisy(rng, 1.0, 40, drift))
    assert found.low < 2.0 < found.high
    assert found.low < found.median < found.high
    assert found.high - found.low < 0.1


def test_ratio_of_a_contestant_with_itself_is_exactly_one():
    samples = (1.0, 2.0, 3.0)
    found = ratio(samples, samples)
    assert (found.median, found.low, found.high) == (1.0, 1.0, 1.0)


def test_interval_narrows_with_rounds():
    rng = np.random.default_rng(2)
    few, many = (ratio(noisy(rng, 1.0, n, 1.0), noisy(rng, 1.0, n, 1.0)) for n in (8, 512))
    assert many.high - many.low < 0.5 * (few.high - few.low)


@pytest.mark.parametrize(("numerator", "denominator"), [((), ()), ((1.0,), (1.0, 2.0))])
def test_ratio_refuses_samples_of_different_rounds(numerator, denominator):
    with pytest.raises(ValueError, match="the same rounds"):
        ratio(numerator, denominator)


def test_interleave_alternates_and_orders_by_speed():
    """Bursts alternate round by round, in changing order; more work takes longer."""
    device = torch.device(DEVICE)
    n = 1024 if DEVICE == "cuda" else 64
    x = torch.randn(n, n, device=device)
    bursts: list[str] = []

    def repeat(name, times):
        def run(_):
            bursts.append(name)
            for _ in range(times):
                x @ x

        return Work(run)

    timings = interleave({"slow": repeat("slow", 40), "fast": repeat("fast", 1)}, device, seconds=0, calls=1)
    assert len(timings["slow"].samples_ms) == len(timings["fast"].samples_ms) == MIN_ROUNDS
    assert timings["slow"].median_ms > 4 * timings["fast"].median_ms > 0
    rounds = [tuple(bursts[-2 * i - 2 : len(bursts) - 2 * i]) for i in range(MIN_ROUNDS)]
    assert set(rounds) == {("slow", "fast"), ("fast", "slow")}


def test_calls_walk_through_the_inputs_and_preparation_is_not_timed():
    seen = []

    def prepare(index):
        if DEVICE == "cpu":
            import time

            time.sleep(0.01)
        return index

    timing = interleave({"": Work(seen.append, prepare)}, torch.device(DEVICE), seconds=0, calls=3)[""]
    assert timing.calls_per_round == 3
    assert seen[-3 * MIN_ROUNDS :] == list(range(3 * MIN_ROUNDS))
    assert timing.median_ms < 5.0  # milliseconds: not the preparation's 10


def test_context_is_entered_around_each_burst():
    import contextlib

    inside = False
    entered = []

    @contextlib.contextmanager
    def context():
        nonlocal inside
        inside = True
        entered.append(True)
        yield
        inside = False

    def run(_):
        assert inside

    interleave({"": Work(run, context=context)}, torch.device(DEVICE), seconds=0, calls=2, max_rounds=1)
    assert len(entered) >= 1
    assert not inside


def test_json_has_summary_and_samples():
    found = to_json(Timing.of((1.0, 2.0, 3.0 + 1e-9), (1.0, 2.0, 3.0 + 1e-9), 5))
    assert found["median_ms"] == 2.0
    assert found["rounds"] == 3
    assert found["calls_per_round"] == 5
    assert found["samples_ms"] == [1.0, 2.0, 3.0]
    assert math.isclose(found["p10_ms"], 1.2)
