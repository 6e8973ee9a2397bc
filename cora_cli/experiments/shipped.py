"""The grid files that come with the package: `cora ablate honest` runs one by its name."""

import shutil
from pathlib import Path

import yaml

from cora_cli import writing
from cora_cli.errors import CoraError, UsageError
from cora_cli.experiments.values import read_yaml
from cora_cli.reading import read_yaml as read_file

_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """The folder of the configuration files: inside an installed package, or next to it in a working copy."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def shipped_grids() -> dict[str, Path]:
    """Path by name (`honest`, `paper/table4`) of every grid file that comes with the package."""
    paths = sorted(folder().rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder()).parts), path))
    return {
        path.relative_to(folder()).with_suffix("").as_posix(): path for path in paths if "grid" in read_file(path, "grid file")
    }


def find_grid(name: str) -> Path:
    """The grid file that `name` means: a path, or the name of a shipped grid where there is no such file (an output directory may have it).

    Raises `UsageError` with the shipped names if it is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_grids()
    if name in shipped:
        return shipped[name]
    if path.exists() or path.is_symlink():
        return path
    raise UsageError(f"there is no grid file {name}, and no grid of that name comes with cora; it has {', '.join(shipped)}")


def write_copy(grid: Path, target: Path) -> None:
    """Write a grid file to `target` to start from. One that includes another file is written with its settings, without comments.

    Raises `CoraError` if `target` exists.
    """
    if target.exists() or target.is_symlink():
        raise CoraError(f"{target} exists; choose another name")
    with writing.atomic_path(target, replace=False) as temporary:
        if "include" not in read_file(grid, "grid file"):
            shutil.copyfile(grid, temporary)
        else:
            writing.write_text(temporary, yaml.safe_dump(read_yaml(grid), sort_keys=False, allow_unicode=True, width=128))
