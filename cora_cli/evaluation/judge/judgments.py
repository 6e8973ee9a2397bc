"""`judgments.jsonl`: every outcome is on the disk before the next request is sent, so that no answered request is ever repeated.

Failures are kept too, for their cost and their reasons, but they are no judgments: they are asked for again.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.evaluation.judge.asking import NoReply, Reply
from cora_cli.evaluation.judge.questions import Question
from cora_cli.evaluation.judge.rubrics import Rubric
from cora_cli.evaluation.judge.wording import BadReply, read_reply
from cora_cli.reading import read_jsonl
from cora_cli.records import Judgment

BYTES_PER_TOKEN = 3
"""For estimates, on the safe side: most tokenizers need fewer tokens."""

CUT = "it was cut off at the limit of its length"


def estimated_tokens(message: str) -> int:
    """About how many tokens a message has, rather too many than too few."""
    return len(message.encode()) // BYTES_PER_TOKEN + 16


class Judgments:
    """The judgments in a file, by the hash of their request."""

    def __init__(self, path: Path, rubrics: dict[str, Rubric]) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self.lines: list[dict[str, Any]] = read_jsonl(path, Judgment, drop_partial_tail=True) if path.exists() else []
        self.judged: dict[str, dict[str, Any]] = {}
        self._malformed: dict[str, list[str]] = {}
        for number, line in enumerate(self.lines, start=1):
            self._check(line, rubrics, number)
            if line["outcome"] == "judged" and line["request_sha256"] in self.judged:
                first = 1 + self.lines.index(self.judged[line["request_sha256"]])
                raise CoraError(f"{path}: lines {first} and {number} both judge one request; remove one of them")
            self._count(line)

    def _check(self, line: dict[str, Any], rubrics: dict[str, Rubric], number: int) -> None:
        """Raise `CoraError` if a line's judgment is not what its reply says."""
        rubric = rubrics.get(line["rubric"])
        if line["outcome"] != "judged" or rubric is None:
            return
        try:
            said = read_reply(rubric, line["reply"] or "")
        except BadReply:
            said = None
        # A rubric of the same name with other criteria has other requests, so its line is of no use here and does no harm.
        is_of_rubric = (line["judgment"] or {}).keys() == rubric.keys
        if said != line["judgment"] and (said is not None or is_of_rubric):
            raise CoraError(
                f"{self._path}, line {number}: the judgment is not what its reply says; the line was changed, remove it"
            )

    def _count(self, line: dict[str, Any]) -> None:
        key = line["request_sha256"]
        if line["outcome"] == "judged":
            self.judged[key] = line
        elif line["outcome"] == "malformed":
            self._malformed.setdefault(key, []).append(line["reason"] or "")
        elif line["outcome"] == "failed":
            self._malformed.pop(key, None)

    def malformed(self, key: str) -> list[str]:
        """Why each reply to a request was of no use, since the request last failed."""
        return self._malformed.get(key, [])

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Hold the file open to append to, without the partial last line of a killed command."""
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            writing.write_jsonl(self._path, self.lines)
        with writing.open_to_append(self._path) as self._file:
            yield

    def add(self, question: Question, attempt: int, message: str, result: Reply | NoReply, max_tokens: int) -> dict[str, Any]:
        """Append the outcome of a request and wait until it is on the disk. Raises `CoraError` if it cannot be written."""
        line: dict[str, Any] = {
            "request_sha256": question.request_sha256,
            "rubric": question.rubric.name,
            "record": question.record,
            "names": list(question.names),
            "repeat": question.repeat,
            "attempt": attempt,
            **_outcome(question.rubric, result),
            **_tokens(message, result, max_tokens),
            "model": result.model if isinstance(result, Reply) else None,
        }
        assert self._file is not None
        try:
            self._file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise writing.disk_error(error, self._path, writing.LINES_KEPT) from error
        self.lines.append(line)
        self._count(line)
        return line

    def cost(self, price_in: float, price_out: float) -> float:
        """What all requests in the file cost at most, with prices of a million tokens."""
        return sum(line["tokens_in"] * price_in + line["tokens_out"] * price_out for line in self.lines) / 1e6


def _outcome(rubric: Rubric, result: Reply | NoReply) -> dict[str, Any]:
    if isinstance(result, NoReply):
        outcome = "failed" if result.last else "lost"
        return {"outcome": outcome, "judgment": None, "reply": None, "reason": result.reason}
    # A half of a surrogate pair can stand in a reply, but in no file.
    text = result.text.encode("utf-8", "replace").decode()
    try:
        return {"outcome": "judged", "judgment": read_reply(rubric, text), "reply": text, "reason": None}
    except BadReply as error:
        reason = CUT if result.is_cut else str(error)
        return {"outcome": "malformed", "judgment": None, "reply": text, "reason": reason}


def _tokens(message: str, result: Reply | NoReply, max_tokens: int) -> dict[str, Any]:
    if isinstance(result, NoReply):
        paid = (estimated_tokens(message), max_tokens) if result.paid else (0, 0)
        return {"tokens_in": paid[0], "tokens_out": paid[1], "estimated": result.paid}
    counted = result.tokens_in is not None and result.tokens_out is not None
    given = (result.tokens_in, result.tokens_out) if counted else (estimated_tokens(message), max_tokens)
    return {"tokens_in": given[0], "tokens_out": given[1], "estimated": not counted}
