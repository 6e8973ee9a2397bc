"""Puts the table of modes, and what `make demo`, `make bench`, `cora report` and `cora inspect` printed, between the README's markers: no
table is typed by hand.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cora_cli.methods.registry import methods_table
from cora_cli.render.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PARETO = ROOT / "docs" / "baselines-pareto.png"


def main() -> None:
    """Replace the marked parts of README.md for which there are results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo" / "report.md", help="what `make demo` wrote")
    parser.add_argument("--bench", type=Path, default=ROOT / "benchmarks" / "results.json", help="what `make bench` wrote")
    parser.add_argument(
        "--honest", type=Path, default=ROOT / "report" / "report.md", help="`cora report runs/honest -o report`"
    )
    parser.add_argument(
        "--inspect", type=Path, default=ROOT / "inspection" / "inspect.md", help="`cora inspect demo/models/* … -o inspection`"
    )
    parser.add_argument(
        "--baselines", type=Path, default=ROOT / "baselines", help="the directory that `cora report runs/baselines -o baselines` wrote"
    )
    options = parser.parse_args()
    replace("modes", methods_table())
    if options.demo.exists():
        replace("demo", options.demo.read_text(encoding="utf-8").partition("\n")[2].strip())
    if options.bench.exists():
        replace("bench", benchmark_table(json.loads(options.bench.read_text(encoding="utf-8"))))
    if options.honest.exists():
        replace("honest", verdict_and_scores(options.honest.read_text(encoding="utf-8")))
    if options.inspect.exists():
        replace("inspect", verdict_and_captures(options.inspect.read_text(encoding="utf-8")))
    if options.baselines.exists():
        replace("baselines", scores_and_costs((options.baselines / "report.md").read_text(encoding="utf-8")))
        PARETO.parent.mkdir(exist_ok=True)
        [plot] = (options.baselines / "plots").glob("*pareto.png")
        shutil.copyfile(plot, PARETO)


def replace(name: str, body: str) -> None:
    """Put `body` between the markers of `name`."""
    marked = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    text, replaced = marked.subn(lambda match: f"{match[1]}{body}\n{match[2]}", README.read_text(encoding="utf-8"))
    if replaced != 1:
        sys.exit(f"README.md has no part between <!-- {name}:begin --> and <!-- {name}:end -->")
    README.write_text(text, encoding="utf-8")


def verdict_and_scores(report: str) -> str:
    """Of a report in Markdown, how much is finished, the verdict, and the first table with its notes."""
    head, _, rest = report.partition("## Tables\n")
    progress, _, verdict = head.partition("## Verdict\n")
    first = rest.strip().split("\n### ")[0]
    return "\n\n".join([progress.strip().splitlines()[-1], verdict.strip(), first.partition("\n")[2].strip()])


def scores_and_costs(report: str) -> str:
    """Of a report in Markdown, how much is finished, and the tables of scores and of costs with their notes."""
    head, _, rest = report.partition("## Tables\n")
    scores, costs = (table.partition("\n")[2].strip() for table in rest.strip().split("\n### ")[:2])
    return "\n\n".join([head.partition("## Verdict\n")[0].strip().splitlines()[-1], scores, costs])


def verdict_and_captures(inspection: str) -> str:
    """Of an inspection in Markdown, the verdict with its rule, and the table of leave-one-out capture with its notes."""
    tables, _, rest = inspection.partition("## Verdict\n")
    verdict = rest.partition("\n\nRead ")[0]
    captures = tables.partition("### Leave-one-out capture\n")[2].partition("\n### ")[0]
    return "\n\n".join([verdict.strip(), captures.strip()])


def benchmark_table(results: Mapping[str, Any]) -> str:
    """The summary of every stage, the machine, and each stage's own table and notes in a folded part."""
    stages = {name: result for name, result in results.items() if name != "machine"}
    headers = ["stage", "peer", "ours ÷ peer, speed", "target", "ours ÷ peer, memory"]
    rows = [row for result in stages.values() for row in result["summary"]]
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines = [markdown_table(headers, rows), "", f"Median [min, max] over rounds. Machine: {machine}.", ""]
    for name, result in stages.items():
        table, _, notes = result["markdown"].partition("\n\n")
        listed = "\n".join(f"- {line}" for line in notes.splitlines())
        lines += [f"<details><summary>{name}</summary>", "", table, "", listed, "", "</details>", ""]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    main()
