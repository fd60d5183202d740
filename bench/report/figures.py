"""The figures in README.md and docs/, written from result files: ``python -m fusebert.bench.readme``.

Between two markers a document holds what this program writes, and nothing else:

    <!-- figures VIEW FILE... -->
    ...
    <!-- end of figures -->

VIEW says how (see `VIEWS`); a FILE is a result file's path from the project's root and may have wildcards. Result files
are called DATE-NAME.json: of those with one NAME the newest date counts, so that a figure is taken anew by adding a
file and running this again. Where no file matches, the document says that there are no figures. ``--check`` writes
nothing, and fails where a document differs from what its result files say.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from ...train.errors import UserError
from ..measure.case import OURS, PEER
from ..measure.machine import Environment
from ..measure.result import ALL_KINDS, read_result, result_json
from ..measure.serialise import from_json
from ..measure.units import interval
from .blocks import Row, row, table
from .cells import Source
from .kernels import kernels_summary
from .markdown import markdown_table
from .runs import lengths_words, pretrain_table, pretrain_words

BEGIN = re.compile(r"<!-- figures (?P<view>\S+) (?P<files>.+?) -->")
END = "<!-- end of figures -->"
DATED = re.compile(r"(?P<date>\d{4}-\d{2}-\d{2})-(?P<name>.+)\.json")
COMMON = ("compute_dtype", "dropout", "tokens", "vocab_size")  # what the files of one table of steps share
NONE = "*No figures yet: no file matches {files}.*"


def _paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False), ""]


def _linked(sources: Sequence[Source]) -> list[str]:
    """Where the figures above it come from: a line a file, and once for all what they were measured on."""
    machines: dict[str, list[str]] = {}
    for source in sources:
        where, versions = from_json(Environment, source.result["environment"]).describe().splitlines()
        versions, _, _ = versions.rpartition("; ")  # the date is in the file's name
        machines.setdefault(f"{where}. {versions}", []).append(_link(source))
    lines = []
    for machine, links in machines.items():
        lines += _paragraph(f"From {', '.join(links)}: {machine}.")
    return lines


def _link(source: Source) -> str:
    return f"[{source.path.name}]({source.path.as_posix()})"


def _step(sources: Sequence[Source]) -> list[str]:
    """Time of each peer's step over ours, a row a file.

    Raises:
        UserError: the files' settings differ in what stands above the table.
    """
    settings = sources[0].result["settings"]
    for source in sources:
        for name in COMMON:
            if source.result["settings"][name] != settings[name]:
                raise UserError(
                    f"{source.path}: {name} is {source.result['settings'][name]}, in {sources[0].path} it is "
                    f"{settings[name]}: they belong in tables of their own"
                )
    peers = list(dict.fromkeys(x["name"] for s in sources for x in s.result["contestants"] if x["role"] == PEER))
    rows: list[Row] = []
    for source in sources:
        its = source.result["settings"]
        found = {x["name"]: x for x in source.result["contestants"]}
        ours = next(x for x in source.result["contestants"] if x["role"] == OURS)
        cells = [its["model"], lengths_words(its)]
        for name in peers:
            peer = found.get(name)
            if peer is None:
                cells.append("")
            elif "timing" not in peer:
                cells.append(peer["verdict"]["status"].upper())
            else:
                cells.append(interval(peer["ratio_to_ours"]))
        cells.append(f"{ours['tokens_per_s']:,.0f}" if "timing" in ours else ours["verdict"]["status"].upper())
        rows.append(row(cells))
    header = ("preset", "lengths", *peers, "fusebert, real tokens/s")
    common = (
        f"Time of the step over ours, median [95 % interval]: above 1, ours is faster. {settings['compute_dtype']}, "
        f"dropout {settings['dropout']}, {settings['tokens']:,} token slots, vocabulary {settings['vocab_size']:,}."
    )
    return [*_paragraph(common), *markdown_table(table(header, rows, left=2)), "", *_linked(sources)]


def _kernels(sources: Sequence[Source]) -> list[str]:
    """A row a pass: ours and the fastest peer that is right."""
    lines: list[str] = []
    for source in sources:
        lines += [*markdown_table(kernels_summary(source.result)), "", *_linked([source])]
    return lines


def _pretrain(sources: Sequence[Source]) -> list[str]:
    """Held-out figures before and after a run."""
    lines: list[str] = []
    for source in sources:
        words = pretrain_words(source.result)
        verdict = f"The loss afterwards is {source.result['report']['verdict']}."
        lines += [*markdown_table(pretrain_table(source.result["report"])), "", *_paragraph(f"{words} {verdict}")]
        lines += _linked([source])
    return lines


def _parity(sources: Sequence[Source]) -> list[str]:
    """Whether training is the same run as Transformers'."""
    rows = []
    for source in sources:
        settings, verdict = source.result["settings"], source.result["verdict"]
        which = "mean" if "allowed_mean_drift" in verdict else "largest"
        run = f"{settings['steps']} steps, {settings['layers']} layers of {settings['hidden_size']}"
        drift = f"{which} {verdict[f'{which}_drift']:.2e}, allowed {verdict[f'allowed_{which}_drift']:.2e}"
        same = "the same run" if verdict["right"] else "NOT THE SAME RUN"
        rows.append(row((run, settings["compute_dtype"], drift, same)))
    header = ("run", "dtype", "distance from Transformers' float32 loss", "verdict")
    return [*markdown_table(table(header, rows, left=4)), "", *_linked(sources)]


def _aot(sources: Sequence[Source]) -> list[str]:
    """What the compiler made of the kernels: how many, how many spill, which matrix instructions they use."""
    rows = []
    for source in sources:
        kernels = source.result["kernels"]
        spilling = sum(found["spill_bytes"] > 0 for found in kernels)
        matrix = sorted({found["matrix"].split()[-1] for found in kernels if found["matrix"]})
        about = source.result["about"]
        cells = (about["arch"], f"{len(kernels)}", f"{spilling}", ", ".join(matrix), about["triton"], _link(source))
        rows.append(row(cells))
    header = ("architecture", "kernels compiled", "that spill registers", "matrix instructions", "Triton", "file")
    return [*markdown_table(table(header, rows)), ""]


VIEWS: dict[str, tuple[str, Callable[[Sequence[Source]], list[str]]]] = {  # view → (kind of its files, what it writes)
    "step": ("step", _step),
    "kernels": ("kernels", _kernels),
    "pretrain": ("pretrain", _pretrain),
    "parity": ("train_parity", _parity),
    "aot": ("aot", _aot),
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
    sources = []
    for path in paths:
        relative = Path(os.path.relpath(path, document.parent))
        sources.append(
            Source(path.stem, relative, result_json(read_result(path, *(x for x in ALL_KINDS if x.kind == kind))))
        )
    try:
        return write(sources)
    except (KeyError, TypeError, IndexError, AttributeError, StopIteration) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{document}: the files of {patterns} are not whole {kind} results ({what})") from error


def rewrite(text: str, document: Path, root: Path) -> str:
    """``text`` with what is between its markers written anew.

    Args:
        document: where it is, which links are relative to.
        root: of the project, which the markers' paths are relative to.

    Raises:
        UserError: a marker is wrong or has no end, or a result file is.
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
    """Those that may hold figures: README.md and docs/."""
    return [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.is_file()]


def update(paths: Sequence[Path], root: Path, *, check: bool, say: Callable[[str], None] = print) -> list[Path]:
    """Write the figures of the documents anew, or only look.

    Returns:
        The documents that differed.

    Raises:
        UserError: a document can not be read, or see `rewrite`.
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
            partial = path.with_suffix(".partial")
            partial.write_text(new, encoding="utf-8")
            os.replace(partial, path)
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


__all__ = ["BEGIN", "END", "VIEWS", "documents", "newest", "rewrite", "update"]
