"""`cora list` on runs, evaluations and bases in every state, and the line that names the next command."""

import fcntl
import json
import os
import shutil
import struct
import sys

import pytest
import typer
from typer.testing import CliRunner

from cora_cli.cli import app
from cora_cli.cli.command import clean_errors
from cora_cli.cli.list_outputs import table
from cora_cli.cli.next_step import say_next
from cora_cli.reporting.inventory import inventory, outputs_below
from tests.reporting.helpers import Made, make_grid


@pytest.fixture
def folder(tmp_path):
    """A grid with two finished runs, a basis, other weights, a damaged run, and one that says it is running."""
    make_grid(tmp_path / "grid", [Made("lora", "lora"), Made("fb", "fb")], prompts=4)
    header = {"__metadata__": {"cora_basis": json.dumps({"choices": {"method": "svd", "rank": 48}})}}
    for name, content in (("basis", header), ("weights", {"__metadata__": {"format": "pt"}})):
        data = json.dumps(content).encode()
        (tmp_path / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)
    record = json.loads(next((tmp_path / "grid/runs").glob("*lora*/run.json")).read_text())
    for name, text in (("bad", "{"), ("going", json.dumps({**record, "status": "running"}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    return tmp_path


def test_a_laplace_approximation_is_listed_without_the_loss_of_its_run(folder):
    path = next((folder / "grid/runs").glob("*lora*/run.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "laplace": {"records": 4}}))
    (entry,) = [entry for entry in inventory(folder) if entry.method == "laplace lora"]
    assert (entry.status, entry.result) == ("finished", "")


def test_a_run_whose_weights_were_removed_is_listed_as_incomplete(folder):
    path = next((folder / "grid/runs").glob("*lora*/run.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "result_files": {"adapter_model.safetensors": "0" * 64}}))
    weights = path.parent / "adapter/adapter_model.safetensors"
    weights.parent.mkdir(exist_ok=True)
    for there, status in ((True, "finished"), (False, "incomplete")):
        weights.write_bytes(b"")
        if not there:
            weights.unlink()
        assert next(entry.status for entry in inventory(folder) if entry.path == path.parent) == status


def test_a_run_with_another_start_than_its_modes_own_is_listed_as_in_a_report(folder):
    path = next((folder / "grid/runs").glob("*fb*/run.json"))
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "plan": {**record["plan"], "mode": "fb", "b_init": "orthonormal"}}))
    assert {entry.method for entry in inventory(folder) if entry.kind == "run"} >= {"lora", "fb orthonormal"}


def test_every_state_is_shown(folder):
    with (folder / "going/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {(entry.kind, str(entry.path.relative_to(folder))): entry for entry in inventory(folder)}
    assert found["run", "bad"].status == "damaged"
    assert found["run", "going"].status == "running"
    assert found["basis", "basis.safetensors"].method == "svd r48"
    assert ("basis", "weights.safetensors") not in found
    runs = [entry for (kind, path), entry in found.items() if kind == "run" and path.startswith("grid")]
    assert [entry.status for entry in runs] == ["finished", "finished"]
    assert {entry.method for entry in runs} == {"lora", "fb"}
    assert all(entry.result.startswith("loss ") for entry in runs)
    assert sum(kind == "eval" for kind, _ in found) == 2


def test_a_run_whose_process_is_gone_counts_as_interrupted(folder):
    assert {entry.status for entry in inventory(folder) if entry.path.name == "going"} == {"interrupted"}


def test_a_run_or_an_evaluation_that_ends_while_it_is_listed_counts_as_finished(folder, monkeypatch):
    record = folder / "going/run.json"
    metrics = next(folder.glob("grid/**/metrics.json"))
    metrics.rename(metrics.with_suffix(".later"))

    def ends(root):
        record.write_text(json.dumps({**json.loads(record.read_text()), "status": "finished"}))
        if (later := metrics.with_suffix(".later")).exists():
            later.rename(metrics)
        return False

    monkeypatch.setattr("cora_cli.reporting.inventory.is_held", ends)
    found = {entry.path: entry.status for entry in inventory(folder)}
    assert (found[folder / "going"], found[metrics.parent]) == ("finished", "finished")


def test_the_table_fits_eighty_columns_and_keeps_the_ends_of_paths(folder):
    lines = table(inventory(folder), folder, 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("…" in line for line in lines)
    assert "basis.safetensors" in next(line for line in lines if line.startswith("basis"))


def test_the_command_prints_complete_paths_to_a_file_and_refuses_what_is_no_folder(folder):
    shown = CliRunner().invoke(app, ["list", str(folder)])
    assert shown.exit_code == 0
    assert "grid/runs/tiny-lora_r4_nNone_lr0.001_seed0" in shown.stdout
    assert "next:" not in shown.output
    assert CliRunner().invoke(app, ["list", str(folder / "gone")]).exit_code == 1


def test_a_folder_of_outputs_is_what_is_below_it(folder):
    assert outputs_below(folder) == [folder / "bad", folder / "going", folder / "grid"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_next_command_is_named_in_a_terminal_only(is_terminal, capsys, monkeypatch):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    say_next("my run is written", "evaluate", "my run")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ("my run is written; next: cora evaluate 'my run'\n" if is_terminal else "")


def test_a_next_command_that_is_longer_than_the_terminal_stands_unbroken_on_its_own_line(capsys, monkeypatch):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    runs = [f"runs/number-{number}" for number in range(5)]
    say_next("5 runs are evaluated", "report", *runs, "-o", "report")
    assert capsys.readouterr().err == f"5 runs are evaluated; next:\n  cora report {' '.join(runs)} -o report\n"


def test_an_interrupt_says_what_is_kept(capsys):
    with pytest.raises(typer.Exit), clean_errors(False, lambda: "all is kept"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "cora: interrupted; all is kept\n"


def test_records_of_other_programs_are_no_outputs(folder, capsys):
    before = inventory(folder), outputs_below(folder)
    (folder / "other").mkdir()
    for name, content in (("metrics.json", '{"accuracy": 0.9}'), ("run.json", '{"id": 1}'), ("plan.json", "{}")):
        (folder / "other" / name).write_text(content)
    capsys.readouterr()
    assert (inventory(folder), outputs_below(folder)) == before
    said = capsys.readouterr().err
    assert f"{folder / 'other' / 'metrics.json'} is left out, since it is another program's" in said
    (folder / "other" / "run.json").write_text('{"format": 1, "status": "fini')  # cut off
    assert folder / "other" in outputs_below(folder)


def test_a_link_to_a_grid_is_that_grid(folder, tmp_path):
    (folder / "grid" / "again").symlink_to(folder)  # no link below a link is followed
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "one").symlink_to(folder / "grid")
    linked = [entry.path.relative_to(tmp_path / "links" / "one") for entry in inventory(tmp_path / "links")]
    assert len(linked) > 1
    assert linked == [
        place for entry in inventory(folder / "grid") if (place := entry.path.relative_to(folder / "grid")).parts[0] != "again"
    ]
    assert outputs_below(tmp_path / "links") == [tmp_path / "links" / "one"]


def test_runs_are_found_whatever_their_folder_is_called_and_through_links(folder, tmp_path, capsys, monkeypatch):
    run = next((folder / "grid/runs").glob("*lora*"))
    shutil.copytree(run, folder / "adapter")
    (folder / "linked").symlink_to(run)
    (folder / "closed").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = {str(entry.path.relative_to(folder)) for entry in inventory(folder)}
    assert {"adapter", "linked"} <= found
    assert [place for place in found if place.startswith("linked/")] == [
        f"linked/{path.parent.name}" for path in run.glob("*/metrics.json")
    ]
    assert {folder / "adapter", folder / "linked"} <= set(outputs_below(folder))
    assert f"{folder / 'closed'} is left out, since it cannot be read: Permission denied" in capsys.readouterr().err
