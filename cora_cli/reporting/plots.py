"""Draws the figures of a report with their captions, as SVG and PNG.

They show the numbers of the tables; only what an axis needs is computed here.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from cora_cli.render.canvas import INK, Figure, Palette, render
from cora_cli.reporting.comparison import title
from cora_cli.reporting.forest import MOST_SHOWN, draw_forest
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.statistics import SEEDS, Estimate, higher_is_better
from cora_cli.reporting.summary import Group, Line
from cora_cli.reporting.variance import Spectrum

_LINES = ("-", "--", ":", "-.")
_PANELS = 12
"""Of explained variance; a mixture of experts has many kinds of layers."""
_LEGEND_LETTERS = 118
"""The number of legend letters that fit on one line of a figure of 7.2 inches."""
_ABOUT_ONE_SIZE = 1.15


def draw_figures(group: Group, prefix: str) -> Iterator[Figure]:
    """Every figure of a group for which there is data; their names start with `prefix`."""
    palette = Palette([line.method.first.row.label for line in group.lines])
    if group.verdict.comparisons:
        yield draw_forest(group, prefix)
    bars = "Intervals: 95 %, over seeds and records if a method has several seeds, otherwise over records. An interval much wider than the others is cut off at the edge of the panel."
    sizes = _sizes(group)
    losses = [line for line in group.chosen if any("loss" in entry for r in line.method.results for entry in r.log)]
    if losses:
        yield render(
            f"{prefix}loss",
            f"{group.name}: loss during training",
            f"Left: loss on the training batches, mean over seeds, smoothed over a twentieth of the steps. Right: held-out loss before, "
            f"during (if measured) and after training; the band is the range over seeds. One line per method at its chosen learning rate. Methods "
            f"of one colour are solid, dashed, dotted and dash-dotted, in the order of the tables. {_cut(losses)}{sizes}",
            lambda figure: _losses(figure, losses[:MOST_SHOWN], palette),
            (7.2, 3.2),
        )
    for attribute, axis, what in (("rank", "rank r", "rank"), ("n_models", "models behind the basis", "number of models")):
        series = _series(group, attribute)
        if series:
            measures = [m for m in group.measures if any(m in line.estimates for lines in series.values() for line in lines)]
            yield render(
                f"{prefix}by-{what.replace(' ', '-')}",
                f"{group.name}: scores against {what}",
                f"Bands: 95 % intervals, over seeds and records if a method has several seeds, otherwise over records. A band much wider than the others is cut off. {sizes}",
                partial(_against, series=series, measures=measures, attribute=attribute, axis=axis, palette=palette),
                (7.2, 2.3 * math.ceil(len(measures) / 3) + 0.4),
            )
    if len(group.chosen) > 1:
        columns = min(3, len(group.measures))
        rows = math.ceil(len(group.measures) / columns)
        yield render(
            f"{prefix}bars",
            f"{group.name}: every method",
            f"{bars} {_cut(group.chosen)}{sizes}",
            lambda figure: _bars(figure, group, palette, rows, columns),
            (7.2, rows * (0.24 * min(len(group.chosen), MOST_SHOWN) + 0.75)),
        )
    points = [line for line in group.chosen if line.method.first.trained]
    if len({line.method.first.trained for line in points}) > 1:
        yield render(
            f"{prefix}pareto",
            f"{group.name}: score against trained parameters",
            f"{bars} Methods are ordered by their trained parameters; methods of about the same size stand closer together. The grey line connects the methods that are better than the base model and every smaller method. Dashed: the base model, which trains nothing. {_cut(points)}{sizes}",
            lambda figure: _pareto(figure, group, points[:MOST_SHOWN], palette),
            (7.2, max(2.6, 0.2 * min(len(points), MOST_SHOWN) + 1.0)),
        )


def draw_variance(spectra: Sequence[Spectrum], prefix: str, heading: str = "Explained variance of the bases") -> Figure:
    """Cumulative explained variance against the number of directions, one panel per kind of group."""
    found = list(dict.fromkeys(spectrum.kind for spectrum in spectra))
    kinds = found[:_PANELS]
    columns = min(3, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    palette = Palette([spectrum.label for spectrum in spectra])
    counted = ", ".join(f"{kind}: {max(s.groups for s in spectra if s.kind == kind)}" for kind in kinds)
    together = {spectrum.label: spectrum.bases for spectrum in spectra if spectrum.bases > 1}
    alike = "; ".join(f"{label}: {count}" for label, count in together.items())
    return render(
        f"{prefix}variance",
        heading,
        f"Share of ‖M‖² (PCA: after the mean column is subtracted) in the leading directions. Line: mean over the groups of a kind; band: their "
        f"range. Number of groups: {counted}."
        + (f" Not shown: {len(found) - len(kinds)} more kinds." if len(found) > len(kinds) else "")
        + (f" Bases in one line, which differ in their models alone: {alike}." if alike else ""),
        lambda figure: _variance(figure, spectra, kinds, rows, columns, palette),
        (7.2, 2.5 * rows + 0.4),
    )


def _variance(figure: Any, spectra: Sequence[Spectrum], kinds: list[str], rows: int, columns: int, palette: Palette) -> None:
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for place, ax in enumerate(axes.flat):
        if place >= len(kinds):
            ax.axis("off")
            continue
        # The curves of related bases nearly coincide. Later ones are thinner, so that earlier ones stay visible below them.
        for number, spectrum in enumerate(s for s in spectra if s.kind == kinds[place]):
            xs, color = range(1, len(spectrum.mean) + 1), palette.color(spectrum.label)
            style = "--" if "pca" in spectrum.label else "-"
            ax.plot(xs, spectrum.mean, style, color=color, label=spectrum.label, linewidth=max(0.8, 3.0 - 0.8 * number))
            ax.fill_between(xs, spectrum.low, spectrum.high, color=color, alpha=0.15, linewidth=0)
        ax.set(title=kinds[place], xlabel="directions kept", ylim=(0, 1.02))
    for ax in axes[:, 0]:
        ax.set_ylabel("explained variance (share)")
    legend_above(figure, axes)


def _losses(figure: Any, lines: Sequence[Line], palette: Palette) -> None:
    training, heldout = figure.subplots(1, 2)
    for line in lines:
        row, color = line.method.first.row, palette.color(line.method.first.row.label)
        before = [other for other in lines[: lines.index(line)] if other.method.first.row.label == row.label]
        style: dict[str, Any] = {"color": color, "linewidth": 1.3, "label": row.label}
        style["linestyle"] = _LINES[len(before) % len(_LINES)]
        steps, values = _mean_by_step([[(e["step"], e["loss"]) for e in r.log if "loss" in e] for r in line.method.results])
        training.plot(steps, _smooth(values), **style)
        curves = [_heldout_points(result) for result in line.method.results]
        steps, values = _mean_by_step(curves)
        if steps:
            by_step = [[value for curve in curves for at, value in curve if at == step] for step in steps]
            heldout.plot(steps, values, marker=palette.marker(row.label), markersize=4, **style)
            heldout.fill_between(
                steps, [min(v) for v in by_step], [max(v) for v in by_step], color=color, alpha=0.15, linewidth=0
            )
    training.set(xlabel="optimizer step", ylabel="training loss (nats per token)")
    heldout.set(xlabel="optimizer step", ylabel="held-out loss (nats per token)")
    legend_above(figure, [heldout, training])


def _heldout_points(result: Any) -> list[tuple[int, float]]:
    record = result.record.get("heldout")
    if not record:
        return []
    points = [(entry["step"], entry["heldout_loss"]) for entry in result.log if "heldout_loss" in entry]
    return [(0, record["before"]["loss"]), *points, (result.record["speed"]["steps"], record["after"]["loss"])]


def _against(
    figure: Any, series: dict[str, list[Line]], measures: Sequence[str], attribute: str, axis: str, palette: Palette
) -> None:
    columns = min(3, len(measures))
    axes = figure.subplots(math.ceil(len(measures) / columns), columns, squeeze=False)
    values = sorted({getattr(line.method.first.row, attribute) for lines in series.values() for line in lines})
    for place, ax in enumerate(axes.flat):
        if place >= len(measures):
            ax.axis("off")
            continue
        drawn: Counter[str] = Counter()
        for name, lines in series.items():
            known = [line for line in lines if measures[place] in line.estimates]
            xs = [getattr(line.method.first.row, attribute) for line in known]
            found = [line.estimates[measures[place]] for line in known]
            label = lines[0].method.first.row.label
            color, style = palette.color(label), _LINES[drawn[label] % len(_LINES)]
            drawn[label] += 1
            marker = palette.marker(label)
            ax.plot(xs, [e.value for e in found], style, marker=marker, markersize=4, color=color, label=name)
            ax.fill_between(xs, [e.low for e in found], [e.high for e in found], color=color, alpha=0.12, linewidth=0)
        ax.set_ylim(
            *_limits(
                [
                    line.estimates[measures[place]]
                    for lines in series.values()
                    for line in lines
                    if measures[place] in line.estimates
                ]
            )
        )
        if attribute == "rank":
            ax.set_xscale("log", base=2)
        ax.set_xticks(values, [str(value) for value in values])
        ax.minorticks_off()
        ax.set(title=_titled(measures[place]), xlabel=axis)
    legend_above(figure, axes)


def _bars(figure: Any, group: Group, palette: Palette, rows: int, columns: int) -> None:
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    lines = group.chosen[:MOST_SHOWN]
    for place, ax in enumerate(axes.flat):
        if place >= len(group.measures):
            ax.axis("off")
            continue
        measure = group.measures[place]
        for y, line in enumerate(lines):
            if found := line.estimates.get(measure):
                ax.barh(y, found.value, color=palette.color(line.method.first.row.label), alpha=0.75, height=0.7)
                ax.plot([found.low, found.high], [y, y], color=INK, linewidth=1.1, solid_capstyle="butt")
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.set(title=_titled(measure))
        known = [line.estimates[measure] for line in group.chosen if measure in line.estimates]
        ax.set_xlim(0, max(min(max(e.high for e in known), 1.35 * max(e.value for e in known)), 1e-6))
    axes[0, 0].set_yticks(range(len(lines)), [_short(line.title) for line in lines])
    axes[0, 0].invert_yaxis()


def _pareto(figure: Any, group: Group, points: Sequence[Line], palette: Palette) -> None:
    order = ("rougeL", "sacrebleu", "bertscore_f1", "meteor", "rouge1", "rouge2", "nll", "brier", "ece")
    preferred = [m for m in order if m in group.measures][:1]
    measures = [*preferred, *(m for m in group.measures if m == LOSS)]
    places, ticks = side_by_side([line.method.first.trained or 0 for line in points])
    axes = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    for ax, measure in zip(axes, measures, strict=True):
        sign = 1 if higher_is_better(measure) else -1
        front: list[tuple[int | None, float, float]] = []
        base = [
            line.estimates[measure].value
            for line in group.chosen
            if line.method.first.row.mode == "base" and measure in line.estimates
        ]
        for place, line in sorted(zip(places, points, strict=True), key=lambda pair: pair[1].method.first.trained or 0):
            if (found := line.estimates.get(measure)) is None:
                continue
            trained, label = line.method.first.trained, line.method.first.row.label
            ax.plot([found.low, found.high], [place, place], color=palette.color(label), linewidth=1, alpha=0.6)
            ax.plot(found.value, place, palette.marker(label), color=palette.color(label), markersize=5)
            if all(sign * found.value > sign * smaller for smaller in (*base, *(value for *_, value in front))):
                if front and front[-1][0] == trained:
                    front.pop()
                front.append((trained, place, found.value))
        ax.plot([value for *_, value in front], [place for _, place, _ in front], color="#888888", linewidth=1, zorder=0)
        for value in base:
            ax.axvline(value, color="#888888", linestyle="--", linewidth=1)
        shown = [line.estimates[measure] for line in group.chosen if measure in line.estimates]
        if shown:
            ax.set_xlim(*_limits(shown))
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.set(xlabel=_titled(measure))
    axes[0].set_yticks(places, [_short(line.title) for line in points])
    axes[0].set_ylim(max(places) + 0.7, min(places) - 0.7)
    sizes = axes[-1].secondary_yaxis("right")
    labels = (_rounded(least) + (f"\n–{_rounded(most)}" if most > least else "") for _, least, most in ticks)
    sizes.set_yticks([middle for middle, *_ in ticks], list(labels))
    sizes.tick_params(axis="y", length=0)
    sizes.spines["right"].set_visible(False)
    sizes.set_ylabel("trained parameters (not to scale)")


def side_by_side(sizes: Sequence[int]) -> tuple[list[float], list[tuple[float, int, int]]]:
    """Rows on an axis for points of these sizes, in the given order, and one tick per group of similar sizes.

    Points are placed one after another by size, with a gap between groups. The sizes of a group are within a factor of `_ABOUT_ONE_SIZE`.
    A tick is the middle of its group with the smallest and the largest size.
    """
    places = [0.0] * len(sizes)
    groups: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=sizes.__getitem__):
        if not groups or sizes[index] > _ABOUT_ONE_SIZE * sizes[groups[-1][0]]:
            groups.append([])
        places[index] = sum(map(len, groups)) + len(groups)
        groups[-1].append(index)
    ends = [(group[0], group[-1]) for group in groups]
    return places, [((places[first] + places[last]) / 2, sizes[first], sizes[last]) for first, last in ends]


def _series(group: Group, attribute: str) -> dict[str, list[Line]]:
    """Lines by name, for labels with several values of the attribute, sorted by that value. Of rank and number of models, only the attribute changes
    along a line; all else is equal in a grid.
    """
    other, symbol = {"rank": ("n_models", "n"), "n_models": ("rank", "r")}[attribute]
    found: dict[tuple[str, int | None], list[Line]] = {}
    for line in group.chosen:
        row = line.method.first.row
        if getattr(row, attribute) is not None:
            found.setdefault((row.label, getattr(row, other)), []).append(line)
    labels = Counter(label for label, _ in found)
    several = {}
    for (label, fixed), lines in found.items():
        values = [getattr(line.method.first.row, attribute) for line in lines]
        if len(set(values)) > 1 and len(set(values)) == len(values):
            name = label if labels[label] == 1 or fixed is None else f"{label} {symbol}={fixed}"
            several[name] = sorted(lines, key=lambda line: getattr(line.method.first.row, attribute))
    return several


def _mean_by_step(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], list[float]]:
    """Mean over the curves, at every step that all of them have."""
    known = [dict(curve) for curve in curves if curve]
    steps = sorted(set.intersection(*(set(curve) for curve in known))) if known else []
    return steps, [sum(curve[step] for curve in known) / len(known) for step in steps]


def _smooth(values: Sequence[float]) -> list[float]:
    half = len(values) // 40
    windows = (values[max(0, place - half) : place + half + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _limits(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Limits of an axis that shows intervals of the usual width in full and cuts off one that is much wider than the others."""
    values = [estimate.value for estimate in estimates]
    spread = (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
    low, high = min(e.low for e in estimates), max(e.high for e in estimates)
    reach = max(spread, statistics.median(max(e.high - e.value, e.value - e.low) for e in estimates))
    margin = 0.05 * (spread + reach)
    return max(low, min(values) - reach) - margin, min(high, max(values) + reach) + margin


def _sizes(group: Group) -> str:
    estimates = [estimate for line in group.chosen for estimate in line.estimates.values()]
    seeds = sorted({estimate.seeds if estimate.kind == SEEDS else 1 for estimate in estimates})
    prompts = sorted({e.n for line in group.chosen for m, e in line.estimates.items() if m != LOSS})
    records = sorted({line.estimates[LOSS].n for line in group.chosen if LOSS in line.estimates})
    counted = [f"n = {'/'.join(map(str, prompts))} prompts"] if prompts else []
    counted += [f"{'/'.join(map(str, records))} held-out records"] if records else []
    counted += [f"seeds per method: {'/'.join(map(str, seeds))}"]
    return f"{'; '.join(counted)}."


def _cut(lines: Sequence[Line]) -> str:
    """A sentence on the methods that a plot of many leaves out."""
    left_out = len(lines) - MOST_SHOWN
    return f"The plot shows the first {MOST_SHOWN} methods; the tables have {left_out} more. " if left_out > 0 else ""


def _titled(measure: str) -> str:
    return title(measure) if higher_is_better(measure) else f"{title(measure)} (lower is better)"


def _rounded(count: float) -> str:
    """`20k`, `1.5M`: a count as an axis shows it."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def legend_above(figure: Any, axes: Any) -> None:
    """One legend for all panels, with each label once."""
    flat = axes.flat if hasattr(axes, "flat") else axes
    entries: dict[str, Any] = {}
    for ax in flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(_short(label), handle)
    if entries:
        # Each column is as wide as the longest label with its marker, and all columns must fit the figure.
        columns = _LEGEND_LETTERS // (max(map(len, entries)) + 7)
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=min(4, columns, len(entries)))
