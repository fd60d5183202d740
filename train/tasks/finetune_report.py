"""The report of a fine-tuning run: report.png, and report.html with tables and examples.

The plots show the loss of every seed; for the best model, what was predicted against what was right, and how often
predictions of a confidence are right (calibration).
"""

from __future__ import annotations

import base64
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...model.atomic import replace_file
from ...model.heads import MULTI, REGRESSION, SINGLE
from ..run.log import read_log
from .labels import Labels
from .rows import Row
from .scores import decisions, probabilities

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = 10  # right ones, and as many wrong ones
LONGEST_TEXT = 400  # characters of an example
MOST_CLASSES = 30  # of a confusion matrix
BINS = 10  # of the calibration plot
TRAIN_COLOR, DEV_COLOR, INK = "#9db8d2", "#c0392b", "#333333"


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The best model's predictions for the dev texts.

    Attributes:
        rows: n texts.
        truth: of `Labels.encode`.
        logits: float32 [n, C].
    """

    labels: Labels
    rows: Sequence[Row]
    truth: torch.Tensor
    logits: np.ndarray

    @property
    def found(self) -> np.ndarray:
        """`scores.decisions`."""
        return decisions(self.labels.problem, self.logits)

    @property
    def confidence(self) -> np.ndarray:
        """float32 [n]: the probability of the predicted class, or with several classes of the least sure decision."""
        p = probabilities(self.labels.problem, self.logits)
        return p.max(1) if self.labels.problem == SINGLE else np.maximum(p, 1.0 - p).min(1)

    def right(self) -> np.ndarray:
        """bool [n]: texts of which every decision is right."""
        same = self.found == self.truth.numpy()
        return same if same.ndim == 1 else same.all(1)

    def per_class(self) -> list[dict[str, Any]]:
        """Precision, recall, F1 and number of texts of each class; none in a regression."""
        from sklearn.metrics import precision_recall_fscore_support

        if self.labels.problem == REGRESSION:
            return []
        numbers = range(len(self.labels.names))
        columns = precision_recall_fscore_support(self.truth.numpy(), self.found, labels=numbers, zero_division=0)
        names = ("precision", "recall", "f1", "texts")
        return [
            {"class": name, **{key: float(value) for key, value in zip(names, row, strict=True)}}
            for name, row in zip(self.labels.names, zip(*columns, strict=True), strict=True)
        ]


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
        scores=(scores[0], [[_words(cell) for cell in row] for row in scores[1]]),
        image=image,
        no_image=no_image,
        sections=_sections(best),
    )
    with replace_file(out / "report.html") as partial:
        partial.write_text(text, encoding="utf-8")


def _words(value: str | float | None) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str("–" if value is None else value)


def _sections(best: Predictions) -> list[dict[str, Any]]:
    sections = []
    if classes := best.per_class():
        rows = [[name, *map(_words, row), int(count)] for each in classes for name, *row, count in [each.values()]]
        sections.append({"title": "Classes", "header": list(classes[0]), "rows": rows})
    if best.labels.problem == REGRESSION:
        errors = np.abs(best.found - best.truth.numpy())
        order = np.argsort(errors, kind="stable")
        chosen = [("Largest errors", order[::-1][:EXAMPLES]), ("Smallest errors", order[:EXAMPLES])]
    else:
        order, right = np.argsort(-best.confidence, kind="stable"), best.right()
        wrong = order[~right[order]]
        chosen = [("Wrong, most confident first", wrong[:EXAMPLES])]
        chosen.append(("Right, least confident first", order[right[order]][::-1][:EXAMPLES]))
    for title, numbers in chosen:
        rows = [_example(best, int(i)) for i in numbers]
        sections.append({"title": title, "header": ["text", "label", "predicted", "confidence"], "rows": rows})
    return sections


def _example(best: Predictions, i: int) -> list[str]:
    row, truth, found, names = best.rows[i], best.truth[i], best.found[i], best.labels.names
    text = row.text if row.pair is None else f"{row.text} — {row.pair}"
    text = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
    if best.labels.problem == REGRESSION:
        return [text, f"{float(truth):.3f}", f"{found:.3f}", ""]
    if best.labels.problem == MULTI:
        given, predicted = (
            ", ".join(names[j] for j in np.flatnonzero(np.asarray(each) > 0)) or "none" for each in (truth, found)
        )
    else:
        given, predicted = names[int(truth)], names[int(found)]
    return [text, given, predicted, f"{best.confidence[i]:.0%}"]


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
        if best.labels.problem == REGRESSION:
            _draw_values(middle, best)
            right.hist(best.found - best.truth.numpy(), bins=30, color=TRAIN_COLOR)
            right.set_title("Errors", loc="left", fontweight="bold")
            right.set_xlabel("predicted − given")
            right.set_ylabel("texts")
        else:
            if best.labels.problem == SINGLE and len(best.labels.names) <= MOST_CLASSES:
                _draw_confusion(middle, best)
            else:
                _draw_f1(middle, best)
            _draw_calibration(right, best)
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


def _draw_values(axes: Axes, best: Predictions) -> None:
    truth = best.truth.numpy()
    axes.scatter(truth, best.found, s=8, color=DEV_COLOR, alpha=0.5)
    axes.axline((float(truth.mean()), float(truth.mean())), slope=1, color=INK, linewidth=1, linestyle="--")
    axes.set_title("Predicted against given", loc="left", fontweight="bold")
    axes.set_xlabel("given")
    axes.set_ylabel("predicted")


def _draw_confusion(axes: Axes, best: Predictions) -> None:
    from sklearn.metrics import confusion_matrix

    names = best.labels.names
    counts = confusion_matrix(best.truth.numpy(), best.found, labels=range(len(names)))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    shown = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=90)
    axes.set_yticks(range(len(names)), shown)
    if len(names) <= 15:
        for (i, j), count in np.ndenumerate(counts):
            axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i, j] > 0.5 else INK)
    axes.set_title("Confusion matrix", loc="left", fontweight="bold")
    axes.set_xlabel("predicted")
    axes.set_ylabel("given")


def _draw_f1(axes: Axes, best: Predictions) -> None:
    classes = sorted(best.per_class(), key=lambda each: -each["texts"])[:MOST_CLASSES]
    axes.barh(range(len(classes)), [each["f1"] for each in classes], color=TRAIN_COLOR)
    axes.set_yticks(range(len(classes)), [each["class"][:18] for each in classes])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title("F1 of the most frequent classes", loc="left", fontweight="bold")


def _draw_calibration(axes: Axes, best: Predictions) -> None:
    from sklearn.calibration import calibration_curve

    if best.labels.problem == SINGLE:
        right, p = best.right(), best.confidence
    else:
        right, p = best.truth.numpy().ravel() > 0, probabilities(MULTI, best.logits).ravel()
    shares, predicted = calibration_curve(right, np.clip(p, 0, 1), n_bins=BINS)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
    axes.plot(predicted, shares, color=DEV_COLOR, marker="o")
    axes.set_title("Calibration", loc="left", fontweight="bold")
    axes.set_xlabel("probability of the model")
    axes.set_ylabel("share that is right")
