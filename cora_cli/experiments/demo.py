"""The complete pipeline on the embedded model, small enough for two CPU cores: five fine-tunes, one basis, four adapters.

It calls the same functions as the commands. It is not a benchmark, and its report says so.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from cora_cli import rundir, writing
from cora_cli.basis.artifact import read_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.device import select_hardware
from cora_cli.errors import CoraError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.scoring import Evaluation, paired_differences
from cora_cli.experiments.tasks import LEARNING_RATE, TASK_BATCH, TASK_EVAL_LIMIT, TASK_RANK, TASK_STEPS, TASKS
from cora_cli.extraction.extract import extract_basis
from cora_cli.lock import own_directory, own_output
from cora_cli.models.references import EMBEDDED_MODEL, resolve_model
from cora_cli.progress import say
from cora_cli.render.table import Cell, number, p_value_text, table_text
from cora_cli.settings import DtypeName
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from cora_cli.weights.sources import open_source

DATASET = "builtin:code"
RANK = 48
STEPS, BATCH = 16, 8
HELD_OUT, PROMPTS, NEW_TOKENS = 48, 40, 48
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"mode": "lora"},
    "fb": {"mode": "fb"},
    "tb": {"mode": "tb"},
    "fb-orthonormal": {"mode": "fb", "b_init": "orthonormal"},
}
MEANING = {
    "base": "no training",
    "lora": "B = 0 and A random, both trained",
    "fb": "B = common basis, frozen",
    "tb": "B = common basis, trained",
    "fb-orthonormal": "B = random orthonormal, frozen; the control for fb",
}


def run_demo(root: Path, seed: int, device: str, dtype: DtypeName, width: int | None = None) -> str:
    """Run or complete the demo in `root`; returns the report, which is also written to `root/report.md`.

    The tables of what is returned have lines of at most `width` characters.

    Raises `CoraError` if `root` holds a demo with other settings.
    """
    with own_directory(root, "models", "runs", "base-eval"):
        return _run(_Chain(root, seed, device, dtype), width)


def _run(chain: "_Chain", width: int | None) -> str:
    began, root, seed = time.monotonic(), chain.root, chain.seed
    trainings = [*(root / "models" / task for task in TASKS), *(root / "runs" / name for name in METHODS)]
    earlier = sum(rundir.RunDirectory(path).result.is_dir() for path in trainings)
    models = [chain.fine_tune(task, number) for number, task in enumerate(TASKS, start=1)]
    basis, explained = chain.extract(models)
    runs = {name: chain.adapt(name, basis) for name in METHODS}
    evaluations = chain.evaluate()
    duration = f"This run of the demo took {(time.monotonic() - began) / 60:.1f} minutes."
    if earlier:
        duration = f"{duration} {earlier} of its {len(trainings)} trainings were finished before."
    written, shown = (_report(runs, evaluations, explained, seed, duration, limit) for limit in (None, width))
    writing.write_text(root / "report.md", written + "\n")
    say(f"report written to {root / 'report.md'}")
    return shown


@dataclasses.dataclass(frozen=True)
class _Chain:
    root: Path
    seed: int
    device: str
    dtype: DtypeName

    def _train(self, output: Path, **settings: Any) -> dict[str, Any]:
        return train(
            TrainConfig(
                model=EMBEDDED_MODEL,
                output_dir=str(output),
                learning_rate=LEARNING_RATE,
                seed=self.seed,
                device=self.device,
                dtype=self.dtype,
                resume=True,
                **settings,
            )
        )

    def fine_tune(self, task: str, number: int) -> Path:
        """Train one of the five fine-tuned models, as a LoRA adapter: its weights are W + ΔW."""
        say(f"\n[{number}/5] fine-tuning a model on {task}")
        output = self.root / "models" / task
        self._train(
            output,
            mode="lora",
            rank=TASK_RANK,
            dataset=f"builtin:task-{task}",
            max_steps=TASK_STEPS,
            batch_size=TASK_BATCH,
            eval_limit=TASK_EVAL_LIMIT,
        )
        return output

    def extract(self, models: list[Path]) -> tuple[Path, dict[str, float]]:
        """Extract the basis of the five models; returns its path and its mean explained variance per projection."""
        say("\nextracting the common basis of the five models")
        path, choices = self.root / "basis.safetensors", BasisChoices(rank=RANK)
        paths = [resolve_model(str(model)) for model in models]
        if not _is_up_to_date(path, choices, models):
            device = select_hardware(self.device, self.dtype).device
            with own_output(path):
                say(extract_basis(paths, path, choices, None, device, overwrite=True).render())
        shares = read_basis(path).explained_variance
        kinds = {name.rpartition(".")[2] for name in shares}
        return path, {kind: _mean([share for name, share in shares.items() if name.endswith(kind)]) for kind in sorted(kinds)}

    def adapt(self, name: str, basis: Path) -> dict[str, Any]:
        """Train one of the four adapters to compare, all on the same data in the same order."""
        say(f"\ntraining {name} ({MEANING[name]})")
        method = METHODS[name]
        needs_basis = name in ("fb", "tb")
        return self._train(
            self.root / "runs" / name,
            dataset=DATASET,
            rank=RANK,
            basis=str(basis) if needs_basis else None,
            max_steps=STEPS,
            batch_size=BATCH,
            eval_limit=HELD_OUT,
            **method,
        )

    def evaluate(self) -> dict[str, Evaluation]:
        """Evaluate the base model and the four adapters on the same held-out prompts."""
        common: dict[str, Any] = {
            "limit": PROMPTS,
            "max_new_tokens": NEW_TOKENS,
            "batch_size": 20,
            "device": self.device,
            "dtype": self.dtype,
        }
        say("\nevaluating the base model and the four adapters")
        base = EvaluateConfig(model=EMBEDDED_MODEL, dataset=DATASET, output_dir=str(self.root / "base-eval"), **common)
        tuned = EvaluateConfig(runs=tuple(str(self.root / "runs" / name) for name in METHODS), **common)
        return dict(zip(MEANING, [*evaluate(base), *evaluate(tuned)], strict=True))


def _is_up_to_date(path: Path, choices: BasisChoices, models: list[Path]) -> bool:
    """Whether the basis on disk is undamaged and was extracted from these models with these choices."""
    if not path.exists():
        return False
    try:
        basis = read_basis(path)
    except CoraError as error:
        say(f"{error}; extracting it again")
        return False
    sources = [open_source(resolve_model(str(model))) for model in models]
    return basis.choices == choices and [s.hash for s in basis.sources] == [s.content_hash(basis.modules) for s in sources]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _report(
    runs: dict[str, dict[str, Any]],
    evaluations: dict[str, Evaluation],
    explained: dict[str, float],
    seed: int,
    duration: str,
    width: int | None,
) -> str:
    names = list(evaluations["base"].record["metrics"])
    before = runs["lora"]["heldout"]["before"]
    rows = []
    for method, evaluation in evaluations.items():
        record = runs.get(method)
        loss = record["heldout"]["after"] if record else before
        metrics = evaluation.record["metrics"]
        cells = [number(metrics[name]["value"], metrics[name]["ci95"], 2 if name == "sacrebleu" else 3) for name in names]
        trained = f"{record['parameters']['trained']:,}" if record else "0"
        rows.append([Cell(method), Cell(trained), number(loss["loss"], loss["ci95"], 3), *cells])
    control = paired_differences(evaluations["fb"], evaluations["fb-orthonormal"])
    differences = [
        [
            Cell(name),
            number(d.difference, d.ci95, 2 if name == "sacrebleu" else 3),
            Cell(p_value_text(d.p_value).removeprefix("=")),
        ]
        for name, d in control.items()
    ]
    hardware = runs["lora"]["hardware"]
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in explained.items())
    meaning = "; ".join(f"{name}: {text}" for name, text in MEANING.items())
    cut = ", ".join(f"{name} {evaluation.record['shortcomings'].get('cut', 0)}" for name, evaluation in evaluations.items())
    return "\n".join(
        [
            "# CoRA on the embedded model",
            "",
            table_text(["method", "trained", "held-out loss", *names], rows, width),
            "",
            f"{meaning}.",
            "",
            f"Held-out loss: nats per response token over n = {before['n']} records. Metrics: n = {PROMPTS} prompts, greedy, at most "
            f"{NEW_TOKENS} new tokens (answers cut there: {cut}); sacrebleu is 0-100, the others 0-1; BERTScore is on a small encoder (MiniLM-L6), not on the "
            "paper's scale. [95 % bootstrap interval over records]. One training seed "
            f"({seed}): the intervals do not include the variation between seeds.",
            "",
            "fb minus fb-orthonormal, paired over prompts (two-sided p-values, not corrected for six comparisons):",
            "",
            table_text(["metric", "difference", "p"], differences, width),
            "",
            f"The basis: {len(TASKS)} models ({', '.join(TASKS)}), rank {RANK}, explained variance {shares}.",
            f"Each adapter: {STEPS} steps of {BATCH} records of {DATASET}, learning rate {LEARNING_RATE:g}, {hardware['dtype']} on "
            f"{hardware['device']}. {duration}",
            "",
            f"This demo shows that the pipeline works, and how {STEPS} steps change the held-out loss in each mode. It does "
            f"not show which mode is better: one seed, one untuned learning rate, a 135M model and {STEPS * BATCH} training "
            "records are too few. For that, sweep the learning rate per mode, train with several seeds, and compare fb with its control fb-orthonormal.",
        ]
    )
