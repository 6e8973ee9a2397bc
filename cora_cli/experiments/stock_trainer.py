"""LoRA by PEFT with the stock Trainer: the peer whose speed the check of a GPU compares ours with."""

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from cora_cli.data.encode import Example
from cora_cli.device import Hardware
from cora_cli.models.loading import load_model
from cora_cli.models.model_path import ModelPath
from cora_cli.models.tokenizer import load_tokenizer
from cora_cli.training.record import peak_memory_bytes
from cora_cli.training.settings import DEFAULT_TARGETS


def time_stock_trainer(
    path: ModelPath,
    examples: Sequence[Example],
    hardware: Hardware,
    output: Path,
    *,
    rank: int,
    rate: float,
    batch: int,
    steps: int,
    warm_up: int,
) -> dict[str, float]:
    """Train LoRA for `steps` padded batches of `batch` examples, in the Trainer's own order, and time those after `warm_up`.

    Returns tokens per second without padding, and the peak of memory in bytes.
    """
    tokenizer = load_tokenizer(path)
    rows = [
        {
            "input_ids": example.input_ids,
            "attention_mask": [1] * len(example.input_ids),
            "labels": [-100] * example.prompt_length + example.input_ids[example.prompt_length :],
        }
        for example in examples
    ]
    on_gpu = hardware.device.type == "cuda"
    gc.collect()  # the model of a training before this one would count
    model = load_model(path, hardware.dtype, hardware.device, None)
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(DEFAULT_TARGETS), task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        bf16=hardware.dtype == torch.bfloat16,
        use_cpu=not on_gpu,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        include_num_input_tokens_seen="non_padding",
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    clock, collate = _Clock(on_gpu), DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(get_peft_model(model, adapter), arguments, train_dataset=rows, data_collator=collate, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    (first, seen_first), (last, seen_last) = clock.ends[warm_up - 1], clock.ends[-1]
    return {
        "tokens_per_second": (seen_last - seen_first) / (last - first),
        "peak_memory_bytes": peak_memory_bytes(hardware.device),
    }


class _Clock(TrainerCallback):
    """When each step ended, and the tokens that had been seen by then."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self.ends: list[tuple[float, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note both."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), int(state.num_input_tokens_seen)))
