"""The report of a fine-tuning run: report.png, and report.html with tables and examples.

The first plot shows the loss of every seed; the others, and the tables, are those of the best model's `Predictions`.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...model.atomic import replace_file
from ..run.log import read_log
from .plots import DEV_COLOR, INK, TRAIN_COLOR
from .task import Predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = 10  # right ones, and as many wrong ones
LONGEST_TEXT = 400  # characters of an example


def write_report(
    out: Path, title: str, lines: Sequence[str], scores: tuple[list[str], list[list[Any]]], best: Predictions
) -> None:
    """Writes report.html, and report.png if matplotlib is installed.

    Args:
        out: folder of the run.
        lines: paragraphs below the title.
        scores: header and rows of the table of scores.
    """
    import jinja2  # PyTorch needs it too

    image, no_image = "", ""
    try:
        with replace_file(out / "report.png") as unfinished:
            _draw(sorted(out.glob("seed-*/log.jsonl")), best, unfinished)
        image = base64.b64encode((out / "report.png").read_bytes()).decode()
    except ModuleNotFoundError:
        no_image = "The plots need matplotlib: pip install matplotlib"
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template)
    text = page.render(
        title=title,
        lines=lines,
        scores=(scores[0], [[words(cell) for cell in row] for row in scores[1]]),
        image=image,
        no_image=no_image,
        sections=best.sections(),
    )
    with replace_file(out / "report.html") as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def words(value: str | float | None) -> str:
    """A cell of a table."""
    return f"{value:.4f}" if isinstance(value, float) else str("–" if value is None else value)


def shortened(text: str) -> str:
    """The text of an example, cut if it is long."""
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


def _draw(logs: Sequence[Path], best: Predictions, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with (
        matplotlib.rc_context(
            {"axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK, "text.parse_math": False}
        ),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)  # a character that the font lacks is drawn as a box
        plots: list[Callable[[Axes], None]] = [partial(_draw_loss, logs=[read_log(log) for log in logs]), *best.plots()]
        columns = 3 if len(plots) == 3 else 2
        rows = -(-len(plots) // columns)
        figure = Figure(figsize=(5 * columns, 4.6 * rows), dpi=110, layout="constrained")
        for number, plot in enumerate(plots, 1):
            axes = figure.add_subplot(rows, columns, number)
            plot(axes)
            if not axes.images:
                axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="png")


def _draw_loss(axes: Axes, logs: Sequence[list[dict[str, Any]]]) -> None:
    for i, records in enumerate(logs):
        for kind, color, label in (("finetune", TRAIN_COLOR, "training"), ("dev", DEV_COLOR, "dev")):
            points = [(r["step"], r["loss"]) for r in records if r["kind"] == kind and r.get("loss") is not None]
            if points:
                marker = "o" if kind == "dev" else None
                axes.plot(
                    *zip(*points, strict=True), color=color, marker=marker, markersize=4, label=None if i else label
                )
    axes.set_title("Loss", loc="left", fontweight="bold")
    axes.set_xlabel("step")
    if axes.lines:
        axes.legend(frameon=False)
