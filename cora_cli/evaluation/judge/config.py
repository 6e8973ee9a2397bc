"""The settings of `cora judge`, and the checks that need only their values."""

import dataclasses
import json
from typing import Any
from urllib.parse import urlsplit

from cora_cli.errors import UsageError
from cora_cli.reading import Malformed, parse_json
from cora_cli.settings import MOST, DtypeName, check_date, range_problems, refuse_useless, setting

_WHAT, _JUDGE, _ANCHORS, _LIMITS, _RUN = "What to judge", "Judge", "Anchors", "Limits", "Run"
_OF_ENDPOINTS = frozenset(
    {"key_variable", "parameters", "concurrency", "retries", "backoff", "timeout", "price_in", "price_out", "max_cost"}
)
_OF_LOCAL_JUDGES = frozenset({"batch_size", "template_date", "device", "dtype", "trust_remote_code"})


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Every setting of `cora judge`."""

    runs: tuple[str, ...] | None = setting(
        "Evaluated run directories of `cora train`, or directories of `cora evaluate`.", None, argument=True
    )
    from_predictions: str | None = setting(
        "Judge this predictions.jsonl; its lines need prompt, reference and prediction.", None, panel=_WHAT, flags=("--from",)
    )
    rubric: tuple[str, ...] = setting(
        "Comma-separated: paper (fluency, relevance, accuracy), readability (of code), preference (pairs), or YAML files.",
        ("paper", "preference"),
        panel=_WHAT,
    )
    limit: int | None = setting("Judge only the first N records.", None, panel=_WHAT)
    endpoint: str | None = setting(
        "Base URL of an OpenAI-compatible server, such as https://api.openai.com/v1; needs --judge.", None, panel=_JUDGE
    )
    judge: str | None = setting("The name of the judge at the endpoint, such as gpt-4.", None, panel=_JUDGE)
    judge_model: str | None = setting(
        "Local judge instead of an endpoint: a model directory, hub id or builtin:smollm2.", None, panel=_JUDGE
    )
    key_variable: str = setting(
        "Environment variable with the endpoint's key, which is written nowhere. A server without keys needs none.",
        "CORA_JUDGE_KEY",
        panel=_JUDGE,
    )
    parameters: str | None = setting(
        'JSON object to merge into each request to the endpoint; null removes a key: \'{"temperature": null, "seed": 1}\'.',
        None,
        panel=_JUDGE,
    )
    max_tokens: int = setting("Maximum length of a reply, in tokens.", 256, panel=_JUDGE, most=MOST)
    batch_size: int = setting("Prompts that a local judge decodes together.", 16, panel=_JUDGE, most=MOST)
    template_date: str | None = setting(
        "Date, as YYYY-MM-DD, for a local judge whose chat template writes the current one into its prompts. Default: that of the judge.json "
        "in the output directory, else today.",
        None,
        panel=_JUDGE,
    )
    base: str | None = setting(
        "Directory of `cora evaluate`, or predictions.jsonl, with the base model's answers, to judge them too.",
        None,
        panel=_ANCHORS,
    )
    with_base: bool = setting(
        "Also judge the base model, as answered by `cora evaluate RUN --with-base`.", False, panel=_ANCHORS
    )
    retest: bool = setting("Judge every answer twice, to measure whether the judge agrees with itself.", True, panel=_ANCHORS)
    concurrency: int = setting("Requests in flight at once.", 8, panel=_LIMITS, most=256)
    tries: int = setting("Requests for one judgment, as long as the replies are malformed.", 3, panel=_LIMITS, most=100)
    retries: int = setting(
        "Further requests after a refusal (429), an error of the server or the connection.", 6, panel=_LIMITS, most=1000
    )
    backoff: float = setting(
        "Mean seconds before the first of them; doubles each time, up to a minute. A Retry-After is honoured.",
        1.0,
        panel=_LIMITS,
        most=3600,
    )
    timeout: float = setting("Seconds to wait for one reply.", 120.0, panel=_LIMITS, most=86_400)
    price_in: float | None = setting("Price of a million input tokens.", None, panel=_LIMITS, most=MOST)
    price_out: float | None = setting("Price of a million output tokens.", None, panel=_LIMITS, most=MOST)
    max_cost: float | None = setting(
        "Send no request that by estimate exceeds this cost, all earlier ones in the output directory included; needs both prices.",
        None,
        panel=_LIMITS,
        most=MOST,
    )
    dry_run: bool = setting("Print the number of requests, their tokens and their price, and send none.", False, panel=_RUN)
    output_dir: str | None = setting(
        "Output directory. Default: RUN/judge, or judge/ next to the --from file; needed for several runs.",
        None,
        flags=("--output-dir", "-o"),
        panel=_RUN,
    )
    overwrite: bool = setting(
        "Replace a judge.json of another judge or rubric; its judgments stay in judgments.jsonl.", False, panel=_RUN
    )
    seed: int = setting("Seed of the shuffled references and of the order of the requests.", 0, panel=_RUN)
    device: str = setting("Device of a local judge: auto, cpu, cuda or cuda:<index>.", "auto", panel=_RUN)
    dtype: DtypeName = setting("Of a local judge. auto: bf16 where the hardware supports it, else fp32.", "auto", panel=_RUN)
    trust_remote_code: bool = setting(
        "Run Python code that comes with a local judge. Use only if you trust its author.", False, panel="Risky"
    )

    def __post_init__(self) -> None:
        """Check that there is something to judge and one judge, and that the numbers are in range."""
        if bool(self.runs) == bool(self.from_predictions):
            raise UsageError("give either run directories or --from predictions.jsonl")
        if len(self.runs or ()) > 1 and not self.output_dir:
            raise UsageError("several runs need --output-dir DIR, where their judgments go")
        if self.with_base and (self.base or not self.runs):
            raise UsageError("--with-base needs run directories and no --base, which names the base model's answers itself")
        self._check_judge()
        if problems := [*range_problems(self), *filter(None, [check_date(self.template_date)])]:
            raise UsageError("; ".join(problems))
        for name, least in (
            ("concurrency", 1),
            ("tries", 1),
            ("retries", 0),
            ("max_tokens", 1),
            ("batch_size", 1),
            ("limit", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        for name in ("timeout", "max_cost"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0, not {value:g}")
        for name in ("backoff", "price_in", "price_out"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 0, not {value:g}")
        if self.max_cost is not None and (self.price_in is None or self.price_out is None):
            raise UsageError("--max-cost needs --price-in and --price-out, the prices of a million tokens")
        if not self.rubric:
            raise UsageError("--rubric needs at least one rubric")

    def _check_judge(self) -> None:
        if (self.endpoint is None) == (self.judge_model is None):
            raise UsageError("give one judge: --endpoint URL with --judge NAME, or --judge-model MODEL")
        if (self.endpoint is None) != (self.judge is None):
            raise UsageError("--judge names the model at --endpoint; give both, or --judge-model alone")
        if self.endpoint is not None:
            check_endpoint(self.endpoint)
        if self.judge_model is not None:
            refuse_useless(self, _OF_ENDPOINTS, "on a local judge")
        else:
            refuse_useless(self, _OF_LOCAL_JUDGES, "on a judge at an endpoint")
        self.request_parameters()

    def request_parameters(self) -> dict[str, Any]:
        """The object of `--parameters`. Raises `UsageError` if it is none, or holds what `cora judge` itself decides."""
        if self.parameters is None:
            return {}
        try:
            value = parse_json(self.parameters)
        except Malformed as error:
            raise UsageError(f"--parameters must be a JSON object, not {self.parameters[:60]!r}: {error}") from error
        if not isinstance(value, dict):
            raise UsageError(f"--parameters must be a JSON object, not {json.dumps(value)[:60]}")
        try:
            json.dumps(value, allow_nan=False)
        except ValueError as error:
            raise UsageError(f"--parameters must hold finite numbers, not {self.parameters[:60]}") from error
        if taken := sorted(value.keys() & {"messages", "model", "stream", "n"}):
            raise UsageError(f"--parameters cannot set {taken[0]}, which cora judge decides itself")
        return value


def check_endpoint(url: str) -> None:
    """Raise `UsageError` unless `url` is a plain http(s) address, without a user, a password or a query, which may be secrets."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment or "@" in parts.netloc or not url.isascii() or any(c.isspace() for c in url):
        shown = url.rpartition("@")[2].partition("?")[0]
        raise UsageError(
            f"--endpoint must be an address such as http://127.0.0.1:8000/v1, without user, password or query, not {shown!r}"
        )
