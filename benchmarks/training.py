"""Training speed beside what people use today, measured in turn on the same machine, data, dtype and threads.

Peers: PEFT LoRA on the stock Trainer with DataCollatorForSeq2Seq, (1) with its default sampling and (2) with length grouping. Each
measurement is a process of its own, so that peak memory is its own; rounds alternate. The work is LoRA r = 48 on q, k, v of the
embedded model, batches of 16 records of builtin:code with Alpaca's template. Real tokens count, padding does not.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RANK, BATCH, LEARNING_RATE = 48, 16, 3e-4
SIDES = {
    "ours": "cora train",
    "random": "PEFT + Trainer, default sampling",
    "group_by_length": "PEFT + Trainer, length grouping",
}
RESULTS = Path(__file__).parent / "results.json"


def measure(side: str, steps: int, dtype: str) -> dict[str, float]:
    """Train `steps` steps and return real tokens per second (without the first step), peak bytes and the first loss."""
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from cora_cli.device import select_hardware

    hardware = select_hardware("auto", "bf16" if dtype == "bf16" else "fp32")
    model, examples, tokenizer = _work("cora_packed" if side == "ours" else "sdpa", hardware, steps)
    arguments: dict[str, Any] = {
        "output_dir": "unused",
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "bf16": hardware.dtype == torch.bfloat16,
        "use_cpu": hardware.device.type == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "remove_unused_columns": False,
    }
    if side == "ours":
        from cora_cli.training.trainer import CoraTrainer

        trainer: Trainer = CoraTrainer(model, TrainingArguments(**arguments), examples, None, Path("unused"), 1)
    else:
        rows = [
            {
                "input_ids": example.input_ids,
                "labels": [-100] * example.prompt_length + example.input_ids[example.prompt_length :],
                "attention_mask": [1] * len(example.input_ids),
            }
            for example in examples
        ]
        arguments["train_sampling_strategy"] = side
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=rows, data_collator=collator)
    clock = _Clock()
    trainer.add_callback(clock.callback())
    trainer.train()
    tokens = sum(len(example.input_ids) for example in examples)
    share = (steps - 1) / steps  # every example is seen once; the first step warms up
    return {
        "tokens_per_second": tokens * share / clock.seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "first_loss": trainer.state.log_history[0]["loss"],
    }


class _Clock:
    """Seconds from the end of the first step to the end of the last."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.seconds = 0.0

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                now = time.perf_counter()
                if clock.began is None:
                    clock.began = now
                clock.seconds = now - clock.began

        return Callback()


def _work(attention: str, hardware: Any, steps: int) -> tuple[Any, list[Any], Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    import cora_cli.data.pack  # noqa: F401  # registers the attention
    from cora_cli.data.encode import encode_records
    from cora_cli.data.formats import load_split
    from cora_cli.loading import load_model, load_tokenizer
    from cora_cli.models import EMBEDDED_MODEL, resolve_model

    path = resolve_model(EMBEDDED_MODEL)
    tokenizer = load_tokenizer(path)
    records = load_split("builtin:code", None, 0).train[: steps * BATCH]
    examples = encode_records(records, "alpaca", "alpaca", tokenizer, 1024, "benchmark").examples
    model = load_model(path, hardware.dtype, hardware.device, attention)
    model.config.use_cache = False
    set_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config), examples, tokenizer


def agreement() -> dict[str, float]:
    """Largest relative difference of loss and of any trained tensor's gradient on one batch, packed against padded, in fp32."""
    import torch
    from transformers import DataCollatorForSeq2Seq

    from cora_cli.data.pack import pack, response_losses
    from cora_cli.device import select_hardware

    hardware = select_hardware("auto", "fp32")
    found = []
    for attention in ("cora_packed", "sdpa"):
        model, examples, tokenizer = _work(attention, hardware, 1)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # at B = 0 half of the gradients would be zero
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
        if attention == "cora_packed":
            losses, _ = response_losses(model, pack(examples))
            loss = losses.mean()
        else:
            rows = [
                {"input_ids": e.input_ids, "labels": [-100] * e.prompt_length + e.input_ids[e.prompt_length :]}
                for e in examples
            ]
            loss = model(**DataCollatorForSeq2Seq(tokenizer, padding=True)(rows)).loss
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, our_gradients), (theirs, their_gradients) = found
    worst = max(float((our_gradients[n] - g).norm() / g.norm()) for n, g in their_gradients.items())
    return {"loss": abs(ours - theirs) / theirs, "gradient": worst}


def main() -> None:
    """Run all sides in turn, print the table and write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if options.side:
        print(json.dumps(measure(options.side, options.steps, options.dtype)))
        return
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side, results in rounds.items():
            command = [sys.executable, __file__, "--side", side, "--steps", str(options.steps), "--dtype", options.dtype]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output.strip().splitlines()[-1]))
            print(f"round {number + 1}, {SIDES[side]}: {results[-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    report(rounds, agreement(), options)


def report(rounds: dict[str, list[dict[str, float]]], agreed: dict[str, float], options: argparse.Namespace) -> None:
    """Print medians with their spread and the ratios of ours to each peer within the same round."""
    from cora_cli.rundir import write_json
    from cora_cli.tables import markdown_table

    rows = []
    for side, results in rounds.items():
        speeds = [result["tokens_per_second"] for result in results]
        ratios = [ours["tokens_per_second"] / peer for ours, peer in zip(rounds["ours"], speeds, strict=True)]
        memory = statistics.median(result["peak_bytes"] for result in results)
        rows.append(
            [
                SIDES[side],
                f"{statistics.median(speeds):.0f} [{min(speeds):.0f}, {max(speeds):.0f}]",
                f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
                f"{memory / 2**30:.2f}",
            ]
        )
    print(markdown_table(["training", "real tokens/s, median [min, max]", "ours ÷ this", "peak GiB"], rows))
    print(
        f"\n{options.dtype}, {options.rounds} rounds of {options.steps} steps, {os.cpu_count()} cores; same batch in fp32: loss equal "
        f"to {agreed['loss']:.1e}, gradients to {agreed['gradient']:.1e} (relative)"
    )
    write_json(
        RESULTS,
        {
            "machine": platform.processor() or platform.machine(),
            "options": vars(options),
            "rounds": rounds,
            "agreement": agreed,
        },
    )
    if max(agreed.values()) > 1e-5:
        sys.exit("the packed form does not agree with the padded one")


if __name__ == "__main__":
    main()
