"""LoRA as one writes it by hand with PEFT and the stock Trainer, in one process: the peer of benchmarks/grid.py. Uses nothing of cora.

Prints the held-out loss as one line of JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def encode(record: dict[str, str], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """The tokens of one Alpaca record; the loss is on the response and the end token."""
    text = (WITH_INPUT if record.get("input") else WITHOUT_INPUT).format(**record)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    response = tokenizer(record["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = (prompt + response)[:max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ([-100] * len(prompt) + response)[:max_length]}


def main() -> None:
    """Train and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path, help='JSON: {"train": [...], "test": [...]}')
    for name, kind in (("seed", int), ("learning-rate", float), ("steps", int), ("batch-size", int), ("rank", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if options.bf16 else torch.float32)
    config = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    records = json.loads(options.data.read_text(encoding="utf-8"))
    train, test = ([encode(record, tokenizer, 1024) for record in records[part]] for part in ("train", "test"))
    arguments = TrainingArguments(
        output_dir="unused",
        seed=options.seed,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        get_peft_model(model, config),
        arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.train()
    print(json.dumps({"loss": trainer.evaluate()["eval_loss"]}))


if __name__ == "__main__":
    main()
