"""The plot of a run's loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...model.atomic import replace_file


def plot_loss_curve(records: Sequence[dict[str, Any]], unigram_entropy: float, path: Path) -> None:
    """Draws the masked-LM loss on training and held-out text over the steps, and the unigram entropy, as a PNG.

    Args:
        records: of log.jsonl, see `log.read_log`.
        unigram_entropy: of the corpus, nats a token.
        path: the PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the loss curve needs matplotlib: pip install matplotlib") from error

    ink, train_color, heldout_color = "#333333", "#9db8d2", "#c0392b"
    train = [(r["step"], r["mlm_loss"]) for r in records if r["kind"] == "train" and r["mlm_loss"] is not None]
    heldout = [(r["step"], r["mlm_loss"]) for r in records if r["kind"] == "eval"]
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": ink, "text.color": ink, "axes.labelcolor": ink}):
        figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
        axes = figure.subplots()
        if train:
            axes.plot(*zip(*train, strict=True), color=train_color, linewidth=1.2, label="training")
        axes.plot(
            *zip(*heldout, strict=True), color=heldout_color, linewidth=2, marker="o", markersize=4, label="held-out"
        )
        axes.axhline(unigram_entropy, color=ink, linestyle="--", linewidth=1)
        last = max(step for step, _ in heldout + train)
        axes.annotate(
            f"unigram entropy {unigram_entropy:.2f}: token frequencies without context",
            (last, unigram_entropy),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            va="bottom",
        )
        axes.annotate(
            f"{heldout[-1][1]:.2f}",
            heldout[-1],
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=heldout_color,
            fontweight="bold",
        )
        losses = [loss for _, loss in heldout + train] + [unigram_entropy]
        axes.set_xlim(0, last * 1.07)
        axes.set_ylim(min(losses) - 0.06 * (max(losses) - min(losses)), None)
        axes.set_title("Masked-LM loss", loc="left", fontweight="bold")
        axes.set_xlabel("optimisation step")
        axes.set_ylabel("nats a token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
        with replace_file(path) as partial:
            figure.savefig(partial, format="png")
