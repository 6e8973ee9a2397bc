"""What `adapter_config.json` of an adapter from PEFT states, and what the installed PEFT makes of it.

PEFT leaves out settings that it does not know and fails late on values that it cannot compute with.
"""

import dataclasses
import json
import re
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PromptLearningConfig
from peft import __version__ as PEFT_VERSION
from transformers import PreTrainedModel

from cora_cli.errors import CoraError
from cora_cli.limits import bounded
from cora_cli.models.model_path import ModelPath
from cora_cli.progress import note

_KINDS = {str(name.value): kind for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
"""PEFT's classes of configurations by `peft_type`."""
DEFAULT_RANK, DEFAULT_ALPHA = LoraConfig.r, LoraConfig.lora_alpha
"""The r and the alpha of a LoRA whose configuration has none."""
OF_TRAINING = re.compile(r"\.lora_(velora_embed|monteclora_sampler)\b")
"""In the names of tensors that act in training alone: VeLoRA's, which compress its activations, and those from which MonteCLoRA draws."""


def say_unknown_settings(adapter: ModelPath) -> None:
    """Say which settings of an adapter the installed PEFT does not know, since it loads the adapter as if they were not there, and where the scale of a LoRA
    is PEFT's default."""
    config = adapter.adapter_config()
    kind = _KINDS.get(config.get("peft_type") or "")
    known = {field.name for field in dataclasses.fields(kind)} if kind is not None else config.keys()
    if unknown := sorted(name for name, value in config.items() if value and name not in known):
        note(
            f"adapter {adapter.path}: adapter_config.json sets {', '.join(unknown)}, which the installed PEFT {PEFT_VERSION} does not know and "
            "leaves out; a newer one may compute something else"
        )
    if kind is LoraConfig and "lora_alpha" not in config:
        note(f"adapter {adapter.path}: adapter_config.json has no lora_alpha; PEFT's default, {DEFAULT_ALPHA}, is used")


def changes_input(adapter: ModelPath) -> bool:
    """Whether an adapter is of PEFT's methods that put trained vectors before the prompt, not of those that change weights."""
    return issubclass(_KINDS.get(adapter.adapter_config().get("peft_type") or "", object), PromptLearningConfig)


def say_other_weight_files(adapter: ModelPath) -> None:
    """Say which weight files of an adapter's directory are not its own, and so read by nobody: what else was trained may be in them."""
    if files := adapter.other_weight_files():
        note(
            f"adapter {adapter.path}: its directory also holds {', '.join(file.name for file in files[:3])}, which PEFT does not read; what was "
            "trained with the adapter may be in there"
        )


def misfit(adapter: ModelPath) -> str | None:
    """The first setting of an adapter that PEFT cannot compute with, since it is of another type than its default, in words."""
    config = adapter.adapter_config()
    stated = config.get("peft_type")
    if (kind := _KINDS.get(stated or "")) is None:
        return f"its adapter_config.json has the peft_type {json.dumps(stated)}, which the installed PEFT {PEFT_VERSION} does not know"
    for field in dataclasses.fields(kind):
        default = {} if field.default_factory is dict else field.default
        types = (int, float) if type(default) in (int, float) else (type(default),)
        value = config.get(field.name, default)
        if types[0] in (int, str, dict) and (not isinstance(value, types) or (isinstance(value, bool))):
            return f"its adapter_config.json has {field.name} {json.dumps(value)[:60]}, in place of a value such as {json.dumps(default)}"
    return None


def check_patterns(model: PreTrainedModel, adapter: ModelPath) -> None:
    """Raise `CoraError` where a regular expression of the adapter is invalid, or takes too long on this model's names as PEFT matches it."""
    config = adapter.adapter_config()
    complete = [pattern for key in ("target_modules", "exclude_modules") if isinstance(pattern := config.get(key), str)]
    endings = [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    with bounded(f"adapter {adapter.path}: matching the patterns of adapter_config.json"):
        for pattern in (*complete, *(rf"(.*\.)?({ending})$" for ending in endings)):
            try:
                matches = re.compile(pattern).fullmatch
            except (re.error, OverflowError) as error:
                raise CoraError(f"adapter {adapter.path}: {pattern[:60]!r} is no regular expression: {error}") from error
            for name, _ in model.named_modules():
                matches(name)


def pattern_value(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first matching key, else `default`; keys match as in PEFT, as a regex on the end of the name."""
    try:
        return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)
    except (re.error, OverflowError) as error:
        raise CoraError(f"adapter_config.json has a pattern that is no regular expression: {error}") from error
