"""What reaches the screen is printable and fits."""

import pytest

from cora_cli.terminal import fitted, folded, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("\x9b31m", r"\x9b31m"),
        ("one\rtwo\x07", r"one\rtwo\x07"),
        ("\u202eabc", r"\u202eabc"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("größe 天气 👍🏽", "größe 天气 👍🏽"),
    ],
)
def test_control_characters_become_escapes_and_the_rest_stays(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_line_is_cut_by_the_cells_that_it_takes() -> None:
    assert fitted("天气 weather", 5) == "天气 "
    assert fitted("short", 80) == "short"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two three four", "one two\nthree four"),
        ("a\n\n  one two three", "a\n\n  one two\n  three"),
        ("ab  one two three four", "ab  one two\nthree four"),  # the second column begins too far right
        ("a  one two three", "a  one two\n   three"),
        ("run `cora a b` now", "run\n`cora a b`\nnow"),
        ("| a cell | another cell |", "| a cell | another cell |"),
        ("  |You| are| a| helpful|", "  |You| are| a| helpful|"),
        ("unbreakable-and-long", "unbreakable-and-long"),
        ("name: unbreakable-and-long", "name: unbreakable-and-long"),
        ("天气 天气 天气", "天气 天气\n天气"),
    ],
)
def test_lines_are_folded_at_words_and_what_is_to_be_copied_stays_in_one_piece(text: str, shown: str) -> None:
    assert folded(text, 11) == shown
    assert folded(text, 80) == text
