"""What an adapter's files call the modules of its base, where the loaded model has other names for them.

An earlier transformers gave other ones, and so does the class for images and text of which the loaded model is the language model alone.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from transformers import PreTrainedModel

from cora_cli.adapters.peft_settings import pattern_value
from cora_cli.adapters.storage import PREFIX
from cora_cli.models.skeleton import ONE_EXPERT, Skeleton

_KEY = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+?)(?=\.lora_|\.(?:base_layer|modules_to_save|original_module|token_adapter)\.|\.weight$|\.bias$)"
)

Stored = TypeVar("Stored")


def names_of(model: PreTrainedModel, keys: Collection[str]) -> dict[str, str]:
    """The name in `model` of each module that the `keys` of an adapter's files name otherwise."""
    modules = {found["module"] for key in keys if (found := _KEY.match(key))}
    known = {name for name, _ in model.named_modules()}
    return {} if modules <= known else Skeleton(model).renamed_modules(modules)


def renamed(stored: Mapping[str, Stored], names: Mapping[str, str]) -> dict[str, Stored]:
    """What is `stored` by the keys of an adapter, with the modules renamed that `names` holds."""
    modules = {key: found["module"] for key in stored if (found := _KEY.match(key)) and found["module"] in names}
    return {
        f"{PREFIX}{names[modules[key]]}{key.removeprefix(PREFIX + modules[key])}" if key in modules else key: value
        for key, value in stored.items()
    }


def config_by_names(config: dict[str, Any], keys: Collection[str], names: Mapping[str, str]) -> dict[str, Any]:
    """The configuration of a LoRA whose modules have other names in the model: with these names in place of its patterns, which may fit the others alone."""
    single = config.get("peft_type") != "LORA" or config.get("target_parameters") or any(ONE_EXPERT.search(key) for key in keys)
    if not names or single:
        return config
    modules = sorted({found["module"] for key in keys if ".lora_" in key and (found := _KEY.match(key))})
    patterns = {
        setting: {
            names.get(module, module): value
            for module in modules
            if (value := pattern_value(config.get(setting), module, None)) is not None
        }
        for setting in ("rank_pattern", "alpha_pattern")
    }
    saved = config.get("modules_to_save")
    return {
        **config,
        **patterns,
        "target_modules": [names.get(module, module) for module in modules],
        "modules_to_save": saved and [names.get(module, module) for module in saved],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
