"""Whether what inspection says of a basis foretells the held-out loss of the runs that used it.

Rank correlations between bases, one point a basis; runs are read as `cora report` reads them.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.special import ndtri

from cora_cli.basis.artifact import Basis, read_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError
from cora_cli.inspection.measure import CHANCE, MEAN, PAPER, POOLED, Directions, Findings
from cora_cli.inspection.starts import start_of
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import method_of
from cora_cli.reporting.collect import Result, collect
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.report_rows import find_experiments
from cora_cli.reporting.statistics import Method, choose_learning_rates
from cora_cli.weights.sources import WeightSource

FEWEST = 4
"""Bases below which no interval exists, as its standard error is over √(n − 3)."""


_LIKEWISE = {("weights", "mean"): PAPER, ("delta", "mean"): MEAN, ("delta", "gram"): POOLED}
"""The leave-one-out bases that `measure` makes, by their source and merge."""


@dataclasses.dataclass(frozen=True)
class UsedBasis:
    """A kind of B that runs started from: `rank` columns of a basis file, or random ones (as many as the outer rank, where B is a
    product). `directions` has one entry, or one per seed of a random B: its draw and the order of the data come from the same seed, so
    that single draws cannot be told from that.

    `losses` are seeds and held-out losses of the runs of one `stratum`: same data, model, mode and ranks, at the chosen learning rate.
    """

    name: str
    stratum: str
    rank: int
    directions: dict[str, Directions]
    basis: Basis | None
    losses: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Point:
    """One basis: the share of ΔW that it captures (0-1), the mean held-out loss of its runs (nats per token) over the seeds that all
    bases of the stratum were run with, and the number of these runs.
    """

    basis: str
    capture: float
    loss: float
    runs: int


@dataclasses.dataclass(frozen=True)
class Foresight:
    """Spearman's ρ between capture and loss over `points`, with its 95 % interval; None where nothing can be said."""

    stratum: str
    points: tuple[Point, ...]
    rho: float | None
    interval: tuple[float, float] | None

    def sentence(self) -> str:
        """What it amounts to, in words."""
        where = f"{self.stratum}: {len(self.points)} {'basis' if len(self.points) == 1 else 'bases'}"
        if self.rho is None or self.interval is None:
            return f"{where}; nothing can be said: a rank correlation needs at least {FEWEST} bases that differ in capture and in loss."
        low, high = self.interval
        found = f"{where}; Spearman's ρ between capture and held-out loss is {self.rho:+.2f} [{low:+.2f}, {high:+.2f}]"
        if high < 0:
            return f"{found}: the bases that capture more give the lower loss, so capture foretells the order."
        if low > 0:
            return f"{found}: the bases that capture more give the higher loss, so capture misleads here."
        return f"{found}: the interval holds zero, so capture is not shown to foretell the winner."


def used_bases(outputs: Sequence[str]) -> list[UsedBasis]:
    """The bases that the finished runs in `outputs` started B from, each with the losses of its runs.

    Raises `CoraError` where a directory is none of ours or holds no such run.
    """
    # Bases are told apart here, which a report's methods are not: runs that differ in nothing else are no repetition.
    found: dict[tuple[str, str], dict[Any, list[Result]]] = {}
    for experiment in find_experiments(outputs):
        for result in collect(experiment).results:
            if LOSS in result.measures and (key := _key(result)) is not None:
                row = result.row
                plan = AdapterPlan.from_dict(result.record["plan"])
                width = _width(plan)
                stratum = f"{row.group}, {row.mode} r={row.rank}{'' if width == f'r={plan.rank}' else f', {width}'}"
                rates = found.setdefault((stratum, key), {})
                rates.setdefault((Method((result,)).identity, row.learning_rate), []).append(result)
    if not found:
        raise CoraError(
            f"no finished run in {', '.join(outputs)} has a basis and a held-out loss, so nothing can be foreseen from them"
        )
    return [
        _used(stratum, key, [result for method in chosen for result in method.results])
        for (stratum, key), rates in found.items()
        for chosen, _ in [choose_learning_rates([Method(tuple(results)) for results in rates.values()])]
    ]


def foresee(used: Sequence[UsedBasis], models: dict[str, WeightSource], findings: Sequence[Findings]) -> list[Foresight]:
    """Correlate, per stratum, the mean capture of each basis with the mean loss of its runs.

    A basis is judged by the models that it was not made from: those whose content hash is not among its sources. One that was made
    from exactly the given models is judged by the bases that `measure` makes in the same way from all but one, if there are such;
    else it has no point.
    """
    seeds: dict[str, set[int]] = {}
    for one in used:
        own = {seed for seed, _ in one.losses}
        seeds[one.stratum] = seeds.get(one.stratum, own) & own
    points: dict[str, list[Point]] = {one.stratum: [] for one in used}
    for one in used:
        shares = _captures(one, models, findings)
        losses = [loss for seed, loss in one.losses if seed in seeds[one.stratum]]
        if shares and losses:
            points[one.stratum].append(Point(one.name, fmean(shares), fmean(losses), len(losses)))
    return [_correlate(stratum, tuple(found)) for stratum, found in points.items()]


def _captures(one: UsedBasis, models: dict[str, WeightSource], findings: Sequence[Findings]) -> list[float]:
    names, unseen = set(one.directions), set(models)
    if one.basis is not None:
        behind, modules = {source.hash for source in one.basis.sources}, one.basis.modules
        unseen = {
            name
            for name, model in models.items()
            if not (modules.keys() <= model.shapes.keys() and model.content_hash(modules) in behind)
        }
        choices = one.basis.choices
        plain = BasisChoices(
            merge=choices.merge, source=choices.source, rank=choices.rank, target_modules=choices.target_modules
        )
        as_wide = all(round(c.shares[CHANCE] * found.shape[0]) == one.rank for found in findings for c in found.captures)
        if not unseen and len(behind) == len(models) and choices == plain and as_wide:
            names, unseen = {_LIKEWISE.get((choices.source, choices.merge), "")}, set(models)
    return [
        share
        for found in findings
        for capture in found.captures
        if capture.left_out in unseen
        for name, share in capture.shares.items()
        if name in names
    ]


def spearman(one: Sequence[float], other: Sequence[float]) -> tuple[float, tuple[float, float]] | None:
    """Spearman's ρ and its 95 % interval by Fisher's z with the standard error √((1 + ρ²/2) / (n − 3)) of Bonett and Wright (2000).

    At ρ = ±1 the z is infinite; the interval then is that of the nearest other value that n ranks without ties can give,
    1 − 12 / (n(n² − 1)), and ends at ±1. None for fewer than four pairs, or where a side is constant.
    """
    from scipy.stats import rankdata

    n = len(one)
    if n < FEWEST or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    rho = float(np.clip(np.corrcoef(rankdata(one), rankdata(other))[0, 1], -1.0, 1.0))
    nearest = 1.0 - 12.0 / (n * (n * n - 1))
    used = max(-nearest, min(nearest, rho))
    half = float(ndtri(0.975)) * math.sqrt((1.0 + used**2 / 2.0) / (n - 3))
    low, high = math.tanh(math.atanh(used) - half), math.tanh(math.atanh(used) + half)
    return rho, (min(low, rho), max(high, rho))


def _correlate(stratum: str, points: tuple[Point, ...]) -> Foresight:
    found = spearman([point.capture for point in points], [point.loss for point in points])
    return Foresight(stratum, points, *(found or (None, None)))


def _key(result: Result) -> str | None:
    """What tells one start of B from another; None where B starts as nothing that has a subspace."""
    start = (result.record.get("plan") or {}).get("b_init")
    if start == "basis":
        return f"basis {(result.record.get('basis') or {}).get('sha256')}"
    return f"{start} B" if start in ("orthonormal", "random") else None


def _used(stratum: str, key: str, results: list[Result]) -> UsedBasis:
    record, row = results[0].record, results[0].row
    plans = [AdapterPlan.from_dict(result.record["plan"]) for result in results]
    rank, width = method_of(plans[0].mode).b_width(plans[0]), _width(plans[0])
    if plans[0].needs_basis:
        basis = read_basis(row.basis or _recorded_path(record, row.name))
        if basis.sha256 != record["basis"]["sha256"]:
            raise CoraError(
                f"{row.name} was trained with the basis {record['basis']['sha256']}, but {basis.path} is {basis.sha256}"
            )
        of = f"{len(basis.sources)} models" if len(basis.sources) > 1 else basis.sources[0].reference
        name = f"{basis.path.stem} {basis.sha256[:8]} (of {of}), {width}"
        directions = {name: start_of(plans[0], basis, "output")}
    else:
        basis, name = None, f"{key}, {width}"
        directions = {f"{name}, seed {plan.seed}": start_of(plan, None, "output") for plan in plans}
    return UsedBasis(
        name=name,
        stratum=stratum,
        rank=rank,
        directions=directions,
        basis=basis,
        losses=tuple((result.row.seed, result.measures[LOSS].value) for result in results),
    )


def _width(plan: AdapterPlan) -> str:
    """The number of columns in the start of B, in words."""
    method = method_of(plan.mode)
    flag = method.width_flag.lstrip("-").replace("-", " ")
    return f"{'r=' if flag == 'rank' else f'{flag} '}{method.b_width(plan)}"


def _recorded_path(record: dict[str, Any], run: str) -> Path:
    if not (record.get("basis") or {}).get("path"):
        raise CoraError(f"{run} does not say where its basis is")
    return Path(record["basis"]["path"])
