"""Weights that are one in the code of a model, told as for transformers 4, or not at all."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from cora_cli.models.own_code.classes import embedding_of


@contextlib.contextmanager
def listed_ties() -> Iterator[None]:
    """Have models created whose code ties weights as for transformers 4, by listing those that are the embedding's, or by giving two layers the same
    one; transformers asks for names and their sources by now."""
    place: Any = PreTrainedModel
    before = place.get_expanded_tied_weights_keys

    def expanded(self: Any, all_submodels: bool = False) -> dict[str, str]:
        found: dict[str, str]
        if all_submodels or not self.is_custom_code():
            found = before(self, all_submodels)
            return found
        every = dict(self.named_parameters(remove_duplicate=False))
        first = {id(weight): name for name, weight in reversed(every.items())}
        same = {name: first[id(weight)] for name, weight in every.items() if name != first[id(weight)]}
        if not isinstance(stated := self._tied_weights_keys, dict):
            stated = _of_embedding(self, every, [re.compile(str(pattern)) for pattern in stated or _own_head(self)])
            if stated and getattr(self.config, "tie_word_embeddings", None) is None:
                # As of every configuration of transformers 4 that does not say otherwise.
                self.config.tie_word_embeddings = True
        if same or stated or self._tied_weights_keys is not None:
            self._tied_weights_keys = same | stated
        found = before(self, all_submodels)
        return same | found

    place.get_expanded_tied_weights_keys = expanded
    try:
        yield
    finally:
        place.get_expanded_tied_weights_keys = before


def _own_head(model: Any) -> list[str]:
    """The weight of the head that the code itself tells: transformers 4 tied it, whether the code listed it or not."""
    own = (kind for kind in type(model).__mro__ if not kind.__module__.startswith("transformers."))
    head = model.get_output_embeddings() if any("get_output_embeddings" in vars(kind) for kind in own) else None
    return [f"^{re.escape(name)}\\.weight$" for name, module in model.named_modules() if module is head]


def _of_embedding(model: Any, every: Mapping[str, torch.Tensor], listed: list[re.Pattern[str]]) -> dict[str, str]:
    """The name of the embedding's weight by those of the listed ones of its shape; a bias is no part of it."""
    embedding = embedding_of(model)
    source = next((f"{name}.weight" for name, module in model.named_modules() if module is embedding), None)
    if source is None:
        return {}
    fitting = (name for name, weight in every.items() if name != source and weight.shape == every[source].shape)
    return {name: source for name in fitting if any(pattern.search(name) for pattern in listed)}
