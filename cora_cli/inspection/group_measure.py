"""The captures within and between groups of models, from a second pass over the weights.

`groups` finds the groups from the pairs that `measure` has measured.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from cora_cli.basis.choices import BasisChoices, Side
from cora_cli.extraction.gram import one_thread_pool
from cora_cli.extraction.merge import plan
from cora_cli.inspection.changes import change_of, leave_one_out, not_zero, pooled_directions, read_matrix
from cora_cli.inspection.measure import BASE, Held, held_by, layer_of
from cora_cli.inspection.subspaces import gram, leading
from cora_cli.progress import progress
from cora_cli.weights.sources import WeightSource


@dataclasses.dataclass(frozen=True)
class GroupFindings:
    """What the pooled ΔW of each group holds of each model in the weight matrix `module`; `layer` as in `measure.Findings`."""

    module: str
    layer: int | None
    held: tuple[Held, ...]


def measure_groups(
    models: Mapping[str, WeightSource],
    base: WeightSource,
    groups: Mapping[str, Sequence[str]],
    rank: int,
    target_modules: tuple[str, ...],
    device: torch.device,
    side: Side = "output",
) -> list[GroupFindings]:
    """What each of `groups` (name -> names of `models`) holds of each model, per target matrix, with every ΔW normalised.

    A member of the group is compared with the pool of the group's other members, every other model with the pool of all its members.
    The weights are read again, because the groups follow from all matrices (`groups.find_groups`).
    """
    plans = plan(list(models.values()), base, BasisChoices(merge="gram", rank=rank, side=side, target_modules=target_modules))
    found = []
    most_rows = max(group.rows for group in plans)
    with one_thread_pool(device, most_rows), progress("comparing groups", len(plans), "matrices") as shown:
        for group in plans:
            found.append(_measure_groups(group.name, models, base, groups, rank, device, side))
            shown.advance(note=group.name)
    return found


def _measure_groups(
    module: str,
    models: Mapping[str, WeightSource],
    base: WeightSource,
    groups: Mapping[str, Sequence[str]],
    rank: int,
    device: torch.device,
    side: Side,
) -> GroupFindings:
    base_weight = not_zero(read_matrix(base, module, device, side), module, BASE)
    read = {name: change_of(source, module, base, base_weight, side) for name, source in models.items()}
    changes = {name: change for name, change in read.items() if change.energy > 0}
    of_base = leading(gram(base_weight), rank)
    ceilings = {name: change.captured_by(change.leading(rank)) for name, change in changes.items()}
    held = []
    for group, members in groups.items():
        inside = {name: changes[name] for name in members if name in changes}
        for name, others in leave_one_out(inside, base_weight.shape):
            if others is not None:
                held.append(held_by(name, group, changes[name], others.leading(rank), of_base, ceilings[name]))
        if inside:
            pooled = pooled_directions(list(inside.values()), rank)
            held += [
                held_by(name, group, change, pooled, of_base, ceilings[name])
                for name, change in changes.items()
                if name not in members
            ]
    return GroupFindings(module, layer_of(module), tuple(held))
