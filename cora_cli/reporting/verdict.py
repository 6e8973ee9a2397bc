"""The verdict of `cora report`: does an informed B help, compared with its controls?

A B is informed if it starts as the subspace of fine-tuned models. A B that starts from the gradient of the training data has the same
controls, in a family of tests of its own. `outcomes` decides by the rule that the report prints.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from cora_cli.evaluation.metrics import LOWER_IS_BETTER
from cora_cli.experiments.stage_rules import MIN_SEEDS
from cora_cli.methods.registry import BASELINE, METHODS
from cora_cli.reporting.learning_rate_sweep import RatesByMethod, rates_of, swept_alike
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.outcomes import BETTER, EQUIVALENT, FEW_SEEDS, UNDECIDED, WORSE, Test, decide, level_at
from cora_cli.reporting.statistics import EXAMPLES, LEVEL, Difference, MethodResults, compare, compute_intervals

RANDOM_B, BASE_B, LORA_RANK, LORA_SIZE, BASE = (
    "random orthonormal B",
    "B of the base model alone",
    "LoRA at equal rank",
    "LoRA at equal trained parameters",
    "base model without training",
)
# Ranks are integers, so the closest LoRA may differ by a few per cent in trained parameters and still count as equal.
_EQUAL_SIZE = 0.05
DEFAULT_MARGIN = 0.1
"""The margin of equivalence as a share of what training gains the control."""
Margin = float | Mapping[str, float] | None
"""A share of what training gains, or margins by measure (measures without one get the default), or None for the default."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`one` minus `other` in every measure that both have; `other` is a control of the kind `role`.

    `control` marks the line below an informed B's comparison with LoRA: the random B compared with the same LoRA. `baseline` marks the
    comparison of another method with LoRA, which says nothing about an informed B.
    """

    one: MethodResults
    other: MethodResults
    role: str
    tests: tuple[Test, ...]
    control: bool = False
    baseline: bool = False

    def sentence(self) -> str:
        """The outcome in words, with the differences that were shown, and that of the held-out loss in any case."""
        said = []
        for word in (BETTER, WORSE, EQUIVALENT, UNDECIDED):
            tests = [test for test in self.tests if test.outcome == word]
            if word == UNDECIDED and len(tests) > 1:
                where = "all" if len(tests) == len(self.tests) else "the other"
                said.append(f"{word} in {where} {len(tests)} measures")
                said += [f"{title(test.measure)} {_amount(test)}" for test in tests if test.measure == LOSS]
            elif tests:
                said.append(f"{word} in {', '.join(f'{title(test.measure)} ({_amount(test)})' for test in tests)}")
        obstacles = "; ".join(dict.fromkeys(test.obstacle for test in self.tests if test.obstacle))
        lead = "The random control, " if self.control else ""
        tail = f" ({obstacles})" if obstacles else ""
        return f"{lead}{self.one.name} compared with {self.other.name} ({self.role}): {'; '.join(said)}{tail}."

    def test(self, measure: str) -> Test | None:
        """The test in one measure, if both methods have it."""
        return next((test for test in self.tests if test.measure == measure), None)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The headline, the comparisons behind it, and the rule that decided them."""

    headline: str
    comparisons: tuple[Comparison, ...]
    rule: str


def judge(
    methods: Sequence[MethodResults],
    measures: Sequence[str],
    rates: RatesByMethod | None = None,
    margin: Margin = None,
    looks: int | None = None,
) -> Verdict:
    """The verdict on one group of methods with the same data and evaluation.

    `rates` has the learning rates of the sweeps (default: those of `methods`), `margin` and `looks` are the grid's.
    """
    rates = rates_of(methods) if rates is None else rates
    pairs = [pair for one in methods if _informed(one) for pair in _controls(one, methods)]
    controls = {id(other) for _, other, _, _ in pairs}
    from_gradient = [
        pair for one in methods if _of_gradient(one) for pair in _controls(one, methods) if pair[2] != BASE and not pair[3]
    ]
    chosen_b = [one for one in methods if _informed(one) or _of_gradient(one)]
    others = [
        pair
        for one in methods
        if one not in chosen_b and id(one) not in controls and not _is_lora(one) and one.first.row.mode != "base"
        for pair in _controls(one, methods)
        if pair[2] in (LORA_RANK, LORA_SIZE) and not pair[3]
    ]
    (informed, tests), (data, data_tests), (baselines, other_tests) = (
        _compared(family, methods, measures, rates, margin, looks) for family in (pairs, from_gradient, others)
    )
    baselines = [dataclasses.replace(comparison, baseline=True) for comparison in baselines]
    headline = " ".join(filter(None, (_headline(methods, informed), _gradient_headline(methods, data))))
    rule = _rule(tests, data_tests, other_tests, margin, looks)
    return Verdict(headline, (*informed, *data, *baselines), rule)


def _compared(
    pairs: Sequence[tuple[MethodResults, MethodResults, str, bool]],
    methods: Sequence[MethodResults],
    measures: Sequence[str],
    rates: RatesByMethod,
    margin: Margin,
    looks: int | None,
) -> tuple[list[Comparison], int]:
    """The comparisons of one family of tests, and the number of its tests."""
    # A random control can stand under several informed methods; it counts as one family member.
    planned: dict[tuple[int, int, str], tuple[str, Difference, float | None, bool]] = {}
    for one, other, _, _ in pairs:
        alike = swept_alike(one, other, rates)
        for name in measures:
            key = (id(one), id(other), name)
            if key not in planned and (found := compare(one, other, name)) is not None:
                planned[key] = (name, found, _margin(margin, other, name, methods), alike)
    for confidence in (0.95, 0.90):
        compute_intervals([found for _, found, _, _ in planned.values()], confidence)
    tests = dict(zip(planned, decide(list(planned.values()), looks), strict=True))
    judged = [
        Comparison(
            one, other, role, tuple(tests[key] for name in measures if (key := (id(one), id(other), name)) in tests), control
        )
        for one, other, role, control in pairs
    ]
    return [comparison for comparison in judged if comparison.tests], len(tests)


def _rule(tests: int, data_tests: int, other_tests: int, margin: Margin, looks: int | None) -> str:
    share = margin if isinstance(margin, float | int) else DEFAULT_MARGIN
    stated = ", ".join(f"{title(name)} {value:g}" for name, value in margin.items()) if isinstance(margin, Mapping) else ""
    margins = f"{share:.0%} of the difference between the base model and the trained control"
    margins = f"{stated} as the grid states, otherwise {margins}" if stated else margins
    families = {
        "tests of this verdict": tests,
        "of the B from the gradient": data_tests,
        "that compare other methods with LoRA": other_tests,
    }
    counted = [f"the {count} {name}" for name, count in families.items() if count] or ["the 0 tests of this verdict"]
    family = ", and separately over ".join(counted)
    return (
        "Rule: seeds and records are both random and crossed; a difference has the variance σ²(seed)/S + σ²(record)/R + "
        f"σ²(interaction)/(S·R). Better or worse: p < {LEVEL:g} after Holm's correction over {family}, "
        f"however small the difference. Equivalent: otherwise, if the 90 % interval lies inside ± the margin ({margins}; without a base model there is none). Otherwise "
        f"undecided, which does not mean equal. Nothing is decided with fewer than {MIN_SEEDS} seeds on a side, nor where the learning "
        "rates were not swept alike: the same several rates on both sides, or equally many with the chosen one inside its range. The "
        "intervals are not corrected for multiple tests. would decide: about how many more seeds per method, or more records, if the "
        "difference and the variances stayed as estimated; – if neither would within reason. A B gets credit for its information only "
        "where it is also better than a random B." + _looks_in_words(looks)
    )


def _looks_in_words(looks: int | None) -> str:
    if looks is None or looks <= 1:
        return ""
    last = MIN_SEEDS + looks - 1
    return (
        f" The grid looked after {MIN_SEEDS} seeds and after each further one up to {last}, and trained no more seeds where the verdict was "
        f"decided; so that all looks together have the level {LEVEL:g}, p-values were multiplied by {LEVEL / level_at(MIN_SEEDS, looks):.3g} before "
        f"seed {last} and by {LEVEL / level_at(last, looks):.3g} there, and the intervals for equivalence widened alike."
    )


def _margin(margin: Margin, other: MethodResults, name: str, methods: Sequence[MethodResults]) -> float | None:
    if isinstance(margin, Mapping) and name in margin:
        return float(margin[name])
    base, trained = _base_value(other, name, methods), other.estimate(name)
    if base is None or trained is None or other.first.row.mode == "base":
        return None
    share = margin if isinstance(margin, float | int) else DEFAULT_MARGIN
    gain = base - trained.value if name == LOSS or name in LOWER_IS_BETTER else trained.value - base
    return gain * share if gain > 0 else None  # training that harmed the control shows no scale of a gain


def _base_value(trained: MethodResults, name: str, methods: Sequence[MethodResults]) -> float | None:
    """The base model's value; that of the held-out loss is also the loss before training of a run that starts there."""
    for method in methods:
        estimate = method.estimate(name) if method.first.row.mode == "base" else None
        if estimate is not None and method.first.row.model == trained.first.row.model:
            return estimate.value
    if name == LOSS:
        for method in (trained, *methods):
            row, heldout = method.first.row, method.first.record.get("heldout")
            if heldout and method.first.starts_at_base and row.model == trained.first.row.model:
                return float(heldout["before"]["loss"])
    return None


def _plan(method: MethodResults) -> dict[str, object]:
    return method.first.record.get("plan") or {}


def _is_lora(method: MethodResults) -> bool:
    """Whether it is LoRA on the base model itself. With a start of its own, such as the mean of other models' ΔW, it is another method."""
    return method.first.row.mode == BASELINE and not _plan(method).get("start")


def _informed(method: MethodResults) -> bool:
    plan = _plan(method)
    return plan.get("b_init") == "basis" and not plan.get("start") and method.first.row.n_models != 0


def _of_gradient(method: MethodResults) -> bool:
    mode = method.first.row.mode
    return _plan(method).get("b_init") == "gradient" and mode in METHODS and METHODS[mode].b_init_is_free


def _controls(one: MethodResults, methods: Sequence[MethodResults]) -> list[tuple[MethodResults, MethodResults, str, bool]]:
    """(one, other, role, control) for each control of `one`; below each LoRA stands the random control against the same LoRA."""
    row, trained = one.first.row, one.first.trained
    found = []
    random = [other for other in methods if _like(other, one) and _plan(other).get("b_init") == "orthonormal"]
    for role in (RANDOM_B, BASE_B, LORA_RANK, LORA_SIZE, BASE):
        for other in methods:
            theirs = other.first.row
            same_rank = theirs.rank == row.rank
            size = other.first.trained
            fits = {
                RANDOM_B: any(other is control for control in random),
                BASE_B: _like(other, one) and _plan(other).get("b_init") == "basis" and theirs.n_models == 0,
                LORA_RANK: _is_lora(other) and same_rank,
                LORA_SIZE: _is_lora(other)
                and not same_rank
                and bool(size and trained)
                and abs((size or 0) - (trained or 0)) <= _EQUAL_SIZE * (trained or 0),
                BASE: theirs.mode == "base",
            }
            if fits[role] and theirs.model == row.model:
                found.append((one, other, role, False))
                if role in (LORA_RANK, LORA_SIZE):
                    found += [(control, other, role, True) for control in random]
    return found


def _like(other: MethodResults, one: MethodResults) -> bool:
    theirs, row = other.first.row, one.first.row
    starts = _plan(other).get("start"), _plan(one).get("start")
    return (theirs.mode, theirs.rank, theirs.model, starts[0]) == (row.mode, row.rank, row.model, starts[1])


def _headline(methods: Sequence[MethodResults], comparisons: Sequence[Comparison]) -> str:
    informed = [method.first.row for method in methods if _informed(method)]
    if not informed:
        return "No conclusion about an informed B: no method here takes its B from fine-tuned models. Train one with --mode fb --basis FILE."
    modes = " or ".join(dict.fromkeys(row.mode for row in informed))
    ranks = " or ".join(dict.fromkeys(str(row.rank) for row in informed))
    sentences = []
    for role, claim, control, flags in (
        (RANDOM_B, "a random orthonormal B", "the random control", f"--mode {modes} --rank {ranks} --b-init orthonormal"),
        (LORA_RANK, "LoRA at equal rank", "LoRA at equal rank", f"--mode lora --rank {ranks}"),
    ):
        found = [comparison for comparison in comparisons if comparison.role == role and not comparison.control]
        tests = [test for comparison in found for test in comparison.tests]
        if not tests:
            sentences.append(f"No conclusion about {control}: there is no finished run of it. Train it with {flags}.")
            continue
        sentence = f"Compared with {claim}, the informed B is {_tally(tests)}"
        if role == LORA_RANK:
            sentence += _credit(found, comparisons)
        sentences.append(f"{sentence}.")
    tests = [test for comparison in comparisons for test in comparison.tests]
    if any(FEW_SEEDS in test.obstacle for test in tests):
        sentences.append(f"A decision needs at least {MIN_SEEDS} seeds per method.")
    if not all(test.alike for test in tests):
        sentences.append("A decision needs learning rates that were swept alike.")
    return " ".join(sentences)


def _gradient_headline(methods: Sequence[MethodResults], comparisons: Sequence[Comparison]) -> str:
    """What was found of a B from the gradient; empty without one."""
    rows = [method.first.row for method in methods if _of_gradient(method)]
    if not rows:
        return ""
    tests = [test for comparison in comparisons if comparison.role == RANDOM_B for test in comparison.tests]
    if tests:
        return f"Compared with a random orthonormal B, the B from the gradient is {_tally(tests)}."
    flags = f"--mode {rows[0].mode} --rank {rows[0].rank} --b-init orthonormal"
    return (
        f"No conclusion about the B from the gradient: there is no finished run of its random control. Train it with {flags}."
    )


def _tally(tests: Sequence[Test]) -> str:
    """`better in 2 (rouge1, rouge2) and undecided in 5 of 7 tests`."""
    parts = []
    for word in (BETTER, WORSE, EQUIVALENT, UNDECIDED):
        names = [title(test.measure) for test in tests if test.outcome == word]
        if names:
            named = f" ({', '.join(dict.fromkeys(names))})" if word in (BETTER, WORSE) and len(set(names)) <= 3 else ""
            parts.append(f"{word} in {'all ' if len(names) == len(tests) > 1 else ''}{len(names)}{named}")
    all_alike = len(parts) == 1 and len(tests) > 1
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{listed} tests" if all_alike else f"{listed} of {len(tests)} tests" if len(tests) > 1 else f"{listed} test"


def _credit(found: Sequence[Comparison], comparisons: Sequence[Comparison]) -> str:
    """What the information in B deserves where an informed B is better than LoRA; empty where it never is."""
    credited, shared, better = 0, 0, 0
    for comparison in found:
        for test in comparison.tests:
            if test.outcome != BETTER:
                continue
            better += 1
            random = [c for c in comparisons if c.one is comparison.one and c.role == RANDOM_B]
            controls = [
                c for c in comparisons if c.control and c.other is comparison.other and any(c.one is r.other for r in random)
            ]
            informed = [against for c in random if (against := c.test(test.measure))]
            likewise = [against for c in controls if (against := c.test(test.measure))]
            credited += bool(informed) and all(against.outcome == BETTER for against in informed)
            shared += any(against.outcome == BETTER for against in likewise)
    if not better or credited == better:
        return ""
    so_is = (
        ", but so is a random B"
        if shared == better
        else f", but so is a random B in {shared} of these {better}"
        if shared
        else ""
    )
    credit = (
        "no credit to the information in B"
        if not credited
        else f"the information in B gets credit in {credited} of these {better}"
    )
    return f"{so_is}: {credit}" if so_is else f", but it is not shown to be better than a random B: {credit}"


def title(measure: str) -> str:
    """The name of a measure in words."""
    return "held-out loss" if measure == LOSS else measure


def digits(measure: str) -> int:
    """The number of decimals for a measure."""
    return 2 if measure == "sacrebleu" else 3


def _amount(test: Test) -> str:
    places, found = digits(test.measure), test.found
    if found.ci95 is None:
        return f"{found.difference:+.{places}f}, no interval"
    low, high = found.ci95
    over = " over records only" if found.kind == EXAMPLES else ""
    return f"{found.difference:+.{places}f} [{low:+.{places}f}, {high:+.{places}f}]{over}"
