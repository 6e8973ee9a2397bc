"""What the factors of adapters began with, as directions: of runs whose B is compared, and of the models that are.

Models that share a start share its directions without having learnt them, so `measure` takes these as a control.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from cora_cli.adapters.plan import AdapterPlan
from cora_cli.basis.artifact import Basis, read_basis
from cora_cli.basis.choices import Side, is_target
from cora_cli.errors import CoraError
from cora_cli.inspection.measure import Directions
from cora_cli.models import ModelPath


def start_of(plan: AdapterPlan, basis: Basis | None, side: Side) -> Directions:
    """Orthonormal directions of the start of B, or of A for the input side, where the plan has such."""
    from cora_cli.adapters.install import start_directions

    def directions(module: str, features: int) -> torch.Tensor | None:
        known = basis is None or basis.mapping.group_of(module) in basis.directions
        if not known or not any(is_target(module, target) for target in plan.target_modules):
            return None
        start = start_directions(plan, basis, module, features, side)
        return None if start is None else torch.linalg.qr(start.double()).Q

    return directions


def known_starts(models: Mapping[str, ModelPath], side: Side) -> dict[str, Directions]:
    """The starts of those `models` that are adapters of `cora`; one whose basis is no longer where it was has none."""
    from cora_cli.adapters.storage import read_facts

    starts = {}
    for name, model in models.items():
        facts = read_facts(model.path) if model.is_adapter else None
        if facts is None:
            continue
        try:
            basis = read_basis(Path(facts.basis)) if facts.basis else None
        except CoraError:
            continue
        if basis is None or basis.sha256 == facts.basis_sha256:
            starts[name] = start_of(facts.plan, basis, side)
    return starts
