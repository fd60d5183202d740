"""A finished pretraining run as a result file: ``python -m fusebert.bench.record RUN --out FILE``.

The report of ``fusebert pretrain`` lacks the commit and the versions. This adds them, right after the run, on the same
machine and from the same sources. It refuses when a source file is newer than the run's report, or when the version of
PyTorch differs from the run's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

import torch

from ...train.corpus.format import CorpusError
from ...train.corpus.reader import Corpus
from ...train.errors import UserError
from ...train.run.log import read_log
from ..measure.machine import environment
from ..measure.result import CorpusSummary, PretrainReport, PretrainResult, write_result
from ..measure.serialise import from_json

PACKAGES = ("kernels", "model", "train")
# A CPU in the log: "CPU (2 threads)", or "2 × CPU (1 thread), DDP".
THREADS = re.compile(r"(?:(?P<processes>\d+) × )?CPU \((?P<threads>\d+) threads?\).*")
# Paths on the machine of the run are not published.
PLACES = ("data", "out", "hf_directory", "loss_curve")


def _newest_source(root: Path) -> Path:
    return max(
        (path for name in PACKAGES for path in (root / name).rglob("*.py")), key=lambda path: path.stat().st_mtime
    )


def record(run: Path, root: Path) -> PretrainResult:
    """The run's report with environment, settings and corpus.

    Args:
        run: ``fusebert pretrain``'s --out, finished.
        root: the folder of the packages that ran.

    Raises:
        UserError: the run is not finished, or is not what these sources and this PyTorch gave.
    """
    path = run / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        ran = path.stat().st_mtime
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; give the folder of a finished fusebert pretrain") from error
    began = [entry for entry in read_log(run / "log.jsonl") if entry["kind"] == "run"]
    if not began:
        raise UserError(f"{run / 'log.jsonl'}: does not say how the run began; give the folder of fusebert pretrain")
    begin = began[-1]
    if begin["torch"] != torch.__version__:
        raise UserError(f"{run}: ran with PyTorch {begin['torch']}, this is {torch.__version__}; run it again")
    changed = _newest_source(root)
    if changed.stat().st_mtime > ran:
        raise UserError(f"{run}: {changed} was changed after this run; run it again")
    settings = begin["settings"]
    corpus = Corpus.open(Path(settings["data"]))
    cpu = THREADS.fullmatch(begin["device"])
    where = environment(torch.device("cuda" if cpu is None else "cpu"))
    if cpu is not None:  # the run's threads, not this process's
        where = dataclasses.replace(where, torch_threads=int(cpu["processes"] or 1) * int(cpu["threads"]))
    return PretrainResult(
        environment=where,
        settings={name: value for name, value in settings.items() if name not in PLACES},
        shape=begin["shape"],
        corpus=CorpusSummary(corpus.vocab_size, corpus.split("train").num_tokens),
        report=from_json(PretrainReport, {name: value for name, value in report.items() if name not in PLACES}),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a result file of a finished pretraining run.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    args = parser.parse_args()
    try:
        write_result(args.out, record(args.run, Path(__file__).parents[2]))
    except (UserError, CorpusError) as error:
        print(f"fusebert: error: {error}", file=sys.stderr)
        sys.exit(2)
