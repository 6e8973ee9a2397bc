"""The trainings of a grid in its plan: checked as their runs check themselves, and measured as `cora train --dry-run` measures them."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from cora_cli.errors import CoraError
from cora_cli.experiments import trainings
from cora_cli.experiments.ablate import Request, ablate, dry_run, rate_of_steps
from cora_cli.experiments.estimate import NO_TIME_NOTE
from cora_cli.experiments.grid import load_grid
from cora_cli.experiments.inputs import find_inputs
from cora_cli.experiments.ledger import Ledger
from cora_cli.experiments.steps import StepFlags, make_plan
from cora_cli.planning.page import size_text
from cora_cli.training.config import TrainConfig
from cora_cli.training.preflight import Measured, preflight

TRAIN: dict[str, Any] = {"rank": 4, "max_steps": 3, "batch_size": 2, "test_size": 4}


def write(place: Path, model: Path, data: Path, blocks: list[dict[str, Any]], **changes: Any) -> Path:
    values = {
        "model": str(model),
        "datasets": {"counting": str(data)},
        "defaults": {"train": TRAIN, "evaluate": False},
        "grid": blocks,
    }
    path = place / "grid.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def planned(grid: Path, device: str = "cpu", **changes: Any) -> str:
    return dry_run(Request(grid, grid.parent / "out", device=device, **changes))


def memory_of(page: str) -> dict[str, str]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    return {row[0]: row[4] for row in rows[2:] if len(row) == 6}


def peaks(model: Path, data: Path, *seeds: int, **settings: Any) -> dict[int, int]:
    found = {}
    for seed in seeds or (0,):
        config = TrainConfig(model=str(model), dataset=str(data), output_dir="o", **{**TRAIN, "seed": seed, **settings})
        measured = preflight(config).measured
        assert isinstance(measured, Measured)
        found[seed] = measured.memory.total
    return found


def peak(model: Path, data: Path, *seeds: int, **settings: Any) -> str:
    """The largest peak of the runs with these seeds, as a plan shows it."""
    return shown(max(peaks(model, data, *seeds, **settings).values()))


def shown(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


@pytest.mark.slow
def test_every_row_has_the_peak_of_its_own_dry_run(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A basis that is not extracted yet takes what a random B takes."""
    blocks: list[dict[str, Any]] = [
        {"mode": "base"},
        {"mode": ["lora", "full"], "seed": [0, 1]},
        {"mode": "tb", "n_models": 0},
        {"mode": "fb", "b_init": "random", "batch_size": 8},
    ]
    page = planned(write(tmp_path, tiny_model, tiny_data, blocks))
    lora, full = (peak(tiny_model, tiny_data, 0, 1, mode=mode, device="cpu") for mode in ("lora", "full"))
    fb = peak(tiny_model, tiny_data, mode="fb", b_init="random", batch_size=8, device="cpu")
    tb = peak(tiny_model, tiny_data, mode="tb", b_init="random", device="cpu")
    assert list(memory_of(page).values()) == ["-", lora, lora, full, full, tb, fb]
    assert len({lora, full, fb}) == 3
    assert "as `cora train --dry-run` computes it" in page
    assert "distinct trainings" not in page


@pytest.mark.parametrize(
    ("blocks", "changes", "seeds"),
    [
        ([{"mode": "lora", "seed": [1, 2]}], {}, (1, 2)),
        pytest.param([{"mode": "lora", "seed": 1, "ensemble": 2}], {}, (1, 1001), marks=pytest.mark.slow),
        pytest.param(
            [{"mode": "lora", "learning_rate": [1e-4, 1e-3]}],
            {"sweep": {"seeds": [1]}, "confirm": {"seeds": [3, 4, 5]}},
            (1, 3, 4, 5),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["rows", "members of an ensemble", "runs that confirm a sweep"],
)
def test_a_row_has_the_peak_of_the_seed_with_the_largest_batch(
    blocks: list[dict[str, Any]],
    changes: dict[str, Any],
    seeds: tuple[int, ...],
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    train = {**TRAIN, "validation_size": 2}
    found = peaks(tiny_model, tiny_data, *seeds, mode="lora", device="cpu", validation_size=2)
    assert max(found.values()) > found[1]
    evaluate = {"metrics": ["calibration"]} if "ensemble" in blocks[0] else False
    defaults = {"train": train, "evaluate": evaluate}
    page = planned(write(tmp_path, tiny_model, tiny_data, blocks, defaults=defaults, **changes))
    assert set(memory_of(page).values()) == {shown(max(found.values()))}


def test_rows_that_differ_in_rate_and_seed_are_measured_once_and_only_so_many(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_run, measured = trainings.plan_run, []

    def noting(config: TrainConfig, *others: Any) -> Any:
        measured.append(config.mode)
        return plan_run(config, *others)

    monkeypatch.setattr(trainings, "plan_run", noting)
    grid = write(tmp_path, tiny_model, tiny_data, [{"mode": ["lora", "full"], "learning_rate": [1e-4, 1e-3], "seed": [0, 1]}])
    page = planned(grid, measure=1)
    assert measured == ["full"]  # the one with the larger estimate
    assert "measured: 1 of 2 distinct trainings, those with the largest estimates (--measure all measures all)" in page
    shown = memory_of(page)
    assert {cell.startswith("~") for row, cell in shown.items() if row.startswith("lora")} == {True}
    assert {cell.startswith("~") for row, cell in shown.items() if row.startswith("full")} == {False}
    measured.clear()
    planned(grid, measure="all", only="lora*seed1")
    assert measured == ["lora"]
    monkeypatch.setattr(trainings, "LAYERS", 4)  # two trainings of two layers each
    assert "distinct trainings" not in planned(grid)
    monkeypatch.setattr(trainings, "LAYERS", 1)
    measured.clear()
    planned(grid)
    assert measured == ["full"]
    assert "distinct trainings" not in planned(grid, measure="all")
    assert all(cell.startswith("~") for cell in memory_of(planned(grid, measure=0)).values())


def test_a_plan_shows_the_tokens_and_the_adapter_of_each_distinct_training(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """As the dry run of the first of its rows; the adapter where it was measured."""
    blocks = [
        {"mode": "base"},
        {"mode": ["lora", "full"], "learning_rate": [1e-4, 1e-3], "seed": [1, 2]},
        {"mode": "vera", "rank": 8, "seed": 1},
    ]
    grid = write(tmp_path, tiny_model, tiny_data, blocks)

    def volumes(width: int, measure: int) -> dict[str, list[str]]:
        page = dry_run(Request(grid, tmp_path / "out", device="cpu", measure=measure), width)
        table = page.partition("| training")[2].partition("\n\n")[0]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
        assert max(map(len, table.splitlines()[1:])) <= width
        return {row[0]: row[1:] for row in rows}

    common: dict[str, Any] = {"model": str(tiny_model), "dataset": str(tiny_data), "output_dir": "o", "device": "cpu"}
    lora = preflight(TrainConfig(**common, **{**TRAIN, "seed": 1}, mode="lora"))
    assert isinstance(lora.measured, Measured)
    assert lora.measured.adapter_bytes is not None
    found = volumes(200, 2)
    assert list(found) == ["lora_r4", "full", "vera_r8"]
    size = size_text(lora.measured.adapter_bytes)
    assert size.endswith(" KiB")
    assert found["lora_r4"] == ["4", f"{lora.tokens:,}", f"{lora.labels:,}", size]
    assert [found[name][0] for name in ("full", "vera_r8")] == ["4", "1"]
    assert [found[name][3] for name in ("full", "vera_r8")] == ["-", "-"]
    assert volumes(80, 0)["lora_r4"] == ["4", f"{lora.tokens:,}", f"{lora.labels:,}", "-"]


def test_a_plan_without_steps_says_that_nothing_runs(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    grid = write(tmp_path, tiny_model, tiny_data, [{"mode": "base"}])
    page = planned(grid, device="auto" if torch.cuda.is_available() else "cuda")
    assert "no steps: these rows run nothing" in page
    assert "this machine" not in page
    assert "no time" not in page


def test_a_plan_for_a_gpu_says_how_many_trainings_fit_each_card(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the plan is for the GPU that is here")
    grid = write(tmp_path, tiny_model, tiny_data, [{"mode": "base"}, {"mode": ["lora", "full"]}])
    page = planned(grid, device="auto")
    assert "on a CUDA GPU in bf16" in page
    assert "of 2 trainings, the number that fits a card of  16 GB: 2" in page
    assert "fit a card" not in planned(grid)
    page = planned(grid, device="auto", measure=1)
    assert (
        "of 2 trainings (1 counted as twice their estimates, which can be half of the truth), the number that fits a card of  16 GB: 2"
        in page
    )


@pytest.mark.parametrize("staged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_plan_for_a_gpu_that_is_not_here_has_no_time(staged: bool, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the plan is for the GPU that is here")
    stages = {"sweep": {"seeds": [1]}, "confirm": {"seeds": [3, 4, 5]}} if staged else {}
    defaults = {"train": {**TRAIN, "validation_size": 2}, "evaluate": False}
    blocks = [{"mode": "base"}, {"mode": "lora", "learning_rate": [1e-4, 1e-3] if staged else 1e-4}]
    grid = write(tmp_path, tiny_model, tiny_data, blocks, defaults=defaults, **stages)
    page = planned(grid, device="cuda")
    assert "on a CUDA GPU in bf16" in page
    assert NO_TIME_NOTE in page
    assert "about" not in page.replace("about 0.", "")
    assert ("The steps above are those that are certain so far. All rounds" in page) == staged
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| lora")]
    assert {row[3].strip() for row in rows if len(row) == 6} == {"unknown"}
    assert memory_of(page) == memory_of(planned(grid, device="auto"))
    with pytest.raises(CoraError, match="--device cuda is not available"):
        ablate(Request(grid, tmp_path / "out", device="cuda"), lambda *_: {})
    assert rate_of_steps(Request(grid, device="cuda", launcher="slurm")) is None  # the cluster may have GPUs
    with pytest.raises(CoraError, match="--device cuda is not available"):
        rate_of_steps(Request(grid, device="cuda"))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"mode": "lora", "attention": "varlen"}, "--attention varlen needs a CUDA GPU; leave it out on a processor"),
        ({"mode": "lora", "liger": True}, "--liger needs a CUDA GPU"),
        ({"mode": "melora", "mini_loras": 7}, "mode melora needs --mini-loras to divide the 64 inputs"),
        ({"mode": "lora", "tokens_per_row": 9}, "--tokens-per-row must be at least"),
        ({"mode": "lora", "train_on": "all"}, "--train-on all needs conversations"),
        ({"mode": "lora", "template_date": "2026-01-01", "template": "alpaca"}, "--template-date has no effect"),
        ({"mode": "cola", "chain_length": 4}, "--chain-length 4 is more than the 3 steps of the run"),
        ({"mode": "lora", "target_modules": ["embed_tokens"]}, "embed_tokens"),
        (
            {"mode": "uni-lora", "theta_length": 5000},
            "--theta-length must be at most 2560, the numbers in all A and B, not 5000",
        ),
    ],
)
def test_a_plan_refuses_what_a_run_refuses_at_its_start(
    block: dict[str, Any], message: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    blocks = [{"mode": "lora", "rank": 8}, {**block, "seed": [0, 1]}]
    grid = write(tmp_path, tiny_model, tiny_data, blocks)
    with pytest.raises(CoraError, match="seed0 and 1 more: ") as caught:
        planned(grid, measure=0)
    assert message in str(caught.value)
    assert str(caught.value).count("seed0") == 1
    with pytest.raises(CoraError) as refused:
        ablate(Request(grid, tmp_path / "out", device="cpu"), lambda *_: {})
    assert str(refused.value) == str(caught.value)
    assert not (tmp_path / "out" / "runs").exists()
    assert not (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize(
    ("settings", "refused"), [({"use_dora": True}, "was trained with use_dora"), ({}, None)], ids=["a DoRA", "of another base"]
)
def test_a_plan_says_of_the_adapters_behind_a_basis_what_its_extraction_would(
    settings: dict[str, Any],
    refused: str | None,
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], **settings)
    get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path / "adapter")
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    stated["base_model_name_or_path"] = str(tiny_model) if refused else "org/another"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(stated))
    defaults = {"train": TRAIN, "basis": {"source": "delta"}, "evaluate": False}
    blocks = [{"mode": "lora"}, {"mode": "fb", "seed": [0, 1]}]
    grid = write(tmp_path, tiny_model, tiny_data, blocks, models={"one": str(tmp_path / "adapter")}, defaults=defaults)
    calls = [lambda: planned(grid, measure=0)]
    if refused:
        calls.append(lambda: ablate(Request(grid, tmp_path / "out", device="cpu"), lambda *_: {}))
    for call in calls:
        with pytest.raises(CoraError, match=f"^cora-fb.*: .*{refused}") if refused else contextlib.nullcontext():
            call()
    assert refused or f"names org/another as its base model; {tiny_model} is taken in its place" in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()


def test_a_plan_refuses_results_of_other_settings_in_its_directory_as_the_grid_would(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    grid = load_grid(write(tmp_path, tiny_model, tiny_data, [{"mode": "lora"}]))
    plan = make_plan(grid, out, find_inputs(grid, out / "hashes.json"), StepFlags("cpu", "auto"))
    (step,) = plan.steps.values()
    Ledger(out).start(step, {})
    assert "to do" in planned(tmp_path / "grid.yaml")
    longer = write(tmp_path, tiny_model, tiny_data, [{"mode": "lora", "max_steps": 4}])
    refusals = []
    for call in (lambda: planned(longer), lambda: ablate(Request(longer, out, device="cpu"), lambda *_: {})):
        with pytest.raises(
            CoraError, match=rf"created with other settings: runs/{plan.grid.rows[0].name} \(max_steps\)"
        ) as refused:
            call()
        refusals.append(str(refused.value))
    assert refusals[0] == refusals[1]
    assert "to do" in planned(longer, overwrite=True)


def test_a_plan_refuses_the_training_of_a_source_model_by_its_name(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    models = {"tuned": {"dataset": str(tiny_data), "tokens_per_row": 9}}
    grid = write(tmp_path, tiny_model, tiny_data, [{"mode": "fb"}], models=models)
    with pytest.raises(CoraError, match=r"^models: tuned: --tokens-per-row must be at least"):
        planned(grid)


def test_a_plan_refuses_models_that_a_row_cannot_start_from(
    tiny_model: Path, tiny_multihead_model: Path, tiny_data: Path, tiny_sources: tuple[str, str], tmp_path: Path
) -> None:
    """Models that the grid is to train itself are not there yet."""
    models = {"fine": tiny_sources[0], "complete": str(tiny_model), "later": {"dataset": str(tiny_data), "max_steps": 1}}
    blocks = [
        {"mode": "lora", "start": "mean-delta", "sources": ["fine", "later"]},
        {"mode": "mean-delta", "sources": ["fine"]},
    ]
    planned(write(tmp_path, tiny_model, tiny_data, blocks, models=models), measure=0)
    blocks.append({"mode": "eigenlorax", "rank": 2, "eigen_directions": 2, "eigen_random": 2, "sources": ["fine", "complete"]})
    with pytest.raises(
        CoraError, match=r"^eigenlorax\S*: .*starts from the factors of LoRA adapters, but .* is a complete model$"
    ):
        planned(write(tmp_path, tiny_model, tiny_data, blocks, models=models), measure=0)
    others = {"fine": tiny_sources[0]}
    with pytest.raises(
        CoraError, match=r"^mean-delta\S*: .*source-0: .*k_proj has lora_A \(4, 64\) and lora_B \(32, 4\), which do not fit"
    ):
        planned(write(tmp_path, tiny_multihead_model, tiny_data, blocks[1:2], models=others), measure=0)


def test_a_row_that_starts_from_models_has_an_estimate(
    tiny_model: Path, tiny_data: Path, tiny_sources: tuple[str, str], tmp_path: Path
) -> None:
    models = dict(zip("ab", tiny_sources, strict=True))
    page = planned(
        write(tmp_path, tiny_model, tiny_data, [{"mode": "lora", "start": "mean-delta"}], models=models), measure="all"
    )
    assert [cell.startswith("~") for cell in memory_of(page).values()] == [True]
    assert "rows that start from models are not measured" in page
    if not torch.cuda.is_available():
        blocks = [{"mode": "lora"}, {"mode": "lora", "start": "mean-delta"}]
        page = planned(write(tmp_path, tiny_model, tiny_data, blocks, models=models), device="auto", measure=0)
        assert "the number that fits a card" in page
        assert (
            "of 1 trainings (1 counted as twice their estimates, which can be half of the truth), without the 1 that start"
            in page
        )
