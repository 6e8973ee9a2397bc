"""One comparison of the verdict, its outcome in words, and the kinds of method that the verdict tells apart."""

import dataclasses
from collections.abc import Collection, Iterable

from cora_cli.experiments.stage_rules import MIN_SEEDS
from cora_cli.methods.registry import BASELINE, METHODS
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.outcomes import BETTER, EQUIVALENT, UNDECIDED, WORSE, Test
from cora_cli.reporting.report_rows import Row
from cora_cli.reporting.statistics import EXAMPLES, Difference, MethodResults
from cora_cli.reporting.training_conditions import differing_conditions

RANDOM_B, BASE_B, LORA_RANK, LORA_SIZE, BASE = (
    "random orthonormal B",
    "B of the base model alone",
    "LoRA at equal rank",
    "LoRA at equal trained parameters",
    "base model without training",
)
NO_CONTROL = "without a random control of this form, no conclusion about the information in B"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`one` minus `other` in every measure that both have; `other` is a control of the kind `role`.

    `control` marks the line below an informed B's comparison with LoRA: the random B compared with the same LoRA. `baseline` marks the
    comparison of another method with LoRA, which says nothing about an informed B. `uncontrolled` marks an informed B's comparison with LoRA for
    which there is no random control, so that it says nothing about the information in B. `lost` says, in words, how many trainings of either method
    diverged; empty where none did.
    """

    one: MethodResults
    other: MethodResults
    role: str
    tests: tuple[Test, ...]
    control: bool = False
    baseline: bool = False
    uncontrolled: bool = False
    lost: str = ""

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
        notes = dict.fromkeys(note for test in self.tests for note in (test.obstacle, _seeds_in_words(test.found)) if note)
        if self.lost:
            notes[self.lost] = None
        if self.uncontrolled:
            notes[NO_CONTROL] = None
        if unlike := _not_trained_alike(self.one, self.other):
            notes[unlike] = None
        notes |= {known: None for method in (self.one, self.other) if (known := _known_prompts(method))}
        lead = "The random control, " if self.control else ""
        tail = f" ({'; '.join(notes)})" if notes else ""
        where = f", {elsewhere}" if (elsewhere := other_layers(self.one, self.other)) else ""
        return f"{lead}{self.one.name} compared with {self.other.name} ({self.role}{where}): {'; '.join(said)}{tail}."

    def test(self, measure: str) -> Test | None:
        """The test in one measure, if both methods have it."""
        return next((test for test in self.tests if test.measure == measure), None)


def lost_trainings(methods: Iterable[MethodResults], diverged: Collection[Row]) -> str:
    """In words, how many trainings of the methods at their learning rates are among the `diverged`, so that only the others are compared; empty for none."""
    found = []
    for method in methods:
        row = method.first.row
        if count := sum((one.identity, one.learning_rate) == (row.identity, row.learning_rate) for one in diverged):
            found.append(
                f"without {count} of {count + len(method.results)} trainings of {method.name}, which diverged, so that it may look better than it is"
            )
    return "; ".join(found)


def plan_of(method: MethodResults) -> dict[str, object]:
    """The plan of the method's adapter; empty without one."""
    return method.first.record.get("plan") or {}


def other_layers(one: MethodResults, other: MethodResults) -> str:
    """In words, what `other` adapts where `one` adapts other layers; empty where both adapt the same ones, or one is no adapter."""
    ours, theirs = (plan_of(method).get("target_modules") for method in (one, other))
    if not isinstance(ours, list) or not isinstance(theirs, list) or {*ours} == {*theirs}:
        return ""
    return f"on {_listed(theirs)} instead of {_listed(ours)}"


def _not_trained_alike(one: MethodResults, other: MethodResults) -> str:
    """In words, what two methods were trained with that differs; empty without such a difference."""
    differing = differing_conditions([*one.results, *other.results])
    listed = ", ".join(f"{name} {' and '.join(values)}" for name, values in differing.items())
    return f"not trained alike: {listed}" if listed else ""


def _known_prompts(method: MethodResults) -> str:
    """In words, how many of the prompts a method, or the models behind it, were trained on; empty where it is none."""
    data = [own for result in method.results if LOSS in result.measures and (own := result.record.get("data"))]
    counts = [(known, one["test"]["records"]) for one in data if (known := one.get("held_out_trained_on"))]
    made = [result.generation for result in method.results]
    counts += [(known, one["answers"]) for one in made if (known := one.get("prompts_trained_on")) and "answers" in one]
    most, of = max(counts, default=(0, 0))
    return f"{method.name} or the models behind it were trained on {most} of the {of} prompts" if most else ""


def is_lora(method: MethodResults) -> bool:
    """Whether it is LoRA on the base model itself. With a start of its own, such as the mean of other models' ΔW, or on weights of 4 bits (QLoRA),
    it is another method."""
    settings = (method.first.record.get("fingerprint") or {}).get("settings") or {}
    return method.first.row.mode == BASELINE and not plan_of(method).get("start") and not settings.get("load_in_4bit")


def is_informed(method: MethodResults) -> bool:
    """Whether its B starts as the subspace of fine-tuned models, on the base model itself."""
    plan = plan_of(method)
    averaged = "laplace" in method.first.record
    return plan.get("b_init") == "basis" and not plan.get("start") and method.first.row.n_models != 0 and not averaged


def is_of_gradient(method: MethodResults) -> bool:
    """Whether its B starts from the gradient of the training data by choice."""
    mode = method.first.row.mode
    return plan_of(method).get("b_init") == "gradient" and mode in METHODS and METHODS[mode].b_init_is_free


def _listed(names: Iterable[str]) -> str:
    *first, last = sorted(names)
    return f"{', '.join(first)} and {last}" if first else last


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


def _seeds_in_words(found: Difference) -> str:
    """How many seeds the difference uses, where the two methods did not finish equally many or not the same; else empty."""
    first, second = found.finished
    if first is None or second is None:
        return ""
    if not found.paired:
        return f"{first} and {second} seeds, not paired: fewer than {MIN_SEEDS} in common"
    shared = found.fewest_seeds
    if first == second == shared:
        return ""
    return f"over the {shared} seeds that both have, of {first} and {second}"
