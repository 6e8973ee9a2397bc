"""Does the capture of a basis predict the held-out loss of the runs that used it?

The answer is a rank correlation over bases, one point per basis. Runs are read in the same way as by `cora report`.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.special import ndtri

from cora_cli import hashing
from cora_cli.basis.artifact import Basis, read_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError
from cora_cli.inspection.measure import CHANCE, MEAN, PAPER, POOLED, UNSCALED_MEAN, UNSCALED_POOLED, Directions, Findings
from cora_cli.inspection.rank_correlation import rank_correlation
from cora_cli.inspection.starts import start_of
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import method_of
from cora_cli.reporting.collect import collect
from cora_cli.reporting.found import find_experiments
from cora_cli.reporting.learning_rate_sweep import RatesByMethod, choose_learning_rates, rates_of
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.report_rows import Row
from cora_cli.reporting.results import Result
from cora_cli.reporting.statistics import MethodResults
from cora_cli.weights.sources import WeightSource

FEWEST = 4
"""The fewest bases for which the interval exists: its standard error divides by √(n − 3)."""

_LIKE_FILE = {
    ("weights", "mean", False): PAPER,
    ("delta", "mean", False): UNSCALED_MEAN,
    ("delta", "gram", False): UNSCALED_POOLED,
    ("delta", "mean", True): MEAN,
    ("delta", "gram", True): POOLED,
}
"""The leave-one-out basis of `measure` that is computed like a basis file of this source, merge and `normalize`."""


@dataclasses.dataclass(frozen=True)
class UsedBasis:
    """One start of B that runs used: `rank` columns of a basis file, or random ones. If B is a product, `rank` is the outer rank.

    `directions` has one entry, or one per seed for a random B (`_draw`). The draws of a random B count as one basis, because the seed also sets
    the order of the data and the two effects cannot be separated. `losses` holds (seed, held-out loss) of the runs of one `stratum`:
    same data, model, mode, ranks and settings, at the chosen learning rate. `learning_rate` is the chosen one of `rates`, or the rate
    by which a grid widened its sweep, which is not among them. `model` is the model that the runs trained, with the hash of its weights.
    """

    name: str
    stratum: str
    rank: int
    directions: dict[str, Directions]
    basis: Basis | None
    losses: tuple[tuple[int, float], ...]
    learning_rate: float | None
    rates: tuple[float, ...]
    model: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Point:
    """One basis: its capture of ΔW (0-1), the mean held-out loss of its runs (nats per token), the number of these runs, and their learning rate
    with all that were tried.

    Only seeds that were run with every basis of the stratum count.
    """

    basis: str
    capture: float
    loss: float
    runs: int
    learning_rate: float | None = None
    rates: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Spearman's ρ between capture and loss over `points`, with its 95 % interval; both are None if there are too few points.

    `of_all` counts the bases without a point, because they were created from all the models.
    """

    stratum: str
    points: tuple[Point, ...]
    rho: float | None
    interval: tuple[float, float] | None
    of_all: int = 0

    @property
    def swept_alike(self) -> bool:
        """Whether all bases had equally many learning rates to choose from, or the same one."""
        tried = {point.rates for point in self.points}
        return len(tried) < 2 or (len({len(rates) for rates in tried}) == 1 and min(map(len, tried)) > 1)

    def sentence(self) -> str:
        """The result in words."""
        bases = f"{len(self.points)} {'basis' if len(self.points) == 1 else 'bases'}"
        if self.of_all:
            bases += (
                f", without {self.of_all} that {'was' if self.of_all == 1 else 'were'} created from all the inspected models"
            )
        if self.rho is None or self.interval is None:
            return (
                f"No conclusion about predicting the held-out loss ({self.stratum}, {bases}): "
                f"this needs at least {FEWEST} bases that differ in capture and in loss."
            )
        low, high = self.interval
        if high < 0:
            said = "Capture predicts the held-out loss: bases that capture more reach a lower loss"
        elif low > 0:
            said = "Capture is misleading: bases that capture more reach a higher held-out loss"
        else:
            said = "Capture is not shown to predict the held-out loss: the interval of the correlation contains zero"
        rates = (
            "" if self.swept_alike else " Their learning rates were not swept alike, from which differences in loss may come."
        )
        return f"{said} ({self.stratum}, {bases}, Spearman's ρ {self.rho:+.2f} [{low:+.2f}, {high:+.2f}]).{rates}"


def used_bases(outputs: Sequence[str]) -> list[UsedBasis]:
    """The starts of B in the finished runs below `outputs`, each with the losses of its runs.

    Raises `CoraError` if a directory was not written by cora, or if no run has both a basis and a held-out loss.
    """
    # A report groups runs by method alone. Here runs with different bases must stay apart, even if nothing else differs.
    strata: dict[str, list[tuple[str, Result, int]]] = {}
    experiments: list[tuple[RatesByMethod, tuple[Row, ...]]] = []
    for place, experiment in enumerate(find_experiments(outputs)):
        collection = collect(experiment)
        finished = collection.results
        for result in finished:
            if LOSS in result.measures and (key := _key(result)) is not None:
                row = result.row
                plan = AdapterPlan.from_dict(result.record["plan"])
                width = _width(plan)
                stratum = f"{row.group}, {row.mode} r={row.rank}{'' if width == f'r={plan.rank}' else f', {width}'}"
                strata.setdefault(stratum, []).append((key, result, place))
        swept = rates_of([MethodResults((result,)) for result in finished], experiment.sweeps, collection.diverged)
        experiments.append((swept, collection.diverged))
    found: dict[tuple[str, str], dict[Any, dict[int, Result]]] = {}
    places: dict[tuple[str, str], set[int]] = {}
    for stratum, results in strata.items():
        settings = [_settings(result) for _, result, _ in results]
        names = sorted({name for each in settings for name in each})
        differing = [name for name in names if len({str(each.get(name)) for each in settings}) > 1]
        for (key, result, place), each in zip(results, settings, strict=True):
            own = ", ".join([stratum, *(f"{name}={each.get(name)}" for name in differing)])
            rates = found.setdefault((own, key), {})
            # A copy of a grid has the same runs again.
            rates.setdefault(result.row.learning_rate, {})[result.row.seed] = result
            places.setdefault((own, key), set()).add(place)
    if not found:
        raise CoraError(
            f"no finished run in {', '.join(outputs)} has both a basis and a held-out loss; name other runs or leave --runs out"
        )
    used = []
    for (stratum, key), trained in found.items():
        involved = [experiments[place] for place in sorted(places[stratum, key])]
        identities = {result.row.identity for results in trained.values() for result in results.values()}
        lost = [row for _, diverged in involved for row in diverged if row.identity in identities]
        # One B that several labels or grids trained alike has one learning rate.
        methods = [
            MethodResults(tuple(dataclasses.replace(result, row=_as_one(result.row, key)) for result in results.values()))
            for results in trained.values()
        ]
        chosen, _ = choose_learning_rates(methods, [_as_one(row, key) for row in lost])
        planned = {rate for swept, _ in involved for one in identities & swept.keys() for rate in swept[one].planned}
        used.append(_used(stratum, key, [result for method in chosen for result in method.results], planned))
    return used


def _as_one(row: Row, key: str) -> Row:
    """The row without what tells methods apart that start from the same B, `key`, and were trained alike, such as labels."""
    return dataclasses.replace(row, group="", label=key, printed=None, n_models=None, model="", dataset="")


def _settings(result: Result) -> dict[str, Any]:
    """The settings and other inputs of a run's training in which runs of one stratum must agree, since the loss depends on them too.

    Grids of other models or data can have the same names for them, so their hashes count.
    """
    fingerprint = result.record["fingerprint"]
    apart = ("seed", "learning_rate", "b_init", "rank")
    inputs = {
        name.removesuffix("_sha256"): hashing.sha256_json(value)[:12] if not isinstance(value, str) else value[:12]
        for name, value in fingerprint.items()
        if name not in ("settings", "basis_sha256")
    }
    own = {"alpha": result.record["plan"]["alpha"], "processes": result.record["hardware"].get("processes", 1)}
    return {**{name: value for name, value in fingerprint["settings"].items() if name not in apart}, **inputs, **own}


def is_unscaled(choices: BasisChoices) -> bool:
    """Whether a basis of these choices pools changes of the sizes that they have; see `measure`."""
    return choices.source == "delta" and not choices.normalize


def predict(used: Sequence[UsedBasis], models: dict[str, WeightSource], findings: Sequence[Findings]) -> list[Prediction]:
    """Correlate, per stratum, the mean capture of each basis with the mean loss of its runs.

    The capture of a basis is taken over the models that it was not created from: those whose content hash is not among its sources. If
    a basis was created from exactly the given models, the captures of the leave-one-out bases of the same kind stand in for it
    (`_LIKE_FILE`); without such bases it has no point.
    """
    seeds: dict[str, set[int]] = {}
    for one in used:
        own = {seed for seed, _ in one.losses}
        seeds[one.stratum] = seeds.get(one.stratum, own) & own
    points: dict[str, list[Point]] = {one.stratum: [] for one in used}
    of_all = dict.fromkeys(points, 0)
    for one in used:
        shares = _captures(one, models, findings, seeds[one.stratum])
        losses = [loss for seed, loss in one.losses if seed in seeds[one.stratum]]
        of_all[one.stratum] += one.basis is not None and not shares
        if shares and losses:
            points[one.stratum].append(Point(one.name, fmean(shares), fmean(losses), len(losses), one.learning_rate, one.rates))
    return [_correlate(stratum, tuple(found), of_all[stratum]) for stratum, found in points.items()]


def _captures(one: UsedBasis, models: dict[str, WeightSource], findings: Sequence[Findings], seeds: set[int]) -> list[float]:
    """The captures of the models' changes, of a random B those of the draws of these `seeds`, whose losses count."""
    names = {_draw(one.name, seed) for seed in seeds} if one.basis is None else set(one.directions)
    unseen = set(models)
    if one.basis is not None:
        behind, modules = {source.hash for source in one.basis.sources}, one.basis.modules
        unseen = {
            name
            for name, model in models.items()
            if not (modules.keys() <= model.shapes.keys() and model.content_hash(modules) in behind)
        }
        choices = one.basis.choices
        plain = BasisChoices(
            merge=choices.merge,
            source=choices.source,
            normalize=choices.normalize,
            rank=choices.rank,
            target_modules=choices.target_modules,
        )
        as_wide = all(round(c.shares[CHANCE] * found.shape[0]) == one.rank for found in findings for c in found.captures)
        if not unseen and len(behind) == len(models) and choices == plain and as_wide:
            names, unseen = {_LIKE_FILE.get((choices.source, choices.merge, choices.normalize), "")}, set(models)
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

    At ρ = ±1, where z is infinite, the interval is that of the closest value that n ranks without ties can reach,
    1 − 12 / (n(n² − 1)), extended to ±1. Returns None for fewer than four pairs, or if either sequence is constant.
    """
    n = len(one)
    if n < FEWEST or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    rho = float(rank_correlation(np.array(one), np.array(other)))
    nearest = 1.0 - 12.0 / (n * (n * n - 1))
    used = max(-nearest, min(nearest, rho))
    half = float(ndtri(0.975)) * math.sqrt((1.0 + used**2 / 2.0) / (n - 3))
    low, high = math.tanh(math.atanh(used) - half), math.tanh(math.atanh(used) + half)
    return rho, (min(low, rho), max(high, rho))


def _correlate(stratum: str, points: tuple[Point, ...], of_all: int) -> Prediction:
    found = spearman([point.capture for point in points], [point.loss for point in points])
    rho, interval = found or (None, None)
    return Prediction(stratum, points, rho, interval, of_all)


def _key(result: Result) -> str | None:
    """An identifier of the start of B, or None if B starts without a subspace (for example at zero)."""
    start = (result.record.get("plan") or {}).get("b_init")
    if start == "basis":
        return f"basis {(result.record.get('basis') or {}).get('sha256')}"
    return f"{start} B" if start in ("orthonormal", "random") else None


def _used(stratum: str, key: str, results: list[Result], planned: Collection[float | None]) -> UsedBasis:
    record, row = results[0].record, results[0].row
    plans = [AdapterPlan.from_dict(result.record["plan"]) for result in results]
    rank, width = method_of(plans[0].mode).b_width(plans[0]), _width(plans[0])
    if plans[0].needs_basis:
        basis = read_basis(row.basis or _recorded_path(record, row.name))
        if basis.sha256 != record["basis"]["sha256"]:
            raise CoraError(
                f"{row.name} was trained with the basis of sha256 {record['basis']['sha256']}, but {basis.path} has sha256 {basis.sha256}"
            )
        of = f"{len(basis.sources)} models" if len(basis.sources) > 1 else basis.sources[0].reference
        name = f"{basis.path.stem} {basis.sha256[:8]} (of {of}), {width}"
        directions = {name: start_of(plans[0], basis, "output")}
    else:
        basis, name = None, f"{key}, {width}"
        directions = {_draw(name, plan.seed): start_of(plan, None, "output") for plan in plans}
    return UsedBasis(
        name=name,
        stratum=stratum,
        rank=rank,
        directions=directions,
        basis=basis,
        losses=tuple((result.row.seed, result.measures[LOSS].value) for result in results),
        learning_rate=row.learning_rate,
        rates=tuple(sorted(rate for rate in planned if rate is not None)),
        model=(record["model"]["reference"], record["fingerprint"]["model_sha256"]),
    )


def _draw(name: str, seed: int) -> str:
    """What the random B of a seed is called."""
    return f"{name}, seed {seed}"


def _width(plan: AdapterPlan) -> str:
    """The number of columns in the start of B, in words."""
    method = method_of(plan.mode)
    flag = method.width_flag.lstrip("-").replace("-", " ")
    return f"{'r=' if flag == 'rank' else f'{flag} '}{method.b_width(plan)}"


def _recorded_path(record: dict[str, Any], run: str) -> Path:
    if not (record.get("basis") or {}).get("path"):
        raise CoraError(f"run.json of {run} does not record the path of its basis")
    return Path(record["basis"]["path"])
