"""What a run's record says about the machine, and about its basis."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cora_cli.basis.choices import BasisChoices
from cora_cli.extraction.extract import extract_basis
from cora_cli.models.references import resolve_model
from cora_cli.training.record import peak_resident_bytes
from cora_cli.training.run import train
from tests.training.helpers import config_for


@pytest.mark.slow
def test_the_peak_does_not_begin_with_that_of_the_process_that_started_this_one() -> None:
    ballast = b"x" * (1 << 30)
    script = "from cora_cli.training.record import peak_resident_bytes; print(peak_resident_bytes())"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert 10**7 < int(found) < len(ballast) < peak_resident_bytes()


def test_without_a_status_file_the_system_call_answers(tmp_path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\n")
    for status in (tmp_path / "none", tmp_path / "status"):
        assert peak_resident_bytes(status) > 10**7


@pytest.mark.parametrize("of_base", [True, False])
def test_a_basis_of_a_copy_of_the_base_model_is_one_of_the_base_model(of_base, tiny_model, tiny_data, tmp_path) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    if not of_base:
        weights = load_file(other / "model.safetensors")
        weights["model.layers.0.self_attn.q_proj.weight"] *= 1.5
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    basis = tmp_path / "basis.safetensors"
    extract_basis([resolve_model(str(other))], basis, BasisChoices(rank=4), None, torch.device("cpu"))
    record = train(config_for(tiny_model, tiny_data, tmp_path / "run", mode="fb", basis=str(basis), rank=4, max_steps=1))
    assert record["basis"].get("of_base", False) is of_base
