"""A judge that is a model on this machine, decoded greedily."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from transformers import AddedToken

from cora_cli.data.chat import ChatTemplate, UnsteadyTemplate
from cora_cli.data.encode import check_rows, continuation, encode_prompt, tokens_within
from cora_cli.data.templates import Rendered, Template, reads_clock
from cora_cli.device import select_hardware
from cora_cli.errors import CoraError, reason
from cora_cli.evaluation.generate import end_tokens, say_left_out, transformers_engine
from cora_cli.evaluation.judge.asking import Call, NoReply, Reply
from cora_cli.evaluation.judge.config import JudgeConfig
from cora_cli.evaluation.thoughts import text_of, thought_tokens
from cora_cli.limits import bounded
from cora_cli.models.loading import context_length, load_model
from cora_cli.models.references import resolve_model
from cora_cli.models.tokenizer import load_tokenizer
from cora_cli.progress import say
from cora_cli.settings import today

_KEPT = ("single_word", "lstrip", "rstrip", "normalized")
_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"
_END = "}"


class LocalJudge:
    """See the module. The model is loaded with the first call.

    A chat template that writes the date writes that of the settings, else `date`, else today's, whatever the day is.
    """

    def __init__(self, config: JudgeConfig, date: str | None = None) -> None:
        assert config.judge_model is not None
        self._config, self._model = config, resolve_model(config.judge_model)
        self.has_replied = True
        if self._model.is_adapter:
            raise CoraError(
                f"{config.judge_model} is an adapter, not a complete model; merge it first with `cora merge {config.judge_model}`"
            )
        self._hardware = select_hardware(config.device, config.dtype)
        self._tokenizer = load_tokenizer(self._model, config.trust_remote_code)
        self._loaded: Any = None
        writes_date = bool(self._tokenizer.chat_template) and reads_clock("chat", self._tokenizer)
        if config.template_date and not writes_date:
            raise CoraError(
                f"--template-date has no effect: the chat template of {self._model.reference} writes no date; leave it out"
            )
        self._date = config.template_date or date or today()
        self._chat = ChatTemplate(self._tokenizer, self._date) if self._tokenizer.chat_template else None
        if self._chat is not None:
            # Those that the tokenizer does not call special would not be split in a message.
            control = self._chat.control
            own = [token for token in self._tokenizer.added_tokens_decoder.values() if not token.special]
            self._tokenizer.add_tokens([_special(token) for token in own if token.content in control], special_tokens=True)
        self.identity = {
            "model": self._model.reference,
            "model_sha256": self._model.content_hash(),
            "tokenizer_sha256": self._model.tokenizer_hash(),
            "dtype": self._hardware.dtype_name,
            "max_tokens": config.max_tokens,
            "tokens": "of the complete text",  # earlier versions took those of its parts
            "asked_again": "from the opening of the object to its end",
            **({"own_code": True} if config.trust_remote_code and self._model.has_own_code else {}),
            **({"template_date": self._date} if writes_date else {}),
        }

    def ask(self, calls: Sequence[Call], allowed: Callable[[Call], bool]) -> Iterator[tuple[Call, Reply | NoReply]]:
        """See `Judge`; the calls of one batch are answered together."""
        for held in (False, True):
            if alike := [call for call in calls if bool(call.opening) is held]:
                yield from self._answer(alike, allowed)

    def _answer(self, calls: Sequence[Call], allowed: Callable[[Call], bool]) -> Iterator[tuple[Call, Reply | NoReply]]:
        """The replies to calls that all have an opening, or all none."""
        if self._loaded is None:
            say(f"{self._model.reference}: {self._hardware.describe()}")
            say_left_out(self._model)
            self._loaded = load_model(
                self._model, self._hardware.dtype, self._hardware.device, None, self._config.trust_remote_code
            )
        room = context_length(self._loaded.config) - self._config.max_tokens
        prompts = [self._encode(call.message, call.opening) for call in calls]
        for ids in prompts:
            check_rows(ids, self._loaded.get_input_embeddings().weight.shape[0], self._model.reference, self._tokenizer)
        fitting = [place for place, ids in enumerate(prompts) if len(ids) <= room and allowed(calls[place])]
        for call, ids in zip(calls, prompts, strict=True):
            if len(ids) > room:
                reason = f"the message of {len(ids)} tokens and a reply of {self._config.max_tokens} exceed the judge's context"
                yield call, NoReply(reason, paid=False, last=True)
        if not fitting:
            return
        ends = end_tokens(self._loaded.generation_config.eos_token_id, self._ends)
        if calls[0].opening:
            # A closing brace ends the object, whatever else its token holds.
            ends = sorted({*ends, *(index for piece, index in self._tokenizer.get_vocab().items() if _END in piece)})
        settings = (self._config.batch_size, self._config.max_tokens)
        engine = transformers_engine(self._loaded, self._tokenizer, ends, [prompts[place] for place in fitting], *settings)
        for start in range(0, len(fitting), engine.wave):
            wave = fitting[start : start + engine.wave]
            answers = engine.answer([prompts[place] for place in wave], lambda: None)
            for place, ids in zip(wave, answers, strict=True):
                call = calls[place]
                text = call.opening + text_of(self._tokenizer, ids, thought_tokens(self._tokenizer))
                if call.opening and _END in text:
                    text = text[: text.index(_END) + len(_END)]
                yield (
                    call,
                    Reply(text, len(prompts[place]), len(ids), self._model.reference, len(ids) >= self._config.max_tokens),
                )

    def _encode(self, message: str, opening: str = "") -> list[int]:
        """The tokens of a conversation with this message, and of the reply's opening, as those of one text; what spells a control token in the message
        is text.
        """
        before, after = self._around
        shown = self._shown(message)
        # The template may leave out spaces around the message.
        asked = shown[len(before) : len(shown) - len(after)]
        rendered = Rendered(shown, opening, special_tokens=self._chat is None)
        prompt, begun = encode_prompt(rendered, self._tokenizer), None
        if (text := tokens_within(asked, self._tokenizer, as_text=True)) == tokens_within(asked, self._tokenizer):
            begun = continuation(rendered, prompt, self._tokenizer)
        else:
            start = encode_prompt(dataclasses.replace(rendered, prompt=before), self._tokenizer)
            prompt = [*start, *text, *tokens_within(after, self._tokenizer)]
        return [*prompt, *(tokens_within(opening, self._tokenizer) if begun is None else begun)]

    @cached_property
    def _ends(self) -> set[int]:
        """Ids of the tokens that end a reply."""
        if not self._tokenizer.chat_template:
            return {self._tokenizer.eos_token_id}
        return Template("chat", "messages", self._tokenizer).ends

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What stands before and after a message."""
        shown = self._shown(_PLACE)
        if (count := shown.count(_PLACE)) != 1:
            raise CoraError(
                f"the chat template of {self._model.reference} writes the message of the user {count} times, not once; use another judge"
            )
        before, after = shown.split(_PLACE)
        return before, after

    def _shown(self, message: str) -> str:
        """The text of a conversation with this message, up to the reply."""
        if self._chat is None:
            return f"{message}\n\n"
        whose = f"the chat template of {self._model.reference}"
        try:
            with bounded(whose):
                return self._chat.apply([{"role": "user", "content": message}], {}, add_generation_prompt=True)
        except CoraError:
            raise
        except UnsteadyTemplate as error:
            raise CoraError(f"{whose} {error}") from error
        except Exception as error:  # templates raise what they like
            raise CoraError(f"{whose} refuses a message of the user: {reason(error)}") from error


def _special(token: AddedToken) -> AddedToken:
    """An added token as a special one, which takes the spaces around it as before."""
    return AddedToken(token.content, special=True, **{name: getattr(token, name) for name in _KEPT})
