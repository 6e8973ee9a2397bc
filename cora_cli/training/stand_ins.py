"""What takes the place of a GPU's kernels when a plan measures a run on fake tensors of a CPU.

Attention kernels of GPUs are replaced by one that keeps the same tensors; the pieces of a CPU's attention, by the largest one; and
autocast of GPUs, by that of CPUs. Losses take the pieces of a GPU.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers.integrations.flex_attention import repeat_kv

from cora_cli.data.pack import Layout
from cora_cli.training import losses
from cora_cli.training.attention import Gathered, Piece, cut_pieces, segment_attention


class WideLayerNorm(TorchFunctionMode):
    """Autocast of CUDA computes LayerNorm in float32, which that of CPUs does not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch."""
        if func is torch.nn.functional.layer_norm and torch.is_autocast_enabled("cpu"):
            args = tuple(value.float() if isinstance(value, torch.Tensor) else value for value in args)
            kwargs = {k: value.float() if isinstance(value, torch.Tensor) else value for k, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def gpu_chunks() -> Iterator[None]:
    """Let losses take as many logits to float32 at a time as on a GPU."""
    chunk, losses.CHUNK = losses.CHUNK, losses.GPU_CHUNK
    try:
        yield
    finally:
        losses.CHUNK = chunk


def cpu_attention() -> Callable[..., Any]:
    """A CPU's attention over the largest piece of a row only: pieces follow one another, and each frees what it takes. All of them keep their masks."""
    cut = cache(cut_pieces)

    def largest(layout: Layout, window: int | None) -> tuple[Piece, ...]:
        return (
            max(
                cut(layout, window),
                key=lambda piece: (piece.end - piece.start) * sum(last - first for first, last in piece.spans),
            ),
        )

    return functools.partial(segment_attention, cut=largest)


def gpu_attention(name: str) -> Callable[..., Any]:
    """An attention kernel that keeps its inputs, its output and one float32 number per query, as FlashAttention and FlexAttention do."""

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        layout: Layout | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key = query.to(value.dtype), key.to(value.dtype)
        heads, tokens = query.shape[1], query.shape[2]
        if name == "cora_flex" and heads & (heads - 1):  # transformers does the same
            key, value = (repeat_kv(each, heads // each.shape[1]) for each in (key, value))
        # SDPA converts the mask of all pairs of tokens in every layer.
        mask = query.new_empty(tokens, tokens) if name == "sdpa" else None
        if name == "cora_varlen" and layout is not None and (keys := sum(map(len, layout.keys))) > tokens:
            places = query.new_empty(keys, dtype=torch.int64)
            key, value = (Gathered.apply(each[0].transpose(0, 1), places).transpose(0, 1)[None] for each in (key, value))
        return _Kernel.apply(query, key, value, mask), None

    return attend


class _Kernel(torch.autograd.Function):
    """The memory of a fused attention kernel, without its numbers."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Shapes as in `segment_attention`."""
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[3])
        ctx.save_for_backward(query, key, value, output, query.new_empty(batch, heads, tokens, dtype=torch.float32), mask)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """upstream: as the output."""
        query, key, value, _, sums, _ = ctx.saved_tensors
        products = torch.empty_like(sums)
        found = [torch.empty_like(each) for each in (query, key, value)]
        del products
        return *found, None
