"""Whether a model predicts each token from earlier ones alone: by its configuration and modules, and by a forward pass.

A model whose tokens attend to later ones sees the token that it is to predict, and its loss says nothing.
"""

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from cora_cli.errors import CoraError, is_out_of_memory
from cora_cli.models.precision import UNSUPPORTED, forget_failed_pass
from cora_cli.models.skeleton import is_below, other_modalities

_CROSS = re.compile(r"cross|encoder_attn")
"""Attention to an encoder's states, which has no order."""
_ROUNDING = 1e-5
"""Of the largest gradient."""


def require_causal(model: Any, reference: str) -> None:
    """Raise `CoraError` for a model whose tokens attend to later ones by its configuration, such as a BERT that is not a decoder."""
    others = other_modalities(model) | _other_parts(model)
    own = [(name, module) for name, module in model.named_modules() if name not in others and not _CROSS.search(name)]
    flags = {flag for _, module in own if type(flag := getattr(module, "is_causal", None)) is bool}
    encodes = getattr(model.config, "is_decoder", True) is False and _reads(model, "is_decoder") and True not in flags
    undirected = getattr(model.config, "causal", None) is False and _reads(model, "causal")
    if False in flags or encodes or undirected:
        bidirectional = getattr(model.config, "use_bidirectional_attention", None)
        named = "use_bidirectional_attention" if bidirectional else "causal" if undirected else "is_decoder"
        needed = "false" if bidirectional else "true"
        raise CoraError(
            f"{reference} is a {model.config.model_type} model whose tokens attend to later ones, so it cannot learn to predict the next token; "
            f"set {named} to {needed} in its config.json, or use a causal language model"
        )


def require_causal_pass(model: Any, tokens: Sequence[int], **arguments: Any) -> None:
    """Raise `CoraError` where logits of the first half of `tokens` have a gradient in the embeddings of the second half.

    It is exactly 0 in a causal model, but for the rounding of convolutions by FFT. A model in which no such gradient can be computed, or that computes no
    numbers, is not judged. The pass gets `arguments` too.
    """
    if not (half := len(tokens) // 2):
        return
    found: list[torch.Tensor] = []

    def note(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    handle = model.get_input_embeddings().register_forward_hook(note)
    try:
        with torch.enable_grad():
            logits = model(input_ids=torch.tensor([list(tokens)], device=model.device), **arguments).logits
            if logits.shape[1] < len(tokens):
                raise CoraError(
                    f"{type(model).__name__} cannot be trained: without labels, it computes logits of {logits.shape[1]} of {len(tokens)} tokens"
                )
            (gradient,) = torch.autograd.grad(logits[0, :half].float().sum(), found[:1])
    except UNSUPPORTED as error:
        if is_out_of_memory(error):
            raise
        forget_failed_pass(model)
        return
    finally:
        handle.remove()
    of_tokens = gradient.flatten(end_dim=-2)  # of one example, which some embed as (tokens, 1, hidden size)
    later = of_tokens[half - len(tokens) :]  # some put a prompt before the tokens
    if len(of_tokens) >= len(tokens) and gradient.isfinite().all() and later.abs().max() > _ROUNDING * gradient.abs().max():
        raise CoraError(
            f"the tokens of {model.config.name_or_path or 'this model'}, a {model.config.model_type} model, attend to later ones, so it cannot predict "
            "the next token; use a causal language model"
        )


def _other_parts(model: Any) -> frozenset[str]:
    """The modules of parts that are models with a kind of configuration of their own, such as an encoder of images."""
    kinds = {type(model.config), type(model.config.get_text_config(decoder=True))}
    parts = [
        name for name, part in model.named_modules() if isinstance(part, PreTrainedModel) and type(part.config) not in kinds
    ]
    return frozenset(name for name, _ in model.named_modules() if any(is_below(name, part) for part in parts))


def _reads(model: Any, setting: str) -> bool:
    """Whether the code of a model's class reads a setting, which many configurations have without a use."""
    return (
        re.search(rf"(?m)^(?!.*>>>).*\bconfig\.{setting}\b", inspect.getsource(sys.modules[type(model).__module__])) is not None
    )
