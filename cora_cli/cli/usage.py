"""The group of all commands: it reports a wrong command line as one sentence, as every other error is reported."""

import re
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from cora_cli.terminal import CLOSED_PIPE, abandon_closed_pipes, accept_any_text, complain

_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false"}
_OTHER_WORDS = (
    (r"Missing parameter: .*", "{place} is missing"),
    (r"Option '(?P<flag>[^']*)' requires an argument", "{flag} needs a value"),
    (r"Option '(?P<flag>[^']*)' does not take a value", "{flag} takes no value"),
    (r"Got unexpected extra arguments?(?:\(s\))? \((?P<extra>.*)\)", "there is no place for the argument {extra}"),
    (r"No such command '(?P<name>.*?)'(?:\. Did you mean '?(?P<near>.*?)'?\??)?", "there is no command {name!r}{near}"),
)


class Group(TyperGroup):
    """Runs a command line; see the module."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run a command line and leave with its exit code. Without `standalone_mode`, exceptions pass."""
        accept_any_text()
        alone = options.get("standalone_mode", True)
        options["standalone_mode"] = False
        if not alone:
            return super().main(*arguments, **options)
        try:
            code = super().main(*arguments, **options) or 0
            sys.stdout.flush()
        except typer.TyperException as error:
            code = error.exit_code
            if str(error).startswith("Usage:"):  # a command without its arguments shows its help
                print(error, file=sys.stderr)
            else:
                complain(f"cora: error: {usage_sentence(error)}")
        except typer.Abort:
            code = 1
            complain("cora: aborted")
        except BrokenPipeError:
            code = CLOSED_PIPE
        if code == CLOSED_PIPE:
            abandon_closed_pipes()
        sys.exit(code)


def usage_sentence(error: typer.TyperException) -> str:
    """What is wrong with a command line, with the offending value."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    place = max(parameter.opts, key=len) if parameter is not None else ""
    hint = f"; see `{context.command_path} --help`" if context is not None else ""
    if parameter is not None and error.__cause__ is not None:
        return f"{place} {_expected(error.__cause__)}"
    if (option := getattr(error, "option_name", None)) and hasattr(error, "possibilities"):
        near = " or ".join(sorted(error.possibilities or ()))
        return f"there is no option {option}" + (f"; did you mean {near}?" if near else hint)
    text = (str(error) or error.message).rstrip(".")
    for pattern, sentence in _OTHER_WORDS:
        if found := re.fullmatch(pattern, text, re.DOTALL):
            groups = {"place": place, **found.groupdict()}
            if "near" in groups:
                groups["near"] = f"; did you mean {groups['near']}?" if groups["near"] else hint
                return sentence.replace("{near}", groups.pop("near")).format(**groups)
            return sentence.format(**groups) + hint
    return f"{place} {text[:1].lower()}{text[1:]}".strip()


def _expected(cause: Any) -> str:
    """The end of the sentence for a value of the wrong type, from pydantic's description of it."""
    fault = cause.errors()[0]
    value = repr(fault["input"])
    shown = value if len(value) <= 60 else f"{value[:57]}…'"
    if choices := re.search(r"is not one of (.*?)\.?$", fault["msg"]):
        return f"must be one of {choices[1].replace(chr(39), '')}, not {shown}"
    kind = next((words for prefix, words in _KINDS.items() if fault["type"].startswith(prefix)), None)
    if fault["type"] == "int_parsing_size":
        return f"must be a shorter integer than {shown}"
    return f"must be {kind}, not {shown}" if kind else f"is {shown}: {fault['msg']}"
