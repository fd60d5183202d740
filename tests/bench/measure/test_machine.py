"""The clocks seen during a run, through a stand-in for nvidia-smi."""

import stat
import time
from types import SimpleNamespace

import pytest
import torch

from fusebert.bench.measure.machine import Clocks, Range, summarise_clocks


def test_summary_of_samples():
    found = summarise_clocks(
        ["1980, 2619, 40, 300.5, 0x0000000000000000", "1500, 2619, 60, 700.0, 0x0000000000000004", ""]
    )
    assert found.samples == 2
    assert found.sm == Range(1500.0, 1740.0, 1980.0)
    assert found.power.max == 700.0
    assert found.throttled == 0.5  # 4: the power limit
    line = found.describe()
    assert "SM 1500 to 1980 MHz" in line
    assert "HELD DOWN by the driver in 50 %" in line


@pytest.mark.parametrize("reasons", ["0x0", "0x1", "0x2", "0x10"])
def test_idle_and_set_clocks_are_no_complaint(reasons):
    found = summarise_clocks([f"1980, 2619, 40, 300.5, {reasons}"])
    assert found.throttled == 0
    assert "HELD DOWN" not in found.describe()


def test_lines_that_are_not_whole_are_left_out():
    assert summarise_clocks([]) is None
    assert summarise_clocks(["[N/A], 2619, 40, 300, 0x0", "1980, 26"]) is None


def test_sampled_while_the_block_runs_and_ended_with_it(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text(
        '#!/bin/sh\necho "$*" >"$0.arguments"\n'
        'while :; do echo "1755, 2619, 50, 400, 0x0"; echo >>"$0.samples"; sleep 0.05; done\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1"))
    samples = tmp_path / "nvidia-smi.samples"
    with Clocks(torch.device("cuda")) as seen:
        deadline = time.monotonic() + 60
        while not (samples.is_file() and samples.stat().st_size >= 2) and time.monotonic() < deadline:
            time.sleep(0.01)
        process = seen._process
    assert process.poll() is not None
    assert seen.found.samples >= 2
    assert seen.found.sm.max == 1755
    arguments = (tmp_path / "nvidia-smi.arguments").read_text()
    assert "-i GPU-1" in arguments
    assert "clocks.sm,clocks.mem" in arguments


def test_nothing_without_a_gpu_or_without_nvidia_smi(tmp_path, monkeypatch):
    with Clocks(torch.device("cpu")) as seen:
        pass
    assert seen.found is None
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    with Clocks(torch.device("cuda")) as seen:
        pass
    assert seen.found is None
