"""The plan of an evaluation: its memory is that of the decoder, its counts are those of the records, and nothing is needed but the configuration."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from cora_cli import writing
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.decode import PooledDecoder
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.preflight import BYTES_PER_TOKEN, describe, preflight
from cora_cli.planning.memory import StorageMeter
from cora_cli.planning.page import size_text
from cora_cli.reading import read_jsonl
from tests.conftest import VOCABULARY


def config_for(model: Path, data: Path, out: Path, **changes: Any) -> EvaluateConfig:
    common = {"dry_run": True, "device": "cpu", "dtype": "fp32", "batch_size": 8, "max_new_tokens": 70, "limit": 12}
    return EvaluateConfig(model=str(model), dataset=str(data), output_dir=str(out), **{**common, **changes})


@pytest.fixture(scope="module")
def bare(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its weights."""
    to = tmp_path_factory.mktemp("bare") / "model"
    return Path(shutil.copytree(tiny_model, to, ignore=shutil.ignore_patterns("*.safetensors")))


def test_the_peak_is_that_of_the_decoder_whose_rows_all_reach_the_longest_answer(
    tiny_model: Path, bare: Path, tiny_data: Path, tmp_path: Path
) -> None:
    (plan,) = preflight(config_for(bare, tiny_data, tmp_path / "out"))
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    meter = StorageMeter(VOCABULARY)
    meter.assign((*model.parameters(), *model.buffers()), "weights")
    with meter:
        decoder = PooledDecoder(model, plan.prompts, (), 8, 70)
        wave = sorted(plan.prompts, key=len, reverse=True)
        answers = decoder.answer(wave, lambda: None)
    assert {len(answer) for answer in answers} == {70}
    assert isinstance(plan.memory, dict)
    # The plan has every row at its full length, which in these few bytes counts for more than in those of a larger model.
    assert sum(plan.memory.values()) == pytest.approx(sum(meter.peak.values()), rel=0.2)
    assert plan.memory["weights"] == meter.peak["weights"]
    pool = [tensor for layer in decoder._pool._own for tensor in (layer.keys, layer.values)]
    shared = [tensor for states in decoder._states.values() for pair in states for tensor in pair]
    assert shared
    assert plan.memory["cache"] == sum(tensor.nbytes for tensor in (*pool, *shared))


def test_a_plan_counts_prompts_and_tokens_and_writes_nothing(bare: Path, tiny_data: Path, tmp_path: Path) -> None:
    sampled = config_for(bare, tiny_data, tmp_path / "out", samples=3, temperature=0.8, device="auto", dtype="auto")
    (plan,) = preflight(sampled)
    page = describe([plan])
    assert f"12 prompts, 3 answers to each of {min(map(len, plan.prompts))} to" in page
    assert f"{12 * 3 * 70:,} new tokens, 8 prompts at a time" in page
    assert f"reads {bare}\n" in page
    assert f"writes at most about {tmp_path / 'out' / 'predictions.jsonl'}: " in page
    if not torch.cuda.is_available():
        assert "on a CUDA GPU, bf16, computed" in page
        assert "fits a card of  16 GB: yes" in page
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("samples", [1, 3])
def test_the_size_of_the_answers_is_that_of_the_lines_that_are_written(
    samples: int, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    drawn: dict[str, Any] = {"samples": samples, "temperature": 0.8} if samples > 1 else {}
    config = config_for(tiny_model, tiny_data, tmp_path / "out", max_new_tokens=2, metrics=("rouge",), **drawn)
    (plan,) = preflight(config)
    evaluate(dataclasses.replace(config, dry_run=False))
    lines = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    assert len(lines) == 12
    for line in (answer for each in lines for answer in (each, *each.get("samples", ()))):
        line |= {"prediction": "", "finish_reason": "length", "new_tokens": 2}
    assert plan.text == len(writing.jsonl_text(lines).encode())
    size = size_text(plan.text + 12 * (samples + (samples > 1)) * 2 * BYTES_PER_TOKEN)
    assert f"predictions.jsonl: {size}\n" in describe([plan])


def test_a_plan_refuses_records_without_the_tests_that_it_would_run(bare: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(CoraError, match="line 1 carries no tests, which pass@k needs"):
        preflight(config_for(bare, tiny_data, tmp_path / "out", metrics=("pass@1",), execute_code=True))


def test_a_longer_answer_and_a_larger_batch_need_a_larger_cache(bare: Path, tiny_data: Path, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"max_new_tokens": 200}, {"batch_size": 4}]
    (usual, longer, fewer) = (preflight(config_for(bare, tiny_data, tmp_path / "out", **own))[0].memory for own in settings)
    assert isinstance(usual, dict)
    assert isinstance(longer, dict)
    assert isinstance(fewer, dict)
    assert longer["cache"] > usual["cache"] > fewer["cache"]


def test_the_time_is_that_of_the_longest_answers_at_the_rate_of_a_finished_evaluation(
    bare: Path, tiny_data: Path, tmp_path: Path
) -> None:
    finished = tmp_path / "eval"
    finished.mkdir()
    settings = {"name": "x", "settings": {}, "engine": "pool"}
    writing.write_json(finished / "generation.json", {**settings, "new_tokens": 100, "seconds": 50.0})
    page = describe(preflight(config_for(bare, tiny_data, tmp_path / "out", rate_from=str(finished))))
    assert f"time: at most 7 min at 2 new tokens/s, the rate of {finished}\n" in page
    with pytest.raises(CoraError, match=r"--rate-from needs the directory of a finished evaluation.*gone has no rate"):
        preflight(config_for(bare, tiny_data, tmp_path / "out", rate_from=str(tmp_path / "gone")))


def test_what_a_plan_does_not_apply_to_is_refused() -> None:
    with pytest.raises(UsageError, match="--dry-run has no effect with --from"):
        EvaluateConfig(from_predictions="x", dry_run=True)
    with pytest.raises(UsageError, match="--rate-from has no effect without --dry-run"):
        EvaluateConfig(runs=("x",), rate_from="y")
