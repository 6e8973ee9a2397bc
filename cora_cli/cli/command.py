"""Turns a configuration dataclass and a function into a `cora` command with flags, a `--config` file and clean errors.

All commands share the same precedence (a flag overrides the file, the file overrides the default) and the same error handling.
"""

import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from cora_cli import writing
from cora_cli.cli.usage import GENERAL, Command
from cora_cli.environment import launched_processes, package_behind, variable_behind, variable_of_path
from cora_cli.errors import CoraError, UsageError, is_lost_process, is_out_of_memory, lost_process
from cora_cli.progress import interrupts_kept
from cora_cli.reading import integer_of, read_yaml
from cora_cli.settings import comma_separated, range_problems
from cora_cli.terminal import CLOSED_PIPE, complain

Config = TypeVar("Config")


@contextlib.contextmanager
def clean_errors(debug: bool, what_is_saved: Callable[[], str] | None = None) -> Iterator[None]:
    """Report an exception as one sentence on stderr and exit with its code; with `debug`, let the traceback through.

    `what_is_saved` tells the user of an interrupted command what is kept and how to go on.
    """
    try:
        with interrupts_kept():
            yield
            sys.stdout.flush()
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as error:
        complain(f"cora: interrupted; {what_is_saved()}" if what_is_saved else "cora: interrupted")
        raise typer.Exit(130) from error
    except BrokenPipeError as error:
        raise typer.Exit(CLOSED_PIPE) from error
    except SystemExit as error:
        complain(
            "cora: error: code that was imported, such as a model's own (--trust-remote-code), ended the program before the command was done"
        )
        raise typer.Exit(1) from error
    except Exception as error:
        if debug:
            raise
        message, code = (str(error), error.exit_code) if isinstance(error, CoraError) else (_described(error), 1)
        rank = os.environ.get("RANK", "0")
        process = "" if rank == "0" else f" (process {rank})"
        complain(f"cora: error{process}: {message}")
        raise typer.Exit(code) from error


def _described(error: Exception) -> str:
    """What an exception of Python or of a library says to a user: the file of an operating system's error, or what is exhausted."""
    detail = " ".join(str(error).split())[:400]
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        # A copy names what it reads and what it writes, and it is the latter that a full disk is about.
        named = error.filename2 if error.filename2 is not None and writing.is_disk_full(error) else error.filename
        place = os.fsdecode(named) if isinstance(named, str | bytes) else str(named)
        name = variable_of_path(place)
        return (
            f"{place} cannot be used: {error.strerror}{f'; the environment variable {name} names that place' if name else ''}"
        )
    if isinstance(error, UnicodeEncodeError):
        name = repr(writing.utf8(error.object)[:200])
        if sys.getfilesystemencoding() == "utf-8":
            return f"a library cannot use the name {name}, whose bytes are no UTF-8; choose another name"
        return f"a library cannot use the name {name} where the locale is not UTF-8; set PYTHONUTF8=1"
    if machine := _lacking(error, detail):
        return machine
    return _of_installation(error, detail) or (
        f"unexpected {type(error).__name__}: {detail} (run again with --debug for the traceback)"
    )


def _of_installation(error: Exception, detail: str) -> str | None:
    """The environment variable or the package at which a library failed, with the remedy; None for an error of another kind."""
    if (name := variable_behind(error)) is not None:
        return f"the environment variable {name} is {os.environ[name]!r}, which a library cannot use ({detail}); unset it"
    if (package := package_behind(error)) is not None:
        return f"{package}; install a version of it that fits the others, or uninstall it if nothing needs it"
    return None


def _lacking(error: Exception, detail: str) -> str | None:
    """What this machine or its processes lack, with the remedy; None for an error of another kind."""
    signs = (
        (
            # pathlib's words, and those of NLTK while it is imported
            (isinstance(error, RuntimeError) and "home directory" in detail) or "default download directory" in detail,
            "the home directory of this user is not known; set the environment variable HOME",
        ),
        (
            isinstance(error, FileNotFoundError) and not _has_working_directory(),
            "the working directory was removed; change to another one",
        ),
        (
            "No usable temporary directory" in detail,
            "there is no directory for temporary files that can be written; set the environment variable TMPDIR to one",
        ),
        (writing.is_disk_full(error), f"{writing.what_is_full(error)}: {detail}"),
        (is_lost_process(error), str(lost_process(error))),
        (
            is_out_of_memory(error),
            f"not enough memory; use smaller settings or a smaller model{f' ({detail})' if detail else ''}",
        ),
    )
    return next((sentence for holds, sentence in signs if holds), None)


def _has_working_directory() -> bool:
    try:
        return bool(Path.cwd())
    except FileNotFoundError:
        return False


def all_or_nothing(output: str | Path) -> str:
    """What an interrupted command leaves whose output appears all at once: it may have been there already when the interrupt came."""
    return f"{output} is complete: it appears all at once or not at all" if Path(output).exists() else "nothing was written"


def command(
    app: typer.Typer,
    name: str,
    config_class: type[Config],
    run: Callable[[Config], None],
    what_is_saved: Callable[[Config], str] | None = None,
    spreads: bool = False,
) -> None:
    """Register `cora NAME`: its flags are the fields of `config_class`, and it calls `run` with an instance of that class.

    `what_is_saved` says after an interrupt what is kept and how to go on. Several processes of a launcher share the work of a command that `spreads`;
    any other is refused in them, where each would do all of it.
    """
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    hints = typing.get_type_hints(config_class)

    def entry(**values: Any) -> None:
        debug = values.pop("debug")
        del values["config"]
        with clean_errors(debug):
            if not spreads and (count := launched_processes()) > 1:
                raise UsageError(
                    f"cora {name} runs in one process, not in {count}; start it without a launcher such as torchrun"
                )
            _refuse_texts(fields, values)
            config = config_class(**{field.name: _to_field(hints[field.name], values[field.name]) for field in fields})
            if problems := range_problems(config):
                raise UsageError("; ".join(problems))
            from cora_cli.cli.inputs import check_inputs

            check_inputs(config)
            with clean_errors(debug, (lambda: what_is_saved(config)) if what_is_saved else None):
                run(config)

    # `--help` shows a panel's flags together, wherever their fields stand.
    panels = list(dict.fromkeys(field.metadata["panel"] for field in fields))
    grouped = sorted(fields, key=lambda field: panels.index(field.metadata["panel"]))
    parameters = [_parameter(field, hints[field.name]) for field in grouped]
    entry.__signature__ = inspect.Signature([*parameters, *_common_parameters(hints)])  # type: ignore[attr-defined]
    entry.__doc__ = run.__doc__
    lists = frozenset(
        field.name
        for field in fields
        if _is_tuple(hints[field.name]) and not field.metadata["argument"] and not field.metadata["repeated"]
    )
    app.command(
        name,
        cls=type("Command", (Command,), {"lists": lists}),
        no_args_is_help=any(field.default is dataclasses.MISSING for field in fields),
    )(entry)


def _refuse_texts(fields: Iterable[dataclasses.Field], values: Mapping[str, Any]) -> None:
    """Raise `UsageError` for an empty text, as an unset variable of a shell gives, which is neither a value nor the default, and for one that no
    record can hold."""
    for field in fields:
        flag = (field.metadata["flags"] or (f"--{field.name.replace('_', '-')}",))[0]
        name = field.name if field.metadata["argument"] else flag
        value = values[field.name]
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and not one.strip(" ,"):
                raise UsageError(f"{name} is empty; give it a value, or leave it out")
            if isinstance(one, str) and not writing.is_storable(one):
                raise UsageError(f"{name} is {writing.utf8(one)}, whose bytes are no UTF-8; rename it")


def _common_parameters(hints: Mapping[str, Any]) -> list[inspect.Parameter]:
    def load(context: typer.Context, path: Path | None) -> Path | None:
        return _load_file(hints, context, path)

    config = typer.Option(
        "--config",
        help="YAML file with settings named like the flags; flags override it.",
        callback=load,
        is_eager=True,
        rich_help_panel=GENERAL,
    )
    debug = typer.Option("--debug", help="Show the full traceback of an error.", rich_help_panel=GENERAL)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter("config", kind, default=None, annotation=Annotated[Path | None, config]),
        inspect.Parameter("debug", kind, default=False, annotation=Annotated[bool, debug]),
    ]


def _parameter(field: dataclasses.Field, hint: Any) -> inspect.Parameter:
    meta = field.metadata
    flag_type: Any = hint
    if _is_tuple(hint):
        flag_type = list[str] if meta["argument"] or meta["repeated"] else str
        if type(None) in typing.get_args(hint):
            flag_type = flag_type | None
    options: dict[str, Any] = {"help": meta["help"], "rich_help_panel": meta["panel"]}
    flag = "--" + field.name.replace("_", "-")
    info: Any
    if meta["argument"]:
        info = typer.Argument(**options)
    else:
        if typing.get_args(hint) and float in typing.get_args(hint) and (words := _words(hint)):
            options |= {"parser": _number_or(words), "metavar": f"<number or {' or '.join(words)}>"}
            flag_type = Any
        # `--no-x` exists even where the default is off: a flag must be able to override a file that says true.
        info = typer.Option(
            *(meta["flags"] or (f"{flag}/--no-{flag[2:]}" if hint in (bool, bool | None) else flag,)), **options
        )
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    if isinstance(default, tuple):
        default = list(default) if flag_type == list[str] else ",".join(default)
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[flag_type, info])


def _is_tuple(hint: Any) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(typing.get_origin(option) is tuple for option in options)


def _words(hint: Any) -> tuple[str, ...]:
    """The words that a hint such as `float | Literal["auto"]` allows as well as a number."""
    return tuple(
        word for option in typing.get_args(hint) if typing.get_origin(option) is Literal for word in typing.get_args(option)
    )


def _number_or(words: tuple[str, ...]) -> Callable[[str], float | str]:
    """The parser of a flag that takes a number or one of the `words`."""

    def parse(text: str) -> float | str:
        if text in words:
            return text
        try:
            return float(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is neither a number nor {' or '.join(words)}.") from None

    return parse


def _is_text(hint: Any) -> bool:
    return str in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,))


def _is_integer(hint: Any) -> bool:
    return int in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,))


def _to_field(hint: Any, value: Any) -> Any:
    if not _is_tuple(hint) or value is None:
        return _at_home(value)
    return tuple(map(_at_home, comma_separated(value) if isinstance(value, str) else value))


def _at_home(value: Any) -> Any:
    """A path below `~`, which shells leave as it is in `--name=~/path` and a file always does; other values as they are."""
    return str(Path(value).expanduser()) if isinstance(value, str) and re.match("~[^/]*/", value) else value


def _load_file(hints: Mapping[str, Any], context: typer.Context, path: Path | None) -> Path | None:
    """Use the values of a YAML file as defaults of the flags. Unknown names are an error."""
    if path is None:
        return None
    with clean_errors("--debug" in sys.argv):
        context.default_map = {**(context.default_map or {}), **_read_file(path.expanduser(), hints, context)}
    return path


def _read_file(path: Path, hints: Mapping[str, Any], context: typer.Context) -> dict[str, Any]:
    names = _names_of_flags(context)
    texts = {name for name, parameter in names.items() if _is_tuple(hints[parameter]) or _is_text(hints[parameter])}
    values = read_yaml(path, "configuration file", lambda key: _plain(key) in texts)
    known = set(names)
    if unknown := sorted({_plain(key) for key in values} - known):
        near = {key: difflib.get_close_matches(key, known, n=1) for key in unknown}
        named = ", ".join(f"{key} (did you mean {near[key][0]}?)" if near[key] else key for key in unknown)
        raise UsageError(
            f"configuration file {path} has unknown keys: {named}"
            + ("" if all(near.values()) else f"; known keys: {', '.join(sorted(known))}")
        )
    given = _by_parameter(values, names, path)
    repeated = {
        str(parameter.name)
        for parameter in context.command.params
        if getattr(parameter, "nargs", 1) == -1 or getattr(parameter, "multiple", False)
    }
    for key, value in given.items():
        if value is None:
            continue
        if isinstance(value, list):
            if _is_text(hints[key]):
                raise UsageError(f"configuration file {path}: {key} takes a single value, not a list of {len(value)}")
            if odd := [item for item in value if not isinstance(item, bool | int | float | str)]:
                raise UsageError(f"configuration file {path}: {key} must be a list of texts, and {odd[0]!r} is none")
            given[key] = [str(item) for item in value] if key in repeated else ",".join(map(str, value))
        elif key in repeated:
            given[key] = [str(value)]
        elif not isinstance(value, bool | int | float | str):
            raise UsageError(f"configuration file {path}: {key} must be a single value or a list, not {value!r}")
        else:
            # As text, a value passes the same checks as a flag's: `rank: true` is refused rather than read as 1.
            exponent = integer_of(value) if isinstance(value, str) and _is_integer(hints[key]) else None
            given[key] = str(value if exponent is None else exponent)
    return {key: value for key, value in given.items() if value is not None}


def _plain(key: object) -> str:
    """A key of a file as flags are named in Python: `learning-rate` and `learning_rate` are one."""
    return str(key).replace("-", "_")


def _by_parameter(values: dict[str, Any], names: dict[str, str], path: Path) -> dict[str, Any]:
    """The values of a file by parameter. Raises `UsageError` for one that the file names twice, under different spellings."""
    given: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in values.items():
        parameter = names[_plain(key)]
        if (other := spelled.setdefault(parameter, str(key))) != str(key):
            raise UsageError(f"configuration file {path} sets the same option as {other!r} and as {key!r}; remove one of them")
        given[parameter] = value
    return given


def _names_of_flags(context: typer.Context) -> dict[str, str]:
    """Map each flag's long name, without leading dashes, to its parameter; `--no-x` and the common flags are left out."""
    names = {}
    for parameter in context.command.params:
        if parameter.name not in ("config", "debug", "help"):
            names[str(parameter.name)] = str(parameter.name)
            names |= {flag[2:].replace("-", "_"): str(parameter.name) for flag in parameter.opts if flag.startswith("--")}
    return names
