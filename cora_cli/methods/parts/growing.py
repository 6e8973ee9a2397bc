"""LoRA factors that gain pairs during training, with a trained weight for each pair: ΔW = s·B·diag(E)·A at rank ρ (IncreLoRA)."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

from cora_cli.methods.parts.computed import Computed

RESERVE = 1e-5
"""E of a pair in reserve."""


class Watch:
    """Collects ∂L/∂ΔW (out, in) of a layer over the micro-batches of a step, next to the ΔW at which it was taken."""

    def __init__(self) -> None:
        self.input: torch.Tensor | None = None
        self.gradient: torch.Tensor | None = None
        self.change: tuple[torch.Tensor, torch.Tensor] | None = None
        """A and B at the start of the step; None where nothing is to be collected."""

    def take(self, x: torch.Tensor, upstream: torch.Tensor) -> None:
        """Add the gradient of one forward pass: x (..., in) and the gradient (..., out) of ΔW·x."""
        found = upstream.detach().flatten(0, -2).float().T @ x.detach().flatten(0, -2).float()
        self.gradient = found if self.gradient is None else self.gradient + found

    def importance(self) -> torch.Tensor:
        """Σ|ΔW ⊙ ∂L/∂ΔW| / √(out·in) of the step; forgets what was collected."""
        assert self.change is not None
        a, b = self.change
        gradient, self.gradient, self.change = self.gradient, None, None
        if gradient is None:
            return a.new_zeros(())
        return ((b @ a) * gradient).abs().sum() / math.sqrt(gradient.numel())


class _Lists(Computed):
    """A module with lists of parameters, named `rows_0`, `rows_1`, …: PEFT finds no parameters in a module's own modules."""

    def listed(self, name: str) -> list[torch.Tensor]:
        """The parameters of the list `name`."""
        return [parameter for key, parameter in self.named_parameters(recurse=False) if key.startswith(f"{name}_")]

    def set_list(self, name: str, parameters: Sequence[torch.Tensor]) -> None:
        """Let the list `name` hold these, and nothing else; tensors become parameters."""
        for index in range(len(self.listed(name))):
            delattr(self, f"{name}_{index}")
        for index, one in enumerate(parameters):
            self.register_parameter(f"{name}_{index}", one if isinstance(one, torch.nn.Parameter) else torch.nn.Parameter(one))
        # In one order whatever was set last: the norm of all gradients is summed in it.
        ordered = sorted(
            self._parameters.items(), key=lambda item: (item[0].rpartition("_")[0], int(item[0].rpartition("_")[2]))
        )
        self._parameters.clear()
        self._parameters.update(ordered)

    def resize_list(self, name: str, shapes: Mapping[str, Sequence[int]]) -> None:
        """Let the list `name` hold as many as a checkpoint does."""
        found, count = self.listed(name), sum(key.startswith(f"{name}_") for key in shapes)
        self.set_list(name, [*found[:count], *(torch.empty_like(found[0]).detach() for _ in range(count - len(found)))])


class GrowingA(_Lists):
    """Takes the place of PEFT's linear layer for A: its rows, and E of the pairs in use. The pairs after those are in reserve.

    Buffers hold the step in which each pair and each E was added, and the two moving averages that decide who grows. All of them are
    matrices, since PEFT takes other shapes in a checkpoint for damage.
    """

    born: torch.Tensor
    woken: torch.Tensor
    sensitivity: torch.Tensor
    uncertainty: torch.Tensor

    def __init__(self, rows: torch.Tensor, alpha: float, watch: Watch) -> None:
        super().__init__()
        self.set_list("rows", rows.split(1))
        self.set_list("values", [rows.new_zeros(1, 1)])
        self.register_buffer("born", torch.zeros(len(rows), 1, dtype=torch.long))
        self.register_buffer("woken", torch.zeros(1, 1, dtype=torch.long))
        self.register_buffer("sensitivity", torch.zeros(1, 1))
        self.register_buffer("uncertainty", torch.zeros(1, 1))
        self._alpha, self.watch = alpha, watch

    @property
    def rank(self) -> int:
        """ρ: the number of pairs in use."""
        return len(self.woken)

    def unscaled(self) -> torch.Tensor:
        """A (pairs, in)."""
        return torch.cat([*self.listed("rows")])

    def _scales(self) -> torch.Tensor:
        """s·E (pairs, 1), with s = alpha / (ρ + 1e-5)."""
        values = self.listed("values")
        reserve = values[0].new_full((len(self.born) - len(values), 1), RESERVE)
        return self._alpha / (len(values) + 1e-5) * torch.cat([*values, reserve])

    def matrix(self) -> torch.Tensor:
        """s·diag(E)·A (pairs, in)."""
        return self._scales() * self.unscaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., pairs)."""
        self.watch.input = x
        return functional.linear(x, self.unscaled()) * self._scales()[:, 0]

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Have as many pairs, in use and in reserve, as a checkpoint."""
        for name in ("rows", "values"):
            self.resize_list(name, shapes)
        self.born, self.woken = (self.born.new_zeros(shapes[name]) for name in ("born", "woken"))


class GrowingB(_Lists):
    """Takes the place of PEFT's linear layer for B."""

    def __init__(self, columns: torch.Tensor, watch: Watch) -> None:
        super().__init__()
        self.set_list("columns", columns.split(1, dim=1))
        self.watch = watch

    def matrix(self) -> torch.Tensor:
        """B (out, pairs)."""
        return torch.cat([*self.listed("columns")], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., pairs) -> (..., out)."""
        result = super().forward(x)
        seen, self.watch.input = self.watch.input, None
        if self.watch.change is not None and result.requires_grad and seen is not None:
            result.register_hook(lambda upstream: self.watch.take(seen, upstream))
        return result

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Have as many columns as a checkpoint."""
        self.resize_list("columns", shapes)
