"""Collects the answers of the runs of a group to the same records, with their scores, the fates of their programs and their judgments."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cora_cli import records
from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics import LOWER_IS_BETTER
from cora_cli.reading import read_jsonl
from cora_cli.render.answers import Answer, AnswerSet, Prompt
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.report_rows import clean
from cora_cli.reporting.results import Judged, Result
from cora_cli.reporting.summary import Group, Summary
from cora_cli.rundir import EvaluationDirectory


def answer_sets(summary: Summary) -> list[AnswerSet]:
    """One set for each group of an experiment that has evaluations."""
    found = [_answers(group, summary.collection.judged) for group in summary.groups]
    return [answers for answers in found if answers is not None]


def _answers(group: Group, judged: Sequence[Judged]) -> AnswerSet | None:
    results = [(line.title, result) for line in group.chosen for result in line.method.results if result.references is not None]
    if not results:
        return None
    measures = tuple(name for name in group.measures if name != LOSS)
    read = [_answers_of(result, measures, judged) for _, result in results]
    prompts, references = read[0][0], read[0][1]
    rows = [
        Prompt(prompt, reference, tuple(_asked(answers[place], theirs[place], prompt) for theirs, _, answers in read))
        for place, (prompt, reference) in enumerate(zip(prompts, references, strict=True))
    ]
    titles = [title for title, _ in results]
    runs = tuple(clean(f"{title}, seed {result.row.seed}" if titles.count(title) > 1 else title) for title, result in results)
    return AnswerSet(group.name, runs, measures, frozenset(LOWER_IS_BETTER), tuple(rows))


def _asked(answer: Answer, prompt: str, shown: str) -> Answer:
    """The answer with a note where it is one to another prompt than is shown, as of another template; some have none."""
    if not shown or prompt in ("", shown):
        return answer
    return dataclasses.replace(answer, notes=(*answer.notes, "asked by another prompt than the one shown"))


def _answers_of(result: Result, measures: Sequence[str], judged: Sequence[Judged]) -> tuple[list[str], list[str], list[Answer]]:
    """Prompts, references and answers of one evaluation, whose files `collect` has verified."""
    assert result.row.evaluation is not None
    evaluation = EvaluationDirectory(result.row.evaluation)
    lines = read_jsonl(evaluation.predictions, records.Prediction)
    scores = read_jsonl(evaluation.scores, records.Scores)
    notes: list[list[str]] = [[] for _ in lines]
    if evaluation.executions.is_file():
        for note, executed in zip(notes, read_jsonl(evaluation.executions, records.Executed), strict=False):
            note += [_fate(program, number, executed) for number, program in enumerate(executed["programs"], start=1)]
    known_by = records.answers_hashes(evaluation.predictions)
    for judging in judged:
        _add_judgments(notes, judging, known_by)
    answers = [
        Answer(line["prediction"], tuple(score.get(name) for name in measures), tuple(note))
        for line, score, note in zip(lines, scores, notes, strict=True)
    ]
    return [str(line.get("prompt", "")) for line in lines], [line["reference"] for line in lines], answers


def _fate(program: Mapping[str, Any], number: int, executed: Mapping[str, Any]) -> str:
    several = f"sample {number}: " if len(executed["programs"]) > 1 else ""
    detail = f" ({program['detail']})" if program["detail"] else ""
    other = f"; {program['same_process_fate']} in one process with its tests" if "same_process_fate" in program else ""
    return f"program: {several}{program['fate']}{detail}{other}"


def _add_judgments(notes: list[list[str]], judging: Judged, known_by: Collection[str]) -> None:
    """Add to each record's notes what a judge said about the answers with one of these hashes."""
    names = {system["name"] for system in judging.record["systems"] if system["predictions_sha256"] in known_by}
    try:
        lines = read_jsonl(judging.place.judgments, records.Judgment, drop_partial_tail=True)
    except CoraError:
        return
    for line in lines:
        said = line["judgment"]
        is_ours = len(line["names"]) == 1 and line["names"][0] in names and line["repeat"] == 0
        if is_ours and said and line["outcome"] == "judged" and line["record"] < len(notes):
            marks = ", ".join(
                f"{name} {value:g}" if isinstance(value, float | int) else f"{name} {value}" for name, value in said.items()
            )
            notes[line["record"]].append(f"judge {judging.record['judge']['model']} by {line['rubric']}: {marks}")
