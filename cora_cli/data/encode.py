"""Turns records into token ids with the prompt's length, and counts what had to be cut or dropped.

The loss mask is that length and nothing else: never a token's id, since the end token is often the padding token too.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from cora_cli.data.formats import Record, Schema
from cora_cli.data.templates import Rendered, TemplateName, render
from cora_cli.errors import CoraError


@dataclasses.dataclass(frozen=True)
class Example:
    """One example as tokens: `input_ids` is the prompt (`prompt_length` tokens), then the response and its end token."""

    input_ids: list[int]
    prompt_length: int


@dataclasses.dataclass(frozen=True)
class EncodedSet:
    """Examples in the order of their records, with what was done to fit `max_length`.

    `truncated` prompts lost their beginning; `dropped` records have a response that does not fit at all.
    """

    examples: list[Example]
    truncated: int
    dropped: int

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def response_tokens(self) -> int:
        """Tokens that carry a loss."""
        return sum(len(example.input_ids) - example.prompt_length for example in self.examples)


def encode_records(
    records: Sequence[Record], schema: Schema, template: TemplateName, tokenizer: Any, max_length: int, what: str
) -> EncodedSet:
    """Encode records for training.

    Examples longer than `max_length` lose prompt tokens from the left, the start token excepted; one whose response and end token leave no room for a
    single prompt token is dropped. Raises `CoraError` where `records` is not empty and nothing is left; `what` names them.
    """
    examples: list[Example] = []
    truncated = dropped = 0
    for record in records:
        rendered = render(record, schema, template, tokenizer)
        prompt, response = split_tokens(rendered, tokenizer)
        room = max_length - len(response)
        if room < 1 or not prompt:
            dropped += 1
            continue
        if len(prompt) > room:
            truncated += 1
            prompt = shorten_prompt(prompt, room, tokenizer)
        examples.append(Example([*prompt, *response], len(prompt)))
    if records and not examples:
        raise CoraError(
            f"every one of the {len(records)} {what} records was truncated away: no response fits into --max-length "
            f"{max_length}; give a larger one"
        )
    return EncodedSet(examples, truncated, dropped)


def split_tokens(rendered: Rendered, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokenize a rendered record into prompt ids and response ids; the response ends with the end token.

    Both are tokenized as one text where the seam falls on a token boundary, so that the response is written as the model would
    write it; where it does not, each is tokenized on its own, which is what generation sees.
    """
    prompt = encode_prompt(rendered, tokenizer)
    whole = encode_prompt(dataclasses.replace(rendered, prompt=rendered.prompt + rendered.response), tokenizer)
    seam_holds = whole[: len(prompt)] == prompt
    response = whole[len(prompt) :] if seam_holds else _tokens(rendered.response, tokenizer)
    end = [tokenizer.eos_token_id]
    return prompt, response if response[-1:] == end else response + end  # data may write the end token out


def encode_prompt(rendered: Rendered, tokenizer: Any) -> list[int]:
    """Tokenize the prompt alone, behind the tokenizer's start tokens where it needs them; what it would add at the end is not."""
    start = _start_tokens(tokenizer) if rendered.special_tokens else []
    return start + _tokens(rendered.prompt, tokenizer)


def shorten_prompt(prompt: list[int], room: int, tokenizer: Any) -> list[int]:
    """The last `room` >= 1 tokens of a prompt, of which the first stays the start token where the prompt has one and there is room for it.

    Models put much of their attention on the start token and answer badly without it (arXiv 2309.17453).
    """
    if len(prompt) <= room:
        return prompt
    start = prompt[:1] if prompt[0] == tokenizer.bos_token_id and room > 1 else []
    return start + prompt[len(prompt) - room + len(start) :]


def _tokens(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, told from what it puts behind by where the text is."""
    text = _tokens("a", tokenizer)
    whole = list(tokenizer("a")["input_ids"])
    return next(whole[:start] for start in range(len(whole)) if whole[start : start + len(text)] == text)
