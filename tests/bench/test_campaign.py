"""bench/campaign.sh: its stages run, a failing one does not stop the next, and the summary names it."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from fusebert.bench.cli import app
from fusebert.bench.measure.result import CalibrationResult, RaceResult, read_result

ROOT = Path(__file__).parents[2]
CAMPAIGN = ROOT / "bench" / "campaign.sh"
STAGES = ["tests", "calibrate", "race", "ragged", "equal", "kernels", "parity", "tune"]
ON_CPU = [name for name in STAGES if name not in ("calibrate", "race", "tune")]
NO_GPU = [f"{name}: there is no GPU to measure on" for name in ("calibrate", "race", "tune")]


def run(*args, python=sys.executable):
    environment = os.environ | {"PYTHON": str(python)}
    command = ["bash", str(CAMPAIGN), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_syntax():
    subprocess.run(["bash", "-n", str(CAMPAIGN)], check=True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "usage"),
        (["out", "--minutes", "soon"], "--minutes must be a whole number"),
        (["out", "--fast"], "unknown option --fast"),
        (["out", "other"], "one OUT_DIR"),
        (["out", "--stages", "tests step"], "--stages: there is no stage step; choose among tests calibrate race"),
    ],
)
def test_bad_arguments(args, message, tmp_path):
    done = run(*[str(tmp_path / a) if a == "out" else a for a in args])
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_stages_fail_and_the_others_go_on(tmp_path):
    """Without a working pip and with failing benchmarks: sources on the path, five statuses, exit status 1."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
  *"-m pip"*) echo "no pip" >&2; exit 1 ;;
  *"-m pytest"*) echo "3 passed"; exit 0 ;;
  *"fusebert.bench.cli parity"*) echo "parity ran"; exit 0 ;;
  *fusebert.bench.cli*) echo "broken"; exit 7 ;;
esac
exec "{sys.executable}" "$@"
"""
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    done = run(tmp_path / "out", "--quick", python=python)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "pip could not install the sources" in done.stdout
    assert '"source_sha256"' in done.stdout  # the environment was read for real, from the sources on the path
    assert done.stdout.splitlines()[-5:] == [
        line
        for line in done.stdout.splitlines()
        if line.startswith(
            ("tests: passed", "ragged: FAILED", "equal: FAILED", "kernels: FAILED (7)", "parity: passed")
        )
    ]
    summary = json.loads((tmp_path / "out" / "campaign.json").read_text())
    assert [s["stage"] for s in summary["stages"]] == ON_CPU
    assert [s["exit_status"] for s in summary["stages"]] == [0, 7, 7, 7, 0]
    assert any(each.startswith("memcheck racecheck initcheck: no compute-sanitizer") for each in summary["gaps"])
    assert summary["gaps"][1:] == NO_GPU
    assert "3 passed" in (tmp_path / "out" / "tests.log").read_text()


def lines_on_a_gpu(tmp_path, *args):
    """(commands of fusebert that the campaign runs on a machine with a GPU, its summary); none is run here."""
    log, python = tmp_path / "commands", tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
  *"-m pip"*) exit 1 ;;
  *"-m pytest"*|*torch.cuda.is_available*) exit 0 ;;
  *fusebert.bench.cli*) for each; do printf '%s\\037' "$each" >>{log}; done; echo >>{log}; exit 0 ;;
esac
exec "{sys.executable}" "$@"
"""
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    done = run(tmp_path / "out", *args, python=python)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split("\037")[:-1] for line in log.read_text().splitlines()]
    assert all(line[:2] == ["-m", "fusebert.bench.cli"] for line in lines)
    return [line[2:] for line in lines], json.loads((tmp_path / "out" / "campaign.json").read_text())


@pytest.mark.parametrize("quick", [[], ["--quick"]], ids=["full", "quick"])
def test_every_command_line_is_accepted(quick, tmp_path):
    """Also of the stages that need a GPU: no minute of one is lost to a typo. tests/bench has each command run."""
    lines, summary = lines_on_a_gpu(tmp_path, "--minutes", "30", *quick)
    stages = [name for name in STAGES if not (quick and name == "tune")]
    assert [s["stage"] for s in summary["stages"]] == stages
    assert len(lines) == len(stages) - 1  # the tests are pytest's
    commands = typer.main.get_command(app).commands
    for name, *options in lines:
        parsed = commands[name].make_context(name, options).params
        assert parsed["out"] is None or Path(parsed["out"]).parent == tmp_path / "out"
    minutes = [float(line[line.index("--minutes") + 1]) for line in lines if "--minutes" in line]
    assert all(0.5 < x < 10 for x in minutes)
    assert len(minutes) == (2 if quick else 5)


def test_three_commands_run_all_stages(tmp_path):
    """Those of the script's head, each in a machine's ten minutes."""
    parts = re.findall(r'campaign.sh OUT_\d --stages "(.*)"', CAMPAIGN.read_text())
    assert [name for part in parts for name in part.split()] == STAGES
    _, summary = lines_on_a_gpu(tmp_path, "--stages", parts[1])
    assert [s["stage"] for s in summary["stages"]] == parts[1].split()


def test_sanitizers_run_beside_the_tests_and_a_finding_fails_the_campaign(tmp_path):
    """A stand-in for compute-sanitizer that finds a race: its report is in tests.log, its status in the summary."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for path, script in (
        (
            tmp_path / "python",
            f'#!/bin/sh\ncase "$*" in *"-m pytest"*|*bench.cli*) exit 0 ;; esac\nexec "{sys.executable}" "$@"',
        ),
        (
            binaries / "compute-sanitizer",
            '#!/bin/sh\necho "ran: $*"\n[ "$2" = racecheck ] && { echo "1 hazard"; exit 9; }\nexit 0',
        ),
    ):
        path.write_text(script + "\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "PATH": f"{binaries}:{os.environ['PATH']}"}
    command = ["bash", str(CAMPAIGN), str(tmp_path / "out"), "--quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "racecheck: FAILED (9)" in done.stdout
    assert "memcheck: passed" in done.stdout
    log = (tmp_path / "out" / "tests.log").read_text()
    assert "1 hazard" in log
    assert "--tool initcheck" in log
    assert "-m fusebert.bench.sanitize" in log
    stages = {
        s["stage"]: s["exit_status"] for s in json.loads((tmp_path / "out" / "campaign.json").read_text())["stages"]
    }
    assert stages == dict.fromkeys(ON_CPU, 0) | {"memcheck": 0, "racecheck": 9, "initcheck": 0}


@pytest.mark.slow
def test_rehearsal_of_the_stages_that_need_a_gpu(tmp_path):
    """With the compiler, but a made-up clock and GPU: tests/support/rehearsal.py."""
    pytest.importorskip("triton")
    rehearsal, python = ROOT / "tests" / "support" / "rehearsal.py", tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
  *torch.cuda.is_available*) exit 0 ;;
  *fusebert.bench.cli*) shift 2; exec "{sys.executable}" {rehearsal} "$@" ;;
esac
exec "{sys.executable}" "$@"
"""
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    out = tmp_path / "out"
    done = run(out, "--quick", "--minutes", "20", "--stages", "calibrate race", python=python)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "bench.log").read_text()
    calibrated = read_result(out / "calibrate.json", CalibrationResult)
    assert {row.prediction.kernel for row in calibrated.kernels} >= {
        "attn_short_forward",
        "attn_short_backward",
        "layernorm_forward",
        "layernorm_backward",
        "embed_layernorm_forward",
        "embed_layernorm_backward",
        "bias_gelu_forward",
        "cross_entropy_backward",
    }
    assert all(row.over_bound is not None for row in calibrated.kernels)
    raced = read_result(out / "race.json", RaceResult)
    assert len(raced.races) == 2
    assert all(row.ratio_to_launched is not None for case in raced.races for row in case.contestants)


def litter():
    return {p.name for p in ROOT.iterdir() if p.name == "build" or p.suffix == ".egg-info"}


@pytest.mark.skipif("FUSEBERT_CAMPAIGN" in os.environ, reason="a campaign is running this very test")
def test_every_stage_for_real(tmp_path):
    pytest.importorskip("transformers")
    before = litter()
    out = tmp_path / "out"
    done = run(out, "--quick", "--minutes", "30", "--tests", "tests/bench/steps/test_batches.py")
    log = done.stdout + done.stderr + "".join(p.read_text() for p in out.glob("*.log"))
    assert done.returncode == 0, log
    results = {"kernels": "kernels", "parity": "train_parity", "ragged": "step", "equal": "step"}
    files = {"campaign.json", "tests.log", "tests.xml", "bench.log", *(f"{name}.json" for name in results)}
    assert {p.name for p in out.iterdir()} == files
    assert {name: json.loads((out / f"{name}.json").read_text())["kind"] for name in results} == results
    summary = json.loads((out / "campaign.json").read_text())
    assert [(s["stage"], s["exit_status"]) for s in summary["stages"]] == [(name, 0) for name in ON_CPU]
    assert litter() <= before
