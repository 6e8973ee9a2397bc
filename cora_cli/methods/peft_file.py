"""Any other method of PEFT that adapts weights, from a configuration file."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.errors import CoraError, UsageError
from cora_cli.limits import bounded
from cora_cli.methods.method import AS_THE_FILE_SAYS, Method, MethodSetting, Shapes
from cora_cli.methods.plan import AdapterPlan, AdapterRequest
from cora_cli.reading import read_json

if TYPE_CHECKING:
    from peft import PeftConfig

    from cora_cli.methods.parts.layers import LinearWeight


class PeftFile(Method):
    """PEFT does everything; the file's rank, alpha and target modules take precedence over the flags."""

    name = "peft"
    paper = "–"
    summary = "any other method of PEFT that adapts weights, from --peft-config"
    takes = frozenset()
    settings = (
        MethodSetting(
            "peft_config",
            str,
            "Mode peft: JSON file with the configuration of any PEFT method that adapts weights; its rank and target modules take "
            "precedence over the flags.",
        ),
    )
    b_init, a_init = "file", "file"
    trained: ClassVar[Shapes] = {}
    step_0_is_base = AS_THE_FILE_SAYS
    stored_as = "PEFT's own form"
    lora_rank = AS_THE_FILE_SAYS

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """The file is needed, and states the dropout itself."""
        found = []
        if settings["dropout"]:
            found.append("--dropout does not apply to mode peft: set the dropout of the method in the file")
        if not settings["peft_config"]:
            found.append("mode peft needs --peft-config FILE, a JSON file in the form of PEFT's adapter_config.json")
        return found

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """Read the file; `own` becomes {"peft": its values}."""
        values = read_json(Path(request.own["peft_config"]))
        if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
            raise UsageError('--peft-config must hold a JSON object with a "peft_type", as PEFT\'s adapter_config.json does')
        targets = values.get("target_modules")
        if targets is None:
            targets = list(request.target_modules)
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise UsageError("--peft-config: target_modules must be a list of names; --target-modules can give them instead")
        # Not every method has a rank, or counts it from one.
        rank = found if isinstance(found := values.get("r"), int) and found > 0 else request.rank
        own = {"peft": {**values, "target_modules": targets}}
        alpha = _alpha(own["peft"], rank, request.alpha)
        return dataclasses.replace(request, rank=rank, alpha=alpha, target_modules=tuple(targets), own=own)

    def notices(self, plan: AdapterPlan) -> list[str]:
        """PEFT itself would take its default for a rank that the file does not state."""
        stated, config = plan.own["peft"], self.configuration(plan)
        if stated.get("r") is not None or not hasattr(config, "r"):
            return []
        default = next(field.default for field in dataclasses.fields(type(config)) if field.name == "r")
        if default == 0:
            return [f"--peft-config states no r, without which {stated['peft_type']} has no rank, so --rank has no effect"]
        alpha = (
            f", with its default of lora_alpha, {config.lora_alpha}"
            if hasattr(config, "lora_alpha") and "lora_alpha" not in stated
            else ""
        )
        return [f"--peft-config states no r, so r is that of --rank, {plan.rank}, and not PEFT's default, {default}{alpha}"]

    def inputs(self, plan: AdapterPlan) -> dict[str, Any]:
        """The content of the file."""
        return {"peft": plan.own["peft"]}

    def configuration(self, plan: AdapterPlan) -> "PeftConfig":
        """The file as PEFT's own class."""
        from cora_cli.methods.parts.peft_configuration import peft_configuration

        return peft_configuration(plan.own["peft"], plan.rank)

    def check_layers(self, plan: AdapterPlan, linears: "Mapping[str, LinearWeight]") -> None:
        """Raises `CoraError` for a rank or an alpha of its own that no layer has: PEFT would leave it out."""
        super().check_layers(plan, linears)
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = plan.own["peft"].get(key)
            for pattern in patterns if isinstance(patterns, dict) else ():
                if not any(_matches(key, pattern, name) for name in linears):
                    raise CoraError(f"--peft-config: {key} has {pattern!r}, which is none of the layers of target_modules")

    def install_error(self, plan: AdapterPlan, error: Exception) -> CoraError:
        """Each of PEFT's methods has its own exceptions for values and layers that do not suit it."""
        from cora_cli.methods.parts.peft_configuration import refused

        return refused(str(plan.own["peft"]["peft_type"]).upper(), error)

    def starts(self, *_: Any) -> None:
        """Left to PEFT."""


def _alpha(values: dict[str, Any], rank: int, otherwise: float) -> float:
    """The alpha that PEFT takes, the default of its class where the file states none; `otherwise` for a method without one."""
    from cora_cli.methods.parts.peft_configuration import peft_configuration

    config = peft_configuration(values, rank)
    found = (getattr(config, name) for name in ("lora_alpha", "alpha") if type(getattr(config, name, None)) in (int, float))
    return next((float(one) for one in found if 0 < one < 1e9), otherwise)


def _matches(key: str, pattern: str, name: str) -> bool:
    """Whether PEFT takes the entry `pattern` of a setting for the layer `name`."""
    try:
        with bounded(f"--peft-config: matching the names of {key}"):
            return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise CoraError(f"--peft-config: {key} has {pattern!r}, which is no regular expression ({error})") from error
