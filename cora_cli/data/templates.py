"""Turn a record into the prompt that the model sees and the response that it should give.

There are three templates: `alpaca` (Stanford Alpaca's two forms), `chat` (the tokenizer's own) and `plain` (the prompt as it
is). Tokenization is done by `encode`.
"""

import contextlib
import dataclasses
import datetime
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from cora_cli.data.records import Record, Schema, place_of, template_values, turns
from cora_cli.errors import CoraError, reason
from cora_cli.limits import bounded
from cora_cli.reading import Malformed, parse_json
from cora_cli.settings import TemplateName, today

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_PROBE = "answer"
_ADDRESS = re.compile(r"<[^<>\n]{1,200} at 0x[0-9a-f]{6,16}>")
"""What Python writes for an object that is no text, such as a generator: it has another address in each process."""
_OPENED = re.compile(r"(?P<tag><[^<>\s]{1,40}>|\[[A-Z_]{1,40}\])(?P<space>\s*)$")
"""The end of a prompt that begins the answer itself, such as with `<think>`."""
_PARTS = ("{'type': 'text'", '{"type": "text"')
"""How a template that knows no parts of messages writes one, as Python or as JSON prints it."""
CLOCK = "strftime_now"
"""The function by which a chat template reads the clock; transformers' own name for it."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A record as text.

    `special_tokens` says whether the tokenizer still has to add its start token before `prompt`. `end` is the id of the token that
    ends the response, None for the tokenizer's end token. `lead` is the part of `response` that the template, not the record, puts before the answer, such as an empty
    block of thoughts. `own_turn` is False where the template renders the conversation with its answer otherwise than the prompt
    followed by the answer, so that the answer is trained as the record has it. `left_out` has the roles of the messages whose text the
    template does not write.
    """

    prompt: str
    response: str
    special_tokens: bool
    end: int | None = None
    lead: str = ""
    own_turn: bool = True
    left_out: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The response without `lead`: what a prediction is compared with."""
        return self.response.removeprefix(self.lead)


def resolve_auto(template: TemplateName, schema: Schema, has_chat: bool) -> TemplateName:
    """The template that `auto` stands for; `has_chat` says whether the tokenizer has a chat template."""
    if template != "auto":
        return template
    if schema in ("prompt", "text"):
        return "plain"
    return "chat" if schema == "messages" or has_chat else "alpaca"


def choose_template(template: TemplateName, schema: Schema, tokenizer: Any) -> TemplateName:
    """Resolve `auto`: the tokenizer's chat template if it has one, else Alpaca's; `plain` for prompt/completion pairs and for text.

    Raises `CoraError` if `chat` is needed and the tokenizer has no template, or if chat messages get another template.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    template = resolve_auto(template, schema, has_chat)
    if template == "chat" and not has_chat:
        raise CoraError("this needs a chat template (template chat, or data with chat messages), but the tokenizer has none")
    if template == "chat" and getattr(tokenizer, "split_special_tokens", False):
        raise CoraError(
            "the tokenizer sets split_special_tokens, with which the control tokens of its chat template would be pieces of text to the model; set it "
            "to false in tokenizer_config.json, or use another template"
        )
    if schema == "text" and template != "plain":
        raise CoraError(f"text without prompts needs --template plain, not {template}")
    if schema == "messages" and template != "chat":
        raise CoraError(f"chat messages need --template chat, not {template}")
    return template


def reads_clock(template: TemplateName, tokenizer: Any) -> bool:
    """Whether prompts depend on the date: where the tokenizer's chat template reads the clock, as Llama 3.1's does."""
    return template == "chat" and CLOCK in str(tokenizer.chat_template)


class Template:
    """Renders the records of one schema; `name` is a template from `choose_template`.

    A chat template may write the date into its prompts (`reads_clock`). Then it is `date`, as YYYY-MM-DD, whatever the day is; None stands
    for today.
    """

    def __init__(self, name: TemplateName, schema: Schema, tokenizer: Any, date: str | None = None) -> None:
        self.name, self.schema, self.tokenizer = name, schema, tokenizer
        self.date = date or today()

    @property
    def reads_clock(self) -> bool:
        """Whether the prompts depend on `date`."""
        return reads_clock(self.name, self.tokenizer)

    @property
    def ends(self) -> set[int]:
        """Ids of the tokens that end an answer: the tokenizer's end token, and the one by which the chat template ends a turn."""
        turn = {self._turn_end.token} if self.name == "chat" and self._turn_end else set()
        return {self.tokenizer.eos_token_id, *turn}

    def turns(self, record: Record) -> Iterator[Record]:
        """The record as one record per answer; see `records.turns`."""
        return turns(record, self.schema)

    def render(self, record: Mapping[str, Any]) -> Rendered:
        """Render one record. In a conversation of several turns the last answer is the response, everything before it the prompt.

        An end token that the record itself has at the end of its answer is no part of the response. Raises `CoraError` naming the record's place if the
        chat template refuses it.
        """
        rendered = self._render_chat(record) if self.name == "chat" else self._render_text(record)
        return dataclasses.replace(rendered, response=self.without_end(rendered.response, self.ends))

    def _render_text(self, record: Mapping[str, Any]) -> Rendered:
        if self.schema == "text":
            return Rendered("", record["text"], special_tokens=True)
        if self.schema == "prompt":
            instruction, given, response = record["prompt"], "", record["completion"]
        else:
            instruction, given, response = record["instruction"], record["input"], record["output"]
        if self.name == "plain":
            return Rendered(f"{instruction}\n{given}" if given else instruction, response, special_tokens=True)
        form = ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT
        return Rendered(form.format(instruction=instruction, input=given), response, special_tokens=True)

    def unread(self, records: Iterable[Record]) -> list[str]:
        """The names in `records` that the chat template does not mention: variables such as `tools`, and entries of messages."""
        if self.name != "chat" or self.schema != "messages":
            return []
        given: set[str] = set()
        for record in records:
            given |= template_values(record).keys()
            given |= {name for message in record["messages"] for name, value in message.items() if value is not None}
        text = str(self.tokenizer.chat_template)
        return sorted(name for name in given - {"role", "content", "weight"} if not re.search(rf"\b{re.escape(name)}\b", text))

    def spells_control_tokens(self, record: Mapping[str, Any]) -> bool:
        """Whether a text of the record spells a control token, which the tokenizer takes for the token itself.

        An end token at the end of the answer does not count.
        """
        messages = self._messages(record)
        texts = [str(message.get("content") or "") for message in messages]
        texts[-1] = self.without_end(texts[-1], self.ends)
        rest = [{key: value for key, value in message.items() if key not in ("role", "content")} for message in messages]
        others = [*rest, template_values(record) if self.schema == "messages" else {}]
        texts += [json.dumps(value, ensure_ascii=False, default=str) for value in others if value]
        return any(self._control_tokens.search(text) for text in texts)

    def spelled_tokens(self, text: str) -> frozenset[int]:
        """Ids of the special tokens that a text spells, but for those that end an answer."""
        return frozenset(index for spelled, index in self._special.items() if spelled in text) - self.ends

    def without_end(self, text: str, tokens: Iterable[int]) -> str:
        """A text without those end `tokens` that it spells at its end, nor what stands behind them."""
        ends = tuple(filter(None, map(self.tokenizer.convert_ids_to_tokens, tokens)))
        while (bare := text.rstrip()).endswith(ends):
            text = bare[: -max(len(end) for end in ends if bare.endswith(end))]
        return text

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        turn = [self._turn_end.text] if self.name == "chat" and self._turn_end else []
        return re.compile("|".join(map(re.escape, [*self._special, *turn])) or r"(?!)")

    @cached_property
    def _special(self) -> dict[str, int]:
        """The id of each special token by its text, the longest text first."""
        added = {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        own = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        found = {text: index for text, index in {**added, **own}.items() if text.strip()}
        return dict(sorted(found.items(), key=lambda pair: (-len(pair[0]), pair[0])))

    @cached_property
    def _turn_end(self) -> "_TurnEnd | None":
        """How the chat template ends an answer; None where it refuses a conversation of two plain messages."""
        try:
            with bounded("the chat template"):
                text = self._apply([{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}], {})
        except Exception:  # templates raise what they like; `render` reports it for the records themselves
            return None
        tail = text[text.rindex(_PROBE) + len(_PROBE) :] if _PROBE in text else ""
        # Some checkpoints list their turn's end among the added tokens without calling it special.
        added = {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()}
        ends = {**added, **self._special}
        places = {name: tail.find(name) for name in sorted(ends, key=len, reverse=True) if name in tail}
        if not places:
            return None
        first = min(places, key=lambda name: (places[name], -len(name)))
        return _TurnEnd(ends[first], first, tail[places[first] + len(first) :])

    @cached_property
    def _quotes_arguments(self) -> bool:
        """Whether the chat template writes the arguments of a call of a tool, where they are JSON text as OpenAI has them, as a quoted string.

        Such a template expects an object.
        """
        call = {"id": "call00000", "type": "function", "function": {"name": "probe", "arguments": '{"name": "value"}'}}
        talk: list[dict[str, Any]] = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            with bounded("the chat template"):
                return r"{\"name\"" in self._apply(talk, {})
        except Exception:  # templates raise what they like; `render` reports it for the records themselves
            return False

    def _render_chat(self, record: Mapping[str, Any]) -> Rendered:
        messages, extra = self._messages(record), template_values(record) if self.schema == "messages" else {}
        where = place_of(record)
        try:
            with bounded(f"{where}: the chat template"):
                prompt = self._apply(messages[:-1], extra, add_generation_prompt=True)
                rendered = self._apply(messages, extra)
                is_bare = self._is_bare(messages, extra, rendered)
        except CoraError:
            raise
        except UnsteadyTemplate as error:
            raise CoraError(f"{where}: the chat template {error}") from error
        except Exception as error:  # templates raise what they like
            raise CoraError(f"{where}: the chat template refuses the conversation: {reason(error)}") from error
        content = messages[-1].get("content")
        missing = {message["role"] for message in messages[:-1] if not _is_written(message, prompt)}
        if not rendered.startswith(prompt):
            if not isinstance(content, str):
                raise CoraError(f"{where}: the chat template gives the last message no text after the prompt")
            end = self._turn_end.token if self._turn_end else None
            left_out = tuple(sorted(missing))
            response = _continued(prompt, content)
            return Rendered(prompt, response, special_tokens=False, end=end, own_turn=False, left_out=left_out)
        # Some templates set thoughts apart anew.
        if isinstance(content, str) and not all(part.strip() in rendered for part in re.split("</?think>", content)):
            missing.add(messages[-1]["role"])
        response, end = self._without_end(rendered[len(prompt) :])
        lead = _lead(response, content) if isinstance(content, str) and is_bare else ""
        return Rendered(prompt, response, special_tokens=False, end=end, lead=lead, left_out=tuple(sorted(missing)))

    def _is_bare(self, messages: Sequence[Mapping[str, Any]], extra: Mapping[str, Any], rendered: str) -> bool:
        """Whether the template writes nothing of the answer but its text: no thoughts or calls of tools that stand in entries of their own."""
        bare = {name: value for name, value in messages[-1].items() if name in ("role", "content")}
        if len(bare) == len(messages[-1]):
            return True
        try:
            return self._apply([*messages[:-1], bare], extra) == rendered
        except CoraError:
            raise
        except Exception:  # a template may need those entries where there is no text
            return False

    def _without_end(self, rest: str) -> tuple[str, int | None]:
        """The rendered answer without its end, and the id of the token that ends it (None: the tokenizer's end token)."""
        if (turn := self._turn_end) and (rest.endswith(turn.text + turn.after)):
            return rest.removesuffix(turn.text + turn.after), turn.token
        # Another end than usual, such as Llama 3.1's after a call of a tool.
        for text, token in self._special.items():
            if rest.rstrip().endswith(text):
                return rest.rstrip().removesuffix(text), token
        return rest, None

    def _apply(self, messages: Sequence[Mapping[str, Any]], extra: Mapping[str, Any], **options: bool) -> str:
        return apply_chat_template(self.tokenizer, messages, self.date, **options, **extra)

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The record as a conversation that ends with the answer."""
        if self.schema == "messages":
            messages = [_without_empty(message) for message in record["messages"]]
            calls = any(message.get("tool_calls") for message in messages)
            return [_with_objects(message) for message in messages] if calls and self._quotes_arguments else messages
        if self.schema == "text":
            return [{"role": "assistant", "content": record["text"]}]
        if self.schema == "prompt":
            user, answer = record["prompt"], record["completion"]
        else:
            user = f"{record['instruction']}\n\n{record['input']}" if record["input"] else record["instruction"]
            answer = record["output"]
        return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


class UnsteadyTemplate(Exception):
    """A chat template gives other texts at other calls; the message goes on after "the chat template"."""


def apply_chat_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], date: str, **variables: Any) -> str:
    """The conversation as text, with `date` as today's: the same text at every call.

    Raises `UnsteadyTemplate` for a template that draws at random, or writes the addresses of objects; other errors are the template's own.
    """
    text = _rendered(tokenizer, messages, date, variables)
    if not _writes_any(messages, text):
        # The templates of some models of images and text write the parts of a message only.
        with contextlib.suppress(Exception):  # templates raise what they like
            in_parts = _rendered(tokenizer, [_with_parts(message) for message in messages], date, variables)
            if _writes_any(messages, in_parts) and not any(part in in_parts for part in _PARTS):
                return in_parts
    return text


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], date: str, variables: Mapping[str, Any]) -> str:
    state = random.getstate()
    with clock_at(date):
        text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, **variables))
    if random.getstate() != state:
        raise UnsteadyTemplate(
            "draws at random, such as by Jinja's filter random, so that every call gives another prompt; replace that in it"
        )
    if (found := _ADDRESS.search(text)) and found.group() not in repr([messages, variables]):
        raise UnsteadyTemplate(
            f"writes {found.group()}, which differs in every process; filters such as map need |list or |join after them"
        )
    return text


def _writes_any(messages: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether the text of at least one message is in a rendered conversation; True where none has any."""
    texts = [content.strip() for message in messages if isinstance(content := message.get("content"), str) and content.strip()]
    return not texts or any(own in text for own in texts)


def _with_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose text is a list of one part."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


@dataclasses.dataclass(frozen=True)
class _TurnEnd:
    """The token that ends an answer in a chat template: its id, its text, and what the template writes after it."""

    token: int
    text: str
    after: str


def _lead(response: str, content: str) -> str:
    """What the template puts before the text of an answer. White space with which the text itself begins, such as the indentation of a program, is
    no part of that, unless the template removes it."""
    written = response.rstrip()
    found = next((text for text in (content.rstrip(), content.strip()) if written.endswith(text)), None)
    return "" if found is None else written[: len(written) - len(found)]


def _continued(prompt: str, answer: str) -> str:
    """The answer without the tag with which the prompt has begun it, such as `<think>`: a model continues after it."""
    opened = _OPENED.search(prompt)
    if opened is None or not answer.lstrip().startswith(opened["tag"]):
        return answer
    return answer.lstrip().removeprefix(opened["tag"]).removeprefix(opened["space"])


def _is_written(message: Mapping[str, Any], text: str) -> bool:
    """Whether the text of an earlier message is in a rendered conversation: as it is, without its thoughts, or quoted as JSON."""
    content = message.get("content")
    if not isinstance(content, str):
        return True
    said = content.strip()
    quoted = (json.dumps(said, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return said in text or said.rpartition("</think>")[2].strip() in text or any(one in text for one in quoted)


def _without_empty(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without entries that are null or an empty list, which tables have for all that other messages have, such as calls of tools."""
    return {name: value for name, value in message.items() if name == "content" or (value is not None and value != [])}


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls of tools have objects for arguments in place of JSON text of objects."""

    def converted(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(function := call.get("function"), dict):
            return {**call, "function": converted(function)}
        with contextlib.suppress(Malformed):
            if isinstance(given := call.get("arguments"), str) and isinstance(found := parse_json(given), dict):
                return {**call, "arguments": found}
        return call

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [converted(call) for call in calls]} if isinstance(calls, list) else message


def left_out_notice(counts: Mapping[str, int]) -> str:
    """Says that the chat template does not write the text of messages; `counts` has the number of records by role."""
    roles = ", ".join(f"{role} ({count} records)" for role, count in sorted(counts.items()))
    return f"the chat template leaves out text of messages of the roles {roles}, so the prompts and answers have nothing of it"


def unread_notice(names: Sequence[str]) -> str:
    """Says that `Template.unread` found `names`."""
    return f"the chat template does not mention {', '.join(names)}, so the prompts and answers have nothing of it"


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
