"""The rows of embedding and head that an adapter brings for tokens which its base lacks, or leaves out since nothing used them."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from cora_cli.adapters.storage import PREFIX
from cora_cli.errors import CoraError
from cora_cli.models.model_path import ModelPath
from cora_cli.progress import note


def resize_embeddings(model: PreTrainedModel, state: dict[str, torch.Tensor], adapter: ModelPath) -> None:
    """Give the model as many embedding rows as the embeddings that an adapter stores because they were resized: for added tokens, or without padding.

    One that trains single rows may store these alone. Raises `CoraError` where one of them lies beyond rows that nobody has.
    """
    embedding: Any = model.get_input_embeddings()
    stored = {
        (len(state[key]), len(module.weight)) for name, module in _ends(model) for key in _weight_keys(name) if key in state
    }
    # Head and embedding may have several numbers of rows in the base, too.
    rows = {here for here, known in stored if here != known}
    config, known = adapter.adapter_config(), len(embedding.weight)
    single = config.get("trainable_token_indices") or config.get("token_indices") or []
    trained = itertools.chain(*single.values()) if isinstance(single, dict) else single
    if not stored and (added := sorted({row for row in trained if not 0 <= row < known})):
        if added != list(range(known, known + len(added))):
            raise CoraError(
                f"adapter {adapter.path} trains row {added[-1]}, but the embedding of the base model has {known:,} rows, and the adapter stores none with "
                "the rows up to there; it belongs to another base model, or is to be saved with its embedding"
            )
        rows = {known + len(added)}
    if len(rows) == 1:
        before = {name: len(module.weight) for name, module in _ends(model)}
        model.resize_token_embeddings(count := rows.pop(), mean_resizing=False)
        _fill_added_rows(model, state, adapter, before)
        if count > known and not adapter.has_tokenizer:
            note(
                f"adapter {adapter.path} brings {count:,} embedding rows, its base {known:,}: its training may have added tokens, but it holds no tokenizer, "
                "so the base's is used; copy the tokenizer of its training into that directory"
            )


@torch.no_grad()
def _fill_added_rows(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], adapter: ModelPath, before: Mapping[str, int]
) -> None:
    """Give rows beyond those `before`, in an embedding and in a head of its own, the mean of these, and say where the adapter stores none for them.

    Otherwise they would be drawn at random, and those of a head enter the probabilities of all tokens. Nearly the mean is what transformers gives
    them where it adds tokens before a training.
    """
    copied = tuple(adapter.adapter_config().get("modules_to_save") or ())  # PEFT gives these a weight of their own
    shared: dict[torch.nn.Parameter, list[str]] = {}  # the names of each weight: head and embedding may share theirs
    for name, module in _ends(model):
        shared.setdefault(module.weight, []).append(name)
    for weight, names in shared.items():
        known = before[names[0]]
        weight[known:] = weight[:known].float().mean(dim=0).to(weight.dtype)
        held = {name for name in names if _holds_rows(state, name)}
        shared_rows = held - {name for name in held if name.endswith(copied)}
        lacking = [] if shared_rows else [name for name in names if name not in held]
        if len(weight) > known and lacking:
            note(
                f"adapter {adapter.path} adds {len(weight) - known} tokens, but stores no rows of {lacking[0]} for them; they get the mean of its other "
                "rows, as where transformers adds tokens"
            )


def _holds_rows(state: Mapping[str, torch.Tensor], name: str) -> bool:
    return any(key in state for key in _weight_keys(name)) or any(f"{PREFIX}{name}.token_adapter." in key for key in state)


def _ends(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """Embedding and head of a model, by name."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [(name, module) for name, module in model.named_modules() if any(module is end for end in ends)]


def _weight_keys(name: str) -> tuple[str, ...]:
    """PEFT's keys for the complete weight of the module `name`."""
    prefix = f"{PREFIX}{name}"
    parts = ("", ".base_layer", ".modules_to_save", ".token_adapter.base_layer")
    return tuple(f"{prefix}{part}.weight" for part in parts)


def embedding_rows(model: Any) -> int:
    """The number of tokens that a model's embedding has rows for."""
    return len(model.get_input_embeddings().weight)


def say_tokens_without_rows(tokens: int, rows: int, adapter: ModelPath) -> None:
    """Say so where a tokenizer, which is written next to the weights, has more `tokens` than the embedding has `rows`."""
    if tokens > rows:
        note(
            f"{adapter.reference}: its tokenizer has {tokens:,} tokens, but the embedding {rows:,} rows, and the adapter stores none for the others: text "
            "with one of them cannot be read"
        )
