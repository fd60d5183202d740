"""The report of a fine-tuning run: report.png, and report.html with tables and examples.

The first plot shows the loss of every seed; the others, and the tables, are those of the best model's `Predictions`.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...model.atomic import replace_file
from ..run.log import read_log
from .task import Predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = 10  # right ones, and as many wrong ones
LONGEST_TEXT = 400  # characters of an example
BINS = 10  # of the calibration plot
TRAIN_COLOR, DEV_COLOR, INK = "#9db8d2", "#c0392b", "#333333"


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
        with replace_file(out / "report.png") as partial:
            _draw(sorted(out.glob("seed-*/log.jsonl")), best, partial)
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
    with replace_file(out / "report.html") as partial:
        partial.write_text(text, encoding="utf-8")


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
        figure = Figure(figsize=(15, 4.6), dpi=110, layout="constrained")
        loss, middle, right = figure.subplots(1, 3)
        _draw_loss(loss, [read_log(log) for log in logs])
        best.draw(middle, right)
        for axes in (loss, right):
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


def draw_f1(axes: Axes, classes: Mapping[str, tuple[float, float]], most: int) -> None:
    """Bars of F1.

    Args:
        classes: name → (F1, how often it is right); the ``most`` frequent are drawn.
    """
    chosen = sorted(classes.items(), key=lambda item: -item[1][1])[:most]
    axes.barh(range(len(chosen)), [f1 for _, (f1, _) in chosen], color=TRAIN_COLOR)
    axes.set_yticks(range(len(chosen)), [name[:18] for name, _ in chosen])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title("F1 of the most frequent classes", loc="left", fontweight="bold")


def draw_calibration(axes: Axes, right: np.ndarray, p: np.ndarray) -> None:
    """The share of right predictions by the model's probability.

    Args:
        right: bool [n].
        p: float [n], the probability of each.
    """
    from sklearn.calibration import calibration_curve

    shares, predicted = calibration_curve(right, np.clip(p, 0, 1), n_bins=BINS)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
    axes.plot(predicted, shares, color=DEV_COLOR, marker="o")
    axes.set_title("Calibration", loc="left", fontweight="bold")
    axes.set_xlabel("probability of the model")
    axes.set_ylabel("share that is right")
