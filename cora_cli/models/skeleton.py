"""The causal model that transformers builds from a configuration, without weights: the names and kinds of its modules.

A checkpoint's tensors may have other names in their file than in the loaded model; transformers' own rules give the latter.
"""

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from cora_cli.errors import CoraError, reason
from cora_cli.models.configuration import load_configuration
from cora_cli.models.model_path import ModelPath
from cora_cli.models.own_code.classes import complete_class, embedding_of, has_own_code
from cora_cli.models.own_code.ties import listed_ties

NUMBERED = re.compile(r"(?P<stack>.*?)\.(?P<number>\d+)\.(?P<rest>.+)")
"""The name of what belongs to a layer with a number, and of the stack of layers that holds it."""
ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of what belongs to a single expert; a loaded model may hold the weights of all in one parameter (`fused_experts`)."""


def of_text(name: str) -> str:
    """The name of a tensor without the component that a class for images and text puts around its language model."""
    return ".".join(part for part in name.split(".") if part != "language_model")


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A causal language model on the meta device."""

    model: PreTrainedModel

    def loaded_names(self, keys: Iterable[str]) -> dict[str, str]:
        """The name in the loaded model of each tensor that it takes unchanged, by the tensor's name in the files.

        Tensors that the model does not take, or takes only as a part of a fused one, are absent.
        """
        return {key: name for key, (name, converted) in self.names(keys).items() if name in self._own and not converted}

    def renamed_modules(self, modules: Collection[str]) -> dict[str, str]:
        """The name in the loaded model of each of `modules` that an earlier transformers named otherwise, or that a class for images and text holds
        within `language_model`, but that for text alone does not; no two get one name.

        PEFT applies the rules for the former, and takes no module of the model without its head, whose names lack the prefix, for one with a head.
        """
        loaded = self.loaded_names(f"{module}.weight" for module in modules)
        names = {key.removesuffix(".weight"): name.removesuffix(".weight") for key, name in loaded.items()}
        by_text: dict[str, list[str]] = {}
        for name, _ in self.model.named_modules():  # fused experts have no weight of that name
            by_text.setdefault(of_text(name), []).append(name)
        for module in set(modules) - names.keys():
            same_text = by_text.get(of_text(module), [])
            if len(same_text) == 1:
                names[module] = same_text[0]
        every = [names.get(module, module) for module in modules]
        same = {module: {module, f"{self.model.base_model_prefix}.{module}"} for module in names}
        return {module: name for module, name in names.items() if name not in same[module] and every.count(name) == 1}

    def names(self, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
        """For each tensor of the files, the name that it gets in the loaded model, and whether others go into the same tensor.

        A tensor that the model does not take has a name that is none of `model.state_dict()`.
        """
        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        prefix = self.model.base_model_prefix
        found = {}
        for key in keys:
            name, converter = rename_source_key(key, renamings, converters, prefix, self._own)
            # A rule for the names of another program may fit one of the model's, too.
            if name not in self._own and key in self._own:
                name, converter = rename_source_key(key, [], [], prefix, self._own)
            found[key] = (name, converter is not None)
        return found

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The parameters of the model to which none of the tensors `keys` of its files belongs, although transformers asks for them."""
        names = self.names(keys)
        found = {name for name, _ in names.values()}
        for rule in self._rules:
            if isinstance(rule, WeightConverter):
                found |= {name for several in self._results(rule, names).values() for name in several}
        found |= {other for name in found for other in self.shared.get(name, ())}
        ignored = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        # Code of a model's own may name weights that are then random.
        is_own = has_own_code(self.model)
        own = [(name, weight.requires_grad and is_own) for name, weight in self.model.named_parameters(remove_duplicate=False)]
        return sorted(
            name
            for name, needed in own
            if name not in found and (needed or not any(pattern.search(name) for pattern in ignored))
        )

    def parts(self, keys: Iterable[str]) -> dict[str, tuple[str, int, int]]:
        """The weights of the model that are equal parts of the rows of one tensor of the files, by name: that tensor, the part's place, and their number."""
        found: dict[str, tuple[str, int, int]] = {}
        names = self.names(keys)
        for rule in self._rules:
            cuts = isinstance(rule, WeightConverter) and len(rule.operations) == 1 and isinstance(rule.operations[0], Chunk)
            if cuts and rule.operations[0].dim == 0:
                for key, several in self._results(rule, names).items():
                    found |= {name: (key, place, len(several)) for place, name in enumerate(several)}
        return {name: part for name, part in found.items() if name in self._own}

    @staticmethod
    def _results(rule: WeightConverter, names: dict[str, tuple[str, bool]]) -> dict[str, list[str]]:
        """What `rule` makes of each tensor of the files that becomes several; `names` has the first of them."""
        first = rule.target_patterns[0]
        return {
            key: [name.replace(first, one, 1) for one in rule.target_patterns]
            for key, (name, converted) in names.items()
            if converted and first in name and len(rule.target_patterns) > 1
        }

    def stored_twice(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """The tensors of the loaded model that each of several tensors of the files would be, with those tensors."""
        found: dict[str, list[str]] = {}
        for key, name in self.loaded_names(keys).items():
            found.setdefault(name, []).append(key)
        return {name: sorted(same) for name, same in found.items() if len(same) > 1}

    def left_out(self, keys: Iterable[str]) -> list[str]:
        """The tensors of the files that belong to modules that the model lacks, such as a part that reads images, or layers that predict several
        tokens ahead. Some classes tell transformers to pass over them in silence.

        Buffers that older versions stored next to a module's weights are none of them.
        """
        modules = {name for name, _ in self.model.named_modules()}
        return sorted(
            key
            for key, (name, _) in self.names(keys).items()
            if name not in self._own and name.rpartition(".")[0] not in modules and not name.endswith("inv_freq")
        )

    def surplus_layers(self, keys: Iterable[str]) -> list[str]:
        """The numbered layers of the files, such as `model.layers.32`, that the model lacks although they are like one of its own.

        Layers of another kind, such as those that predict several tokens ahead, are none of them.
        """
        found: dict[tuple[str, int], set[str]] = {}
        for name, _ in self.names(keys).values():
            if numbered := NUMBERED.match(name):
                found.setdefault((numbered["stack"], int(numbered["number"])), set()).add(numbered["rest"])
        own = {layer for layer, parts in found.items() if any(f"{layer[0]}.{layer[1]}.{part}" in self._own for part in parts)}
        kinds = {(stack, frozenset(found[stack, number])) for stack, number in own}
        return [
            f"{stack}.{n}"
            for (stack, n), parts in sorted(found.items())
            if (stack, n) not in own and (stack, frozenset(parts)) in kinds
        ]

    @functools.cached_property
    def _own(self) -> dict[str, Any]:
        own: dict[str, Any] = self.model.state_dict()
        return own

    @functools.cached_property
    def _rules(self) -> Sequence[Any]:
        """How transformers renames and converts the tensors of files for this model."""
        return get_model_conversion_mapping(self.model)

    @functools.cached_property
    def shared(self) -> dict[str, list[str]]:
        """The names of each parameter that has several, by each of them: a head's weight may be the embedding's."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return {name: same for same in names.values() if len(same) > 1 for name in same}

    @functools.cached_property
    def transposed(self) -> frozenset[str]:
        """The modules that store their weight as (in, out), GPT-2's Conv1D."""
        return frozenset(name for name, module in self.model.named_modules() if isinstance(module, Conv1D))


def surplus_fault(layers: list[str]) -> str:
    """Says that the files hold `layers`, at least one, that the configuration leaves out."""
    return (
        f"its files hold {len(layers)} more layers, such as {layers[0]}, than its config.json describes, so the model would not be the one "
        "that was stored; correct the number of layers in config.json"
    )


def shape_fault(name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Says that a tensor of the files has not the shape that the configuration describes."""
    if 0 in stored and 0 not in expected:
        return without_numbers(name, stored)
    return f"{name} has the shape {stored}, but its config.json describes {expected}; correct one of them"


def without_numbers(name: str, shape: tuple[int, ...]) -> str:
    """Says that a file has a tensor without its numbers."""
    return (
        f"{name} is stored without its numbers, with the shape {shape}: its parts were not gathered from the processes of the training, as "
        "DeepSpeed's ZeRO-3 needs; save it again with all of its parts"
    )


def layer_of(model: Any, tensor: str) -> str | None:
    """The linear layer whose name begins that of a tensor, such as `….q_proj` for `….q_proj.weight_scale`; None where there is none."""
    modules = dict(model.named_modules())
    parts = tensor.split(".")
    for prefix in ("", f"{model.base_model_prefix}."):
        for end in range(len(parts) - 1, 0, -1):
            if isinstance(modules.get(name := prefix + ".".join(parts[:end])), torch.nn.Linear | Conv1D):
                return name
    return None


def fused_experts(model: torch.nn.Module) -> list[str]:
    """The parameters that hold a matrix for each expert of a mixture, (experts, out, in) or (experts, in, out)."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and ".experts." in name]


def other_modalities(model: Any) -> frozenset[str]:
    """The modules of a model of several modalities that are no part of its language model.

    These are the ones outside its decoder, its embedding and its head, and within the decoder the models that read no text, such as
    Phi-4-multimodal's encoders of images and sounds. Where no configuration tells the decoder, as in code of a model's own, it is the part with another
    kind of configuration that has the embedding of the text.
    """
    modules, embedding = dict(model.named_modules()), embedding_of(model)
    parts = {name: part for name, part in modules.items() if isinstance(part, PreTrainedModel)}
    apart = [name for name, part in parts.items() if "text" not in part.input_modalities]
    others = {name for name in modules if any(is_below(name, part) for part in apart)}
    prefix = ""
    if model.config.get_text_config(decoder=True) is not model.config:
        decoder = model.get_decoder()
        prefix = next(name for name, module in modules.items() if module is decoder)
    elif has_own_code(model):
        kind = type(model.config)
        holders = (name for name, part in parts.items() if any(module is embedding for module in part.modules()))
        prefix = next((name for name in holders if type(parts[name].config) is not kind), "")
    if prefix:
        ends = (embedding, model.get_output_embeddings())
        others |= {
            name for name, module in modules.items() if not is_below(name, prefix) and not any(module is end for end in ends)
        }
    return frozenset(others)


def is_below(name: str, part: str) -> bool:
    """Whether a module is another one, or within it."""
    return f"{name}.".startswith(f"{part}.")


def build_skeleton(config: Any, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal model of a configuration on the meta device, which takes up to a second.

    Its weights have the type of the configuration, or `dtype`. Raises `CoraError` for a configuration that its class does not accept.
    """
    try:
        with torch.device("meta"), listed_ties():
            built: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, **({} if dtype is None else {"dtype": dtype})
            )
    except ImportError as error:  # such as timm, of which Gemma 3n makes the part that reads images
        package = re.search(r"requires the (\S+) library", str(error))
        lacking = (
            f"the package {package[1]}: pip install {package[1]}" if package else f"what cannot be imported: {reason(error)}"
        )
        raise CoraError(f"{config.name_or_path}: transformers needs for {config.model_type} models {lacking}") from error
    except Exception as error:  # transformers raises many unrelated types
        raise CoraError(
            f"config.json of {config.name_or_path} does not describe a {config.model_type} model: {reason(error)}"
        ) from error
    complete_class(built)
    return built


def skeleton_of(model: ModelPath, trust_remote_code: bool = False) -> Skeleton:
    """The skeleton of the model in a directory. Raises `CoraError` as `load_configuration` and `build_skeleton` do."""
    return Skeleton(build_skeleton(load_configuration(model, trust_remote_code), trust_remote_code))
