"""Grids for the tests of reporting: really trained tiny ones, and made-up ones whose numbers are known beforehand."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from cora_cli import hashing, writing
from cora_cli.evaluation.metrics import score_all
from cora_cli.experiments.ledger import Ledger
from cora_cli.experiments.steps import Step
from cora_cli.reading import read_json
from cora_cli.reporting.measures import LOSS, Measure
from cora_cli.reporting.report_rows import Row
from cora_cli.reporting.results import Result
from cora_cli.rundir import EvaluationDirectory, RunDirectory
from cora_cli.training.heldout import HeldOutLoss, loss_change

WORDS = [
    "the",
    "model",
    "answers",
    "every",
    "question",
    "with",
    "one",
    "short",
    "sentence",
    "about",
    "numbers",
    "and",
    "names",
    "of",
    "rivers",
    "or",
    "towns",
]
METRICS = ("rouge1", "rougeL", "sacrebleu")
B_INIT = {"lora": "zeros", "fb": "basis", "tb": "basis", "full": None, "base": None, "mean-delta": None}


ROW = Row("row", None, "g", "fb", "fb", 4, 1, (), 1e-3, 0, "m", "d", None, None, None)


@dataclasses.dataclass
class Made:
    """One made-up row: `skill` is the share of the reference's words that an answer gets right, `loss` its held-out loss."""

    label: str
    mode: str
    seed: int = 0
    skill: float = 0.5
    loss: float = 1.0
    rank: int | None = 4
    n_models: int | None = None
    rate: float | None = 1e-3
    b_init: str | None = None
    printed: str | None = None
    group: str = "tiny"
    trained: int = 1000

    @property
    def name(self) -> str:
        rate = f"_lr{self.rate:g}" if self.rate is not None else ""
        return f"{self.group}-{self.label}_r{self.rank}_n{self.n_models}{rate}_seed{self.seed}".replace(" ", "-")


def make_grid(root: Path, rows: list[Made], prompts: int = 40, **plan: Any) -> Path:
    """An output directory of `ablate` with finished rows."""
    entries = []
    for number, made in enumerate(rows):
        entries.append(plan_entry(made))
        generator = np.random.default_rng(1000 + number)
        if made.mode != "base":
            write_run(root / "runs" / made.name, made, generator)
        write_evaluation(root / entries[-1]["evaluation"], made, generator, prompts)
    write_plan(root, entries, **plan)
    return root


def write_plan(root: Path, entries: list[dict[str, Any]], **changes: Any) -> None:
    plan = {
        "format_version": 1,
        "name": "tiny",
        "title": "A tiny grid",
        "paper_table": None,
        "preset": None,
        "conditions": ["The models are tiny."],
        "rows": entries,
    }
    writing.write_json(root / "plan.json", {**plan, **changes})


def record_steps(root: Path, **facts: Any) -> None:
    """Make the grid one whose steps were carried out as planned: what lies there now is what they made from `facts`."""
    plan = read_json(root / "plan.json")
    steps = []
    facts = {"model": "aa" * 32, "dataset": "bb" * 32, **facts}  # the hashes in the record of `write_run`
    for row in plan["rows"]:
        run = Step(f"train-{row['name']}", "train", row["run"], {"row": row["name"], **facts}, (), ()) if row["run"] else None
        needs = (run.name,) if run else ()
        evaluation = Step(f"evaluate-{row['name']}", "evaluate", row["evaluation"], {"row": row["name"], **facts}, needs, ())
        results: dict[str, str] = {}
        for step in filter(None, (run, evaluation)):
            results[step.name] = Ledger(root).finish(step, results, 1.0)
            steps.append(dataclasses.asdict(step))
    writing.write_json(root / "plan.json", {**plan, "steps": steps})


def plan_entry(made: Made) -> dict[str, Any]:
    base = made.mode == "base"
    return {
        "name": made.name,
        "printed": made.printed,
        "group": made.group,
        "mode": made.mode,
        "label": made.label,
        "rank": made.rank,
        "n_models": made.n_models,
        "sources": ["a", "b"][: made.n_models or 0],
        "learning_rate": made.rate,
        "seed": made.seed,
        "model": "tiny-model",
        "dataset": "tiny-data",
        "run": None if base else f"runs/{made.name}",
        "evaluation": "evaluations/base" if base else f"runs/{made.name}/evaluation",
        "basis": None,
    }


def write_run(path: Path, made: Made, generator: np.random.Generator, records: int = 30) -> None:
    """A run directory whose files agree with each other."""
    run = RunDirectory(path)
    # What all rows share comes from a generator of its own: the base model's loss and the lengths of the records.
    shared = np.random.default_rng(0)
    tokens = shared.integers(3, 20, records).astype(float)
    before = tokens * (1.4 + 0.2 * shared.standard_normal(records))
    after = tokens * (made.loss + 0.1 * shared.standard_normal(records) + 0.01 * generator.standard_normal(records))
    losses = HeldOutLoss(before, tokens), HeldOutLoss(after, tokens)
    writing.write_jsonl(
        run.heldout, [{"before": b, "after": a, "tokens": int(t)} for b, a, t in zip(before, after, tokens, strict=True)]
    )
    writing.write_text(run.adapter / "adapter_model.safetensors", "weights" * 100)
    steps = 20
    writing.write_jsonl(
        run.log,
        [
            {"step": s, "epoch": 0.1, "loss": float(made.loss + 0.4 / s + 0.05 * generator.random())}
            for s in range(1, steps + 1)
        ],
    )
    b_init = made.b_init or B_INIT[made.mode]
    settings = {
        "learning_rate": made.rate,
        "batch_size": 8,
        "gradient_accumulation": 1,
        "lr_schedule": "linear",
        "max_steps": 20,
    }
    writing.write_json(
        run.record,
        {
            "format": 1,
            "status": "finished",
            "started": "2026-01-01T00:00:00+00:00",
            "finished": "2026-01-01T00:01:00+00:00",
            "mode": made.mode,
            "plan": None
            if made.mode == "full"
            else {
                "mode": made.mode,
                "b_init": b_init,
                "a_init": "kaiming" if made.mode == "lora" else "zeros",
                "trains_b": made.mode != "fb",
                "rank": made.rank,
                "alpha": 8.0,
                "rslora": False,
                "target_modules": ["q_proj"],
                "dropout": 0.0,
                "seed": made.seed,
            },
            "fingerprint": {"settings": settings, "model_sha256": "aa" * 32, "data_sha256": "bb" * 32, "basis_sha256": None},
            "model": {"reference": "tiny-model", "revision": None},
            "basis": None,
            "parameters": {"trained": made.trained, "total": 100_000, "adapter": 2000},
            "data": {
                "dataset": "tiny-data",
                "template": "alpaca",
                "train": {"records": 36, "tokens": 900, "response_tokens": 400, "truncated": 1, "dropped": 0},
                "test": {"records": records, "tokens": 90, "response_tokens": 40, "truncated": 0, "dropped": 0},
                "overlapping_dropped": 0,
            },
            "hardware": {
                "device": "cpu",
                "device_reason": "no GPU",
                "dtype": "fp32",
                "dtype_reason": "requested",
                "threads": 1,
                "processes": 1,
            },
            "versions": {"cora": "0.1.0", "torch": "2.13.0"},
            "seeds": {"seed": made.seed, "split_seed": 0},
            "speed": {"steps": steps, "seconds": 10.0, "tokens": 5000, "tokens_per_second": 500.0 + made.seed},
            "peak_memory_bytes": 1_500_000_000,
            "heldout": {"before": losses[0].summary(), "after": losses[1].summary(), "change": loss_change(*losses)},
            "largest_angle_rad": None,
            "is_base_model": False,
            "result_sha256": hashing.sha256_files(run.adapter.iterdir()),
        },
    )


def write_evaluation(path: Path, made: Made, generator: np.random.Generator, prompts: int) -> None:
    """Answers that share about `skill` of their words with the references, scored."""
    shared = np.random.default_rng(1)
    lines = []
    for index in range(prompts):
        reference = list(shared.choice(WORDS, 8))
        right = generator.random(8) < made.skill
        answer = [word if keep else "wrong" for word, keep in zip(reference, right, strict=True)]
        lines.append(
            {"index": index, "prompt": f"prompt {index}", "reference": " ".join(reference), "prediction": " ".join(answer)}
        )
    generation = {"name": made.name, "settings": {"model": "tiny-model", "decoding": "greedy", "max_new_tokens": 16}}
    write_scored(path, lines, {"format": 1, "name": made.name, "generation": generation})


def write_scored(path: Path, lines: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Write the answers `lines` and their scores; `record` is the rest of `metrics.json`."""
    out = EvaluationDirectory(path)
    writing.write_jsonl(out.predictions, lines)
    report = score_all(METRICS, [line["prediction"] for line in lines], [line["reference"] for line in lines], bootstrap=100)
    writing.write_jsonl(out.scores, [{k: v[i] for k, v in report.per_example.items()} for i in range(len(lines))])
    known = {"metrics": report.metrics, "predictions_sha256": hashing.sha256_file(out.predictions)}
    writing.write_json(out.metrics, {**record, **known})


def ladder(seeds: int = 2) -> list[Made]:
    """Base, lora, fb and its random control, some seeds each: fb is clearly the best, lora and the control are alike."""
    rows = [Made("base", "base", skill=0.2, rank=None, rate=None)]
    for seed in range(seeds):
        rows += [
            Made("lora", "lora", seed, 0.5, 1.0, trained=2000),
            Made("fb", "fb", seed, 0.9, 0.8, n_models=2),
            Made("fb orthonormal", "fb", seed, 0.5, 1.0, b_init="orthonormal"),
        ]
    return rows


def result(
    label: str = "fb", seed: int = 0, rate: float | None = 1e-3, record: dict[str, Any] | None = None, **statistics: Any
) -> Result:
    """One finished row whose measures have these per-example statistics."""
    measures: dict[str, Measure] = {}
    for name, rows in statistics.items():
        wide = np.asarray(rows, dtype=float)
        wide = wide[:, None] if wide.ndim == 1 else wide
        value = wide[:, 0].sum() / wide[:, 1].sum() if name == LOSS else wide[:, 0].mean()
        measures[name] = Measure(float(value), (value - 0.1, value + 0.2), len(wide), "signature", wide)
    row = dataclasses.replace(ROW, name=f"{label}-{rate}-{seed}", label=label, seed=seed, learning_rate=rate)
    return Result(row, measures, record or {}, {}, [], "r", 10, 10)
