"""The report's tables of generated programs: their fates, and proxies of their readability."""

from pathlib import Path

import pytest

from cora_cli import writing
from cora_cli.evaluation.readability import PROXIES
from cora_cli.reading import read_json
from cora_cli.records import Metrics
from cora_cli.render.text import terminal
from cora_cli.reporting.collect import collect
from cora_cli.reporting.found import find_experiments
from cora_cli.reporting.report_document import build_document
from cora_cli.reporting.summary import summarise
from tests.reporting.helpers import Made, make_grid


def count(grid: Path, **counts: object) -> None:
    """Add to the metrics of every row what was counted in its programs."""
    for number, path in enumerate(sorted(grid.rglob("metrics.json"))):
        writing.write_json(path, read_json(path, Metrics) | {name: of(number) for name, of in counts.items()})


def report(grid: Path) -> str:
    (experiment,) = find_experiments((str(grid),))
    return terminal(build_document(summarise(collect(experiment))), None)


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    return make_grid(tmp_path / "grid", [Made("fb", "fb", seed) for seed in (0, 1)], prompts=4)


def test_fates_and_proxies_have_a_row_for_each_seed(grid) -> None:
    proxy = {"value": 0.5, "ci95": [0.25, 0.75], "n": 4, "what": PROXIES["parses"]}
    fates = ({"passed": 3, "wrong": 1}, {"passed": 1, "not code": 3})
    count(grid, fates=lambda n: fates[n], readability_proxies=lambda n: {"parses": proxy, "names": {**proxy, "n": 3}})
    text = report(grid)
    table = text[text.index("tiny – fates of the programs") : text.index("tiny – proxies of readability")]
    cells = [[part.strip() for part in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert cells[0] == ["row", "programs", "passed", "wrong", "not code"]
    assert [row[1:] for row in cells[2:]] == [["4", "3", "1", "0"], ["4", "1", "0", "3"]]
    assert [row[0].rpartition(", ")[2] for row in cells[2:]] == ["seed 0", "seed 1"]
    assert "0.50 [0.25, 0.75]" in text
    assert "none of them is readability" in text
    assert "n = 3 to 4 records" in text


def test_a_row_whose_programs_differ_in_one_process_with_their_tests_has_a_note(grid) -> None:
    differing = ({"only_apart": 0, "only_together": 2, "pass@1": 0.75}, {"only_apart": 0, "only_together": 0, "pass@1": 0.5})
    count(grid, fates=lambda _: {"passed": 2, "wrong": 2}, same_process=lambda n: differing[n])
    text = " ".join(report(grid).split())
    said = "2 programs pass only in one process with their tests and 0 only apart from them; in one process: pass@1 0.7500."
    assert text.count("in one process with their tests") == 1
    assert f"seed 0: {said}" in text


def test_a_report_without_programs_has_no_section_on_them(grid) -> None:
    assert "Programs" not in report(grid)


def test_a_damaged_count_is_a_missing_evaluation(grid) -> None:
    count(grid, fates=lambda n: {"passed": "many"})
    (experiment,) = find_experiments((str(grid),))
    found = collect(experiment)
    assert all("metrics.json" in entry.reason for entry in found.missing if entry.part == "evaluation")
    assert len(found.missing) == 2
