"""What judgments say about the answers, and what the anchors say about the judge.

Every interval is over records: all judgments of one record are one unit, so that two answers to one prompt, both orders of a pair and a
repetition are not counted as independent.
"""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cora_cli.crossed import Floats, ValueFunction, crossed, pseudo_values
from cora_cli.evaluation.judge.answers import REFERENCE, SHUFFLED, Answers
from cora_cli.evaluation.judge.questions import Question
from cora_cli.evaluation.judge.rubrics import FIRST, HIGHEST, LOWEST, PREFERENCE_KEY, SECOND, TIE, Criterion, Rubric
from cora_cli.intervals import with_width

Z = 1.959963984540054
_ROUNDING = 1e-12
_CHARACTERS = 100
"""The unit of length: slopes are in points per hundred characters."""
FEWEST = 6
"""Records with which a judge can be shown to tell anchors apart: with fewer, even a sign test that always agrees has p above 0.05."""
Judged = Sequence[tuple[Question, Mapping[str, Any] | None]]


def measure_rubric(rubric: Rubric, answers: Answers, judged: Judged) -> dict[str, Any]:
    """The `records.JudgedRubric` of all judgments by one rubric; None stands for a judgment that was not obtained."""
    failed = collections.Counter(" / ".join(question.names) for question, said in judged if said is None)
    found: dict[str, Any] = {
        "sha256": rubric.sha256,
        "asked": len(judged),
        "failed": dict(sorted(failed.items())),
        "pass_mark": rubric.pass_mark,
        "criteria": {},
        "pairs": None,
    }
    if rubric.is_preference:
        pairs = _pairs(answers, judged)
        return {**found, "pairs": pairs, "disqualified": _disqualified({"preference": pairs["gold_over_shuffled"]})}
    criteria = {criterion.name: _criterion(rubric, criterion, answers, judged) for criterion in rubric.criteria}
    anchors = {name: entry["gold_minus_shuffled"] for name, entry in criteria.items() if entry["anchored"]}
    return {**found, "criteria": criteria, "disqualified": _disqualified(anchors)}


def _disqualified(anchors: Mapping[str, Any]) -> list[str]:
    """The anchored criteria on which the judge is not shown to tell references from shuffled ones: the interval does not lie above 0.

    Where all records agree there is no interval, and the sign test decides, which FEWEST records pass.
    """

    def shown(found: Mapping[str, Any] | None) -> bool:
        if found is None or found["n"] < FEWEST:
            return False
        return bool(found["ci95"][0] > 0 if found["ci95"] else found["value"] > 0)

    return [name for name, found in anchors.items() if not shown(found)]


def estimate(statistics: Floats, value: ValueFunction, n: int | None = None) -> dict[str, Any] | None:
    """A value of summed statistics (records, k) with its interval by the jackknife and the t-distribution of `crossed`.

    `n` is the number of records that contribute, by default all. None without records or where the value is undefined.
    """
    count = len(statistics) if n is None else n
    if not len(statistics) or not count:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        found = float(value(statistics.sum(axis=0), len(statistics)))
        parts = pseudo_values(statistics, value)
    if not math.isfinite(found):
        return None
    ends: tuple[float, float] | None = None
    # Records that all agree say nothing about the spread.
    varies = np.isfinite(parts).all() and np.ptp(parts) > _ROUNDING * max(1.0, float(np.abs(parts).max()))
    if count > 1 and varies:
        low, high = (float(end) for end in crossed([parts[None]]).interval(0.95))
        ends = (low, high) if math.isfinite(low) and math.isfinite(high) else None
    return {"value": found, "ci95": ends and list(ends), "n": count}


def _within(found: dict[str, Any] | None, lowest: float, highest: float) -> dict[str, Any] | None:
    """An estimate without the part of its interval that its quantity cannot reach."""
    if found is None or found["ci95"] is None:
        return found
    return {**found, "ci95": [min(max(end, lowest), highest) for end in found["ci95"]]}


def corrected_share(
    share: float, n: int, sensitivity: float, positives: int, specificity: float, negatives: int
) -> dict[str, Any] | None:
    """The true share behind an observed one, with an interval that includes the uncertainty of sensitivity and specificity.

    Rogan & Gladen 1978 for the value; the interval with its small-sample adjustment is that of Lee et al. (arXiv 2511.21140). None
    where the judge accepts bad answers at least as often as good ones, so that nothing can be corrected.
    """
    if sensitivity + specificity <= 1:
        return None
    seen, seen_n = (n * share + Z**2 / 2) / (n + Z**2), n + Z**2
    sens, sens_n = (positives * sensitivity + 1) / (positives + 2), positives + 2
    spec, spec_n = (negatives * specificity + 1) / (negatives + 2), negatives + 2
    value = (share + specificity - 1) / (sensitivity + specificity - 1)
    if (gain := sens + spec - 1) <= 0:
        return {"value": min(max(value, 0.0), 1.0), "ci95": [0.0, 1.0], "n": n}
    centre = (seen + spec - 1) / gain
    errors = spec * (1 - spec) / spec_n, sens * (1 - sens) / sens_n
    shift = 2 * Z**2 * (-(1 - centre) * errors[0] + centre * errors[1])
    variance = (seen * (1 - seen) / seen_n + (1 - centre) ** 2 * errors[0] + centre**2 * errors[1]) / gain**2
    ends = (centre + shift - Z * math.sqrt(variance), centre + shift + Z * math.sqrt(variance))
    value, low, high = (min(max(number, 0.0), 1.0) for number in (value, *ends))
    interval = with_width(min(low, value), max(high, value))
    return {"value": value, "ci95": interval and list(interval), "n": n}


def _ratio(sums: Floats, _: int) -> Floats:
    return sums[..., 0] / sums[..., 1]


def _per_record(values: Sequence[float | None]) -> dict[str, Any] | None:
    """The mean over the records that have a value."""
    known = [value for value in values if value is not None]
    return estimate(np.array([[value, 1.0] for value in known]).reshape(-1, 2), _ratio)


def _share(values: Sequence[bool | None]) -> dict[str, Any] | None:
    """The share of records for which something holds, with Wilson's (1927) interval."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    n, share = len(known), sum(known) / len(known)
    centre, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    low, high = ((centre + sign * half) / (1 + Z**2 / n) for sign in (-1, 1))
    return {"value": share, "ci95": [min(max(low, 0.0), share), max(min(high, 1.0), share)], "n": n}


def _criterion(rubric: Rubric, criterion: Criterion, answers: Answers, judged: Judged) -> dict[str, Any]:
    scores: dict[str, list[list[float | None]]] = {name: [[] for _ in answers.prompts] for name in answers.names}
    for question, said in sorted(judged, key=lambda entry: entry[0].repeat):
        scores[question.names[0]][question.record].append(None if said is None else float(said[criterion.name]))
    means = {name: [_mean(both) for both in by_record] for name, by_record in scores.items()}
    slope, correlation = _length(answers, means)
    found: dict[str, Any] = {
        "anchored": criterion.anchored,
        "scores": {name: _within(_per_record(values), LOWEST, HIGHEST) for name, values in means.items()},
        "gold_minus_shuffled": _within(
            _per_record(_differences(means[REFERENCE], means[SHUFFLED])), LOWEST - HIGHEST, HIGHEST - LOWEST
        ),
        "length_slope": slope,
        "length_correlation": correlation,
        "retest": _retest_of_scores(scores),
        "sensitivity": None,
        "specificity": None,
        "accepted": None,
    }
    return {**found, **_acceptance(means, rubric.pass_mark)} if criterion.anchored else found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _differences(one: Sequence[float | None], other: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(one, other, strict=True)]


def _acceptance(means: Mapping[str, Sequence[float | None]], mark: float) -> dict[str, Any]:
    """The share of answers that reach the pass mark; references are answers that should, shuffled ones answers that should not."""
    passed = {name: [None if value is None else value >= mark for value in values] for name, values in means.items()}
    sensitivity = _share(passed[REFERENCE])
    specificity = _share([None if value is None else not value for value in passed[SHUFFLED]])
    shares = {}
    for name, values in passed.items():
        if name not in (REFERENCE, SHUFFLED):
            observed = _share(values)
            shares[name] = {"observed": observed, "corrected": _corrected(observed, sensitivity, specificity)}
    return {"sensitivity": sensitivity, "specificity": specificity, "accepted": shares}


def _corrected(observed: Any, sensitivity: Any, specificity: Any) -> dict[str, Any] | None:
    if observed is None or sensitivity is None or specificity is None:
        return None
    known = (sensitivity["value"], sensitivity["n"], specificity["value"], specificity["n"])
    return corrected_share(observed["value"], observed["n"], *known)


def _length(
    answers: Answers, means: Mapping[str, Sequence[float | None]]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Slope (points per hundred characters) and correlation of score and length among the anchors.

    References are equally good and shuffled ones equally bad whatever their length, so that what goes with length here is the judge's. Both
    kinds have a level of their own. A unit is one reference text with the scores that it got in both places.
    """
    rows: dict[int, list[float]] = collections.defaultdict(lambda: [0.0] * 12)
    for kind, places in enumerate((range(len(answers.references)), answers.shuffle)):
        for record, place in enumerate(places):
            score = means[(REFERENCE, SHUFFLED)[kind]][record]
            if place is not None and score is not None:
                x = len(answers.references[place]) / _CHARACTERS
                for offset, part in enumerate((1.0, x, score, x * score, x * x, score * score)):
                    rows[place][kind * 6 + offset] += part
    statistics = np.array(list(rows.values())).reshape(-1, 12)

    def within(sums: Floats) -> tuple[Floats, Floats, Floats]:
        products: list[Floats] = []
        for a, b, ab in ((1, 2, 3), (1, 1, 4), (2, 2, 5)):
            products.append(
                sum(
                    (
                        sums[..., at + ab] - sums[..., at + a] * sums[..., at + b] / np.maximum(sums[..., at], 1.0)
                        for at in (0, 6)
                    ),
                    np.zeros(sums.shape[:-1]),
                )
            )
        return products[0], products[1], products[2]

    def slope(sums: Floats, _: int) -> Floats:
        both, lengths, scores = within(sums)
        return np.where((lengths > _ROUNDING) & (scores > _ROUNDING), both / lengths, np.nan)

    def correlation(sums: Floats, _: int) -> Floats:
        both, lengths, scores = within(sums)
        return np.where((lengths > _ROUNDING) & (scores > _ROUNDING), both / np.sqrt(lengths * scores), np.nan)

    return estimate(statistics, slope), _within(estimate(statistics, correlation), -1.0, 1.0)


def _retest_of_scores(scores: Mapping[str, Sequence[Sequence[float | None]]]) -> dict[str, Any] | None:
    """Agreement of the first and the second score of each answer; κ has quadratic weights."""
    rows = []
    for record in range(len(scores[REFERENCE])):
        pairs = [
            (both[0], both[1])
            for by_record in scores.values()
            if len(both := by_record[record]) == 2 and both[0] is not None and both[1] is not None
        ]
        if pairs:
            x, y = np.array(pairs, dtype=float).T
            rows.append([len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum(), (x == y).sum()])
    if not rows:
        return None
    statistics = np.array(rows, dtype=float)

    def kappa(sums: Floats, _: int) -> Floats:
        """1 − Σ(x−y)² / its expectation for independent scores with the same margins (Cohen 1968)."""
        n, x, y, xx, yy, xy = (sums[..., place] for place in range(6))
        chance = xx / n + yy / n - 2 * x * y / n**2
        return np.where(chance > _ROUNDING, 1 - (xx + yy - 2 * xy) / n / chance, np.nan)

    def variance(sums: Floats, _: int) -> Floats:
        return (sums[..., 3] + sums[..., 4] - 2 * sums[..., 5]) / sums[..., 0] / 2

    noise = estimate(statistics, variance)
    if noise is not None:
        ends = noise["ci95"] and [math.sqrt(max(end, 0.0)) for end in noise["ci95"]]
        noise = {"value": math.sqrt(max(noise["value"], 0.0)), "ci95": ends, "n": noise["n"]}
    return {
        "kappa": _within(estimate(statistics, kappa), -1.0, 1.0),
        "agreement": _within(estimate(statistics[:, [6, 0]], _ratio), 0.0, 1.0),
        "noise": noise,
    }


def _pairs(answers: Answers, judged: Judged) -> dict[str, Any]:
    """See `records.JudgedPairs`."""
    said: dict[tuple[tuple[str, ...], int, int], str | None] = {
        (question.names, question.record, question.repeat): str(found[PREFERENCE_KEY]) if found else None
        for question, found in judged
    }
    worth = {FIRST: 1.0, TIE: 0.5, SECOND: 0.0}
    records, repeats = range(len(answers.prompts)), sorted({repeat for *_, repeat in said})

    def both_orders(pair: tuple[str, str], record: int) -> list[tuple[str, str]]:
        """The choices when the pair's first answer was shown first and when it was shown second, for each repetition with both."""
        found = [(said.get((pair, record, n)), said.get((pair[::-1], record, n))) for n in repeats]
        return [(one, other) for one, other in found if one is not None and other is not None]

    def shares(pair: tuple[str, str]) -> list[float | None]:
        """For each record, the share of wins of the pair's first answer."""
        return [
            _mean([part for one, other in both_orders(pair, record) for part in (worth[one], 1 - worth[other])])
            for record in records
        ]

    gold = shares((REFERENCE, SHUFFLED))
    accuracy = _per_record(gold)
    wins = {}
    for pair in answers.pairs()[:-1]:
        observed = _within(_per_record(shares(pair)), 0.0, 1.0)
        wins[f"{pair[0]} / {pair[1]}"] = {"observed": observed, "corrected": _corrected(observed, accuracy, accuracy)}
    order, flips = [], []
    for record in records:
        orders = [found for pair in answers.pairs() for found in both_orders(pair, record)]
        if orders:
            order.append([sum(2 * worth[choice] - 1 for both in orders for choice in both), 2.0 * len(orders)])
            flips.append([float(sum(worth[one] != 1 - worth[other] for one, other in orders)), float(len(orders))])
    return {
        "wins": wins,
        "gold_over_shuffled": _within(_per_record([None if share is None else 2 * share - 1 for share in gold]), -1.0, 1.0),
        "order_bias": _within(estimate(np.array(order).reshape(-1, 2), _ratio), -1.0, 1.0),
        "order_flips": _within(estimate(np.array(flips).reshape(-1, 2), _ratio), 0.0, 1.0),
        "length_bias": _length_bias(answers, gold),
        "retest": _retest_of_choices(said, records),
    }


def _length_bias(answers: Answers, gold: Sequence[float | None]) -> dict[str, Any] | None:
    """How much more often the reference wins over the shuffled one where it is the longer of the two than where it is the shorter."""
    rows = []
    for record, (share, place) in enumerate(zip(gold, answers.shuffle, strict=True)):
        if share is not None and place is not None:
            longer = len(answers.references[record]) - len(answers.references[place])
            rows.append([share * (longer > 0), float(longer > 0), share * (longer < 0), float(longer < 0)])

    def difference(sums: Floats, _: int) -> Floats:
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]

    return _within(estimate(np.array(rows).reshape(-1, 4), difference), -1.0, 1.0)


def _retest_of_choices(
    said: Mapping[tuple[tuple[str, ...], int, int], str | None], records: Sequence[int]
) -> dict[str, Any] | None:
    """Agreement of the first and the second choice for each pair in the same order; Cohen's κ."""
    kinds = (FIRST, SECOND, TIE)
    tables = np.zeros((len(records), 3, 3))
    for (names, record, repeat), choice in said.items():
        again = said.get((names, record, 1))
        if repeat == 0 and choice is not None and again is not None:
            tables[record, kinds.index(choice), kinds.index(again)] += 1
    tables = tables[tables.sum(axis=(1, 2)) > 0]
    if not len(tables):
        return None

    def kappa(sums: Floats, _: int) -> Floats:
        table = sums.reshape(*sums.shape[:-1], 3, 3)
        n = table.sum(axis=(-1, -2))
        chance = (table.sum(-1) * table.sum(-2)).sum(-1) / n**2
        agreed = np.trace(table, axis1=-2, axis2=-1) / n
        return np.where(chance < 1 - _ROUNDING, (agreed - chance) / (1 - chance), np.nan)

    statistics = tables.reshape(-1, 9)
    agreed = np.stack([statistics[:, [0, 4, 8]].sum(1), statistics.sum(1)], axis=1)
    return {
        "kappa": _within(estimate(statistics, kappa), -1.0, 1.0),
        "agreement": _within(estimate(agreed, _ratio), 0.0, 1.0),
    }
