"""LoRA factors computed from the singular value decomposition of the gradient of a weight matrix."""

import torch


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
