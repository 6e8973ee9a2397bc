"""Choose how the examples of a batch go through a loaded model: packed into one row, padded, or one at a time.

Packing is checked, then trusted: at the start of a run, a few probes from its data go through the model both ways. Where their losses are
not those of the model's own attention on single examples, the run pads its batches, and says why.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch

from cora_cli.data.batches import BatchForm
from cora_cli.data.encode import Example
from cora_cli.device import Hardware, PackedAttention
from cora_cli.errors import CoraError, is_out_of_memory, reason
from cora_cli.methods.parts.layers import transformers_model, without_cache
from cora_cli.models.causality import require_causal_pass
from cora_cli.models.configuration import depends_on_batch, length_limits, rope_switch
from cora_cli.models.loading import hides_context
from cora_cli.models.precision import UNSUPPORTED, computing_in, forget_failed_pass, precisions
from cora_cli.progress import note
from cora_cli.training.attention import register_packed_attention
from cora_cli.training.losses import response_losses, token_losses

PROBE = 96
"""Tokens of the longest probe that crosses no limit."""
COMPARED = 32
"""Tokens at the end of a probe whose losses are compared."""
SHORT = 24
"""Tokens of the short probe, and of the prefix that two probes share."""
TOLERANCES = {torch.float64: 1e-6, torch.float32: 3e-5, None: 5e-2}
"""The largest mean difference of a probe's losses, relative to one more than their mean; None is the precision of the training."""


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


def choose_batching(
    model: Any, packed: PackedAttention, examples: Sequence[Example], hardware: Hardware, trains: bool = False
) -> Batching:
    """Check packing, then padding, with probes from `examples`; what agrees is set in `model`, which has its own attention before.

    `packed` is the attention for packed rows on this hardware. An adapter that the model may have takes no part. With `trains`, its losses in training
    are compared too. Raises `CoraError` for a model that computes no losses from token ids alone, or that is not causal.
    """
    inner = transformers_model(model)
    switch = rope_switch(inner.config)
    arguments = frozenset(inspect.signature(inner.forward).parameters)
    packs = BatchForm("packed", packed.shares_prefixes, switch)
    pads, singles = (BatchForm(kind, False, switch, arguments) for kind in ("padded", "single"))
    training = model.training
    model.eval()
    with torch.no_grad(), model.disable_adapter() if inner is not model else nullcontext():
        probes = make_probes(examples, length_limits(inner.config), hides_context(inner.config))
        check = _Check(model, probes, hardware)
        if trains:
            check.compare_training_mode()
        require_causal_pass(model, probes[-1].input_ids[:SHORT] if probes else (), **without_cache(inner))
        apart = None
        if why := cannot_pack(inner) or check.packing_fault(packs, packed.name):
            check.prefer_eager()
            apart = "its attention depends on the length of the batch" if depends_on_batch(inner.config) else None
            apart = apart or check.disagreement(pads, "a padded batch")
    model.train(training)
    if why is None:
        return Batching(packs, packed.name, packed.reason)
    own = inner.config._attn_implementation
    return Batching(pads, own, why) if apart is None else Batching(singles, own, f"{why}, and {apart}")


def make_probes(examples: Sequence[Example], limits: set[int], longest_too: bool = False) -> list[Example]:
    """Beginnings of examples, shortest first: a short one, a longer one, one that shares a prefix with it, and one beyond each limit.

    Limits that no example reaches need no probe. `longest_too` adds the longest example, for a model whose limits are not known.
    """
    if not examples:
        return []
    longest = max(examples, key=lambda example: len(example.input_ids)).input_ids
    shortest = min(examples, key=lambda example: len(example.input_ids)).input_ids
    beyond = [longest[: limit + max(64, limit // 8)] for limit in limits if limit < len(longest)]
    alike = (longest[:SHORT] + shortest[:SHORT])[: len(longest)]  # fits the model's context as the longest example does
    found = [shortest[:SHORT], longest[:PROBE], alike, *beyond, *([longest] if longest_too else [])]
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


class _Unsupported(Exception):
    """What the model itself cannot compute; other exceptions are faults of this program."""


class _Check:
    """The losses of each probe alone in the model's own attention, to compare other ways of computing them with."""

    def __init__(self, model: Any, probes: Sequence[Example], hardware: Hardware) -> None:
        self._model, self._inner, self._probes, self._hardware = model, transformers_model(model), probes, hardware
        self._keeps_logits = "logits_to_keep" in inspect.signature(self._inner.forward).parameters
        self._cacheless: dict[str, bool] = {}
        self._dtype, self._reference = self._in_first_precision(lambda dtype: self._alone(dtype, probes))

    def compare_training_mode(self) -> None:
        """Say where the short probes have other losses in training mode, as by noise of a model's own under a name that is not known here.

        Raises `CoraError` for a model that computes none there.
        """
        short = [probe for probe in self._probes if len(probe.input_ids) <= PROBE]

        def in_training(dtype: torch.dtype | None) -> list[torch.Tensor]:
            self._model.train()
            try:
                return self._alone(dtype, short)
            except _Unsupported as error:
                raise _Unsupported(f"in training, {error}") from error
            finally:
                self._model.eval()

        # A family may compute a part by itself in training, in the precision of the weights alone.
        dtype, found = self._in_first_precision(in_training)
        known = self._reference[: len(short)]  # the shortest come first
        evaluated = known if dtype == self._dtype else self._alone(dtype, short)
        if (worst := _worst(found, evaluated)) > TOLERANCES[dtype]:
            note(
                f"{type(self._inner).__name__} computes other losses in training than in evaluation (by {worst:.1e}), such as by noise of its own, so "
                "that what it is trained for is not quite what it is evaluated by"
            )

    def packing_fault(self, form: BatchForm, name: str) -> str | None:
        """Set the packed attention in the model, or return why its losses differ and leave the model's own.

        What a family hands to attention is checked with the implementation for CPUs, which takes any precision; that of the hardware
        then runs in the precision of the training.
        """
        register_packed_attention()
        own = self._inner.config._attn_implementation
        fault = self._set_attention("cora_segments") or self.disagreement(
            dataclasses.replace(form, shares_prefixes=True), "a packed row"
        )
        if fault is None and name != "cora_segments":
            fault = self._set_attention(name) or self.disagreement(form, "a packed row", native=True)
        if fault is not None:
            self._inner.set_attn_implementation(own)
        return fault

    def prefer_eager(self) -> None:
        """Set the model's plain attention where its default one gives other losses, as where it loses a family's own mask."""
        own, default = self._inner.config._attn_implementation, self._reference
        if own == "eager" or self._set_attention("eager"):
            return
        self._reference = self._alone(self._dtype, self._probes)
        if _worst(default, self._reference) <= TOLERANCES[self._dtype]:
            self._inner.set_attn_implementation(own)
            self._reference = default

    def disagreement(self, form: BatchForm, where: str, native: bool = False) -> str | None:
        """How the losses of probes in batches of `form` differ from those of single ones; None where they agree to rounding.

        `native`: in the precision of the training.
        """
        found: list[torch.Tensor] = [torch.empty(0)] * len(self._probes)
        model, device = self._model, self._inner.device
        mixed = native and self._hardware.dtype == torch.bfloat16
        try:
            with self._precision(None if native else self._dtype), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                for indices in form.passes(self._probes):
                    batch = form.collate([self._probes[index] for index in indices])
                    there = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
                    losses = response_losses(model, there).split([len(self._reference[index]) for index in indices])
                    for index, each in zip(indices, losses, strict=True):
                        found[index] = each
        except Exception as error:  # whatever a class that was not made for these arguments raises
            if is_out_of_memory(error):
                raise
            forget_failed_pass(model)
            return f"{where} ends in {type(error).__name__} ({reason(error)[:120]})"
        worst = _worst(found, self._reference)
        if worst <= TOLERANCES[None if native else self._dtype]:
            return None
        return f"{where} has other losses than single examples (by {worst:.1e})"

    def _in_first_precision(
        self, compute: Callable[[torch.dtype | None], list[torch.Tensor]]
    ) -> tuple[torch.dtype | None, list[torch.Tensor]]:
        """What is computed in the first precision that the model allows for it, and that precision; the last one, None, is that of the training."""
        for dtype in precisions(self._model):
            with suppress(_Unsupported):
                return dtype, compute(dtype)
        try:
            return None, compute(None)
        except _Unsupported as error:
            raise CoraError(f"{type(self._inner).__name__} cannot be trained: {error}") from error

    def _alone(self, dtype: torch.dtype | None, probes: Sequence[Example]) -> list[torch.Tensor]:
        """Losses of the last tokens of each probe alone, by the model as transformers calls it."""
        found = []
        with self._precision(dtype):
            for probe in probes:
                ids = torch.tensor([probe.input_ids], device=self._inner.device)
                responses = len(probe.input_ids) - probe.prompt_length
                kept = {"logits_to_keep": responses + 1} if self._keeps_logits else {}
                logits = self._logits(dtype, ids, **kept)
                found.append(token_losses(logits[0, -responses - 1 : -1], ids[0, -responses:]))
        return found

    def _logits(self, dtype: torch.dtype | None, ids: torch.Tensor, **kept: int) -> torch.Tensor:
        """The logits (1, tokens, vocabulary) of one example in `dtype`. Raises `_Unsupported` where the model computes none from token ids."""
        try:
            logits = getattr(self._pass(input_ids=ids, **kept), "logits", None)
        except UNSUPPORTED as error:
            if dtype is None and is_out_of_memory(error):  # a lower precision may fit
                raise
            forget_failed_pass(self._model)
            remedy = (
                "; if its context is shorter, --max-length cuts examples to it" if hides_context(self._inner.config) else ""
            )
            raise _Unsupported(
                f"its forward pass on the {ids.shape[1]} token ids of an example ends in {type(error).__name__} ({reason(error)}){remedy}"
            ) from error
        if not isinstance(logits, torch.Tensor):
            raise _Unsupported("it computes no logits of next tokens")
        return logits

    def _pass(self, **arguments: Any) -> Any:
        """A forward pass as transformers makes it, or else as training does, without a cache: a model's own code may be made for a cache that
        transformers no longer has."""
        try:
            return self._model(**arguments, **self._cacheless)
        except UNSUPPORTED as error:
            cacheless = without_cache(self._model)
            if cacheless == self._cacheless or is_out_of_memory(error):
                raise
            forget_failed_pass(self._model)
            output = self._model(**arguments, **cacheless)
            self._cacheless = cacheless
            return output

    def _set_attention(self, name: str) -> str | None:
        """Set an attention implementation of the model, or return why it does not take it."""
        try:
            self._inner.set_attn_implementation(name)
        except Exception as error:  # transformers raises many unrelated types for what a class does not support
            return reason(error)
        return None

    def _precision(self, dtype: torch.dtype | None) -> Any:
        return computing_in(self._model, dtype) if dtype else nullcontext()


def _worst(found: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """The largest mean difference of a probe's losses from those in `reference`, relative to one more than their mean."""
    worst = 0.0
    for losses, wanted in zip(found, reference, strict=True):
        if wanted.isfinite().all():  # else the first loss of the run says so
            difference = (losses - wanted).abs().mean() / (1 + wanted.abs().mean())
            worst = max(worst, difference.nan_to_num(torch.inf).item())
    return worst
