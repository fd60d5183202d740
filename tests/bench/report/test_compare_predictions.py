"""The gate on predictions: what was compiled to more work fails, without a GPU and without noise."""

import copy
import json

import bench_results as made
import pytest
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.report.compare_predictions import compare_predictions
from fusebert.bench.report.sections import section
from fusebert.bench.report.terminal import show


def changed(**changes):
    """A prediction in which the first kernel has other values."""
    result = made.predict()
    result["kernels"][0] |= changes
    return result


def gate(tmp_path, old, new, *options):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, result in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(result))
    return CliRunner().invoke(app, ["compare", *map(str, paths), *options])


def test_the_same_code_passes(tmp_path):
    done = gate(tmp_path, made.predict(), made.predict())
    assert done.exit_code == 0, done.output
    assert (
        "passed: 11 predicted quantities compared, 0 worse" in done.output
    )  # 3 kernels · 3, spills are 0; the step's 2


def test_ten_per_cent_more_issue_slots_fail(tmp_path):
    done = gate(tmp_path, made.predict(), changed(issue_slots=1100.0))
    assert done.exit_code == 1
    assert "attention_qkv: attn_short_forward 1" in done.output
    assert "1.100" in done.output
    assert gate(tmp_path, changed(issue_slots=1100.0), made.predict()).exit_code == 0
    assert gate(tmp_path, made.predict(), changed(issue_slots=1100.0), "--threshold", "0.2").exit_code == 0


def test_a_spill_fails(tmp_path):
    done = gate(tmp_path, made.predict(), changed(spill_bytes=8))
    assert done.exit_code == 1
    assert "spill_bytes" in done.output


def test_a_longer_time_of_a_resource_fails():
    us = {**made.predict()["kernels"][0]["us"], "shared": 4.4}
    changes, _ = compare_predictions(made.typed(made.predict()), made.typed(changed(us=us)), 0.03)
    worse = {(change.name, change.quantity) for change in changes if change.verdict == "slower"}
    name = "attention_qkv: attn_short_forward 1"
    assert worse == {(name, "bound_us"), (name, "sum_us")}


def test_a_kernel_that_can_no_longer_be_counted_fails(tmp_path):
    done = gate(tmp_path, made.predict(), changed(refused="a branch depends on data", us={}))
    assert done.exit_code == 1
    assert "a branch depends on data" in done.output


def test_a_kernel_in_one_file_only_is_named(tmp_path):
    new = made.predict()
    new["kernels"][2]["kernel"] = "attn_long_backward_dq"
    done = gate(tmp_path, made.predict(), new)
    assert done.exit_code == 0
    assert "not compared: attention_qkv: attn_short_backward 1: the new file lacks it" in done.output
    assert "not compared: attention_qkv: attn_long_backward_dq 1: the old file lacks it" in done.output


@pytest.mark.parametrize("key", ["settings", "about"])
def test_another_shape_or_gpu_is_not_compared(tmp_path, key):
    new = copy.deepcopy(made.predict())
    if key == "settings":
        new["settings"]["seqlen"] = 512
    else:
        new["about"]["gpu"]["copy_bytes_per_s"] = 4e12
    done = gate(tmp_path, made.predict(), new)
    assert done.exit_code != 0
    assert "not comparable" in str(done.exception)


def test_what_is_shown(capsys):
    result = made.typed(made.predict())
    show(result)
    printed = capsys.readouterr().out
    assert "Predicted from the code" in printed
    assert "nothing overlaps" in printed
    kernels, others, sums = (block for block in section(result).blocks if block.kind == "table")
    # The slow kernel: bound by issue, 8 of a roofline of 4 µs; sum: 8 instructions, 3 others, 4 of HBM.
    slow = [cell.text for cell in kernels.rows[0].cells]
    assert slow[-5:] == ["8.0", "15.0", "issue", "50 %", "27 %"]
    assert [cell.text for cell in others.rows[0].cells][:2] == ["mm 1 × 2 × 3", "2"]
    rates = {row.cells[0].text: row.cells[3].text for row in sums.rows}
    assert rates["step, all overlap"] == "40,000,000"  # 10,000 tokens in 250 µs
    assert rates["step, nothing overlaps"] == "35,714,286"
