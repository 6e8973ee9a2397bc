import dataclasses
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cora_cli import hashing
from cora_cli.basis.artifact import read_basis
from cora_cli.errors import CoraError
from cora_cli.evaluation import backend
from cora_cli.evaluation import evaluate as evaluation
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.experiments import demo
from cora_cli.experiments.demo import run_demo
from cora_cli.reading import read_json, read_jsonl
from cora_cli.rundir import RunDirectory
from cora_cli.training import run as training
from tests.training.helpers import log_lines

TASKS = ("arithmetic", "sql")
PROMPTS = 4
METRICS = ("rouge1", "sacrebleu")  # without the encoder, which takes longer to load than all the rest
EVALUATIONS = ("base-eval", *(f"runs/{name}/eval" for name in demo.METHODS))


@pytest.fixture(scope="module", autouse=True)
def small(tiny_model: Path) -> Any:
    """The demo with two tasks, a tiny model, two metrics, and a few steps and prompts."""
    with pytest.MonkeyPatch.context() as patch:
        constants = {
            "EMBEDDED_MODEL": str(tiny_model),
            "TASKS": TASKS,
            "DATASET": "builtin:task-json",
            "RANK": 8,
            "TASK_STEPS": 2,
            "TASK_BATCH": 2,
            "STEPS": 2,
            "BATCH": 2,
            "HELD_OUT": 4,
            "PROMPTS": PROMPTS,
            "NEW_TOKENS": 4,
        }
        for name, value in constants.items():
            patch.setattr(demo, name, value)
        patch.setattr(demo, "EvaluateConfig", partial(EvaluateConfig, metrics=METRICS))
        yield


class Work:
    """Counts expensive operations: training steps, models loaded for generation, bases extracted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.trained: list[str] = []
        self.generated = 0
        self.extracted = 0
        step, generate, extract = training.CoraTrainer.training_step, evaluation.generate, demo.extract_basis

        def training_step(trainer: Any, *arguments: Any, **options: Any) -> Any:
            self.trained.append(trainer._root.parent.name)
            return step(trainer, *arguments, **options)

        def generating(*arguments: Any) -> Any:
            self.generated += 1
            return generate(*arguments)

        def extracting(*arguments: Any, **options: Any) -> Any:
            self.extracted += 1
            return extract(*arguments, **options)

        patch.setattr(training.CoraTrainer, "training_step", training_step)
        patch.setattr(evaluation, "generate", generating)
        patch.setattr(demo, "extract_basis", extracting)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished demo that was stopped once before it extracted its basis, and the runs trained before and after that."""

    root: Path
    report: str
    trained_before: list[str]
    trained_after: list[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small: None) -> Finished:
    root = tmp_path_factory.mktemp("demo") / "demo"

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        before = Work(patch)
        patch.setattr(demo, "extract_basis", stop)
        with pytest.raises(KeyboardInterrupt):
            run_demo(root, 0, "cpu", "fp32")
    with pytest.MonkeyPatch.context() as patch:
        after = Work(patch)
        report = run_demo(root, 0, "cpu", "fp32")
    return Finished(root, report, before.trained, after.trained)


@pytest.fixture
def root(finished: Finished, tmp_path: Path) -> Iterator[Path]:
    """The finished demo, which a test may damage; it is restored afterwards."""
    root = finished.root
    shutil.copytree(root, tmp_path / "whole")
    yield root
    shutil.rmtree(root)
    shutil.copytree(tmp_path / "whole", root)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def contents(root: Path) -> dict[str, Any]:
    """Hashes of every result of a demo, and its logs without the times of steps."""
    names = ("adapter_model.safetensors", "predictions.jsonl", "scores.jsonl", "basis.safetensors")
    found: dict[str, Any] = {
        str(path.relative_to(root)): hashing.sha256_file(path) for name in names for path in sorted(root.rglob(name))
    }
    return found | {str(path.relative_to(root)): log_lines(path.parent) for path in sorted(root.rglob("log.jsonl"))}


def without_time(report: str) -> str:
    return report.partition("This run of the demo took")[0]


def test_the_chain_ends_with_a_report_on_five_methods(finished: Finished) -> None:
    root, report = finished.root, finished.report
    assert (root / "report.md").read_text() == report + "\n"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line.startswith("|")]
    assert rows[0] == ["method", "trained", "held-out loss", *METRICS]
    assert [row[0] for row in rows[2:7]] == ["base", "lora", "fb", "tb", "fb-orthonormal"]
    assert [row[0] for row in rows[9:]] == list(METRICS)
    # Rank 8 on q (64 × 64), k and v (32 × 64) of two layers: A alone, or A and B.
    a, b = 2 * 8 * 3 * 64, 2 * 8 * (64 + 32 + 32)
    assert [row[1] for row in rows[2:7]] == ["0", f"{a + b:,}", f"{a:,}", f"{a + b:,}", f"{a:,}"]
    assert "It does not show which mode is better" in report
    assert f"n = {PROMPTS} prompts" in report
    answers = read_jsonl(root / "base-eval" / "predictions.jsonl")
    assert f"(answers cut there: base {sum(line['finish_reason'] == 'length' for line in answers)}, lora " in report


def test_every_part_is_on_disk_and_built_from_the_previous_one(finished: Finished, tiny_model: Path) -> None:
    root = finished.root
    basis = read_basis(root / "basis.safetensors")
    assert [source.reference for source in basis.sources] == [str(root / "models" / task) for task in TASKS]
    for name in demo.METHODS:
        record = read_json(RunDirectory(root / "runs" / name).record)
        assert record["status"] == "finished"
        assert record["model"]["reference"] == str(tiny_model)
        used = record["basis"] and record["basis"]["sha256"]
        assert used == (basis.sha256 if name in ("fb", "tb") else None)
    metrics = [read_json(root / place / "metrics.json") for place in EVALUATIONS]
    assert {record["metrics"]["rouge1"]["n"] for record in metrics} == {PROMPTS}
    assert len({record["generation"]["settings"]["records_sha256"] for record in metrics}) == 1


@pytest.mark.slow
def test_a_second_call_reuses_every_complete_part(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, name in ((training, "CoraTrainer"), (backend, "load_model"), (demo, "extract_basis")):
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("finished work was done again"))
    root, report = finished.root, finished.report
    before = contents(root)
    again = run_demo(root, 0, "cpu", "fp32")
    assert without_time(again) == without_time(report)
    assert "6 of its 6 trainings were finished before." in again
    assert contents(root) == before


def test_a_stopped_demo_repeats_no_finished_run(finished: Finished) -> None:
    assert finished.trained_before == [task for task in TASKS for _ in range(2)]
    assert finished.trained_after == [method for method in demo.METHODS for _ in range(2)]


def test_a_seed_that_differs_is_refused(finished: Finished) -> None:
    with pytest.raises(
        CoraError, match=r"cannot be resumed with other inputs than it was started with: seed \(0 in the run, 1 now\)"
    ):
        run_demo(finished.root, 1, "cpu", "fp32")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def alter(path: Path) -> None:
    """Change one byte of a tensor, which the file format does not detect."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@dataclasses.dataclass(frozen=True)
class Damage:
    """Which files are damaged and how, and how many bases and evaluations then run again."""

    harms: dict[str, Callable[[Path], None]]
    extracted: int = 0
    generated: int = 0


# Several at a time, because every call checks all parts.
DAMAGE = {
    "truncated basis, adapter without configuration": Damage(
        {"basis.safetensors": truncate, "runs/tb/adapter/adapter_config.json": Path.unlink}, extracted=1
    ),
    "altered basis, adapter without weights": Damage(
        {"basis.safetensors": alter, "models/sql/adapter/adapter_model.safetensors": Path.unlink}, extracted=1
    ),
    "altered weights and predictions, no adapter at all": Damage(
        {
            "runs/fb/adapter/adapter_model.safetensors": alter,
            "runs/fb/eval/predictions.jsonl": alter,
            "runs/lora/adapter": shutil.rmtree,
        },
        generated=1,
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if place else ()) for place, name in enumerate(DAMAGE)]
)
@pytest.mark.slow
def test_only_damaged_parts_run_again(
    finished: Finished, root: Path, work: Work, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, before = DAMAGE[name], contents(root)
    for place, harm in damage.harms.items():
        harm(root / place)
    report = run_demo(root, 0, "cpu", "fp32")
    assert contents(root) == before
    assert without_time(report) == without_time(finished.report)
    # A run's result is written again from its last checkpoint: no step is repeated.
    assert (work.trained, work.extracted, work.generated) == ([], damage.extracted, damage.generated)
    said = capsys.readouterr().err
    damaged = {place.partition("/adapter")[0] for place in damage.harms if "/adapter" in place}
    for run in [f"models/{task}" for task in TASKS] + [f"runs/{method}" for method in demo.METHODS]:
        assert (f"the result in {root / run} was damaged after it was written" in said) == (run in damaged)
        assert (f"{root / run} is already finished" in said) == (run not in damaged)


@pytest.mark.slow
def test_a_run_without_result_and_checkpoints_is_trained_again_to_the_same_weights(root: Path, work: Work) -> None:
    before = contents(root)
    shutil.rmtree(root / "runs" / "tb" / "adapter")
    shutil.rmtree(root / "runs" / "tb" / "checkpoints")
    run_demo(root, 0, "cpu", "fp32")
    assert work.trained == ["tb"] * 2
    assert contents(root) == before
