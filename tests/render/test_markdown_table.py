import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_cli.render.markdown_table import markdown_table
from cora_cli.render.table import with_interval

cells = st.text("abc012 .", max_size=6)


def test_a_table_reads_well_as_text_and_is_markdown():
    table = markdown_table(["run", "rougeL"], [["base", "0.1"], ["a longer one", "0.25"]])
    assert table.splitlines() == [
        "| run          | rougeL |",
        "|--------------|-------:|",
        "| base         |    0.1 |",
        "| a longer one |   0.25 |",
    ]


@given(
    table=st.integers(1, 4).flatmap(
        lambda width: st.tuples(
            st.lists(cells, min_size=width, max_size=width),
            st.lists(st.lists(cells, min_size=width, max_size=width), max_size=4),
        )
    )
)
@settings(derandomize=True, deadline=None, max_examples=50)
def test_all_lines_are_equally_wide_and_no_cell_is_lost(table):
    headers, rows = table
    lines = markdown_table(headers, rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + len(rows)
    for line, expected in zip([lines[0], *lines[2:]], [headers, *rows], strict=True):
        assert [cell.strip() for cell in line.strip("|").split("|")] == [cell.strip() for cell in expected]


@pytest.mark.parametrize("row", [["a"], ["a", "b", "c"]])
def test_a_row_of_another_width_is_an_error(row):
    with pytest.raises(ValueError, match="zip"):
        markdown_table(["x", "y"], [row])


def test_an_interval_has_the_digits_of_its_value():
    assert with_interval(0.12345, (0.1, 0.15), 3) == "0.123 [0.100, 0.150]"
    assert with_interval(12.3, [11.96, 13], 1) == "12.3 [12.0, 13.0]"
