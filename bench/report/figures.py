"""The figures in README.md and docs/, written from result files: ``python -m fusebert.bench.readme``.

Between two markers a document holds only what this program writes:

    <!-- figures VIEW FILE... -->
    ...
    <!-- end of figures -->

VIEW is one of `VIEWS`. FILE is the path of a result file from the project's root and may have wildcards. Result files
are called DATE-NAME.json. Of files with the same NAME the newest date counts, so adding a file and running this again
updates a figure. Where no file matches, the document says that there are no figures. ``--check`` writes nothing, and
fails where a document differs from its result files.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...model.atomic import replace_file
from ...train.errors import UserError
from ..measure.case import PEER
from ..measure.gpus import short_name
from ..measure.prediction import PassPrediction, RaceCase, RaceContestant
from ..measure.result import (
    AotResult,
    CalibrationResult,
    EmbedResult,
    FinetuneParityResult,
    FinetuneResult,
    FuseResult,
    KernelsResult,
    OperatorPredictResult,
    ParityResult,
    PredictResult,
    PretrainResult,
    QualityResult,
    RaceResult,
    Result,
    StepContestant,
    StepResult,
    read_result,
)
from .blocks import Table, Text
from .calibrations import RACE, RACE_MEASURED, calibration_table, calibration_words
from .columns import RATIO, TOKENS_PER_S, Column, status, table
from .predictions import PASSES, SUMMARY
from .render import markdown_table
from .sections import (
    fuse_table,
    kernels_summary,
    lengths_words,
    parity_drift,
    parity_words,
    pretrain_table,
    pretrain_words,
    section,
)

BEGIN = re.compile(r"<!-- figures (?P<view>\S+) (?P<files>.+?) -->")
END = "<!-- end of figures -->"
DATED = re.compile(r"(?P<date>\d{4}-\d{2}-\d{2})-(?P<name>.+)\.json")
COMMON = ("compute_dtype", "dropout", "tokens", "vocab_size")  # what the files of one table of steps share
NONE = "*No figures yet: no file matches {files}.*"


def _paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False), ""]


R = TypeVar("R")
Files = Sequence[tuple[Path, R]]  # path relative to the document, result


def _link(path: Path) -> str:
    return f"[{path.name}]({path.as_posix()})"


def _linked(files: Files[Any]) -> list[str]:
    """The files of a table, once for each machine that they were measured on."""
    machines: dict[str, list[str]] = {}
    for path, result in files:
        where, versions = result.environment.describe().splitlines()
        versions, _, _ = versions.rpartition("; ")  # the date is in the file's name
        machines.setdefault(f"{where}. {versions}", []).append(_link(path))
    lines = []
    for machine, links in machines.items():
        lines += _paragraph(f"From {', '.join(links)}: {machine}.")
    return lines


def _step(files: Files[StepResult]) -> list[str]:
    """Time of each peer's step over ours, a row a file.

    Raises:
        UserError: the files differ in the settings that the text above the table names.
    """
    first, settings = files[0][0], files[0][1].settings
    for path, result in files:
        for name in COMMON:
            given, expected = getattr(result.settings, name), getattr(settings, name)
            if given != expected:
                raise UserError(
                    f"{path}: {name} is {given}, in {first} it is {expected}: they belong in tables of their own"
                )

    def value(column: Column[Any], title: str, wanted: Callable[[StepContestant], bool]) -> Column[StepResult]:
        """``column`` of the first wanted contestant; its verdict where it was not timed."""

        def read(result: StepResult) -> Any:
            row = next(filter(wanted, result.contestants), None)
            return None if row is None else column.read(row) if row.time else status(row)

        return dataclasses.replace(column, title=title, read=read)

    peers = dict.fromkeys(row.name for _, result in files for row in result.contestants if row.role == PEER)
    columns: list[Column[StepResult]] = [
        Column("preset", lambda result: result.settings.model, words=True),
        Column("lengths", lambda result: lengths_words(result.settings.ragged, result.settings.seqlen), words=True),
        *(value(RATIO, name, lambda row, name=name: row.name == name) for name in peers),  # type: ignore[misc]
        value(TOKENS_PER_S, "fusebert, real tokens/s", lambda row: row.is_ours),
    ]
    common = (
        f"Time of the step over ours, median [95 % interval]: above 1, ours is faster. {settings.compute_dtype}, "
        f"dropout {settings.dropout}, {settings.tokens:,} token slots, vocabulary {settings.vocab_size:,}."
    )
    return [*_paragraph(common), *_table(table(columns, [result for _, result in files])), *_linked(files)]


def _table(found: Table) -> list[str]:
    return [*markdown_table(found), ""]


def _kernels(files: Files[KernelsResult]) -> list[str]:
    """A row a pass: ours and the fastest peer that is right."""
    lines: list[str] = []
    for path, result in files:
        lines += [*_table(kernels_summary(result.results)), *_linked([(path, result)])]
    return lines


def _pretrain(files: Files[PretrainResult]) -> list[str]:
    """Held-out figures before and after a run."""
    lines: list[str] = []
    for path, result in files:
        words = f"{pretrain_words(result)} The loss afterwards is {result.report.verdict}."
        lines += [*_table(pretrain_table(result.report)), *_paragraph(words), *_linked([(path, result)])]
    return lines


PARITY: tuple[Column[ParityResult], ...] = (
    Column(
        "run",
        lambda x: f"{x.settings.steps} steps, {x.settings.layers} layers of {x.settings.hidden_size}",
        words=True,
    ),
    Column("dtype", lambda x: x.settings.compute_dtype, words=True),
    Column("distance from Transformers' float32 loss", parity_drift, words=True),
    Column("verdict", parity_words, words=True),
)


def _parity(files: Files[ParityResult]) -> list[str]:
    """Whether training is the same run as Transformers'."""
    return [*_table(table(PARITY, [result for _, result in files])), *_linked(files)]


def _matrix_instructions(result: AotResult) -> str:
    return ", ".join(sorted({kernel.matrix.split()[-1] for kernel in result.kernels if kernel.matrix}))


AOT: tuple[Column[tuple[Path, AotResult]], ...] = (
    Column("architecture", lambda x: x[1].about.arch, words=True),
    Column("kernels compiled", lambda x: len(x[1].kernels)),
    Column("that spill registers", lambda x: sum(kernel.spill_bytes > 0 for kernel in x[1].kernels)),
    Column("matrix instructions", lambda x: _matrix_instructions(x[1]), words=True),
    Column("Triton", lambda x: x[1].about.triton, words=True),
    Column("file", lambda x: _link(x[0]), words=True),
)


def _aot(files: Files[AotResult]) -> list[str]:
    """What the compiler made of the kernels: how many, how many spill, which matrix instructions they use."""
    return _table(table(AOT, files))


def _predict(files: Files[PredictResult]) -> list[str]:
    """A row a file: the step's terms."""
    about, of = files[0][1].about, files[0][1].settings
    words = (
        f"Nanoseconds a token, and tokens/s; {of.dtype}, {of.tokens:,} token slots, dropout {of.dropout}, Triton "
        f"{about.triton}. From {', '.join(_link(path) for path, _ in files)}."
    )
    return [*_table(table(SUMMARY, [result for _, result in files])), *_paragraph(words)]


def _of_pass(column: Column[PassPrediction], row: tuple[str, PassPrediction]) -> Any:
    return column.read(row[1])


def _predict_op(files: Files[OperatorPredictResult]) -> list[str]:
    """A row a pass of each file's operator, with the GPU."""
    gpu: Column[tuple[str, PassPrediction]] = Column("GPU", lambda row: row[0], words=True)
    rest = [Column(of.title, functools.partial(_of_pass, of), of.format, of.words) for of in PASSES]
    rows = [(short_name(result.about.gpu["name"]), each) for _, result in files for each in result.passes]
    about, of = files[0][1].about, files[0][1].settings
    words = (
        f"{of.op}, {of.dtype}, Triton {about.triton}; predicted, not measured. From "
        f"{', '.join(_link(path) for path, _ in files)}."
    )
    return [*_table(table((gpu, *rest), rows)), *_paragraph(words)]


def _calibrate(files: Files[CalibrationResult]) -> list[str]:
    """A table a file: predicted against measured, a row a kernel."""
    lines: list[str] = []
    for path, result in files:
        lines += [*_paragraph(calibration_words(result)), *_table(calibration_table(result))]
        lines += _linked([(path, result)])
    return lines


def _of_contestant(column: Column[RaceContestant]) -> Column[tuple[RaceCase, RaceContestant]]:
    return Column(column.title, lambda x: column.read(x[1]), column.format, column.words)


RACES: tuple[Column[tuple[RaceCase, RaceContestant]], ...] = (
    Column("kernel", lambda x: f"{x[0].kernel}, {x[0].shape}", words=True),
    *map(_of_contestant, (*RACE, *RACE_MEASURED)),
)


def _race(files: Files[RaceResult]) -> list[str]:
    """A table a file: each configuration of each kernel, the largest expected gain first."""
    lines: list[str] = []
    for path, result in files:
        rows = [(case, row) for case in result.races for row in case.contestants]
        timed = any(row.timing for _, row in rows)
        columns = RACES if timed else RACES[: 1 + len(RACE)]
        words = f"{result.dtype}, {result.tokens:,} tokens; predicted for {result.gpu}"
        words += "." if timed else f", {_link(path)}: nothing is measured."
        lines += [*_paragraph(words), *_table(table(columns, rows))]
        lines += _linked([(path, result)]) if timed else []
    return lines


def _fuse(files: Files[FuseResult]) -> list[str]:
    """A row a case."""
    lines: list[str] = []
    for path, result in files:
        lines += [
            *_paragraph(f"{result.architecture}, dropout {result.settings.dropout}."),
            *_table(fuse_table(result)),
        ]
        lines += _linked([(path, result)])
    return lines


def _whole(files: Files[Result]) -> list[str]:
    """What the report says of a file: its texts and tables."""
    lines: list[str] = []
    for path, result in files:
        for block in section(result).blocks:
            if isinstance(block, Text):
                lines += _paragraph(block.text)
            elif isinstance(block, Table):
                lines += _table(block)
        lines += _linked([(path, result)])
    return lines


VIEWS: dict[str, tuple[type[Result], Callable[[Files[Any]], list[str]]]] = {  # view → (its files, what it writes)
    "step": (StepResult, _step),
    "fuse": (FuseResult, _fuse),
    "quality": (QualityResult, _whole),
    "embed": (EmbedResult, _whole),
    "finetune": (FinetuneResult, _whole),
    "kernels": (KernelsResult, _kernels),
    "pretrain": (PretrainResult, _pretrain),
    "parity": (ParityResult, _parity),
    "finetune_parity": (FinetuneParityResult, _whole),
    "aot": (AotResult, _aot),
    "predict": (PredictResult, _predict),
    "predict_op": (OperatorPredictResult, _predict_op),
    "calibrate": (CalibrationResult, _calibrate),
    "race": (RaceResult, _race),
}


def newest(root: Path, pattern: str) -> list[Path]:
    """The files that match, of each name the one with the newest date; in the order of their names.

    Raises:
        UserError: a file is not called DATE-NAME.json.
    """
    found: dict[str, Path] = {}
    for path in sorted(root.glob(pattern)):  # dates ascend
        dated = DATED.fullmatch(path.name)
        if dated is None:
            raise UserError(f"{path}: call it DATE-NAME.json, as 2026-01-31-cpu-step-mini-equal.json is")
        found[dated["name"]] = path
    return [found[name] for name in sorted(found)]


def _generate(view: str, patterns: str, document: Path, root: Path) -> list[str]:
    if view not in VIEWS:
        raise UserError(f"{document}: there is no view {view!r} of figures: choose one of {', '.join(VIEWS)}")
    kind, write = VIEWS[view]
    paths = [path for pattern in patterns.split() for path in newest(root, pattern)]
    if not paths:
        return _paragraph(NONE.format(files=", ".join(f"`{pattern}`" for pattern in patterns.split())))
    return write([(Path(os.path.relpath(path, document.parent)), read_result(path, kind)) for path in paths])


def rewrite(text: str, document: Path, root: Path) -> str:
    """``text`` with everything between its markers written again.

    Args:
        document: the file of ``text``; links are relative to it.
        root: the project's folder; the markers' paths are relative to it.

    Raises:
        UserError: a marker is wrong or has no end, or a result file cannot be used.
    """
    lines: list[str] = []
    inside: str | None = None
    for line in text.splitlines():
        begin = BEGIN.fullmatch(line.rstrip())  # indented, it is an example
        if inside is not None and begin:
            raise UserError(f"{document}: {inside} has no {END} before the next")
        if begin:
            inside = line.rstrip()
            lines += [line, "", *_generate(begin["view"], begin["files"], document, root)]
        elif line.rstrip() == END:
            if inside is None:
                raise UserError(f"{document}: {END} without a beginning")
            inside = None
            lines.append(line)
        elif inside is None:
            lines.append(line)
    if inside is not None:
        raise UserError(f"{document}: {inside} has no {END}")
    return "\n".join(lines) + "\n"


def documents(root: Path) -> list[Path]:
    """The documents that may hold figures: README.md and docs/*.md."""
    return [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.is_file()]


def update(paths: Sequence[Path], root: Path, *, check: bool, say: Callable[[str], None] = print) -> list[Path]:
    """Write the figures of the documents again; with ``check`` only compare.

    Returns:
        The documents that differed.

    Raises:
        UserError: a document cannot be read, or as `rewrite`.
    """
    changed = []
    for path in paths:
        try:
            old = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        new = rewrite(old, path, root)
        if new == old:
            continue
        changed.append(path)
        if check:
            say(f"{path}: differs from its result files; run python -m fusebert.bench.readme")
        else:
            with replace_file(path) as partial:
                partial.write_text(new, encoding="utf-8")
            say(f"{path}: written anew")
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the figures in README.md and docs/*.md from result files.")
    parser.add_argument("documents", nargs="*", type=Path, help="Markdown files; default: README.md and docs/*.md")
    parser.add_argument("--root", type=Path, default=Path(), help="of the project; default: the current folder")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where something differs")
    args = parser.parse_args()
    try:
        changed = update(args.documents or documents(args.root), args.root, check=args.check)
    except UserError as error:
        print(f"fusebert: error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if args.check and changed else 0)
