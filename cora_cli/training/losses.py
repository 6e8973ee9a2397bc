"""Losses of the response tokens of a batch, at the cost of their own logits and one pass over them.

The caller sums them: `trainer` over an optimizer batch, `heldout` over each record.
"""

from typing import Any

import torch

from cora_cli.data.batches import predicting_logits

CHUNK = 1 << 20
"""Logits that are taken to float32 at a time on a processor, so that they stay in its cache."""
GPU_CHUNK = 1 << 23
"""The same on a GPU, where small pieces would cost more in kernel launches than in arithmetic."""


def batch_losses(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Negative log-likelihood of every response token of a batch from `Collator`: (labels,), in nats, in the order of `labels`."""
    return torch.cat([response_losses(model, each) for each in batch["passes"]])


def response_losses(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Negative log-likelihood of every response token of one forward pass, from `pack` or `pad`: (labels,), in nats."""
    return token_losses(predicting_logits(model, batch), batch["shift_labels"])


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (tokens, vocabulary), computed in float32 at least, without a float32 copy of them all.

    targets: (tokens,). Returns (tokens,).
    """
    losses: torch.Tensor = _TokenLosses.apply(logits, targets)
    return losses


class _TokenLosses(torch.autograd.Function):
    """The gradient, softmax minus one-hot, is computed in the forward pass, where the exponentials already exist."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """logits: (tokens, vocabulary); targets: (tokens,). Returns (tokens,)."""
        wanted = ctx.needs_input_grad[0]
        precision = torch.promote_types(logits.dtype, torch.float32)
        losses = torch.empty(len(logits), dtype=precision, device=logits.device)
        gradient = torch.empty_like(logits) if wanted else None
        rows = max(1, (GPU_CHUNK if logits.is_cuda else CHUNK) // logits.shape[-1])
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            wide = logits[part].to(precision)
            total = wide.logsumexp(-1)
            target = targets[part, None]
            losses[part] = total - wide.gather(1, target)[:, 0]
            if gradient is not None:
                softmax = (wide - total[:, None]).exp_()
                gradient[part] = softmax.scatter_add_(1, target, softmax.new_full(target.shape, -1.0))
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        """upstream: (tokens,)."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None
