"""LoRA factors computed from the singular value decomposition of the gradient of a weight matrix."""

import torch

from cora_cli.errors import CoraError


def left_directions(gradient: torch.Tensor, rank: int, name: str) -> torch.Tensor:
    """U_r (out, r): the first r left singular vectors of the `gradient` (out, in) of the layer `name`, with the signs of a basis file:
    each column's largest entry is positive. Raises `CoraError` where the gradient has fewer directions than r."""
    u, values, _ = torch.linalg.svd(gradient, full_matrices=False)
    floor = max(gradient.shape) * torch.finfo(gradient.dtype).eps * values[0]
    if (found := int((values > floor).sum())) < rank:
        raise CoraError(
            f"the gradient of {name} in the examples of the start has a numerical rank of {found}, less than --rank {rank}; raise "
            "--start-examples, or lower --rank"
        )
    directions = u[:, :rank]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * largest.sign()


def sign_factors(gradient: torch.Tensor, rank: int, step: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """V_rᵀ (r, in), U_r (out, r) and diag(Σ_r) (r, r) of −`step`·sign(`gradient`), a step of Adam's size (LoRA-SB, arXiv 2411.19557)."""
    u, values, v = torch.linalg.svd(-step * gradient.sign(), full_matrices=False)
    return v[:rank].contiguous(), u[:, :rank].contiguous(), torch.diag(values[:rank])


def descent_factors(gradient: torch.Tensor, rank: int, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A = √(Σ_r / (γΣ₁)) V_rᵀ and B = U_r √(Σ_r / (γΣ₁)) of −`gradient` (out, in) (LoRA-One, arXiv 2502.01235)."""
    u, values, v = torch.linalg.svd(-gradient, full_matrices=False)
    root = (values[:rank] / (gamma * values[0])).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def approximation_factors(gradient: torch.Tensor, rank: int, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A = c·V_rᵀ (r, in) from the first r right singular vectors of `gradient` (out, in), and B = c·(the next r left ones), with
    c = out^¼ / √γ (LoRA-GA, arXiv 2407.05000)."""
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    scale = len(gradient) ** 0.25 / gamma**0.5
    return scale * v[:rank], scale * u[:, rank : 2 * rank]
