"""The package's layers and its freedom from import circles, as pyproject.toml states them for import-linter."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint_imports(root: Path) -> subprocess.CompletedProcess:
    """`lint-imports` on the package in `root`, with that folder first on the path."""
    words = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run([sys.executable, "-c", words, "--no-cache"], cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "cora_cli", tmp_path / "cora_cli", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def append(file: Path, line: str) -> None:
    file.write_text(f"{file.read_text()}\n{line}\n")


def test_data_flows_one_way_and_no_file_imports_in_a_circle():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("basis/choices.py", "from cora_cli.basis import artifact"),  # between files of one package
        ("basis/artifact.py", "def late():\n    from cora_cli.extraction import gram"),  # between packages, inside a function
        ("render/text.py", "from cora_cli.reporting import tables"),  # upwards
    ],
)
def test_an_import_that_closes_a_circle_or_points_upwards_is_found(copy, file, line):
    append(copy / "cora_cli" / file, line)
    result = lint_imports(copy)
    assert result.returncode == 1
    assert "1 broken" in result.stdout or "2 broken" in result.stdout
