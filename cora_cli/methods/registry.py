"""All training methods by name, collected from the files of this package.

A new file with a subclass of `Method` is enough: its name becomes a value of `--mode`, its settings become flags, and it gets a row
in the table of the documentation.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from cora_cli import methods
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.method import (
    A_INNER,
    A_LINK,
    AS_THE_FILE_SAYS,
    B_INNER,
    B_LINK,
    SHARED_SETTINGS,
    A,
    B,
    Method,
    MethodSetting,
)
from cora_cli.methods.plan import AdapterPlan, AdapterRequest
from cora_cli.render.markdown_table import markdown_table

BASELINE = "lora"
"""The method that every other one is compared with."""
DEFAULT = "fb"


def _collect() -> dict[str, Method]:
    found: list[Method] = []
    for entry in pkgutil.iter_modules(methods.__path__):
        if entry.ispkg or f"{methods.__name__}.{entry.name}" == __name__:
            continue
        module = importlib.import_module(f"{methods.__name__}.{entry.name}")
        classes = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
        found += [kind() for kind in classes if issubclass(kind, Method) and hasattr(kind, "name")]
    # The baseline first, then file by file.
    return {method.name: method for method in sorted(found, key=lambda method: method.name != BASELINE)}


METHODS: dict[str, Method] = _collect()
OWN_SETTINGS: tuple[MethodSetting, ...] = tuple(
    dict.fromkeys(setting for method in METHODS.values() for setting in method.settings)
)
OPTIONAL_SETTINGS = SHARED_SETTINGS | {setting.name for setting in OWN_SETTINGS}
"""Settings of `cora train` that not every method takes."""
PLANNED = frozenset({*(setting.name for setting in OWN_SETTINGS), "start", "start_models", "peft"})
"""The keys that a plan may have next to those of every plan: `AdapterPlan.own`."""
if TYPE_CHECKING:
    Mode = str
else:
    Mode = Literal[tuple(METHODS)]


def method_of(mode: str, where: object = None) -> Method:
    """The method named `mode`. Raises `CoraError` for an unknown name, as a record of a later version may hold; it starts with `where`."""
    if mode not in METHODS:
        raise CoraError(f"{f'{where}: ' if where else ''}mode must be one of {', '.join(METHODS)}, not {mode!r}")
    return METHODS[mode]


def label_of(mode: str, plan: Mapping[str, Any] | None, where: object = None) -> str:
    """The mode with the starts of an adapter's `plan` that are not its own, such as `fb orthonormal`. Raises `CoraError` as `method_of` does."""
    if plan is None:
        return mode
    unusual = plan["b_init"] if plan["b_init"] != method_of(plan["mode"], where).b_init else ""
    # Of the mode mean-delta itself, the start is the mode.
    start = plan.get("start") if plan.get("start") != plan["mode"] else None
    return " ".join(filter(None, (mode, unusual, start)))


def plan_adapter(mode: str, request: AdapterRequest) -> AdapterPlan | None:
    """The plan of an adapter of `mode`; None for a method without one. Raises `UsageError` for contradictions."""
    method = METHODS[mode]
    if request.b_init is not None and not method.b_init_is_free:
        free = [other.name for other in METHODS.values() if other.b_init_is_free]
        raise UsageError(f"--b-init applies to the modes {' and '.join(free)}; mode {mode} starts B as {method.b_init}")
    return method.plan(request) if method.is_adapter else None


def taken_settings(method: Method) -> frozenset[str]:
    """The optional settings that mean something to `method`."""
    return method.takes | {setting.name for setting in method.settings}


_SYMBOLS: dict[str, Any] = {
    **{A: "A", B: "B", "lora_magnitude_vector.weight": "magnitudes", "vera_lambda_b": "b", "vera_lambda_d": "d"},
    **{A_INNER: "inner A", B_INNER: "inner B", A_LINK: "A", B_LINK: "B"},
    **{"lora_A.blocks": "blocks of A", "lora_B.blocks": "blocks of B", "lora_B.square": "M"},
    **{"lora_A.own": "A's own", "lora_A.chunk": "A's chunk", "lora_B.own": "B's own", "lora_B.chunk": "B's chunk"},
    "lora_A.columns": "A",
}


def methods_table() -> str:
    """The table of methods for the documentation, in Markdown."""
    headers = [
        "mode",
        "start; what is frozen",
        "trained where W is out × in",
        "step 0 is the base model",
        "stored as",
        "equals a LoRA of rank",
        "paper",
    ]
    rows = [
        [
            f"`{method.name}`",
            method.summary,
            _trained(method),
            method.step_0_is_base,
            method.stored_as,
            method.lora_rank or "–",
            method.paper,
        ]
        for method in METHODS.values()
    ]
    return markdown_table(headers, rows)


def method_notes() -> str:
    """What the documentation says about single methods, as a list in Markdown."""
    return "\n".join(f"- **`{method.name}`** ({method.paper}). {method.notes}" for method in METHODS.values() if method.notes)


def _trained(method: Method) -> str:
    if not method.is_adapter:
        return "all weights"
    if method.trained_in_words:
        return method.trained_in_words
    parts = [f"{_SYMBOLS.get(key, key)} {'·'.join(shape)}" for key, shape in method.trained.items()]
    return " + ".join(parts) or AS_THE_FILE_SAYS
