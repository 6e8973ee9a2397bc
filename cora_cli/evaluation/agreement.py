"""Check that an engine that answers prompts together gives every prompt the logits that it has alone.

Families differ in how they number positions behind padding and in what they read from a mask; the first steps of a few prompts show it.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from cora_cli.errors import CoraError, is_out_of_memory, reason
from cora_cli.evaluation.decode import Tokens
from cora_cli.evaluation.sampling import best_tokens
from cora_cli.methods.parts.layers import transformers_model, without_cache
from cora_cli.models.causality import require_causal_pass
from cora_cli.models.configuration import length_limits
from cora_cli.models.loading import hides_context
from cora_cli.models.precision import UNSUPPORTED, computing_in, rounds_by_rows

TOLERANCES = {torch.float32: 1e-4, None: 5e-2}
"""The largest mean difference of the logits of one step, relative to their mean size; None is the precision of the model."""


def make_probes(prompts: Sequence[Tokens], limits: set[int], longest_too: bool = False) -> list[list[int]]:
    """Beginnings of prompts: a short one, a longer one, one that shares a prefix with it, and two beyond each limit that is reached.

    Of these two, the shorter one is padded. `longest_too` adds the longest prompt, for a model whose limits are not known.
    """
    by_length = sorted(map(list, prompts), key=len)
    shortest, longest = by_length[0], by_length[-1]
    beyond = [longest[: limit + more] for limit in sorted(limits) if limit < len(longest) for more in (16, 1)]
    # None is longer than the longest prompt, so that all fit the model's context.
    return [
        longest[:64],
        shortest[:8],
        (longest[:40] + shortest[:8])[: len(longest)],
        *beyond,
        *([longest] if longest_too else []),
    ]


class Agreement:
    """What each of a few prompts gives alone, as logits (steps, vocabulary), in float32 where the model can compute in it.

    Raises `CoraError` for a model with which transformers itself cannot answer, or that is not causal.
    """

    def __init__(self, model: Any, prompts: Sequence[Tokens], alone: Callable[[Sequence[Tokens]], list[torch.Tensor]]) -> None:
        self._model, self.probes = model, make_probes(prompts, length_limits(model.config), hides_context(model.config))
        require_causal_pass(model, self.probes[0], **without_cache(model))
        for self._dtype in (None,) if rounds_by_rows(model) else TOLERANCES:
            try:
                with self._precision():
                    self._wanted = [alone([probe])[0] for probe in self.probes]
            except UNSUPPORTED as error:
                if self._dtype is None:
                    if is_out_of_memory(error):
                        raise
                    raise CoraError(
                        f"{type(transformers_model(model)).__name__} cannot answer prompts: transformers' generate ends in "
                        f"{type(error).__name__} ({reason(error)})"
                    ) from error
            else:
                return

    @property
    def following(self) -> list[list[int]]:
        """The first tokens that follow each probe."""
        return [logits.argmax(-1).tolist() for logits in self._wanted]

    def require_finite(self) -> None:
        """Raise `CoraError` where the largest logit of a step, and so the answer, is no number."""
        for logits in self._wanted:
            best_tokens(logits)

    def fault(self, together: Callable[[], list[torch.Tensor]]) -> str | None:
        """Why `together`, which computes all probes at once, does not give the same logits; None if it does."""
        try:
            with self._precision():
                found = together()
        except Exception as error:  # whatever a class that was not made for these arguments raises
            if is_out_of_memory(error):
                raise
            return f"it ends in {type(error).__name__}"
        worst = 0.0
        for logits, wanted in zip(found, self._wanted, strict=True):
            difference = (logits - wanted).abs().mean(-1) / wanted.abs().mean(-1)
            worst = max(worst, difference.nan_to_num(torch.inf).max().item() if wanted.isfinite().all() else 0.0)
        return None if worst <= TOLERANCES[self._dtype] else f"its logits are not those of single prompts (by {worst:.1e})"

    def _precision(self) -> Any:
        return computing_in(self._model, self._dtype) if self._dtype else nullcontext()
