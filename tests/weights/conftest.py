"""Adapters that PEFT saved."""

import shutil
from pathlib import Path

import pytest

from tests.weights.helpers import make_adapter


@pytest.fixture(scope="module")
def plain(grouped_models, tmp_path_factory) -> Path:
    return make_adapter(grouped_models[0], tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture
def copy(plain, tmp_path) -> Path:
    """An adapter that a test may damage."""
    return shutil.copytree(plain, tmp_path / "copy")
