"""What an evaluation will take, before it: its records and prompts, and the peak of its largest steps, on fake tensors without weights.

`PooledDecoder` itself runs, on the longest prompts and with a full cache. `planning` counts the bytes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cora_cli import records as shapes
from cora_cli import writing
from cora_cli.data.encode import check_rows, encode_prompt, shorten_prompt
from cora_cli.data.records import place_of
from cora_cli.data.templates import Rendered, Template, choose_template
from cora_cli.device import Hardware, planned_hardware
from cora_cli.errors import CoraError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.decode import PREFILL_TOKENS, PooledDecoder, Row, Tokens, shared_prefixes, unsupported
from cora_cli.evaluation.evaluate import records_to_answer
from cora_cli.evaluation.execution.problems import problem_columns, problem_of
from cora_cli.evaluation.targets import Target, TrainedPrompts, find_targets, trained_prompts
from cora_cli.models.configuration import load_configuration
from cora_cli.models.loading import context_length, skeleton_as_stored
from cora_cli.models.model_path import ModelPath
from cora_cli.models.tokenizer import load_tokenizer
from cora_cli.planning.memory import Part, StorageMeter, fake_model, fakes
from cora_cli.planning.page import duration, file_lines, memory_lines, size_text
from cora_cli.rundir import EvaluationDirectory

BYTES_PER_TOKEN = 4
"""Of text, roughly, for the size of the answers."""


@dataclasses.dataclass(frozen=True)
class Preflight:
    """The plan of one target. `prompts` are the tokens of each prompt, `text` the bytes that its predictions take apart from the answers' own text.

    `memory` has the bytes of each part at the peak, or says why they are not known; `rate` is that of `--rate-from`, in new tokens per
    second.
    """

    config: EvaluateConfig
    target: Target
    hardware: Hardware
    prompts: list[list[int]]
    cut: int
    text: int
    reads: dict[str, float | None]
    memory: dict[Part, int] | str
    rate: float | None


def preflight(config: EvaluateConfig) -> list[Preflight]:
    """Check the inputs of an evaluation and measure what each target will take. Writes nothing. Raises `CoraError` as it would."""
    hardware = planned_hardware(config.device, config.dtype)
    rate = _rate(Path(config.rate_from)) if config.rate_from is not None else None
    targets = find_targets(config)
    for target in targets:
        writing.refuse_file(target.output.root)
    trained = trained_prompts(targets)
    return [_plan(config, target, hardware, trained, rate) for target in targets]


def _rate(directory: Path) -> float:
    found = shapes.read_generation(EvaluationDirectory(directory))
    if not found.get("new_tokens") or not found.get("seconds"):
        raise CoraError(
            f"--rate-from needs the directory of a finished evaluation, with its generation.json, and {directory} has no rate"
        )
    rate: float = found["new_tokens"] / found["seconds"]
    return rate


def _plan(config: EvaluateConfig, target: Target, hardware: Hardware, trained: TrainedPrompts, rate: float | None) -> Preflight:
    records, schema, _ = records_to_answer(config, target, trained)
    columns = [problem_columns(record) for record in records]
    if config.execute_code:
        for own, record in zip(columns, records, strict=True):
            problem_of(own, place_of(record))
    tokenizer = load_tokenizer(target.base, config.trust_remote_code, target.adapter)
    template = Template(choose_template(target.template, schema, tokenizer), schema, tokenizer, target.date)
    rendered = [template.render(record) for record in records]
    model_config = load_configuration(target.base, config.trust_remote_code)
    skeleton: Any = skeleton_as_stored(target.base, model_config, config.trust_remote_code)
    rows = skeleton.get_input_embeddings().weight.shape[0]
    room = context_length(model_config) - config.max_new_tokens
    if room < 1:
        raise CoraError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in the context of {context_length(model_config)} tokens"
        )
    prompts = [encode_prompt(text, tokenizer) for text in rendered]
    for record, prompt in zip(records, prompts, strict=True):
        check_rows(prompt, rows, place_of(record), tokenizer)
    kept = [shorten_prompt(prompt, room, tokenizer) for prompt in prompts]
    lines = [
        _line_without_text(config, place, one, own) for place, (one, own) in enumerate(zip(rendered, columns, strict=True))
    ]
    text = len(writing.jsonl_text(lines).encode())
    reads = {one.reference: _weight_bytes(one) for one in (target.base, target.adapter) if one is not None}
    cut = sum(len(prompt) > room for prompt in prompts)
    memory = _memory(config, target, model_config, hardware, kept)
    return Preflight(config, target, hardware, kept, cut, text, reads, memory, rate)


def _line_without_text(config: EvaluateConfig, index: int, one: Rendered, problem: dict[str, Any] | None) -> dict[str, Any]:
    """The line of `predictions.jsonl` for a record, as `generate` writes it, with empty answers."""
    answer = {"prediction": "", "finish_reason": "length", "new_tokens": config.max_new_tokens}
    line = {"index": index, "prompt": one.prompt, "reference": one.answer, **answer}
    samples = {"samples": [answer] * config.samples} if config.samples > 1 else {}
    return line | samples | ({"problem": problem} if problem else {})


def _weight_bytes(model: ModelPath) -> float | None:
    return sum(file.stat().st_size for file in model.weight_files()) if model.has_weights else None


def _memory(
    config: EvaluateConfig, target: Target, model_config: Any, hardware: Hardware, prompts: Sequence[Tokens]
) -> dict[Part, int] | str:
    """The bytes of each part at the peak, or why they are not known; an adapter that is merged takes none."""
    if config.backend == "vllm":
        return "vLLM fills the GPU with its cache"
    if target.others or target.draws:
        return "several models whose probabilities are averaged are not measured"
    meter = StorageMeter(int(model_config.get_text_config(decoder=True).vocab_size))
    prompts = sorted((prompt for prompt in prompts for _ in range(config.samples)), key=len, reverse=True)
    apart = target.adapter if not config.merge else None
    with fakes(), meter:
        model = fake_model(model_config, config.trust_remote_code, hardware.dtype)
        meter.assign((*model.parameters(), *model.buffers()), "weights")
        if why := unsupported(model, len(prompts[0]) + config.max_new_tokens):
            return f"only the pooled decoder is measured, which does not support this model, because {why}"
        peak = _LargestSteps(model, prompts, config.batch_size, config.max_new_tokens).peak(meter)
    return {**peak, "adapter": int(_weight_bytes(apart) or 0) if apart is not None else 0}


class _LargestSteps(PooledDecoder):
    """The decoder, on fake tensors, at its largest steps: a prefill and a step of all rows with every cache full."""

    def __init__(self, model: Any, prompts: Sequence[Tokens], batch_size: int, max_new_tokens: int) -> None:
        super().__init__(model, prompts[:1], (), batch_size, max_new_tokens)
        self._longest = [list(prompt) for prompt in prompts[:batch_size]]
        self._pool.rows = len(self._longest)
        # Computed alone, a prefix saves time and hardly memory, since its keys and values are kept until the end.
        self._prefix_of = dict.fromkeys(map(tuple, prompts), ())
        shared = {tuple(prompt[:length]) for prompt, length in zip(prompts, shared_prefixes(prompts), strict=True)}
        self._shared = sum(map(len, shared))

    @torch.inference_mode()
    def peak(self, meter: StorageMeter) -> dict[Part, int]:
        """The bytes of each part."""
        rows = [Row(place, list(prompt), len(prompt)) for place, prompt in enumerate(self._longest)]
        few = [Row(row.index, list(row.tokens), row.prompt_length) for row in rows]
        few = few[: max(1, PREFILL_TOKENS // max(1, len(self._longest[0])))]
        self._admit(0, few)
        for row in rows:
            row.tokens += [0] * (self._max_new_tokens - 1)
        self._last_logits(rows)
        cache = [tensor for layer in self._pool._own for tensor in (layer.keys, layer.values)]
        meter.assign(cache, "cache")
        meter.restart()
        self._last_logits(rows)
        self._admit(0, few)
        of_position = sum(tensor[0, :, 0].numel() * tensor.element_size() for tensor in cache)
        return {**meter.peak, "cache": meter.peak["cache"] + self._shared * of_position}


def describe(plans: Sequence[Preflight]) -> str:
    """The plans as a page of text."""
    return "\n\n".join("\n".join(_lines(plan)) for plan in plans)


def _lines(plan: Preflight) -> list[str]:
    config, lengths = plan.config, [len(prompt) for prompt in plan.prompts]
    answers = len(lengths) * config.samples
    most = answers * config.max_new_tokens
    each = f", {config.samples} answers to each" if config.samples > 1 else ""
    cut = f", {plan.cut} of them cut to fit the context" if plan.cut else ""
    lines = [
        f"{plan.target.name}: {len(lengths):,} prompts{each} of {min(lengths):,} to {max(lengths):,} tokens{cut}, {sum(lengths):,} together; at most "
        f"{most:,} new tokens, {min(config.batch_size, answers):,} prompts at a time"
    ]
    if plan.rate is not None:
        lines.append(
            f"time: at most {duration(most / plan.rate)} at {plan.rate:,.0f} new tokens/s, the rate of {config.rate_from}"
        )
    lines += file_lines("reads", {**plan.reads, plan.target.dataset: None})
    out = plan.target.output
    # The first of several answers is there twice.
    written = most + (len(lengths) * config.max_new_tokens if config.samples > 1 else 0)
    lines += file_lines("writes at most about", {str(out.predictions): plan.text + written * BYTES_PER_TOKEN})
    if isinstance(plan.memory, str):
        return [*lines, f"peak memory: unknown, because {plan.memory}"]
    on_gpu = plan.hardware.device.type == "cuda"
    where = "on a CUDA GPU" if on_gpu else "on the processor"
    total = size_text(sum(plan.memory.values()))
    lines.append(f"peak memory while answering {where}, {plan.hardware.dtype_name}, computed: {total}")
    return [*lines, *memory_lines(plan.memory, on_gpu)]
