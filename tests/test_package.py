"""The wheel has everything that the commands need, and works where nothing else of this project is."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from tests.test_documents import PROJECT, ROOT

_SMALL_DEMO = """
import sys
from functools import partial
from pathlib import Path
import cora_cli
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.experiments import demo
assert Path(cora_cli.__file__).is_relative_to(sys.argv[2]), cora_cli.__file__
demo.EMBEDDED_MODEL, demo.TASKS, demo.DATASET, demo.RANK = sys.argv[1], ("json",), "builtin:task-json", 8
demo.TASK_STEPS = demo.TASK_BATCH = demo.STEPS = demo.BATCH = 2
demo.HELD_OUT = demo.PROMPTS = demo.NEW_TOKENS = 4
demo.EvaluateConfig = partial(EvaluateConfig, metrics=("rouge1",))
sys.argv = ["cora", "demo", "--device", "cpu", "--dtype", "fp32"]
from cora_cli.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [built] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    return Path(built)


def files_below(folder: str) -> set[str]:
    found = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_with_its_grids_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    parts = {name for name in names if not name.startswith(f"cora_cli-{PROJECT['version']}.dist-info/")}
    assert parts == files_below("cora_cli") | {f"cora_cli/{name}" for name in files_below("configs")}
    needed = (
        "py.typed",
        "configs/honest.yaml",
        "render/assets/page.css",
        "embedded/language_model.py",
        "experiments/paper_tables.json",
    )
    assert parts >= {f"cora_cli/{name}" for name in needed}


def test_the_metadata_has_the_readme_the_licence_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata, points = (
            archive.read(f"cora_cli-{PROJECT['version']}.dist-info/{name}").decode()
            for name in ("METADATA", "entry_points.txt")
        )
    head, _, description = metadata.partition("\n\n")
    assert {"License-Expression: Apache-2.0", "License-File: LICENSE", "Requires-Python: >=3.11"} <= set(head.splitlines())
    assert description.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert "cora = cora_cli.__main__:main" in points


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel alone; its dependencies are those of this environment."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True)
    return target


def ran(installed: Path, place: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_installed_wheel_alone_shows_its_version_its_help_and_its_grids(installed: Path, tmp_path: Path) -> None:
    cora = str(installed / "bin" / "cora")
    assert ran(installed, tmp_path, cora, "--version").startswith(f"cora {PROJECT['version']}\n")
    assert "Run the complete pipeline on the embedded model." in ran(installed, tmp_path, cora, "demo", "--help")
    listed = [line.split()[0] for line in ran(installed, tmp_path, cora, "ablate", "--list").splitlines()]
    assert {"quick", "honest", "baselines/small", "paper/table4"} <= set(listed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_installed_wheel_alone_runs_a_small_demo_to_its_end(installed: Path, tiny_model: Path, tmp_path: Path) -> None:
    printed = ran(installed, tmp_path, "-c", _SMALL_DEMO, str(tiny_model), str(installed))
    assert "| fb-orthonormal |" in printed
    assert (tmp_path / "demo" / "report.md").is_file()
