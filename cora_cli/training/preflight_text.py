"""What `cora train --dry-run` prints."""

from typing import Any

from cora_cli.data.encode import Example
from cora_cli.methods.registry import method_of
from cora_cli.planning.page import duration, memory_lines, size_text
from cora_cli.training.preflight import Measured, Preflight
from cora_cli.training.proposal import AUTO, EXAMPLES, PRODUCTS

SHOWN = 60
"""Tokens of a long prompt that are shown at each of its ends."""


def describe(plan: Preflight) -> str:
    """The plan as a page of text. Marks are plain ASCII."""
    return "\n".join([*_work(plan), "", *_memory(plan), "", *_example(plan)])


def _work(plan: Preflight) -> list[str]:
    config, measured = plan.config, plan.measured
    lines = []
    if isinstance(measured, Measured):
        trained, total = measured.parameters["trained"], measured.parameters["total"]
        stored = "" if measured.adapter_bytes is None else f"; the adapter takes {size_text(measured.adapter_bytes)} on disk"
        lines.append(
            f"mode {config.mode}: training {trained:,} of {total:,} parameters ({100 * trained / total:.2g} %){stored}"
        )
        adapter = plan.prepared.plan
        if adapter is not None and method_of(adapter.mode).shares_out_ranks(adapter):
            lines.append(
                f"  with rank {adapter.rank} in every layer: the run shares out the ranks by its data, and trains and stores another number"
            )
    together = config.batch_size * config.gradient_accumulation * plan.processes
    spread = f" in {plan.processes} processes" if plan.processes > 1 else ""
    lines.append(
        f"{plan.steps:,} step{'' if plan.steps == 1 else 's'} of {together:,} examples{spread}: {plan.tokens:,} tokens, of which {plan.labels:,} carry loss"
    )
    if plan.rate is not None:
        seconds, rate = plan.tokens / plan.rate.tokens_per_second, plan.rate
        lines.append(
            f"time of the steps: {duration(seconds)} at {rate.tokens_per_second:,.0f} tokens/s, the rate of {rate.directory}"
        )
        lines += [f"  which is another kind of run: {difference}" for difference in rate.differences]
    return lines


def _memory(plan: Preflight) -> list[str]:
    if not isinstance(plan.measured, Measured):
        return [f"peak memory: unknown, because {plan.measured}"]
    memory, hardware = plan.measured.memory, plan.prepared.hardware
    where = "on a CUDA GPU" if hardware.device.type == "cuda" else "on the processor"
    each = " of each process" if plan.processes > 1 else ""
    row = "row" if plan.form.kind == "packed" else "padded batch"
    size = (
        f"{plan.largest:,} tokens, {plan.largest_labels:,} with loss" if memory.tokens is None else f"{memory.tokens:,} tokens"
    )
    return [
        f"peak memory{each} {where}, {hardware.dtype_name}, computed: {size_text(memory.total)}, in {memory.stage} (largest {row}: {size})",
        *memory_lines(memory.parts, on_gpu=hardware.device.type == "cuda"),
        *_proposal(plan),
    ]


def _proposal(plan: Preflight) -> list[str]:
    """What `--learning-rate auto` takes before the first step."""
    if plan.config.learning_rate != AUTO:
        return []
    peak = "unknown" if plan.proposing is None else f"about {size_text(plan.proposing)}"
    gradients = 2 * PRODUCTS + 1
    return [
        f"before the first step, --learning-rate auto takes up to {gradients} gradients of {EXAMPLES} examples in float32: peak {peak}"
    ]


def _example(plan: Preflight) -> list[str]:
    example, tokenizer = plan.prepared.train.examples[0], plan.prepared.tokenizer
    responses = len(example.input_ids) - example.prompt_length
    return [
        f"the first training example, {len(example.input_ids)} tokens, of which {responses} carry loss; | separates tokens, > marks loss:",
        *marked(example, tokenizer),
    ]


def marked(example: Example, tokenizer: Any) -> list[str]:
    """The tokens of an example, a new line after each line break in the text; lines of the response begin with `>`."""
    texts = _texts(example.input_ids, tokenizer)
    prompt, response = texts[: example.prompt_length], texts[example.prompt_length :]
    if len(prompt) > 2 * SHOWN:
        prompt = [*prompt[:SHOWN], f" ... {len(prompt) - 2 * SHOWN} tokens ... ", *prompt[-SHOWN:]]
    return [*(f"  {line}" for line in _lines(prompt)), *(f"> {line}" for line in _lines(response))]


def _texts(ids: list[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text; a token that ends within a character adds nothing, and the next one the character."""
    texts, shown = [], ""
    start = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        complete = not text.endswith("\ufffd")
        texts.append(text[len(shown) :] if complete else "")
        shown = text if complete else shown
        if complete and end - start > 32:  # decoding from the start for every token would take the square of the time
            start, shown = end - 1, tokenizer.decode(ids[end - 1 : end])
    return texts


def _lines(texts: list[str]) -> list[str]:
    lines = [""]
    for number, text in enumerate(texts):
        lines[-1] += ("|" if number else "") + text.replace("\n", "\\n")
        if text.endswith("\n"):
            lines.append("")
    return [line for line in lines if line]
