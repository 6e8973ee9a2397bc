"""Processor time and peak memory of each stage at 1, 10 and 100 times the work: shows where a stage grows faster than its work.

Every cell is a process of its own on tiny models. The time is the processor time of the work and of the processes that it starts, without the
preparation of models and data; other load on the machine changes it little. The memory is the largest resident size of the process, which
includes the preparation.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import GIB, peak_bytes, record

Work = Callable[[], Any]
FACTORS = (1, 10, 100)
HIDDEN, RANK, BATCH = 128, 8, 16


@dataclasses.dataclass(frozen=True)
class Growing:
    """A stage: what is counted, how much of it 1× is, and the function that prepares the work for a count in an empty directory."""

    unit: str
    least: int
    prepare: Callable[[int, Path], Work]


def matrices(count: int, directory: Path) -> Work:
    """`cora extract-basis` of two models with `count` matrices each."""
    return _extract(2, count, directory)


def models(count: int, directory: Path) -> Work:
    """`cora extract-basis` of `count` models with three matrices each."""
    return _extract(count, 3, directory)


def _extract(model_count: int, matrix_count: int, directory: Path) -> Work:
    import torch

    from cora_cli.basis.choices import BasisChoices
    from cora_cli.extraction.extract import extract_basis
    from cora_cli.models.references import resolve_model

    found = [resolve_model(str(path)) for path in _matrices(model_count, matrix_count, directory)]
    return lambda: extract_basis(
        found, directory / "basis.safetensors", BasisChoices(rank=RANK), None, torch.device("cpu"), overwrite=True
    )


def _matrices(model_count: int, matrix_count: int, directory: Path) -> list[Path]:
    """Models that hold nothing but projections of random numbers."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layers, random = matrix_count // 3, torch.Generator().manual_seed(0)
    config = LlamaConfig(hidden_size=HIDDEN, num_hidden_layers=layers, intermediate_size=HIDDEN, vocab_size=64)
    names = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in range(layers) for kind in "qkv"]
    paths = [directory / str(number) for number in range(model_count)]
    for path in paths:
        config.save_pretrained(path)
        save_file(
            {name: torch.randn(HIDDEN, HIDDEN, generator=random).bfloat16() for name in names}, path / "model.safetensors"
        )
    return paths


def inspected(count: int, directory: Path) -> Work:
    """`cora inspect` of three models with `count` matrices each."""
    from cora_cli.device import select_hardware
    from cora_cli.inspection.inspect import inspect

    paths, hardware = [str(path) for path in _matrices(3, count, directory)], select_hardware("cpu", "fp32")
    return lambda: inspect(paths, None, RANK, "output", ("q_proj", "k_proj", "v_proj"), (), (), None, 0, hardware)


def records(count: int, directory: Path) -> Work:
    """Encoding of `count` records and packing of batches of 16."""
    del directory
    from cora_cli.data.encode import encode_records
    from cora_cli.data.pack import pack
    from cora_cli.data.records import Record
    from cora_cli.data.templates import Template
    from cora_cli.models.references import EMBEDDED_MODEL, resolve_model
    from cora_cli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(EMBEDDED_MODEL))
    template, chosen = Template("alpaca", "alpaca", tokenizer), [Record(one) for one in _code(count)]

    def work() -> None:
        examples = encode_records(chosen, template, 1024, "growth").examples
        for start in range(0, len(examples), BATCH):
            pack(examples[start : start + BATCH])

    return work


def _code(count: int) -> list[dict[str, Any]]:
    from cora_cli.data.builtin import load_builtin

    known = load_builtin("code").train
    return [known[number % len(known)] for number in range(count)]


def steps(count: int, directory: Path) -> Work:
    """`cora train` for `count` steps, with loading, the held-out loss and the files of the run."""
    return lambda: _train(directory, directory / "run", count)


def _train(directory: Path, output: Path, count: int) -> None:
    from cora_cli.training.config import TrainConfig
    from cora_cli.training.run import train

    train(
        TrainConfig(
            model=str(tiny_model(directory)),
            dataset=str(_data(directory)),
            output_dir=str(output),
            mode="lora",
            rank=RANK,
            max_steps=count,
            batch_size=4,
            test_size=4,
            dtype="fp32",
            device="cpu",
        )
    )


def _data(directory: Path) -> Path:
    path = directory / "data.json"
    path.write_text(json.dumps(_code(200)), encoding="utf-8")
    return path


def tiny_model(directory: Path) -> Path:
    """A two-layer Llama with random weights and the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cora_cli.models.references import EMBEDDED_MODEL, resolve_model
    from cora_cli.models.tokenizer import load_tokenizer

    path = directory / "model"
    if path.exists():
        return path
    tokenizer = load_tokenizer(resolve_model(EMBEDDED_MODEL))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def prompts(count: int, directory: Path) -> Work:
    """`cora evaluate` of `count` prompts with 8 new tokens each, scored by ROUGE."""
    from cora_cli.evaluation.config import EvaluateConfig
    from cora_cli.evaluation.evaluate import evaluate

    model, data = tiny_model(directory), directory / "prompts.json"
    data.write_text(json.dumps(_code(count)), encoding="utf-8")
    config = EvaluateConfig(
        model=str(model),
        dataset=str(data),
        output_dir=str(directory / "evaluation"),
        max_new_tokens=8,
        metrics=("rouge",),
        dtype="fp32",
        device="cpu",
    )
    return lambda: evaluate(config)


def pairs(count: int, directory: Path) -> Work:
    """All metrics of the texts of `count` pairs, with their intervals; no reference embeddings are kept from earlier runs."""
    from cora_cli.evaluation.metrics import TEXT_NAMES, reference_cache, score_all

    folder = "directory"
    setattr(reference_cache, folder, lambda: directory)
    references = [one["output"] for one in _code(count)]
    predictions = [text[::-1] if number % 3 == 0 else f"{text} more" for number, text in enumerate(references)]
    score_all(TEXT_NAMES, ["a b"], ["a c"])  # loads WordNet and the encoder's files
    return lambda: score_all(TEXT_NAMES, predictions, references)


def planned_rows(count: int, directory: Path) -> Work:
    """`cora ablate --dry-run` of `count` rows."""
    from cora_cli.experiments.ablate import Request, dry_run

    file = _grid(directory, [{"mode": "lora", "seed": list(range(count))}])
    return lambda: dry_run(Request(file, directory / "out", device="cpu", dtype="fp32"))


def executed_rows(count: int, directory: Path) -> Work:
    """`cora ablate` of `count` near-empty trainings, with the imports of the process that they are forks of."""
    return lambda: _run_grid(_grid(directory, [{"mode": "lora", "seed": list(range(count))}]), directory / "out")


def _grid(directory: Path, blocks: list[dict[str, Any]], evaluate: Any = False) -> Path:
    file = directory / "grid.json"
    train = {"max_steps": 2, "rank": RANK, "batch_size": 4}
    model = str(tiny_model(directory))
    grid = {
        "name": "growth",
        "model": model,
        "models": {"itself": model},
        "datasets": {"code": str(_data(directory))},
        "defaults": {"train": {**train, "test_size": 40}, "evaluate": evaluate},
        "grid": blocks,
    }
    file.write_text(json.dumps(grid), encoding="utf-8")
    return file


def _run_grid(file: Path, out: Path) -> None:
    from cora_cli.experiments.ablate import Request, ablate
    from cora_cli.reporting.confirmation import seeds_wanted

    ablate(Request(file, out, device="cpu", dtype="fp32"), seeds_wanted)


def reported_rows(count: int, directory: Path) -> Work:
    """`cora report` of `count` finished rows in all formats: a tiny grid with three seeds whose LoRA is copied under other labels."""
    from cora_cli.records import PLAN, read_sealed, write_sealed
    from cora_cli.reporting.report import report

    root = directory / "out"
    blocks: list[dict[str, Any]] = [
        {"mode": ["lora", "fb"], "seed": [0, 1, 2]},
        {"mode": "fb", "b_init": "orthonormal", "seed": [0, 1, 2]},
    ]
    metrics = {"limit": 40, "max_new_tokens": 4, "metrics": ["rouge", "bleu"]}
    _run_grid(_grid(directory, [{"mode": "base"}, *blocks], metrics), root)
    plan = read_sealed(root / PLAN)
    originals = [row for row in plan["rows"] if row["mode"] == "lora"]
    for number in range(count - len(plan["rows"])):
        _copy_row(root, plan, originals[number % len(originals)], f"copy-{number // len(originals)}")
    write_sealed(root / PLAN, plan)
    return lambda: report([str(root)], "markdown", directory / "report")


def _copy_row(root: Path, plan: dict[str, Any], row: dict[str, Any], label: str) -> None:
    """Add a copy of a finished row to the plan, with its files and the records of its steps, under a label of its own."""
    from cora_cli.records import read_sealed, write_sealed

    moved = {row["run"]: f"{row['run']}-{label}"}
    shutil.copytree(root / row["run"], root / moved[row["run"]])
    inside = row["evaluation"].startswith(f"{row['run']}/")
    moved[row["evaluation"]] = (
        row["evaluation"].replace(row["run"], moved[row["run"]]) if inside else f"{row['evaluation']}-{label}"
    )
    if not inside:
        shutil.copytree(root / row["evaluation"], root / moved[row["evaluation"]])
    names = {step["name"]: f"{step['name']}-{label}" for step in plan["steps"] if step["output"] in moved}
    for step in [step for step in plan["steps"] if step["name"] in names]:
        needs = [names.get(need, need) for need in step["needs"]]
        plan["steps"].append({**step, "name": names[step["name"]], "output": moved[step["output"]], "needs": needs})
        found = read_sealed(root / "steps" / f"{step['name']}.json")
        found["results_of_needs"] = {names.get(need, need): result for need, result in found["results_of_needs"].items()}
        write_sealed(root / "steps" / f"{names[step['name']]}.json", found)
    renamed = {"name": f"{row['name']}-{label}", "label": f"{row['label']} {label}"}
    plan["rows"].append({**row, **renamed, "run": moved[row["run"]], "evaluation": moved[row["evaluation"]]})


STAGES = {
    "extract-basis, matrices of 2 models": Growing("matrices", 3, matrices),
    "extract-basis, models of 3 matrices": Growing("models", 1, models),
    "inspect, matrices of 3 models": Growing("matrices", 3, inspected),
    "encode and pack": Growing("records", 20, records),
    "train": Growing("steps", 2, steps),
    "evaluate": Growing("prompts", 4, prompts),
    "score, all metrics": Growing("pairs", 4, pairs),
    "ablate --dry-run": Growing("rows", 6, planned_rows),
    "ablate, near-empty trainings": Growing("rows", 1, executed_rows),
    "report": Growing("rows", 20, reported_rows),
}


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(stage: Growing, factor: int) -> dict[str, float]:
    """Processor seconds of the work and peak bytes of this process."""
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
        work = stage.prepare(stage.least * factor, Path(directory))
        before = processor_seconds()
        work()
        gc.collect()  # ends the process that steps are forks of, whose time then counts
        seconds = processor_seconds() - before
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


def main() -> None:
    """Measure every stage at every factor and print the table."""
    from cora_cli.render.markdown_table import markdown_table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=tuple(STAGES), metavar="STAGE", help="only these")
    parser.add_argument("--factors", nargs="+", type=int, default=FACTORS, help="multiples of the least work")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(STAGES[options.cell[0]], int(options.cell[1]))))
        return
    rows, measured = [], {}
    for name in options.stages:
        found = []
        for factor in options.factors:
            command = [sys.executable, __file__, "--cell", name, str(factor)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.append(json.loads(output.strip().splitlines()[-1]))
            print(f"{name}, {factor}×: {found[-1]['seconds']:.2f} s", file=sys.stderr)
        stage = STAGES[name]
        counts = " / ".join(str(stage.least * factor) for factor in options.factors)
        times = [f"{one['seconds']:.2f}" for one in found]
        grown = [f"{one['peak_bytes'] / GIB:.2f}" for one in found]
        growth = found[-1]["seconds"] / found[0]["seconds"]
        rows.append([name, f"{counts} {stage.unit}", *times, f"{growth:.1f}", " / ".join(grown)])
        measured[name] = found
    multiples = [f"{factor}×, s" for factor in options.factors]
    headers = ["stage", "work", *multiples, f"{options.factors[-1]}× ÷ {options.factors[0]}×", "peak GiB"]
    table = markdown_table(headers, rows)
    print(table)
    record("growth", {"markdown": table, "summary": [], "options": {"factors": list(options.factors)}, "cells": measured})


if __name__ == "__main__":
    main()
