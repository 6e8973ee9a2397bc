"""A model whose linear layers are held in 4 bits, on fake tensors: bitsandbytes' own parameters cannot be fake.

Each layer has the storages of bitsandbytes' NF4 with double quantization (QLoRA, arXiv 2305.14314), and multiplies by a weight that exists
while it does so.
"""

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

BLOCK, OUTER_BLOCK = 64, 256
"""Weights that share a scale of 8 bits, and scales that share one of 32 bits."""
HELD_BYTES = 1 / 2 + 1 / BLOCK + 4 / BLOCK / OUTER_BLOCK
"""Bytes of a weight that is held in 4 bits, with its part of the scales."""


def hold_in_four_bit(model: Any, dtype: torch.dtype) -> None:
    """Replace the layers that transformers would load in 4 bits for products in `dtype`; to be called, and used, under `memory.fakes`."""
    for name, module in _held(model):
        model.set_submodule(name, _layer_class()(module, dtype))
    model.is_loaded_in_4bit = True


def _held(model: Any) -> list[tuple[str, Any]]:
    """The layers that transformers would load in 4 bits, by name."""
    kept = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear or isinstance(module, Conv1D)
    ]
    return [(name, module) for name, module in linears if should_convert_module(name, kept)]


def four_bit_bytes(model: Any, dtype: torch.dtype) -> int:
    """Bytes of the weights of a model whose layers are held in 4 bits, and of the largest of them, which exists in `dtype` while it multiplies."""
    held = [module.weight.numel() for _, module in _held(model)]
    others = sum(weight.numel() for weight in model.parameters()) - sum(held)
    return int(HELD_BYTES * sum(held)) + dtype.itemsize * (others + max(held, default=0))


@cache
def _layer_class() -> Any:
    """Of bitsandbytes' class, by which PEFT chooses what it wraps a layer in."""
    from bitsandbytes.nn.modules import Linear4bit

    stock: Any = Linear4bit  # whose types are known only where bitsandbytes is installed

    class PlannedLinear4bit(stock):
        def __init__(self, linear: Any, dtype: torch.dtype) -> None:
            torch.nn.Module.__init__(self)
            transposed = isinstance(linear, Conv1D)
            shape = tuple(linear.weight.T.shape if transposed else linear.weight.shape)
            self.out_features, self.in_features = shape
            self.compute_dtype, self.bias = dtype, linear.bias
            numbers = math.prod(shape)
            blocks = math.ceil(numbers / BLOCK)
            weight: Any = torch.nn.Parameter(torch.empty(math.ceil(numbers / 2), 1, dtype=torch.uint8), requires_grad=False)
            weight.quant_state, weight.quant_type, weight.compress_statistics = SimpleNamespace(shape=shape), "nf4", True
            self.weight = weight
            for name, entries, kind in (
                ("scales", blocks, torch.uint8),
                ("levels", 16, torch.float32),
                ("scales_of_scales", math.ceil(blocks / OUTER_BLOCK), torch.float32),
                ("levels_of_scales", 256, torch.float32),
                ("offset", 1, torch.float32),
            ):
                self.register_buffer(name, torch.empty(entries, dtype=kind), persistent=False)

        def _save_to_state_dict(self, *arguments: Any) -> None:
            torch.nn.Module._save_to_state_dict(self, *arguments)

        @property
        def W_q(self) -> torch.Tensor:  # by this name PEFT asks a layer to dequantize itself
            return self.weight

        def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
            """The weight (out, in), for which the scales exist in float32."""
            scales = torch.empty(self.scales.shape, dtype=torch.float32)
            weight = torch.empty(self.out_features, self.in_features, dtype=dtype or self.compute_dtype)
            del scales
            return weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """x: (…, in). Returns (…, out) in the type of x."""
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            product: torch.Tensor = _Product.apply(x.to(self.compute_dtype), bias, self)
            return product.to(x.dtype)

    return PlannedLinear4bit


class _Product(torch.autograd.Function):
    """Keeps no weight for the backward pass, which dequantizes it again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: Any) -> torch.Tensor:
        """x: (…, in). Returns (…, out)."""
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.dequantize(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """upstream: as the output."""
        return upstream[0] @ ctx.layer.dequantize(upstream[0].dtype), None, None
