"""The optimizer of LoRA-RITE (arXiv 2410.20625): transformation-invariant steps for pairs of LoRA factors."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch


@dataclasses.dataclass
class _Side:
    """One factor as a tall matrix X (n, r), and the other one as Y = U·R with orthonormal U (m, r): X is Aᵀ or B."""

    parameter: torch.nn.Parameter
    transposed: bool
    prefix: str
    basis: torch.Tensor
    inverse: torch.Tensor
    """R⁺."""
    gradient: torch.Tensor
    """(∂X)·R⁺, which is (∂W)·U or its transpose: the gradient without the magnitude of Y."""


class Rite(torch.optim.Optimizer):
    """Steps on pairs A (r, in), B (out, r) that give the same B·A whichever way it was divided: (B·Q)·(Q⁻¹·A) takes the same path.

    For each factor X, with the other one Y = U·R: the unmagnified gradient G = ∂X·R⁺ is clipped over all pairs, both moments are
    carried from the last step's basis U′ to this one by P = Uᵀ·U′, V ← β₂·P·V·Pᵀ + (1 − β₂)·Gᵀ·G/n, M ← β₁·M·Pᵀ +
    (1 − β₁)·G·V^(−½), with β corrected for the start as Adafactor does, and X ← X − lr·M·R⁺ᵀ. Follows the authors' code
    (gkevinyen5418/LoRA-RITE): M averages G·V^(−½) and not G, and a G whose root mean square is above 1 counts as zero. Their term for
    mass that leaves the basis is off by default there and left out here.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[torch.nn.Parameter, torch.nn.Parameter]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        skip: float = 1.0,
    ) -> None:
        """`pairs` are (A, B) of each layer; the state of both is kept at A. `clip` 0 does not clip."""
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "clip": clip, "skip": skip}
        super().__init__([parameter for pair in pairs for parameter in pair], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            parameters = group["params"]
            pairs = [(a, b) for a, b in zip(parameters[::2], parameters[1::2], strict=True) if a.grad is not None]
            sides = [(a, self._sides(a, b, group["skip"])) for a, b in pairs]
            norm = torch.stack([side.gradient.norm() for _, both in sides for side in both]).norm()
            shrink = group["clip"] / norm if group["clip"] and norm > group["clip"] else 1.0
            for owner, both in sides:
                state = self.state[owner]
                number = int(state.get("number", 0)) + 1
                steps = [self._direction(side, state, group, number, shrink) for side in both]
                for side, step in zip(both, steps, strict=True):
                    change = step.T if side.transposed else step
                    side.parameter.sub_(group["lr"] * (change + group["weight_decay"] * side.parameter))
                state["number"] = number
        return loss

    def _sides(self, a: torch.nn.Parameter, b: torch.nn.Parameter, skip: float) -> tuple[_Side, _Side]:
        assert a.grad is not None
        assert b.grad is not None
        found = []
        for parameter, other, gradient, transposed in ((a, b, a.grad.T, True), (b, a.T, b.grad, False)):
            basis, triangle = torch.linalg.qr(other)
            inverse = torch.linalg.pinv(triangle)
            plain = gradient @ inverse
            if plain.square().mean().sqrt() > skip:
                plain = torch.zeros_like(plain)
            found.append(_Side(parameter, transposed, "a" if transposed else "b", basis, inverse, plain))
        return found[0], found[1]

    def _direction(self, side: _Side, state: dict[str, Any], group: dict[str, Any], number: int, shrink: Any) -> torch.Tensor:
        """M·R⁺ᵀ (n, r); updates the moments."""
        beta1, beta2 = (beta * (1 - beta ** (number - 1)) / (1 - beta**number) for beta in group["betas"])
        gradient = side.gradient * shrink
        keys = [f"{side.prefix}_{what}" for what in ("first", "second", "basis")]
        first, second, last = (state.get(key) for key in keys)
        if first is None or second is None or last is None:
            first, second = torch.zeros_like(gradient), gradient.new_zeros(gradient.shape[1], gradient.shape[1])
            last = side.basis
        turn = side.basis.T @ last
        second = beta2 * (turn @ second @ turn.T) + (1 - beta2) * (gradient.T @ gradient) / len(gradient)
        second = (second + second.T) / 2
        first = beta1 * (first @ turn.T) + (1 - beta1) * gradient @ _inverse_root(second, group["eps"])
        state.update(zip(keys, (first, second, side.basis), strict=True))
        return first @ side.inverse.T


def _inverse_root(matrix: torch.Tensor, eps: float) -> torch.Tensor:
    """V^(−½) of a symmetric positive semi-definite matrix, eigenvalues floored by `eps` as Adam floors its own."""
    values, vectors = torch.linalg.eigh(matrix)
    # Rounding can make an eigenvalue negative; the authors' code would then drop the complete step.
    return (vectors / (values.clamp(min=0).sqrt() + eps)) @ vectors.T
