"""Batched greedy generation, streamed to disk so that a killed evaluation continues where it was.

Prompts are sorted by length and padded on the left; the batches depend on the prompts alone, so a continued evaluation gives the
tokens of an uninterrupted one. Which model answers which records is `evaluate`.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from cora_cli import rundir
from cora_cli.progress import progress
from cora_cli.rundir import EvaluationDirectory


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to answer: its tokens, its text, and the reference answer."""

    input_ids: list[int]
    prompt: str
    reference: str


def generate(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    batch_size: int,
    max_new_tokens: int,
    out: EvaluationDirectory,
) -> dict[str, Any]:
    """Answer every request and write `predictions.jsonl` in the order of `requests`.

    Lines that an earlier call left in `predictions.partial.jsonl` are kept. Returns the new tokens and seconds of this call.
    """
    ends = end_tokens(model, tokenizer)
    order = sorted(range(len(requests)), key=lambda index: (-len(requests[index].input_ids), index))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    lines = _earlier_lines(out.partial_predictions)
    tokens, began = 0, time.monotonic()
    with progress("generating", len(requests), "prompts", done=len(lines)) as shown:
        for batch in batches:
            if all(index in lines for index in batch):
                continue
            answers = _answer(model, tokenizer, [requests[index] for index in batch], max_new_tokens, ends)
            new = {index: _line(index, requests[index], *answer) for index, answer in zip(batch, answers, strict=True)}
            tokens += sum(line["new_tokens"] for line in new.values())
            try:
                with out.partial_predictions.open("a", encoding="utf-8") as file:
                    file.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in new.values()))
            except OSError as error:
                raise rundir.disk_error(error, out.partial_predictions) from error
            shown.advance(len([index for index in batch if index not in lines]))
            lines |= new
    rundir.write_jsonl(out.predictions, [lines[index] for index in range(len(requests))])
    out.partial_predictions.unlink(missing_ok=True)
    return {"new_tokens": tokens, "seconds": time.monotonic() - began}


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's, and those of the model's own configuration, such as an end-of-turn token."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own] if own is not None else [])})


def _earlier_lines(path: Path) -> dict[int, dict[str, Any]]:
    """Read the whole lines of a killed evaluation, and cut off the part of a line that it left."""
    if not path.exists():
        return {}
    lines = rundir.read_jsonl(path, drop_partial_tail=True)
    rundir.write_jsonl(path, lines)
    return {line["index"]: line for line in lines}


def _line(index: int, request: Request, prediction: str, finish_reason: str, new_tokens: int) -> dict[str, Any]:
    return {
        "index": index,
        "prompt": request.prompt,
        "reference": request.reference,
        "prediction": prediction,
        "finish_reason": finish_reason,
        "new_tokens": new_tokens,
    }


@torch.inference_mode()
def _answer(
    model: Any, tokenizer: Any, requests: Sequence[Request], max_new_tokens: int, ends: list[int]
) -> list[tuple[str, str, int]]:
    """Answer one batch; returns text, finish reason (`stop` or `length`) and number of tokens (end token included) of each."""
    longest = max(len(request.input_ids) for request in requests)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(request.input_ids)) + request.input_ids for request in requests])
    mask = torch.tensor([[0] * (longest - len(request.input_ids)) + [1] * len(request.input_ids) for request in requests])
    own = model.generation_config
    # A fresh configuration in the model's place too: its own may sample or penalise repetition, and would fill the gaps.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, use_cache=True
    )
    output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    model.generation_config = own
    answers = []
    for row in output[:, longest:].tolist():
        length = next((position for position, token in enumerate(row) if token in ends), None)
        stopped, body = length is not None, row[:length]
        text = tokenizer.decode(body, skip_special_tokens=True)
        answers.append((text, "stop" if stopped else "length", len(body) + stopped))
    return answers
