"""`--shard fsdp`: the weights of the model are divided among the processes, and each layer is gathered while it computes (PyTorch's FSDP2).

Only the division and the gathering are here: `run` decides when a model is divided, and `trainer` trains it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cora_cli.errors import CoraError
from cora_cli.methods.parts.layers import transformers_model


def process_mesh(device: torch.device, processes: int) -> DeviceMesh:
    """All processes in one row; every process calls this at the same time."""
    return init_device_mesh(device.type, (processes,))


@contextlib.contextmanager
def planned_mesh(processes: int) -> Iterator[DeviceMesh]:
    """The first of so many processes, of which the others do not exist: nothing is exchanged. For plans on fake tensors.

    No other process group may exist.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # only plans need torch's internals

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield process_mesh(torch.device("cpu"), processes)
    finally:
        torch.distributed.destroy_process_group()


def shard(model: Any, mesh: DeviceMesh, device: torch.device) -> None:
    """Divide the weights of a model in the host's memory among the processes of `mesh`, part by part, and move them to `device`.

    Needs no other process. A part is a block of the model, its embeddings or its head, if nothing else has their weights; the rest is
    one part more.
    """
    # An adapter is kept complete in every process, and its gradients are averaged. It is a small part of the memory, FSDP2 takes one
    # dtype in the trained parameters of a part, and methods compute factors from trained tensors, share them between layers and change
    # them between steps. So every method trains as it does without sharding, bit for bit, and its checkpoints are the same.
    kept = {parameter for name, parameter in model.named_parameters() if _in_adapter(model, name)}
    for part in (*parts_of(model), model):
        # After every pass, the parameters of all parts are the divided ones: an optimizer must not get others.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    for parameter in kept:
        parameter.data = parameter.data.to(device)


def _in_adapter(model: Any, name: str) -> bool:
    return isinstance(model, PeftModel) and str(model.base_model.prefix) in name


def parts_of(model: Any) -> list[torch.nn.Module]:
    """The modules to gather one at a time, inner ones first."""
    inner = transformers_model(model)
    blocks = set(inner._no_split_modules or ())
    ends = [end for end in (inner.get_input_embeddings(), inner.get_output_embeddings()) if end is not None]
    holders: dict[torch.nn.Parameter, int] = {}
    for module in inner.modules():
        for parameter in module.parameters(recurse=False):
            holders[parameter] = holders.get(parameter, 0) + 1
    alone = [end for end in ends if all(holders[parameter] == 1 for parameter in end.parameters())]
    found = [module for module in inner.modules() if type(module).__name__ in blocks or any(module is end for end in alone)]
    return found[::-1]


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` has divided the model."""
    return isinstance(model, FSDPModule)


def share_adapter(model: Any) -> None:
    """Give every process the adapter of the first: starts that are computed from W may differ in rounding between machines."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if _in_adapter(model, name):
            same = tensor.data.contiguous()
            torch.distributed.broadcast(same, 0)
            tensor.data.copy_(same)


def average_gradients(model: torch.nn.Module) -> None:
    """Average the gradients of what every process holds complete; FSDP2 averages those of what it has divided."""
    gradients = [
        parameter.grad
        for parameter in model.parameters()
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor)
    ]
    if not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(together)
    together /= torch.distributed.get_world_size()
    for gradient, averaged in zip(gradients, together.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))


def most(count: int, device: torch.device) -> int:
    """The largest count of any process. Each forward pass of a sharded model is one of all processes."""
    counts = torch.tensor([count], device=device)
    torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
    return int(counts)


def gathered(values: Any, keep: bool) -> Any:
    """`values`, a tree of dictionaries and lists, with complete tensors on the CPU where there are divided ones; None in their place unless `keep`.

    Every process calls this; the first one keeps.
    """
    if isinstance(values, dict):
        return {key: gathered(value, keep) for key, value in values.items()}
    if isinstance(values, list):
        return [gathered(value, keep) for value in values]
    if not isinstance(values, DTensor):
        return values
    complete = values.full_tensor()
    return complete.cpu() if keep else None


def complete_weights(model: torch.nn.Module, keep: bool) -> dict[str, Any]:
    """The state of a sharded model as `gathered`, where weights that are one tensor in the model are one here."""
    tensors = model.state_dict(keep_vars=True)
    several = {id(tensor): tensor for tensor in tensors.values()}
    found = {key: gathered(tensor.detach(), keep) for key, tensor in several.items()}
    return {name: found[id(tensor)] for name, tensor in tensors.items()}


def divided(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's share of a complete tensor, where `like` is divided and has its shape."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_weights(model: torch.nn.Module, directory: Path) -> None:
    """Put the weights of a checkpoint in the place of the model's, which may be sharded. Raises `CoraError` if it lacks one."""
    missing = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names: list[str] = file.keys()
                for name in names:
                    if name in weights:
                        weights[name].copy_(divided(file.get_tensor(name), weights[name]))
                        missing.pop(id(weights[name]), None)
    if missing:
        raise CoraError(
            f"{directory} lacks {len(missing)} weights of the model, such as {min(missing.values())}, so the run cannot go on from there; train "
            "it again in a new directory"
        )
