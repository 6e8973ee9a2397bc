"""Writes the table of methods, the notes on them, and what `make demo`, `make bench`, `make families`, `cora report` and `cora inspect`
printed, between the markers in README.md and docs/, so that no table is typed by hand.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cora_cli.methods.registry import method_notes, methods_table
from cora_cli.render.markdown_table import markdown_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PLOTS = ("forest.svg", "pareto.png")
"""Of the report of the baselines. Of its further parts, the last one."""
PARTS = ("rank", "small", "four-bit")
"""The further grids of baselines."""
JUDGED = ("table5", "table6")
"""The grids of the paper's tables that have a judge."""
FOREST = ROOT / "docs" / "honest-forest.svg"
VERDICTS = ROOT / "docs" / "results" / "prediction-verdicts.json"
RANDOM = "random orthonormal B"


def main() -> None:
    """Replace the marked parts for which there are results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo" / "report.md", help="what `make demo` wrote")
    parser.add_argument(
        "--demo-report",
        type=Path,
        default=ROOT / "demo-report" / "report.md",
        help="`cora report demo/runs/{lora,fb,tb,fb-orthonormal} -o demo-report`",
    )
    parser.add_argument(
        "--bench",
        type=Path,
        default=ROOT / "benchmarks" / "results.json",
        help="what `make bench` and `benchmarks/growth.py` wrote",
    )
    parser.add_argument("--families", type=Path, default=ROOT / "families.md", help="what `make families` wrote")
    parser.add_argument(
        "--honest", type=Path, default=ROOT / "report", help="the directory that `cora report runs/honest -o report` wrote"
    )
    parser.add_argument(
        "--inspect", type=Path, default=ROOT / "inspection" / "inspect.md", help="`cora inspect demo/models/* … -o inspection`"
    )
    parser.add_argument(
        "--baselines",
        type=Path,
        default=ROOT / "baselines",
        help="the directory that `cora report runs/baselines -o baselines` wrote",
    )
    for table in JUDGED:
        parser.add_argument(
            f"--{table}",
            type=Path,
            default=ROOT / table,
            help=f"the directory that `cora report runs/{table} -o {table}` wrote",
        )
    for part in PARTS:
        parser.add_argument(
            f"--{part}",
            type=Path,
            default=ROOT / part,
            help=f"the directory that `cora report runs/{part} -o {part}` wrote, of configs/baselines/{part}.yaml",
        )
    parser.add_argument(
        "--halving",
        type=Path,
        default=ROOT / "docs" / "results" / "halving.json",
        help="`benchmarks/halving.py --out runs/halving -o docs/results/halving.json`",
    )
    parser.add_argument(
        "--prediction",
        type=Path,
        default=ROOT / "docs" / "results" / "prediction.json",
        help="`benchmarks/prediction.py runs/prediction … -o docs/results/prediction.json --plot docs`",
    )
    parser.add_argument(
        "--prediction-report",
        type=Path,
        default=ROOT / "prediction",
        help="the directory that `cora report runs/prediction -o prediction` wrote",
    )
    options = parser.parse_args()
    replace("modes", methods_table())
    replace("method-notes", method_notes())
    for name, path, body in (
        ("demo", options.demo, lambda text: text.partition("\n")[2].strip()),
        ("demo-report", options.demo_report, progress_and_verdict),
        ("families", options.families, str.strip),
        ("inspect", options.inspect, verdict_and_captures),
        ("halving", options.halving, lambda measured: json.loads(measured)["markdown"]),
        ("prediction", options.prediction, correlations),
    ):
        if path.exists():
            replace(name, body(path.read_text(encoding="utf-8")))
    if options.bench.exists():
        replace_benchmarks(json.loads(options.bench.read_text(encoding="utf-8")))
    if options.honest.exists():
        replace("honest", verdict_and_scores((options.honest / "report.md").read_text(encoding="utf-8")))
        [plot] = (options.honest / "plots").glob("*forest.svg")
        shutil.copyfile(plot, FOREST)
    if options.baselines.exists():
        replace("baselines", scores_and_costs((options.baselines / "report.md").read_text(encoding="utf-8")))
        for name in PLOTS:
            [plot] = (options.baselines / "plots").glob(f"*{name}")
            shutil.copyfile(plot, ROOT / "docs" / f"baselines-{name}")
    if options.prediction_report.exists():
        verdicts = verdicts_of(json.loads((options.prediction_report / "report.json").read_text(encoding="utf-8")))
        VERDICTS.write_text(json.dumps(verdicts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        replace("prediction-verdict", against_random(verdicts))
    for name, shown in [*((part, scores_and_costs) for part in PARTS), *((table, programs_and_judge) for table in JUDGED)]:
        if (place := getattr(options, name.replace("-", "_"))).exists():
            replace(name, shown((place / "report.md").read_text(encoding="utf-8")))
            for plot in (place / "plots").glob(f"*{PLOTS[-1]}") if name in PARTS else ():
                shutil.copyfile(plot, ROOT / "docs" / f"baselines-{name}-{PLOTS[-1]}")


def replace(name: str, body: str) -> None:
    """Put `body` between the markers of `name`, in the one page that has them."""
    marked = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    found = [page for page in PAGES if marked.search(page.read_text(encoding="utf-8"))]
    if len(found) != 1:
        sys.exit(f"{len(found)} pages have a part between <!-- {name}:begin --> and <!-- {name}:end -->, not one")
    text = found[0].read_text(encoding="utf-8")
    found[0].write_text(marked.sub(lambda match: f"{match[1]}{body}\n{match[2]}", text), encoding="utf-8")


def replace_benchmarks(results: dict[str, Any]) -> None:
    """The table of growth, and the tables of the stages, of whichever were measured."""
    if growth := results.pop("growth", None):
        replace("growth", growth["markdown"])
    if results.keys() - {"machine"}:
        replace("bench", benchmark_summary(results))
        replace("bench-details", benchmark_details(results))


def progress_and_verdict(report: str) -> str:
    """The progress and the verdict without its plot and the plot's caption, from a report in Markdown."""
    verdict = report.partition("## Tables\n")[0].partition("## Verdict\n")[2].strip()
    parts = verdict.split("\n\n")
    shown = (
        part
        for before, part in zip(["", *parts], parts, strict=False)
        if not part.startswith("![") and not before.startswith("![")
    )
    return "\n\n".join(part for part in shown if not part.startswith("Preset "))


def verdict_and_scores(report: str) -> str:
    """The progress, the verdict and the first table with its notes, from a report in Markdown."""
    first = report.partition("## Tables\n")[2].strip().split("\n### ")[0]
    shown = "\n\n".join([progress_and_verdict(report), first.partition("\n")[2].strip()])
    # Tables that the pages leave out.
    shown = shown.replace(" The table of the sweep is below.", "")
    return shown.replace(
        "The table of tests below has every result and the rule.", "The rule is that [of the verdict](verdict.md)."
    )


def scores_and_costs(report: str) -> str:
    """The progress, the verdict and the tables of scores and costs with their notes, from a report in Markdown."""
    costs = report.partition("## Tables\n")[2].strip().split("\n### ")[1]
    return "\n\n".join([verdict_and_scores(report), costs.partition("\n")[2].strip()])


def programs_and_judge(report: str) -> str:
    """The progress, the tables of scores and programs where programs ran, and the section on the judge, from a report in Markdown."""
    progress = next(line for line in report.splitlines() if line.endswith(" rows are finished."))
    parts = dict(part.partition("\n")[::2] for part in report.split("\n## ")[1:])
    scores = parts["Tables"].split("\n### ")[1].partition("\n")[2]
    programs = [scores, parts["Programs"]] if "Programs" in parts else []
    return "\n\n".join(text.strip() for text in (progress, *programs, parts["Judge"])).replace("### ", "#### ")


def verdict_and_captures(inspection: str) -> str:
    """The verdict with its rule and the table of leave-one-out capture with its notes, from an inspection in Markdown."""
    verdict, _, tables = inspection.partition("## Verdict\n")[2].partition("## Tables\n")
    captures = tables.partition("### Leave-one-out capture\n")[2].partition("\n### ")[0]
    return "\n\n".join([verdict.strip(), captures.strip()])


def correlations(measured: str) -> str:
    """The tables of `benchmarks/prediction.py`, from its JSON, with its plot behind the first one, and where the numbers are."""
    result = json.loads(measured)
    first, said, *others = result["markdown"].split("\n\n")
    plot = "![The ranks of the bases in each measure and in the held-out loss](prediction.svg)"
    cost = f"The measures took {result['processor_seconds'] / 60:.0f} minutes of processor time ([all numbers](results/prediction.json))."
    return "\n\n".join([first, f"{said} {cost}", plot, *others])


def verdicts_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The headline and the comparisons of each data set of a grid, from its report as JSON."""
    (grid,) = report["experiments"]
    return {group["name"]: {name: group["verdict"][name] for name in ("headline", "comparisons")} for group in grid["groups"]}


def against_random(verdicts: Mapping[str, Any]) -> str:
    """Each B compared with the random one, in a column for each data set and mode."""
    cells: dict[str, dict[str, str]] = {}
    for group, verdict in verdicts.items():
        for comparison in verdict["comparisons"]:
            if comparison["role"] != RANDOM:
                continue
            mode, _, label = comparison["one"].partition(" ")
            (test,) = comparison["tests"]
            low, high = test["ci95"]
            cell = f"{test['difference']:+.3f} [{low:+.3f}, {high:+.3f}] {test['outcome']}"
            cells.setdefault(label.replace(" r=16", ""), {})[f"{group}, {mode}"] = cell
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    rows = [[f"`{label}`", *(row.get(name, "–") for name in columns)] for label, row in cells.items()]
    return markdown_table(["B, minus the random one", *columns], rows)


def benchmark_summary(results: Mapping[str, Any]) -> str:
    """One row for each peer of each stage, and the machine."""
    headers = ["stage", "peer", "ours ÷ peer, speed", "target", "ours ÷ peer, memory"]
    rows = [row for name, result in results.items() if name != "machine" for row in result["summary"]]
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    return "\n".join([markdown_table(headers, rows), "", f"Median [min, max] over rounds. Machine: {machine}."])


def benchmark_details(results: Mapping[str, Any]) -> str:
    """Each stage's own table and notes under its name."""
    lines = []
    for name, result in results.items():
        if name == "machine":
            continue
        table, _, notes = result["markdown"].partition("\n\n")
        lines += [f"### {name}", "", table, "", *(f"- {line}" for line in notes.splitlines()), ""]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    main()
