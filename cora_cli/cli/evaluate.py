"""`cora evaluate`: score runs, a model or saved predictions, and print the metrics with confidence intervals."""

from typing import TYPE_CHECKING

import typer

from cora_cli.cli.command import command
from cora_cli.cli.next_step import say_next
from cora_cli.environment import is_first_process
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.metrics import scales, unscorable_references
from cora_cli.evaluation.shortcomings import KINDS
from cora_cli.render.table import Cell, number, p_value_text, table_text, with_interval
from cora_cli.terminal import columns, show

if TYPE_CHECKING:
    from cora_cli.evaluation.scoring import Evaluation

DIGITS = {"sacrebleu": 2}


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "evaluate", EvaluateConfig, run, what_is_saved, spreads=True)


def what_is_saved(config: EvaluateConfig) -> str:
    """What an interrupted evaluation leaves, and how it goes on."""
    if config.dry_run:
        return "nothing was written"
    return "answers that are complete are kept, and the same command goes on with the others"


def run(config: EvaluateConfig) -> None:
    """Answer held-out records and score the answers.

    The metrics are ROUGE, METEOR, SacreBLEU and BERTScore; pass@1 and the like run the answers as code.

    Started by torchrun, all processes answer, and the first one writes and scores.

    --metrics calibration measures the probabilities of the reference answers' tokens: NLL, Brier score and calibration error.
    """
    if config.dry_run:
        _plan(config)
        return
    from cora_cli.evaluation.evaluate import evaluate

    results = evaluate(config)
    if not results:  # under torchrun, the first process prints
        return
    show(metrics_table(results, columns()))
    show(f"\nvalue [95 % bootstrap interval over the {_counted(results)}]; {scales(config.metric_names)}")
    for name in results[0].record["metrics"]:
        show(f"{name}: {' / '.join(dict.fromkeys(result.signature(name) for result in results))}")
    unscorable = [
        (result.name, said) for result in results for said in unscorable_references(result.record["metrics"]).values()
    ]
    for name, said in dict.fromkeys(unscorable):
        show(f"note: {name}: {said}")
    for result in results:
        if counts := result.record["shortcomings"]:
            said = "; ".join(f"{count} of {_records(result)} answers {KINDS[kind]}" for kind, count in counts.items())
            show(f"note: {result.name}: {said}")
        if fates := result.record.get("fates"):
            counts = ", ".join(f"{count} {fate}" for fate, count in fates.items())
            show(f"{result.name}: {sum(fates.values())} programs: {counts}")
        for proxy in result.record.get("readability_proxies", {}).values():
            show(f"{result.name}: proxy of readability: {proxy['what']}: {with_interval(proxy['value'], proxy['ci95'], 3)}")
    for group in _comparable(results) if len(results) > 1 else []:
        _show_differences(group)
    reported = config.runs if config.runs and not config.output_dir else (config.output_dir,)
    if all(reported):
        say_next(
            f"{', '.join(str(out) for out in reported)} {'is' if len(reported) == 1 else 'are'} evaluated",
            "report",
            *reported,
            "-o",
            "report",
        )


def _comparable(results: "list[Evaluation]") -> "list[list[Evaluation]]":
    """The evaluations in groups, each of the same records, to be compared with the first one: the runs of a base model with that."""
    groups: list[list[Evaluation]] = []
    for result in results:
        same = [group for group in groups if group[0].references_sha256 == result.references_sha256]
        if same and not result.of_base:
            same[-1].append(result)
        else:
            groups.append([result])
    return groups


def _show_differences(group: "list[Evaluation]") -> None:
    """Print how the later evaluations of a group differ from the first, and what may be behind that apart from the models."""
    first, *others = group
    if not others:
        if not first.of_base:
            show(f"note: {first.name} answered other records than the others, so it is compared with none of them")
        return
    show(f"\npaired differences from {first.name}, with two-sided p-values (not corrected for multiple comparisons)")
    show(differences_table(group, columns()))
    if asked := [result.name for result in others if result.prompts_sha256 != first.prompts_sha256]:
        show(
            f"note: {', '.join(asked)} {'was' if len(asked) == 1 else 'were'} asked other prompts than {first.name}, with equal "
            "references, so that differences are not of the models alone"
        )
    for sentence in _not_compared(group):
        show(sentence)


def _plan(config: EvaluateConfig) -> None:
    from cora_cli.evaluation.preflight import describe, preflight

    if is_first_process():
        show(describe(preflight(config)))


def _counted(results: "list[Evaluation]") -> str:
    """The number of records behind the values; with that of each evaluation where their records differ."""
    counts = {result.name: _records(result) for result in results}
    if len({result.references_sha256 for result in results}) == 1:
        return f"n = {next(iter(counts.values()))} records"
    return f"records, which differ: {', '.join(f'n = {n} of {name}' for name, n in counts.items())}"


def _records(result: "Evaluation") -> int:
    return int(next(iter(result.record["metrics"].values()))["n"])


def _not_compared(results: "list[Evaluation]") -> list[str]:
    """One sentence for each evaluation with metrics that were not measured as those of the first one, as on another tokenizer's tokens."""
    first, found = results[0], []
    for result in results[1:]:
        if names := [name for name in first.record["metrics"] if not result.is_measured_as(first, name)]:
            found.append(
                f"note: {', '.join(names)} of {result.name} and of {first.name} have different signatures, so they are not compared; values per token of "
                "different tokenizers cannot be"
            )
    return found


def metrics_table(results: "list[Evaluation]", width: int | None = None) -> str:
    """One row per evaluated model, one column per metric, in lines of at most `width` characters."""
    names = list(results[0].record["metrics"])
    rows = []
    for result in results:
        metrics = result.record["metrics"]
        cells = [number(metrics[name]["value"], metrics[name]["ci95"], DIGITS.get(name, 3)) for name in names]
        rows.append([Cell(result.name), *cells])
    return table_text(["run", *names], rows, width)


def differences_table(results: "list[Evaluation]", width: int | None = None) -> str:
    """Each later evaluation minus the first, paired over the same records; one row per evaluation."""
    from cora_cli.evaluation.scoring import paired_differences

    names = list(results[0].record["metrics"])
    rows = []
    for result in results[1:]:
        differences = paired_differences(result, results[0])
        cells = [
            number(found.difference, found.ci95, DIGITS.get(name, 3), f"p{p_value_text(found.p_value)}")
            if (found := differences.get(name))
            else Cell()
            for name in names
        ]
        rows.append([Cell(result.name), *cells])
    return table_text(["run", *names], rows, width)
