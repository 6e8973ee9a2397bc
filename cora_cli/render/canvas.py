"""The look of every figure: colours, markers, sizes of letters, and how a drawing becomes SVG and PNG.

What is drawn is `plots`' business. Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""

import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cora_cli import rundir

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#222222"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#999999",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "cora",
    # Names come from files: a dollar sign is no formula.
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawn figure: `name` is fit for a file, `title` heads it, `caption` says what is seen, with n and seeds."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


class Palette:
    """Colours and markers by label, in the order in which labels come."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._places = {label: place for place, label in enumerate(dict.fromkeys(labels))}

    def color(self, label: str) -> str:
        """The label's colour; the ninth label has the first one's again, but not with the same marker."""
        return PALETTE[self._places[label] % len(PALETTE)]

    def marker(self, label: str) -> str:
        """The label's marker."""
        place = self._places[label]
        return MARKERS[(place + place // len(PALETTE)) % len(MARKERS)]


@contextmanager
def _canvas(size: tuple[float, float]) -> Iterator[Any]:
    # The object interface: no window system, no global state.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_STYLE):
        figure = Canvas(figsize=size)
        FigureCanvasAgg(figure)
        yield figure


def render(name: str, heading: str, caption: str, draw: Callable[[Any], None], size: tuple[float, float]) -> Figure:
    """Draw on an empty canvas of `size` inches and keep the result."""
    with _canvas(size) as figure:
        draw(figure)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None}, facecolor="white")
    return Figure(name, heading, caption, _inline(svg.getvalue(), name), png.getvalue())


def write_plots(figures: Sequence[Figure], directory: Path) -> None:
    """Write every figure to `directory` as SVG and PNG."""
    for figure in figures:
        rundir.write_text(directory / f"{figure.name}.svg", figure.svg + "\n")
        with rundir.atomic_path(directory / f"{figure.name}.png") as temporary:
            temporary.write_bytes(figure.png)


def _inline(svg: str, name: str) -> str:
    """The `<svg>` element alone, with ids of its own, so that several can stand in one page."""
    element = svg[svg.index("<svg") :]
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", element)
