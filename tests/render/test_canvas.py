import warnings

import matplotlib as mpl

from cora_cli.render.canvas import render


def test_a_figure_does_not_depend_on_the_settings_of_matplotlib_around_it():
    def draw(figure):
        figure.subplots().plot([1, 2], [3, 1], label="a_b$")

    plain = render("name", "heading", "caption", draw, (2, 2))
    with mpl.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "savefig.bbox": "tight", "xtick.direction": "in"}):
        assert render("name", "heading", "caption", draw, (2, 2)) == plain


def test_characters_that_the_font_lacks_are_said_in_the_caption_and_not_by_matplotlib():
    def draw(figure):
        figure.subplots().set_title("漢字")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = render("name", "heading", "caption", draw, (2, 2))
    assert "漢字" in drawn.svg
    assert drawn.caption == "caption The PNG has boxes for characters that matplotlib's font lacks; the SVG has the characters."
