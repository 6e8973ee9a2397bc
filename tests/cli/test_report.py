import json

import pytest
from typer.testing import CliRunner

from cora_cli.cli import app
from tests.reporting.helpers import ladder, make_grid


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    return make_grid(tmp_path_factory.mktemp("cli") / "grid", ladder(1), prompts=10)


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_default_is_a_table_for_the_terminal(grid):
    result = run(grid)
    assert result.exit_code == 0
    assert result.stdout.startswith("A tiny grid\n===========\n")
    assert "| fb orthonormal r=4 |" in result.stdout


@pytest.mark.parametrize(
    ("format", "start"),
    [("markdown", "# A tiny grid"), ("latex", "\\documentclass"), ("csv", "experiment,"), ("json", "{")],
)
def test_each_format_is_printed(grid, format, start):
    result = run(grid, "--format", format)
    assert result.exit_code == 0
    assert result.stdout.startswith(start)


def test_metrics_restrict_the_columns_by_group_or_name(grid):
    data = json.loads(run(grid, "--format", "json", "--metrics", "bleu,rougeL").stdout)
    assert data["experiments"][0]["groups"][0]["measures"] == ["heldout_loss", "rougeL", "sacrebleu"]


def test_files_of_others_are_not_replaced_by_a_report(grid, tmp_path):
    (tmp_path / "report.tex").write_text("my thesis")
    refused = CliRunner().invoke(app, ["report", str(grid), "-o", str(tmp_path)])
    assert refused.exit_code == 1
    assert f"{tmp_path} holds report.tex, which is not of an earlier report; choose another directory" in refused.stderr
    assert [path.name for path in tmp_path.iterdir() if path.is_file() and not path.name.startswith(".")] == ["report.tex"]
    (tmp_path / "report.tex").unlink()
    for _ in range(2):  # a report replaces an earlier one
        assert CliRunner().invoke(app, ["report", str(grid), "-o", str(tmp_path)]).exit_code == 0


def test_the_output_directory_gets_every_format_besides_the_printed_one(grid, tmp_path):
    result = run(grid, "--format", "html", "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stdout == (tmp_path / "out" / "report.html").read_text()
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".txt", ".md", ".tex", ".csv", ".json", ".html", ""}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "nowhere does not exist"),
        (["GRID", "--format", "pdf"], 2, "--format must be one of terminal, markdown, latex, csv, json, html, not 'pdf'"),
        (["GRID", "--metrics", "wer"], 2, "unknown metric 'wer'"),
        (["GRID", "--metrics", "bertscore"], 1, "none of the metrics bertscore_f1 was measured"),
        (["GRID", "-o", "GRID/plan.json"], 1, "plan.json is a file; choose a new or empty directory"),
    ],
)
def test_a_bad_request_is_one_sentence_on_stderr(grid, arguments, code, message):
    result = run(*(argument.replace("GRID", str(grid)) for argument in arguments))
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
