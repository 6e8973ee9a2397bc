"""The plan of an extraction: it needs no weights, its sizes are those of the files, and its memory is about the real one."""

import re
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError
from cora_cli.extraction.extract import extract_basis
from cora_cli.extraction.preflight import preflight
from cora_cli.planning.memory import StorageMeter
from tests.weights.helpers import CPU, local


def bare(model: Path, to: Path) -> Path:
    return Path(shutil.copytree(model, to, ignore=shutil.ignore_patterns("*.safetensors")))


def bytes_of(page: str, line: str) -> float:
    found = re.search(rf"{line}.*: ([\d.]+) MiB", page)
    assert found, page
    return float(found[1]) * 2**20


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer whose q, k and v are 640 × 640, so that matrices take more than everything else."""
    config = LlamaConfig(
        hidden_size=640,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=32,
        dtype="float32",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path := tmp_path_factory.mktemp("wide") / "model")
    return path


@pytest.mark.parametrize("share", ["module", "projection"])
def test_a_plan_needs_no_weights_and_states_what_is_read_and_written(share, grouped_models, tmp_path):
    choices, out = BasisChoices(share=share, rank=4), tmp_path / "basis"
    without = [local(bare(path, tmp_path / path.name)) for path in grouped_models]
    page = preflight(without, out, choices, None, CPU)
    with_weights = preflight([local(path) for path in grouped_models], out, choices, None, CPU)
    assert page == with_weights.replace(str(grouped_models[0].parent), str(tmp_path))
    assert not out.exists()
    assert page.startswith(f"{6 if share == 'module' else 3} groups of rank 4 from 2 models\n")
    assert page.count("reads 6 weights of ") == 2
    assert page.count(" twice: ") == (2 if share == "projection" else 0)
    with pytest.raises(CoraError, match="--rank 9 is more than the 8 directions"):
        preflight(without, out, BasisChoices(share=share, rank=9), None, CPU)
    with pytest.raises(CoraError, match="holds no weights"):
        extract_basis(without, out, choices, None, CPU)


@pytest.mark.parametrize("choices", [BasisChoices(rank=256), BasisChoices(rank=256, merge="gram")], ids=["mean", "gram"])
def test_the_peak_and_the_sizes_are_about_those_of_the_extraction(choices, wide_model, tmp_path):
    out = tmp_path / "basis"
    page = preflight([local(wide_model)], out, choices, None, CPU)
    extract_basis([local(wide_model)], tmp_path / "first", choices, None, CPU)  # imports what it needs, which takes memory too
    meter = StorageMeter(10**9)
    tracemalloc.start()
    try:
        with meter:
            summary = extract_basis([local(wide_model)], out, choices, None, CPU)
        _, arrays = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bytes_of(page, "reads") == pytest.approx(summary.bytes_read, rel=0.02)
    assert bytes_of(page, "writes") == pytest.approx(out.stat().st_size, rel=0.05)
    assert bytes_of(page, "peak memory") == pytest.approx(sum(meter.peak.values()) + arrays, rel=0.3)


def test_the_difference_from_a_base_reads_the_base_too(grouped_models, tmp_path):
    choices = BasisChoices(rank=4, source="delta")
    one, base = (local(path) for path in grouped_models)
    page = preflight([one], tmp_path / "basis", choices, base, CPU)
    assert page.count("reads 6 weights of ") == 2
