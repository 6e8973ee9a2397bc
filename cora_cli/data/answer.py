"""What a chat template writes of an answer, to follow a prompt with which the rendered conversation does not begin.

Such a prompt begins the answer itself, often with `<think>`, or the template writes earlier messages otherwise where there is an answer.
"""

import dataclasses
import re
from collections.abc import Sequence

from cora_cli.data.chat import CONTROL, PROBE

_OPENED = re.compile(r"(?P<tag><[^<>\s]{1,40}>|\[[A-Z_]{1,40}\])(?P<space>\s*)$")
"""The end of a prompt that begins the answer itself, such as with `<think>`."""
_PIECE = re.compile(r"[<\[][^<>\[\]\s]*[>\]]|\w+|\W")
"""A control token, a word, or what is between them."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation as its chat template writes it: with its answer (`answered`), as the `prompt` for one, with neither (`earlier`), and with
    `PROBE` for an answer (`probed`). What the template refuses is None, and then the beginning of the answer is not found."""

    answered: str
    prompt: str
    earlier: str | None = None
    probed: str | None = None

    @property
    def begins_alike(self) -> bool:
        """Whether the answer begins as the prompt begins it, so that only earlier messages are written otherwise."""
        found = self._turn()
        return found is not None and bool(found[0].strip()) and found[1].startswith(found[0])

    def behind_prompt(self, text: str) -> str | None:
        """What follows the prompt, with the end of the answer; None where the answer's beginning is not found. `text` is that of the answer, if any.

        What the prompt has begun is not begun twice, and where it has ended the thoughts, with a control token, those of the answer have no place.
        """
        found = self._turn()
        if found is None:
            return None
        header, turn = found
        if turn.startswith(header):
            return turn.removeprefix(header)
        ended, rest = _behind_shared(_PIECE.findall(header), _PIECE.findall(turn))
        tag = _OPENED.search(ended)
        if tag is None or tag["tag"] not in rest:
            return rest
        before, _, behind = rest.partition(tag["tag"])
        # A text may speak of the token.
        is_of_text = bool(text.strip()) and 0 <= rest.rfind(text.strip()) <= len(before)
        return rest if is_of_text else behind.lstrip()

    def lead(self, text: str) -> str:
        """What the template writes before an answer of text, such as the end of the thoughts that the prompt begins.

        Nothing where that is what the prompt has begun already, or white space behind what it has begun, or where the template writes something else
        before this text than before others.
        """
        if self.earlier is None or self.probed is None:
            return ""
        before = self.probed.rpartition(PROBE)[0]
        is_before_text = self.answered.startswith(before) and self.answered.removeprefix(before).lstrip().startswith(
            text.strip()
        )
        lead = (dataclasses.replace(self, answered=self.probed).behind_prompt(PROBE) or "").partition(PROBE)[0]
        begun = self.prompt.removeprefix(self.earlier).strip()
        return lead if is_before_text and (not begun or lead.strip() not in begun) else ""

    def _turn(self) -> tuple[str, str] | None:
        """How the prompt begins the answer, and the rendered conversation from that place on."""
        if self.earlier is None or self.probed is None or not self.prompt.startswith(self.earlier):
            return None
        header = self.prompt.removeprefix(self.earlier)
        if not header.strip():  # prompts end as conversations do, such as behind the result of a tool
            # Some write the system message before the user's last one, and only where that is to be answered.
            before = self.probed.rpartition(PROBE)[0]
            bare = before.rstrip()
            # White space before an answer is the model's to write where the prompt does not end with it.
            for own in (before, bare) if self.prompt.endswith(before.removeprefix(bare)) else (bare, before):
                if own and self.answered.startswith(own):
                    return "", self._begun_otherwise(own) + self.answered.removeprefix(own)
            return self.prompt, self.answered
        if self.answered.startswith(self.earlier):
            return header, self.answered.removeprefix(self.earlier)
        start = self.answered.rfind(header, 0, _common(self.probed, self.answered) + len(header))
        if start < 0 or self._is_earlier(start, header):
            return None
        return header, self.answered[start:]

    def _begun_otherwise(self, before: str) -> str:
        """The control tokens that stand `before` an answer where a prompt has others in their place, as Command R7B's has behind every conversation."""
        asked, written = _behind_shared(_PIECE.findall(self.prompt), _PIECE.findall(before))
        is_control = asked.strip() and not CONTROL.sub("", asked + written).strip()
        return written if is_control else ""

    def _is_earlier(self, start: int, header: str) -> bool:
        """Whether the header at `start` may be that of an earlier answer, as where a template begins none of its own behind the result of a tool."""
        assert self.earlier is not None
        assert self.probed is not None
        if self.answered[: start + len(header)].count(header) >= self.prompt.count(header):
            return False
        # Prompts also have more headers where the thoughts of earlier answers have turns of their own. The last message then stands before this one.
        before, behind = self.answered[:start], self.probed[start + len(header) :].partition(PROBE)[0]
        last = before[len(before) - _common(before[::-1], self.earlier[::-1]) :]
        return not last.strip() or last in behind


def continued(prompt: str, answer: str) -> str:
    """The answer without the tag with which the prompt has begun it, such as `<think>`: a model continues after it."""
    opened = _OPENED.search(prompt)
    if opened is None or not answer.lstrip().startswith(opened["tag"]):
        return answer
    return answer.lstrip().removeprefix(opened["tag"]).removeprefix(opened["space"])


def lead_of(response: str, content: str) -> str:
    """What the template puts before the text of an answer; nothing where the response does not end with that text.

    White space with which the text itself begins, such as the indentation of a program, is no part of that, unless the template removes it.
    """
    written = response.rstrip()
    found = next((text for text in (content.rstrip(), content.strip()) if written.endswith(text)), None)
    return "" if found is None else written[: len(written) - len(found)]


def _behind_shared(begun: Sequence[str], written: Sequence[str]) -> tuple[str, str]:
    """What is left of each behind the pieces with which both begin; white space may differ."""
    at = behind = place = 0
    while at < len(begun) and place < len(written):
        if begun[at] == written[place]:
            at, place = at + 1, place + 1
            behind = place
        elif begun[at].isspace():
            at += 1
        elif written[place].isspace():
            place += 1
        else:
            break
    return "".join(begun[at:]), "".join(written[behind:])


def _common(one: str, other: str) -> int:
    """How many equal characters both begin with."""
    differing = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(one), len(other)))
