"""``fusebert bench report``: result files → report.md, report.html and a PNG for every plot.

The page carries its images within itself, so that it can be mailed, attached and opened anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ...model.atomic import replace_file
from ..measure.result import ALL_KINDS, KernelsResult, StepResult, TrainResult, read_result
from .blocks import Figure, Section, Text
from .plots import plots
from .render import Image, markdown, page
from .sections import Source, environment_section, method_section, source_section
from .theme import DARK, LIGHT, render

TITLE = "fusebert: benchmark report"
WITHOUT_PLOTS = "There are no plots: they need matplotlib (pip install matplotlib), then write the report again."


def _sources(paths: Sequence[Path]) -> list[Source]:
    """The files, each under a name that is unique: its stem, numbered where another has it already."""
    found: list[Source] = []
    taken: set[str] = set()
    for path in paths:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem)
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        found.append(Source(name, path, read_result(path, *ALL_KINDS)))
    return found


def _draw(source: Source) -> dict[str, tuple[Figure, Image]] | None:
    """A result's figures and their images, by name; None without matplotlib."""
    found = {}
    for plot in plots(source.result):
        try:
            image = Image(render(plot, LIGHT), render(plot, DARK))
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            return None
        name = f"{source.name}-{plot.name}"
        found[name] = Figure(name, plot.caption), image
    return found


def write_report(paths: Sequence[Path], out: Path, *, say: Callable[[str], None] = print) -> Path:
    """Write the report of these files into ``out``, and say what it holds.

    Returns:
        The page.

    Raises:
        UserError: a file is not a result, or is not complete.
        OSError: ``out`` cannot be written.
    """
    sources = _sources(paths)
    sections: list[Section] = []
    images: dict[str, Image] = {}
    drawn = True
    for source in sources:
        found = _draw(source)
        drawn = drawn and found is not None
        sections.append(source_section(source, [figure for figure, _ in (found or {}).values()]))
        images |= {name: image for name, (_, image) in (found or {}).items()}
    if not drawn:
        sections.insert(0, Section("Plots", (Text(WITHOUT_PLOTS, warning=True),)))
    if any(isinstance(source.result, KernelsResult | StepResult | TrainResult) for source in sources):
        sections.append(method_section())
    if any(hasattr(source.result, "environment") for source in sources):
        sections.append(environment_section(sources))

    out.mkdir(parents=True, exist_ok=True)
    files = {f"{name}.png": image.light for name, image in images.items()}
    files["report.md"] = markdown(TITLE, sections, {name: f"{name}.png" for name in images}).encode()
    files["report.html"] = page(TITLE, sections, images).encode()
    for name, content in files.items():
        with replace_file(out / name) as partial:
            partial.write_bytes(content)
    say(f"{out / 'report.html'}: {len(sources)} result file(s), {len(images)} plot(s); the same as report.md")
    if not drawn:
        say(WITHOUT_PLOTS)
    return out / "report.html"
