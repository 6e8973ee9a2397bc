import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_cli.render.document import Heading, Items, Text
from cora_cli.render.latex import escape, latex, latex_table
from cora_cli.render.table import Cell, Table
from tests.render.strict_latex import LatexError, check

HARD = r"50 % of \a_{b} & #1 $x^2$ ~ <b> | ± – 日本 “x” é"


def in_document(body):
    return "\\documentclass{article}\n\\begin{document}\n" + body + "\n\\end{document}\n"


@pytest.mark.parametrize(
    "body",
    ["50 % x", "a_b", "a & b", "{", "}", "$x", "#", r"\foo", r"\begin{table}", "日", r"\begin{tabular}{lr}a\\\end{tabular}"],
)
def test_the_parser_refuses_what_pdflatex_stops_at(body):
    with pytest.raises((LatexError, AssertionError)):
        check(in_document(body))


def test_every_special_sign_is_escaped_wherever_it_stands():
    table = Table(HARD, (HARD, HARD), ((Cell(HARD), Cell("0.5", "± 0.1", published=0.3, bold=True)),), (HARD,))
    source = latex([Heading(1, HARD), Text(HARD, "verdict"), Items((HARD, "[x]")), table, Text(HARD)])
    assert check(source) == ["document", "itemize", "table", "tabular"]


@given(st.text(max_size=30))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_any_text_can_be_set(text):
    check(in_document(escape(text.replace("\n", " ").replace("\r", " ")) + "."))


def test_signs_that_tex_joins_stay_apart():
    assert escape("--mode a---b ''x'' ,,y ``z?`") == "-{}-mode a-{}-{}-b '{}'x'{}' ,{},y {`}{`}z?{`}"


def test_a_star_at_the_start_of_a_row_is_not_taken_by_the_line_above():
    rows = ((Cell("a"), Cell("1")), (Cell("*b"), Cell("2")))
    assert "{*}b & 2" in latex_table(Table("t", ("method", "n"), rows, ()))


def test_the_signs_of_the_reports_own_formulas_are_set():
    assert escape("σ²(seed)·κ") == r"\ensuremath{\sigma}\ensuremath{^2}(seed)\ensuremath{\cdot}\ensuremath{\kappa}"


def test_a_cell_shows_its_interval_and_the_papers_number_and_bold_only_the_value():
    row = (Cell("fb"), Cell("0.500", "± 0.100", 0.401, True), Cell("12.34", "[11.50, 13.00]"))
    assert r"fb & $\mathbf{0.500}$${}\pm 0.100$~(0.401) & $12.34$$\,[11.50,\,13.00]$ \\" in latex_table(
        Table("t", ("method", "a", "b"), (row,), ())
    )


def test_where_many_numbers_stand_in_a_row_their_intervals_and_the_papers_numbers_stand_below():
    many = (Cell("fb"), Cell("[x]"), *[Cell("0.500", "± 0.100", 0.4)] * 5)
    source = latex_table(Table("t", ("row", "method", *"abcde"), (many, (Cell("base"), Cell(), *[Cell()] * 5)), ()))
    assert check(in_document(source)) == ["document", "table", "tabular"]
    lines = source.splitlines()
    place = lines.index(r"fb & {[}x] & $0.500$ & $0.500$ & $0.500$ & $0.500$ & $0.500$ \\")
    assert lines[place + 1] == " &  & " + " & ".join([r"{\scriptsize ${}\pm 0.100$}"] * 5) + r" \\"
    assert lines[place + 2] == " &  & " + " & ".join([r"{\scriptsize (0.4)}"] * 5) + r" \\"
    assert lines[place + 4] == r"base & -- & -- & -- & -- & -- & -- \\"
