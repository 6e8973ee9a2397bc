"""`benchmarks/verdict.py`, which fills the tables of docs/verdict.md, run on a few families."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Printed = tuple[list[str], list[list[str]], str]
SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "verdict.py"


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """Runs the script; returns the headers, the cells and the sentence below the table."""

    def run(*options: str) -> Printed:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        headers, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        return headers, rows, lines[-1]

    return run


def test_the_simulation_prints_errors_coverage_and_power_of_each_cell(printed: Callable[..., Printed]) -> None:
    headers, rows, below = printed("--families", "8", "--seeds", "1", "3", "--records", "40")
    assert headers == ["seeds", "seed deviation", "error, 40", "error without minimum, 40", "coverage, 40", "power, 40"]
    assert [row[:2] for row in rows] == [[seeds, deviation] for seeds in "13" for deviation in ("0", "0.004", "0.008", "0.016")]
    one, three = ([[float(cell) for cell in row[2:]] for row in rows if row[0] == seeds] for seeds in "13")
    # One seed decides nothing; if it were allowed to, it would err in most families where seeds differ most, and its intervals cover too little.
    assert all((error, power) == (0, 0) for error, _, _, power in one)
    assert one[-1][1] > 50
    assert three[-1][0] < 25
    assert one[-1][2] < 80
    assert three[-1][2] > 90
    assert all(error == unguarded for error, unguarded, _, _ in three)
    assert "8 families of 14 tests per cell" in below
    assert "Standard error" in below


def test_the_simulation_of_growing_grids_prints_their_errors_and_their_seeds(printed: Callable[..., Printed]) -> None:
    headers, rows, below = printed("--looks", "--families", "4", "--seeds", "4", "--records", "40")
    assert headers[:3] == ["most seeds", "seed deviation", "records"]
    assert headers[3:] == ["error", "error at any look", "coverage", "power", "decided", "mean seeds"]
    assert len(rows) == 4
    for row in rows:
        error, ever, coverage, _, decided, seeds = map(float, row[3:])
        assert error <= ever <= 50
        assert coverage > 85
        assert 0 <= decided <= 100
        assert 3 <= seeds <= 4
    assert "4 families of 14 tests per cell" in below
