"""The embedded parts. The first run on a machine fetches them (210 MB) into the ordinary cache; later runs only read them."""

import shutil
from pathlib import Path

import pytest

from cora_cli import embedded


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that reaches no registry but the (empty) folder `wheels`."""
    monkeypatch.setenv("CORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "cache"


@pytest.fixture
def copied_wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The complete WordNet folder in a cache of its own, free to be damaged."""
    complete = embedded.wordnet_directory()
    copy = tmp_path / embedded.LAYOUT / complete.name
    shutil.copytree(complete, copy)
    monkeypatch.setenv("CORA_CACHE", str(tmp_path))
    return copy
