"""The style of every figure (colours, markers, font sizes), and the conversion of a drawing to SVG and PNG.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish.
"""

import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    # Names come from files, so a dollar sign must not start a formula.
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawn figure. `name` is safe as a file name; `caption` explains the figure, with sample sizes and seeds."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


class Palette:
    """Colours and markers by label, assigned in the order of the labels."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._places = {label: place for place, label in enumerate(dict.fromkeys(labels))}

    def color(self, label: str) -> str:
        """The colour of the label. The ninth label reuses the first colour, with a different marker."""
        return PALETTE[self._places[label] % len(PALETTE)]

    def marker(self, label: str) -> str:
        """The marker of the label."""
        place = self._places[label]
        return MARKERS[(place + place // len(PALETTE)) % len(MARKERS)]


@contextmanager
def _canvas(size: tuple[float, float]) -> Iterator[Any]:
    # The object interface of matplotlib needs no window system and no global state.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context():
        # What a matplotlibrc of the user or of the working directory says is about other figures.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Canvas(figsize=size)
        FigureCanvasAgg(figure)
        yield figure


def render(name: str, heading: str, caption: str, draw: Callable[[Any], None], size: tuple[float, float]) -> Figure:
    """Call `draw` on an empty canvas of `size` inches (width, height) and return the figure.

    Names come from files too, and the one font that comes with matplotlib has no Chinese characters; the caption says so in place of its warnings.
    """
    with _canvas(size) as figure, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        draw(figure)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None}, facecolor="white")
    if any("missing from font" in str(warning.message) for warning in said):
        caption = f"{caption} The PNG has boxes for characters that matplotlib's font lacks; the SVG has the characters."
    return Figure(name, heading, caption, _inline(svg.getvalue(), name), png.getvalue())


def plot_files(figures: Sequence[Figure], directory: Path) -> dict[Path, str | bytes]:
    """The files of every figure in `directory`, as SVG and PNG."""
    svg: dict[Path, str | bytes] = {directory / f"{figure.name}.svg": figure.svg + "\n" for figure in figures}
    return svg | {directory / f"{figure.name}.png": figure.png for figure in figures}


def _inline(svg: str, name: str) -> str:
    """The `<svg>` element alone, with unique ids, so that one page can hold several."""
    element = svg[svg.index("<svg") :]
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", element)
