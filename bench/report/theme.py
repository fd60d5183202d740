"""A plot and its paper: colours for light and for dark backgrounds, and the drawing as PNG.

Ours is blue and thick. Peers take the other colours of Okabe and Ito (2008), which colour-blind readers can tell apart,
and a marker each.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES, DPI = 6.4, 160  # narrow, so that a phone shows the words large enough


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a plot: paper, words, lines of the grid, ours, peers, what is wrong."""

    paper: str
    ink: str
    grid: str
    ours: str
    peers: tuple[str, ...]
    neutral: str
    slower: str
    wrong: str


LIGHT = Theme(
    paper="#ffffff",
    ink="#24292f",
    grid="#dde1e6",
    ours="#0072b2",
    peers=("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#555555"),
    neutral="#a9b4bf",
    slower="#e69f00",
    wrong="#b02a00",
)

DARK = Theme(
    paper="#161b22",
    ink="#d7dde4",
    grid="#333b45",
    ours="#56b4e9",
    peers=("#ff8c42", "#2fd3a2", "#e59ac4", "#f0c04a", "#7f9bff", "#c9b458", "#aaaaaa"),
    neutral="#5d6875",
    slower="#e69f00",
    wrong="#ff8066",
)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot to be drawn.

    Attributes:
        name: of its file, unique in a result.
        caption: what it shows, in a sentence.
        height: inches.
        draw: draws it.
    """

    name: str
    caption: str
    height: float
    draw: Callable[[Figure, Theme], None]


def render(plot: Plot, theme: Theme) -> bytes:
    """The plot as PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "axes.facecolor": theme.paper,
        "figure.facecolor": theme.paper,
        "grid.color": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(INCHES, plot.height), dpi=DPI, layout="constrained")
        plot.draw(figure, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
