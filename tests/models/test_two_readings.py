"""A folder with code whose type transformers knows too is two models: which one was trained, answered, judged or written is kept apart."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.errors import CoraError
from cora_cli.evaluation.judge.config import JudgeConfig
from cora_cli.evaluation.judge.local import LocalJudge
from cora_cli.models.references import resolve_model
from cora_cli.records import write_sealed
from cora_cli.training.laplace import laplace
from cora_cli.training.run import train
from tests.evaluation.helpers import evaluate_model, evaluate_run, unsealed
from tests.training.helpers import config_for

SCALED = """from transformers import LlamaForCausalLM
class Scaled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 0.5
        return found
"""


@pytest.fixture
def scaled(tiny_model: Path, tmp_path: Path) -> Path:
    """A model with code of its own of a type that transformers knows."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "scaled"))
    (model / "modeling_scaled.py").write_text(SCALED)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_scaled.Scaled"}
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("trusted", [True, False])
def test_a_run_is_used_with_the_code_by_which_it_was_trained(
    scaled: Path, tiny_data: Path, tmp_path: Path, trusted: bool
) -> None:
    config = config_for(scaled, tiny_data, tmp_path / "run", max_steps=1, trust_remote_code=trusted)
    loss = train(config)["heldout"]["after"]["loss"]
    adapter = resolve_model(str(tmp_path / "run"))
    said = "was trained with --trust-remote-code, by the code" if trusted else "was trained without the code that comes with"
    for use in (
        lambda: evaluate_run(tmp_path / "run", trust_remote_code=not trusted),
        lambda: merge_adapter(adapter, tmp_path / "merged", trust_remote_code=not trusted),
        lambda: export_adapter(adapter, tmp_path / "exported", trust_remote_code=not trusted),
        lambda: laplace(str(tmp_path / "run"), tmp_path / "laplace", device="cpu", trust_remote_code=not trusted),
    ):
        with pytest.raises(CoraError, match=said):
            use()
    found = evaluate_run(tmp_path / "run", metrics=("calibration",), max_new_tokens=2, trust_remote_code=trusted)
    assert found.record["metrics"]["nll"]["value"] == pytest.approx(loss, abs=1e-5)
    export_adapter(adapter, tmp_path / "exported", trust_remote_code=trusted)
    with pytest.raises(CoraError, match=said):
        merge_adapter(resolve_model(str(tmp_path / "exported")), tmp_path / "merged", trust_remote_code=not trusted)


def test_an_evaluation_with_the_code_of_the_folder_is_not_one_without_it(
    scaled: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def nll(**settings: Any) -> float:
        more = {"metrics": ("calibration",), "max_new_tokens": 2, "limit": 2, **settings}
        return evaluate_model(scaled, tiny_data, tmp_path / "evaluation", **more).record["metrics"]["nll"]["value"]

    without = nll()
    with pytest.raises(CoraError, match=r"holds an evaluation with other settings \(own_code\)"):
        nll(trust_remote_code=True)
    with_code = nll(trust_remote_code=True, overwrite=True)
    assert abs(with_code - without) > 1e-3
    generation = unsealed(tmp_path / "evaluation" / "generation.json")
    assert generation["settings"]["own_code"]
    # An earlier version did not record it.
    del generation["settings"]["own_code"]
    write_sealed(tmp_path / "evaluation" / "generation.json", generation)
    with pytest.raises(CoraError, match=r"other settings \(own_code\)"):
        nll(trust_remote_code=True)
    judges = [
        LocalJudge(JudgeConfig(from_predictions="p", judge_model=str(scaled), device="cpu", trust_remote_code=trusts))
        for trusts in (False, True)
    ]
    assert judges[0].identity != judges[1].identity


def test_what_transformers_own_class_computes_is_said_and_written_without_the_code_of_the_folder(
    scaled: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config_for(scaled, tiny_data, tmp_path / "run", max_steps=1))
    assert "scaled: transformers' own class is used, not the code in the folder" in capsys.readouterr().err
    merge_adapter(resolve_model(str(tmp_path / "run")), tmp_path / "merged")
    assert "auto_map" not in json.loads((tmp_path / "merged" / "config.json").read_text())
