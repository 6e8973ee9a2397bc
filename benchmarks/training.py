"""Training speed compared with what people use today: PEFT LoRA on the stock Trainer with DataCollatorForSeq2Seq, and TRL's SFTTrainer.

Peer 1 samples as the Trainer does by default; peer 2 groups by length. Peer 3 is SFTTrainer with `packing=True`, its default strategy (`bfd`) and its
default loss, which computes no logits where there is no label (`loss_type="nll"`; "chunked_nll" was the name before TRL 1.16). It needs TRL, which cora
does not: `pip install trl==1.16.0`. Without it, the table says "not installed". Peer 3 gets the examples of peer 1's batches and packs them into rows of
1,024 tokens; a step has as many rows as hold 16 examples on average. The script also measures whether packing changes its loss. Every side trains LoRA r = 48 on q, k, v of the embedded model in
batches of 16 with Alpaca's template. Each round takes a few of the batches that a side would draw in one epoch, evenly spread from the
smallest to the largest, and every round takes different ones. Ours and peer 1 run the same batches. Rates count real tokens, not padding. Every side
runs one more batch first as warm-up.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

RANK, BATCH, LEARNING_RATE, MAX_LENGTH = 48, 16, 3e-4, 1024
STAGE = harness.Stage(
    name="training",
    script=__file__,
    sides={
        harness.OURS: "cora train",
        "random": "PEFT + Trainer, default sampling",
        "group_by_length": "PEFT + Trainer, length grouping",
        "trl": "TRL SFTTrainer 1.16, packing",
    },
    unit="real tokens/s",
    targets={"random": 2.5, "group_by_length": 1.8, "trl": 1.0},
    memory_targets={"random": 0.5, "group_by_length": 0.5},
    needs={"trl": "trl==1.16.0"},
)
# The generated data follow these quantiles of token counts. They come from a public text-to-code set of 2,017 Alpaca records
# (sahil280114/codealpaca, code_alpaca_2k), half of which have an input.
RECORDS, SHARE_WITH_INPUT = 2017, 0.5
QUANTILES = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
LENGTHS = {
    "instruction": (4, 10, 11, 12, 14, 15, 16, 17, 19, 22, 25, 29, 71),
    "input": (1, 5, 8, 11, 13, 16, 18, 21, 25, 35, 48, 85, 250),
    "output": (1, 11, 17, 26, 35, 46, 59, 74, 96, 131, 166, 266, 540),
}


def stand_in(tokenizer: Any) -> list[dict[str, str]]:
    """Records with the lengths above, from random words of the vocabulary. Speed depends on lengths, not on meaning."""
    import numpy as np

    random = np.random.default_rng(0)
    words = [
        index
        for token, index in sorted(tokenizer.get_vocab().items())
        if token[0] == "Ġ" and token[1:].isascii() and token[1:].isalpha()
    ]

    def text(field: str) -> str:
        length = round(float(np.interp(random.random(), QUANTILES, LENGTHS[field])))
        return str(tokenizer.decode(random.choice(words, length))).strip()

    return [
        {
            "instruction": text("instruction"),
            "input": text("input") if random.random() < SHARE_WITH_INPUT else "",
            "output": text("output"),
        }
        for _ in range(RECORDS)
    ]


def load_work(side: str, options: argparse.Namespace, dtype: str) -> tuple[Any, Any, list[Any], Any]:
    """The model with a fresh LoRA adapter and the side's attention, the hardware, all examples, and the tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from cora_cli.data.encode import encode_records
    from cora_cli.data.records import Record
    from cora_cli.data.split import load_split
    from cora_cli.data.templates import Template
    from cora_cli.device import select_hardware, select_packed_attention
    from cora_cli.models.loading import load_model
    from cora_cli.models.references import EMBEDDED_MODEL, resolve_model
    from cora_cli.models.tokenizer import load_tokenizer
    from cora_cli.training.attention import register_packed_attention

    register_packed_attention()
    hardware = select_hardware("auto", "bf16" if dtype == "bf16" else "fp32")
    attention = select_packed_attention(hardware.device.type).name if side == harness.OURS else "sdpa"
    path, dataset = resolve_model(options.model or EMBEDDED_MODEL), options.dataset
    tokenizer = load_tokenizer(path)
    records = load_split(dataset, None, 0).train if dataset else stand_in(tokenizer)
    examples = encode_records(
        [Record(record) for record in records], Template("alpaca", "alpaca", tokenizer), MAX_LENGTH, "benchmark"
    ).examples
    model = load_model(path, hardware.dtype, hardware.device, attention)
    model.config.use_cache = False
    set_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config), hardware, examples, tokenizer


def chosen_batches(examples: Sequence[Any], side: str, steps: int, number: int) -> list[list[int]]:
    """`steps` full batches of the side's epoch `number`, evenly spread over batch sizes in tokens, in the order of the epoch."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    from cora_cli.data.batches import GlobalBatches

    lengths = [len(example.input_ids) for example in examples]
    if side == "group_by_length":
        order = get_length_grouped_indices(lengths, BATCH, generator=torch.Generator().manual_seed(number))
        batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    else:
        sampler = GlobalBatches(len(examples), BATCH, 1, 0, 1, seed=0)
        sampler.set_epoch(number)
        batches = list(sampler)
    full = [index for index, batch in enumerate(batches) if len(batch) == BATCH]
    by_size = sorted(full, key=lambda index: sum(lengths[member] for member in batches[index]))
    return [batches[index] for index in sorted(by_size[(2 * n + 1) * len(by_size) // (2 * steps)] for n in range(steps))]


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train on the chosen batches."""
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    model, hardware, examples, tokenizer = load_work(side, options, options.dtype)
    measured = chosen_batches(examples, side, options.steps, options.round)
    batches = [measured[len(measured) // 2], *measured]
    chosen = [[examples[index] for index in batch] for batch in batches]
    arguments = TrainingArguments(
        **settings(hardware), per_device_train_batch_size=BATCH, max_steps=len(batches), remove_unused_columns=False
    )
    trainer: Trainer
    tokens = sum(len(example.input_ids) for batch in chosen[1:] for example in batch)
    if side == "trl":
        trainer = trl_trainer(model, tokenizer, [example for batch in chosen for example in batch], hardware)
        first = trainer.args.per_device_train_batch_size
        packed: Any = trainer.train_dataset
        tokens = sum(int(sum(row)) for row in packed["seq_lengths"][first:])
    elif side == harness.OURS:
        from cora_cli.data.batches import BatchForm, GlobalBatches
        from cora_cli.device import select_packed_attention
        from cora_cli.training.trainer import CoraTrainer

        shares = select_packed_attention(hardware.device.type).shares_prefixes

        class Chosen(GlobalBatches):
            def __init__(self, chosen: list[list[int]]) -> None:
                self._chosen = chosen

            def __len__(self) -> int:
                return len(self._chosen)

            def __iter__(self) -> Iterator[list[int]]:
                return iter(self._chosen)

        trainer = CoraTrainer(
            model, arguments, examples, None, Path("unused"), 1, BatchForm("packed", shares), arguments.max_steps
        )
        trainer.batches = Chosen(batches)
    else:
        rows = [row(example) for batch in chosen for example in batch]

        class InOrder(Trainer):
            def _get_train_sampler(self, train_dataset: Any = None) -> Any:
                return torch.utils.data.SequentialSampler(rows)

        trainer = InOrder(model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True))
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    seconds = ends[-1] - ends[0]
    return {
        "rate": tokens / seconds,
        "peak_bytes": harness.peak_bytes(hardware.device),
        "tokens": tokens,
        "seconds": seconds,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def settings(hardware: Any) -> dict[str, Any]:
    """The arguments that the Trainer and SFTTrainer have in common."""
    import torch

    return {
        "output_dir": "unused",
        "learning_rate": LEARNING_RATE,
        "bf16": hardware.dtype == torch.bfloat16,
        "use_cpu": hardware.device.type == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def trl_trainer(model: Any, tokenizer: Any, examples: Sequence[Any], hardware: Any) -> Any:
    """SFTTrainer for one pass over `examples`, packed, in the order of the packed rows."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import pack_dataset

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    dataset = Dataset.from_list([{name: row(example)[name] for name in ("input_ids", "labels")} for example in examples])
    rows = len(pack_dataset(dataset, MAX_LENGTH, "bfd"))
    arguments = SFTConfig(
        **settings(hardware),
        packing=True,
        max_length=MAX_LENGTH,
        gradient_checkpointing=False,  # as on all sides; SFTTrainer saves memory by default
        num_train_epochs=1,
        per_device_train_batch_size=max(1, round(rows * BATCH / len(examples))),
    )
    return InOrder(model, arguments, train_dataset=dataset, processing_class=tokenizer)


def trl_packing_error(options: argparse.Namespace) -> float:
    """How far the loss of one batch moves when SFTTrainer packs it, relative to the mean over its examples alone, in fp32."""
    import torch

    model, hardware, examples, tokenizer = load_work("trl", options, "fp32")
    trainer = trl_trainer(model, tokenizer, examples[:BATCH], hardware)
    packed = trainer.train_dataset.select_columns(["input_ids", "labels", "seq_lengths"])
    singles = [{**row(example), "seq_lengths": [len(example.input_ids)]} for example in examples[:BATCH]]

    def loss(rows: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
        batch = moved(
            trainer.data_collator([{k: v for k, v in one.items() if k != "attention_mask"} for one in rows]), hardware.device
        )
        labels = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            return trainer.compute_loss(model, batch).item() * labels, labels

    model.eval()
    together, count = loss(list(packed))
    alone = [loss([one]) for one in singles]
    expected = sum(value for value, _ in alone) / sum(number for _, number in alone)
    return abs(together / count - expected) / expected


def row(example: Any) -> dict[str, list[int]]:
    """An example in the form that DataCollatorForSeq2Seq expects."""
    masked = [-100] * example.prompt_length + example.input_ids[example.prompt_length :]
    return {"input_ids": example.input_ids, "labels": masked, "attention_mask": [1] * len(example.input_ids)}


def agreement(options: argparse.Namespace) -> Iterator[harness.Agreement]:
    """Loss and gradients of one batch in fp32: ours compared with those from the peer's logits."""
    import torch
    from transformers import DataCollatorForSeq2Seq

    from cora_cli.data.pack import pack
    from cora_cli.training.losses import response_losses

    found = []
    for side in (harness.OURS, "random"):
        model, hardware, examples, tokenizer = load_work(side, options, "fp32")
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # with B = 0 half of the gradients would be zero
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.data.copy_(0.02 * drawn)
        members = examples[:BATCH]
        if side == harness.OURS:
            loss = response_losses(model, moved(pack(members), hardware.device)).mean()
        else:
            padded = moved(DataCollatorForSeq2Seq(tokenizer, padding=True)([row(m) for m in members]), hardware.device)
            labels = padded.pop("labels")[:, 1:].flatten()
            # In float64, because torch's float32 log_softmax over 49,152 classes has an error of 1e-5, and its gradients one of 2e-4.
            loss = torch.nn.functional.cross_entropy(model(**padded).logits[:, :-1].flatten(0, 1).double(), labels)
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, our_gradients), (theirs, their_gradients) = found
    worst = max(float((our_gradients[n] - g).norm() / g.norm()) for n, g in their_gradients.items())
    yield harness.Agreement(
        "loss of the same batch in fp32 (the peer's cross-entropy in float64), relative", abs(ours - theirs) / theirs, 1e-5
    )
    yield harness.Agreement("largest gradient difference of any trained tensor, relative", worst, 1e-5)


def moved(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}


def notes(rounds: Mapping[str, list[dict[str, Any]]], options: argparse.Namespace) -> list[str]:
    """What was trained on, and our time compared with the least time that the matrix products alone would take."""
    import torch

    model, hardware, examples, _ = load_work(harness.OURS, options, "bf16")
    needed, spent = 0.0, 0.0
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    size = model.config.hidden_size, model.config.intermediate_size
    rate = harness.matmul_rate(dtype, 2048, *size, hardware.device)
    for number, result in enumerate(rounds[harness.OURS]):
        for batch in chosen_batches(examples, harness.OURS, options.steps, number):
            needed += operations(model, [examples[index] for index in batch])
        spent += result["seconds"]
    lengths = [len(example.input_ids) for example in examples]
    trl = []
    if STAGE.can_run("trl"):
        trl = [
            f"SFTTrainer's loss of {BATCH} packed examples differs from that of the same examples one at a time by {trl_packing_error(options):.1e} "
            f"(relative, fp32, PyTorch's attention); ours by the first figure above."
        ]
    return [
        *trl,
        f"{options.model or 'The embedded model'} on {hardware.device_reason if hardware.device.type == 'cuda' else 'the processor'}: "
        f"{options.steps} batches of {BATCH} per round, {options.dtype}, from "
        + (options.dataset or "generated records with the lengths of code_alpaca_2k")
        + f": {len(examples)} examples of {sum(lengths) / len(lengths):.0f} tokens on average (longest {max(lengths)}).",
        f"Arithmetic floor of ours: {needed / rate:.1f} s of matrix products at {rate / 1e9:.0f} GFLOP/s against {spent:.1f} s spent: "
        f"{needed / rate / spent:.0%}.",
    ]


def operations(model: Any, examples: Sequence[Any]) -> float:
    """Floating-point operations of the matrix products in one of our steps: forward and backward pass of a packed row.

    A frozen weight takes part in two products (forward, and the gradient of its input), a trained one in three. Attention is not counted.
    """
    from cora_cli.data.pack import pack

    batch = pack(examples)
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or "embed_tokens" in name:
            continue
        total += 2 * parameter.numel() * batch["layout"].tokens * (3 if parameter.requires_grad else 2)
    head = model.get_output_embeddings().weight.numel()
    return total + 2 * head * len(batch["labels"]) * 2


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="batches per round")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--model", help="a model's directory, instead of the embedded model; see random_model.py")
    parser.add_argument("--dataset", help="Alpaca records to train on instead of the generated ones")
    harness.run(STAGE, measure, lambda options: list(agreement(options)), parser, notes)


if __name__ == "__main__":
    main()
