"""Read text, JSON, JSON Lines and YAML files: the result is a value of the expected shape, or one sentence that names the file.

Whatever valid or invalid content a file holds (wrong types, nesting without end, numbers of 5,000 digits, half a surrogate pair, one
key twice), no other exception than `CoraError` leaves this module. `records` holds the shapes of our own files.
"""

import functools
import json
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from cora_cli.errors import CoraError, UsageError

_HALF_PAIR = re.compile(r"[\ud800-\udfff]")
_LARGEST_INTEGER = 2**63
_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_YAML_VALUES = 100_000
"""More values than any configuration has; aliases of aliases reach billions in a few lines."""


class Malformed(ValueError):
    """Text that is not valid JSON. `line` is the line of the fault within the text, if known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def parse_json(text: str) -> Any:
    """The value of a JSON document, which may begin with a byte order mark, as editors on Windows write it.

    Raises `Malformed` with the reason, also for a key that an object names twice.
    """
    value, end = decode_json(text, _first(text, 1 if text.startswith("\ufeff") else 0))
    if (rest := _first(text, end)) < len(text):
        raise Malformed(f"nothing may follow the value, found {text[rest : rest + 20]!r}", text.count("\n", 0, rest) + 1)
    return value


def decode_json(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that starts at `start`, and where it ends. Raises `Malformed` with the reason."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise Malformed(error.msg, error.lineno) from error
    except RecursionError as error:
        raise Malformed("it is nested too deeply") from error
    except Malformed:
        raise
    except ValueError as error:  # Python refuses to convert integers of more than 4,300 digits
        raise Malformed("it holds a number with too many digits") from error
    # The value's own text alone: an array of many records is decoded one by one.
    if text.find("\\u", start, end) >= 0 and (half := _half_pair(value)):
        raise Malformed(f"it holds {half!a}, which is half of a character and no text")
    return value, end


def _first(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object as a dictionary, which alone would silently keep the last of two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise Malformed(f"the key {repeated[:60]!r} occurs twice in one object; remove one of them")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _half_pair(value: Any) -> str | None:
    """The first lone surrogate in the texts of a value, which no file can store."""
    if isinstance(value, str):
        found = _HALF_PAIR.search(value)
        return found.group() if found else None
    parts: list[Any] = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((half for part in parts if (half := _half_pair(part))), None)


def refuse_pointer(path: Path) -> None:
    """Raise `CoraError` for what a clone without Git LFS has in place of a large file."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(_POINTER))
    except OSError:  # reported where the file is read
        return
    _refuse_pointer(begin, path)


def _refuse_pointer(content: bytes, path: Path) -> None:
    if content.startswith(_POINTER):
        raise CoraError(
            f"{path} is only a pointer of Git LFS, in place of the file itself; fetch it with `git lfs pull`, or download it again"
        )


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises `CoraError` naming the file if it is missing, unreadable, not text, or a pointer of Git LFS."""
    return decoded(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises `CoraError` naming the file if it is missing, unreadable, or a pointer of Git LFS."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CoraError(f"{path} does not exist") from error
    except OSError as error:
        raise CoraError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a name with a zero byte
        raise CoraError(f"{str(path)!r} cannot be the name of a file: {error}") from error
    _refuse_pointer(content, path)
    return content


def decoded(content: bytes, path: Path, remedy: str = "") -> str:
    """The text of a file's UTF-8 content. Raises `CoraError`, ending in the `remedy`, that names the first byte that is none and its line."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CoraError(f"{path} is not UTF-8 text (byte 0x{content[error.start]:02x} in line {line}){remedy}") from error


def read_json(path: Path, shape: Any = Any) -> Any:
    """Read a JSON file whose value has `shape`, a type such as `dict[str, float]` or one of `records`.

    Raises `CoraError` naming the file and the place in it if it is missing, malformed or of another shape.
    """
    try:
        value = parse_json(read_text(path))
    except Malformed as error:
        line = f"line {error.line}: " if error.line else ""
        raise CoraError(f"{path} is not valid JSON: {line}{error}") from error
    return checked(value, shape, path)


def read_foreign(path: Path, shape: Any) -> Any:
    """As `read_json`, for a file of another program, of which there are no versions of ours."""
    if fault := fault_of(value := read_json(path), shape):
        raise CoraError(f"{path} is damaged: {fault}")
    return value


def read_jsonl(path: Path, shape: Any = Any, *, drop_partial_tail: bool = False) -> list[Any]:
    """Read one JSON document of `shape` per line, skipping blank lines.

    With `drop_partial_tail`, a last line without a newline is ignored: a killed writer leaves one.
    Raises `CoraError` naming the file and the line if one is malformed or of another shape.
    """
    found = read_numbered(path, drop_partial_tail=drop_partial_tail)
    return [checked(record, shape, f"{path}, line {number},") for number, record in found]


def read_numbered(path: Path, *, drop_partial_tail: bool = False) -> Iterator[tuple[int, Any]]:
    """The JSON documents of a file with the numbers of their lines; see `read_jsonl`."""
    if drop_partial_tail:
        # Half a character at the end belongs to the line that is dropped.
        try:
            text = path.read_bytes().rpartition(b"\n")[0].decode("utf-8")
        except (OSError, ValueError):
            text = read_text(path)
    else:
        text = read_text(path)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line)
        except Malformed as error:
            raise CoraError(f"{path}, line {number}: not valid JSON ({error}): {line.strip()[:60]!r}") from error


def checked(value: Any, shape: Any, where: object) -> Any:
    """`value` itself. Raises `CoraError` that starts with `where` and names the part that does not have `shape`."""
    if fault := fault_of(value, shape):
        raise CoraError(f"{where} is damaged or from another version of cora: {fault}")
    return value


def fault_of(value: Any, shape: Any, place: str = "") -> str | None:
    """What keeps a JSON value from having the type `shape`, such as "plan.rank must be an integer, not 'x'"; None if it has it."""
    known = _anatomy(shape)
    if known.origin in (types.UnionType, typing.Union):
        return _fault_of_union(value, shape, place)
    if (found := _parts(value, known)) is not None:
        inside = f"{place}." if place and isinstance(value, dict) else place
        if missing := sorted(known.required - value.keys()) if known.required else ():
            return f"{inside}{missing[0]} is missing"
        for key, part, kind in found:
            if fault := fault_of(part, kind, f"{inside}{key}"):
                return fault
        return None
    one_of = known.origin is Literal
    if shape is Any or (value in known.arguments if one_of else known.origin is None and _fits(value, shape)):
        return None
    return _wrong(value, shape, place)


def _fault_of_union(value: Any, shape: Any, place: str) -> str | None:
    faults = []
    for part in _anatomy(shape).arguments:
        if (fault := fault_of(value, part, place)) is None:
            return None
        faults.append(fault)
    # The alternative of the value's own kind says where in it the fault is.
    inner = [fault for fault in faults if not fault.startswith(f"{place or 'it'} must be")]
    return inner[0] if inner else _wrong(value, shape, place)


class _Anatomy(typing.NamedTuple):
    """A type taken apart: `hints` and `required` keys are those of a typed dictionary."""

    origin: Any
    arguments: tuple[Any, ...]
    hints: dict[str, Any] | None
    required: frozenset[str]


@functools.cache
def _anatomy(shape: Any) -> _Anatomy:
    """The parts of a type, which a file of many lines asks for again and again."""
    typed = typing.is_typeddict(shape)
    hints, required = (typing.get_type_hints(shape), shape.__required_keys__) if typed else (None, frozenset())
    return _Anatomy(typing.get_origin(shape), typing.get_args(shape), hints, required)


def _parts(value: Any, shape: _Anatomy) -> list[tuple[str, Any, Any]] | None:
    """Name, value and expected type of each part of a list or an object; None if `shape` is neither, or `value` another kind."""
    origin, kinds = shape.origin, shape.arguments
    if isinstance(value, dict):
        if shape.hints is not None:
            return [(key, value[key], kind) for key, kind in shape.hints.items() if key in value]
        return [(key, part, kinds[1]) for key, part in value.items()] if origin is dict else None
    if isinstance(value, list) and (origin is list or (origin is tuple and len(kinds) == len(value))):
        each = kinds if origin is tuple else kinds * len(value)
        return [(f"[{index}]", part, kind) for index, (part, kind) in enumerate(zip(value, each, strict=True))]
    return None


def _wrong(value: Any, shape: Any, place: str) -> str:
    return f"{place or 'it'} must be {_in_words(shape)}, not {_shown(value)}"


def _fits(value: Any, kind: type) -> bool:
    if kind in (int, float) and type(value) is int:
        return -_LARGEST_INTEGER <= value < _LARGEST_INTEGER
    if kind is float:
        return type(value) is float and math.isfinite(value)
    return type(value) is kind


def _in_words(shape: Any) -> str:
    origin, parts = typing.get_origin(shape), typing.get_args(shape)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_in_words(part) for part in parts)
    if origin is Literal:
        return f"{'one of ' if len(parts) > 1 else ''}{', '.join(map(str, parts))}"
    if origin is tuple:
        return f"a list of {len(parts)} values"
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", types.NoneType: "null"}
    return names.get(shape, "a list" if origin is list else "a JSON object")


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a JSON object" if isinstance(value, dict) else f"a list of {len(value)} values"
    if isinstance(value, int) and abs(value) >= _LARGEST_INTEGER:
        return "an integer of more than 63 bits"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def number(value: object) -> float | None:
    """A number of a YAML file, or the number that a text of it spells; None for anything else.

    YAML 1.1 reads 1e-4, without a decimal point, as text.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):  # an integer of hundreds of digits
        return None


def integer_of(value: object) -> int | None:
    """An integer of a YAML file, or the one that a text writes in exponent form, as 1e3; None for anything else, such as 8.0 and 1e-3."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,9}\.?\d{0,9}[eE]\+?\d{1,2}", value, re.ASCII):
        found = float(value)
        return int(found) if found.is_integer() and abs(found) < 2**53 else None
    return value if type(value) is int else None


def read_yaml(path: Path, what: str, is_text: Callable[[str], bool] = lambda key: False) -> dict[str, Any]:
    """Read a user's YAML file of `name: value` lines; an empty file gives an empty dictionary.

    `what` describes the file and starts every error message. Values of the keys that `is_text` are text: an integer is taken as it is
    written (2026_11_26), since folders and data sets have such names, and what YAML would turn into something else (no, 1.10) is refused. Raises `UsageError` if the file cannot be read, is not valid YAML
    or is not a mapping.
    """
    import yaml

    def refuse(reason: str, error: Exception | None = None) -> NoReturn:
        raise UsageError(f"{what} {path} is not valid YAML: {reason}") from error

    def as_text(key: str, node: yaml.Node) -> None:
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            kind = item.tag.rpartition(":")[2]
            if kind in ("bool", "float"):
                raise UsageError(
                    f"{what} {path}, line {item.start_mark.line + 1}: {key} must be text, but YAML reads {item.value} as "
                    f"{'true or false' if kind == 'bool' else 'a number'}; quote it if you mean the text"
                )
            if kind == "int":
                item.tag = "tag:yaml.org,2002:str"

    class Strict(yaml.SafeLoader):
        """Refuses duplicate keys in a mapping; plain YAML would silently keep the last one."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            if repeated := sorted({name for name in names if isinstance(name, str) and names.count(name) > 1}):
                raise UsageError(f"{what} {path} has the key {repeated[0]!r} twice in the same mapping; remove one of them")
            return super().construct_mapping(node, deep)

        def number(self, node: yaml.ScalarNode) -> int | float:
            """A number as it reads: YAML 1.1 takes 010 for the octal number 8, and 1:30 for 90."""
            integer = node.tag.endswith(":int")
            value = self.construct_yaml_int(node) if integer else self.construct_yaml_float(node)
            written = node.value.replace("_", "")
            if ":" in written or (integer and written.lstrip("+-").isdecimal() and int(written) != value):
                refuse(
                    f"line {node.start_mark.line + 1}: YAML reads {node.value} as {value}; write {value} if you mean that, or quote it"
                )
            return value

        def text(self, node: yaml.ScalarNode) -> str:
            """A date as it is written: no setting is a moment in time."""
            return str(node.value)

    Strict.add_constructor("tag:yaml.org,2002:int", Strict.number)
    Strict.add_constructor("tag:yaml.org,2002:float", Strict.number)
    Strict.add_constructor("tag:yaml.org,2002:timestamp", Strict.text)
    try:
        loader = Strict(read_text(path))
        node = loader.get_single_node()
        # Before any value is made: merging `<<` already copies what an alias stands for.
        if node is not None and _count_values(node, {}) > _MOST_YAML_VALUES:
            refuse(f"its aliases stand for more than {_MOST_YAML_VALUES:,} values")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key.value, str) and is_text(key.value):
                    as_text(key.value, value)
        values = None if node is None else loader.construct_document(node)
    except UsageError:
        raise
    except CoraError as error:
        raise UsageError(f"{what} {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        refuse(f"{f'line {mark.line + 1}, column {mark.column + 1}: ' if mark else ''}{error.problem or error.context}", error)
    except yaml.YAMLError as error:
        # The reader's own message names a "<unicode string>" instead of the file.
        refuse(f"it holds a control character or another that YAML forbids ({getattr(error, 'reason', error)})", error)
    except RecursionError as error:
        refuse("it is nested too deeply", error)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:  # a date that is none, an odd tag
        refuse(f"a value cannot be read ({' '.join(str(error).split())[:120]})", error)
    if half := _half_pair(values):
        refuse(f"it holds {half!a}, which is half of a character and no text")
    if values is not None and not isinstance(values, dict):
        raise UsageError(f"{what} {path} must hold `name: value` lines, not a {type(values).__name__}")
    return values or {}


def _count_values(node: Any, known: dict[int, float]) -> float:
    """The number of values that a YAML node stands for, aliases written out; infinite if it contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = node.value if isinstance(node.value, list) else []
        flat = [part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_count_values(part, known) for part in flat)
    return known[id(node)]
