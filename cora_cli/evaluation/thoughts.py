"""The thoughts of an answer, as the families of models mark them: some by text, others by special tokens, which decoding would leave out."""

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

_BEGIN = ("<think>", "[THINK]", "<seed:think>", "<|channel>", "<|START_THINKING|>", "<|channel|>analysis<|message|>")
_END = ("</think>", "[/THINK]", "</seed:think>", "<channel|>", "<|END_THINKING|>", "<|channel|>final<|message|>")
_BETWEEN = "<|end|><|start|>"
"""What gpt-oss writes between its thoughts and what it says."""


def has_thoughts(answer: str, reference: str = "") -> bool:
    """Whether an answer marks thoughts in a way in which the reference does not."""
    return any(mark in answer and mark not in reference for mark in (*_BEGIN, *_END))


def without_thoughts(answer: str) -> str:
    """An answer without the thoughts before it; thoughts that never end leave nothing.

    Where the prompt has begun them, only their end is there. A mark in a program, behind a quotation mark or within a fence, is text.
    """
    ends = sorted((place, mark) for mark in _END if (place := answer.find(mark)) >= 0)
    if answer.lstrip().startswith(_BEGIN):
        return answer[ends[0][0] + len(ends[0][1]) :] if ends else ""
    for place, mark in ends[:1]:
        before = answer[:place]
        if not (before.endswith(("'", '"', "`")) or before.count("```") % 2 or any(begin in before for begin in _BEGIN)):
            return answer[place + len(mark) :]
    return answer


@lru_cache(maxsize=4)
def thought_tokens(tokenizer: Any) -> frozenset[int]:
    """The ids of the special tokens of a tokenizer that mark thoughts."""
    marks = (*_BEGIN, *_END, _BETWEEN)
    return frozenset(index for index, text in _special(tokenizer).items() if any(text in mark for mark in marks))


def text_of(tokenizer: Any, ids: Sequence[int], keeps: Collection[int] = ()) -> str:
    """The text of an answer without special tokens, but for those in `keeps`."""
    if not set(keeps).intersection(ids):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    left_out = _special(tokenizer).keys() - keeps
    return str(tokenizer.decode([one for one in ids if one not in left_out], skip_special_tokens=False))


@lru_cache(maxsize=4)
def _special(tokenizer: Any) -> dict[int, str]:
    """The special tokens of a tokenizer, which take long to list where thousands were added."""
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added
