"""The connection between the tests and the program, which run in two sandboxes: values as JSON, everything else as references.

Numbers, text and other immutable values are copied. A list, dict, set and the like exists on both sides under one name, and each message carries
the contents of those that changed, so that a function may modify its arguments and may return one of them. Other objects stay where they are; the
other side gets a stand-in (see `Peer.stand_in`). Nothing that arrives is executed, so the tests can talk to a program that they do not trust.
"""

import abc
import array
import builtins
import collections
import contextlib
import json
import os
import struct
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

LARGEST_FRAME = 32 << 20
BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and_", "or_", "xor", "matmul")
IN_PLACE = ("iadd", "isub", "imul", "iand", "ior", "ixor")
"""The operations of `operator` that the tests may ask for on an object of the program."""
METHODS = (
    *("hash", "call", "len", "iter", "next", "contains", "reversed", "getitem", "setitem", "delitem"),
    *("enter", "exit", "aenter", "aexit", "aiter", "anext"),
    *("bool", "int", "float", "complex", "round", "abs", "neg", "pos", "invert", "index", "divmod"),
    *(name.strip("_") for name in (*BINARY, *IN_PLACE)),
)
"""The special methods, without their underscores, that objects have or have not: of an object of the program, the tests know which."""
_EXACT = 2**53
_SHARED: dict[str, Any] = {
    one.__name__: one
    for one in (
        list,
        dict,
        set,
        bytearray,
        collections.deque,
        collections.Counter,
        collections.OrderedDict,
        collections.defaultdict,
        array.array,
    )
}
_EMPTY: dict[str, Callable[[Any], Any]] = {
    "deque": lambda most: collections.deque(maxlen=most),
    "array": lambda code: array.array(code, ()),
}
"""Containers that are made with their last part: the greatest length, the type of the items."""
_FUNCTIONS = [
    "abs",
    "all",
    "any",
    "ascii",
    "bin",
    "chr",
    "divmod",
    "format",
    "hash",
    "hex",
    "id",
    "iter",
    "len",
    "max",
    "min",
    "next",
    "oct",
    "ord",
    "pow",
    "print",
    "repr",
    "round",
    "sorted",
    "sum",
]
_BUILTIN = {name: one for name, one in vars(builtins).items() if isinstance(one, type) or name in _FUNCTIONS}
_CONSTANTS = {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}
_TEXTUAL = {
    ("datetime", "date"),
    ("datetime", "datetime"),
    ("datetime", "time"),
    ("decimal", "Decimal"),
    ("fractions", "Fraction"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("uuid", "UUID"),
}


_OF_FILES = frozenset({"filename", "filename2", "strerror"})
"""What an OSError has apart from its arguments."""


class Broken(Exception):
    """The other side ended, or sent something that is no message."""


class Unsupported(Exception):
    """A value that cannot be sent to the other side."""


class Peer(abc.ABC):
    """One end of the connection. Subclasses decide what the other side may ask for (`answer`), and what represents its objects here."""

    def __init__(self, receiving: int, sending: int, prefix: str) -> None:
        self._receiving, self._sending, self._prefix = receiving, sending, prefix
        self._given = 0
        self._lock = threading.RLock()
        """Held from a request to its answer, so that threads wait for each other."""
        self._met: list[str] = []
        self._objects: dict[str, Any] = {}
        """Objects by name: containers that both sides have, and others that this side has given a name."""
        self._names: dict[int, str] = {}
        self._methods: dict[tuple[int, int | str], Any] = {}
        """Methods by their object and function: each look-up of one makes another object."""
        self._contents: dict[str, Any] = {}
        """What the other side knows to be in each container, as sent or received last."""

    @abc.abstractmethod
    def answer(self, request: dict[str, Any]) -> Any:
        """Do what the other side asks for, and return the value to send back."""

    @abc.abstractmethod
    def stand_in(self, name: str, facts: dict[str, Any]) -> Any:
        """What represents an object of the other side here."""

    @abc.abstractmethod
    def name_of_stand_in(self, value: Any) -> str | None:
        """The name that the other side gave to what `value` represents; None if it represents nothing."""

    @abc.abstractmethod
    def facts(self, value: Any) -> dict[str, Any]:
        """What the other side needs to know of an object here. Raises `Unsupported` if it may not have it."""

    @abc.abstractmethod
    def raised(self, error: dict[str, Any]) -> BaseException:
        """The exception for one that was raised on the other side."""

    def request(self, operation: str, *values: Any) -> Any:
        """Ask the other side to do something, and return its answer or raise its exception; it may ask back meanwhile."""
        with self._lock:
            self.send({"do": operation, "with": [self.encode(value) for value in values]})
            while True:
                message = self.receive()
                if "do" in message:
                    self.serve(message)
                elif "error" in message:
                    raise self.raised(message["error"])
                else:
                    return self.decode(message["value"])

    def serve(self, message: dict[str, Any]) -> None:
        """Answer one request. Other threads may make requests of their own meanwhile."""
        try:
            answer = self.answer(message)  # kept until it is sent
            with self._lock:
                reply = {"value": self.encode(answer)}
        except Broken:
            raise
        except BaseException as error:  # a program may raise SystemExit, or anything of its own
            reply = {"error": self.describe(error)}
        with self._lock:
            self.send(reply)

    def describe(self, error: BaseException) -> dict[str, Any]:
        """An exception for the other side: its classes with their modules, arguments that are plain values, its own attributes, and its text."""
        try:
            text = str(error)[:500]
        except BaseException:  # `__str__` of a program's class
            text = ""
        plain = [one for one in error.args if type(one) in (str, int, float, bool, bytes, type(None))][:5]
        classes = [(one.__module__, one.__name__) for one in type(error).__mro__ if issubclass(one, BaseException)]
        number = error.errno if isinstance(error, OSError) else None
        attributes: dict[str, Any] = {}
        own = (one for one in type(error).__mro__ if one.__module__ not in sys.stdlib_module_names)
        of_classes = {name for one in own for name in vars(one) if not name.startswith("_")}
        of_files = {name for name in _OF_FILES if getattr(error, name, None) is not None} if isinstance(error, OSError) else ()
        for name in {*vars(error), *of_classes, *of_files}:
            with contextlib.suppress(
                Exception
            ):  # a property of the program's may raise anything; what cannot be sent is left out
                attributes[name] = self.encode(getattr(error, name))
        args = [self.encode(one) for one in plain]
        return {"classes": classes, "args": args, "attributes": attributes, "text": text, "errno": number}

    def made(self, kind: type[BaseException], error: dict[str, Any]) -> BaseException:
        """An exception of this class, with the arguments and attributes that `describe` found."""
        args = tuple(self.decode(one) for one in error["args"]) or ((str(error["text"]),) if error["text"] else ())
        try:
            found = kind(*args)  # which sets the attributes of some, such as `errno`
        except Exception:
            found = kind.__new__(kind)
        found.args = args
        attributes = {str(name): self.decode(value) for name, value in error["attributes"].items()}
        if isinstance(found, OSError):
            for name in attributes.keys() & _OF_FILES:
                setattr(found, name, attributes[name])
        vars(found).update(attributes)
        return found

    # Frames

    def send(self, message: dict[str, Any]) -> None:
        """Send a message with the containers that changed since the last one."""
        message["contents"] = self._changes()
        message["dropped"] = dropped = [name for name in self._contents if self._is_forgotten(name)]
        for name in dropped:
            self._forget(name)
        frame = json.dumps(message).encode()
        if len(frame) > LARGEST_FRAME:
            frame = json.dumps(
                {
                    "error": {
                        "classes": [("", "ValueTooLarge"), ("builtins", "Exception")],
                        "args": [],
                        "attributes": {},
                        "text": "",
                        "errno": None,
                    }
                }
            ).encode()
        frame = struct.pack(">I", len(frame)) + frame
        while frame:
            try:
                frame = frame[os.write(self._sending, frame) :]
            except OSError as error:
                raise Broken("the connection is closed") from error

    def receive(self) -> dict[str, Any]:
        """The next message, after its containers have been brought up to date."""
        (length,) = struct.unpack(">I", self._read(4))
        if length > LARGEST_FRAME:
            raise Broken("a message is too long")
        try:
            message = json.loads(self._read(length))
            self._apply(message.pop("contents", {}))
            for name in message.pop("dropped", ()):
                self._forget(name)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise Broken(f"a message is malformed ({type(error).__name__})") from error
        if not isinstance(message, dict) or not {"do", "error", "value", "loaded"} & message.keys():
            raise Broken("a message is malformed")
        return message

    def _read(self, count: int) -> bytes:
        parts = b""
        while len(parts) < count:
            try:
                part = os.read(self._receiving, min(count - len(parts), 1 << 20))
            except OSError as error:
                raise Broken("the connection is closed") from error
            if not part:
                raise Broken("the connection is closed")
            parts += part
        return parts

    # Containers

    def _is_forgotten(self, name: str) -> bool:
        """Whether nothing but this table refers to a container any more."""
        return False

    def _forget(self, name: str) -> None:
        self._contents.pop(name, None)
        if (value := self._objects.pop(name, None)) is not None:
            self._names.pop(id(value), None)

    def name(self, value: Any) -> str:
        """The name of an object here, given on first use; a method of an object is the same whenever it is asked for."""
        if type(value) in (types.MethodType, types.BuiltinMethodType):
            function = id(value.__func__) if isinstance(value, types.MethodType) else value.__name__
            value = self._methods.setdefault((id(value.__self__), function), value)
        if (name := self._names.get(id(value))) is None:
            self._given += 1
            name = f"{self._prefix}{self._given}"
            self._names[id(value)], self._objects[name] = name, value
        return name

    def object(self, name: str) -> Any:
        """The object that this side named. Raises `Broken` for a name that was never given."""
        if name not in self._objects:
            raise Broken(f"there is no object {name!r}")
        return self._objects[name]

    def _changes(self) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        self._met = list(self._contents)
        while self._met:  # `encode` adds what it meets for the first time
            name = self._met.pop()
            contents = self._contents_of(self._objects[name])
            if contents != self._contents[name]:
                self._contents[name] = changes[name] = contents
        return changes

    def _contents_of(self, value: Any) -> list[Any]:
        kind = type(value).__name__
        if isinstance(value, bytearray):
            return [kind, bytes(value).hex()]
        if isinstance(value, dict):
            extra = [self.encode(value.default_factory)] if isinstance(value, collections.defaultdict) else []
            return [kind, [[self.encode(key), self.encode(one)] for key, one in value.items()], *extra]
        extra = [value.maxlen] if isinstance(value, collections.deque) else []
        extra = [value.typecode] if isinstance(value, array.array) else extra
        return [kind, [self.encode(one) for one in value], *extra]

    def _apply(self, changes: dict[str, list[Any]]) -> None:
        for name, (kind, *rest) in changes.items():
            if name not in self._objects:  # empty first, because containers may hold each other
                made: Any = _EMPTY[kind](rest[1]) if kind in _EMPTY else _SHARED[kind]()
                self._objects[name], self._names[id(made)] = made, name
            elif type(self._objects[name]) is not _SHARED[kind]:
                raise ValueError(kind)
            self._contents[name] = [kind, *rest]
        for name, (kind, inside, *rest) in changes.items():
            value = self._objects[name]
            if kind == "bytearray":
                value[:] = bytes.fromhex(inside)
            elif isinstance(value, dict):
                pairs = [(self.decode(key), self.decode(one)) for key, one in inside]
                value.clear()
                for key, one in pairs:
                    value[key] = one
                if isinstance(value, collections.defaultdict):
                    value.default_factory = self.decode(rest[0])
            elif kind == "list":
                value[:] = [self.decode(one) for one in inside]
            elif kind == "array":
                items: list[Any] = [self.decode(one) for one in inside]
                value[:] = array.array(value.typecode, items)
            else:
                items = [self.decode(one) for one in inside]
                value.clear()
                (value.update if kind == "set" else value.extend)(items)

    # Values

    def encode(self, value: Any) -> Any:  # noqa: PLR0911  # one return for each kind of value
        """A value as JSON: itself, or a list of its kind and parts. Raises `Unsupported`."""
        kind = type(value)
        if value is None or kind is bool or kind is str or kind is float:
            return value
        if kind.__name__ in _SHARED and _SHARED[kind.__name__] is kind:
            name = self.name(value)
            if name not in self._contents:
                self._contents[name] = None
                self._met.append(name)
            return ["shared", name]
        if (name_there := self.name_of_stand_in(value)) is not None:
            return ["yours", name_there]
        if isinstance(value, type) or kind is type(len):
            name = getattr(value, "__name__", "")
            return ["builtin", name] if _BUILTIN.get(name) is value else self._own(value)
        if kind is int:
            return value if -_EXACT < value < _EXACT else ["int", hex(value)]
        if kind is tuple:
            return ["tuple", [self.encode(one) for one in value]]
        return self._encode_rare(value)

    def _encode_rare(self, value: Any) -> Any:  # noqa: PLR0911  # one return for each kind of value
        kind = type(value)
        if _is_plain_named_tuple(kind):
            _named_tuples[kind.__name__, kind._fields] = kind
            return ["named", kind.__name__, list(kind._fields), [self.encode(one) for one in value]]
        if kind is complex:
            return ["complex", value.real, value.imag]
        if kind is bytes:
            return ["bytes", value.hex()]
        if kind is frozenset:
            return ["frozenset", [self.encode(one) for one in value]]
        if kind is range:
            return ["range", value.start, value.stop, value.step]
        if kind is slice:
            return ["slice", *(self.encode(one) for one in (value.start, value.stop, value.step))]
        if kind in (type({}.keys()), type({}.values()), type({}.items())):
            return [kind.__name__, [self.encode(one) for one in value]]
        for name, constant in _CONSTANTS.items():
            if value is constant:
                return ["constant", name]
        where = (kind.__module__.partition(".")[0], kind.__name__)
        if where in _TEXTUAL and sys.modules.get(where[0]) and getattr(sys.modules[where[0]], where[1]) is kind:
            return ["text", *where, value.isoformat() if where[0] == "datetime" else str(value)]
        if where == ("datetime", "timedelta"):
            return ["timedelta", value.days, value.seconds, value.microseconds]
        return self._own(value)

    def _own(self, value: Any) -> Any:
        facts = self.facts(value)
        return ["mine", self.name(value), facts]

    def decode(self, found: Any) -> Any:
        """The value of what `encode` wrote on the other side. Raises `Broken` for anything else."""
        if found is None or isinstance(found, bool | str | int | float):
            return found
        try:
            kind, *parts = found
            return self._DECODERS[kind](self, *parts)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise Broken(f"a value is malformed ({type(error).__name__})") from error

    def _shared(self, name: str) -> Any:
        if name not in self._contents:
            raise Broken(f"there is no container {name!r}")
        return self._objects[name]

    def _all(self, parts: list[Any]) -> list[Any]:
        return [self.decode(one) for one in parts]

    def _named(self, name: str, fields: list[str], values: list[Any]) -> Any:
        return _named_tuple(name, tuple(fields))._make(self._all(values))

    def _text(self, module: str, name: str, text: str) -> Any:
        if (module, name) not in _TEXTUAL:
            raise Broken(f"{module}.{name} is not a value")
        kind = getattr(__import__(module), name)
        return kind.fromisoformat(text) if module == "datetime" else kind(text)

    def _timedelta(self, *parts: int) -> Any:
        return __import__("datetime").timedelta(*parts)

    _DECODERS: dict[str, Callable[..., Any]] = {  # noqa: RUF012
        "shared": _shared,
        "yours": object,
        "mine": lambda self, name, facts: self.stand_in(name, facts),
        "builtin": lambda self, name: _BUILTIN[name],
        "tuple": lambda self, parts: tuple(self._all(parts)),
        "named": _named,
        "int": lambda self, text: int(text, 16),
        "complex": lambda self, real, imaginary: complex(real, imaginary),
        "bytes": lambda self, text: bytes.fromhex(text),
        "frozenset": lambda self, parts: frozenset(self._all(parts)),
        "range": lambda self, *parts: range(*parts),
        "slice": lambda self, *parts: slice(*self._all(list(parts))),
        "dict_keys": lambda self, parts: dict.fromkeys(self._all(parts)).keys(),
        "dict_values": lambda self, parts: dict(enumerate(self._all(parts))).values(),
        "dict_items": lambda self, parts: dict(self._all(parts)).items(),
        "constant": lambda self, name: _CONSTANTS[name],
        "text": _text,
        "timedelta": _timedelta,
    }


_named_tuples: dict[tuple[str, tuple[str, ...]], Any] = {}


def _is_plain_named_tuple(kind: type) -> bool:
    """Whether a class is a named tuple without methods of its own, so that a copy on the other side is as good."""
    fields = getattr(kind, "_fields", None)
    if not isinstance(fields, tuple) or kind.__mro__[1:2] != (tuple,):
        return False
    return all(name.startswith("_") or name in fields for name in vars(kind))


def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    """A named tuple class; two of one name and fields are the same."""
    if (name, fields) not in _named_tuples:
        _named_tuples[name, fields] = collections.namedtuple(name, fields)  # which checks that all of them are identifiers
    return _named_tuples[name, fields]
