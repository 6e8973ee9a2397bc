"""What `cora inspect` will take, before it: what it reads, and its peak memory, from shapes alone."""

import math
from collections.abc import Sequence

import torch

from cora_cli.basis.choices import BasisChoices, Side
from cora_cli.errors import UsageError
from cora_cli.extraction.merge import Group, plan
from cora_cli.extraction.preflight import WIDE, solver_bytes, stored_bytes
from cora_cli.inspection.inspect import Opened, open_inputs
from cora_cli.planning.page import file_lines, memory_lines, size_text


def preflight(
    references: Sequence[str],
    base: str | None,
    rank: int | None,
    side: Side | None,
    target_modules: tuple[str, ...] | None,
    runs: Sequence[str],
    device: torch.device,
    output: str | None = None,
) -> str:
    """The plan as a page of text. Writes nothing, and raises `CoraError` as `inspect` does before it reads a tensor."""
    asked = open_inputs(references, base, rank, side, target_modules, runs, weights=False)
    sources = list(asked.models.values()) or ([asked.base_source] if asked.base_source else [])
    if not sources:
        raise UsageError("--dry-run plans the reading of models, and only basis files are named; leave it out")
    choices = BasisChoices(merge="gram", rank=asked.rank, side=asked.side, target_modules=asked.targets)
    groups = plan(sources, asked.base_source, choices)
    for source in sources:
        source.say_left_out(choices.target_modules)
    modules = [module for group in groups for module in group.modules]
    # With a base, a second pass compares the groups of models that the first one finds.
    passes = 2 if asked.base_source is not None and len(asked.models) > 1 else 1
    read = {*sources, *([asked.base_source] if asked.base_source else [])}
    reads: dict[str, float | None] = {
        f"{len(modules):,} weights of {source.reference}{', at most twice' if passes > 1 else ''}": passes
        * float(sum(stored_bytes(source, module, asked.base_source) for module in modules))
        for source in read
    }
    parts = max((_peak(group, asked, device) for group in groups), key=lambda one: sum(one.values()))
    on_gpu = device.type == "cuda"
    return "\n".join(
        [
            f"{len(groups):,} weight matrices of {len(asked.models)} models, {asked.rank} directions of the {asked.side} side",
            *file_lines("reads", dict(sorted(reads.items()))),
            *(file_lines("writes", {f"{output}, the report in all formats with plots": None}) if output else []),
            f"peak memory {'on a CUDA GPU' if on_gpu else 'on the processor'}, about: {size_text(sum(parts.values()))}",
            *memory_lines(parts, on_gpu),
        ]
    )


def _peak(group: Group, asked: Opened, device: torch.device) -> dict[str, float]:
    """The parts for one matrix; see `measure` and `changes`."""
    [(module, (out, inside))] = group.modules.items()
    matrix, gram, count = out * inside * WIDE, group.rows * group.rows * WIDE, len(asked.models)
    solver = gram + solver_bytes(group.rows, min(asked.rank + 1, group.rows), device)
    if asked.base_source is None:
        return {"weights": float(matrix), "sums": float(matrix), "decomposition": float(solver)}
    changes = 0
    for source in asked.models.values():
        known = source.own_rank(module, asked.base_source)
        changes += matrix if known is None else known * (out + inside) * WIDE
    halvings = math.ceil(math.log2(count)) + 1 if count > 1 else 0
    sums = max(halvings * (gram + matrix), 2 * matrix)
    return {"weights": float(matrix), "changes": float(changes), "sums": float(sums), "decomposition": float(solver)}
