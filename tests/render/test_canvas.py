import matplotlib as mpl

from cora_cli.render.canvas import render


def test_a_figure_does_not_depend_on_the_settings_of_matplotlib_around_it():
    def draw(figure):
        figure.subplots().plot([1, 2], [3, 1], label="a_b$")

    plain = render("name", "heading", "caption", draw, (2, 2))
    with mpl.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "savefig.bbox": "tight", "xtick.direction": "in"}):
        assert render("name", "heading", "caption", draw, (2, 2)) == plain
