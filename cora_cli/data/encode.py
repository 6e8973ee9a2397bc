"""Turn records into token ids with the prompt's length, and count the records that were truncated or dropped.

The loss mask depends only on that length, never on a token's id, because the end token is often the padding token too.
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
    """Examples in the order of their records, and how many were changed to fit `max_length`.

    `truncated` counts the prompts that lost their beginning, `dropped` the records whose response does not fit at all.
    """

    examples: list[Example]
    truncated: int
    dropped: int

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def response_tokens(self) -> int:
        """The number of tokens that carry a loss."""
        return sum(len(example.input_ids) - example.prompt_length for example in self.examples)


def encode_records(
    records: Sequence[Record], schema: Schema, template: TemplateName, tokenizer: Any, max_length: int, what: str
) -> EncodedSet:
    """Encode records for training.

    Examples longer than `max_length` lose prompt tokens from the left, except for the start token. An example is dropped if its
    response and end token leave no room for a prompt token. Raises `CoraError` if all of `records` were dropped; `what` names
    them in the message.
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
            f"all {len(records)} {what} records were dropped: no response fits into --max-length {max_length}; "
            f"use a larger --max-length"
        )
    return EncodedSet(examples, truncated, dropped)


def split_tokens(rendered: Rendered, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokenize a rendered record into prompt ids and response ids; the response ends with the end token.

    If the boundary between them falls on a token boundary, both are tokenized as one text, so the response has the tokens that
    the model would generate. Otherwise each is tokenized separately, as in generation.
    """
    prompt = encode_prompt(rendered, tokenizer)
    joined = encode_prompt(dataclasses.replace(rendered, prompt=rendered.prompt + rendered.response), tokenizer)
    on_boundary = joined[: len(prompt)] == prompt
    response = joined[len(prompt) :] if on_boundary else _tokens(rendered.response, tokenizer)
    end = [tokenizer.eos_token_id]
    return prompt, response if response[-1:] == end else response + end  # the data may already contain the end token


def encode_prompt(rendered: Rendered, tokenizer: Any) -> list[int]:
    """Tokenize the prompt, after the tokenizer's start tokens if it needs them and without any tokens added at the end."""
    start = _start_tokens(tokenizer) if rendered.special_tokens else []
    return start + _tokens(rendered.prompt, tokenizer)


def shorten_prompt(prompt: list[int], room: int, tokenizer: Any) -> list[int]:
    """The last `room` >= 1 tokens of a prompt; the first one stays the start token if the prompt has one and `room` is above 1.

    Models put much of their attention on the start token and answer badly without it (arXiv 2309.17453).
    """
    if len(prompt) <= room:
        return prompt
    start = prompt[:1] if prompt[0] == tokenizer.bos_token_id and room > 1 else []
    return start + prompt[len(prompt) - room + len(start) :]


def _tokens(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _start_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer adds before a text, found by locating the text in its output."""
    text = _tokens("a", tokenizer)
    full = list(tokenizer("a")["input_ids"])
    return next(full[:start] for start in range(len(full)) if full[start : start + len(text)] == text)
