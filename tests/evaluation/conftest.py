"""Finished runs and records to evaluate."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from cora_cli import writing
from cora_cli.evaluation import backend
from cora_cli.evaluation.metrics import reference_cache
from cora_cli.evaluation.metrics.bertscore import BertScore

from .helpers import make_run


@pytest.fixture(autouse=True)
def no_kept_references(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of reference embeddings for each test."""
    folder = tmp_path_factory.mktemp("references")
    monkeypatch.setattr(reference_cache, "directory", lambda: folder)
    return folder


@pytest.fixture(scope="package")
def trained(tiny_model: Path, tiny_basis: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each kind."""
    root = tmp_path_factory.mktemp("trained")
    kinds: dict[str, dict[str, Any]] = {
        "lora": {"mode": "lora", "rank": 8},
        "fb": {"mode": "fb", "rank": 8, "basis": str(tiny_basis)},
        "compact": {"mode": "fb", "rank": 8, "basis": str(tiny_basis), "compact": True},
        "full": {"mode": "full"},
    }
    return {kind: make_run(tiny_model, tiny_data, root / kind, **settings) for kind, settings in kinds.items()}


@pytest.fixture
def run(trained: dict[str, Path], tmp_path: Path) -> Path:
    """A run with a LoRA adapter, free to be damaged."""
    return Path(shutil.copytree(trained["lora"], tmp_path / "run"))


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    writing.write_jsonl(path, [{"prompt": f"say {'so ' * n}{n}", "completion": f"it is {n}"} for n in range(7)])
    return path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to load a model fails."""

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(backend, "load_model", load)


@pytest.fixture(scope="session")
def bertscore() -> BertScore:
    """With the embedded encoder."""
    return BertScore()
