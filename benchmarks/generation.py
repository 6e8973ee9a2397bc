"""Greedy generation compared with what people use today: transformers' `generate` on held-out prompts in file order, padded on the left.

The peer answers in batches of 16 with its PEFT adapter unmerged. Ours does what `cora evaluate` does by default, and its time includes the
merge. The model is the embedded one with LoRA r = 48 on q, k, v and a small random B; the prompts use Alpaca's template. Both sides count new
tokens up to and including the end token.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

RANK, PEER_BATCH, PROMPTS, NEW_TOKENS = 48, 16, 96, 64
B_STD = 0.002
"""Small, so that answers stay sensible and some of them end early."""
STAGE = harness.Stage(
    name="generation",
    script=__file__,
    sides={harness.OURS: "cora evaluate", "stock": "generate, left padding, batch 16, adapter unmerged"},
    unit="new tokens/s",
    targets={"stock": 2.0},
)


def load_work(dtype: str, dataset: str | None) -> tuple[Any, Any, list[list[int]], list[int]]:
    """The model with its adapter, the tokenizer, the prompts in file order, and the ids that end an answer."""
    import torch
    from peft import LoraConfig, get_peft_model

    from cora_cli.data.encode import encode_prompt
    from cora_cli.data.split import load_split, load_test_records
    from cora_cli.data.templates import Template
    from cora_cli.device import select_hardware
    from cora_cli.evaluation.generate import end_tokens
    from cora_cli.models.loading import load_model
    from cora_cli.models.references import EMBEDDED_MODEL, resolve_model
    from cora_cli.models.tokenizer import load_tokenizer

    path = resolve_model(EMBEDDED_MODEL)
    hardware = select_hardware("auto", "fp32" if dtype == "fp32" else "auto")
    tokenizer = load_tokenizer(path)
    records = load_split(dataset, PROMPTS, 0).test if dataset else load_test_records("builtin:code")[0][:PROMPTS]
    template = Template("alpaca", "alpaca", tokenizer)
    prompts = [encode_prompt(template.render(record), tokenizer) for record in records]
    model = load_model(path, hardware.dtype, hardware.device, "sdpa")
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=B_STD)
    return wrapped, tokenizer, prompts, end_tokens(model.generation_config.eos_token_id, template.ends)


def answer_as_cora(model: Any, tokenizer: Any, prompts: Sequence[list[int]], ends: list[int]) -> tuple[list[list[int]], float]:
    """The answers of `cora evaluate` with its default settings, and the seconds that merging took."""
    from cora_cli.evaluation.config import EvaluateConfig
    from cora_cli.evaluation.generate import Request, generate, transformers_engine
    from cora_cli.rundir import EvaluationDirectory

    answers: dict[tuple[int, ...], list[int]] = {}
    began = time.perf_counter()
    merged = model.merge_and_unload()
    merging = time.perf_counter() - began
    engine: Any = transformers_engine(merged, tokenizer, ends, prompts, EvaluateConfig.batch_size, NEW_TOKENS)
    answer = engine.answer

    def kept(wave: Sequence[list[int]], finished: Any) -> list[list[int]]:
        found = answer(wave, finished)
        answers.update((tuple(prompt), ids) for prompt, ids in zip(wave, found, strict=True))
        return found

    engine.answer = kept
    with tempfile.TemporaryDirectory() as directory:
        requests = [Request(prompt, "", "") for prompt in prompts]
        generate(engine, tokenizer, ends, requests, EvaluationDirectory(Path(directory)))
    return [answers[tuple(prompt)] for prompt in prompts], merging


def answer_as_stock(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], ends: list[int], batch_size: int
) -> list[list[int]]:
    """Answers of transformers' own `generate`."""
    import torch

    from cora_cli.evaluation.generate import until_end

    tokenizer.padding_side = "left"
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer.pad({"input_ids": list(prompts[start : start + batch_size])}, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **batch, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
            )
        answers += [until_end(row, ends) for row in output[:, batch["input_ids"].shape[1] :].tolist()]
    return answers


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Answer all prompts, after a short prompt as warm-up."""
    model, tokenizer, prompts, ends = load_work(options.dtype, options.dataset)
    answer_as_stock(model, tokenizer, [prompts[0][:8]], [*range(len(tokenizer))], 1)
    merging = 0.0
    began = time.perf_counter()
    if side == harness.OURS:
        answers, merging = answer_as_cora(model, tokenizer, prompts, ends)
    else:
        answers = answer_as_stock(model, tokenizer, prompts, ends, PEER_BATCH)
    seconds = time.perf_counter() - began
    tokens = sum(map(len, answers))
    return {
        "rate": tokens / seconds,
        "peak_bytes": harness.peak_bytes(),
        "tokens": tokens,
        "seconds": seconds,
        "merging_seconds": merging,
        "stopped": sum(answer[-1] in ends for answer in answers),
    }


def agreement(options: argparse.Namespace) -> Iterator[harness.Agreement]:
    """Our tokens in fp32, compared with one prompt at a time with the adapter unmerged."""
    model, tokenizer, prompts, ends = load_work("fp32", options.dataset)
    alone = answer_as_stock(model, tokenizer, prompts, ends, 1)
    ours, _ = answer_as_cora(model, tokenizer, prompts, ends)
    differing = sum(
        abs(len(one) - len(other)) + sum(a != b for a, b in zip(one, other, strict=False))
        for one, other in zip(ours, alone, strict=True)
    )
    yield harness.Agreement(
        f"tokens that differ from greedy decoding of {len(prompts)} prompts one at a time in fp32, of {sum(map(len, alone))}",
        differing,
        0,
    )


def notes(rounds: Mapping[str, list[dict[str, Any]]], options: argparse.Namespace) -> list[str]:
    """What was generated, and how much."""
    from cora_cli.device import select_hardware
    from cora_cli.evaluation.config import EvaluateConfig

    ours, stock = (
        {name: sum(result[name] for result in rounds[side]) for name in ("tokens", "seconds", "merging_seconds", "stopped")}
        for side in (harness.OURS, "stock")
    )
    precision = select_hardware("auto", "fp32" if options.dtype == "fp32" else "auto").dtype_name
    return [
        f"{PROMPTS} held-out prompts of {options.dataset or 'builtin:code'}, up to {NEW_TOKENS} new tokens each, {precision}; "
        f"our batch size is {EvaluateConfig.batch_size} (the default).",
        f"All rounds, ours: {ours['tokens']} tokens in {ours['seconds']:.1f} s, of which {ours['merging_seconds']:.1f} s to merge; "
        f"stock: {stock['tokens']} in {stock['seconds']:.1f} s. Answers that ended by themselves: "
        f"{ours['stopped']} and {stock['stopped']}.",
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="bf16: only where the hardware supports it, else fp32"
    )
    parser.add_argument("--dataset", help="Alpaca records to answer instead of builtin:code")
    harness.run(STAGE, measure, lambda options: list(agreement(options)), parser, notes)


if __name__ == "__main__":
    main()
