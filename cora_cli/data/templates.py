"""Turn a record into the prompt that the model sees and the response that it should give.

There are three templates: `alpaca` (Stanford Alpaca's two forms), `chat` (the tokenizer's own) and `plain` (the prompt as it
is). Tokenization is done by `encode`.
"""

import dataclasses
from typing import Any, Literal

from cora_cli.data.formats import Record, Schema
from cora_cli.errors import CoraError
from cora_cli.limits import bounded

TemplateName = Literal["auto", "alpaca", "chat", "plain"]

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
    """A record as text. `special_tokens` says whether the tokenizer still has to add its start token before `prompt`."""

    prompt: str
    response: str
    special_tokens: bool


def choose_template(template: TemplateName, schema: Schema, tokenizer: Any) -> TemplateName:
    """Resolve `auto`: the tokenizer's chat template if it has one, else Alpaca's; `plain` for prompt/completion pairs.

    Raises `CoraError` if `chat` is needed and the tokenizer has no template, or if chat messages get another template.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "auto":
        template = "chat" if schema == "messages" or (schema == "alpaca" and has_chat) else "alpaca"
        if schema == "prompt":
            template = "plain"
    if template == "chat" and not has_chat:
        raise CoraError("this needs a chat template (template chat, or data with chat messages), but the tokenizer has none")
    if schema == "messages" and template != "chat":
        raise CoraError(f"chat messages need --template chat, not {template}")
    return template


def render(record: Record, schema: Schema, template: TemplateName, tokenizer: Any) -> Rendered:
    """Render one record with a template from `choose_template`.

    In a conversation of several turns the last answer is the response, and everything before it is the prompt.
    """
    if template == "chat":
        messages, response = _as_messages(record, schema)
        with bounded("the chat template"):
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return Rendered(prompt, response, special_tokens=False)
    if schema == "prompt":
        instruction, given, response = record["prompt"], "", record["completion"]
    else:
        instruction, given, response = record["instruction"], record["input"], record["output"]
    if template == "plain":
        return Rendered(f"{instruction}\n{given}" if given else instruction, response, special_tokens=True)
    form = ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT
    return Rendered(form.format(instruction=instruction, input=given), response, special_tokens=True)


def _as_messages(record: Record, schema: Schema) -> tuple[list[dict[str, str]], str]:
    if schema == "messages":
        return record["messages"][:-1], record["messages"][-1]["content"]
    if schema == "prompt":
        return [{"role": "user", "content": record["prompt"]}], record["completion"]
    user = f"{record['instruction']}\n\n{record['input']}" if record["input"] else record["instruction"]
    return [{"role": "user", "content": user}], record["output"]
