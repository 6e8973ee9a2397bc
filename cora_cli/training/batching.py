"""Choose how the examples of a batch go through a loaded model: packed into one row, padded, or one at a time.

Packing is checked, then trusted: at the start of a run, a few probes from its data go through the model both ways. Where their losses are
not those of the model's own attention on single examples, the run pads its batches, and says why.
"""

import dataclasses
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from cora_cli.data.batches import BatchForm
from cora_cli.data.encode import Example
from cora_cli.device import Hardware, PackedAttention
from cora_cli.errors import CoraError, reason
from cora_cli.models.configuration import length_limits, rope_switch
from cora_cli.models.precision import computing_in, precisions
from cora_cli.training.attention import register_packed_attention
from cora_cli.training.losses import response_losses, token_losses

PROBE = 96
"""Tokens of the longest probe that crosses no limit."""
COMPARED = 32
"""Tokens at the end of a probe whose losses are compared."""
SHORT = 24
"""Tokens of the short probe, and of the prefix that two probes share."""
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""The largest mean difference of a probe's losses, relative to one more than their mean."""


@dataclasses.dataclass(frozen=True)
class Batching:
    """The form of batches, transformers' name of the attention that computes them, and why."""

    form: BatchForm
    attention: str
    reason: str

    def describe(self) -> str:
        """One line for the log."""
        if self.form.kind == "packed":
            return f"attention {self.attention} ({self.reason})"
        how = "padded batches" if self.form.kind == "padded" else "one example at a time"
        return f"{how} with the model's own attention ({self.attention}), because {self.reason}"


def choose_batching(model: Any, packed: PackedAttention, examples: Sequence[Example], hardware: Hardware) -> Batching:
    """Check packing, then padding, with probes from `examples`; what agrees is set in `model`, which has its own attention before.

    `packed` is the attention for packed rows on this hardware. Raises `CoraError` for a model that computes no losses from token ids alone.
    """
    own = model.config._attn_implementation
    switch = rope_switch(model.config)
    arguments = frozenset(inspect.signature(model.forward).parameters)
    packs = BatchForm("packed", packed.shares_prefixes, switch)
    pads, singles = (BatchForm(kind, False, switch, arguments) for kind in ("padded", "single"))
    probes = make_probes(examples, length_limits(model.config))
    why = cannot_pack(model)
    training = model.training
    model.eval()
    with torch.no_grad():
        reference, dtype = _reference(model, probes, arguments)
        why = why or _packing_fault(model, packs, packed.name, own, (probes, reference, dtype), hardware)
        apart = cannot_pad(model) if why else None
        if why and apart is None:
            apart = _disagreement(model, pads, probes, reference, dtype, "a padded batch")
    model.train(training)
    if why is None:
        return Batching(packs, packed.name, packed.reason)
    return Batching(pads, own, why) if apart is None else Batching(singles, own, f"{why}, and {apart}")


def make_probes(examples: Sequence[Example], limits: set[int]) -> list[Example]:
    """Beginnings of examples, shortest first: a short one, a longer one, one that shares a prefix with it, and one beyond each limit.

    Limits that no example reaches need no probe.
    """
    if not examples:
        return []
    longest = max(examples, key=lambda example: len(example.input_ids)).input_ids
    shortest = min(examples, key=lambda example: len(example.input_ids)).input_ids
    beyond = [longest[: limit + max(64, limit // 8)] for limit in limits if limit < len(longest)]
    found = [shortest[:SHORT], longest[:PROBE], longest[:SHORT] + shortest[:SHORT], *beyond]
    return [Example(ids, max(1, len(ids) - COMPARED)) for ids in sorted(found, key=len)]


def cannot_pack(model: Any) -> str | None:
    """Why a model cannot compute packed rows, as far as its class and configuration tell; None if they do not."""
    config = model.config.get_text_config(decoder=True)
    missing = sorted({"position_ids", "logits_to_keep"} - set(inspect.signature(model.forward).parameters))
    foreign = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    if not model._supports_attention_backend:
        return f"{type(model).__name__} computes attention by itself"
    if missing:
        return f"its forward pass takes no {missing[0]}"
    return f"it has {foreign[0]} layers" if foreign else None


def cannot_pad(model: Any) -> str | None:
    """Why padding would change a model's results at lengths that no probe may have; None if it would not."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attention_type", None) == "block_sparse" or hasattr(config, "lsh_attn_chunk_length"):
        return "its attention depends on the length of the batch"
    return None


def _reference(
    model: Any, probes: Sequence[Example], arguments: frozenset[str]
) -> tuple[list[torch.Tensor], torch.dtype | None]:
    """Losses of the last tokens of each probe alone, by the model as it is, and the precision in which it could compute them.

    None is the model's own.
    """

    def alone(probe: Example) -> torch.Tensor:
        ids = torch.tensor([probe.input_ids], device=model.device)
        responses = len(probe.input_ids) - probe.prompt_length
        kept = {"logits_to_keep": responses + 1} if "logits_to_keep" in arguments else {}
        return token_losses(model(input_ids=ids, **kept).logits[0, -responses - 1 : -1], ids[0, -responses:])

    failure: Exception
    for dtype in (*precisions(model), None):
        try:
            with computing_in(model, dtype) if dtype else nullcontext():
                return [alone(probe) for probe in probes], dtype
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            # Some families compute parts in a precision of their own, which does not go with double precision.
            failure = error
    raise CoraError(
        f"{type(model).__name__} computes no next-token losses from token ids alone, so it cannot be trained: {reason(failure)}"
    ) from failure


def _packing_fault(
    model: Any,
    form: BatchForm,
    name: str,
    own: str,
    reference: tuple[Sequence[Example], list[torch.Tensor], torch.dtype | None],
    hardware: Hardware,
) -> str | None:
    """Set the packed attention in the model, or return why its losses differ and leave the model's own.

    What a family hands to attention is checked in the precision of `reference` with the implementation for CPUs, which takes any; that
    of the hardware then runs in the precision of the training.
    """
    register_packed_attention()
    probes, losses, dtype = reference
    fault = None
    for implementation, precision, shares in (("cora_segments", dtype, True), (name, None, form.shares_prefixes)):
        try:
            model.set_attn_implementation(implementation)
        except Exception as error:  # transformers raises many unrelated types for what a class does not support
            fault = reason(error)
        else:
            rows = dataclasses.replace(form, shares_prefixes=shares)
            with torch.autocast(hardware.device.type, torch.bfloat16, enabled=precision is None):
                fault = _disagreement(model, rows, probes, losses, precision, "a packed row")
        if fault is not None:
            model.set_attn_implementation(own)
            break
        if name == "cora_segments":
            break
    return fault


def _disagreement(
    model: Any,
    form: BatchForm,
    probes: Sequence[Example],
    reference: list[torch.Tensor],
    dtype: torch.dtype | None,
    where: str,
) -> str | None:
    """How the losses of probes in batches of `form` differ from those of single ones; None where they agree to rounding."""
    worst = 0.0
    try:
        with computing_in(model, dtype) if dtype else nullcontext():
            for indices in form.passes(probes):
                batch = form.collate([probes[index] for index in indices])
                on_device = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
                found = response_losses(model, on_device).split([len(reference[index]) for index in indices])
                for losses, wanted in zip(found, (reference[index] for index in indices), strict=True):
                    difference = (losses - wanted).abs().mean() / (1 + wanted.abs().mean())
                    if wanted.isfinite().all():  # else the first loss of the run says so
                        worst = max(worst, difference.nan_to_num(torch.inf).item())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a class that was not made for these arguments raises
        return f"{where} ends in {type(error).__name__} ({reason(error)[:120]})"
    if worst <= TOLERANCES.get(dtype or torch.bfloat16, 5e-2):
        return None
    return f"{where} has other losses than single examples (by {worst:.1e})"
