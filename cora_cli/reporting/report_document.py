"""Builds the document of a report: verdict, tables, figures, conditions, methods and missing rows, in reading order.

`render` writes the same document in every format.
"""

from collections.abc import Sequence

from cora_cli.render.canvas import Figure
from cora_cli.render.document import Block, Heading, Items, Text
from cora_cli.reporting.comparison import BASE
from cora_cli.reporting.forest import FOREST
from cora_cli.reporting.judge_section import judge_section, unlike_judgings
from cora_cli.reporting.methods_section import methods_paragraphs
from cora_cli.reporting.programs import program_tables
from cora_cli.reporting.results import places_apart
from cora_cli.reporting.summary import Group, Summary
from cora_cli.reporting.tables import costs_table, scores_table, sweep_table, verdict_table


def build_document(summary: Summary, figures: Sequence[Figure] = (), brief: bool = False) -> list[Block]:
    """The complete report of one experiment; a `brief` one has neither the tests behind the verdict nor the paragraphs on methods."""
    experiment, missing = summary.collection.experiment, summary.collection.missing
    blocks: list[Block] = [Heading(1, experiment.title)]
    if summary.groups:
        # The page opens with a picture of its verdict.
        blocks += [Heading(2, "Verdict"), *(figure for figure in figures if figure.name.endswith(FOREST))]
    if experiment.preset:
        blocks.append(Text(f"Preset {experiment.preset}: models, data and sizes differ from the paper's; see Conditions."))
    rows = {entry.row.name for entry in missing if entry.part == "run"}
    if summary.groups or rows:
        done = len(summary.collection.results)
        blocks.append(Text(f"{done} of {done + len(rows)} rows are finished."))
    if summary.groups:
        for group in summary.groups:
            blocks += _verdict(group, named=len(summary.groups) > 1, brief=brief)
        blocks += _tables(summary, brief)
    if summary.collection.judged:
        blocks.append(Heading(2, "Judge"))
        several = len(summary.collection.judged) > 1
        for judged, place in zip(summary.collection.judged, places_apart(summary.collection.judged), strict=True):
            which = ", ".join(filter(None, (judged.group if several else None, place)))
            blocks += judge_section(judged.record, judged.printed, which)
        blocks += unlike_judgings([judged.record for judged in summary.collection.judged])
    others = [figure for figure in figures if not figure.name.endswith(FOREST)]
    if others:
        blocks += [Heading(2, "Figures"), *others]
    if experiment.conditions:
        blocks += [Heading(2, "Conditions"), Items(experiment.conditions)]
    if summary.groups and not brief:
        blocks += [Heading(2, "Methods"), *map(Text, methods_paragraphs(summary))]
    if missing:
        reasons = tuple(f"{entry.row.name} ({entry.part}): {entry.reason}" for entry in missing)
        blocks += [Heading(2, "Missing"), Items(reasons)]
    return blocks


def _tables(summary: Summary, brief: bool) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Tables")]
    for group in summary.groups:
        blocks += [scores_table(group, summary.collection.experiment.paper_table), costs_table(group)]
        blocks += [sweep_table(group)] if group.selected_by else []
        blocks += [verdict_table(group)] if group.verdict.comparisons and not brief else []
    programs = [table for group in summary.groups for table in program_tables(group)]
    return [*blocks, Heading(2, "Programs"), *programs] if programs else blocks


def _verdict(group: Group, named: bool, brief: bool) -> list[Block]:
    verdict = group.verdict
    blocks: list[Block] = [Text(f"{group.name}: {verdict.headline}" if named else verdict.headline, "verdict")]
    if verdict.comparisons:
        # The comparison with the untrained base model is only in the table.
        shown = [comparison for comparison in verdict.comparisons if comparison.role != BASE]
        informed = tuple(comparison.sentence() for comparison in shown if not comparison.baseline)
        others = tuple(comparison.sentence() for comparison in shown if comparison.baseline)
        blocks += [Items(informed)] if informed else []
        blocks += [Text("Other methods compared with LoRA:"), Items(others)] if others else []
        place = "The written report" if brief else "The table of tests below"
        blocks.append(
            Text(
                f"Tests over seeds and records, Holm-corrected, decide what counts as better or worse. {place} has every result and the rule.",
                "note",
            )
        )
    return blocks
