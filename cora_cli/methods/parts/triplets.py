"""LoRA factors that remember how important each of their numbers is: ΔW = s·B·diag(E)·A (AdaLoRA, arXiv 2303.10512)."""

import torch

from cora_cli.methods.parts.computed import Computed


class Watched(Computed):
    """A factor with moving averages, for each trained tensor w, of |w·∂L/∂w| and of the distance from that average.

    They are buffers, so that checkpoints contain them.
    """

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor))
            for average in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{name}_{average}", torch.zeros_like(tensor))

    @torch.no_grad()
    def measure(self, decay: float) -> None:
        """Take the gradients of a step into the averages."""
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.grad is not None:
                found = (parameter * parameter.grad).abs()
                sensitivity = self.get_buffer(f"{name}_sensitivity").lerp_(found, 1 - decay)
                self.get_buffer(f"{name}_uncertainty").lerp_((found - sensitivity).abs(), 1 - decay)

    def importance(self, name: str) -> torch.Tensor:
        """Of each number of a trained tensor."""
        return self.get_buffer(f"{name}_sensitivity") * self.get_buffer(f"{name}_uncertainty")


class Values(Watched):
    """Takes the place of PEFT's linear layer for A: `rows` (r, in), and E as `values` (r, 1). `kept` (r, 1) says which of them are in use."""

    rows: torch.Tensor
    values: torch.Tensor
    kept: torch.Tensor

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__(values=rows.new_zeros(len(rows), 1), rows=rows)
        self.register_buffer("kept", torch.ones(len(rows), 1, dtype=torch.bool))

    def matrix(self) -> torch.Tensor:
        """diag(E)·A (r, in)."""
        return self.values * self.rows


class Columns(Watched):
    """Takes the place of PEFT's linear layer for B: `columns` (out, r)."""

    columns: torch.Tensor

    def __init__(self, columns: torch.Tensor) -> None:
        super().__init__(columns=columns)

    def matrix(self) -> torch.Tensor:
        """(out, r)."""
        return self.columns
