"""Count the bytes of all tensors that are alive while a model trains, by what they are for, on real tensors or on fake ones.

Fake tensors have shapes but no values (torch's `FakeTensorMode`), so the training of any model can be measured within seconds and without
its memory. The dry runs do that.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Self, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cora_cli.models.skeleton import build_skeleton

Part = Literal["weights", "gathered", "adapter", "gradients", "optimizer", "cache", "activations", "logits"]
"""`gathered`: the complete weights of the layers that compute, where the model is divided; `cache`: keys and values of earlier tokens."""
PARTS: tuple[Part, ...] = get_args(Part)


class StorageMeter(TorchDispatchMode):
    """Counts the storages that operations create while it is active, from their creation until they are freed.

    `peak` has the bytes of each part at the moment of their largest sum. Results whose last dimension is the vocabulary are logits, a
    converted copy of a weight is a weight, and everything else is an activation unless `assign` or `creating` says otherwise. FSDP2's
    buffers are known by its operators.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._storages: dict[int, tuple[Part, int]] = {}
        self._now: dict[Part, int] = dict.fromkeys(PARTS, 0)
        self._total = self._largest = 0
        self._usual: Part = "activations"
        self._paused = False
        self.peak = dict(self._now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it returns."""
        if DTensor in types:
            return NotImplemented  # its operations on local tensors come here
        if func is torch.ops.prim.device.default:  # fake tensors ask more often than they compute
            return func(*args)
        result = func(*args, **(kwargs or {}))
        if self._paused:
            return result
        self._name_buffers(func, args, kwargs or {}, result)
        for tensor in (result,) if isinstance(result, torch.Tensor) else tree_iter(result):
            if isinstance(tensor, torch.Tensor) and not _is_meta(tensor):
                self._count(tensor, func, args)
        return result

    def _count(self, tensor: torch.Tensor, func: Any, args: tuple[Any, ...]) -> None:
        if tensor.untyped_storage()._cdata in self._storages:
            return
        part = self._usual
        if func is torch.ops.aten._to_copy.default:
            source = self._storages.get(args[0].untyped_storage()._cdata)
            part = source[0] if source is not None and source[0] in ("weights", "adapter") else part
        if part == "activations" and tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary:
            part = "logits"
        self.assign([tensor], part)

    def _name_buffers(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Give FSDP2's buffers their parts: it creates them as any tensor, and frees and refills them by resizing their storages."""
        if func.namespace == "fsdp":
            name = func._opname
            if name == "all_gather_copy_in":
                self.assign([result[1]], "gathered")
            elif name == "split_with_sizes_copy":
                self.assign(kwargs["out"], "gathered")
            elif name == "chunk_cat":
                self.assign([*args[0], kwargs["out"]], "gradients")
        elif func.namespace == "c10d" and func._opname == "_reduce_scatter_base_":
            self.assign([args[0]], "gradients")

    def assign(self, tensors: Iterable[torch.Tensor], part: Part) -> None:
        """Count the storages of `tensors` as this part, whether they are known already or not; of a divided one, this process's share."""
        for tensor in tensors:
            storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
            key = storage._cdata
            if key in self._storages:
                self._forget(key)
            else:
                weakref.finalize(storage, self._forget, key).atexit = False
            self._enter(storage, part)

    def _enter(self, storage: torch.UntypedStorage, part: Part) -> None:
        self._storages[storage._cdata] = part, storage.nbytes()
        self._now[part] += storage.nbytes()
        self._total += storage.nbytes()
        if self._total > self._largest:
            self._largest, self.peak = self._total, dict(self._now)

    def __enter__(self) -> Self:
        """Count from now on, also where a storage is resized, which is no operation."""
        plain = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            known = self._storages.get(storage._cdata)
            plain(storage, size)
            if known is not None:
                self._forget(storage._cdata)
                self._enter(storage, known[0])
            return storage

        infer: Any = ShardingPropagator._propagate_tensor_meta_non_cached

        def infer_uncounted(*arguments: Any) -> Any:
            """Let a divided tensor find the shape of a result: it computes on complete tensors, fake ones also where the others are real."""
            before, self._paused = self._paused, True
            try:
                return infer(*arguments)
            finally:
                self._paused = before

        self._patched = contextlib.ExitStack()
        for owner, name, new in (
            (torch.UntypedStorage, "resize_", resize),
            (ShardingPropagator, "_propagate_tensor_meta_non_cached", infer_uncounted),
        ):
            self._patched.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Count no more."""
        super().__exit__(*error)
        self._patched.close()

    def restart(self) -> None:
        """Look for the largest sum from now on."""
        self._largest, self.peak = self._total, dict(self._now)

    def _forget(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self._now[part] -= size
        self._total -= size

    @contextlib.contextmanager
    def creating(self, part: Part) -> Iterator[None]:
        """Count what operations create in the block as this part."""
        usual, self._usual = self._usual, part
        try:
            yield
        finally:
            self._usual = usual


def _is_meta(tensor: torch.Tensor) -> bool:
    # A fake tensor would answer by an operation.
    return tensor.fake_device.type == "meta" if isinstance(tensor, FakeTensor) else tensor.is_meta


def follow_weights(meter: StorageMeter, model: Any) -> None:
    """Let the meter know weights and adapter by name."""
    prefix = getattr(model.base_model, "prefix", None)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        meter.assign([tensor], "adapter" if prefix and prefix in name else "weights")


def follow_training(meter: StorageMeter, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Let the meter know weights, adapter, gradients and the optimizer's state by name."""
    follow_weights(meter, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda tensor: meter.assign([tensor.grad], "gradients"))
    step = contextlib.ExitStack()
    optimizer.register_step_pre_hook(lambda *_: step.enter_context(meter.creating("optimizer")) and None)
    optimizer.register_step_post_hook(lambda *_: step.close())


def fake_model(config: Any, trust_remote_code: bool, dtype: torch.dtype) -> Any:
    """The causal model of a configuration with fake weights of `dtype`; to be called, and used, under `fakes`."""
    model: Any = build_skeleton(config, trust_remote_code, dtype)
    model._apply(lambda tensor: torch.empty_like(tensor, device="cpu"))
    model.tie_weights()
    return model.eval()


@contextlib.contextmanager
def fakes() -> Iterator[None]:
    """Make every new tensor a fake one.

    Modules are moved and converted by new parameters in the place of the old ones: torch would swap their contents, which fake tensors
    do not support. What needs values and changes no memory is left out.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import PreTrainedModel, masking_utils
    from transformers.integrations import moe

    with contextlib.ExitStack() as patched:
        for owner, name, new in (
            (torch.nn.Module, "_apply", _apply_plainly),
            # GPT-2 and others warn where the first or last token is padding.
            (PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *_: None),
            # Masks are left out where there is no padding. Models of transformers do not ask while they are traced.
            (masking_utils, "is_tracing", lambda *_: True),
            # Fake tensors are multiplied by the matrices of experts in bf16 only.
            (moe, "_grouped_mm", lambda states, weight, offs: _Grouped.apply(states.to(weight.dtype), weight)),
        ):
            patched.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


class _Grouped(torch.autograd.Function):
    """The memory of a product of each state with the matrix of its expert, without its numbers."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """states: (tokens, in), weight: (experts, in, out); returns (tokens, out)."""
        of_states, of_weight = ctx.needs_input_grad
        ctx.save_for_backward(states if of_weight else None, weight if of_states else None)
        ctx.shapes = states.shape, weight.shape
        return states.new_empty(len(states), weight.shape[2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """upstream: as the output."""
        return tuple(
            upstream[0].new_empty(shape) if needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        )


def _apply_plainly(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    for child in self.children() if recurse else ():
        child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = fn(parameter)
            if changed is not parameter:
                self._parameters[name] = torch.nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self
