"""``fusebert bench report``: result files → report.md, report.html and a PNG for every plot.

The page carries its images within itself, so that it can be mailed, attached and opened anywhere. Without matplotlib
there are tables alone, and the page says how to get the plots.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ...train.errors import UserError
from ..measure.result import ALL_KINDS, read_result, result_json
from .blocks import Figure, Section, Text
from .cells import Source
from .content import section
from .html import Image, page
from .markdown import markdown
from .method import environment_section, method_section
from .paper import DARK, LIGHT, render
from .plots import plots

TITLE = "fusebert: benchmark report"
WITHOUT_PLOTS = "There are no plots: they need matplotlib (pip install matplotlib), then write the report again."


def _sources(paths: Sequence[Path]) -> list[Source]:
    """The files, each under a name that is unique: its stem, numbered where another has it already."""
    found: list[Source] = []
    taken: set[str] = set()
    for path in paths:
        found_result = read_result(path, *ALL_KINDS)
        result = {**result_json(found_result), "kind": found_result.kind}
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem)
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        found.append(Source(name, path, result))
    return found


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    with open(descriptor, "wb") as file:
        file.write(content)
    Path(temporary).chmod(0o644)
    os.replace(temporary, path)


def _draw(source: Source) -> tuple[list[Figure], dict[str, Image]] | None:
    """A result's figures and their images; None without matplotlib."""
    figures, images = [], {}
    for plot in plots(source.result):
        try:
            image = Image(render(plot, LIGHT), render(plot, DARK))
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            return None
        name = f"{source.name}-{plot.name}"
        figures.append(Figure(name, plot.caption))
        images[name] = image
    return figures, images


def write_report(paths: Sequence[Path], out: Path, *, say: Callable[[str], None] = print) -> Path:
    """Write the report of these files into ``out``, and say what it holds.

    Returns:
        The page.

    Raises:
        UserError: a file is not a result, or is not complete.
        OSError: ``out`` can not be written.
    """
    sources = _sources(paths)
    sections: list[Section] = []
    images: dict[str, Image] = {}
    drawn = True
    for source in sources:
        try:
            found = _draw(source)
            figures, its_images = found or ([], {})
            drawn = drawn and found is not None
            sections.append(section(source, figures))
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{source.path}: not a whole {source.result['kind']} result ({what})") from error
        images |= its_images
    if not drawn:
        sections.insert(0, Section("Plots", (Text(WITHOUT_PLOTS, "warning"),)))
    if any(source.result["kind"] in ("kernels", "step", "train") for source in sources):
        sections.append(method_section())
    if any("environment" in source.result for source in sources):
        sections.append(environment_section(sources))

    out.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        _write(out / f"{name}.png", image.light)
    _write(out / "report.md", markdown(TITLE, sections, {name: f"{name}.png" for name in images}).encode())
    _write(out / "report.html", page(TITLE, sections, images).encode())
    say(f"{out / 'report.html'}: {len(sources)} result file(s), {len(images)} plot(s); the same as report.md")
    if not drawn:
        say(WITHOUT_PLOTS)
    return out / "report.html"


__all__ = ["write_report"]
