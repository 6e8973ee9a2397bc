"""The entry point of `cora report`: collects finished runs, summarises them, draws the figures and writes every format.

The directories that it reads stay unchanged.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from cora_cli import __version__, writing
from cora_cli.errors import CoraError
from cora_cli.progress import say
from cora_cli.render.canvas import Figure, plot_files
from cora_cli.render.document import Block
from cora_cli.render.html import page
from cora_cli.render.latex import latex
from cora_cli.render.text import markdown, terminal
from cora_cli.reporting.answers import answer_sets
from cora_cli.reporting.collect import collect
from cora_cli.reporting.found import find_experiments
from cora_cli.reporting.numbers import to_csv, to_json
from cora_cli.reporting.plots import draw_figures, draw_variance
from cora_cli.reporting.report_document import build_document
from cora_cli.reporting.results import Missing
from cora_cli.reporting.summary import Summary, summarise
from cora_cli.reporting.variance import read_spectra

FILES = {
    "terminal": "report.txt",
    "markdown": "report.md",
    "latex": "report.tex",
    "csv": "report.csv",
    "json": "report.json",
    "html": "report.html",
}
"""The formats and their file names in the output directory."""


class NothingToReport(CoraError):
    """Nothing that a report could show is finished yet."""


@dataclasses.dataclass(frozen=True)
class Composed:
    """A report before it is written: `texts` has a function for each format. Of `rows`, `finished` have all their parts.

    `brief` is what a terminal shows of a report that is also written.
    """

    blocks: list[Block]
    brief: list[Block]
    figures: list[Figure]
    texts: dict[str, Callable[[], str]]
    finished: int
    rows: int

    def write(self, output_dir: Path) -> None:
        """Write all formats and the plots. Raises `CoraError` as `writing.refuse_foreign` does."""
        writing.refuse_foreign(output_dir, FILES.values(), FILES["json"])
        names = sorted(self.texts, key=lambda name: name != "json")
        texts = {output_dir / FILES[name]: self.texts[name]() for name in names}
        writing.write_together(texts | plot_files(self.figures, output_dir / "plots"))


def report(
    outputs: Sequence[str],
    format: str = "terminal",
    output_dir: Path | None = None,
    metrics: tuple[str, ...] | None = None,
    width: int | None = None,
) -> str:
    """Return the report on finished directories in one format. With `output_dir`, also write all formats and the plots there.

    `width` limits the lines of the returned text for a terminal, which gets the brief form of a report that is also written. Raises `CoraError` as `compose` does.
    """
    composed = compose(outputs, metrics, draws=output_dir is not None or format == "html")
    if output_dir is not None:
        composed.write(output_dir)
        say(f"{output_dir}: {', '.join(FILES.values())} and {len(composed.figures)} plots")
    if output_dir is not None and width is not None and format == "terminal":
        return terminal(composed.brief, width)
    return terminal(composed.blocks, width) if format == "terminal" else composed.texts[format]()


def compose(outputs: Sequence[str], metrics: tuple[str, ...] | None = None, draws: bool = True) -> Composed:
    """Read the directories and compose their report, with figures if it `draws`; `metrics` restricts the metrics by name.

    Raises `CoraError` if a directory was not written by cora, and `NothingToReport` if nothing in them is finished, or if none of the
    `metrics` was measured.
    """
    collections = [collect(experiment, metrics) for experiment in find_experiments(outputs)]
    has_bases = any(row.basis and row.basis.is_file() for c in collections for row in c.experiment.rows if row.run is None)
    has_judged = any(collection.judged for collection in collections)
    if not has_bases and not has_judged and not any(collection.results for collection in collections):
        first = next(entry for collection in collections for entry in collection.missing)
        count = sum(len(collection.missing) for collection in collections)
        raise NothingToReport(
            f"nothing in {', '.join(outputs)} is finished, so there is nothing to report ({count} missing; {first.row.name}: {first.reason})"
        )
    summaries = [summarise(collection) for collection in collections]
    if (
        metrics
        and not has_bases
        and not has_judged
        and not any(set(group.measures) & set(metrics) for summary in summaries for group in summary.groups)
    ):
        raise NothingToReport(
            f"none of the metrics {', '.join(metrics)} was measured in {', '.join(outputs)}; name others or leave --metrics out"
        )
    drawn: list[list[Figure]] = [[] for _ in summaries]
    if draws:
        drawn = [
            _draw(summary, f"{number}-" if len(summaries) > 1 else "") for number, summary in enumerate(summaries, start=1)
        ]
    documents = [build_document(summary, figures) for summary, figures in zip(summaries, drawn, strict=True)]
    results = {(place, result.row.name) for place, found in enumerate(collections) for result in found.results}
    missing = {(place, entry.row.name) for place, found in enumerate(collections) for entry in found.missing}
    return Composed(
        [block for document in documents for block in document],
        [block for summary in summaries for block in build_document(summary, brief=True)],
        [figure for figures in drawn for figure in figures],
        _writers(summaries, documents),
        finished=len(results - missing),
        rows=len(results | missing),
    )


def _writers(summaries: Sequence[Summary], documents: Sequence[list[Block]]) -> dict[str, Callable[[], str]]:
    blocks = [block for document in documents for block in document]
    title = "; ".join(summary.collection.experiment.title for summary in summaries)
    return {
        "terminal": lambda: terminal(blocks),
        "markdown": lambda: markdown(blocks),
        "latex": lambda: latex(blocks),
        "csv": lambda: to_csv(summaries),
        "json": lambda: to_json(summaries),
        "html": lambda: page(documents, title, __version__, [each for summary in summaries for each in answer_sets(summary)]),
    }


def _draw(summary: Summary, prefix: str) -> list[Figure]:
    """All figures of an experiment. A basis that cannot be read is added to the missing rows."""
    experiment, missing = summary.collection.experiment, summary.collection.missing
    paths: dict[Path, int | None] = dict.fromkeys(experiment.bases)
    for row in experiment.rows:
        if row.basis is not None and row.basis.is_file():
            paths[row.basis] = row.n_models
    trained: dict[Path, set[str]] = {}
    for result in summary.collection.results:
        if result.row.basis is not None and (basis := result.record.get("basis")):
            trained.setdefault(result.row.basis, set()).add(basis["sha256"])
    spectra, damaged = read_spectra(paths, trained)
    missing += [Missing(dataclasses.replace(experiment.rows[0], name=experiment.name), "basis", text) for text in damaged]
    figures = [draw_variance(spectra, prefix)] if spectra else []
    for number, group in enumerate(summary.groups, start=1):
        figures += draw_figures(group, f"{prefix}{_file_name(group.name) if len(summary.groups) > 1 else ''}{number}-")
    return figures


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:40] + "-"
