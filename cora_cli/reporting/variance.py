"""Reads the curves of explained variance from basis files and averages them over the groups of one kind.

`plots` draws them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from cora_cli.errors import CoraError


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Cumulative share of ‖M‖_F² (0-1) in the first 1, 2, …, R directions: mean and range over `groups` groups of a `kind`.

    A kind is the last part of a group's name, such as `q_proj` or `global`; groups that are complete layers share the kind `layer`.
    """

    label: str
    kind: str
    groups: int
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def read_spectra(paths: Mapping[Path, int | None]) -> tuple[list[Spectrum], list[str]]:
    """The spectra of basis files, and an error sentence for each file that cannot be read. Bases with the same label are averaged.

    `paths` maps each file to its number of models if the plan records it (0: the base model alone), else to None.
    """
    curves: dict[tuple[str, str], list[list[float]]] = {}
    damaged = []
    for path, planned in paths.items():
        from cora_cli.basis.artifact import read_basis

        try:
            basis = read_basis(path)
        except CoraError as error:
            damaged.append(str(error))
            continue
        choices, count = basis.choices, len(basis.sources) if planned is None else planned
        label = f"{choices.method}, n={count}" + ("" if choices.component == "top" else f", {choices.component}")
        label += "" if choices.source == "weights" else f", {choices.source}"
        for group, values in basis.singular_values.items():
            last = group.rpartition(".")[2]
            shares = values.square().cumsum(0) / basis.total_energy[group]
            curves.setdefault((label, "layer" if last.isdigit() else last), []).append(shares.tolist())
    return [_spectrum(label, kind, found) for (label, kind), found in sorted(curves.items())], damaged


def _spectrum(label: str, kind: str, curves: list[list[float]]) -> Spectrum:
    shares = list(zip(*curves, strict=False))
    mean = tuple(sum(values) / len(values) for values in shares)
    return Spectrum(label, kind, len(curves), mean, tuple(map(min, shares)), tuple(map(max, shares)))
