"""The settings of `cora train` that are not one method's own, as `--help` shows them."""

import dataclasses
from typing import Literal

from cora_cli.methods.method import AInit, BInit
from cora_cli.methods.registry import DEFAULT, Mode
from cora_cli.settings import LARGEST_RANK, MOST, DtypeName, TemplateName, setting

DEFAULT_RATE = 3e-4
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj")
Reporter = Literal["none", "tensorboard", "wandb", "trackio"]
_WHAT, _DATA, _OPTIM, _RUN = "Method", "Data", "Optimisation", "Run"


@dataclasses.dataclass(frozen=True)
class SharedSettings:
    """Every setting but those of single modes."""

    model: str = setting(
        "Base model: hub id with optional @revision, a directory, or builtin:smollm2.", panel=_WHAT, names="model"
    )
    dataset: str = setting(
        "Hub id, a .json, .jsonl, .csv, .tsv or .parquet file, a folder of datasets.save_to_disk, or builtin:instruct, builtin:code, …",
        panel=_DATA,
        names="dataset",
    )
    output_dir: str = setting("Run directory; must not contain another run.", flags=("--output-dir", "-o"), panel=_RUN)
    mode: Mode = setting(
        "Training method: lora, fb (B = basis, frozen), tb (B = basis, trained), full (all weights, no adapter), or a baseline; "
        "docs/methods.md describes each.",
        DEFAULT,
        panel=_WHAT,
    )
    basis: str | None = setting(
        "Basis file from `cora extract-basis`: required by fb and tb, of the input side by fa-basis, optional for lora-mini.",
        None,
        panel=_WHAT,
        names="basis",
    )
    start: Literal["mean-delta"] | None = setting(
        "What the base model is changed by before the adapter: mean-delta, the mean of the ΔW of --start-models, which stays frozen.",
        None,
        panel=_WHAT,
    )
    start_models: tuple[str, ...] | None = setting(
        "Models fine-tuned from the base model, comma-separated, for --start mean-delta and for modes that start from models.",
        None,
        panel=_WHAT,
        names="model",
    )
    rank: int = setting(
        "Rank r of the adapter; it uses the first r columns of the basis, so r ≤ R.", 48, panel=_WHAT, most=LARGEST_RANK
    )
    alpha: float | None = setting("Numerator of the scaling s = alpha / r. Default: 2 r.", None, panel=_WHAT, most=MOST)
    rslora: bool = setting("Scale by alpha / √r instead of alpha / r.", False, panel=_WHAT)
    a_init: AInit | None = setting("Start of A, instead of the mode's default.", None, panel=_WHAT)
    b_init: BInit | None = setting(
        "Start of B in fb and tb, instead of the basis; gradient: leading left singular vectors of ∂L/∂W in the first training examples.",
        None,
        panel=_WHAT,
    )
    target_modules: tuple[str, ...] = setting("Linear layers to adapt, comma-separated.", DEFAULT_TARGETS, panel=_WHAT)
    dropout: float = setting(
        "LoRA dropout on the input of A; examples that share a prompt prefix share its mask.", 0.0, panel=_WHAT
    )
    compact: bool = setting("Store only A and the hash of the basis; B is rebuilt from the basis file.", False, panel=_WHAT)
    columns: tuple[str, ...] | None = setting(
        "Columns to use where they are not recognised, comma-separated: prompt=COLUMN,response=COLUMN, with input=COLUMN if there is one, or "
        "messages=COLUMN, or text=COLUMN.",
        None,
        panel=_DATA,
    )
    subset: str | None = setting("Subset (configuration) of a hub data set.", None, panel=_DATA)
    split: str | None = setting("Split to read of a data set that has several. Default: train.", None, panel=_DATA)
    test_dataset: str | None = setting(
        "Data set whose records are held out, instead of a part of --dataset; of one with several splits, the split test.",
        None,
        panel=_DATA,
        names="dataset",
    )
    test_size: float | None = setting(
        "Held-out records: a count, or a fraction below 1. Default: the built-in set's own split, otherwise 0.1.",
        None,
        panel=_DATA,
    )
    validation_size: int | None = setting(
        "Training records to set aside as a validation set, measured after training. Select settings such as the learning rate by them, "
        "not by the held-out records.",
        None,
        panel=_DATA,
    )
    validation_loss: bool = setting(
        "Measure the loss on the validation records after training; without it they are only kept apart.", True, panel=_DATA
    )
    split_seed: int = setting(
        "Seed of the split into training and held-out records; use the same one for all runs that you compare.", 0, panel=_DATA
    )
    limit: int | None = setting("Train only on the first N training records.", None, panel=_DATA)
    template: TemplateName = setting(
        "Prompt template; auto: plain for pairs of a prompt and an answer, which follow each other as they are; else the tokenizer's chat "
        "template if it has one, otherwise Alpaca's.",
        "auto",
        panel=_DATA,
    )
    template_date: str | None = setting(
        "Date, as YYYY-MM-DD, for a chat template that writes the current one into its prompts. Default: today; a resumption and the "
        "evaluation of the run use it again.",
        None,
        panel=_DATA,
    )
    train_on: Literal["last", "all"] = setting(
        "Answers of a conversation that carry loss: only the last one, or each after the conversation up to it. Held-out and validation "
        "loss are always those of the last answer.",
        "last",
        panel=_DATA,
    )
    max_length: int = setting(
        "Maximum length of an example in tokens; longer prompts are cut from the left.", 1024, panel=_DATA, most=MOST
    )
    learning_rate: float | Literal["auto"] = setting(
        "Peak learning rate; tune it separately for each mode. auto: proposed from the curvature of the loss before the first step, which takes "
        "some 17 gradients of 4 examples in float32.",
        DEFAULT_RATE,
        panel=_OPTIM,
    )
    epochs: float = setting("Passes over the training records.", 1.0, panel=_OPTIM, most=MOST)
    max_steps: int | None = setting("Optimizer steps, instead of --epochs.", None, panel=_OPTIM, most=MOST)
    batch_size: int = setting("Examples per process and micro-batch, packed into one row.", 16, panel=_OPTIM, most=MOST)
    tokens_per_row: int | None = setting(
        "Split a micro-batch whose row is longer into rows of at most N tokens, one after the other: less memory, and without --dropout the "
        "same gradients up to rounding.",
        None,
        panel=_OPTIM,
        most=MOST,
    )
    gradient_accumulation: int = setting(
        "Micro-batches per optimizer step; the loss is the mean over all their tokens.", 1, panel=_OPTIM, most=MOST
    )
    warmup_ratio: float = setting(
        "Fraction of the steps over which the learning rate warms up, rounded up to a step.", 0.03, panel=_OPTIM
    )
    lr_schedule: Literal["linear", "cosine", "constant", "constant-decay"] = setting(
        "Learning-rate schedule after warm-up; constant-decay: constant, then linear to 0 over the last fifth of the steps.",
        "linear",
        panel=_OPTIM,
    )
    weight_decay: float = setting("AdamW's weight decay.", 0.0, panel=_OPTIM)
    max_grad_norm: float = setting("Clip the gradient norm to this value; 0 disables clipping.", 1.0, panel=_OPTIM)
    gradient_checkpointing: bool = setting(
        "Recompute activations in the backward pass: less memory, more time.", False, panel=_OPTIM
    )
    attention: str = setting(
        "Attention of packed rows on CUDA: auto, varlen (torch's FlashAttention), flex, flash-attn, sdpa, or a repository of kernels on the hub.",
        "auto",
        panel=_OPTIM,
    )
    compile: bool = setting(
        "Compile the model's layers with torch.compile: pays off in long runs. The result is the same up to rounding.",
        False,
        panel=_OPTIM,
    )
    liger: bool = setting(
        "Use the kernels of liger-kernel for norms and feed-forward layers, on CUDA. The result is the same up to rounding.",
        False,
        panel=_OPTIM,
    )
    eval_steps: int | None = setting(
        "Also measure the held-out loss every N steps, not only before and after training.", None, panel=_RUN
    )
    eval_limit: int | None = setting("Measure the held-out loss only on the first N held-out records.", None, panel=_RUN)
    save_steps: int = setting("Write a checkpoint every N steps.", 50, panel=_RUN, most=MOST)
    keep_checkpoints: int = setting("Number of most recent checkpoints to keep.", 2, panel=_RUN, most=MOST)
    seed: int = setting("Seed of random starts, data order and dropout.", 0, panel=_RUN)
    resume: bool = setting(
        "Continue the run in --output-dir from its last complete checkpoint; start a new run if there is none.",
        False,
        panel=_RUN,
    )
    stop_at: int | None = setting(
        "Stop after optimizer step N of the schedule with a checkpoint and the validation loss, stops/N.json; --resume continues.",
        None,
        panel=_RUN,
    )
    dry_run: bool = setting(
        "Print parameters, steps, tokens, peak memory by part, the cards that it fits, and one example, then exit. Needs the model's "
        "configuration and tokenizer, but no weights and no GPU; --device cpu plans for a processor.",
        False,
        panel=_RUN,
    )
    rate_from: str | None = setting(
        "With --dry-run: also print the time that the steps will take at the rate of this finished run.", None, panel=_RUN
    )
    processes: int | None = setting(
        "With --dry-run: plan for N processes, as torchrun would start them; the memory is that of each.",
        None,
        panel=_RUN,
        most=MOST,
    )
    probe: str | None = setting(
        "Instead of training, measure the run before its first step and write FILE (JSON): the gradient's energy in the span of B, and the "
        "largest eigenvalue of the loss's Hessian in the trained parameters. Takes a gradient, and two for each Hessian-vector product.",
        None,
        panel=_RUN,
    )
    probe_examples: int | None = setting(
        "With --probe: number of training examples to measure on, the last ones of the training set. Default: 32, or all where there are fewer.",
        None,
        panel=_RUN,
        most=MOST,
    )
    save_tokenizer: bool = setting(
        "Also store the tokenizer with the adapter, where others look for it; mode full always stores it.", False, panel=_RUN
    )
    report_to: Reporter = setting(
        "Also report to this tracker, through the transformers Trainer; log.jsonl is always written.", "none", panel=_RUN
    )
    device: str = setting("auto, cpu, cuda or cuda:<index>.", "auto", panel=_RUN)
    dtype: DtypeName = setting("auto: bf16 where the hardware supports it, otherwise fp32.", "auto", panel=_RUN)
    load_in_4bit: bool = setting(
        "Keep the base model in 4 bits (NF4) while the adapter is trained, as QLoRA does; needs the package bitsandbytes.",
        False,
        panel=_RUN,
    )
    shard: Literal["none", "fsdp"] = setting(
        "fsdp: divide the base model among the processes of torchrun, each layer gathered while it computes (FSDP2). Each takes less memory, and "
        "the result is the same up to rounding.",
        "none",
        panel=_RUN,
    )
    trust_remote_code: bool = setting("Run code from the model's repository. Only for authors you trust.", False, panel="Risky")
