"""Starts of A and B that are drawn from the run's seed or taken from a basis file, one layer at a time."""

import hashlib
import math

import torch

from cora_cli.basis.artifact import Basis
from cora_cli.errors import CoraError
from cora_cli.methods.plan import AdapterPlan


def start_b(
    plan: AdapterPlan, basis: Basis | None, name: str, out_features: int, width: int, flag: str = "--rank"
) -> torch.Tensor:
    """B (out, width) float32 before training, for the linear layer `name`.

    `random` is Kaiming uniform as PEFT starts A; `orthonormal` is uniform over orthonormal frames (QR of a Gaussian matrix). `flag` is
    what the user sets `width` by. Raises `CoraError` where the basis is missing or does not fit.
    """
    if plan.b_init == "basis":
        if basis is None:
            raise CoraError(f"mode {plan.mode} needs a basis to start B from")
        return basis.for_module(name, width, out_features)
    if plan.b_init in ("zeros", "ones"):
        return torch.full((out_features, width), float(plan.b_init == "ones"))
    if plan.b_init == "random":
        return kaiming_uniform(plan, name, "B", (out_features, width))
    return orthonormal(plan, name, "B", out_features, width, flag)


def start_a(plan: AdapterPlan, name: str, in_features: int, basis: Basis | None = None) -> torch.Tensor:
    """A (r, in) float32 before training: zeros, N(0, 1/r²) as PEFT's `gaussian`, PEFT's Kaiming uniform, or a basis of the input side."""
    shape = (plan.rank, in_features)
    if plan.a_init == "basis":
        if basis is None:
            raise CoraError(f"mode {plan.mode} needs a basis to start A from")
        return basis.for_module(name, plan.rank, in_features, "input").T.contiguous()
    if plan.a_init == "zeros":
        return torch.zeros(shape)
    if plan.a_init == "gaussian":
        return gaussian(plan, name, "A", shape) / plan.rank
    return kaiming_uniform(plan, name, "A", shape)


def orthonormal(plan: AdapterPlan, name: str, factor: str, features: int, width: int, flag: str = "--rank") -> torch.Tensor:
    """Orthonormal columns (features, width) for B or Aᵀ. Raises `CoraError` where the space has fewer dimensions than `width`."""
    if width > features:
        side = "outputs" if factor == "B" else "inputs"
        raise CoraError(f"{name} has {features} {side}, fewer than {flag} {width}: no orthonormal {factor} of that rank exists")
    gaussian = torch.randn((features, width), generator=seeded(plan.seed, name, factor), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()


def kaiming_uniform(
    plan: AdapterPlan, name: str, factor: str, shape: tuple[int, int], slope: float = math.sqrt(5)
) -> torch.Tensor:
    """U(±√(6 / ((1 + slope²)·columns))), by default U(±1/√columns), from the seed, the layer's name and the factor's."""
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=slope, generator=seeded(plan.seed, name, factor))


def gaussian(plan: AdapterPlan, name: str, factor: str, shape: tuple[int, int]) -> torch.Tensor:
    """N(0, 1) from the seed, the layer's name and the factor's."""
    return torch.randn(shape, generator=seeded(plan.seed, name, factor))


def uniform(plan: AdapterPlan, name: str, factor: str, shape: tuple[int, int], bound: float) -> torch.Tensor:
    """U(±bound) from the seed, the layer's name and the factor's."""
    return torch.empty(shape).uniform_(-bound, bound, generator=seeded(plan.seed, name, factor))


def xavier_uniform(plan: AdapterPlan, name: str, factor: str, shape: tuple[int, int]) -> torch.Tensor:
    """U(±√(6 / (rows + columns))) from the seed, the layer's name and the factor's."""
    return torch.nn.init.xavier_uniform_(torch.empty(shape), generator=seeded(plan.seed, name, factor))


def seeded(seed: int, name: str, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose in the layer `name`: "A" and "B" are the starts of the factors."""
    digest = hashlib.sha256(f"{seed}/{name}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
