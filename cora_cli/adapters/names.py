"""What an adapter's files call the modules of its base, where the loaded model has other names for them.

An earlier transformers gave other ones, and so does the class for images and text of which the loaded model is the language model alone.
"""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import transformers_weight_conversion
from transformers import PreTrainedModel

from cora_cli.adapters.experts import joined
from cora_cli.adapters.peft_settings import pattern_value
from cora_cli.adapters.storage import PREFIX
from cora_cli.models.checkpoint import Checkpoint
from cora_cli.models.model_path import ModelPath
from cora_cli.models.skeleton import ONE_EXPERT, Skeleton, of_text

_PARTS = "|".join(sorted({*map(re.escape, PEFT_TYPE_TO_PREFIX_MAPPING.values())}))
"""How the names of the tensors begin that the methods of PEFT add to a module."""
_KEY = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+?)(?=\.(?:{_PARTS})|\.(?:base_layer|modules_to_save|original_module|token_adapter)\.|\.weight$|\.bias$)"
)

Stored = TypeVar("Stored")


def module_of(key: str) -> str:
    """The module that a key of an adapter's files names."""
    found = _KEY.match(key)
    return found["module"] if found else key.removeprefix(PREFIX).rpartition(".")[0]


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


@contextlib.contextmanager
def names_kept() -> Iterator[None]:
    """Have PEFT take an adapter's tensors by the names that they have, but for those of single experts, which it joins.

    Otherwise it applies transformers' rules for the names in files to names that are the model's already, and drops what then fits nothing: in
    Laguna, a rule for `shared_expert.` makes `shared_experts..up_proj` of `shared_experts.up_proj`.
    """
    place: Any = transformers_weight_conversion
    before = place.convert_peft_adapter_state_dict_for_transformers
    place.convert_peft_adapter_state_dict_for_transformers = lambda model, peft_config, adapter_state_dict, adapter_name: (
        joined(model, adapter_state_dict)
    )
    try:
        yield
    finally:
        place.convert_peft_adapter_state_dict_for_transformers = before


def of_left_out_parts(model: PreTrainedModel, keys: Collection[str], names: Mapping[str, str], base: ModelPath) -> set[str]:
    """Which `keys` of an adapter are of parts of its base that the loaded model lacks, such as the one that reads images."""
    known = {name for name, _ in model.named_modules()} | names.keys()
    modules = {key: module_of(key) for key in keys if key.startswith(PREFIX)}
    unknown = {module for module in modules.values() if module not in known}
    if not unknown:
        return set()
    # The names in the files may have a prefix that those of the class lack, or lack one.
    parts = [f".{tensor.rpartition('.')[0]}" for tensor in Skeleton(model).left_out(Checkpoint(base).shapes)]
    apart = {module for module in unknown if any(part.endswith(f".{module}") or f".{module}".endswith(part) for part in parts)}
    return {key for key, module in modules.items() if module in apart}


def config_by_names(config: dict[str, Any], keys: Collection[str], names: Mapping[str, str]) -> dict[str, Any]:
    """The configuration of an adapter whose modules have other names in the model: with these names in place of its patterns, which may fit the others
    alone.
    """
    if not names or any(ONE_EXPERT.search(key) for key in keys):
        return config
    part = f".{PEFT_TYPE_TO_PREFIX_MAPPING[config['peft_type']]}"
    parameters = config.get("target_parameters") or []
    owners = tuple(name.rpartition(".")[0] for name in parameters)
    every = {found["module"] for key in keys if part in key and (found := _KEY.match(key))}
    if "" in owners:  # names without their module, which alone say nothing of it
        every = {module for module in every if is_target(config, module)}
    owners = tuple(filter(None, owners))
    modules = sorted(module for module in every if not (owners and module.endswith(owners)))
    here = {module: names.get(module, module) for module in modules}
    changed: dict[str, Any] = {}
    if parameters:
        changed["target_parameters"] = [of_text(name) for name in parameters]
    if config["peft_type"] == "ADALORA":  # which names a tensor of each module, and the pairs that it keeps
        kept = {key.partition(".lora_"): value for key, value in (config.get("rank_pattern") or {}).items()}
        changed["rank_pattern"] = {
            f"{names.get(module, module)}{mark}{end}": value for (module, mark, end), value in kept.items()
        }
    for setting in ("rank_pattern", "alpha_pattern"):
        if config.get(setting) and setting not in changed:
            values = {module: pattern_value(config[setting], module, None) for module in modules}
            ours = {here[module]: value for module, value in values.items() if value is not None}
            changed[setting] = ours | ({of_text(name): value for name, value in config[setting].items()} if parameters else {})
    if inner := config.get("feedforward_modules"):
        changed["feedforward_modules"] = [here[module] for module in modules if is_feedforward(inner, module)]
    if saved := config.get("modules_to_save"):
        changed["modules_to_save"] = [_here(module, names) for module in saved]
    if isinstance(rows := config.get("trainable_token_indices"), dict):
        changed["trainable_token_indices"] = {_here(module, names): tokens for module, tokens in rows.items()}
    unused = ("exclude_modules", "layers_to_transform", "layers_pattern")
    return {**config, **changed, "target_modules": list(here.values()), **{name: None for name in unused if name in config}}


def is_feedforward(stated: str | Collection[str], module: str) -> bool:
    """Whether IA3 scales what goes into a module, and not what comes out, by its setting `feedforward_modules`."""
    return bool(re.fullmatch(stated, module)) if isinstance(stated, str) else module.endswith(tuple(stated))


def feedforward_by_names(config: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The configuration of an IA3 adapter with the `keys` as PEFT reads it; see `feedforward_among`."""
    inner, targets = config.get("feedforward_modules"), config.get("target_modules")
    if not (isinstance(inner, list) and isinstance(targets, list)):
        return config
    modules = {found["module"] for key in keys if ".ia3_l" in key and (found := _KEY.match(key))}
    return config | feedforward_among(inner, targets, modules)


def feedforward_among(inner: Collection[str], targets: Collection[str], modules: Collection[str]) -> dict[str, list[str]]:
    """The settings of IA3 on `modules` with each of its feedforward_modules, `inner`, among the target_modules; nothing where that is so.

    PEFT fills in those of a family as it installs an adapter, whether they are `targets` or not, and refuses what it then stores.
    """
    if {*inner} <= {*targets}:
        return {}
    among = sorted(module for module in modules if is_feedforward(inner, module))
    return {"target_modules": sorted(modules), "feedforward_modules": among} if among else {"feedforward_modules": []}


def _here(module: str, names: Mapping[str, str]) -> str:
    """The name in the model of a module that a setting names completely or by an ending; `names` are those of the modules with other ones."""
    found = {name for stored, name in names.items() if f".{stored}".endswith(f".{module}")}
    return found.pop() if len(found) == 1 else of_text(module)


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module is one of the `target_modules` of the configuration of a LoRA."""
    stated = config.get("target_modules")
    return bool(stated) and bool(check_target_module_exists(LoraConfig(target_modules=stated), module))
