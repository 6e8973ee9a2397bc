"""The verdict of `cora report`: does an informed B help, compared with its controls?

A B is informed if it starts as the subspace of fine-tuned models. Paired tests decide by the rule that the report prints.
"""

import dataclasses
from collections.abc import Sequence

from cora_cli.intervals import PairedDifference
from cora_cli.methods.registry import BASELINE
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.statistics import (
    LEVEL,
    MethodResults,
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
# Ranks are integers, so the closest LoRA may differ by a few per cent in trained parameters and still count as equal.
_EQUAL_SIZE = 0.05
BETTER, WORSE, NONE = "better", "worse", "no difference could be shown"


@dataclasses.dataclass(frozen=True)
class Test:
    """One measure of one comparison.

    `p_holm` is Holm-corrected over all tests of the group's verdict, and `outcome` is BETTER, WORSE or NONE. Both sides share `seeds`
    seeds, of which `agreeing` have a difference with the sign of the overall one. `over_seeds` is the mean difference of runs with the
    same seed, which see the data in the same order, and the half-width of its 95 % t-interval; None for a single seed.
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
    """`one` minus `other` in every measure that both have; `other` is a control of the kind `role`."""

    one: MethodResults
    other: MethodResults
    role: str
    tests: tuple[Test, ...]

    def sentence(self) -> str:
        """The outcome in words, with the differences that were shown, and that of the held-out loss in any case."""
        said = [
            f"{word} in {', '.join(f'{title(test.measure)} ({_amount(test)})' for test in tests)}"
            for word in (BETTER, WORSE)
            if (tests := [test for test in self.tests if test.outcome == word])
        ]
        silent = [test for test in self.tests if test.outcome == NONE]
        if len(silent) == 1:
            said.append(f"{NONE} in {title(silent[0].measure)}")
        elif silent:
            where = "any of the" if len(silent) == len(self.tests) else "the other"
            said.append(f"{NONE} in {where} {len(silent)} measures")
        said += [
            f"the {title(test.measure)} differs by {_amount(test)} (not corrected for multiple tests)"
            for test in silent
            if test.measure == LOSS
        ]
        return f"{self.one.name} compared with {self.other.name} ({self.role}): {'; '.join(said)}."


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The headline, the comparisons behind it, and the rule that decided them."""

    headline: str
    comparisons: tuple[Comparison, ...]
    rule: str


def judge(methods: Sequence[MethodResults], measures: Sequence[str], seed: int = 0) -> Verdict:
    """The verdict on one group of methods with the same data and evaluation; `seed` draws the resamples of the tests."""
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
    comparisons = tuple(Comparison(*pair, tuple(found)) for pair, found in zip(pairs, tests, strict=True) if found)
    rule = (
        f"Rule: every test is a paired approximate randomisation over the same prompts (held-out loss: the same records) with {resamples:,} "
        f"resamples; the outputs of all seeds for one prompt stay together. The p-values are Holm-corrected over the {len(planned)} tests of this "
        f"verdict. The outcome is better or worse if the corrected p is below {LEVEL:g} and every seed differs in that direction. Otherwise "
        f"{NONE}, which does not mean that there is none. Column difference: with its 95 % paired bootstrap interval over prompts, "
        "which is not corrected for multiple tests and excludes the spread over training seeds. Column over seeds: the mean difference of runs "
        "with the same seed, with its 95 % t-interval over seeds."
    )
    return Verdict(_headline(methods, comparisons), comparisons, rule)


def _plan(method: MethodResults) -> dict[str, object]:
    return method.first.record.get("plan") or {}


def _informed(method: MethodResults) -> bool:
    return _plan(method).get("b_init") == "basis" and method.first.row.n_models != 0


def _controls(one: MethodResults, methods: Sequence[MethodResults]) -> list[tuple[MethodResults, str]]:
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


def _test(one: MethodResults, other: MethodResults, name: str, paired: PairedDifference, p_holm: float) -> Test:
    sign = 1 if higher_is_better(name) else -1
    by_seed = differences_by_seed(one, other, name)
    agreeing = sum(difference * paired.difference > 0 for difference in by_seed)
    outcome = NONE
    if p_holm < LEVEL and paired.difference and agreeing == len(by_seed):
        outcome = BETTER if sign * paired.difference > 0 else WORSE
    over_seeds = t_interval(by_seed) if len(by_seed) > 1 else None
    return Test(name, paired, p_holm, outcome, agreeing, len(by_seed), over_seeds)


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
        tests = [test for comparison in comparisons if comparison.role == role for test in comparison.tests]
        if not tests:
            sentences.append(f"No conclusion about {control}: there is no finished run of it. Train it with {flags}.")
            continue
        better, worse = (sum(test.outcome == word for test in tests) for word in (BETTER, WORSE))
        total = f"{len(tests)} tests"
        if better and worse:
            sentences.append(f"Compared with {claim}, the informed B was better in {better} and worse in {worse} of {total}.")
        elif better or worse:
            sentences.append(
                f"Compared with {claim}, the informed B was {BETTER if better else WORSE} in {better or worse} of {total} and "
                f"{WORSE if better else BETTER} in none."
            )
        else:
            sentences.append(f"Compared with {claim}, the informed B made no difference that could be shown in any of {total}.")
    if comparisons and all(test.seeds == 1 for comparison in comparisons for test in comparison.tests):
        sentences.append("Each method was trained with only one seed, so the spread over seeds is unknown.")
    return " ".join(sentences)


def title(measure: str) -> str:
    """The name of a measure in words."""
    return "held-out loss" if measure == LOSS else measure


def digits(measure: str) -> int:
    """The number of decimals for a measure."""
    return 2 if measure == "sacrebleu" else 3


def _amount(test: Test) -> str:
    places, paired = digits(test.measure), test.paired
    if paired.ci95 is None:
        return f"{paired.difference:+.{places}f} (one record)"
    low, high = paired.ci95
    return f"{paired.difference:+.{places}f} [{low:+.{places}f}, {high:+.{places}f}]"
