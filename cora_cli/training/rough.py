"""The memory of a run counted from shapes, without a model: within about a factor of two, in milliseconds.

A plan shows it, marked, for what it does not measure, and a run asks it whether it is far from filling the GPU.
"""

from typing import Any

from cora_cli.adapters.install import target_linears
from cora_cli.methods.registry import method_of
from cora_cli.planning.four_bit import four_bit_bytes
from cora_cli.training.arguments import number_of_processes
from cora_cli.training.config import TrainConfig
from cora_cli.training.prepare import Prepared
from cora_cli.training.sharding import parts_of
from cora_cli.training.work import Work, work_of


def rough_peak(config: TrainConfig, prepared: Prepared, work: Work | None = None) -> int:
    """Bytes that a process of the run keeps, with the largest pass of all processes, or of all runs of `work`."""
    processes, full, work = number_of_processes(config), prepared.plan is None, work or work_of(config, prepared)
    itemsize = 4 if full else prepared.hardware.dtype.itemsize
    numbers = sum(weight.numel() for weight in prepared.skeleton.parameters())
    weights = four_bit_bytes(prepared.skeleton, prepared.hardware.dtype) if config.load_in_4bit else itemsize * numbers
    # In float32: the trained numbers of an adapter, their gradients and AdamW's two moments.
    trained = numbers if full else _trained(prepared)
    states = (12 if full else 16) * trained
    if config.shard == "none":
        copied = 4 * trained if processes > 1 else 0
        return weights + states + copied + _passes(work, prepared)
    # One layer computes while the next is gathered.
    gathered = 2 * itemsize * max(sum(weight.numel() for weight in part.parameters()) for part in parts_of(prepared.skeleton))
    divided = (weights + states) // processes if full else weights // processes + states
    # Autocast converts the gathered weights, and the backward pass needs what it converted.
    converted = prepared.hardware.dtype.itemsize * numbers if full and prepared.hardware.dtype.itemsize < itemsize else 0
    return divided + gathered + converted + _passes(work, prepared)


def _trained(prepared: Prepared) -> int:
    """The trained numbers of an adapter; where a file decides, those of a LoRA."""
    plan: Any = prepared.plan
    linears = target_linears(prepared.skeleton, plan.target_modules)
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    found = method_of(plan.mode).parameters(shapes, plan)
    return plan.rank * sum(map(sum, shapes.values())) if found is None else found


def _passes(work: Work, prepared: Prepared) -> int:
    """What the largest pass keeps for its backward pass, also where gradients are taken for the start, or the logits of a held-out one: in the
    precision of the run, in float32, and their softmax."""
    itemsize, plan = prepared.hardware.dtype.itemsize, prepared.plan
    vocabulary = int(prepared.model_config.get_text_config(decoder=True).vocab_size)
    # `Work.size` counts in 16 bits.
    kept = work.size(work.passes[0])
    if plan is not None and method_of(plan.mode).observes(plan.b_init) == "gradient":
        kept = max(kept, work.start_bytes(prepared.start_examples))
    return max(
        kept * itemsize // 2,
        (itemsize + 8) * vocabulary * work.held_out_labels(prepared.test.examples, prepared.validation.examples),
    )
