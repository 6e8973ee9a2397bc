"""The directions from which the factors of adapters started: those of the runs given with --runs, and those of the inspected adapters.

Models with a common start share its directions without having learned them, so `measure` uses the common start as a control.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from cora_cli.basis.artifact import Basis, read_basis
from cora_cli.basis.choices import Side, is_target
from cora_cli.errors import CoraError
from cora_cli.inspection.measure import Directions
from cora_cli.inspection.subspaces import leading_of_tall
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import method_of
from cora_cli.models.model_path import ModelPath
from cora_cli.weights.sources import WeightSource


def start_of(plan: AdapterPlan, basis: Basis | None, side: Side) -> Directions:
    """Orthonormal starting directions of B (output side) or A (input side), where the seed or the basis determines them."""

    def directions(module: str, features: int) -> torch.Tensor | None:
        known = basis is None or basis.mapping.group_of(module) in basis.directions
        if not known or not any(is_target(module, target) for target in plan.target_modules):
            return None
        return _frame(method_of(plan.mode).start_directions(plan, basis, module, features, side))

    return directions


def known_starts(
    models: Mapping[str, ModelPath],
    sources: Mapping[str, WeightSource],
    base: WeightSource | None,
    side: Side,
    bases: Collection[Basis],
) -> tuple[dict[str, Directions], tuple[str, ...]]:
    """The starting directions of those `models` that are cora adapters on `base`, and the names of the models whose start is lost.

    A start is lost if its basis file is neither at the recorded path nor among `bases`, or if it was a mean of other models' changes.
    """
    from cora_cli.adapters.facts import read_facts

    starts: dict[str, Directions] = {}
    lost = []
    for name, model in models.items():
        facts = read_facts(model.path) if base is not None and model.is_adapter else None
        if base is None or facts is None:
            continue
        if facts.plan.own.get("start"):
            lost.append(name)
            continue
        start = facts.plan.b_init if side == "output" else facts.plan.a_init
        if start in ("zeros", "file"):
            continue
        if method_of(facts.plan.mode).holds_start(side):
            starts[name] = _stored(facts.plan, sources[name], base, side)
            continue
        try:
            basis = _recorded(facts.basis, facts.basis_sha256, bases) if start == "basis" else None
        except CoraError:
            lost.append(name)
        else:
            starts[name] = start_of(facts.plan, basis, side)
    return starts, tuple(lost)


def unrecorded_note(models: Mapping[str, ModelPath], judged: Collection[str], side: Side) -> str | None:
    """A sentence on adapters among the `judged` models of which nothing records the start of A, if they may have had one in common."""
    from cora_cli.adapters.facts import read_facts

    names = [name for name in judged if models[name].is_adapter and read_facts(models[name].path) is None]
    if side == "output" or len(names) < 2:
        return None
    return (
        f"Nothing records where the A of {', '.join(names)} started. A LoRA draws it from the seed: adapters that one program trained with one seed "
        "share these random directions without having learned them, and the rule may call them shared for that alone."
    )


def _stored(plan: AdapterPlan, source: WeightSource, base: WeightSource, side: Side) -> Directions:
    def directions(module: str, features: int) -> torch.Tensor | None:
        if not source.own_rank(module, base):
            return None
        left, right = source.own_factors(module, base)
        factor = left if side == "output" else right.T
        return _frame(factor[:, plan.rank :] if method_of(plan.mode).subtracts_start else factor)

    return directions


def _recorded(path: str | None, sha256: str | None, given: Collection[Basis]) -> Basis:
    for basis in given:
        if basis.sha256 == sha256:
            return basis
    basis = read_basis(Path(path or ""))
    if basis.sha256 != sha256:
        raise CoraError(f"{path} is not the recorded basis: its sha256 is {basis.sha256}, expected {sha256}")
    return basis


def _frame(start: torch.Tensor | None) -> torch.Tensor | None:
    return None if start is None else leading_of_tall(start.double(), start.shape[1])
