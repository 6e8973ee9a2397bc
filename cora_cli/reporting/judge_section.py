"""The tables of a judging: the scores, next to the paper's where it has them, and what the anchors say about the judge."""

from collections.abc import Mapping, Sequence
from typing import Any

from cora_cli import hashing
from cora_cli.evaluation.judge.rubrics import SHIPPED
from cora_cli.experiments.paper import paper_row
from cora_cli.render.document import Block, Text
from cora_cli.render.table import Cell, Table
from cora_cli.reporting.report_rows import clean

_PAPER_TABLES = {"paper": "gpt4_judge", "readability": "code_review"}
"""The paper's table with the criteria of a shipped rubric."""


def judge_section(record: Mapping[str, Any], printed: Mapping[str, str] | None = None, which: str = "") -> list[Block]:
    """The blocks for one `judge.json`. `printed` has the paper's name of a judged system; its own name is tried otherwise. `which` tells it
    from others of a report: the group or the directory.
    """
    judge = clean(record["judge"]["model"])
    served = [name for name in map(clean, record["served_models"]) if name != judge]
    answered_as = f", which answered as {', '.join(served)}" if served else ""
    blocks: list[Block] = []
    for name, rubric in record["rubrics"].items():
        title = f"{f'{clean(which)} – ' if which else ''}{judge}{answered_as}, rubric {clean(name)}"
        blocks.append(Text(f"{f'{clean(which)}: ' if which else ''}{_verdict(judge, clean(name), rubric)}", "verdict"))
        if failed := sum(rubric["failed"].values()):
            where = ", ".join(f"{count} of {clean(names)}" for names, count in rubric["failed"].items())
            blocks.append(Text(f"{failed} of {rubric['asked']} judgments were not obtained ({where}); they count as missing."))
        if rubric["pairs"]:
            blocks += _pair_tables(title, rubric, record["records"])
        else:
            # The questions that are not about the models' answers or the references.
            shuffled = rubric["asked"] // (1 + record["retest"]) - (len(record["systems"]) + 1) * record["records"]
            blocks += _score_tables(title, name, rubric, record["records"], shuffled, printed or {})
    return blocks


def unlike_judgings(records: Sequence[Mapping[str, Any]]) -> list[Block]:
    """A sentence for each judge that did not judge alike in all of the `judge.json`, in what decides about scores and no title shows."""
    blocks: list[Block] = []
    for name in dict.fromkeys(record["judge"]["model"] for record in records):
        own = [record for record in records if record["judge"]["model"] == name]
        settings = {
            key: {hashing.sha256_json(one["judge"].get(key)) for one in own} for record in own for key in record["judge"]
        }
        rubrics = {
            f"the text of rubric {rubric}": {one["rubrics"][rubric]["sha256"] for one in own if rubric in one["rubrics"]}
            for record in own
            for rubric in record["rubrics"]
        }
        if differing := [clean(key) for key, values in {**settings, **rubrics}.items() if len(values) > 1]:
            blocks.append(
                Text(
                    f"The judgings by {clean(name)} differ in {', '.join(differing)}, from which differences in scores may come; each judge.json has the values."
                )
            )
    return blocks


def papers_scores(rubric: str, printed: str) -> dict[str, float]:
    """The paper's scores of a row by criterion, for the shipped rubrics that have its criteria; empty where it has none."""
    return paper_row(_PAPER_TABLES.get(rubric) if rubric in SHIPPED else None, printed)


def _verdict(model: str, name: str, rubric: Mapping[str, Any]) -> str:
    anchors = (
        {"preference": rubric["pairs"]["gold_over_shuffled"]}
        if rubric["pairs"]
        else {key: entry["gold_minus_shuffled"] for key, entry in rubric["criteria"].items() if entry["anchored"]}
    )

    def shown(names: Sequence[str]) -> str:
        digits = 2 if rubric["pairs"] else 1
        return "; ".join(f"{key} {_cell(anchors.get(key), digits).plain()}" for key in names)

    if out := rubric["disqualified"]:
        mute = "It gave no judgment at all. " if sum(rubric["failed"].values()) == rubric["asked"] else ""
        return (
            f"Rubric {name}: the judge {model} is disqualified. {mute}It is not shown to tell reference answers from references of other prompts "
            f"(reference minus shuffled: {shown(out)}), so its numbers say nothing about the models."
        )
    return (
        f"Rubric {name}: the judge {model} tells reference answers from references of other prompts (reference minus shuffled: "
        f"{shown(list(anchors))})."
    )


def _score_tables(
    title: str, name: str, rubric: Mapping[str, Any], records: int, shuffled: int, printed: Mapping[str, str]
) -> list[Block]:
    criteria = rubric["criteria"]
    names = dict.fromkeys(answers for entry in criteria.values() for answers in entry["scores"])
    rows = []
    for answers in names:
        paper = papers_scores(name, printed.get(answers, answers))
        rows.append(
            (Cell(clean(answers)), *(_cell(entry["scores"].get(answers), 1, paper.get(key)) for key, entry in criteria.items()))
        )
    compared = [cell for row in rows for cell in row if cell.published is not None]
    scored = [entry["scores"].get(answers) for entry in criteria.values() for answers in names]
    notes = [
        f"0-100, mean [95 % interval over records], {_records(scored, rubric, records)}; the last two rows are the anchors."
    ]
    if shuffled < records:
        notes.append(
            f"{shuffled} of {records} records have a shuffled reference: more than half of all references are one text, and a shuffled one differs."
        )
    notes += ["In parentheses: the paper's GPT-4, or its reviewers, on its own models and data."] if compared else []
    blocks: list[Block] = [Table(f"{title}: scores", ("answers", *criteria), tuple(rows), tuple(notes))]
    anchors = [
        (
            Cell(f"{clean(key)}{'' if entry['anchored'] else ' (not anchored)'}"),
            _cell(entry["gold_minus_shuffled"], 1),
            *_retest_cells(entry["retest"]),
            _cell((entry["retest"] or {}).get("noise"), 1),
            _cell(entry["length_slope"], 1),
            _cell(entry["length_correlation"], 2),
            _cell(entry["sensitivity"], 2),
            _cell(entry["specificity"], 2),
        )
        for key, entry in criteria.items()
    ]
    headers = ("criterion", "reference minus shuffled", "retest κ", "retest agreement", "noise", "length slope", "length r")
    explained = (
        "retest: two judgments of one answer, κ with quadratic weights, agreement as the share of equal scores. noise: standard deviation of one "
        "score. length slope: points per 100 characters among the anchors; length r: their correlation. sensitivity: references that reach "
        f"{rubric['pass_mark']:g} points; specificity: shuffled ones that do not. What is not anchored need not tell them apart.",
    )
    blocks.append(Table(f"{title}: the judge", (*headers, "sensitivity", "specificity"), tuple(anchors), explained))
    columns = ("answers", "criterion", "observed", "corrected")
    shares = [
        (Cell(clean(answers)), Cell(clean(key)), _cell(share["observed"], 2), _cell(share["corrected"], 2))
        for key, entry in criteria.items()
        for answers, share in (entry["accepted"] or {}).items()
    ]
    note = (
        "observed: as judged. corrected: for the judge's measured sensitivity and specificity, which enter the interval; it supposes that the judge "
        "errs on the models' answers as often as on the anchors. –: the judge cannot be corrected.",
    )
    return [
        *blocks,
        Table(f"{title}: share of answers of {rubric['pass_mark']:g} points or more", columns, tuple(shares), note),
    ]


def _pair_tables(title: str, rubric: Mapping[str, Any], records: int) -> list[Block]:
    pairs = rubric["pairs"]
    wins = tuple(
        (Cell(clean(names)), _cell(share["observed"], 2), _cell(share["corrected"], 2))
        for names, share in pairs["wins"].items()
    )
    note = (
        "Share of wins of the first answer over the second [95 % interval over records], ties as halves, in both orders, "
        f"{_records([share['observed'] for share in pairs['wins'].values()], rubric, records)}. corrected: for how often the judge prefers a reference to a shuffled one. –: the judge cannot be corrected.",
    )
    judge = (
        _cell(pairs["gold_over_shuffled"], 2),
        _cell(pairs["order_bias"], 2),
        _cell(pairs["order_flips"], 2),
        _cell(pairs["length_bias"], 2),
        *_retest_cells(pairs["retest"]),
    )
    headers = ("reference over shuffled", "order bias", "flips", "length bias", "retest κ", "retest agreement")
    explained = (
        "reference over shuffled: wins minus losses. order bias: how much more often the answer that is shown first wins than the second, over "
        "all pairs in both orders. flips: pairs whose winner changes with the order. length bias: how much more often the reference wins where it is "
        "longer than the shuffled one.",
    )
    return [
        Table(f"{title}: preferences", ("answers", "observed", "corrected"), wins, note),
        Table(f"{title}: the judge", ("", *headers), ((Cell("preference"), *judge),), explained),
    ]


def _records(found: Sequence[Mapping[str, Any] | None], rubric: Mapping[str, Any], records: int) -> str:
    """From how many records the numbers of a table come; a record without a judgment of an answer has no part in its number."""
    counts = [entry["n"] if entry else 0 for entry in found]
    fewest, most = (min(counts), max(counts)) if counts else (records, records)
    if fewest == records:
        return f"n = {records} records"
    why = ", since judgments are missing" if rubric["failed"] else ""
    return f"n = {f'{fewest} to {most}' if fewest < most else most} of {records} records{why}"


def _retest_cells(retest: Mapping[str, Any] | None) -> tuple[Cell, Cell]:
    found = retest or {}
    return _cell(found.get("kappa"), 2), _cell(found.get("agreement"), 2)


def _cell(found: Mapping[str, Any] | None, digits: int, published: float | None = None) -> Cell:
    if found is None:
        return Cell(published=published)
    low, high = found["ci95"] or (0, 0)  # earlier versions recorded an interval of width zero where there is none
    interval = f"[{low:.{digits}f}, {high:.{digits}f}]" if low < high else "–"
    return Cell(f"{found['value']:.{digits}f}", interval, published)
