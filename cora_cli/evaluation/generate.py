"""Greedy decoding of prompts, or sampling at a temperature, streamed to disk in waves so that an interrupted evaluation continues where it stopped.

A wave is a fixed slice of the prompts sorted by length, and its computation depends on no other prompt. A continued evaluation
repeats an unfinished wave completely, and so gives the same tokens as an uninterrupted one.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.evaluation.agreement import Agreement
from cora_cli.evaluation.decode import PooledDecoder, Tokens, unsupported
from cora_cli.evaluation.processes import ALONE, Processes
from cora_cli.evaluation.sampling import Draws, Finite, Sampling
from cora_cli.evaluation.thoughts import text_of
from cora_cli.methods.parts.layers import has_invocation, transformers_model
from cora_cli.models.configuration import depends_on_batch, rope_switch
from cora_cli.models.model_path import ModelPath
from cora_cli.models.own_code.classes import has_own_code
from cora_cli.progress import note, progress, say
from cora_cli.reading import read_jsonl
from cora_cli.records import PartialPrediction
from cora_cli.rundir import EvaluationDirectory

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams", "num_beam_groups"), (1,)
    ),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "stop_strings"), ([], "")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids"), ()),
    **dict.fromkeys(("sequence_bias", "watermarking_config"), ([], {})),
    **dict.fromkeys(("exponential_decay_length_penalty", "penalty_alpha", "dola_layers", "max_time"), ()),
    "token_healing": (False,),
}
"""The entries of a generation configuration, besides those of sampling and of the end tokens, that change an answer, with the values that do not."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to answer: its tokens, its text, and the reference answer.

    `lead` is what the chat template puts before every answer (`templates.Rendered`); it is no part of a prediction. `stream` names the draws
    of a sample (`sampling.Sampling`). `problem` has the tests of the record, to be kept with its answer. `continues` says that the answer goes on
    with the text of the prompt, so that a space at its beginning counts. `keeps` are special tokens that stay in a prediction: those of thoughts, and what references have.
    """

    input_ids: list[int]
    prompt: str
    reference: str
    lead: str = ""
    stream: str = ""
    problem: dict[str, Any] | None = None
    continues: bool = False
    keeps: frozenset[int] = frozenset()


class Engine(Protocol):
    """Turns prompts into tokens. It answers `wave` prompts per call; their answers are saved together."""

    name: str
    wave: int

    def answer(self, wave: Sequence[Tokens], finished: Callable[[], None], streams: Sequence[str] = ()) -> list[list[int]]:
        """The new tokens of every prompt, including the end token if there is one; calls `finished` once per prompt.

        `streams` names the draws of each prompt, for an engine that samples.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Work:
    """What a process needs to know to answer its part of the `waves`, which are indices of `prompts`: `model` says how to open the model."""

    model: Any
    prompts: list[list[int]]
    streams: list[str]
    waves: list[list[int]]

    def answer(self, engine: Engine, wave: Sequence[int], finished: Callable[[], None]) -> list[list[int]]:
        """The new tokens of the prompts of a wave."""
        streams = [self.streams[index] for index in wave]
        return engine.answer([self.prompts[index] for index in wave], finished, *([streams] if any(streams) else []))


def generate(
    engine: Engine,
    tokenizer: Any,
    ends: Sequence[int],
    requests: Sequence[Request],
    out: EvaluationDirectory,
    samples: int = 1,
    processes: Processes = ALONE,
    model: Any = None,
) -> dict[str, Any]:
    """Answer every request, longest first, and write `predictions.jsonl` in the order of `requests`.

    Each record has `samples` requests in a row, whose answers are in one line; its `prediction` is the first of them.
    Complete waves in `predictions.partial.jsonl` from an earlier call are reused. Other `processes` get `model` in their `Work`. Returns
    the engine's name, and the number of new tokens and the seconds of this call. Raises `CoraError` if a file cannot be written.
    """
    order = sorted(range(len(requests)), key=lambda index: (-len(requests[index].input_ids), index))
    waves = [order[start : start + engine.wave] for start in range(0, len(order), engine.wave)]
    lines = _earlier_lines(out.partial_predictions)
    # An incomplete wave is dropped: the answers of a wave depend on each other, so the missing ones need all of it.
    complete = [index for wave in waves if all(index in lines for index in wave) for index in wave]
    lines = {index: lines[index] for index in complete}
    tokens, began = 0, time.monotonic()
    left = [wave for wave in waves if wave[0] not in lines]
    work = Work(model, [request.input_ids for request in requests], [request.stream for request in requests], left)
    if left:
        processes.tell(work)
    with progress("generating", len(requests), "prompts", done=len(lines)) as shown:
        for answered in processes.deal(left, lambda wave: work.answer(engine, wave, shown.advance)):
            shown.advance(sum(len(wave) for wave, _ in answered[1:]))
            new = [
                _line(index, requests[index], tokenizer, ends, ids)
                for wave, answers in answered
                for index, ids in zip(wave, answers, strict=True)
            ]
            tokens += sum(line["new_tokens"] for line in new)
            try:
                with writing.open_to_append(out.partial_predictions) as file:
                    file.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in new).encode())
            except OSError as error:
                raise writing.disk_error(error, out.partial_predictions, writing.LINES_KEPT) from error
            lines |= {line["index"]: line for line in new}
    records = range(0, len(requests), samples)
    of_record = ([lines[index] for index in range(first, first + samples)] for first in records)
    writing.write_jsonl(
        out.predictions, [_record_line(place, own, requests[own[0]["index"]]) for place, own in enumerate(of_record)]
    )
    out.partial_predictions.unlink(missing_ok=True)
    return {"engine": engine.name, "new_tokens": tokens, "seconds": time.monotonic() - began}


def transformers_engine(
    model: Any,
    tokenizer: Any,
    ends: Sequence[int],
    prompts: Sequence[Tokens],
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    why: str | None = None,
    kinds: Sequence[Any] | None = None,
) -> Engine:
    """`PooledDecoder` if it supports the model, else `BatchedGenerate`, with a line on stderr that says `why`.

    Both are checked with a few of the prompts. Where padding changes what a prompt gives alone, only prompts of one length are answered
    together, and none where these change it too. `kinds` are checked in place of a `model` that averages models: one model of each kind.
    """

    def batches(one: Any) -> BatchedGenerate:
        return BatchedGenerate(one, ends, tokenizer.pad_token_id, batch_size, max_new_tokens, sampling)

    batched = batches(model)
    checked = [batches(one) for one in kinds] if kinds is not None else [batched]
    agreements = [Agreement(one.model, prompts, one.logits) for one in checked]
    for one, agreement in zip(checked, agreements, strict=True):
        agreement.require_finite()
        if not one.caches:
            _settle_cache(one, agreement)
    batched.caches = all(one.caches for one in checked)
    agreement = agreements[0]
    probes = agreement.probes
    if has_invocation(model):  # the probes may hold none, so that both ways would agree on them
        why = why or "its adapter changes only the tokens from its invocation on (aLoRA)"
    why = why or unsupported(model, max(map(len, prompts)) + max_new_tokens)
    if why is None:
        fault = agreement.fault(lambda: PooledDecoder(model, probes, ends, len(probes), 1).logits(probes, agreement.following))
        if fault is None:
            return PooledDecoder(model, prompts, ends, batch_size, max_new_tokens, sampling)
        why = f"there {fault}"
    how = "batch at a time"
    if batch_size > 1 and not (
        batched.pads
        and all(one.pads and not at.fault(partial(one.logits, at.probes)) for at, one in zip(agreements, checked, strict=True))
    ):
        batched.pads, how = False, f"{how} of prompts of one length, since padding changes its logits"
        if not all(_keeps_apart(one, probes[:2]) for one in checked):
            batched.alone, how = True, "prompt at a time, since others in its batch change its logits"
    say(f"using transformers' generate, one {how}: the faster pooled decoder does not support this model, because {why}")
    return batched


def _settle_cache(one: "BatchedGenerate", agreement: Agreement) -> None:
    """Let `one` keep the keys and values of earlier tokens where its model with code of its own gives the same logits with them.

    One that takes any argument may pass them over, and would answer the last token alone; others expect those of an earlier transformers.
    """
    one.caches = True
    one.caches = agreement.fault(lambda: [one.logits([probe])[0] for probe in agreement.probes]) is None


def _keeps_apart(one: "BatchedGenerate", probes: Sequence[Tokens]) -> bool:
    """Whether prompts of one length, the ends of these, give together what each gives alone."""
    length = min(map(len, probes))
    agreement = Agreement(one.model, [probe[-length:] for probe in probes], one.logits)
    return agreement.fault(partial(one.logits, agreement.probes)) is None


def say_left_out(model: ModelPath) -> None:
    """Say which settings of a model's generation configuration its answers do not follow, so that all models answer by the same rule.

    Sampling is none of them, since `--temperature` decides about it.
    """
    # Where there is no file of its own, transformers takes them from the model's configuration and that of its text part.
    stated = model.generation_config() or model.language_config()
    found = {
        name: stated[name] for name, neutral in _NEUTRAL.items() if stated.get(name) is not None and stated[name] not in neutral
    }
    if found:
        values = ", ".join(f"{name} {str(value)[:40]}" for name, value in found.items())
        note(
            f"{model.reference} sets {values} for its answers, which are left out here: every model decodes by its probabilities alone"
        )


def end_tokens(own: int | list[int] | None, ends: Collection[int]) -> list[int]:
    """Ids that end an answer: the template's `ends`, and the model's `own` from its generation configuration.

    Those that no token can have, such as -1, end nothing; tokenizers fail on them.
    """
    listed = own if isinstance(own, list) else [own] if own is not None else []
    if wrong := next((one for one in listed if isinstance(one, bool) or not isinstance(one, int)), None):
        raise CoraError(f"the model's generation_config.json has an eos_token_id that is no token id: {wrong!r}")
    return sorted({*ends, *(one for one in listed if 0 <= one < 2**31)})


def _earlier_lines(path: Path) -> dict[int, dict[str, Any]]:
    """Read the complete lines of an interrupted evaluation, and remove a partial last line from the file."""
    if not path.exists():
        return {}
    lines = read_jsonl(path, PartialPrediction, drop_partial_tail=True)
    writing.write_jsonl(path, lines)
    return {line["index"]: line for line in lines}


def _line(index: int, request: Request, tokenizer: Any, ends: Sequence[int], ids: list[int]) -> dict[str, Any]:
    stopped = bool(ids) and ids[-1] in ends
    return {
        "index": index,
        "prompt": request.prompt,
        "reference": request.reference,
        "prediction": _answer(tokenizer, ids[:-1] if stopped else ids, request),
        "finish_reason": "stop" if stopped else "length",
        "new_tokens": len(ids),
    }


def _record_line(index: int, lines: Sequence[dict[str, Any]], request: Request) -> dict[str, Any]:
    """The line of a record: that of its answer, or of the first of several, which are then in `samples`."""
    line = {**lines[0], "index": index}
    if len(lines) > 1:
        line["samples"] = [{key: one[key] for key in ("prediction", "finish_reason", "new_tokens")} for one in lines]
    return line | ({"problem": request.problem} if request.problem else {})


def _answer(tokenizer: Any, ids: Sequence[int], request: Request) -> str:
    """The text of an answer without special tokens, but for those that the request keeps, and without its `lead`, which may hold some."""

    def text(ids: Sequence[int]) -> str:
        return text_of(tokenizer, ids, request.keeps)

    if request.continues:
        # Tokenizers such as Llama 2's leave out the first space of what they decode, and so would change an indentation.
        last = request.input_ids[-1:]
        if (joined := text([*last, *ids])).startswith(before := text(last)):
            return joined.removeprefix(before)
    start = tokenizer(request.lead, add_special_tokens=False)["input_ids"] if request.lead else []
    if list(ids[: len(start)]) == start:
        return text(ids[len(start) :])
    # The end of the lead and the beginning of the answer may share a token.
    return text(ids).removeprefix(text(start))


def gives_back(tokenizer: Any, request: Request, response: Sequence[int]) -> bool:
    """Whether an answer of the reference's own tokens, which is `response` without its end, is the reference but for white space."""
    return _answer(tokenizer, response, request).split() == request.reference.split()


def until_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """`ids` up to and including the first end token; all of them if there is none."""
    return list(ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))])


class BatchedGenerate:
    """Decoding by transformers' `generate`, one batch at a time. It supports every causal model.

    Prompts that go together are padded on the left, or have one length where `pads` is off; none do where `alone` is on. They never are on both sides of a length at
    which the rotary embedding of all of them changes; those that cross it while they are answered have one length.
    """

    name = "generate"

    def __init__(
        self,
        model: Any,
        ends: Sequence[int],
        pad: int | None,
        batch_size: int,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> None:
        self._sampling = sampling
        self.model, self._ends, self.wave, self._new = model, ends, batch_size, max_new_tokens
        self.pads, self.alone = not depends_on_batch(model.config), False
        self.caches = not has_own_code(transformers_model(model))
        self._switch = rope_switch(model.config)
        # Only ever behind the mask, so any id will do that has an embedding row; that of a tokenizer may have none, or be missing.
        self._pad = pad if pad is not None and pad < model.get_input_embeddings().weight.shape[0] else 0

    @torch.inference_mode()
    def answer(self, wave: Sequence[Tokens], finished: Callable[[], None], streams: Sequence[str] = ()) -> list[list[int]]:
        """See `Engine`."""
        answers: list[list[int]] = [[] for _ in wave]
        for indices in self._batches(wave):
            batch = [wave[index] for index in indices]
            draws: list[LogitsProcessor] = [Finite()]
            if self._sampling is not None:
                draws = [Draws(self._sampling, [streams[index] for index in indices], max(map(len, batch)))]
            output = self._generate(batch, draws, eos_token_id=list(self._ends), max_new_tokens=self._new)
            for index, row in zip(indices, output[:, max(map(len, batch)) :].tolist(), strict=True):
                answers[index] = until_end(row, self._ends)
                finished()
        return answers

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Tokens]) -> list[torch.Tensor]:
        """What `answer` chooses from in its first two steps: (2, vocabulary) for each prompt."""
        found: dict[int, torch.Tensor] = {}
        for indices in self._batches(prompts):
            batch = [prompts[index] for index in indices]
            output = self._generate(batch, [], max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
            found |= {index: torch.stack([step[row] for step in output.logits]) for row, index in enumerate(indices)}
        return [found[index] for index in range(len(prompts))]

    def _batches(self, wave: Sequence[Tokens]) -> list[list[int]]:
        """The indices of prompts that go together."""
        if self.alone:
            return [[index] for index in range(len(wave))]
        batches: dict[int, list[int]] = {}
        for index, prompt in enumerate(wave):
            apart = not self.pads
            if self._switch is not None and not apart:
                apart = len(prompt) <= self._switch < len(prompt) + self._new
            side = -1 if self._switch is not None and len(prompt) > self._switch else 0
            batches.setdefault(len(prompt) if apart else side, []).append(index)
        return list(batches.values())

    def _generate(self, batch: Sequence[Tokens], draws: Sequence[LogitsProcessor], **settings: Any) -> Any:
        model, longest = self.model, max(map(len, batch))
        ids = torch.tensor([[self._pad] * (longest - len(prompt)) + list(prompt) for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        # PEFT hands its own configuration on to another module where an adapter changes the input.
        places = [model, transformers_model(model)]
        own = [place.generation_config for place in places]
        # Replace the model's configuration: it may sample or penalize repetition, and `generate` fills unset options from it.
        for place in places:
            place.generation_config = GenerationConfig(
                do_sample=False, pad_token_id=self._pad, use_cache=self.caches, **settings
            )
        try:
            return model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                logits_processor=LogitsProcessorList(draws),
            )
        finally:
            for place, config in zip(places, own, strict=True):
                place.generation_config = config
