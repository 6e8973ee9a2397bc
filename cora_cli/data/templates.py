"""Turn a record into the prompt that the model sees and the response that it should give.

There are three templates: `alpaca` (Stanford Alpaca's two forms), `chat` (the tokenizer's own) and `plain` (the prompt as it
is). Tokenization is done by `encode`.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from cora_cli.data.answer import Conversation, continued, lead_of
from cora_cli.data.chat import CLOCK, PROBE, THOUGHTS, ChatTemplate, TurnEnd, UnsteadyTemplate, with_arguments, with_names
from cora_cli.data.records import TEMPLATE_COLUMNS, Record, Schema, place_of, template_values, turns
from cora_cli.errors import CoraError, reason
from cora_cli.limits import bounded
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


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A record as text.

    `special_tokens` says whether the tokenizer still has to add its start token before `prompt`. `end` is the id of the token that
    ends the response, None for the tokenizer's end token, and `closing` that of one that always follows it, if any. `lead` is the part of `response` that the template, not the record, puts before the answer, such as an empty
    block of thoughts. `own_turn` is False where the template renders the conversation with its answer otherwise than the prompt
    followed by the answer. `left_out` has the roles of the messages of which the template does not write all.
    """

    prompt: str
    response: str
    special_tokens: bool
    end: int | None = None
    lead: str = ""
    own_turn: bool = True
    left_out: tuple[str, ...] = ()
    closing: int | None = None

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
        raise CoraError(
            "this needs a chat template (template chat, or data with chat messages), but the tokenizer has none; put one next to it as "
            "chat_template.jinja, such as that of an instruction-tuned model of the same tokens"
        )
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
        self._chat = ChatTemplate(tokenizer, self.date)

    @property
    def reads_clock(self) -> bool:
        """Whether the prompts depend on `date`."""
        return reads_clock(self.name, self.tokenizer)

    @property
    def ends(self) -> set[int]:
        """Ids of the tokens that end an answer: the tokenizer's end token, and the one by which the chat template ends a turn."""
        return {self.tokenizer.eos_token_id, *(turn.token for turn in self._turn_ends.values() if turn)}

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

    @property
    def end_as_text(self) -> str | None:
        """The control token that ends a turn in the chat template but is none of the tokenizer's; see `ChatTemplate.end_as_text`."""
        return self._chat.end_as_text if self.name == "chat" else None

    def unread(self, records: Iterable[Record]) -> list[str]:
        """The names in `records` that the chat template does not mention or write: variables such as `tools`, and entries of messages."""
        if self.name != "chat" or self.schema != "messages":
            return []
        records = list(records)
        mentioned = self._chat.words[True].intersection(TEMPLATE_COLUMNS[:2])
        unread = {name for name in mentioned if self._is_without_effect(name, records)}
        for record in records:
            values = template_values(record)
            given = {name for message in record["messages"] for name, value in message.items() if value is not None}
            unread |= (values.keys() | given) - {"role", "content", "weight"} - self._chat.words[bool(values.get("tools"))]
        return sorted(unread)

    def _is_without_effect(self, name: str, records: Iterable[Record]) -> bool:
        """Whether the chat template writes all prompts of `records` with a variable, which some have, as without it."""
        found = False
        for record in records:
            values = template_values(record)
            if name in values:
                rest = {other: value for other, value in values.items() if other != name}
                earlier, found = self._messages(record)[:-1], True
                try:
                    one, other = (self._chat.apply(earlier, extra, add_generation_prompt=True) for extra in (values, rest))
                except CoraError:
                    raise
                except Exception:  # a template may need it
                    return False
                if one != other:
                    return False
        return found

    def spells_control_tokens(self, record: Mapping[str, Any]) -> bool:
        """Whether a text of the record spells a control token, which the tokenizer takes for the token itself.

        An end token at the end of the answer does not count.
        """
        messages = self._messages(record)
        texts = [str(message.get("content") or "") for message in messages]
        texts[-1] = self.without_end(texts[-1], self.ends)
        rest = [{key: value for key, value in message.items() if key not in ("role", "content")} for message in messages]
        # Together, since a record may have hundreds, in its tools.
        texts.append("\n".join(_strings([*rest, template_values(record) if self.schema == "messages" else {}])))
        return any(map(self._holds_control_token, texts))

    def spelled_tokens(self, text: str) -> frozenset[int]:
        """Ids of the special tokens that a text spells, but for those that end an answer."""
        return frozenset(index for spelled, index in self._chat.special.items() if spelled in text) - self.ends

    def without_end(self, text: str, tokens: Iterable[int]) -> str:
        """A text without those end `tokens` that it spells at its end, nor what stands behind them."""
        ends = tuple(filter(None, map(self.tokenizer.convert_ids_to_tokens, tokens)))
        while (bare := text.rstrip()).endswith(ends):
            text = bare[: -max(len(end) for end in ends if bare.endswith(end))]
        return text

    def _holds_control_token(self, text: str) -> bool:
        """Whether a text spells a control token, or becomes one as the tokenizer writes it, such as by NFKC or in lower case."""
        if self._control_tokens.search(text):
            return True
        normalizer = self.tokenizer.backend_tokenizer.normalizer if self.tokenizer.is_fast else None
        if normalizer is None or not self._control_tokens_in_any_case.search(normalizer.normalize_str(text)):
            return False
        ids = {*self.tokenizer(text, add_special_tokens=False)["input_ids"]} - {self.tokenizer.unk_token_id}
        return not ids.isdisjoint({*self._chat.control.values(), *self.ends})

    @property
    def _turn_ends(self) -> dict[bool, TurnEnd | None]:
        return self._chat.turn_ends if self.name == "chat" else {False: None, True: None}

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        turns = [turn.text for turn in self._turn_ends.values() if turn]
        return re.compile("|".join(map(re.escape, [*self._chat.control, *turns])) or r"(?!)")

    @cached_property
    def _control_tokens_in_any_case(self) -> re.Pattern[str]:
        return re.compile(self._control_tokens.pattern, re.IGNORECASE)

    def _render_chat(self, record: Mapping[str, Any]) -> Rendered:
        messages, extra = self._messages(record), template_values(record) if self.schema == "messages" else {}
        content, where = messages[-1].get("content"), place_of(record)
        turn = self._chat.turn_end(extra) if self.name == "chat" else None
        prompt, rendered, is_bare, conversation = self._asked(messages, extra, where)
        written = (
            rendered[len(prompt) :]
            if conversation is None
            else conversation.behind_prompt(content if isinstance(content, str) else "")
        )
        response, end = self._without_end(written or "", turn)
        missing = {message["role"] for message in messages[:-1] if not _is_written(message, prompt)}
        is_text = isinstance(content, str) and bool(content.strip()) and is_bare
        if conversation is None or conversation.begins_alike or (response.strip() and not is_text):
            # Some templates set thoughts apart anew.
            if isinstance(content, str) and not all(part.strip() in rendered for part in re.split("</?think>", content)):
                missing.add(messages[-1]["role"])
            lead = lead_of(response, content) if isinstance(content, str) and is_bare else ""
        elif isinstance(content, str):
            lead, end = conversation.lead(content), turn.token if turn else end
            response = lead + continued(prompt, content)
        else:
            # Some write a call of a tool otherwise next to an empty text than next to null.
            last = {**record["messages"][-1], "content": ""}
            found = self._render_chat(Record({**record, "messages": [*record["messages"][:-1], last]}, where))
            if not found.response:
                raise CoraError(f"{where}: the chat template gives the last message no text after the prompt")
            return found
        if any(own not in response for own in self._entries(messages[-1], "tools" in extra)):
            missing.add(messages[-1]["role"])
        closing = turn.closing if turn and (end == turn.token or (written or "").endswith(turn.after)) else None
        return Rendered(
            prompt,
            response,
            special_tokens=False,
            end=end,
            lead=lead,
            own_turn=conversation is None,
            left_out=tuple(sorted(missing | self._lost_calls(messages, extra))),
            closing=None if end in (None, closing) else closing,
        )

    def _asked(
        self, messages: Sequence[Mapping[str, Any]], extra: Mapping[str, Any], where: str
    ) -> tuple[str, str, bool, Conversation | None]:
        """The prompt, the rendered conversation, whether of its answer that has nothing but the text, and where it does not begin with the prompt,
        what the answer is to be found by. Raises `CoraError` where the template refuses the conversation."""
        try:
            with bounded(f"{where}: the chat template"):
                prompt = self._chat.apply(messages[:-1], extra, add_generation_prompt=True)
                rendered = self._chat.apply(messages, extra)
                is_bare = self._is_bare(messages, extra, rendered)
                conversation = None if rendered.startswith(prompt) else self._conversation(messages, extra, prompt, rendered)
        except CoraError:
            raise
        except UnsteadyTemplate as error:
            raise CoraError(f"{where}: the chat template {error}") from error
        except Exception as error:  # templates raise what they like
            why = reason(error)
            if ("content" in why or "None" in why) and any(message.get("content") is None for message in messages):
                why += "; it may need a text in every message, and one with calls of tools has none"
            raise CoraError(f"{where}: the chat template refuses the conversation: {why}") from error
        return prompt, rendered, is_bare, conversation

    def _entries(self, message: Mapping[str, Any], with_tools: bool) -> Iterator[str]:
        """The thoughts of an answer and the names of the tools that it calls, where they stand in entries that the chat template mentions."""
        for name in sorted(THOUGHTS & message.keys() & self._chat.words[with_tools]):
            if isinstance(message[name], str):
                yield message[name].strip()
        calls = message.get("tool_calls") if "tool_calls" in self._chat.words[with_tools] else None
        for call in calls if isinstance(calls, list) else []:
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                yield function["name"]

    def _lost_calls(self, messages: Sequence[dict[str, Any]], extra: Mapping[str, Any]) -> set[str]:
        """The roles of messages with a call of a tool that the chat template does not write, such as one next to a text, or behind another one.

        Each call gets a name of its own for that, since those of tools are in prompts anyway.
        """
        named = [with_names(message, f"{PROBE}{place}x") for place, message in enumerate(messages)]
        if "tool_calls" not in self._chat.words["tools" in extra] or not any(names for _, names in named):
            return set()
        renamed = [message for message, _ in named]
        prompt = rendered = ""
        try:
            if any(names for _, names in named[:-1]):
                prompt = self._chat.apply(renamed[:-1], extra, add_generation_prompt=True)
            if named[-1][1]:
                rendered = self._chat.apply(renamed, extra)
        except CoraError:
            raise
        except Exception:  # a template may know tools by their names
            return set()
        texts = [*[prompt] * (len(messages) - 1), rendered]
        return {
            message["role"]
            for (message, names), text in zip(named, texts, strict=True)
            if any(name not in text for name in names)
        }

    def _conversation(
        self, messages: Sequence[Mapping[str, Any]], extra: Mapping[str, Any], prompt: str, rendered: str
    ) -> Conversation:
        """A conversation that does not begin with its prompt."""
        try:
            earlier = self._chat.apply(messages[:-1], extra)
            probed = self._chat.apply([*messages[:-1], {"role": "assistant", "content": PROBE}], extra)
        except CoraError:
            raise
        except Exception:  # a template may refuse a conversation that neither asks for an answer nor has one
            return Conversation(rendered, prompt)
        return Conversation(rendered, prompt, earlier, probed)

    def _is_bare(self, messages: Sequence[Mapping[str, Any]], extra: Mapping[str, Any], rendered: str) -> bool:
        """Whether the template writes nothing of the answer but its text: no thoughts or calls of tools that stand in entries of their own."""
        bare = {name: value for name, value in messages[-1].items() if name in ("role", "content")}
        if len(bare) == len(messages[-1]):
            return True
        try:
            return self._chat.apply([*messages[:-1], bare], extra) == rendered
        except CoraError:
            raise
        except Exception:  # a template may need those entries where there is no text
            return False

    def _without_end(self, rest: str, turn: TurnEnd | None) -> tuple[str, int | None]:
        """The rendered answer without its end, and the id of the token that ends it (None: the tokenizer's end token)."""
        after = turn.after if turn else ""
        if turn and rest.endswith(turn.text + after):
            return rest.removesuffix(turn.text + after), turn.token
        # Another end than usual, such as Llama 3.1's after a call of a tool. Some templates begin the next answer behind every end, or write a text of
        # their own behind the last message, which is no end even where it has one itself.
        own = rest.removesuffix(after)
        is_text = own != rest and bool(self._control_tokens.sub("", after).strip())
        for bare in (own.rstrip(), *([] if is_text else [rest.rstrip()])):
            for text, token in self._chat.special.items():
                if bare.endswith(text):
                    return bare.removesuffix(text), token
        return own if is_text else rest, None

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The record as a conversation that ends with the answer."""
        if self.schema == "messages":
            messages = [_without_empty(message) for message in record["messages"]]
            if any(message.get("tool_calls") for message in messages):
                with_tools = "tools" in template_values(record)
                form = self._chat.forms_of_arguments[with_tools]
                messages = [with_arguments(message, form) for message in messages]
                if self._chat.needs_text[with_tools]:
                    return [{**message, "content": message.get("content") or ""} for message in messages]
            return messages
        if self.schema == "text":
            return [{"role": "assistant", "content": record["text"]}]
        if self.schema == "prompt":
            user, answer = record["prompt"], record["completion"]
        else:
            user = f"{record['instruction']}\n\n{record['input']}" if record["input"] else record["instruction"]
            answer = record["output"]
        return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def _strings(value: Any) -> Iterator[str]:
    """The texts in nested values, names included."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, str):
        yield value


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


def left_out_notice(counts: Mapping[str, int]) -> str:
    """Says that the chat template does not write the text of messages; `counts` has the number of records by role."""
    roles = ", ".join(f"{role} ({count} records)" for role, count in sorted(counts.items()))
    return f"the chat template leaves out text of messages of the roles {roles}, so the prompts and answers have nothing of it"


def end_notice(end: str) -> str:
    """Says that the chat template ends a turn with what is no token (`Template.end_as_text`)."""
    return (
        f"the chat template ends an answer with {end}, which the tokenizer has no token for: it is trained as text, in front of the end token, "
        "and references hold it; use a chat template that belongs to the tokenizer, or a model with that token"
    )


def plain_notice(tokenizer: Any) -> str:
    """Says that pairs of a prompt and an answer have no template, since none was named."""
    named = "chat renders them by the chat template" if tokenizer.chat_template else "alpaca renders them as instructions"
    return f"prompts and answers follow each other as they are (template plain); --template {named}"


def unread_notice(names: Sequence[str]) -> str:
    """Says that `Template.unread` found `names`."""
    return f"the chat template does not write {', '.join(names)}, so the prompts and answers have nothing of it"
