"""How many steps a training takes, and its configuration as the arguments of transformers' Trainer."""

import math
from typing import Any

import torch
from transformers import TrainingArguments

from cora_cli.device import Hardware
from cora_cli.environment import launched_processes
from cora_cli.rundir import RunDirectory
from cora_cli.training.config import TrainConfig


def total_steps(config: TrainConfig, examples: int) -> int:
    """Optimizer steps of the complete run."""
    per_epoch = math.ceil(examples / (config.batch_size * config.gradient_accumulation * number_of_processes(config)))
    return config.max_steps or math.ceil(config.epochs * per_epoch)


def number_of_processes(config: TrainConfig) -> int:
    """Processes of this training: those of a plan, or as the launcher counts them."""
    return config.processes or launched_processes()


def warmup_steps(ratio: float, steps: int) -> int:
    """Steps of a run of `steps` over which the learning rate rises from 0, rounded up as `TrainingArguments.get_warmup_steps` does.

    The only step of a run is none of them: it would have learning rate 0.
    """
    return math.ceil(steps * ratio) if steps > 1 else 0


_SCHEDULERS = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "constant-decay": "warmup_stable_decay",
}
_DECAY_SHARE = 0.2


def _decay(steps: int, warmup: int) -> dict[str, Any]:
    """The Trainer's settings for a linear decay over the last fifth of a run of `steps`, or what the warm-up leaves of it."""
    return {"num_decay_steps": min(math.ceil(_DECAY_SHARE * steps), steps - warmup), "decay_type": "linear"}


def training_arguments(config: TrainConfig, hardware: Hardware, examples: int, run: RunDirectory) -> TrainingArguments:
    """The configuration as the Trainer's arguments, for a training set of `examples`; under a launcher, creating them also starts the process group."""
    steps = total_steps(config, examples)
    warmup = warmup_steps(config.warmup_ratio, steps)
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.peak_rate,
        lr_scheduler_type=_SCHEDULERS[config.lr_schedule],
        lr_scheduler_kwargs=_decay(steps, warmup) if config.lr_schedule == "constant-decay" else None,
        warmup_steps=warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=hardware.dtype == torch.bfloat16,
        use_cpu=hardware.device.type == "cpu",
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        # Otherwise the Trainer writes its own choice into the config of a model that generates later.
        use_cache=True,
        save_strategy="steps",
        save_steps=config.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=config.report_to,
        run_name=run.root.name,
        seed=config.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        # Buffers are equal everywhere, and processes may need different numbers of forward passes for a step.
        ddp_broadcast_buffers=False,
    )
