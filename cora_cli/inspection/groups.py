"""Which models belong together: the recovered share with its interval and its chance band, and the groups that follow from all pairs.

`sharing_verdict` puts the result into words; `group_measure` measures the groups that are found here.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, permutations

import numpy as np
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.special import ndtri, stdtrit

from cora_cli.inspection.group_measure import GroupFindings
from cora_cli.inspection.measure import CEILING, CHANCE, OWN, POOLED, Findings, Held
from cora_cli.intervals import with_width

LINK = 0.05
"""The mean recovered share (0-1) of pairs from which models are in one group: half of what the pool of a group must recover, because the basis
of a pair comes from a single model."""
ERROR = 0.05
"""The chance (0-1) that any of the compared shares lies above its band if no two models have anything in common."""
LEVEL = 0.95
"""The level of every interval of a recovered share."""

Layer = int | str
"""The unit over which intervals are taken: the number of a layer, or the name of a module outside all layers."""


@dataclasses.dataclass(frozen=True)
class Recovered:
    """A recovered share (at most 1, negative below the control), its interval, and whether it lies above what chance gives.

    `interval` is None if all weight matrices belong to one layer.
    """

    share: float
    interval: tuple[float, float] | None
    above_chance: bool


@dataclasses.dataclass(frozen=True)
class Group:
    """Models that share a subspace, with what the group's other models recover of each; `partly` if the lowest share is below one half."""

    models: tuple[str, ...]
    partly: bool
    recovered: dict[str, Recovered]


@dataclasses.dataclass(frozen=True)
class Grouping:
    """The `groups` of two or more models, largest first, and the `order` of all models in which groups stay together.

    `pairs` maps (model, by) to what the directions of the model `by` recover of `model`. `linked` says whether pairs formed any group; if
    not, all models are one group, whose pool may still show what no pair does.
    """

    groups: tuple[tuple[str, ...], ...]
    order: tuple[str, ...]
    pairs: dict[tuple[str, str], Recovered]
    linked: bool


def recovered(measured: Iterable[tuple[Layer, Held]], comparisons: int) -> Recovered:
    """(capture − control) / (ceiling − control), each averaged over the weight matrices `measured`, which must not be empty.

    The control is the better of chance and the base model's own directions, by their means. The interval treats layers as a sample: the
    share is the ratio ΣN / ΣD of sums over layers, whose standard error follows from the residuals N − share·D (linearised, Cochran 1977,
    section 6.3) with Student's t of layers − 1 degrees of freedom. It needs no random numbers and, unlike a bootstrap of few layers, is not
    too short; its upper end is cut at 1. Neighbouring layers of one model are not independent, so it is rather too short than too long.

    The share is above chance if the capture exceeds its exact mean by more than the normal quantile of ERROR / `comparisons` times its
    exact standard deviation for random directions (`subspaces.chance_deviation`; Bonferroni).
    """
    found = list(measured)
    chance, own, value, ceiling = (
        math.fsum(getattr(held, of) for _, held in found) for of in ("chance", "own", "value", "ceiling")
    )
    control = "chance" if chance >= own else "own"
    deviation = math.sqrt(math.fsum(held.deviation**2 for _, held in found))
    low = max(chance, own)
    share = (value - low) / (ceiling - low) if ceiling > low else 0.0
    layers: dict[Layer, list[float]] = {}
    for layer, held in found:
        sums = layers.setdefault(layer, [0.0, 0.0])
        sums[0] += held.value - getattr(held, control)
        sums[1] += held.ceiling - getattr(held, control)
    above = value > chance - ndtri(ERROR / comparisons) * deviation
    return Recovered(share, _interval(share, list(layers.values())), bool(above))


def _interval(share: float, layers: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The interval of the ratio `share` of the sums of the two columns of `layers`."""
    count, (above, below) = len(layers), np.asarray(layers).T
    if count < 2 or below.sum() <= 0:
        return None
    error = math.sqrt(count / (count - 1) * float(np.square(above - share * below).sum())) / float(below.sum())
    half = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * error
    return with_width(share - half, max(share, min(1.0, share + half)))


def find_groups(findings: Sequence[Findings], models: Sequence[str]) -> Grouping:
    """The groups among `models`, by average linkage of what the models of each pair recover of each other.

    The similarity of a pair is the smaller of its two shares, or 0 unless both captures lie above the chance band (`recovered`, corrected
    for all pairs). Clusters with the largest mean similarity are joined first, while that mean is at least LINK. The band alone would
    link models with very large matrices over nothing, and LINK alone those with small ones by accident.

    Why the mean: connected components join everything over one related pair, and complete linkage breaks one group of weakly related
    models into several wherever noise takes a single pair below LINK, although their pools recover each other. The price is that a model
    that contains two others, such as their merge, joins them; `unlinked` names such pairs.
    """
    held: dict[tuple[str, str], list[tuple[Layer, Held]]] = {}
    for one in findings:
        for pair in one.pairs:
            held.setdefault((pair.model, pair.by), []).append((_layer(one), pair))
    ordered = [pair for pair in permutations(models, 2) if pair in held]
    pairs = {pair: recovered(held[pair], len(ordered)) for pair in ordered}
    if len(models) < 2:
        return Grouping((tuple(models),) if models else (), tuple(models), pairs, False)
    distances = [1.0 - _similarity(pairs, one, other) for one, other in combinations(models, 2)]
    tree = linkage(distances, "average")
    clusters: dict[int, list[str]] = {}
    labels = fcluster(tree, 1.0 - LINK, "distance")
    for label, name in zip(labels, models, strict=True):
        clusters.setdefault(int(label), []).append(name)
    groups = sorted((tuple(names) for names in clusters.values() if len(names) > 1), key=len, reverse=True)
    linked_any = bool(groups)
    inside = [name for group in groups for name in group]
    rest = [models[leaf] for leaf in leaves_list(tree) if models[leaf] not in inside]
    return Grouping(tuple(groups) if linked_any else (tuple(models),), (*inside, *rest), pairs, linked_any)


def unlinked(grouping: Grouping, group: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of models of `group` that are related only through others: their similarity is below LINK. The least similar is first."""
    found = [pair for pair in combinations(group, 2) if _similarity(grouping.pairs, *pair) < LINK]
    return sorted(
        found,
        key=lambda pair: min((grouping.pairs[way].share for way in (pair, pair[::-1]) if way in grouping.pairs), default=0.0),
    )


def _similarity(pairs: Mapping[tuple[str, str], Recovered], one: str, other: str) -> float:
    """What both of a pair at least recover of each other (0-1), or 0 if chance can give it; see `find_groups`."""
    both = [pairs[way] for way in ((one, other), (other, one)) if way in pairs]
    if not both or not all(each.above_chance for each in both):
        return 0.0
    return min(1.0, max(0.0, min(each.share for each in both)))


def of_all(findings: Sequence[Findings], models: Sequence[str]) -> dict[str, list[tuple[Layer, Held]]]:
    """What the pool of all other models holds of each of `models`, from the captures that `measure` took anyway."""
    found: dict[str, list[tuple[Layer, Held]]] = {}
    for one in findings:
        for capture in one.captures:
            shares = capture.shares
            if capture.left_out in models and POOLED in shares:
                pooled = Held(
                    model=capture.left_out,
                    by=POOLED,
                    value=shares[POOLED],
                    own=shares[OWN],
                    chance=shares[CHANCE],
                    deviation=capture.deviation,
                    ceiling=shares[CEILING],
                )
                found.setdefault(capture.left_out, []).append((_layer(one), pooled))
    return found


def of_groups(found: Sequence[GroupFindings]) -> Mapping[tuple[str, str], list[tuple[Layer, Held]]]:
    """What each group holds of each model, keyed by (model, group)."""
    held: dict[tuple[str, str], list[tuple[Layer, Held]]] = {}
    for one in found:
        for each in one.held:
            held.setdefault((each.model, each.by), []).append((_layer(one), each))
    return held


def _layer(found: Findings | GroupFindings) -> Layer:
    return found.module if found.layer is None else found.layer
