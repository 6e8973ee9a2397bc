"""The chat template of a tokenizer: a conversation as text, the same at every call, and what the template expects and writes, found by asking it."""

import contextlib
import dataclasses
import datetime
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from cora_cli.errors import CoraError
from cora_cli.limits import bounded
from cora_cli.reading import Malformed, parse_json

PROBE = "qzx"
"""The answer in what the template is asked: no word that its own text could hold."""
_ADDRESS = re.compile(r"<[^<>\n]{1,200} at 0x[0-9a-f]{6,16}>")
"""What Python writes for an object that is no text, such as a generator: it has another address in each process."""
_PARTS = ("{'type': 'text'", '{"type": "text"')
"""How a template that knows no parts of messages writes one, as Python or as JSON prints it."""
CONTROL = re.compile(r"<[^<>\s]{1,40}>")
"""How the control tokens of chat templates are written."""
_THINK = re.compile(r"</?think>")
"""The tags around thoughts, which are a part of answers."""
THOUGHTS = frozenset({"reasoning", "reasoning_content", "thinking"})
"""The entries of a message that hold thoughts."""
_TOOL = {"name": "probe", "description": "probe", "parameters": {"type": "object", "properties": {}}}
_AS_FUNCTION = {"type": "function", "function": _TOOL}
CLOCK = "strftime_now"
"""The function by which a chat template reads the clock; transformers' own name for it."""


@dataclasses.dataclass(frozen=True)
class TurnEnd:
    """The token that ends an answer in a chat template: its id, its text, and what the template writes after it.

    `closing` is the tokenizer's end token where the template writes it directly behind that token in every turn, as Command R7B's does, else None.
    """

    token: int
    text: str
    after: str
    closing: int | None = None


class ChatTemplate:
    """The chat template of `tokenizer`, for which today is `date` (YYYY-MM-DD). What it is asked is asked once."""

    def __init__(self, tokenizer: Any, date: str) -> None:
        self._tokenizer, self._date = tokenizer, date
        self._turn_ends_of: dict[str, TurnEnd | None] = {}
        self._takes_parts: dict[bool, bool] = {}  # with tools and without, for which some tokenizers have a template of its own

    def apply(self, messages: Sequence[Mapping[str, Any]], extra: Mapping[str, Any], **options: bool) -> str:
        """The conversation as text, the same at every call; `extra` are variables of a record.

        Raises `UnsteadyTemplate` for a template that draws at random, or writes the addresses of objects; other errors are the template's own.
        """
        variables = {**options, **extra}
        with_tools = bool(extra.get("tools"))
        if with_tools not in self._takes_parts:
            self._takes_parts[with_tools] = self._writes_parts({"tools": extra["tools"]} if with_tools else {})
        if self._takes_parts[with_tools]:
            return self._rendered(_in_parts(messages), variables)
        try:
            return self._rendered(messages, variables)
        except (CoraError, UnsteadyTemplate):
            raise
        except Exception as error:  # templates raise what they like
            try:
                text = self._rendered(_in_parts(messages), variables)
            except CoraError:
                raise
            except Exception:
                raise error from None
            if _shows_parts(text):
                raise
            return text

    def _writes_parts(self, extra: Mapping[str, Any]) -> bool:
        """Whether the chat template is one of those for images and text that write the parts of a message only, and leave out one that is a text.

        A text of a record would not tell: a short one is in much of what a template writes.
        """
        asked = [{"role": "user", "content": f"{PROBE}0"}, {"role": "assistant", "content": f"{PROBE}1"}]

        def written(messages: Sequence[Mapping[str, Any]]) -> int:
            try:
                text = self._rendered(messages, extra)
            except CoraError:
                raise
            except Exception:  # templates raise what they like
                return 0
            return 0 if _shows_parts(text) else sum(message["content"] in text for message in asked)

        return written(_in_parts(asked)) > written(asked)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        state = random.getstate()
        with clock_at(self._date):
            text = str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, **variables))
        if random.getstate() != state:
            raise UnsteadyTemplate(
                "draws at random, such as by Jinja's filter random, so that every call gives another prompt; replace that in it"
            )
        if (found := _ADDRESS.search(text)) and found.group() not in repr([messages, variables]):
            raise UnsteadyTemplate(
                f"writes {found.group()}, which differs in every process; filters such as map need |list or |join after them"
            )
        return text

    @cached_property
    def words(self) -> dict[bool, set[str]]:
        """The words of the chat template, without tools and with them; see `turn_ends`."""
        templates = self._tokenizer.chat_template
        named = templates if isinstance(templates, dict) else {"default": templates}
        words = {name: set(re.findall(r"\w+", text)) for name, text in named.items()}
        # transformers hands thoughts on under each of their names.
        words = {name: own | THOUGHTS if own & THOUGHTS else own for name, own in words.items()}
        plain = words.get("default", set())
        return {False: plain, True: words.get("tool_use", plain)}

    @cached_property
    def special(self) -> dict[str, int]:
        """The id of each special token by its text, the longest text first."""
        added = {token.content: index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        own = dict(zip(self._tokenizer.all_special_tokens, self._tokenizer.all_special_ids, strict=True))
        found = {text: index for text, index in {**added, **own}.items() if text.strip()}
        return dict(sorted(found.items(), key=lambda pair: (-len(pair[0]), pair[0])))

    @cached_property
    def control(self) -> dict[str, int]:
        """As `special`, with the tokens around messages that are not called special, such as DeepSeek-R1's `<｜User｜>`."""
        framed = self._answered({"content": PROBE}, {}, [{"role": "user", "content": "question"}]) or ""
        framing = {text for text in CONTROL.findall(framed) if not _THINK.fullmatch(text)}
        added = self._tokenizer.added_tokens_decoder.items()
        return {**self.special, **{token.content: index for index, token in added if token.content in framing}}

    @cached_property
    def _is_named(self) -> bool:
        """Whether the tokenizer has several templates, one of them for conversations with tools."""
        return isinstance(self._tokenizer.chat_template, dict)

    @cached_property
    def turn_ends(self) -> dict[bool, TurnEnd | None]:
        """How the chat template ends an answer, without tools and with them, for which some tokenizers have a template of its own."""
        plain = self._turn_end({})
        return {False: plain, True: self._turn_end({"tools": [_AS_FUNCTION]}) if self._is_named else plain}

    def turn_end(self, extra: Mapping[str, Any]) -> TurnEnd | None:
        """How the chat template ends an answer in a conversation with the variables `extra`, by which it may write something else behind the end."""
        with_tools = "tools" in extra
        variables = {name: value for name, value in extra.items() if name not in ("tools", "documents")}
        if not variables:
            return self.turn_ends[with_tools]
        key = json.dumps([with_tools, variables], sort_keys=True, default=str)
        if key not in self._turn_ends_of:
            own = self._turn_end(variables | ({"tools": [_AS_FUNCTION]} if with_tools and self._is_named else {}))
            self._turn_ends_of[key] = own or self.turn_ends[with_tools]
        return self._turn_ends_of[key]

    def _turn_end(self, extra: Mapping[str, Any]) -> TurnEnd | None:
        """How the chat template ends an answer; None where it does so with no token, or refuses a conversation of plain messages."""
        tail = self._behind_answer(extra)
        # Some checkpoints list their turn's end among the added tokens without calling it special.
        added = {token.content: index for index, token in self._tokenizer.added_tokens_decoder.items() if token.content.strip()}
        ends = {**added, **self.special}
        places = {name: tail.find(name) for name in sorted(ends, key=len, reverse=True) if name in tail}
        if not places:
            return None
        first = min(places, key=lambda name: (places[name], -len(name)))
        after, end = tail[places[first] + len(first) :], self._tokenizer.eos_token
        # Others, such as Phi-4-mini's, write it once, at the end of a conversation.
        followed = end and after.startswith(end) and self._behind_answer(extra, asks_again=True).partition(first)[2]
        is_closed = followed and followed.startswith(end)
        return TurnEnd(ends[first], first, after, self._tokenizer.eos_token_id if is_closed else None)

    @cached_property
    def end_as_text(self) -> str | None:
        """The control token by which the chat template ends an answer where the tokenizer has no such token, so that it is text to the model."""
        found = None if self.turn_ends[False] else CONTROL.match(self._behind_answer({}).lstrip())
        return found.group() if found else None

    def _behind_answer(self, extra: Mapping[str, Any], asks_again: bool = False) -> str:
        """What the chat template writes behind an answer, to which another question may follow; nothing where it refuses such plain messages."""
        text = self._answered({"content": PROBE}, extra, [{"role": "user", "content": "question"}] if asks_again else []) or ""
        return text[text.rindex(PROBE) + len(PROBE) :] if PROBE in text else ""

    @cached_property
    def forms_of_arguments(self) -> dict[bool, type | None]:
        """What the arguments of a call of a tool have to be for the chat template, without tools and with them: an object, JSON text, or either (None).

        Some templates write such text as a quoted string, or an object as Python prints it; others refuse one of the two.
        """
        tools = {"tools": [_AS_FUNCTION]}
        return {False: self._form_of_arguments({}), True: self._form_of_arguments(tools)}

    def _form_of_arguments(self, extra: Mapping[str, Any]) -> type | None:
        def fits(arguments: Any) -> bool:
            written = (self._with_call(arguments, content, extra) for content in (None, ""))
            text = next((text for text in written if text is not None), None)
            return text is not None and r"{\"name\"" not in text and "{'name': 'value'}" not in text

        as_object, as_text = fits({"name": "value"}), fits('{"name": "value"}')
        return None if as_object == as_text else dict if as_object else str

    @cached_property
    def needs_text(self) -> dict[bool, bool]:
        """Whether the chat template writes a call of a tool next to an empty text but refuses one next to null, without tools and with them."""
        tools = {"tools": [_AS_FUNCTION]}
        return {with_tools: self._needs_text(with_tools, extra) for with_tools, extra in ((False, {}), (True, tools))}

    def _needs_text(self, with_tools: bool, extra: Mapping[str, Any]) -> bool:
        arguments = '{"name": "value"}' if self.forms_of_arguments[with_tools] is str else {"name": "value"}
        if self._with_call(arguments, None, extra) is not None:
            return False
        return self._with_call(arguments, "", extra) not in (None, self._answered({"content": ""}, extra))

    def _with_call(self, arguments: Any, content: str | None, extra: Mapping[str, Any]) -> str | None:
        """A conversation whose answer calls a tool, next to a text or null; None where the chat template refuses it."""
        call = {"id": "call00000", "type": "function", "function": {"name": "probe", "arguments": arguments}}
        return self._answered({"content": content, "tool_calls": [call]}, extra)

    def _answered(
        self, answer: Mapping[str, Any], extra: Mapping[str, Any], further: Sequence[Mapping[str, Any]] = ()
    ) -> str | None:
        """A conversation of a question, an answer and `further` messages, behind a system message where the chat template refuses it without one; None where
        it refuses that, too."""
        asked = [{"role": "user", "content": "question"}, {"role": "assistant", **answer}, *further]
        for messages in (asked, [{"role": "system", "content": "instructions"}, *asked]):
            # Templates raise what they like; `render` reports it for the records themselves.
            with contextlib.suppress(Exception), bounded("the chat template"):
                return self.apply(messages, extra)
        return None


class UnsteadyTemplate(Exception):
    """A chat template gives other texts at other calls; the message goes on after "the chat template"."""


def _in_parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages, with each text as a list of one part."""
    return [
        {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content := message.get("content"), str)
        else message
        for message in messages
    ]


def _shows_parts(text: str) -> bool:
    return any(part in text for part in _PARTS)


def with_arguments(message: dict[str, Any], form: type | None) -> dict[str, Any]:
    """A message whose calls of tools have objects (`dict`) for arguments in place of JSON text of objects, or the other way round (`str`)."""

    def converted(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(function := call.get("function"), dict):
            return {**call, "function": converted(function)}
        given = call.get("arguments")
        with contextlib.suppress(Malformed):
            if form is dict and isinstance(given, str) and isinstance(found := parse_json(given), dict):
                return {**call, "arguments": found}
        return {**call, "arguments": json.dumps(given, ensure_ascii=False)} if form is str and isinstance(given, dict) else call

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [converted(call) for call in calls]} if isinstance(calls, list) else message


def with_names(message: dict[str, Any], start: str) -> tuple[dict[str, Any], list[str]]:
    """A message whose calls of tools have other names, each its own, all beginning with `start`; and these names."""
    names: list[str] = []

    def renamed(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(function := call.get("function"), dict):
            return {**call, "function": renamed(function)}
        names.append(f"{start}{len(names)}x")
        return {**call, "name": names[-1]}

    calls = message.get("tool_calls")
    return ({**message, "tool_calls": list(map(renamed, calls))} if isinstance(calls, list) else message), names


@contextlib.contextmanager
def clock_at(date: str) -> Iterator[None]:
    """Let chat templates read midnight of `date` from the clock.

    transformers neither takes a clock nor hands a function on to the template, so the class whose `now` it calls is replaced.
    """
    from transformers.utils import chat_template_utils

    module: Any = chat_template_utils

    class Midnight(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Midnight":
            return cls.fromisoformat(date)

        def strftime(self, format: str) -> str:
            # The C library counts its seconds in the machine's time zone.
            seconds = int(self.replace(tzinfo=datetime.UTC).timestamp())
            return super().strftime(re.sub("%(.)", lambda code: str(seconds) if code[1] == "s" else code[0], format))

    real = module.datetime
    module.datetime = Midnight
    try:
        yield
    finally:
        module.datetime = real
