"""Several models as one that predicts the mean of their probabilities, for the loss of given tokens and for generation."""

import contextlib
import copy
import functools
import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

_CACHES = ("past_key_values", "cache_params", "state")
"""What transformers calls the state that a forward pass continues, by family."""


def mixture(members: Sequence[Any], shares: Sequence[float] | None = None) -> Any:
    """The first member, changed so that its logits are log Σ_m w_m·softmax(logits of member m), in float32 at least.

    The weights w_m are in the proportion of `shares`, and equal without. It is used like any model of transformers. Every member keeps a state of its
    own: the first has the caller's, which must be empty when it is first seen, and each other one has a copy.
    """
    first, others = members[0], members[1:]
    weights = [share / shares[0] for share in shares] if shares else [1.0] * len(members)
    alone = first.forward
    states: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()
    latest: dict[str, tuple[Any, list[Any]]] = {}  # of what takes no weak references: RWKV's list, and the tuples of older code

    def keep(name: str, state: Any, theirs: list[Any]) -> None:
        try:
            states[state] = theirs
        except TypeError:
            latest[name] = state, theirs

    def kept(name: str, state: Any) -> list[Any] | None:
        held, theirs = latest.get(name, (None, None))
        if held is state:
            return theirs
        with contextlib.suppress(TypeError):
            return states.get(state)
        return None

    @functools.wraps(alone)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs[name] for name in _CACHES if kwargs.get(name) is not None}
        for name, state in given.items():
            if kept(name, state) is None:
                keep(name, state, [copy.deepcopy(state) for _ in others])
        continued = {name: kept(name, state) or [] for name, state in given.items()}
        output = alone(*args, **kwargs)
        log_p = _log_probabilities(output.logits)
        theirs = []
        for place, member in enumerate(others):
            own = {name: states_of[place] for name, states_of in continued.items()}
            theirs.append(member(*args, **{**kwargs, **own}))
            log_p = torch.logaddexp(log_p, _log_probabilities(theirs[-1].logits) + math.log(weights[place + 1]))
        for name in _CACHES:
            # A family may create its state in the first forward pass, or anew in each.
            if (created := getattr(output, name, None)) is not None and created is not given.get(name):
                keep(name, created, [getattr(other, name) for other in theirs])
        output.logits = log_p - math.log(sum(weights))
        return output

    first.forward = forward
    return first


def share_equal_weights(model: Any, other: Any) -> None:
    """Let `other` use the memory of `model` for weights of the same name and the same bits, so that members cost what they change."""
    known = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in other.named_parameters(remove_duplicate=False):
        same = known.get(name)
        if same is not None and same.dtype == parameter.dtype and torch.equal(same, parameter):
            parameter.data = same.data


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
