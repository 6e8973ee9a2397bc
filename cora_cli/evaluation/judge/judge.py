"""One judging, from predictions to `judge.json`.

`answers` reads what is judged, `questions` lists the judgments, `endpoint` and `local` obtain them, `judgments` keeps them, and
`measures` computes what they say about the answers and about the judge.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cora_cli import hashing, writing
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.judge.answers import Answers, load_answers
from cora_cli.evaluation.judge.asking import Call, Judge, NoReply
from cora_cli.evaluation.judge.config import JudgeConfig
from cora_cli.evaluation.judge.endpoint import Endpoint
from cora_cli.evaluation.judge.judgments import CUT, Judgments, estimated_tokens
from cora_cli.evaluation.judge.measures import measure_rubric
from cora_cli.evaluation.judge.questions import Question, all_questions
from cora_cli.evaluation.judge.rubrics import Rubric, load_rubric
from cora_cli.evaluation.judge.wording import opening
from cora_cli.lock import own_directory
from cora_cli.progress import note, progress, say
from cora_cli.records import Judging, read_sealed, write_sealed
from cora_cli.rundir import JudgeDirectory, RunDirectory


@dataclasses.dataclass(frozen=True)
class Price:
    """What a judging takes: requests that are still to be sent, those that are answered, tokens, and the cost at most."""

    requests: int
    answered: int
    tokens_in: int
    tokens_out: int
    cost: float | None


@dataclasses.dataclass(frozen=True)
class _Work:
    config: JudgeConfig
    answers: Answers
    rubrics: tuple[Rubric, ...]
    judge: Judge
    questions: list[Question]
    out: JudgeDirectory


def price(config: JudgeConfig) -> Price:
    """What `judge` would send, by estimates of the tokens; sends and writes nothing."""
    work = _prepare(config)
    writing.refuse_file(work.out.root)
    judgments = Judgments(work.out.judgments, {rubric.name: rubric for rubric in work.rubrics})
    distinct = {question.request_sha256: question for question in work.questions}
    open_ones = [question for key, question in distinct.items() if key not in judgments.judged]
    tokens = sum(estimated_tokens(question.message()) for question in open_ones), len(open_ones) * config.max_tokens
    known = config.price_in is not None and config.price_out is not None
    cost = (tokens[0] * (config.price_in or 0) + tokens[1] * (config.price_out or 0)) / 1e6 if known else None
    return Price(len(open_ones), len(distinct) - len(open_ones), *tokens, cost)


def judge(config: JudgeConfig) -> tuple[dict[str, Any], JudgeDirectory]:
    """Obtain every judgment that is not yet in the output directory, and write and return `judge.json`.

    Raises `CoraError` if predictions or files cannot be read, if other results are in the way, or if the endpoint refuses.
    """
    work = _prepare(config)
    with own_directory(work.out.root, work.out.judgments.name):
        _check_nothing_is_lost(work)
        judgments = Judgments(work.out.judgments, {rubric.name: rubric for rubric in work.rubrics})
        with judgments.open():
            _ask_all(work, judgments)
        record = _result(work, judgments)
        write_sealed(work.out.result, record)
        return record, work.out


def _prepare(config: JudgeConfig) -> _Work:
    rubrics = tuple(load_rubric(name) for name in config.rubric)
    if repeated := [name for name, count in collections.Counter(rubric.name for rubric in rubrics).items() if count > 1]:
        raise UsageError(f"--rubric names {repeated[0]} twice; name it once, or rename the file")
    answers = load_answers(config)
    judge: Judge
    if config.endpoint is not None:
        judge = Endpoint(config)
    else:
        from cora_cli.evaluation.judge.local import LocalJudge  # torch

        judge = LocalJudge(config, _recorded_date(_output(config)))
    questions = all_questions(rubrics, answers, config.retest, config.seed, judge.identity)
    return _Work(config, answers, rubrics, judge, questions, _output(config))


def _output(config: JudgeConfig) -> JudgeDirectory:
    if config.output_dir:
        return JudgeDirectory(Path(config.output_dir))
    if config.from_predictions:
        return JudgeDirectory(Path(config.from_predictions).parent / "judge")
    (run,) = config.runs or ()
    root = RunDirectory(Path(run)).root
    return JudgeDirectory(root / "judge")


def _recorded_date(out: JudgeDirectory) -> str | None:
    """The date in the messages of the judging in `out`, to continue or to reuse; None if there is none."""
    with contextlib.suppress(CoraError):  # a damaged record is refused, or replaced, later
        if out.result.exists():
            date: str | None = read_sealed(out.result, Judging)["judge"].get("template_date")
            return date
    return None


def _check_nothing_is_lost(work: _Work) -> None:
    """Raise `CoraError` if the output directory holds other files, the result of another judge, or judgments that were changed since; for the last two unless
    `overwrite` is on."""
    out = work.out
    if not out.result.exists():
        if not out.judgments.exists() and writing.holds_files(out.root):
            raise CoraError(f"output directory {out.root} holds other files; choose a new or empty directory")
        return
    if work.config.overwrite:
        return
    recorded = read_sealed(out.result, Judging)
    ours = {"judge": work.judge.identity, "rubrics": {rubric.name: rubric.sha256 for rubric in work.rubrics}}
    theirs = {"judge": recorded["judge"], "rubrics": {name: entry["sha256"] for name, entry in recorded["rubrics"].items()}}
    if differing := [name for name in ours if ours[name] != theirs[name]]:
        raise CoraError(
            f"{out.result} holds the judgment of {' and '.join(f'another {name}' if name == 'judge' else f'other {name}' for name in differing)}; "
            "choose another --output-dir, or replace it with --overwrite, which keeps all judgments.jsonl"
        )
    if out.judgments.is_file() and not hashing.begins_as(out.judgments, recorded["judgments_sha256"]):
        raise CoraError(
            f"{out.judgments} was changed since {out.result} was written, which describes other lines; restore it, or use it as it is with --overwrite"
        )


def _ask_all(work: _Work, judgments: Judgments) -> None:
    """Ask until every question is judged or has failed. Malformed replies are asked again in rounds."""
    config = work.config
    distinct = {question.request_sha256: question for question in work.questions}
    pending = [question for key, question in distinct.items() if key not in judgments.judged]
    done = len(distinct) - len(pending)
    if done and pending:
        say(f"{done} of {len(distinct)} judgments are in {work.out.judgments} already")
    work.judge.has_replied |= bool(judgments.judged)
    budget = _Budget(config, judgments)
    failures: collections.Counter[str] = collections.Counter()
    with progress("judging", len(distinct), "judgments", done=done) as shown:
        while pending:
            calls: dict[int, tuple[Question, int, Call]] = {}
            for number, question in enumerate(pending):
                useless = judgments.malformed(question.request_sha256)
                calls[number] = (question, len(useless), _call(number, question, useless))
            before = len(judgments.lines)
            settled = set()
            for call, result in work.judge.ask([call for *_, call in calls.values()], budget.allows):
                question, attempt, _ = calls[call.number]
                line = judgments.add(question, attempt, call.message, result, config.max_tokens)
                budget.settle(call)
                out_of_tries = line["outcome"] == "malformed" and attempt + 1 >= config.tries
                if out_of_tries:
                    reason = f"{attempt + 1} malformed replies; the last: {line['reason']}"
                    line = judgments.add(question, attempt, "", NoReply(reason, paid=False, last=True), 0)
                if line["outcome"] == "failed":
                    failures[line["reason"]] += 1
                if out_of_tries or line["outcome"] in ("judged", "failed"):
                    settled.add(question.request_sha256)
                    shown.advance()
            pending = [question for question in pending if question.request_sha256 not in settled]
            if pending and len(judgments.lines) == before:
                raise CoraError(
                    f"the next request could exceed --max-cost {config.max_cost:g} ({budget.spent():.4g} are spent in {work.out.root}); "
                    f"{len(pending)} of {len(distinct)} judgments are missing: a higher --max-cost continues"
                )
    if failures:
        (reason, count), *_ = failures.most_common(1)
        hint = "; a higher --max-tokens allows longer replies" if reason.endswith(CUT) else ""
        note(
            f"{failures.total()} of {len(distinct)} judgments were not obtained, {count} of them for this reason: {reason}{hint}"
        )


def _call(number: int, question: Question, useless: Sequence[str]) -> Call:
    """The call for a question whose earlier replies were `useless`, for these reasons."""
    if not useless:
        return Call(number, question.message())
    return Call(number, question.message(useless[-1]), opening(question.rubric))


class _Budget:
    """Keeps what was spent, and what requests under way may cost, below `--max-cost`."""

    def __init__(self, config: JudgeConfig, judgments: Judgments) -> None:
        self._config, self._judgments = config, judgments
        self._under_way: dict[int, float] = {}
        self._spent, self._counted = 0.0, 0

    def spent(self) -> float:
        """The cost of all requests so far."""
        prices = (self._config.price_in or 0.0, self._config.price_out or 0.0)
        new = self._judgments.lines[self._counted :]
        self._spent += sum(line["tokens_in"] * prices[0] + line["tokens_out"] * prices[1] for line in new) / 1e6
        self._counted += len(new)
        return self._spent

    def allows(self, call: Call) -> bool:
        """Whether a request may be sent; if so, its highest cost is set aside."""
        if self._config.max_cost is None:
            return True
        tokens = estimated_tokens(call.message), self._config.max_tokens
        cost = (tokens[0] * (self._config.price_in or 0) + tokens[1] * (self._config.price_out or 0)) / 1e6
        if self.spent() + sum(self._under_way.values()) + cost > self._config.max_cost:
            return False
        self._under_way[call.number] = cost
        return True

    def settle(self, call: Call) -> None:
        """The request is answered or lost; what it cost is in the file."""
        self._under_way.pop(call.number, None)


def _result(work: _Work, judgments: Judgments) -> dict[str, Any]:
    config = work.config
    used = [judgments.judged[key] for key in {q.request_sha256: None for q in work.questions} if key in judgments.judged]
    known = config.price_in is not None and config.price_out is not None
    return {
        "format": 1,
        "judge": work.judge.identity,
        "served_models": sorted({line["model"] for line in used if line["model"]}),
        "records": len(work.answers.prompts),
        "retest": config.retest,
        "seed": config.seed,
        "systems": [
            {
                "name": system.name,
                "predictions": str(writing.absolute(system.predictions)),
                "predictions_sha256": system.sha256,
            }
            for system in work.answers.systems
        ],
        "rubrics": {
            rubric.name: measure_rubric(rubric, work.answers, _judged(work.questions, rubric, judgments))
            for rubric in work.rubrics
        },
        "tokens": {key: sum(line[f"tokens_{key}"] for line in judgments.lines) for key in ("in", "out")},
        "cost": judgments.cost(config.price_in or 0.0, config.price_out or 0.0) if known else None,
        "judgments_sha256": hashing.sha256_file(work.out.judgments),
    }


def _judged(
    questions: Sequence[Question], rubric: Rubric, judgments: Judgments
) -> list[tuple[Question, dict[str, Any] | None]]:
    """The questions of a rubric with their judgments; None for a failure."""
    return [
        (question, line["judgment"] if (line := judgments.judged.get(question.request_sha256)) else None)
        for question in questions
        if question.rubric is rubric
    ]
