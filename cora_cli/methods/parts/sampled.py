"""A LoRA factor whose rows have a learned Gaussian size."""

from typing import Literal

import torch
from torch.nn import functional

from cora_cli.methods.parts.computed import Computed

Direction = Literal["posterior-prior", "prior-posterior"]


class Sampled(Computed):
    """A = diag(e^a + e^b ⊙ z)·V with V (r, in), a and b (r, 1) trained; `noise` is z (r, 1), None for the mean, z = 0.

    (ScalaBL, arXiv 2506.21408.) PEFT takes a LoRA tensor of one dimension for damaged.
    """

    def __init__(self, directions: torch.Tensor, log_mean: torch.Tensor, log_deviation: torch.Tensor) -> None:
        super().__init__()
        self.directions = torch.nn.Parameter(directions)
        self.log_mean = torch.nn.Parameter(log_mean)
        self.log_deviation = torch.nn.Parameter(log_deviation)
        self.noise: torch.Tensor | None = None
        self.rate = 0.0
        """By how much the present step follows the divergence from the prior."""

    def sizes(self) -> torch.Tensor:
        """e^a + e^b ⊙ z (r, 1)."""
        mean = self.log_mean.exp()
        return mean if self.noise is None else mean + self.log_deviation.exp() * self.noise

    def matrix(self) -> torch.Tensor:
        """A (r, in)."""
        return self.sizes() * self.directions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., r)."""
        return functional.linear(x, self.directions) * self.sizes()[:, 0].to(x.dtype)


def divergence(log_mean: torch.Tensor, log_deviation: torch.Tensor, direction: Direction) -> torch.Tensor:
    """Between q = N(e^a, e^2b) and the prior p = N(0, 1), summed: KL(q‖p), the term of an evidence lower bound, or KL(p‖q)."""
    mean_2, variance = (2 * log_mean).exp(), (2 * log_deviation).exp()
    if direction == "posterior-prior":
        return ((variance + mean_2 - 1) / 2 - log_deviation).sum()
    return ((1 + mean_2) / (2 * variance) - 0.5 + log_deviation).sum()
