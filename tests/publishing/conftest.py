"""A finished and evaluated run, and a hub for it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from cora_cli import hashing, writing
from cora_cli.reading import read_json, read_jsonl
from cora_cli.rundir import EvaluationDirectory
from cora_cli.training.run import train
from tests.evaluation.helpers import evaluate_run, unsealed
from tests.training.helpers import config_for

from .hub import TOKEN, Hub, running_hub


@pytest.fixture(scope="session")
def finished(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation; tests that change it copy it first."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train(config_for(tiny_model, tiny_data, output))
    metrics = ("rouge1", "rougeL", "sacrebleu", "nll")
    evaluate_run(output, metrics=metrics)
    # Better answers than so small a model gives, so that the scores are not all 0.
    place = EvaluationDirectory(output / "eval")
    lines = read_jsonl(place.predictions)
    writing.write_jsonl(
        place.predictions, [{**line, "prediction": line["reference"][:number] + " so"} for number, line in enumerate(lines, 3)]
    )
    generation = unsealed(place.generation) | {"predictions_sha256": hashing.sha256_file(place.predictions)}
    writing.write_json(place.generation, generation)
    evaluate_run(output, metrics=metrics, overwrite=True)
    assert all(metric["value"] > 0 for metric in read_json(place.metrics)["metrics"].values())
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
