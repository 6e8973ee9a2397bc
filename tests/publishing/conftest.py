"""A finished and evaluated run, and a hub for it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from cora_cli.training.run import train
from tests.evaluation.helpers import evaluate_run
from tests.training.helpers import config_for

from .hub import TOKEN, Hub, running_hub


@pytest.fixture(scope="session")
def finished(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation; tests that change it copy it first."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train(config_for(tiny_model, tiny_data, output))
    evaluate_run(output, metrics=("rouge1", "rougeL", "sacrebleu", "nll"))
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, free to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the hub's own client talks to, with a token."""
    with running_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Its other way to upload large files, through a program of its own.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found
    huggingface_hub.close_session()
