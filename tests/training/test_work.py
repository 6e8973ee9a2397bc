"""The largest micro-batch of a run is that of the batches that its processes see, whatever the form of its batches."""

import json
from pathlib import Path
from typing import Any

import pytest

from cora_cli.data.batches import GHOST, BatchForm, GlobalBatches
from cora_cli.device import planned_hardware
from cora_cli.training import work as module
from cora_cli.training.config import TrainConfig
from cora_cli.training.preflight import Measured, plan_run
from cora_cli.training.prepare import Prepared, prepare
from cora_cli.training.rough import rough_peak
from cora_cli.training.work import Work
from tests.training.helpers import config_for

PACKED = BatchForm("packed")
FORMS = {"rows": PACKED, "rows that share prefixes": BatchForm("packed", True), "padded batches": BatchForm("padded")}


def batches_of(config: TrainConfig, prepared: Prepared, seed: int, steps: int, processes: int) -> list[list[int]]:
    """The micro-batches of the first `steps` of a run, as the samplers of its processes give them."""
    found = []
    for rank in range(processes):
        of_rank = GlobalBatches(
            len(prepared.train.examples), config.batch_size, config.gradient_accumulation, rank, processes, seed
        )
        mine: list[list[int]] = []
        while len(mine) < steps * config.gradient_accumulation:
            mine += of_rank
            of_rank.set_epoch(of_rank.epoch + 1)
        found += [batch for batch in mine[: steps * config.gradient_accumulation] if batch != [GHOST]]
    return found


def ready(config: TrainConfig) -> Prepared:
    return prepare(config, planned=planned_hardware("cpu", "fp32"))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_largest_pass_is_that_of_every_seed_epoch_and_process(
    form: BatchForm, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", batch_size=3, gradient_accumulation=2)
    prepared, examples = ready(config), ready(config).train.examples
    for steps, processes, seeds in ((1, 1, ()), (14, 2, ()), (2, 2, (1, 2, 3)), (32, 1, (5,))):
        work = Work(config, prepared, form, steps, processes, seeds)
        every = [batch for seed in {config.seed, *seeds} for batch in batches_of(config, prepared, seed, steps, processes)]
        assert work.size(work.passes[0]) == max(map(work.size, every)), (steps, processes, seeds)
        assert work.largest == form.tokens([examples[index] for index in work.passes[0]])
        own = [example for batch in batches_of(config, prepared, config.seed, steps, processes) for example in batch]
        assert work.tokens == sum(len(examples[index].input_ids) for index in own)
        assert work.labels == sum(len(examples[index].input_ids) - examples[index].prompt_length for index in own)


def test_the_largest_pass_is_found_behind_many_whose_examples_share_a_prefix(tiny_model: Path, tmp_path: Path) -> None:
    shared = " ".join(f"rule {number}" for number in range(30))
    records = [{"prompt": f"{shared} question {number}", "completion": "yes"} for number in range(90)]
    records += [
        {"prompt": " ".join(f"{letter}{number}" for number in range(24)), "completion": "no"} for letter in "abcdefghij"
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    config = config_for(tiny_model, data, tmp_path / "run", batch_size=2)
    prepared, form = ready(config), FORMS["rows that share prefixes"]
    work = Work(config, prepared, form, 200, 1)
    every = batches_of(config, prepared, config.seed, 200, 1)
    sums = sorted((sum(len(prepared.train.examples[index].input_ids) for index in batch) for batch in every), reverse=True)
    found = sum(len(prepared.train.examples[index].input_ids) for index in work.passes[0])
    assert sums.index(found) > 16, "batches that share a prefix have larger sums"
    assert work.size(work.passes[0]) == max(map(work.size, every))


ROUGH: dict[str, dict[str, Any]] = {
    "an adapter": {},
    "short rows": {"tokens_per_row": 150},
    "checkpointing in four processes": {"gradient_checkpointing": True, "processes": 4, "dry_run": True},
    "a divided base": {"shard": "fsdp", "processes": 4, "dry_run": True},
    "all weights": {"mode": "full"},
    "all weights, divided": {"mode": "full", "shard": "fsdp", "processes": 4, "dry_run": True},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "divided" in name or name == "short rows" else ()) for name in ROUGH]
)
def test_a_count_from_shapes_is_within_a_factor_of_two_of_the_peak(
    name: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", max_steps=2, eval_limit=1, **ROUGH[name])
    prepared = prepare(config, planned=planned_hardware("auto", "bf16"))
    measured = plan_run(config, prepared).measured
    assert isinstance(measured, Measured)
    assert 0.5 < rough_peak(config, prepared) / measured.memory.total < 2


def test_the_largest_examples_stand_for_epochs_that_are_not_searched(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", batch_size=3)
    prepared = ready(config)
    searched = Work(config, prepared, PACKED, 12 * 3, 1)
    monkeypatch.setattr(module, "EPOCHS", 2)
    longer = Work(config, prepared, PACKED, 12 * 3, 1)
    order = sorted(range(len(prepared.train.examples)), key=lambda index: longer.size([index]))
    assert longer.size(longer.passes[0]) == longer.size(order[-3:]) > longer.size(searched.passes[0])
