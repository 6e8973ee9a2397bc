"""What the paired tests say of an informed B, by one stated rule, in words and numbers.

A method whose B starts as the subspace of fine-tuned models is compared with its controls; the rule decides, no judgement is added.
"""

import dataclasses
from collections.abc import Sequence

from cora_cli.intervals import PairedDifference
from cora_cli.methods.registry import BASELINE
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.statistics import (
    LEVEL,
    Method,
    compare,
    differences_by_seed,
    higher_is_better,
    holm,
    resamples_for,
    t_interval,
)

RANDOM_B, BASE_B, LORA_RANK, LORA_SIZE, BASE = (
    "random orthonormal B",
    "B of the base model alone",
    "LoRA at equal rank",
    "LoRA at equal trained parameters",
    "base model without training",
)
# "Equal" sizes: ranks are whole numbers, so that the nearest one may be off by some per cent.
_EQUAL_SIZE = 0.05
BETTER, WORSE, NONE = "better", "worse", "no difference could be shown"


@dataclasses.dataclass(frozen=True)
class Test:
    """One measure of one comparison. `p_holm` is corrected over all tests of the group's verdict, `outcome` BETTER, WORSE or NONE;
    of `seeds` seeds that both sides have, `agreeing` differ in the direction of the difference. `over_seeds` is the mean of the
    differences of equal seeds, which share their order of data, with the half-width of its 95 % t-interval; None for one seed.
    """

    measure: str
    paired: PairedDifference
    p_holm: float
    outcome: str
    agreeing: int
    seeds: int
    over_seeds: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`one` minus `other`, a control of the kind `role`, in every measure that both have."""

    one: Method
    other: Method
    role: str
    tests: tuple[Test, ...]

    def sentence(self) -> str:
        """The outcome in words, with the numbers of what was shown, and of the held-out loss where nothing was shown of it."""
        said = [
            f"{word} in {', '.join(_amount(test) for test in tests)}"
            for word in (BETTER, WORSE)
            if (tests := [test for test in self.tests if test.outcome == word])
        ]
        silent = [test for test in self.tests if test.outcome == NONE]
        if len(silent) == 1:
            said.append(f"{NONE} in {title(silent[0].measure)}")
        elif silent:
            where = "any of the" if len(silent) == len(self.tests) else "the other"
            said.append(f"{NONE} in {where} {len(silent)} measures")
        said += [f"{_amount(test, 'differs by')}, uncorrected" for test in silent if test.measure == LOSS]
        return f"{self.one.name} against {self.other.name} ({self.role}): {'; '.join(said)}."


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The headline, the comparisons behind it, and the rule by which they were decided."""

    headline: str
    comparisons: tuple[Comparison, ...]
    rule: str


def judge(methods: Sequence[Method], measures: Sequence[str], seed: int = 0) -> Verdict:
    """The verdict on one group of methods that share data and evaluation."""
    pairs = [(one, other, role) for one in methods if _informed(one) for other, role in _controls(one, methods)]
    planned = [
        (place, name)
        for place, (one, other, _) in enumerate(pairs)
        for name in measures
        if one.with_measure(name) and other.with_measure(name)
    ]
    resamples = resamples_for(len(planned))
    found = [compare(*pairs[place][:2], name, seed, resamples) for place, name in planned]
    paired = [difference for difference in found if difference is not None]
    corrected = holm([difference.p_value for difference in paired])
    tests: list[list[Test]] = [[] for _ in pairs]
    for (place, name), difference, p_holm in zip(planned, paired, corrected, strict=True):
        tests[place].append(_test(*pairs[place][:2], name, difference, p_holm))
    comparisons = tuple(Comparison(*pair, tuple(made)) for pair, made in zip(pairs, tests, strict=True) if made)
    rule = (
        f"Rule: paired approximate randomisation over the same prompts (held-out loss: over the same records), each prompt's outputs of "
        f"all seeds kept together, {resamples:,} resamples; Holm-corrected over the {len(planned)} tests of this verdict; better or worse "
        f"where the corrected p is below {LEVEL:g} and every seed differs in that direction, otherwise {NONE}, which does not mean that "
        "there is none. Differences have 95 % paired bootstrap intervals over prompts, uncorrected, which do not hold the spread over "
        "training seeds; that is in the column beside them: the mean difference of equal seeds with its 95 % t-interval."
    )
    return Verdict(_headline(methods, comparisons), comparisons, rule)


def _plan(method: Method) -> dict[str, object]:
    return method.first.record.get("plan") or {}


def _informed(method: Method) -> bool:
    return _plan(method).get("b_init") == "basis" and method.first.row.n_models != 0


def _controls(one: Method, methods: Sequence[Method]) -> list[tuple[Method, str]]:
    row, trained = one.first.row, one.first.trained
    found = []
    for role in (RANDOM_B, BASE_B, LORA_RANK, LORA_SIZE, BASE):
        for other in methods:
            theirs, start = other.first.row, _plan(other).get("b_init")
            same_rank = theirs.rank == row.rank
            like = theirs.mode == row.mode and same_rank
            size = other.first.trained
            fits = {
                RANDOM_B: like and start == "orthonormal",
                BASE_B: like and start == "basis" and theirs.n_models == 0,
                LORA_RANK: theirs.mode == BASELINE and same_rank,
                LORA_SIZE: theirs.mode == BASELINE
                and not same_rank
                and bool(size and trained)
                and abs((size or 0) - (trained or 0)) <= _EQUAL_SIZE * (trained or 0),
                BASE: theirs.mode == "base",
            }
            if fits[role] and theirs.model == row.model:
                found.append((other, role))
    return found


def _test(one: Method, other: Method, name: str, paired: PairedDifference, p_holm: float) -> Test:
    sign = 1 if higher_is_better(name) else -1
    by_seed = differences_by_seed(one, other, name)
    agreeing = sum(difference * paired.difference > 0 for difference in by_seed)
    outcome = NONE
    if p_holm < LEVEL and paired.difference and agreeing == len(by_seed):
        outcome = BETTER if sign * paired.difference > 0 else WORSE
    over_seeds = t_interval(by_seed) if len(by_seed) > 1 else None
    return Test(name, paired, p_holm, outcome, agreeing, len(by_seed), over_seeds)


def _headline(methods: Sequence[Method], comparisons: Sequence[Comparison]) -> str:
    if not any(_informed(method) for method in methods):
        return "No method here has a B taken from fine-tuned models, so there is nothing to say on whether one helps."
    sentences = []
    for role, claim in ((RANDOM_B, "a random orthonormal B"), (LORA_RANK, "LoRA at equal rank")):
        tests = [test for comparison in comparisons if comparison.role == role for test in comparison.tests]
        if not tests:
            sentences.append(f"There is no finished comparison with {claim}, so nothing can be said against it.")
            continue
        better, worse = (sum(test.outcome == word for test in tests) for word in (BETTER, WORSE))
        total = f"{len(tests)} tests"
        if better and worse:
            sentences.append(f"Against {claim} the informed B was better in {better} and worse in {worse} of {total}.")
        elif better or worse:
            sentences.append(
                f"Against {claim} the informed B was {BETTER if better else WORSE} in {better or worse} of {total} and "
                f"{WORSE if better else BETTER} in none."
            )
        else:
            sentences.append(f"Against {claim} {NONE} in any of {total}.")
    if comparisons and all(test.seeds == 1 for comparison in comparisons for test in comparison.tests):
        sentences.append("Each method was trained with one seed, so what another seed would have changed is not known.")
    return " ".join(sentences)


def title(measure: str) -> str:
    """A measure's name in words."""
    return "held-out loss" if measure == LOSS else measure


def digits(measure: str) -> int:
    """Decimals that a measure is shown with."""
    return 2 if measure == "sacrebleu" else 3


def _amount(test: Test, verb: str = "by") -> str:
    places, paired = digits(test.measure), test.paired
    low, high = paired.ci95
    return f"{title(test.measure)} {verb} {paired.difference:+.{places}f} [{low:+.{places}f}, {high:+.{places}f}]"
