"""Run a program, and let the tests on the other side of the connection use what it defines.

What the program does to this process, to Python or to the connection does not matter for its result: the tests are elsewhere, know the expected
values, and judge what they receive.
"""

import collections
import copy
import inspect
import json
import operator
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from confine import confine
from judging import load
from wire import BINARY, IN_PLACE, METHODS, Broken, Peer

_PLAIN: dict[Any, Callable[[Any], Any]] = {
    list: lambda value: list(list.__iter__(value)),
    dict: lambda value: {key: dict.__getitem__(value, key) for key in dict.__iter__(value)},
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    str: str.__str__,
    bytes: lambda value: bytes(bytes.__iter__(value)),
    bytearray: lambda value: bytearray(bytearray.__iter__(value)),
    memoryview: memoryview.tobytes,
    int: int.__int__,
    float: float.__float__,
    complex: lambda value: complex(value.real, value.imag),
}
"""What an instance of a class that inherits from a built-in one holds, whatever its own methods say."""
_OPERATIONS: dict[str, Any] = {
    **{name: getattr(operator, name) for name in (*BINARY, *IN_PLACE)},
    **{
        name: getattr(operator, name)
        for name in [
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "contains",
            "neg",
            "pos",
            "invert",
            "index",
            "getitem",
            "setitem",
            "delitem",
        ]
    },
    **{
        one.__name__: one
        for one in (len, iter, next, bool, str, repr, format, int, float, complex, round, abs, hash, reversed, divmod)
    },
    "type": type,
    **{one.__name__: one for one in (getattr, setattr, delattr, isinstance, issubclass, copy.copy, copy.deepcopy)},
}


class _Function:
    """Something of the tests that can be called, which is done over there."""

    def __init__(self, peer: "Program", name: str) -> None:
        self._peer, self.name_there = peer, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.request("call", self, args, tuple(kwargs.items()))


class _Iterator(_Function):
    """An iterator of the tests."""

    def __iter__(self) -> "_Iterator":
        return self

    def __next__(self) -> Any:
        return self._peer.request("next", self)


class _LeftOut:
    """Stands for the default of a parameter that cannot be sent, which the tests' function knows itself."""

    def __repr__(self) -> str:
        return "_LEFT_OUT"


_LEFT_OUT = _LeftOut()


def _function(call: Callable[..., Any], facts: dict[str, Any], decode: Callable[[Any], Any]) -> Any:
    """A function with the name and the parameters of one of the tests, for programs that look at these."""
    defaults = {
        name: decode(default[0]) if default else _LEFT_OUT for name, _, default in facts["parameters"] if default is not None
    }
    signature = inspect.Signature(
        [
            inspect.Parameter(
                name, getattr(inspect.Parameter, kind), default=_LEFT_OUT if name in defaults else inspect.Parameter.empty
            )
            for name, kind, _ in facts["parameters"]
        ]
    )

    def pass_on(values: dict[str, Any]) -> Any:
        given = {name: value for name, value in values.items() if value is not _LEFT_OUT}
        for name, one in signature.parameters.items():
            if one.kind is one.VAR_POSITIONAL and not given[name]:
                del given[name]  # which would count as a keyword behind a default that is left out
        bound = inspect.BoundArguments(signature, given)
        return call(*bound.args, **bound.kwargs)

    namespace: dict[str, Any] = {"_pass_on": pass_on, "_LEFT_OUT": _LEFT_OUT}
    exec(f"def function{signature}: return _pass_on(locals())", namespace)
    found = namespace["function"]
    named = found.__kwdefaults__ or {}
    found.__kwdefaults__ = {name: defaults[name] for name in named} or None
    found.__defaults__ = tuple(value for name, value in defaults.items() if name not in named) or None
    found.__name__, found.__qualname__, found.__doc__, found.__module__ = facts["name"], facts["name"], facts["doc"], "tests"
    return found


def _generator(following: Callable[[], Any]) -> Any:
    """A generator of what one of the tests gives."""
    while True:
        try:
            one = following()
        except StopIteration:
            return
        yield one


class Program(Peer):
    """The side of the program, which does what the tests ask for with the objects of `namespace`."""

    namespace: dict[str, Any]

    def __init__(self, receiving: int, sending: int, prefix: str) -> None:
        super().__init__(receiving, sending, prefix)
        self._globals: dict[str, Any] = {}
        """The values that the tests have for the names that they asked for."""
        self._stand_ins: dict[str, Any] = {}
        self._names_there: dict[int, str] = {}
        self._loop: Any = None

    def send(self, message: dict[str, Any]) -> None:
        """See `Peer`. A name that has another value since, as after a `global` statement, is sent again."""
        found = {name: self.namespace.get(name) for name in self._globals}
        found = {name: value for name, value in found.items() if value is not self._globals[name]}
        self._globals |= found
        message["globals"] = {name: self.encode(value) for name, value in found.items()}
        super().send(message)

    def next_request(self) -> dict[str, Any]:
        """What the tests ask for next; threads of the program ask nothing meanwhile."""
        with self._lock:
            return self.receive()

    def answer(self, request: dict[str, Any]) -> Any:
        """Look up a global name, call or await something, or apply one of the operations."""
        values = [self.decode(value) for value in request["with"]]
        if request["do"] == "global":
            self._globals[values[0]] = found = self.namespace[values[0]]
            return found
        if request["do"] == "call":
            function, args, kwargs = values
            return function(*args, **dict(kwargs))
        if request["do"] == "plain":
            return self._plain(values[0])
        if request["do"] == "await":
            return self._await(values[0])
        if request["do"] == "exit":
            error = self.raised(json.loads(values[1]))
            return values[0].__exit__(type(error), error, None)
        return _OPERATIONS[request["do"]](*values)

    def _await(self, value: Any) -> Any:
        """What a coroutine returns, or the like; all of them run in one loop, since asynchronous iterators live longer than one."""
        import asyncio

        async def awaited() -> Any:
            return await value

        self._loop = self._loop or asyncio.new_event_loop()
        return self._loop.run_until_complete(awaited())

    @staticmethod
    def _plain(value: Any) -> Any:
        """(The value as an instance of the built-in class that it inherits from,), or () if it inherits from none."""
        if isinstance(value, collections.UserList | collections.UserDict | collections.UserString):
            value = value.data
        return next(((raw(value),) for kind, raw in _PLAIN.items() if isinstance(value, kind)), ())

    def stand_in(self, name: str, facts: dict[str, Any]) -> Any:
        """See `Peer`. It is always the same for one object."""
        if name not in self._stand_ins:
            found: Any = (_Iterator if facts["iterator"] else _Function)(self, name)
            if facts["iterator"] and facts["generator"]:
                found = _generator(found.__next__)
            elif facts.get("parameters") is not None:
                found = _function(found, facts, self.decode)
            elif facts.get("name"):
                found.__name__, found.__doc__ = facts["name"], facts["doc"]
            self._stand_ins[name], self._names_there[id(found)] = found, name
        return self._stand_ins[name]

    def name_of_stand_in(self, value: Any) -> str | None:
        """See `Peer`."""
        return value.name_there if type(value) in (_Function, _Iterator) else self._names_there.get(id(value))

    def facts(self, value: Any) -> dict[str, Any]:
        """The classes that its class inherits from, the nearest first; the same of itself for a class of exceptions."""
        kind = type(value)
        found: dict[str, Any] = {"classes": [(one.__module__, one.__name__) for one in kind.__mro__]}
        defined: dict[str, Any] = {}
        for one in reversed(kind.__mro__):
            defined |= vars(one)
            if one.__module__ in sys.stdlib_module_names:
                defined["__hash__"] = None  # which the tests compute alike
        found["methods"] = [name for name in METHODS if defined.get(f"__{name}__") is not None]
        if isinstance(value, type) and hasattr(value, "__class_getitem__"):
            found["methods"].append("getitem")
        # Not an object of a class that can be awaited, since it may be more than that.
        found["coroutine"] = (
            inspect.isawaitable(value) and type(value).__module__ == "builtins" and not inspect.isgenerator(value)
        )
        if isinstance(value, type) and issubclass(value, BaseException):
            found["exception"] = [(one.__module__, one.__name__) for one in value.__mro__ if issubclass(one, BaseException)]
        return found

    def raised(self, error: dict[str, Any]) -> BaseException:
        """An exception of the tests, as one of the nearest class that is the program's or built in."""
        import builtins

        places = {"builtins": vars(builtins), "program": self.namespace}
        classes = (places.get(module, {}).get(name) for module, name in error["classes"])
        kind = next(one for one in (*classes, Exception) if isinstance(one, type) and issubclass(one, BaseException))
        return self.made(kind, error)


def main() -> None:
    """Load the program, say how that went, and serve the tests until they close the connection."""
    options = json.loads(sys.argv[1])
    source = Path("/cora/source.py").read_text(encoding="utf-8")
    confine((options["receive"], options["send"]), **options["limits"])
    sys.set_int_max_str_digits(0)
    module = types.ModuleType("program")
    sys.modules["program"] = module
    peer = Program(options["receive"], options["send"], "p")
    peer.namespace = module.__dict__
    peer.send({"loaded": "started"})
    try:
        try:
            message = {"loaded": load(source, module)}
        except BaseException as error:  # including SystemExit
            message = {"error": peer.describe(error)}
        peer.send(message)
        while True:
            peer.serve(peer.next_request())
    except Broken:
        os._exit(0)


main()
