"""bench/campaign.sh: its stages run, a failing one does not stop the next, and the summary names it."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CAMPAIGN = ROOT / "bench" / "campaign.sh"
STAGES = ["tests", "kernels", "parity", "ragged", "equal"]


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
            ("tests: passed", "kernels: FAILED (7)", "parity: passed", "ragged: FAILED", "equal: FAILED")
        )
    ]
    summary = json.loads((tmp_path / "out" / "campaign.json").read_text())
    assert [s["stage"] for s in summary["stages"]] == STAGES
    assert [s["exit_status"] for s in summary["stages"]] == [0, 7, 0, 7, 7]
    assert any(each.startswith("memcheck racecheck initcheck: no compute-sanitizer") for each in summary["gaps"])
    assert "tune: left out by --quick" in summary["gaps"]
    assert "3 passed" in (tmp_path / "out" / "tests.log").read_text()


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
    assert stages == dict.fromkeys(STAGES, 0) | {"memcheck": 0, "racecheck": 9, "initcheck": 0}


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
    assert {p.name for p in out.iterdir()} == files  # eight
    assert {name: json.loads((out / f"{name}.json").read_text())["kind"] for name in results} == results
    summary = json.loads((out / "campaign.json").read_text())
    assert [(s["stage"], s["exit_status"]) for s in summary["stages"]] == [(name, 0) for name in STAGES]
    assert litter() <= before
