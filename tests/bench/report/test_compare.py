"""The regression gate: what is slower fails, what is only noise or the machine does not."""

import json

import bench_results as made
import numpy as np
import pytest
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.measure.statistics import Ratio, ratio_of_runs
from fusebert.bench.report.compare import compare, judge, machine_factors
from fusebert.train.errors import UserError

CASES = 6


def run_of(seed, *, ours=1.0, noise=0.02, machine=1.0, peer=1.0, rounds=30, status="right"):
    """A result of kernels: ours takes ``ours`` ms on a machine that is ``machine`` times as slow, and gets slower by a
    third within the run, which all suffer alike."""
    rng = np.random.default_rng(seed)
    results = []
    for i in range(CASES):
        drift = machine * np.linspace(1, 4 / 3, rounds)

        def samples(ms, drift=drift):
            return ms * drift * rng.normal(1, noise, rounds)

        contestants = [
            made.contestant("fusebert", "ours", samples(ours)),
            made.contestant("torch eager", "peer", samples(2.0)),
            made.contestant("sdpa", "peer", samples(1.5)),
            made.contestant("other", "peer", samples(3.0 * peer)),
        ]
        contestants[0]["verdict"]["status"] = status
        results.append(made.attention(2 ** (5 + i), contestants))
    return made.kernels(results)


def compared(old, new):
    return compare(made.typed(old), made.typed(new))


def verdicts(old, new):
    return {finding.verdict for finding in compared(old, new)[0]}


def gate(tmp_path, old, new, *options):
    paths = []
    for name, result in (("old", old), ("new", new)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(result))
    return CliRunner().invoke(app, ["compare", *map(str, paths), *options])


def test_the_same_file_passes_with_ratio_one(tmp_path):
    done = gate(tmp_path, run_of(0), run_of(0))
    assert done.exit_code == 0, done.output
    assert done.output.count("1.00 [") == CASES
    assert f"passed: {CASES} compared" in done.output


def test_ten_percent_slower_fails(tmp_path):
    done = gate(tmp_path, run_of(0), run_of(1, ours=1.1))
    assert done.exit_code == 1, done.output
    assert f"FAILED: {CASES} compared: {CASES} slower" in done.output


def test_a_larger_threshold_lets_it_pass(tmp_path):
    assert gate(tmp_path, run_of(0), run_of(1, ours=1.1), "--threshold", "0.2").exit_code == 0


def test_one_slower_case_among_many_fails(tmp_path):
    new = run_of(1)
    new["results"][2] = run_of(1, ours=1.1)["results"][2]
    done = gate(tmp_path, run_of(0), new)
    assert done.exit_code == 1
    assert "1 slower" in done.output


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_noise_alone_never_fails(noise):
    """Twelve pairs of runs of six cases: at 2.5 % a comparison, about two of the 72 would fail."""
    for seed in range(12):
        old, new = (run_of(seed + 100 * i, noise=noise, rounds=9) for i in (1, 2))
        assert "slower" not in verdicts(old, new), seed


def test_too_noisy_to_tell_is_said(tmp_path):
    done = gate(tmp_path, run_of(0, noise=0.3), run_of(1, noise=0.3))
    assert done.exit_code == 0
    assert "unclear" in done.output
    assert "measure longer" in done.output


def test_faster_passes():
    assert verdicts(run_of(0), run_of(1, ours=0.8)) == {"faster"}


def test_a_slower_machine_is_divided_out():
    findings, _ = compared(run_of(0), run_of(1, machine=1.5))
    for finding in findings:
        assert finding.verdict in ("same", "unclear")
        assert finding.ratio.median == pytest.approx(1, rel=0.02)
        assert finding.machine == pytest.approx(1.5, rel=0.03)
        assert finding.new_ms == pytest.approx(1.5 * finding.old_ms, rel=0.05)


def test_a_slowdown_hidden_by_a_faster_machine_is_found():
    assert verdicts(run_of(0), run_of(1, ours=1.2, machine=0.8)) == {"slower"}


@pytest.mark.parametrize("peer", [0.5, 2.0])
def test_one_peer_that_changed_does_not_matter(peer):
    findings, _ = compared(run_of(0), run_of(1, peer=peer))
    for finding in findings:
        assert finding.verdict in ("same", "unclear")
        # Of three with one that is always the largest, the median is the larger of two: half a noise too much.
        assert finding.ratio.median == pytest.approx(1, rel=0.04)


def test_other_versions_are_not_divided_out():
    new = run_of(1, machine=1.5)
    new["environment"]["versions"]["torch"] = "10.0"
    findings, remarks = compared(run_of(0), new)
    assert {finding.verdict for finding in findings} == {"slower"}
    assert all(finding.machine is None for finding in findings)
    assert any("torch 9.9.9 → 10.0" in remark for remark in remarks)


def test_without_peers_times_are_compared_as_they_are():
    old, new = run_of(0), run_of(1)
    for result in (old, new):
        for each in result["results"]:
            each["contestants"] = each["contestants"][:1]
    findings, remarks = compared(old, new)
    assert all(finding.machine is None and finding.ratio is not None for finding in findings)
    assert any("no peer was timed" in remark for remark in remarks)


@pytest.mark.parametrize("status", ["wrong", "failed", "coarse"])
def test_what_was_right_and_is_not_any_more_fails(tmp_path, status):
    new = run_of(0)
    ours = new["results"][0]["contestants"][0]
    ours["verdict"] = made.verdict(status, "dq is 9.0 times as far")
    if status != "coarse":
        del ours["timing"]
    done = gate(tmp_path, run_of(0), new)
    assert done.exit_code == 1, done.output
    assert f"was right, is {status}: dq is 9.0 times as far" in done.output


def test_what_was_wrong_already_is_not_a_regression():
    old, new = run_of(0), run_of(0)
    for result in (old, new):
        ours = result["results"][0]["contestants"][0]
        ours["verdict"] = made.verdict("wrong", "x")
        del ours["timing"]
    assert verdicts(old, new) == {"same", "not compared"}


def test_a_wrong_peer_is_not_ours():
    old, new = run_of(0), run_of(0)
    new["results"][0]["contestants"][1] = made.contestant("torch eager", "peer", None)
    assert verdicts(old, new) == {"same"}


def test_missing_cases_and_other_shapes_are_named():
    old, new = run_of(0), run_of(0)
    del new["results"][0], old["results"][5]
    new["results"][0]["shape"]["heads"] = 16
    findings, remarks = compared(old, new)
    assert len(findings) == CASES - 3
    assert any("N=32 " in line and "the new file lacks it" in line for line in remarks)
    assert any("N=1024 " in line and "the old file lacks it" in line for line in remarks)
    assert any("N=64 " in line and "heads 4 → 16" in line for line in remarks)


def another_gpu(result):
    result["environment"]["gpu"]["name"] = "Another GPU"


def on_a_cpu(result):
    result["environment"] = made.environment("cpu")


def nothing_in_common(result):
    for each in result["results"]:
        each["dtype"] = "float16"


def no_results(result):
    result["results"] = []


def cut_off(result):
    del result["environment"]["versions"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_gpu, "GPU was Made-up GPU and is Another GPU"),
        (on_a_cpu, "device was cuda and is cpu"),
        (nothing_in_common, "no pass in common"),
        (no_results, "no pass in common"),
        (cut_off, "not a whole kernels result: environment.versions is missing"),
    ],
)
def test_what_can_not_be_compared_is_an_error(tmp_path, change, message):
    new = run_of(0)
    change(new)
    done = gate(tmp_path, run_of(0), new)
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_other_kinds_are_an_error(tmp_path):
    done = gate(tmp_path, run_of(0), made.parity())
    assert "holds a result of kind 'train_parity'; this command takes kernels, predict, predict_op, step, train" in str(
        done.exception
    )
    step = made.step([made.contestant("fusebert", "ours", [1.0, 1.0])])
    with pytest.raises(UserError, match="the old file holds kernels, the new one step"):
        compared(run_of(0), step)


def steps(ours, **settings):
    rng = np.random.default_rng(int(1000 * ours))
    contestants = [
        made.contestant("fusebert", "ours", ours * rng.normal(1, 0.01, 20)),
        made.contestant("transformers", "peer", 3 * rng.normal(1, 0.01, 20)),
    ]
    return made.step(contestants, **settings)


def test_steps_are_compared_too(tmp_path):
    assert gate(tmp_path, steps(1.0), steps(1.001)).exit_code == 0
    assert gate(tmp_path, steps(1.0), steps(1.1)).exit_code == 1
    with pytest.raises(UserError, match="no pass in common"):
        compared(steps(1.0), steps(1.0, model="base"))
    with pytest.raises(UserError, match="vocab_size 30522 → 100"):
        compared(steps(1.0), steps(1.0, vocab_size=100))


def trainings(ours):
    rng = np.random.default_rng(int(1000 * ours))
    return made.train({"fusebert": ours * rng.normal(1, 0.01, 20), "transformers": 3 * rng.normal(1, 0.01, 20)})


def test_training_runs_are_compared_by_their_turns(tmp_path):
    assert gate(tmp_path, trainings(1.0), trainings(1.001)).exit_code == 0
    assert gate(tmp_path, trainings(1.0), trainings(1.1)).exit_code == 1


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.04, 1.2, "slower"), (1.02, 1.2, "unclear"), (0.8, 1.02, "same"), (0.8, 0.96, "faster"), (0.9, 1.5, "unclear")],
)
def test_verdicts_of_an_interval(low, high, verdict):
    assert judge(Ratio((low + high) / 2, low, high), 0.03) == verdict


def test_the_interval_covers_the_truth():
    """Nominally 95 % of them; a bootstrap of the median of few rounds is known to fall somewhat short."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        found = ratio_of_runs(rng.normal(1, 0.05, 15), 1.1 * rng.normal(1, 0.05, 15))
        covered += found.low <= 1.1 <= found.high
    assert covered >= 176


def test_machine_factors():
    """Peers of 2 and 3 ms; a third that went mad in one round. In the new file everything takes twice as long."""
    old = [np.array([2.0, 2.0, 2.0]), np.array([3.0, 3.0, 3.0]), np.array([5.0, 500.0, 5.0])]
    before, after = machine_factors([(x, 2 * x) for x in old])
    assert before.tolist() == [1, 1, 1]
    assert after.tolist() == [2, 2, 2]
