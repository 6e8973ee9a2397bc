"""Data sets of the hub without the hub: those that an earlier download left in the cache."""

import json
import shutil
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from cora_cli.data.readers import read_located
from cora_cli.errors import CoraError

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two revisions of org/data, of which the second was cached last and the first is the tag v1."""
    prepared = tmp_path / "prepared"
    for commit in (FIRST, SECOND):
        place = tmp_path / "datasets" / "org___data" / "default" / "0.0.0" / commit
        file = tmp_path / "records.jsonl"
        file.write_text(json.dumps({"prompt": "which?", "completion": commit}))
        datasets.load_dataset("json", data_files=str(file), cache_dir=str(prepared))
        [source] = [found.parent for found in prepared.rglob("dataset_info.json")]
        place.mkdir(parents=True)
        shutil.copy(source / "json-train.arrow", place / "data-train.arrow")
        facts = json.loads((source / "dataset_info.json").read_text())
        facts |= {"builder_name": "json", "dataset_name": "data", "config_name": "default"}
        facts["splits"]["train"]["dataset_name"] = "data"
        (place / "dataset_info.json").write_text(json.dumps(facts))
        shutil.rmtree(prepared)
    tags = tmp_path / "hub" / "datasets--org--data" / "refs"
    tags.mkdir(parents=True)
    (tags / "v1").write_text(FIRST)
    (tags / "v3").write_text("c" * 40)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(
    ("name", "revision"),
    [("org/data", SECOND), (f"org/data@{FIRST}", FIRST), (f"org/data@{SECOND}", SECOND), ("org/data@v1", FIRST)],
)
def test_without_the_hub_the_revision_that_was_asked_for_is_read(name: str, revision: str, capsys: pytest.CaptureFixture[str]):
    [(_, record)] = read_located(name)
    assert record["completion"] == revision
    assert f"{name}: the hub could not be reached; read from the cache, at revision {revision}" in capsys.readouterr().err


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("name", ["org/data@v3", "org/data@v4", f"org/data@{'d' * 40}"])
def test_without_the_hub_a_revision_that_is_not_cached_is_refused(name: str):
    with pytest.raises(CoraError, match=f"'{name}': the hub could not be reached, and .* does not hold this revision"):
        list(read_located(name))


def test_a_name_that_is_no_file_is_said_to_be_asked_of_the_hub_before_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def ask(*_: object, **__: object) -> None:
        assert "data/trian is no file or folder here: asking the hub" in capsys.readouterr().err
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset_builder", ask)
    with pytest.raises(CoraError, match="'data/trian' is not a local file and could not be loaded from the hub: no network"):
        list(read_located("data/trian"))
