"""How much and how runs were trained apart from their method: where that differs, so may their results, whatever the methods are worth."""

from collections.abc import Sequence
from typing import Any

from cora_cli.reporting.report_rows import clean
from cora_cli.reporting.results import Result

_NEUTRAL = {
    "lr_schedule": None,
    "warmup_ratio": None,
    "weight_decay": None,
    "max_grad_norm": None,
    "dropout": None,
    "train_on": "last",
    "load_in_4bit": False,
    "trust_remote_code": None,
}
"""Settings that every method has, with their value where they are not recorded."""


def differing_conditions(results: Sequence[Result]) -> dict[str, list[str]]:
    """What the trainings of `results` differ in, with its values in the order of the results; a run that took no step has none."""
    found: dict[str, dict[str, None]] = {}
    # A maximum length decides nothing where no record reaches it.
    cut = any(result.record["data"]["train"]["truncated"] for result in results if _settings(result))
    for result in results:
        for name, value in _conditions(result, cut).items():
            if value is not None:
                found.setdefault(name, {})[_shown(value)] = None
    return {name: list(values) for name, values in found.items() if len(values) > 1}


def _settings(result: Result) -> dict[str, Any]:
    """The settings of a run that took a step; empty for others."""
    return {} if result.untrained else result.record.get("fingerprint", {}).get("settings") or {}


def _conditions(result: Result, cut: bool) -> dict[str, Any]:
    record, settings = result.record, _settings(result)
    if not settings:
        return {}
    hardware = record["hardware"]
    batch = settings["batch_size"] * settings["gradient_accumulation"] * hardware.get("processes", 1)
    amounts = {
        "training records": record["data"]["train"]["records"],
        "optimizer steps": record["speed"]["steps"],
        "examples per step": batch,
    }
    neutral = {**_NEUTRAL, "max_length": None} if cut else _NEUTRAL
    others = {name.replace("_", " "): settings.get(name, value) for name, value in neutral.items()}
    prompts = {name.replace("_", " "): record["data"].get(name) for name in ("template", "template_date")}
    return {**amounts, **others, **prompts, **_start(record.get("plan") or {}), "precision": hardware["dtype"]}


def _start(plan: dict[str, Any]) -> dict[str, Any]:
    """The factor s of s·B·A, and where A starts, which differs between modes anyway."""
    rank, alpha = plan.get("rank"), plan.get("alpha")
    scale = {"scale of B·A": alpha / (rank**0.5 if plan.get("rslora") else rank)} if rank and alpha else {}
    return {**scale, f"a_init of {plan.get('mode')}": plan.get("a_init")}


def _shown(value: Any) -> str:
    return f"{value:,}" if type(value) is int else f"{value:g}" if isinstance(value, float) else clean(str(value))
