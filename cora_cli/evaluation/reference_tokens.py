"""What a model predicts where the reference answers stand, token by token: the numbers behind the calibration metrics."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel

from cora_cli import writing
from cora_cli.data.batches import BatchForm, predicting_logits
from cora_cli.data.encode import Example, check_rows, shorten_prompt, split_tokens
from cora_cli.data.records import Record, place_of
from cora_cli.data.templates import Rendered
from cora_cli.errors import CoraError
from cora_cli.evaluation.decode import unsupported
from cora_cli.models.configuration import rope_switch
from cora_cli.progress import note, progress
from cora_cli.reading import read_jsonl
from cora_cli.records import ReferenceTokens
from cora_cli.rundir import EvaluationDirectory

LOGITS = 1 << 25
"""Logits of one forward pass, which is one example at least."""


def reference_examples(
    records: Sequence[Record], rendered: Sequence[Rendered], tokenizer: Any, rows: int, context: int
) -> list[Example]:
    """Prompt and reference of every record as tokens, as for training. A prompt loses its beginning where both do not fit the `context`;
    says how many do.

    Raises `CoraError` for a reference that leaves no room for a prompt, and for a token without one of the embedding's `rows`.
    """
    examples, cut = [], 0
    for record, text in zip(records, rendered, strict=True):
        prompt, response = split_tokens(text, tokenizer)
        check_rows([*prompt, *response], rows, place_of(record), tokenizer)
        if (room := context - len(response)) < 1:
            raise CoraError(
                f"{place_of(record)}: the reference has {len(response)} tokens, which leaves no room for a prompt in the context of {context} "
                "tokens; remove the record, or leave calibration out of --metrics"
            )
        cut += len(prompt) > room
        prompt = shorten_prompt(prompt, room, tokenizer)
        examples.append(Example([*prompt, *response], len(prompt)))
    if cut:
        note(f"{cut} prompts were cut at the start, so that they fit the context together with their references")
    return examples


@torch.inference_mode()
def reference_tokens(model: Any, examples: Sequence[Example]) -> list[ReferenceTokens]:
    """The numbers of each example, whose response is the reference.

    Examples are padded together where every layer is full attention, which cannot see the padding behind an example.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    pads = unsupported(model, max(len(example.input_ids) for example in examples)) is None
    arguments = frozenset(inspect.signature(inner.forward).parameters)
    form = BatchForm("padded" if pads else "single", False, rope_switch(model.config), arguments)
    most = LOGITS // model.config.get_text_config(decoder=True).vocab_size
    found: dict[int, ReferenceTokens] = {}
    with progress("reference tokens", len(examples), "records") as shown:
        for group in _groups(examples, most):
            for members in form.passes([examples[index] for index in group]):
                indices = [group[member] for member in members]
                batch = form.collate([examples[index] for index in indices])
                there = {name: one.to(model.device) if torch.is_tensor(one) else one for name, one in batch.items()}
                counts = [len(examples[index].input_ids) - examples[index].prompt_length for index in indices]
                logits = predicting_logits(model, there).split(counts)
                targets = there["shift_labels"].split(counts)
                found |= {index: _numbers(*each) for index, *each in zip(indices, logits, targets, strict=True)}
            shown.advance(len(group))
    return [found[index] for index in range(len(examples))]


def add_reference_tokens(out: EvaluationDirectory, found: Sequence[ReferenceTokens]) -> None:
    """Write the numbers into the predictions, and their new hash next to them."""
    lines = read_jsonl(out.predictions)
    writing.write_jsonl(
        out.predictions, [{**line, "reference_tokens": tokens} for line, tokens in zip(lines, found, strict=True)]
    )


def _groups(examples: Sequence[Example], most: int) -> Iterator[list[int]]:
    """Indices of examples of similar lengths that have at most `most` rows of logits together, prompts included."""
    group: list[int] = []
    for index in sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids)):
        if group and (len(group) + 1) * len(examples[index].input_ids) > most:
            yield group
            group = []
        group.append(index)
    yield group


def _numbers(logits: torch.Tensor, targets: torch.Tensor) -> ReferenceTokens:
    """logits: (tokens, vocabulary); targets: (tokens,). Raises `CoraError` where they give a target no probability above 0."""
    log_p = logits.float().log_softmax(-1)
    if not bool(torch.isfinite(log_p.gather(1, targets[:, None])).all()):
        raise CoraError(
            "the model gives a token of a reference no probability: its logits are not finite there; use fp32, another copy of the model, or "
            "leave calibration out of --metrics"
        )
    p = log_p.exp()
    confidence, best = p.max(-1)
    target = targets[:, None]
    # Σ_k (p_k − y_k)² = Σ_k p_k² − 2·p_target + 1, summed so that nothing cancels.
    others = p.scatter(1, target, 0.0).square().sum(-1)
    brier = others + (1 - p.gather(1, target)[:, 0]).square()
    return {
        "nll": _digits(-log_p.gather(1, target)[:, 0]),
        "brier": _digits(brier),
        "confidence": _digits(confidence),
        "correct": (best == targets).tolist(),
    }


def _digits(values: torch.Tensor) -> list[float]:
    """The digits that float32 has."""
    return [float(f"{value:.8g}") for value in values.tolist()]
