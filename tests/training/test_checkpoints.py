import json
from pathlib import Path

import pytest

from cora_cli.training.checkpoints import checkpoints_in, newest_intact, seal


def make(root: Path, step: int) -> Path:
    directory = root / f"checkpoint-{step}"
    (directory / "part").mkdir(parents=True)
    for name in ("optimizer.pt", "trainer_state.json", "part/rng_state.pth"):
        (directory / name).write_text(f"{name} {step}")
    seal(directory)
    return directory


def test_checkpoints_are_in_the_order_of_their_steps_and_other_names_are_left_alone(tmp_path):
    made = [make(tmp_path, step) for step in (4, 12, 100)]
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-8.tmp").mkdir()
    assert checkpoints_in(tmp_path) == made
    assert newest_intact(tmp_path) == made[-1]
    assert newest_intact(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda path: (path / "part/rng_state.pth").write_text("x"), "part/rng_state.pth was changed after it was written"),
        (lambda path: (path / "more.bin").write_text("x"), "more.bin was changed after it was written"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is not a list of files"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_older_one_is_used(damage, said, tmp_path, capfd):
    older, newer = make(tmp_path, 4), make(tmp_path, 8)
    damage(newer)
    assert newest_intact(tmp_path) == older
    message = " ".join(capfd.readouterr().err.split())
    assert "checkpoint-8 is damaged and is not used" in message
    assert said in message


def test_a_checkpoint_of_an_earlier_version_has_no_manifest_and_is_used(tmp_path):
    checkpoint = make(tmp_path, 4)
    (checkpoint / "manifest.json").unlink()
    assert newest_intact(tmp_path) == checkpoint


def test_a_checkpoint_that_lost_its_manifest_is_not_used_where_the_run_seals_all(tmp_path, capfd):
    older, newer = make(tmp_path, 4), make(tmp_path, 8)
    for name in ("manifest.json", "optimizer.pt"):
        (newer / name).unlink()
    assert newest_intact(tmp_path, sealed=True) == older
    assert "manifest.json is missing" in capfd.readouterr().err


def test_the_manifest_holds_a_hash_for_every_file(tmp_path):
    manifest = json.loads((make(tmp_path, 4) / "manifest.json").read_text())
    assert {name: len(digest) for name, digest in manifest.items()} == {
        "optimizer.pt": 64,
        "trainer_state.json": 64,
        "part/rng_state.pth": 64,
    }


def test_a_file_that_a_file_manager_leaves_damages_nothing(tmp_path):
    checkpoint = make(tmp_path, 4)
    (checkpoint / ".DS_Store").write_text("x")
    (checkpoint / "part" / "._rng_state.pth").write_text("x")
    assert newest_intact(tmp_path, sealed=True) == checkpoint
