"""Writes an inspection as terminal text, Markdown, JSON and one HTML page, printed or into a directory.

JSON: `{"format_version": 2, "models", "base", "bases", "rank", "side", "findings", "foresight", "function", "verdict", "bytes_read", "seconds"}`. `models` maps
short names to references, `bases` to paths and hashes. A finding has the fields of `measure.Findings`, with its overlaps, captures and
spectra. `foresight` is a list with the fields of `prediction.Prediction`, or null if no runs were given, and `function` one with those of `functional.Function`, or null if no data were given. `verdict` has `headline`, `sentences`,
`ways` (the recovered shares by model), `intervals` (theirs, by model: `[low, high]` or null), `groups` (each with `models`, `partly` and the
`recovered` shares by model, in the fields of `groups.Recovered`), `outside` (judged models in no group), `between`, `pairs` (what the directions of
the model `by` recover of `model`), `order` (groups together), `unjudged` and `rule`. Version 1 had no groups, and its `pooled ΔW` was not normalised. Programs may read these files, so keys keep their names even where the code now
uses another: `foresight` for predictions, `ways` for recovered shares.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from cora_cli import __version__, writing
from cora_cli.inspection.inspect import Inspection
from cora_cli.inspection.inspection_document import build_document
from cora_cli.inspection.sharing_verdict import RULE
from cora_cli.progress import say
from cora_cli.records import sealed
from cora_cli.render.canvas import Figure, plot_files
from cora_cli.render.html import page
from cora_cli.render.text import markdown, terminal

FORMAT_VERSION = 2
FILES = {"terminal": "inspect.txt", "markdown": "inspect.md", "json": "inspect.json", "html": "inspect.html"}
"""The formats and their file names in the output directory."""


def report(inspection: Inspection, format: str, output_dir: Path | None, width: int | None = None) -> str:
    """Return the inspection in one format, its text for a terminal in lines of at most `width` characters.

    With `output_dir`, also write all formats and the plots there.
    """
    figures: list[Figure] = []
    if output_dir is not None or format == "html":
        from cora_cli.inspection.figures import draw

        figures = list(draw(inspection))
    complete, short = build_document(inspection, figures, detail=True), build_document(inspection)
    writers: dict[str, Callable[[], str]] = {
        "json": lambda: to_json(inspection),
        "terminal": lambda: terminal(short),
        "markdown": lambda: markdown(complete),
        "html": lambda: page([complete], "cora inspect", __version__),
    }
    if output_dir is not None:
        texts = {output_dir / FILES[name]: write() for name, write in writers.items()}
        writing.write_together(texts | plot_files(figures, output_dir / "plots"))
        say(f"{output_dir}: {', '.join(FILES.values())} and {len(figures)} plots")
    return terminal(short, width) if format == "terminal" else writers[format]()


def to_json(inspection: Inspection) -> str:
    """The complete inspection as JSON; the module docstring describes the keys."""
    predictions, verdict = inspection.predictions, inspection.verdict
    values = {
        "format_version": FORMAT_VERSION,
        "models": inspection.models,
        "base": inspection.base,
        "bases": {name: {"path": str(basis.path), "sha256": basis.sha256} for name, basis in inspection.bases.items()},
        "rank": inspection.rank,
        "side": inspection.side,
        "findings": [dataclasses.asdict(found) for found in inspection.findings],
        "foresight": None if predictions is None else [dataclasses.asdict(found) for found in predictions],
        "function": None if inspection.function is None else [dataclasses.asdict(found) for found in inspection.function],
        "verdict": {
            "headline": verdict.headline,
            "sentences": verdict.sentences,
            "ways": {name: one.share for name, one in verdict.recovered.items()},
            "intervals": {name: one.interval for name, one in verdict.recovered.items()},
            "groups": [dataclasses.asdict(group) for group in verdict.groups],
            "outside": verdict.outside,
            "between": verdict.between,
            "pairs": [
                {"model": model, "by": by, **dataclasses.asdict(one)} for (model, by), one in inspection.grouping.pairs.items()
            ],
            "order": inspection.grouping.order,
            "unjudged": verdict.unjudged,
            "rule": RULE,
        },
        "bytes_read": inspection.bytes_read,
        "seconds": inspection.seconds,
    }
    return json.dumps(sealed(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
