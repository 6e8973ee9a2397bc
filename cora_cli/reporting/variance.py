"""Reads the curves of explained variance from basis files and averages them over the groups of one kind.

`plots` draws them.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cora_cli.errors import CoraError

if TYPE_CHECKING:
    from cora_cli.basis.artifact import Basis

_UNNAMED = ("share", "merge", "normalize", "side")
"""Choices that a label names only where bases differ in them."""


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Cumulative share of ‖M‖_F² (0-1) in the first 1, 2, …, R directions: mean and range over `groups` groups of a `kind`, which `bases` files have.

    A kind is the last part of a group's name, such as `q_proj` or `global`; groups that are complete layers share the kind `layer`.
    """

    label: str
    kind: str
    groups: int
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    bases: int = 1


def read_spectra(
    paths: Mapping[Path, int | None], trained: Mapping[Path, Collection[str]] | None = None
) -> tuple[list[Spectrum], list[str]]:
    """The spectra of basis files, and an error sentence for each file that cannot be read. Bases that differ in their models alone are averaged.

    `paths` maps each file to its number of models if the plan records it (0: the base model alone), else to None. `trained` has the
    hashes of the bases that runs took from a file, which must hold one of them still.
    """
    from cora_cli.basis.artifact import read_basis

    found: list[tuple[Basis, int]] = []
    damaged = []
    for path, planned in paths.items():
        try:
            basis = read_basis(path)
        except CoraError as error:
            damaged.append(str(error))
            continue
        used = (trained or {}).get(path)
        if used is not None and basis.sha256 not in used:
            damaged.append(
                f"{path} holds another basis by now than the one that was trained with, so its explained variance is not shown"
            )
        else:
            found.append((basis, len(basis.sources) if planned is None else planned))
    varied = [name for name in _UNNAMED if len({getattr(basis.choices, name) for basis, _ in found}) > 1]
    curves: dict[tuple[str, str], list[list[float]]] = {}
    bases: Counter[str] = Counter()
    for basis, count in found:
        choices = basis.choices
        label = f"{choices.method}, n={count}" + ("" if choices.component == "top" else f", {choices.component}")
        label += "" if choices.source == "weights" else f", {choices.source}"
        label += "".join(f", {name} {str(getattr(choices, name)).lower()}" for name in varied)
        bases[label] += 1
        for group, values in basis.singular_values.items():
            last = group.rpartition(".")[2]
            shares = values.square().cumsum(0) / basis.total_energy[group]
            curves.setdefault((label, "layer" if last.isdigit() else last), []).append(shares.tolist())
    spectra = [_spectrum(label, kind, shares, bases[label]) for (label, kind), shares in sorted(curves.items())]
    return spectra, damaged


def _spectrum(label: str, kind: str, curves: list[list[float]], bases: int) -> Spectrum:
    shares = list(zip(*curves, strict=False))
    mean = tuple(sum(values) / len(values) for values in shares)
    return Spectrum(label, kind, len(curves), mean, tuple(map(min, shares)), tuple(map(max, shares)), bases)
