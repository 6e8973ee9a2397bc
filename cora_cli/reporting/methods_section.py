"""Writes the methods paragraphs: models, data, settings, hardware and versions, as recorded by the runs.

If runs differ in a setting, the text lists every value.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cora_cli import hashing
from cora_cli.methods.registry import METHODS
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.report_rows import clean
from cora_cli.reporting.results import Result
from cora_cli.reporting.summary import Group, Summary

_SHOWN = 6
"""The number of values that a sentence lists; further values are only counted."""


def methods_paragraphs(summary: Summary) -> list[str]:
    """Per group, one paragraph on the experiment and one with the signatures of the metrics."""
    return [
        paragraph for group in summary.groups for paragraph in (" ".join(_sentences(group)), _signatures(group)) if paragraph
    ]


def _sentences(group: Group) -> list[str]:
    results = group.results
    own = [result.record for result in results if result.record and "laplace" not in result.record]
    # The first member of an ensemble is mostly the run of another row.
    trained = list({hashing.sha256_json(record): record for record in (*own, *_members(results))}.values())
    sentences = [f"{group.name}:"]
    if trained:
        sentences += [*_training(trained), *_untrained(results), *_basis(trained), *_machine(trained)]
    evaluated = [result for result in results if result.generation.get("settings")]
    if evaluated:
        sentences += [_evaluation(evaluated), *_averages(group)]
    return sentences


def _members(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [record for result in results for record in result.members]


def _untrained(results: Sequence[Result]) -> list[str]:
    names = [result.row.name for result in results if result.record.get("is_base_model")]
    said = "one factor is frozen at zero, so nothing can train. No step was taken, and the result is the base model."
    return [f"{_listed(names)}: {said}"] if names else []


def _signatures(group: Group) -> str:
    measures = {name: measure for result in group.results for name, measure in result.measures.items() if name != LOSS}
    return f"Metrics of {group.name}: {'; '.join(measure.signature for measure in measures.values())}." if measures else ""


def _training(runs: Sequence[dict[str, Any]]) -> list[str]:
    def of(path: str) -> str:
        return _values(runs, lambda record: _dig(record, path))

    def setting(name: str) -> str:
        return of(f"fingerprint.settings.{name}")

    revision = of("model.revision") if any(run["model"]["revision"] for run in runs) else ""
    count = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
    quantized = sum(bool(_dig(run, "fingerprint.settings.load_in_4bit")) for run in runs)
    among = f" in {quantized} of the runs" if quantized < len(runs) else ""
    in_four_bits = f", in 4 bits (NF4){among}" if quantized else ""
    model = f"{of('model.reference')}{f' at revision {revision}' if revision else ''} (weights sha256 {_short(of('fingerprint.model_sha256'))}{in_four_bits})"
    adapters = (
        f"; rank {of('plan.rank')}, alpha {of('plan.alpha')}, B starts as {of('plan.b_init')}, A as {of('plan.a_init')}, target modules "
        f"{of('plan.target_modules')}"
        if any(run.get("plan") for run in runs)
        else ""
    )
    return [
        f"{count} trained {model} on {of('data.dataset')} (sha256 of the records as they are divided {_short(of('fingerprint.data_sha256'))}, template "
        f"{of('data.template')}): {of('data.train.records')} training records with {of('data.train.tokens')} tokens "
        f"({of('data.train.response_tokens')} of them in responses) and {of('data.test.records')} held-out records"
        + (
            f"; {of('data.validation.records')} more were set aside for validation."
            if any(_dig(run, "data.validation.records") for run in runs)
            else "."
        ),
        f"Records dropped because they were too long: {of('data.train.dropped')}; records that were truncated: {of('data.train.truncated')}; "
        f"records dropped because their prompt is also held out: {of('data.overlapping_dropped')}.",
        f"Modes {of('mode')}{adapters}.",
        f"{of('speed.steps')} optimizer steps of {setting('batch_size')} × {setting('gradient_accumulation')} examples per process, peak "
        f"learning rate {setting('learning_rate')} ({setting('lr_schedule')}, warm-up {setting('warmup_ratio')}), {_values(runs, _optimizer)}, weight decay "
        f"{setting('weight_decay')}, gradient norm clipped at {setting('max_grad_norm')}, dropout {setting('dropout')}, maximum length {setting('max_length')} tokens; seeds "
        f"{of('seeds.seed')}, split seed {of('seeds.split_seed')}.",
    ]


def _basis(runs: Sequence[dict[str, Any]]) -> list[str]:
    found = {run["basis"]["sha256"]: run["basis"] for run in runs if run.get("basis")}
    if not found:
        return []
    choices = _listed(_choice(basis["choices"]) for basis in found.values())
    sources = _listed(
        f"{len(basis['sources'])} model{'s' if len(basis['sources']) > 1 else ''} ({', '.join(_source(s) for s in basis['sources'])})"
        for basis in found.values()
    )
    hashes = _listed(_short(sha256) for sha256 in found)
    return [f"{len(found)} basis file{'s' if len(found) > 1 else ''} (sha256 {hashes}): {choices}; from {sources}."]


def _machine(runs: Sequence[dict[str, Any]]) -> list[str]:
    def of(path: str) -> str:
        return _values(runs, lambda record: _dig(record, path))

    # A run that was resumed with other versions has those that it began with, too.
    used = [run.get(key, {}) for run in runs for key in ("versions_before", "versions")]
    listed = ", ".join(
        f"{name} {_listed(_shown(one[name]) for one in used if one.get(name) is not None)}"
        for name in sorted({name for one in used for name in one})
    )
    return [
        f"Hardware: {of('hardware.device')} ({of('hardware.device_reason')}), {of('hardware.dtype')} ({of('hardware.dtype_reason')}), "
        f"threads: {of('hardware.threads')}, processes: {of('hardware.processes')}. Versions: {listed}. Runs from {_period(runs)}."
    ]


def _evaluation(results: Sequence[Result]) -> str:
    def of(name: str) -> str:
        found = ({**result.generation["settings"], **result.generation}.get(name) for result in results)
        return _listed(_shown(value) for value in found if value is not None)

    cut = sum(int(result.generation.get("prompts_cut") or 0) for result in results)
    return (
        f"Evaluation: {of('decoding')} decoding, at most {of('max_new_tokens')} new tokens, template {of('template')}, {of('dtype')}, "
        f"backend {of('backend')}, batch size {of('batch_size')}, records sha256 {_short(of('records_sha256'))}, truncated prompts: {cut}."
    )


def _averages(group: Group) -> list[str]:
    """A sentence on the methods whose probabilities are averages, and over what."""
    found: dict[str, None] = {}
    for line in group.lines:
        for settings in (result.generation.get("settings", {}) for result in line.method.results):
            models, draws = len(settings.get("members", ())), dict.fromkeys(map(str, settings.get("draws", ())))
            over = [f"{models} models"] if models else []
            over += [f"{' / '.join(draws)} draws of the weights{' of each' if models else ''}"] if draws else []
            found |= {f"{line.title} over {' and '.join(over)}": None} if over else {}
    return [f"Averaged probabilities: {'; '.join(found)}."] if found else []


def _values(runs: Sequence[dict[str, Any]], pick: Callable[[dict[str, Any]], Any]) -> str:
    found = map(pick, runs)
    return _listed(dict.fromkeys(_shown(value) for value in found if value is not None))


def _optimizer(run: Mapping[str, Any]) -> str | None:
    return METHODS[run["mode"]].optimizer_name if run.get("mode") in METHODS else None


def _dig(record: Any, path: str) -> Any:
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return clean(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return (
        f"{value:,}" if isinstance(value, int) and value >= 10_000 else f"{value:g}" if isinstance(value, float) else str(value)
    )


def _listed(values: Iterable[str]) -> str:
    found = list(dict.fromkeys(values))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return " / ".join(found[:_SHOWN]) + more or "not recorded"


def _choice(choices: dict[str, Any]) -> str:
    names = ("share", "merge", "source", "side", "method", "component", "rank")
    said = [f"{name} {choices[name]}" for name in names if name in choices]
    return ", ".join([*said, "each ΔW normalized to norm 1"] if choices.get("normalize") else said)


def _source(source: dict[str, Any]) -> str:
    return clean(str(source["reference"]) + (f"@{source['revision']}" if source.get("revision") else ""))


def _short(digests: str) -> str:
    return " / ".join(part if " " in part else part[:12] for part in digests.split(" / "))


def _period(runs: Sequence[dict[str, Any]]) -> str:
    times = sorted(str(run[key]) for run in runs for key in ("started", "finished") if run.get(key))
    return clean(f"{times[0]} to {times[-1]}") if times else "an unknown time"
