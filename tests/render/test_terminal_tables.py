"""Tables on a terminal fit its width: transposed, without intervals, or as a list."""

import re
from pathlib import Path

import pytest

from cora_cli.render.document import Heading, Items, Text
from cora_cli.render.table import Cell, number, table_text
from cora_cli.render.text import terminal
from cora_cli.reporting.report import report
from tests.reporting.helpers import ladder, make_grid

METRICS = ("rouge1", "rouge2", "rougeL", "meteor", "sacrebleu", "bertscore_f1")


def scores(*names: str) -> tuple[tuple[Cell, ...], ...]:
    return tuple((Cell(name), *(number(0.25, (0.125, 0.375), 3) for _ in METRICS)) for name in names)


def widest(text: str) -> int:
    """The length of the longest line that could be broken; a path or a signature is a word of its own."""
    return max(len(line) for line in text.splitlines() if " " in line.strip())


def test_a_table_that_fits_stays_as_it_is() -> None:
    rows = scores("a", "b")
    assert table_text(("run", *METRICS), rows, 200) == table_text(("run", *METRICS), rows)
    assert widest(table_text(("run", *METRICS), rows)) > 80


def test_a_wide_table_is_transposed_with_all_its_numbers() -> None:
    text = table_text(("run", *METRICS), scores("lora", "fb"), 80)
    assert widest(text) <= 80
    assert re.search(r"^\| run +\| +lora \| +fb \|$", text, re.MULTILINE)
    assert (
        len(
            re.findall(
                r"^\| (?:rouge.|rougeL|meteor|sacrebleu|bertscore_f1) +(?:\| 0.250 \[0.125, 0.375\] ){2}\|$", text, re.MULTILINE
            )
        )
        == 6
    )


def test_what_is_too_wide_both_ways_loses_its_intervals_and_says_so() -> None:
    text = table_text(("run", *METRICS), scores(*"abcde"), 80)
    assert widest(text) <= 80
    assert text.count("0.250") == 30
    assert "[" not in text
    assert text.endswith("The intervals do not fit into 80 columns.")


def test_what_fits_in_no_other_way_is_a_list_with_all_its_numbers() -> None:
    names = [f"a rather long name of method {number}" for number in range(9)]
    text = table_text(("run", *METRICS), scores(*names), 40)
    assert widest(text) <= 40
    assert text.splitlines()[:2] == [names[0], "  rouge1: 0.250 [0.125, 0.375]"]
    assert text.count("0.250 [0.125, 0.375]") == 54


def test_stars_and_printed_numbers_stay_in_every_form() -> None:
    rows = [(Cell("lora"), Cell("0.5", "± 0.1", 0.75, bold=True)), (Cell("fb"), Cell("0.25", "± 0.1"))]
    for width in (200, 30, 22, 8):
        text = table_text(("method", "rougeL"), rows, width)
        assert re.search(r"0\.5 (± 0\.1 )?\(0\.75\) \*", text.replace("\n    ", " ")), width


def test_a_p_value_stays_where_the_interval_does_not_fit() -> None:
    rows = [(Cell(name), *(number(0.1, (0.0, 0.2), 2, "p=0.040") for _ in METRICS)) for name in "abcde"]
    text = table_text(("run", *METRICS), rows, 80)
    assert text.count("0.10 p=0.040") == 30


def test_paragraphs_are_wrapped_at_words_and_paths_stay_whole() -> None:
    path = "/a/path/" + "x" * 90
    text = terminal([Heading(1, "word " * 20), Text("word " * 30), Items(("word " * 30, path))], 80)
    assert path in text.splitlines()[-1]
    assert widest(text.replace(path, "")) <= 80
    assert "  word" in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_report_fits_the_terminal(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_grid(tmp_path / "grid", ladder(1), prompts=10)
    monkeypatch.chdir(tmp_path)  # for short paths, which are not broken
    text, file = report(["grid"], width=width), report(["grid"])
    assert widest(text) <= width < widest(file)
    numbers = set(re.findall(r"\d+\.\d{3}", file))
    assert len(numbers & set(re.findall(r"\d+\.\d{3}", text))) > 20
