"""How much of each weight's own energy a basis keeps that is shared by several weights, next to a basis of that weight alone.

A pooled basis explains the merged matrix of its group, which says little about the weights in it: their directions differ.
"""

from collections.abc import Callable, Sequence

import torch

from cora_cli.basis.artifact import LayerEnergy
from cora_cli.basis.choices import BasisChoices
from cora_cli.extraction.gram import add_gram, empty_gram, top_eigenpairs
from cora_cli.extraction.merge import Group, Merged, merge_weights
from cora_cli.weights.sources import WeightSource

# Above this share of all directions, computing every eigenvalue without vectors is faster than some with vectors.
_ALL_VALUES_SHARE = 0.25


def layer_energies(
    group: Group,
    directions: torch.Tensor,
    sources: Sequence[WeightSource],
    base: WeightSource | None,
    choices: BasisChoices,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, LayerEnergy]:
    """For each weight of `group`, the shares of ‖M‖_F² in `directions` (rows, R) and in R directions of its own.

    M is that one weight, merged over the models under the same `choices`. Reads every weight once more. Weights whose M is zero have
    no energy to share and are left out.
    """
    found = {}
    rank, wide = directions.shape[1], directions.double().to(device)
    for module, shape in group.modules.items():
        across = shape[0] if choices.side == "input" else shape[1]
        columns = across * len(sources) if choices.merge == "gram" else across
        most = min(group.rows, columns - (choices.method == "pca"))
        merged = merge_weights(
            Group(module, {module: shape}, group.rows, columns, most), sources, base, choices, device, advance
        )
        if merged is not None:
            kept, own = _energy_in(merged, wide), _own_energy(merged, min(rank, most), choices.component == "top")
            found[module] = LayerEnergy(
                kept=min(kept / merged.energy, 1.0), chance=rank / group.rows, own=min(own / merged.energy, 1.0)
            )
    return found


def _energy_in(merged: Merged, directions: torch.Tensor) -> float:
    """‖BᵀM‖_F² = tr(Bᵀ M Mᵀ B) for B (rows, R) float64."""
    if merged.matrix is not None:
        return float(torch.linalg.vector_norm(directions.T @ merged.matrix).square())
    assert merged.gram is not None
    lower = merged.gram.tril(-1)
    product = lower @ directions + lower.T @ directions + merged.gram.diagonal()[:, None] * directions
    return float((directions * product).sum())


def _own_energy(merged: Merged, rank: int, top: bool) -> float:
    """The sum of the `rank` largest squared singular values of M, or of the smallest of those that M can have."""
    gram = merged.gram
    if gram is None:
        assert merged.matrix is not None
        rows, columns = merged.matrix.shape  # M Mᵀ and MᵀM have the same non-zero eigenvalues
        smaller = merged.matrix if rows <= columns else merged.matrix.T.contiguous()
        gram = add_gram(empty_gram(smaller), smaller)
    if top and rank <= _ALL_VALUES_SHARE * len(gram):
        return float(top_eigenpairs(gram, rank)[0][:rank].clip(0.0).sum())
    values = torch.linalg.eigvalsh(gram, UPLO="L").flip(0).clamp_min(0.0)
    values = values[: merged.group.directions]
    return float((values[:rank] if top else values[len(values) - rank :]).sum())
