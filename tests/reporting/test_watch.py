"""`cora report --watch`: the report follows a grid, is written on changes only, and ends with the grid."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cora_cli import writing
from cora_cli.cli import app
from cora_cli.lock import own_directory
from cora_cli.reading import read_json
from cora_cli.reporting.watch import watch

from .helpers import ladder, make_grid


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_grid(tmp_path_factory.mktemp("watched") / "grid", ladder(1)[:2], prompts=5)


@pytest.fixture
def grid(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "grid"))


class Pauses:
    """What happens in each pause, in order; a pause more than there are steps is an error."""

    def __init__(self, *steps) -> None:
        self.steps, self.seconds = list(steps), []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.steps.pop(0)()


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("reading: ")]


def test_a_finished_grid_is_reported_once(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch([str(grid)], tmp_path / "out", ("rougeL",), 5, Pauses())
    rows = len(read_json(grid / "plan.json")["rows"])
    assert lines(capsys) == [f"{tmp_path}/out/report.html: {rows} of {rows} rows are finished"]
    assert (tmp_path / "out" / "report.json").is_file()


def test_the_report_is_written_again_only_when_a_row_has_finished(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = next((grid / "runs").iterdir())
    away, page = tmp_path / "away", tmp_path / "out" / "report.html"
    run.rename(away)
    before = []

    def nothing() -> None:
        before.append(page.stat().st_mtime_ns)

    def log() -> None:
        nothing()
        (grid / "steps").mkdir(exist_ok=True)
        (grid / "steps" / "other.json").write_text("{}", encoding="utf-8")

    def finish() -> None:
        nothing()
        away.rename(run)

    pauses = Pauses(log, nothing, finish)
    watch([str(grid)], tmp_path / "out", ("rougeL",), 5, pauses)
    assert pauses.seconds == [5, 5, 5]
    assert len(set(before)) == 1
    rows = len(read_json(grid / "plan.json")["rows"])
    assert lines(capsys) == [f"{page}: {done} of {rows} rows are finished" for done in (rows - 1, rows)]


def test_it_goes_on_while_a_command_works_on_the_grid_and_ends_with_it(grid: Path, tmp_path: Path) -> None:
    """A grid with stages plans more rows once all that it has are finished."""
    held = own_directory(grid)
    held.__enter__()
    pauses = Pauses(lambda: None, lambda: held.__exit__(None, None, None))
    watch([str(grid)], tmp_path / "out", ("rougeL",), 1, pauses)
    assert not pauses.steps


def test_it_ends_with_a_grid_that_failed_in_part(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(next((grid / "runs").iterdir()))
    held = own_directory(grid)
    held.__enter__()
    watch([str(grid)], tmp_path / "out", ("rougeL",), 1, Pauses(lambda: held.__exit__(None, None, None)))
    rows = len(read_json(grid / "plan.json")["rows"])
    assert lines(capsys) == [f"{tmp_path}/out/report.html: {rows - 1} of {rows} rows are finished"]


def test_it_waits_for_the_first_row(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [path for path in grid.iterdir() if path.name != "plan.json"]
    for path in parts:
        path.rename(tmp_path / path.name)
    watch(
        [str(grid)], tmp_path / "out", ("rougeL",), 1, Pauses(lambda: [(tmp_path / path.name).rename(path) for path in parts])
    )
    found = lines(capsys)
    assert len(found) == 2
    assert found[0].startswith(f"waiting: nothing in {grid} is finished")


def test_a_report_inside_the_grid_does_not_count_as_a_change(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = read_json(grid / "plan.json")
    shutil.rmtree(next((grid / "runs").iterdir()))
    one = [entry for entry in plan["rows"] if not entry["run"] or (grid / entry["run"]).is_dir()]
    pauses = Pauses(lambda: None, lambda: writing.write_json(grid / "plan.json", {**plan, "rows": one}))
    watch([str(grid)], grid / "report", ("rougeL",), 1, pauses)
    assert len(lines(capsys)) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--watch"], "--watch writes the report into a directory; name one with --output-dir"),
        (["--watch", "-o", "out", "--format", "csv"], "leave out --format csv"),
        (["--every", "3"], "--every 3 has no effect without --watch"),
        (["--watch", "-o", "out", "--every", "0"], "--every must be positive, not 0"),
    ],
)
def test_settings_that_contradict_each_other_are_usage_errors(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["report", "grid", *arguments])
    assert (result.exit_code, says in result.stderr) == (2, True)


def test_control_c_ends_it_with_one_sentence(grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(next((grid / "runs").iterdir()))

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "__defaults__", (interrupt,))
    result = CliRunner().invoke(app, ["report", str(grid), "-o", str(tmp_path / "out"), "--watch"])
    assert result.exit_code == 130
    assert result.stderr.endswith(f"cora: interrupted; {tmp_path}/out holds the report as of its last line\n")
    assert (tmp_path / "out" / "report.html").is_file()
