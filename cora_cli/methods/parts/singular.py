"""LoRA factors computed from the singular value decomposition of a weight matrix."""

import torch


def minor_factors(weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) with s·B·A = U_r Σ_r V_rᵀ, the part of the r smallest singular values of `weight` (out, in).

    It is divided between them as PiSSA does with the largest: A = √(Σ_r / s) V_rᵀ, B = U_r √(Σ_r / s) (MiLoRA, arXiv 2406.09044,
    section 3).
    """
    u, values, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = (values[-rank:] / scaling).sqrt()
    return root[:, None] * v[-rank:], u[:, -rank:] * root


def principal_factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_r V_rᵀ (r, in) and U_r (out, r) of the r largest singular values of `weight` (out, in) (LoRA-XS, arXiv 2405.17604)."""
    u, values, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    return values[:rank, None] * v[:rank], u[:, :rank].contiguous()


_DAMPING, _INVERSE_ERROR = 0.01, 0.05


def context_factors(
    weight: torch.Tensor, inputs: torch.Tensor, rank: int, scaling: float, last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A = √(Σ_r / s) V_rᵀ C⁻¹ (r, in) and B = U_r √(Σ_r / s) (out, r) with W·C = U·Σ·Vᵀ, C (in, in) the damped `inputs`, and the first or
    `last` r directions (CorDA, arXiv 2406.05223)."""
    w, damping = weight.detach().float().cpu(), _DAMPING
    unit = torch.eye(len(inputs))
    while True:
        context = inputs + damping * inputs.diagonal().mean() * unit
        inverse = torch.linalg.inv(context)
        if not bool(torch.dist(context @ inverse, unit) >= _INVERSE_ERROR):
            break
        damping *= 2
    u, values, v = torch.linalg.svd(w @ context, full_matrices=False)
    kept = slice(-rank, None) if last else slice(rank)
    root = (values[kept] / scaling).sqrt()
    return root[:, None] * (v[kept] @ inverse), u[:, kept] * root
