"""The figures of an inspection: overlap and capture by layer, explained variance, and prediction of the held-out loss.

They show the measured findings; only means are computed here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from cora_cli.inspection.functional import Function
from cora_cli.inspection.inspect import Inspection
from cora_cli.inspection.measure import (
    BASE,
    CEILING,
    CHANCE,
    DELTA,
    MEAN,
    OWN,
    PAPER,
    POOLED,
    START,
    WEIGHTS,
    Findings,
    Overlap,
)
from cora_cli.inspection.prediction import Prediction
from cora_cli.inspection.replacements import ITSELF, NOTHING, REPLACEMENTS
from cora_cli.render.canvas import INK, PALETTE, Figure, Palette, render
from cora_cli.reporting.plots import draw_variance, legend_above
from cora_cli.reporting.variance import Spectrum, read_spectra

Value = Callable[[Findings], list[float]]
_COLUMNS = 3
_MOST_LABELLED = 12
"""The most models for which the heat map prints its numbers."""
_ENDS = (-1.0, 2.0)
"""The farthest ends of the axis of shares of the function."""
_ITS_CHANCE = f": {CHANCE}"
"""Ends the label of a chance line. It is dashed, has the colour of the line that it belongs to, and is not in the legend."""


def draw(inspection: Inspection) -> Iterator[Figure]:
    """Every figure for which there is data."""
    r = inspection.rank
    series: dict[str, Value] = {}
    groups = [set(group.models) for group in inspection.verdict.groups]
    split = bool(groups) and groups[0] != set(inspection.models)
    for kind, who, which in (
        (WEIGHTS, "pairs of models", lambda o: o.other != BASE),
        (WEIGHTS, "with base W", lambda o: o.other == BASE),
        (
            DELTA,
            "pairs within groups" if split else "pairs of models",
            lambda o: o.other != BASE and (not split or _together(o, groups)),
        ),
        (DELTA, "other pairs", lambda o: split and o.other != BASE and not _together(o, groups)),
        (DELTA, "with base W", lambda o: o.other == BASE),
    ):
        series[f"{kind}, {who}"] = _overlaps(kind, which, "value")
        series[f"{kind}, {who}{_ITS_CHANCE}"] = _overlaps(kind, which, "chance")
    yield from _by_layer(
        inspection,
        series,
        "overlap",
        "Overlap of the leading subspaces, layer by layer",
        f"‖U₁ᵀU₂‖_F² / r of the r = {r} leading directions, mean over pairs of {len(inspection.models)} models. Dashed lines of the same colour: chance.",
        "overlap",
    )
    yield from _by_layer(
        inspection,
        {share: _shares(share) for share in (POOLED, MEAN, PAPER, OWN, START, CEILING, CHANCE, *inspection.bases)},
        "capture",
        "Leave-one-out capture, layer by layer",
        f"Share of the left-out model's ‖ΔW‖_F² inside {r} directions, mean over {len(inspection.models)} models. {POOLED}, {MEAN} and {PAPER}: computed "
        f"from the other models. {CEILING}: from the model itself. {START}, if shown: directions from which both its adapter and another one started. "
        "Dashed: chance.",
        "captured share",
    )
    if inspection.grouping.pairs:
        side = 1.6 + 0.45 * len(inspection.grouping.order)
        yield render(
            "groups",
            "What each model recovers of each other one",
            f"Row: model; column: the model whose {r} leading directions of ΔW are the basis. Value: the recovered share of the gap between control and "
            "ceiling, in percent, over all weight matrices that both changed. Frames: the groups that share a subspace.",
            lambda figure: _heat_map(figure, inspection),
            (min(7.2, max(3.6, side + 0.8)), min(6.4, max(2.8, side))),
        )
    if spectra := _spectra(inspection):
        yield draw_variance(spectra, "weights-", "Explained variance of the models' mean W, by SVD and by PCA")
    if inspection.bases:
        yield draw_variance(read_spectra({basis.path: None for basis in inspection.bases.values()})[0], "bases-")
    predictions = [found for found in inspection.predictions or () if found.points]
    if predictions:
        yield render(
            "foresight",  # the file name, kept from earlier versions as the JSON key of that name is
            "Capture of a basis and held-out loss of the runs that used it",
            "One point per basis: its capture of the given models' ΔW, and the mean held-out loss of its runs. One panel per combination of data, mode and rank.",
            lambda figure: _scatter(figure, predictions),
            (7.2, 2.6 * math.ceil(len(predictions) / _COLUMNS) + 0.4),
        )
    if functions := [one for one in inspection.function or () if one.replaced[ITSELF].share is not None]:
        yield render(
            "function",
            "What each replacement of ΔW keeps of the function, and of the norm",
            "Filled, with its 95 % interval over records: the share of what the model's own ΔW takes off the loss on its own data. Hollow: the share of "
            f"‖ΔW‖_F². Records: {', '.join(f'{one.model} {one.records}' for one in functions)}. Models whose ΔW is not shown to lower that loss are left "
            f"out. The axis ends at {_ENDS[0]:g} and {_ENDS[1]:g}; the table has what lies beyond.",
            lambda figure: _functions(figure, functions),
            (7.2, 1.0 + 1.1 * len(functions)),
        )


def _overlaps(kind: str, which: Callable[[Overlap], bool], field: str) -> Value:
    return lambda found: [getattr(o, field) for o in found.overlaps if o.kind == kind and which(o)]


def _together(overlap: Overlap, groups: Sequence[set[str]]) -> bool:
    """Whether both models of the pair are in one of `groups`."""
    return any({overlap.one, overlap.other} <= group for group in groups)


def _shares(share: str) -> Value:
    return lambda found: [c.shares[share] for c in found.captures if share in c.shares]


def _by_layer(
    inspection: Inspection, series: dict[str, Value], name: str, heading: str, caption: str, axis: str
) -> Iterator[Figure]:
    """A line per series over layers, with one panel per kind. Kinds with fewer than two layers are left out."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for kind in inspection.kinds:
        for label, value in series.items():
            points = [
                (found.layer, fmean(values))
                for found in inspection.findings
                if found.kind == kind and found.layer is not None and (values := value(found))
            ]
            if len(points) > 1:
                curves.setdefault(kind, {})[label] = points
    if any(not label.endswith(CHANCE) for lines in curves.values() for label in lines):
        rows = math.ceil(len(curves) / _COLUMNS)
        palette = Palette([label.removesuffix(_ITS_CHANCE) for label in series])
        yield render(
            name, heading, caption, lambda figure: _lines(figure, curves, palette, axis, rows), (7.2, 2.5 * rows + 0.4)
        )


def _lines(figure: Any, curves: dict[str, dict[str, list[tuple[int, float]]]], palette: Palette, axis: str, rows: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots(rows, min(_COLUMNS, len(curves)), squeeze=False, sharey=True)
    for ax in axes.flat[len(curves) :]:
        ax.axis("off")
    for ax, (kind, lines) in zip(axes.flat, curves.items(), strict=False):
        for place, (label, points) in enumerate(lines.items()):
            xs, ys = zip(*points, strict=True)
            of = label.removesuffix(_ITS_CHANCE)
            if label.endswith(CHANCE):
                ax.plot(xs, ys, "--", color=palette.color(of), label=label if of == label else None)
            else:
                width = 3.0 if place == 0 else 1.2  # other lines may cover the first
                ax.plot(
                    xs, ys, "-", color=palette.color(of), linewidth=width, marker=palette.marker(of), markersize=3, label=label
                )
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(title=kind, xlabel="layer", ylim=(0, 1.02))
    for ax in axes[:, 0]:
        ax.set_ylabel(axis)
    legend_above(figure, axes)


def _heat_map(figure: Any, inspection: Inspection) -> None:
    """The recovered shares of all pairs, with the models of a group together and a frame around each group."""
    from matplotlib.patches import Rectangle

    order, pairs = inspection.grouping.order, inspection.grouping.pairs
    count = len(order)
    values = np.full((count, count), np.nan)
    for (model, by), found in pairs.items():
        values[order.index(model), order.index(by)] = found.share
    ax = figure.subplots()
    image = ax.imshow(np.clip(values, 0, 1), vmin=0, vmax=1, cmap="Blues")
    for (row, column), value in np.ndenumerate(values) if count <= _MOST_LABELLED else ():
        if not np.isnan(value):
            ax.text(
                column,
                row,
                f"{round(100 * value) + 0:d}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 0.6 else INK,
            )
    for group in inspection.verdict.groups:
        places = [order.index(name) for name in group.models]
        start, size = min(places) - 0.5, len(places)
        ax.add_patch(Rectangle((start, start), size, size, fill=False, edgecolor=PALETTE[1], linewidth=2, clip_on=False))
    ax.set_xticks(range(count), order, rotation=45, ha="right")
    ax.set_yticks(range(count), order)
    ax.grid(False)
    ax.set(xlabel="basis from the ΔW of", ylabel="model", facecolor="#dddddd")  # a model is not its own basis
    ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=ax, label="recovered share", shrink=0.8)


def _spectra(inspection: Inspection) -> list[Spectrum]:
    found = []
    for how in ("svd", "pca"):
        for kind in inspection.kinds:
            curves = [getattr(one.spectra, how) for one in inspection.findings if one.kind == kind and one.spectra]
            if curves:
                columns = list(zip(*curves, strict=False))
                mean = tuple(fmean(values) for values in columns)
                found.append(Spectrum(how, kind, len(curves), mean, tuple(map(min, columns)), tuple(map(max, columns))))
    return found


def _scatter(figure: Any, predictions: Sequence[Prediction]) -> None:
    from matplotlib.ticker import MaxNLocator

    rows = math.ceil(len(predictions) / _COLUMNS)
    axes = figure.subplots(rows, min(_COLUMNS, len(predictions)), squeeze=False)
    palette = Palette([point.basis for found in predictions for point in found.points])
    for ax in axes.flat[len(predictions) :]:
        ax.axis("off")
    for ax, found in zip(axes.flat, predictions, strict=False):
        for point in found.points:
            label = point.basis
            ax.plot(point.capture, point.loss, palette.marker(label), color=palette.color(label), label=label, linestyle="none")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
        ax.margins(0.15)
        ax.set(title=found.stratum, xlabel="captured share of ΔW", ylabel="held-out loss (nats per token)")
    legend_above(figure, axes)


def _functions(figure: Any, functions: Sequence[Function]) -> None:
    """One row per model, and in it a line per replacement, in the order of the table."""
    shown = [by for by in REPLACEMENTS if by not in (NOTHING, ITSELF)]
    palette = Palette(shown)
    ax = figure.subplots()
    step = 0.8 / len(shown)
    for row, function in enumerate(functions):
        for place, by in enumerate(shown):
            found, y = function.replaced[by], row + (place - (len(shown) - 1) / 2) * step
            low, high = found.share_interval or (found.share, found.share)
            style: Any = {"marker": palette.marker(by), "color": palette.color(by), "markersize": 4.5, "linestyle": "none"}
            ax.plot([low, high], [y, y], color=palette.color(by), linewidth=1.4)
            ax.plot(found.share, y, label=by if row == 0 else None, **style)
            ax.plot(found.energy, y, markerfacecolor="white", **style)
    for end in (0, 1):
        ax.axvline(end, color=INK, linewidth=0.8)
    low, high = ax.get_xlim()
    ax.set_xlim(max(low, _ENDS[0]), min(high, _ENDS[1]))
    ax.set_yticks(range(len(functions)), [one.model for one in functions])
    ax.set(xlabel="share of the function (filled) and of the norm (hollow)", ylim=(len(functions) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    legend_above(figure, np.array([[ax]]))
