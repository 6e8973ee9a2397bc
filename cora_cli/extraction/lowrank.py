"""Merge products of low-rank factors without building M: a narrower matrix F with F Fᵀ = M Mᵀ replaces it.

F has exactly the left singular vectors and singular values of M, and as many columns as the sum of the factors' ranks. `merge`
decides whether that saves memory.
"""

import math

import torch

Pair = tuple[torch.Tensor, torch.Tensor]
"""L (rows, r) and R (r, columns) float64 of one part, which is L R; for a LoRA adapter s·B and A."""


def mean_factor(pairs: list[Pair], centred: bool) -> tuple[torch.Tensor, float]:
    """F (rows, k) of M = (1/n) Σ LᵢRᵢ, k the sum of all ranks, and a bound of ‖M‖_F² before parts cancelled or were centred.

    M = [L₁ … Lₙ]·[R₁; …; Rₙ]/n, and with a QR decomposition Rᵀ = Q T of the stacked R, F = [L₁ … Lₙ]·Tᵀ/n. Centring M's columns
    (equation 7 of arXiv 2409.02119), M − (M·1)·1ᵀ/columns, is centring every row of R. Memory: the factors twice.
    """
    bound = sum(_norm(left) * _norm(right) for left, right in pairs) / len(pairs)
    left = torch.cat([left for left, _ in pairs], dim=1)
    right = torch.cat([right for _, right in pairs])
    if centred:
        right -= right.mean(dim=1, keepdim=True)
    return left @ _triangle(right).T / len(pairs), bound**2


def gram_factor(pairs: list[Pair], centred: bool) -> tuple[torch.Tensor, float]:
    """F of M = [L₁R₁ … LₙRₙ], (rows, k) or (rows, k + n) where centred, and ‖M‖_F² before centring.

    Σ Lᵢ(RᵢRᵢᵀ)Lᵢᵀ = F Fᵀ with F = [L₁T₁ᵀ … LₙTₙᵀ], Rᵢᵀ = QᵢTᵢ, which does not square the factors as RᵢRᵢᵀ would. To centre, Rᵢ
    is split into its centred part and its mean column mᵢ times 1ᵀ, which are orthogonal; with μ the mean of all columns of M,
    the second gives one column √columnsᵢ·(Lᵢmᵢ − μ) per part.
    """
    if not centred:
        factor = torch.cat([left @ _triangle(right).T for left, right in pairs], dim=1)
        return factor, _norm(factor) ** 2
    counts = [right.shape[1] for _, right in pairs]
    means = [left @ right.mean(dim=1) for left, right in pairs]
    grand = sum((count * mean for count, mean in zip(counts, means, strict=True)), torch.zeros_like(means[0])) / sum(counts)
    parts = [left @ _triangle(right - right.mean(dim=1, keepdim=True)).T for left, right in pairs]
    parts += [math.sqrt(count) * (mean - grand)[:, None] for count, mean in zip(counts, means, strict=True)]
    factor = torch.cat(parts, dim=1)
    return factor, _norm(factor) ** 2 + sum(counts) * _norm(grand) ** 2


def _triangle(right: torch.Tensor) -> torch.Tensor:
    """T (min(columns, r), r) of Rᵀ = Q T, so that L R has the left singular vectors and the values of L Tᵀ."""
    return torch.linalg.qr(right.T, mode="r").R


def _norm(tensor: torch.Tensor) -> float:
    return torch.linalg.vector_norm(tensor).item()
