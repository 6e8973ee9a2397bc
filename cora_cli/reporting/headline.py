"""The headline of the verdict: what was found of the informed B, and of a B from the gradient, compared with each control."""

from collections.abc import Sequence

from cora_cli.experiments.stage_rules import MIN_SEEDS
from cora_cli.methods.registry import METHODS
from cora_cli.reporting.comparison import (
    LORA_RANK,
    LORA_SIZE,
    RANDOM_B,
    Comparison,
    is_informed,
    is_of_gradient,
    other_layers,
    title,
)
from cora_cli.reporting.learning_rate_sweep import AT_EDGE, UNSWEPT
from cora_cli.reporting.outcomes import BETTER, EQUIVALENT, FEW_SEEDS, UNDECIDED, WORSE, Test
from cora_cli.reporting.report_rows import Row
from cora_cli.reporting.statistics import MethodResults


def informed_headline(methods: Sequence[MethodResults], comparisons: Sequence[Comparison]) -> str:
    """What was found of the informed B in comparison with a random one and with LoRA."""
    informed = [method for method in methods if is_informed(method)]
    if not informed:
        return "No conclusion about an informed B: no method here takes its B from fine-tuned models. Train one with --mode fb --basis FILE."
    sentences = []
    for role, claim in (
        (RANDOM_B, "a random orthonormal B"),
        (LORA_RANK, "LoRA at equal rank"),
        (LORA_SIZE, "LoRA at equal trained parameters"),
    ):
        found = [comparison for comparison in comparisons if comparison.role == role and not comparison.control]
        tests = [test for comparison in found for test in comparison.tests]
        if tests:
            credit = "" if role == RANDOM_B else _credit(found, comparisons)
            sentences.append(f"Compared with {claim}{_where(found)}, the informed B is {_tally(tests)}{credit}.")
        elif role == LORA_RANK:
            ranks = " or ".join(dict.fromkeys(str(method.first.row.rank) for method in informed))
            sentences.append(
                f"No conclusion about LoRA at equal rank: there is no finished run of it. Train it with --mode lora --rank {ranks}."
            )
        if role == RANDOM_B:
            sentences += _without_control(informed, comparisons)
    tests = [test for comparison in comparisons for test in comparison.tests]
    if any(FEW_SEEDS in test.obstacle for test in tests):
        sentences.append(f"A decision needs at least {MIN_SEEDS} seeds per method.")
    if any(test.of_rates == UNSWEPT for test in tests):
        sentences.append("A decision needs learning rates that were swept alike.")
    if any(test.of_rates.startswith(AT_EDGE) for test in tests):
        sentences.append("A decision needs best learning rates inside their sweeps, not at the edge.")
    return " ".join(sentences)


def _where(found: Sequence[Comparison]) -> str:
    """On which layers the controls stand, where they are not those of the methods compared with them."""
    places = [other_layers(comparison.one, comparison.other) for comparison in found]
    named = " or ".join(dict.fromkeys(filter(None, places)))
    return f" ({'' if all(places) else 'in part '}{named})" if named else ""


def _without_control(informed: Sequence[MethodResults], comparisons: Sequence[Comparison]) -> list[str]:
    """A sentence on the informed methods that no random B of the same form was compared with."""
    controlled = [comparison.one for comparison in comparisons if comparison.role == RANDOM_B]
    without = [method for method in informed if not any(method is one for one in controlled)]
    if not without:
        return []
    names = "" if len(without) == len(informed) else f" of {' and of '.join(method.name for method in without)}"
    ways = dict.fromkeys(_control_flags(method.first.row) for method in without)
    return [
        f"No conclusion about the information in B{names}: there is no finished run of the random control. Train it with {' and '.join(ways)}."
    ]


def _control_flags(row: Row) -> str:
    """The flags that train the random control of a method with a B of its own choice, or one that is random without a basis."""
    free = row.mode in METHODS and METHODS[row.mode].b_init_is_free
    return f"--mode {row.mode} --rank {row.rank} {'--b-init orthonormal' if free else 'without --basis'}"


def gradient_headline(methods: Sequence[MethodResults], comparisons: Sequence[Comparison]) -> str:
    """What was found of a B from the gradient; empty without one."""
    rows = [method.first.row for method in methods if is_of_gradient(method)]
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
