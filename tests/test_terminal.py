"""What reaches the screen is printable and fits."""

import pytest

from cora_cli.terminal import fitted, printable


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
