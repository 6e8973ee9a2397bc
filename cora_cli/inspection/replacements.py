"""What takes the place of a left-out model's ΔW, and a model that computes with it.

Nothing is merged: a matrix keeps its weight, and its layer adds the product of the replacement's factors to its output, as an adapter
does. So nothing needs to be undone, and a change that is small against W keeps its digits in bfloat16.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from cora_cli.basis.choices import Side
from cora_cli.inspection.changes import Change, pooled_directions
from cora_cli.inspection.subspaces import energy

NOTHING, MEAN, PROJECTION = "nothing", "others' mean", "in the others' basis"
MEAN_AND_REST, RANDOM, OWN = "others' mean, rest in their basis", "in a random basis", "in the base model's directions"
ITSELF = "itself"
REPLACEMENTS = (NOTHING, MEAN, PROJECTION, MEAN_AND_REST, RANDOM, OWN, ITSELF)
"""What a ΔW is replaced by, as it is named in tables and in JSON."""

Term = tuple[torch.Tensor, torch.Tensor | None]
"""L (rows, k) and R (k, columns) of the product L R, or one matrix (rows, columns) alone."""
Update = list[Term]
"""A change as a sum of terms; an empty one changes nothing."""


def replace_change(
    own: Change,
    others: Sequence[Change],
    directions: tuple[torch.Tensor, torch.Tensor] | None,
    rank: int,
    random: Callable[[int], torch.Tensor],
) -> dict[str, Update]:
    """Each of `REPLACEMENTS` of the change `own` of a left-out model in one matrix.

    `directions` are those of the other models' pool and of the base model's W (`measure.Kept`), None where one side has no change.
    `random(k)` draws k orthonormal columns. The mean is that of the changes as they are, zero ones included.
    """
    itself: Update = [(own.left, own.right)]
    mean = _mean(others)
    if directions is None:
        changed = [change for change in others if change.energy > 0]
        pool = pooled_directions(changed, rank) if changed else own.left.new_zeros(len(own.left), 0)
        of_base = pool[:, :0]  # no more directions than those of the others, which have none or have nothing to hold
    else:
        pool, of_base = (one.to(own.left.device) for one in directions)
    drawn = random(pool.shape[1]).to(pool)
    return {
        NOTHING: [],
        MEAN: mean,
        PROJECTION: [projection(pool, itself)],
        MEAN_AND_REST: [*mean, (pool, _inside(pool, itself) - _inside(pool, mean))],
        RANDOM: [projection(drawn, itself)],
        OWN: [projection(of_base, itself)],
        ITSELF: itself,
    }


def projection(basis: torch.Tensor, update: Update) -> Term:
    """B Bᵀ X of the `update` X, for orthonormal columns B (rows, k)."""
    return basis, _inside(basis, update)


def kept_energy(own: Change, update: Update) -> float:
    """1 − ‖ΔW − X‖_F² / ‖ΔW‖_F², X being `update`: for a projection its capture (0-1), negative where X is farther from ΔW than zero is."""
    change = own.add_to(own.left.new_zeros(len(own.left), _columns(own)))
    rest = change.clone()
    for left, right in update:
        rest -= left if right is None else left @ right
    return 1.0 - energy(rest) / energy(change)


def as_stored(update: Update, side: Side, dtype: torch.dtype) -> Update:
    """`update` for the weight (out, in) itself, whatever side was inspected, in `dtype` on the CPU; parts without columns are left out."""

    def stored(part: torch.Tensor) -> torch.Tensor:
        return part.to("cpu", dtype).contiguous()

    found: Update = []
    for left, right in update:
        if right is None:
            found.append((stored(left if side == "output" else left.T), None))
        elif len(right):
            outer, inner = (left, right) if side == "output" else (right.T, left.T)
            found.append((stored(outer), stored(inner)))
    return found


@contextlib.contextmanager
def changed_by(layers: Mapping[str, torch.nn.Module], updates: Mapping[str, Update], device: torch.device) -> Iterator[None]:
    """Let the linear `layers` compute W·x + ΔW·x with ΔW of `updates`, by the same names. Their weights stay as they are."""
    with contextlib.ExitStack() as hooks:
        for name, update in updates.items():
            if update:
                hooks.callback(layers[name].register_forward_hook(_adding(update, device)).remove)
        yield


def _adding(update: Update, device: torch.device) -> Any:
    terms = [(left.to(device), None if right is None else right.to(device)) for left, right in update]

    def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        for left, right in terms:
            narrow = inputs[0] if right is None else torch.nn.functional.linear(inputs[0], right)
            output = output + torch.nn.functional.linear(narrow, left).to(output.dtype)
        return output

    return add


def _columns(change: Change) -> int:
    return (change.left if change.right is None else change.right).shape[1]


def _mean(changes: Sequence[Change]) -> Update:
    """(1/n) Σ ΔWⱼ, as factors where they are narrower than the matrix."""
    rows, columns = len(changes[0].left), _columns(changes[0])
    rights = [change.right for change in changes if change.right is not None]
    if len(rights) == len(changes) and 2 * sum(map(len, rights)) <= min(rows, columns):
        return [(torch.cat([change.left for change in changes], dim=1) / len(changes), torch.cat(rights))]
    total = changes[0].left.new_zeros(rows, columns)
    for change in changes:
        change.add_to(total, 1 / len(changes))
    return [(total, None)]


def _inside(basis: torch.Tensor, update: Update) -> torch.Tensor:
    """Bᵀ X (k, columns) of the `update` X."""
    parts = [basis.T @ left if right is None else (basis.T @ left) @ right for left, right in update]
    return torch.stack(parts).sum(dim=0)
