"""Turn records into token ids with the prompt's length, and count the records that were truncated or dropped.

The loss mask depends only on that length, never on a token's id, because the end token is often the padding token too.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cora_cli.data.records import Record, place_of
from cora_cli.data.templates import Rendered, Template, left_out_notice
from cora_cli.errors import CoraError, reason
from cora_cli.progress import progress

_MANY = 5000
"""Records that take about ten seconds on a slow machine."""
_KNOWN_TO_NONE = "\U00010380"
"""A letter of Ugaritic: a tokenizer that makes no token of it leaves out what it does not know. Normalizers keep it, unlike a character without meaning."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One example as tokens: `input_ids` is the prompt (`prompt_length` tokens), then the response and its end token."""

    input_ids: list[int]
    prompt_length: int


@dataclasses.dataclass(frozen=True)
class EncodedSet:
    """Examples in the order of their records, and how many of them need a word to the user.

    `truncated` counts the prompts that lost their beginning to fit `max_length`, `dropped` the records whose response does not fit
    at all and the `promptless` ones, `cut` the texts without prompt that lost their end, `empty` those whose answer is empty or white space, `control_tokens` the records whose text spells a control token, and `apart` those that the chat template renders
    otherwise than prompt and answer (`Rendered.own_turn`). `left_out` has by role the records with text that it does not write, and `unknown` counts
    those with text that the tokenizer does not know.
    """

    examples: list[Example]
    truncated: int
    dropped: int
    control_tokens: int = 0
    apart: int = 0
    promptless: int = 0
    empty: int = 0
    cut: int = 0
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unknown: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def response_tokens(self) -> int:
        """The number of tokens that carry a loss."""
        return sum(len(example.input_ids) - example.prompt_length for example in self.examples)


def encode_records(
    records: Sequence[Record],
    template: Template,
    max_length: int,
    what: str,
    rows: int | None = None,
    every_answer: bool = False,
    context: int | None = None,
) -> EncodedSet:
    """Encode records for training: one example per record, or with `every_answer` one per answer of a conversation.

    Examples longer than `max_length`, and than the `context` of the model, lose prompt tokens from the left, except for the start token. An example is dropped if its
    response and end token leave no room for a prompt token. `rows` is the number of rows of the model's embedding. Raises
    `CoraError` if all of `records` were dropped (`what` names them in the message), and for a token without a row.
    """
    longest = max_length if context is None else min(max_length, context)
    examples: list[Example] = []
    truncated = dropped = apart = promptless = empty = cut = unknown = 0
    left_out: Counter[str] = Counter()
    records = [turn for record in records for turn in template.turns(record)] if every_answer else records
    for record in _shown(records, what):
        rendered = template.render(record)
        prompt, response = split_tokens(rendered, template.tokenizer)
        apart += not rendered.own_turn
        left_out.update(rendered.left_out)
        unknown += has_unknown([*prompt, *response], rendered.prompt + rendered.response, template.tokenizer)
        if rows is not None:
            check_rows([*prompt, *response], rows, place_of(record), template.tokenizer)
        if template.schema == "text":
            ids = [*prompt, *response]
            # The first token predicts the others; a text that is too long keeps its beginning.
            prompt, response = ids[:1] if len(ids) > 1 else [], ids[1:longest]
            cut += len(ids) > longest
        room = longest - len(response)
        if room < 1 or not prompt:
            dropped += 1
            promptless += not prompt
            continue
        empty += not rendered.answer.strip()
        if len(prompt) > room:
            truncated += 1
            prompt = shorten_prompt(prompt, room, template.tokenizer)
        examples.append(Example([*prompt, *response], len(prompt)))
    if records and not examples:
        if promptless == dropped:
            raise CoraError(f"all {len(records)} {what} records were dropped: their prompts are empty")
        limit, remedy = f"--max-length {max_length}", "use a larger --max-length"
        if longest < max_length:
            limit, remedy = f"the model's context of {context} tokens", "use shorter records, or a model with a longer context"
        raise CoraError(f"all {len(records)} {what} records were dropped: no response fits into {limit}; {remedy}")
    spelled = sum(map(template.spells_control_tokens, records))
    return EncodedSet(examples, truncated, dropped, spelled, apart, promptless, empty, cut, left_out, unknown)


def _shown(records: Sequence[Record], what: str) -> Iterator[Record]:
    """The records, with their progress where they are so many that they take long."""
    if len(records) < _MANY:
        yield from records
        return
    with progress(f"tokenizing the {what} records", len(records), "records") as shown:
        for record in records:
            yield record
            shown.advance()


def notices(encoded: EncodedSet) -> list[str]:
    """What the user should know about an encoded set, one phrase per fact."""
    facts = (
        (
            encoded.truncated or encoded.dropped > encoded.promptless,
            f"{encoded.truncated} prompts truncated, {encoded.dropped - encoded.promptless} records dropped as too long",
        ),
        (encoded.cut, f"{encoded.cut} texts cut at the end, which is beyond the maximum length"),
        (encoded.promptless, f"{encoded.promptless} dropped because their prompt is empty"),
        (encoded.empty, f"{encoded.empty} with an answer that is empty or white space"),
        (encoded.control_tokens, control_tokens_notice(encoded.control_tokens)),
        (
            encoded.apart,
            f"{encoded.apart} answers trained behind their prompts although the chat template renders the conversation otherwise "
            "than its prompt followed by the answer",
        ),
        (encoded.left_out, left_out_notice(encoded.left_out)),
        (encoded.unknown, unknown_notice(encoded.unknown)),
    )
    return [text for holds, text in facts if holds]


def control_tokens_notice(count: int) -> str:
    """Says that `count` records spell control tokens in their text."""
    return f"{count} with control tokens spelled in their text, which the tokenizer takes for the tokens themselves"


def has_unknown(ids: Sequence[int], text: str, tokenizer: Any) -> bool:
    """Whether `text` is in part unknown to the tokenizer and so lost in its tokens, `ids`: replaced by the unknown token, or left out."""
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in others and tokenizer.unk_token_id in ids:
        return True
    if not tokenizer.is_fast or not _leaves_out(_KNOWN_TO_NONE, tokenizer):
        return False
    for token in tokenizer.get_added_vocab():
        text = text.replace(token, " ")
    normalizer = tokenizer.backend_tokenizer.normalizer
    letters = {*(normalizer.normalize_str(text) if normalizer else text)}
    return any(not letter.isspace() and _leaves_out(letter, tokenizer) for letter in letters)


def unknown_notice(count: int) -> str:
    """Says that `count` records hold text that the tokenizer does not know."""
    return f"{count} with text that the tokenizer does not know, and replaces by its unknown token or leaves out"


def check_rows(ids: Sequence[int], rows: int, where: str, tokenizer: Any) -> None:
    """Raise `CoraError` naming the first token of `ids` that an embedding of `rows` rows does not have."""
    if ids and max(ids) >= rows:
        token = next(token for token in ids if token >= rows)
        raise CoraError(
            f"{where}: the token {tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, but the model's embedding has only "
            f"{rows} rows; use the tokenizer that belongs to the model, or a model whose embedding was resized for this one"
        )


def split_tokens(rendered: Rendered, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokenize a rendered record into prompt ids and response ids; the response ends with its end token, and what closes it.

    If the boundary between them falls on a token boundary, both are tokenized as one text, so the response has the tokens that
    the model would generate. Otherwise each is tokenized on its own, the response as text that follows another.
    """
    prompt = encode_prompt(rendered, tokenizer)
    response = continuation(rendered, prompt, tokenizer)
    if response is None:
        response = tokens_within(rendered.response, tokenizer)
    end = [tokenizer.eos_token_id if rendered.end is None else rendered.end]
    ended = response if response[-1:] == end else response + end  # the data may already contain the end token
    return prompt, ended if rendered.closing is None else [*ended, rendered.closing]


def continues_prompt(rendered: Rendered, tokenizer: Any) -> bool:
    """Whether the tokens of the response are those of a text that begins with the prompt (see `split_tokens`)."""
    return continuation(rendered, encode_prompt(rendered, tokenizer), tokenizer) is not None


def continuation(rendered: Rendered, prompt: list[int], tokenizer: Any) -> list[int] | None:
    """The tokens of the response in one text with the `prompt`, whose tokens these are; None if the boundary between them falls within a token."""
    joined = encode_prompt(dataclasses.replace(rendered, prompt=rendered.prompt + rendered.response), tokenizer)
    return joined[len(prompt) :] if joined[: len(prompt)] == prompt else None


def encode_prompt(rendered: Rendered, tokenizer: Any) -> list[int]:
    """Tokenize the prompt, after the tokenizer's start tokens if it needs them and does not spell them itself, and without any tokens added at the end."""
    start = _start_tokens(tokenizer) if rendered.special_tokens else []
    prompt = _tokens(rendered.prompt, tokenizer)
    return prompt if prompt[: len(start)] == start else start + prompt


def shorten_prompt(prompt: list[int], room: int, tokenizer: Any) -> list[int]:
    """The last `room` >= 1 tokens of a prompt; the first one stays the start token if the prompt has one and `room` is above 1.

    Models put much of their attention on the start token and answer badly without it (arXiv 2309.17453).
    """
    if len(prompt) <= room:
        return prompt
    start = prompt[:1] if prompt[0] == tokenizer.bos_token_id and room > 1 else []
    return start + prompt[len(prompt) - room + len(start) :]


def _tokens(text: str, tokenizer: Any, as_text: bool = False) -> list[int]:
    try:
        return list(
            tokenizer(text, add_special_tokens=False, **({"split_special_tokens": True} if as_text else {}))["input_ids"]
        )
    except Exception as error:  # the tokenizers raise bare exceptions, such as for a character that none of their tokens has
        raise CoraError(f"the tokenizer cannot turn the text {text[:60]!r} into tokens: {reason(error)}") from error


def tokens_within(text: str, tokenizer: Any, as_text: bool = False) -> list[int]:
    """The tokens of a text that follows another one: without the space that some tokenizers put before the first word of a text.

    With `as_text`, what spells a control token is text.
    """
    line = _tokens_if_known("\n", tokenizer)
    behind_line = _tokens(f"\n{text}", tokenizer, as_text) if line else []
    return behind_line[len(line) :] if line and behind_line[: len(line)] == line else _tokens(text, tokenizer, as_text)


def _tokens_if_known(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text; none where the tokenizer leaves it out or refuses it."""
    with contextlib.suppress(CoraError):
        return _tokens(text, tokenizer)
    return []


def _leaves_out(text: str, tokenizer: Any) -> bool:
    """Whether the tokenizer makes no token of a text. One that refuses a part of a word may know the word, and loses nothing."""
    with contextlib.suppress(CoraError):
        return not _tokens(text, tokenizer)
    return False


def _start_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer adds before a text, found by locating a text that it knows in its output."""
    shown = "a"
    if not _tokens_if_known(shown, tokenizer):  # a look through the vocabulary is slow, and this is called for every record
        shown = next(
            text
            for text in sorted({*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens})
            if _tokens_if_known(text, tokenizer)
        )
    text, full = _tokens(shown, tokenizer), list(tokenizer(shown)["input_ids"])
    return next(full[:start] for start in range(len(full)) if full[start : start + len(text)] == text)
