"""The plan of an inspection needs no weights, and refuses what the inspection refuses."""

import shutil
from pathlib import Path

import pytest

from cora_cli.errors import UsageError
from cora_cli.inspection.preflight import preflight
from tests.weights.helpers import CPU


def test_a_plan_needs_no_weights(grouped_models: list[Path], tmp_path: Path) -> None:
    bare = [
        shutil.copytree(path, tmp_path / path.name, ignore=shutil.ignore_patterns("*.safetensors")) for path in grouped_models
    ]
    pages = [
        preflight([str(path) for path in paths], None, 4, None, None, (), CPU, str(tmp_path / "out"))
        for paths in (grouped_models, bare)
    ]
    assert pages[1] == pages[0].replace(str(grouped_models[0].parent), str(tmp_path))
    assert pages[0].startswith("6 weight matrices of 2 models, 4 directions of the output side\n")
    assert pages[0].count("reads 6 weights of ") == 2
    assert f"writes {tmp_path / 'out'}, the report" in pages[0]
    assert not (tmp_path / "out").exists()


def test_changes_from_a_base_take_memory_for_every_model(grouped_models: list[Path], tmp_path: Path) -> None:
    one, base = map(str, grouped_models)
    page = preflight([one], base, 4, None, None, (), CPU)
    assert "  changes " in page
    assert page.count("reads 6 weights of ") == 2


def test_one_model_alone_is_refused(grouped_models: list[Path], tiny_basis: Path) -> None:
    with pytest.raises(UsageError, match="one model alone cannot be compared"):
        preflight([str(grouped_models[0])], None, 4, None, None, (), CPU)
    with pytest.raises(UsageError, match="only basis files are named"):
        preflight([str(tiny_basis)], None, None, None, None, (), CPU)
