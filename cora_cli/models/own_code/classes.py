"""What classes of models with code of their own leave out, and transformers, PEFT and `cora` ask for."""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from cora_cli.errors import CoraError

_SWITCHES = frozenset({"use_cache", "return_dict", "output_attentions", "output_hidden_states"})
"""Arguments of transformers' forward passes that say what to return, and change no number."""


def has_own_code(model: Any) -> bool:
    """Whether the class of a model is none of transformers'."""
    return not type(model).__module__.startswith("transformers.")


def complete_class(model: Any, directory: Path | None = None) -> None:
    """Give a model with code of its own what its class lacks: its embedding, the sizes in its configuration, `generate`, and a `forward` that takes
    what says nothing. `directory` may hold its generation configuration.

    Raises `CoraError` where no embedding of tokens can be found, and for a forward pass without `input_ids`.
    """
    own = type(model)
    if not has_own_code(model) or "_completed" in vars(own):
        return
    added: dict[str, Any] = {"__module__": own.__module__, "__doc__": own.__doc__, "_completed": True}
    if not _tells_embedding(model):
        if _find_embedding(model) is None:
            raise CoraError(
                f"{own.__name__} has no embedding of tokens that can be found; define get_input_embeddings in its class"
            )
        added["get_input_embeddings"] = _find_embedding
    arguments = inspect.signature(own.forward).parameters
    if "input_ids" not in arguments and not _takes_any(arguments):
        raise CoraError(
            f"the forward pass of {own.__name__} takes no input_ids, but {', '.join([*arguments][1:])}; rename the token ids in its code"
        )
    added["forward"] = _completed_forward(own.forward)
    bases = (own,) if issubclass(own, GenerationMixin) else (own, GenerationMixin)
    model.__class__ = type(own.__name__, bases, added)
    _state_sizes(model)
    if getattr(model, "generation_config", None) is None:
        model.generation_config = _generation_config(model, directory)


def embedding_of(model: Any) -> torch.nn.Embedding | None:
    """The embedding of tokens, as the class tells it or as it can be found."""
    return model.get_input_embeddings() if _tells_embedding(model) else _find_embedding(model)


def _tells_embedding(model: Any) -> bool:
    with contextlib.suppress(NotImplementedError):  # transformers' own way to say that it found none
        return model.get_input_embeddings() is not None
    return False


def _find_embedding(model: Any) -> torch.nn.Embedding | None:
    """The embedding with a row for each token of the vocabulary, or the first with more; where the configuration does not tell their number, the one
    with as many rows as a layer has outputs."""
    found = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    size = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    if size is None:
        outputs = {module.out_features for module in model.modules() if isinstance(module, torch.nn.Linear)}
        fitting = sorted((one for one in found if one.num_embeddings in outputs), key=lambda one: -one.num_embeddings)
    else:
        fitting = [one for one in found if one.num_embeddings == size] or [one for one in found if one.num_embeddings > size]
    return next(iter(fitting), None)


def _takes_any(arguments: Mapping[str, inspect.Parameter]) -> bool:
    return any(one.kind is one.VAR_KEYWORD for one in arguments.values())


def _completed_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass that is given only arguments that it takes where the others say nothing: PEFT and transformers name all that they know.

    It raises `CoraError` where what is returned has no logits.
    """
    own = inspect.signature(forward).parameters
    takes_any = _takes_any(own)

    def says_nothing(name: str, value: Any) -> bool:
        return value is None or name in _SWITCHES or (name == "attention_mask" and bool(value.all()))

    @functools.wraps(forward)
    def completed(self: Any, *args: Any, **named: Any) -> Any:
        kept = {name: value for name, value in named.items() if takes_any or name in own or not says_nothing(name, value)}
        output = forward(self, *args, **kept)
        if not isinstance(getattr(output, "logits", None), torch.Tensor):
            raise CoraError(
                f"the forward pass of {type(self).__name__} returns a {type(output).__name__} without an attribute logits, those of the next tokens; have "
                "it return transformers' CausalLMOutput"
            )
        return output

    return completed


def _state_sizes(model: Any) -> None:
    """Have the configuration tell under transformers' own names the sizes that it has under others, such as nanoGPT's `n_layer`."""
    config, embedding = model.config.get_text_config(decoder=True), model.get_input_embeddings()
    stacks = [len(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    rows, width = embedding.weight.shape
    known = {"vocab_size": (rows, r"vocab"), "hidden_size": (width, r"emb|dim|model|hidden|width")}
    known["num_hidden_layers"] = (max(stacks, default=1), r"layer|block|depth")
    for name, (size, words) in known.items():
        if getattr(config, name, None) is not None:
            continue
        same = (one for one, value in vars(config).items() if type(value) is int and value == size)
        theirs = next((one for one in same if re.search(words, one)), None)
        if theirs is None:
            setattr(config, name, size)
        else:  # of the class, since PEFT reads the file again
            type(config).attribute_map = {**type(config).attribute_map, name: theirs}


def _generation_config(model: Any, directory: Path | None) -> GenerationConfig:
    if directory is not None and (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_model_config(model.config)
