"""What `cora extract-basis` will take, before it: what it reads and writes, and its peak memory, from shapes alone."""

from collections.abc import Sequence
from pathlib import Path

import torch

from cora_cli.basis.choices import BasisChoices
from cora_cli.extraction.decompose import decomposes_gram
from cora_cli.extraction.extract import check_place, open_sources
from cora_cli.extraction.gram import lanczos_is_faster
from cora_cli.extraction.merge import Group, is_low_rank
from cora_cli.models.model_path import ModelPath
from cora_cli.planning.page import file_lines, memory_lines, size_text
from cora_cli.weights.planned import open_planned
from cora_cli.weights.sources import WeightSource

WIDE = 8
"""Bytes of a float64 number."""


def preflight(
    models: Sequence[ModelPath],
    output: Path,
    choices: BasisChoices,
    base: ModelPath | None,
    device: torch.device,
    overwrite: bool = False,
) -> str:
    """The plan as a page of text. Writes nothing, and raises `CoraError` as `extract_basis` does before it reads a tensor."""
    check_place(models, output, choices, base, overwrite)
    base_source = open_planned(base) if base else None
    sources, subtracted, groups = open_sources(models, choices, base, base_source, open_planned)
    modules = [module for group in groups for module in group.modules]
    passes = 2 if any(len(group.modules) > 1 for group in groups) else 1
    reads = {
        f"{len(modules):,} weights of {source.reference}{' twice' if passes > 1 else ''}": passes
        * float(sum(stored_bytes(source, module, subtracted) for module in modules))
        for source in {*sources, *([subtracted] if subtracted else [])}
    }
    directions = sum(group.rows * choices.rank * 4 for group in groups)
    parts = max((_peak(group, sources, subtracted, choices, device) for group in groups), key=lambda one: sum(one.values()))
    # The file is written from a second copy.
    parts["basis"] = 2 * directions
    on_gpu = device.type == "cuda"
    return "\n".join(
        [
            f"{len(groups):,} groups of rank {choices.rank} from {len(sources)} model{'s' if len(sources) > 1 else ''}",
            *file_lines("reads", dict(sorted(reads.items()))),
            *file_lines("writes", {str(output): directions + len(groups) * (choices.rank + 2) * WIDE}),
            f"peak memory {'on a CUDA GPU' if on_gpu else 'on the processor'}, about: {size_text(sum(parts.values()))}",
            *memory_lines(parts, on_gpu),
        ]
    )


def stored_bytes(source: WeightSource, module: str, base: WeightSource | None) -> int:
    """The bytes of a weight in the files of its model, or of its factors where they are its difference from `base`."""
    rows, columns = source.shapes[module]
    if base is not None and (rank := source.own_rank(module, base)) is not None:
        return rank * (rows + columns) * 4
    return rows * columns * source.entry_bytes(module)


def _peak(
    group: Group, sources: Sequence[WeightSource], base: WeightSource | None, choices: BasisChoices, device: torch.device
) -> dict[str, float]:
    """The parts of the phase that takes more: merging the group, or decomposing what was merged. See `merge` and `decompose`."""
    rows = group.rows
    gram = rows * rows * WIDE
    if base is not None and is_low_rank(group, sources, base, choices):
        ranks = [source.own_rank(module, base) or 0 for module in group.modules for source in sources]
        columns, mean = sum(ranks), True
        factors = sum(rank * sum(shape) for shape in group.modules.values() for rank in ranks[: len(sources)])
        merging = {"merged matrix": float(rows * columns * WIDE), "weights": float(2 * factors * WIDE)}
    else:
        mean = choices.merge == "mean"
        columns = group.columns
        largest = max(group.modules, key=lambda module: sum(group.modules[module]))
        entries = group.modules[largest][0] * group.modules[largest][1]
        stored = entries * max(source.entry_bytes(largest) for source in sources)
        wide = 2 if base is not None else 0 if mean else 1
        merging = {
            "merged matrix": float(rows * columns * WIDE if mean else gram),
            "weights": float(stored * (2 if base is not None else 1) + wide * entries * WIDE),
        }
    kept = merging["merged matrix"]
    if mean and not decomposes_gram(rows, columns, choices.component):
        least = min(rows, columns)
        decomposing = WIDE * (rows * columns + (rows + columns) * least + 4 * least * least)
    else:
        wanted = min(choices.rank + 1, rows)
        decomposing = (gram if mean else 0) + solver_bytes(rows, wanted if choices.component == "top" else rows, device)
    phases: tuple[dict[str, float], ...] = (merging, {"merged matrix": kept, "decomposition": float(decomposing)})
    return max(phases, key=lambda phase: sum(phase.values()))


def solver_bytes(rows: int, wanted: int, device: torch.device) -> int:
    """What the eigensolver of a Gram matrix with so many rows takes in addition to it, for its `wanted` largest eigenpairs."""
    if device.type == "cuda" or wanted == rows:
        return 3 * rows * rows * WIDE
    if lanczos_is_faster(rows, wanted):
        return WIDE * rows * (max(2 * wanted + 1, 20) + 3 * wanted)
    return WIDE * (rows * rows + 2 * rows * wanted)
