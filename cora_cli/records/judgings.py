"""The shapes of what `cora judge` writes: each judgment, and what all of them say."""

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict


class Judgment(TypedDict):
    """A line of `judgments.jsonl`: the outcome of one request.

    `names` are the judged answers in the order shown. `request_sha256` is that of the first request for the judgment, also where `attempt` says
    that this one asked again. Only the outcome "judged" has a `judgment`. `tokens_in` and `tokens_out` are what the judge counted, or estimates.
    """

    request_sha256: str
    rubric: str
    record: int
    names: list[str]
    repeat: int
    attempt: int
    outcome: Literal["judged", "malformed", "lost", "failed"]
    judgment: dict[str, float | str] | None
    reply: str | None
    reason: str | None
    tokens_in: int
    tokens_out: int
    estimated: bool
    model: str | None


class Estimate(TypedDict):
    """A value with its 95 % interval over n records; no interval where they do not give one."""

    value: float
    ci95: tuple[float, float] | None
    n: int


class Retest(TypedDict):
    """How far two judgments of one answer agree; `noise` is the standard deviation of one score. Null where nothing varies."""

    kappa: Estimate | None
    agreement: Estimate | None
    noise: NotRequired[Estimate | None]


class JudgedShare(TypedDict):
    """A share as the judge sees it, and corrected for its measured errors (null where it cannot be)."""

    observed: Estimate | None
    corrected: Estimate | None


class JudgedCriterion(TypedDict):
    """One criterion: means by name of the answers, and what the anchors say. The last three are null for one that is not anchored."""

    anchored: bool
    scores: dict[str, Estimate | None]
    gold_minus_shuffled: Estimate | None
    length_slope: Estimate | None
    length_correlation: Estimate | None
    retest: Retest | None
    sensitivity: Estimate | None
    specificity: Estimate | None
    accepted: dict[str, JudgedShare] | None


class JudgedPairs(TypedDict):
    """Preferences: the share of wins of one answer over another (ties half), and what the anchors and both orders say."""

    wins: dict[str, JudgedShare]
    gold_over_shuffled: Estimate | None
    order_bias: Estimate | None
    order_flips: Estimate | None
    length_bias: Estimate | None
    retest: Retest | None


class JudgedRubric(TypedDict):
    """The results of a rubric: `criteria`, or `pairs` where it asks for preferences. `failed` counts judgments that were not obtained, by name."""

    sha256: str
    pass_mark: float
    criteria: dict[str, JudgedCriterion]
    pairs: JudgedPairs | None
    asked: int
    failed: dict[str, int]
    disqualified: list[str]


class JudgedSystem(TypedDict):
    """The answers of one model that were judged; the hash is one of `answers_hashes`."""

    name: str
    predictions: str
    predictions_sha256: str


class JudgeIdentity(TypedDict):
    """What decides about a judge's replies apart from the message; the rest is only compared."""

    model: str


class Judging(TypedDict):
    """`judge.json`."""

    format: Literal[1]
    judge: JudgeIdentity
    served_models: list[str]
    records: int
    retest: bool
    seed: int
    systems: list[JudgedSystem]
    rubrics: dict[str, JudgedRubric]
    tokens: dict[str, int]
    cost: float | None
    judgments_sha256: str


def missing_judgments(judging: Mapping[str, Any]) -> tuple[int, int]:
    """How many judgments a `Judging` lacks since they were not obtained, and how many were asked for."""
    rubrics = judging["rubrics"].values()
    return sum(sum(rubric["failed"].values()) for rubric in rubrics), sum(rubric["asked"] for rubric in rubrics)
