"""A and B of one weight as slices of a tensor in CP form that many weights share (LoRTA, arXiv 2410.04060)."""

import torch

from cora_cli.methods.parts.computed import Computed


class InputFactor(Computed):
    """A (r, in): diag(`heads`[h])·`inputs` side by side over the heads, from `heads` (H, r) and `inputs` (r, in/H)."""

    def __init__(self, heads: torch.nn.Parameter, inputs: torch.nn.Parameter) -> None:
        super().__init__()
        self.heads, self.inputs = heads, inputs

    def matrix(self) -> torch.Tensor:
        """(r, in)."""
        return (self.heads.T[:, :, None] * self.inputs[:, None, :]).flatten(1)


class OutputFactor(Computed):
    """B (out, r): `outputs` (out, r) with its columns scaled by this weight's rows of `projections` (M, r) and `layers` (L, r)."""

    def __init__(
        self,
        outputs: torch.nn.Parameter,
        projections: torch.nn.Parameter,
        layers: torch.nn.Parameter,
        projection: int,
        layer: int,
    ) -> None:
        super().__init__()
        self.outputs, self.projections, self.layers = outputs, projections, layers
        self._projection, self._layer = projection, layer

    def matrix(self) -> torch.Tensor:
        """(out, r)."""
        return self.outputs * (self.projections[self._projection] * self.layers[self._layer])
