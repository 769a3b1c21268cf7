"""Pictures for reports, as SVG inside `data:` addresses, so that a page is one file.

The same numbers give the same file. Pictures have no background: the page gives them one that fits its colours.
"""

import base64
import io
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, GOLD, RED = "#2f6fb0", "#c9a227", "#b3261e"
INK, SOFT, LINE = "#1c2430", "#5b6675", "#e1e6ec"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "svg.hashsalt": "plumbline",  # the same numbers give the same file
}
"""What to give matplotlib's rc_context while pictures are drawn."""


class Plot(NamedTuple):
    """A picture and what it shows."""

    caption: str
    address: str
    wide: bool


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this size in inches, without pyplot, which would keep it in a global list."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=144)


def finished(figure: "Figure", caption: str, wide: bool = False) -> Plot:
    """The figure as a picture for a page."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return Plot(caption, "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode(), wide)
