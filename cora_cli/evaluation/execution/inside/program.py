"""Run a program, and let the tests on the other side of the connection use what it defines.

What the program does to this process, to Python or to the connection does not matter for its result: the tests are elsewhere, know the expected
values, and judge what they receive.
"""

import ast
import copy
import inspect
import json
import operator
import os
import sys
import types
from pathlib import Path
from typing import Any

from confine import confine
from wire import BINARY, IN_PLACE, Broken, Peer

_PLAIN: tuple[Any, ...] = (list, dict, set, frozenset, tuple, str, bytes, bytearray, int, float, complex)
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
    """A function of the tests, which is called over there."""

    def __init__(self, peer: Peer, name: str) -> None:
        self._peer, self.name_there = peer, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.request("call", self, args, tuple(kwargs.items()))


class _Iterator(_Function):
    """An iterator of the tests."""

    def __iter__(self) -> "_Iterator":
        return self

    def __next__(self) -> Any:
        return self._peer.request("next", self)


class Program(Peer):
    """The side of the program, which does what the tests ask for with the objects of `namespace`."""

    namespace: dict[str, Any]

    def __init__(self, receiving: int, sending: int, prefix: str) -> None:
        super().__init__(receiving, sending, prefix)
        self._globals: dict[str, Any] = {}
        """The values that the tests have for the names that they asked for."""

    def send(self, message: dict[str, Any]) -> None:
        """See `Peer`. A name that has another value since, as after a `global` statement, is sent again."""
        found = {name: self.namespace.get(name) for name in self._globals}
        found = {name: value for name, value in found.items() if value is not self._globals[name]}
        self._globals |= found
        message["globals"] = {name: self.encode(value) for name, value in found.items()}
        super().send(message)

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
            import asyncio

            return asyncio.run(values[0])
        return _OPERATIONS[request["do"]](*values)

    @staticmethod
    def _plain(value: Any) -> Any:
        """(The value as an instance of the built-in class that it inherits from,), or () if it inherits from none."""
        return next(((kind(value),) for kind in _PLAIN if isinstance(value, kind)), ())

    def stand_in(self, name: str, facts: dict[str, Any]) -> Any:
        """See `Peer`."""
        return (_Iterator if facts["iterator"] else _Function)(self, name)

    def name_of_stand_in(self, value: Any) -> str | None:
        """See `Peer`."""
        return value.name_there if type(value) in (_Function, _Iterator) else None

    def facts(self, value: Any) -> dict[str, Any]:
        """The classes that its class inherits from, the nearest first; the same of itself for a class of exceptions."""
        found: dict[str, Any] = {"classes": [(one.__module__, one.__name__) for one in type(value).__mro__]}
        found["coroutine"] = inspect.iscoroutine(value)
        if isinstance(value, type) and issubclass(value, BaseException):
            found["exception"] = [(one.__module__, one.__name__) for one in value.__mro__ if issubclass(one, BaseException)]
        return found

    def raised(self, error: dict[str, Any]) -> BaseException:
        """The built-in exception that is nearest to one of the tests' functions."""
        import builtins

        names = (name for module, name in error["classes"] if module == "builtins")
        return getattr(builtins, next(names, "Exception"))(*(self.decode(one) for one in error["args"]))


def _load(source: str, module: types.ModuleType) -> str | None:
    """Execute the program; returns "not code" if it is none."""
    try:
        if not ast.parse(source).body:
            return "not code"
        code = compile(source, "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return "not code"
    exec(code, module.__dict__)
    return None


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
            message = {"loaded": _load(source, module)}
        except BaseException as error:  # including SystemExit
            message = {"error": peer.describe(error)}
        peer.send(message)
        while True:
            peer.serve(peer.receive())
    except Broken:
        os._exit(0)


main()
