"""The thoughts of an answer, as the families of models mark them: some by text, others by special tokens, which decoding would leave out."""

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

_MARKS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "<thought>": "</thought>",  # EXAONE Deep
    "◁think▷": "◁/think▷",  # Kimi
    "<|channel>": "<channel|>",  # Gemma 4
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
    "<|begin_of_thought|>": "<|end_of_thought|>",  # Sky-T1
    "<|inner_prefix|>": "<|inner_suffix|>",  # Apertus
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",  # gpt-oss
}
_BEGIN, _END = tuple(_MARKS), tuple(_MARKS.values())
_ENDED = re.compile("|".join([*map(re.escape, _END), r"<\|channel\|>final[^<]*<\|constrain\|>[^<]*<\|message\|>"]))
"""The marks at the end of thoughts; gpt-oss may say of what kind its answer is."""
_BETWEEN = "<|end|><|start|>"
"""What gpt-oss writes between its thoughts and what it says."""
_QUOTES = ("'", '"', "`")


def has_thoughts(answer: str, reference: str = "") -> bool:
    """Whether an answer marks thoughts in a way in which the reference does not."""
    return any(mark in answer and mark not in reference for mark in (*_BEGIN, *_END))


def without_thoughts(answer: str) -> str:
    """An answer without the thoughts before it; thoughts that never end leave nothing.

    Where the prompt has begun them, only their end is there. A mark in a program, between quotation marks or within a fence, is text.
    """
    begins = answer.lstrip().startswith(_BEGIN)
    for found in _ENDED.finditer(answer):
        before, rest = answer[: found.start()], answer[found.end() :]
        if not begins and any(begin in before for begin in _BEGIN):
            return answer
        if (begins or not _is_quoted(before, rest)) and not rest.lstrip().startswith(_BEGIN):
            return rest
        begins = rest.lstrip().startswith(_BEGIN)
    return "" if begins else answer


def _is_quoted(before: str, behind: str) -> bool:
    """Whether what stands between two texts is within a fence, or in a line between quotation marks that it follows directly."""
    if before.count("```") % 2 and behind.count("```") % 2:
        return True
    quote, begun, ended = before[-1:], before.rpartition("\n")[2], behind.partition("\n")[0]
    return quote in _QUOTES and quote in ended and len(re.findall(rf"(?<!\w){quote}|{quote}(?!\w)", begun)) % 2 == 1


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
