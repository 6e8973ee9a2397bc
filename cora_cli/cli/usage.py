"""The group of all commands, which reports a wrong command line as one sentence, as every other error is reported; and their `--help`."""

import contextlib
import itertools
import re
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from cora_cli.terminal import CLOSED_PIPE, abandon_closed_pipes, accept_any_text, complain

_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false"}
_OTHER_WORDS = (
    (r"Missing parameter: .*", "{place} is missing"),
    (r"Option '(?P<flag>[^']*)' requires an argument", "{flag} needs a value"),
    (r"Option '(?P<flag>[^']*)' does not take a value", "{flag} takes no value"),
    (r"Got unexpected extra arguments?(?:\(s\))? \((?P<extra>.*)\)", "there is no place for the argument {extra}"),
    (r"No such command '(?P<name>.*?)'(?:\. Did you mean '?(?P<near>.*?)'?\??)?", "there is no command {name!r}{near}"),
)
GENERAL = "General"
"""The panel of the flags that all commands have."""
_LONGEST_CHOICES = 48
_INPUTS = ("dataset", "test_dataset", "model", "config")
"""Options of which a user may think that all values count where there are several, while the last one would."""


class Command(TyperCommand):
    """A command whose help has a heading for each panel of flags, in plain text; rich takes twice as long."""

    lists: frozenset[str] = frozenset()
    """The options that take several values with commas between them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line. Raises `BadParameter` for an input or a list that is given twice, with different values."""
        for parameter in self.get_params(ctx):
            is_list = parameter.name in self.lists
            asked = is_list or parameter.name in _INPUTS
            given = [value for flag in parameter.opts for value in _values_of(flag, args)] if asked else []
            if len(set(given)) > 1:
                flag = parameter.opts[0]
                takes = f"takes its values in one list: {flag} {','.join(given)}" if is_list else "takes one value; give one"
                raise typer.BadParameter(f"{flag} is given several times ({', '.join(given)}), but {takes}")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and flags under the headings of their panels, in the order in which the first of each is declared."""
        panels: dict[str, list[tuple[str, str]]] = {}
        parameters = self.get_params(ctx)
        plain = all(getattr(parameter, "rich_help_panel", None) in (None, GENERAL) for parameter in parameters)
        for parameter in parameters:
            if (record := parameter.get_help_record(ctx)) is not None:
                heading = getattr(parameter, "rich_help_panel", None) or GENERAL
                if parameter.param_type_name == "argument":
                    heading = "Arguments"
                elif plain:
                    heading = "Options"
                panels.setdefault(heading, []).append(_with_choices_in_help(*record))
        for heading, records in panels.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _values_of(flag: str, args: list[str]) -> list[str]:
    """What a command line gives to a flag, each time that it has it."""
    own = args[: args.index("--")] if "--" in args else args
    apart = [value for name, value in itertools.pairwise(own) if name == flag]
    return [*apart, *(one.removeprefix(f"{flag}=") for one in own if one.startswith(f"{flag}="))]


def _with_choices_in_help(flag: str, text: str) -> tuple[str, str]:
    """Move choices too long for a line from the flag, `--mode <lora|dora|…>`, into its help."""
    found = re.fullmatch(r"(--([\w-]+)) <([^<>]*\|[^<>]*)>", flag)
    if found is None or len(flag) <= _LONGEST_CHOICES:
        return flag, text
    body, bracket, default = text.partition("  [")
    return f"{found[1]} <{found[2]}>", f"{body} One of {found[3].replace('|', ', ')}.{bracket}{default}"


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
        except OSError as error:  # a command has its own errors, so this is one of help: its place is full, for example
            code = 1
            with contextlib.suppress(OSError):
                complain(f"cora: error: the output cannot be written: {error.strerror or error}")
            abandon_closed_pipes()
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
