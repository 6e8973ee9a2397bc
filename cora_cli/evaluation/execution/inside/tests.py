"""Run the tests of a problem against a program on the other side of the connection, and report the verdict.

The program's functions and objects are stand-ins here. An operation on one is done over there, unless it would tell the program a value that it is
expected to return: a result is compared here.
"""

import ast
import contextlib
import inspect
import io
import json
import os
import sys
import types
import weakref
from pathlib import Path
from typing import Any

from confine import confine
from judging import fate_of, raised_by_program, run_tests
from remote import Remote, TypeOf, awaited, is_remote, remote_class
from wire import Broken, Peer, Unsupported

_OF_PYTHON = {one.__name__: one for one in vars(types).values() if isinstance(one, type) and one.__module__ == "builtins"}
"""The classes of functions, generators and the like, which have no built-in name."""
_TEXT = "text_by_program"
"""The attribute of an exception of the program that has its text, which its class may compute in a way of its own."""


def _names(classes: Any) -> list[tuple[str, str]]:
    """The modules and names of classes, as the program sends them."""
    return [(str(module), str(name)) for module, name in classes] or [("builtins", "object")]


class Tests(Peer):
    """The side of the tests."""

    classes: frozenset[str] = frozenset()
    """The names of the classes that the problem asks for."""

    def __init__(self, receiving: int, sending: int) -> None:
        super().__init__(receiving, sending, "t")
        self.used = False
        self.module = types.ModuleType("tests")
        self.namespace: dict[str, Any] = self.module.__dict__
        self.namespace["type"] = TypeOf
        self._globals: dict[str, Any] = {}
        """What the program has under each name that it was asked for."""
        self._remotes: weakref.WeakValueDictionary[str, Remote] = weakref.WeakValueDictionary()
        self._classes: dict[tuple[str, str], type] = {}
        self._exception_names: dict[int, str] = {}

    def request(self, operation: str, *values: Any) -> Any:
        """See `Peer`. A StopIteration would silently end a loop of the tests, so only the program's iterators may raise it."""
        self.used = self.used or operation != "global"
        try:
            return super().request(operation, *values)
        except StopIteration as error:
            if operation == "next":
                raise
            found = RuntimeError("the program raised StopIteration")
            found.raised_by_program = True  # type: ignore[attr-defined]
            raise found from error

    def ask_global(self, name: str) -> None:
        """Give the tests what the program defines under a name, for as long as they bind nothing else to it. Raises `KeyError`."""
        self.namespace[name] = self._globals[name] = self.request("global", name)

    def receive(self) -> dict[str, Any]:
        """See `Peer`. Global names get the values that they have in the program now."""
        message = super().receive()
        for name, value in message.pop("globals", {}).items():
            if name in self._globals:
                before, self._globals[name] = self._globals[name], self.decode(value)
                if self.namespace.get(name) is before:
                    self.namespace[name] = self._globals[name]
        return message

    def answer(self, request: dict[str, Any]) -> Any:
        """Call a function that the tests gave to the program, or take the next item of an iterator that they gave.

        Raises `Broken` for anything else, such as a built-in function, with which the program could make objects here.
        """
        if request["with"][0][:1] != ["yours"]:
            raise Broken("the program asks for what the tests did not give it")
        function, *values = (self.decode(value) for value in request["with"])
        if request["do"] == "next":
            return next(function)
        args, kwargs = values
        return function(*args, **dict(kwargs))

    def stand_in(self, name: str, facts: dict[str, Any]) -> Any:
        """A `Remote`, always the same for one object; for a class of exceptions a class that `except` can name."""
        if "exception" in facts:
            found = self._exception_class(facts["exception"])
            self._exception_names[id(found)] = name
            return found
        if (remote := self._remotes.get(name)) is None:
            kind = remote_class(frozenset(map(str, facts["methods"])))
            remote = self._remotes[name] = kind(self, name, _names(facts["classes"]))
        return awaited(remote) if facts["coroutine"] else remote

    def encode(self, value: Any) -> Any:
        """See `Peer`."""
        return super().encode(type if value is TypeOf else value)

    def decode(self, found: Any) -> Any:
        """See `Peer`."""
        value = super().decode(found)
        return TypeOf if value is type else value

    def name_of_stand_in(self, value: Any) -> str | None:
        """See `Peer`."""
        if is_remote(value):
            return str(value._remote_name)
        return self._exception_names.get(id(value)) if isinstance(value, type) else None

    def facts(self, value: Any) -> dict[str, Any]:
        """Functions and iterators may be used by the program, nothing else."""
        # A file could also be read otherwise than by its lines.
        is_usable = callable(value) or (hasattr(value, "__next__") and not isinstance(value, io.IOBase))
        if isinstance(value, type) or not is_usable:
            raise Unsupported(f"the tests use an object of {type(value).__name__} with the program, which cannot be sent to it")
        found: dict[str, Any] = {"iterator": hasattr(value, "__next__"), "generator": inspect.isgenerator(value)}
        if isinstance(name := getattr(value, "__name__", None), str):
            found |= {"name": name, "doc": doc if isinstance(doc := value.__doc__, str) else None}
        if inspect.isfunction(value) and not inspect.iscoroutinefunction(value):
            parameters = inspect.signature(value, follow_wrapped=False).parameters.values()
            if all(one.name.isidentifier() for one in parameters):
                found["parameters"] = [
                    (one.name, one.kind.name, None if one.default is one.empty else self._default(one.default))
                    for one in parameters
                ]
        return found

    def _default(self, value: Any) -> list[Any]:
        """The default of a parameter as it is sent, in a list that is empty if it cannot be."""
        with contextlib.suppress(Unsupported):
            return [self.encode(value)]
        return []

    def raised(self, error: dict[str, Any]) -> BaseException:
        """The exception that the program raised, as one of the same class."""
        kind = self._exception_class(error["classes"])
        if kind.__module__ == "unittest.case":  # which would skip a test, or end it without a failure
            kind = type(kind.__name__, (Exception,), {})
        found = self.made(kind, error)
        vars(found).update(raised_by_program=True, **{_TEXT: str(error["text"])})
        return found

    def class_named(self, classes: list[tuple[str, str]]) -> type:
        """The class at the head of a list that goes on with those it inherits from: Python's own, or one like that of the program."""
        import builtins

        if not classes:
            return object
        module, name = classes[0]
        known = getattr(builtins if module == "builtins" else sys.modules.get(module, builtins), name, None)
        if module == "builtins" and known is None:
            known = _OF_PYTHON.get(name)
        if isinstance(known, type):
            return known
        if classes[0] not in self._classes:
            inherited: Any = self.class_named(classes[1:])
            text = {"__str__": lambda value: vars(value).get(_TEXT) or inherited.__str__(value)}
            own = {"__module__": module, **(text if issubclass(inherited, BaseException) else {})}
            try:
                self._classes[classes[0]] = type(name, (inherited,), own)
            except Exception:  # not every class of Python can be inherited from
                self._classes[classes[0]] = type(name, (), {"__module__": module})
        return self._classes[classes[0]]

    def _exception_class(self, classes: Any) -> type[BaseException]:
        found = self.class_named(_names(classes))
        return found if issubclass(found, BaseException) else Exception

    def _is_forgotten(self, name: str) -> bool:
        return sys.getrefcount(self._objects[name]) == 2  # the table, and the argument of `getrefcount`


def _define(peer: Tests, problem: dict[str, Any], used: set[str]) -> None:
    """Give the tests the names that they may use: the imports and given parts of the reference, and what the program defines in place of the rest."""
    asked, classes = set(), set()
    for statement in ast.parse(problem["reference"]).body:
        names = _defined(statement)
        given = (statement.end_lineno or 0) <= problem["given_lines"] and problem["entry_point"] not in names
        if isinstance(statement, ast.Import | ast.ImportFrom) or given:
            exec(compile(ast.Module([statement], []), "given.py", "exec", dont_inherit=True), peer.namespace)
            continue
        asked |= names
        classes |= names if isinstance(statement, ast.ClassDef) else set()
    peer.classes = frozenset(classes)
    for name in sorted(asked & used):
        try:
            peer.ask_global(name)
        except KeyError:
            peer.namespace.pop(name, None)  # the tests will raise NameError


def _defined(statement: ast.stmt) -> set[str]:
    """The names that a statement of a module defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


UNUSED = "the tests use nothing of the program"
"""The detail of a program that passed without having been asked for anything."""


def _verdict(peer: Tests, problem: dict[str, Any]) -> tuple[str, str]:
    """The fate of the program with a detail, such as the assertion that failed."""
    tests = problem["tests"]
    try:
        try:
            peer.receive()
        except Broken:
            return "not started", ""
        loaded = peer.receive()
        if "error" in loaded:
            raise peer.raised(loaded["error"])
        if loaded.get("loaded") is not None:
            return "not code", ""
        used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
        _define(peer, problem, used)
        run_tests(tests, peer.module)
    except Broken as error:
        return "gone", str(error)
    except BaseException as error:
        return fate_of(error, tests, of_tests=not raised_by_program(error))
    return "passed", "" if peer.used else UNUSED


def main() -> None:
    """Write that this started, and the verdict, as lines of JSON."""
    options = json.loads(sys.argv[1])
    problem = json.loads(Path("/cora/problem.json").read_text(encoding="utf-8"))
    confine((options["receive"], options["send"], options["result"]), **options["limits"])
    sys.set_int_max_str_digits(0)
    os.write(options["result"], json.dumps(["started", ""]).encode() + b"\n")
    verdict = _verdict(Tests(options["receive"], options["send"]), problem)
    os.write(options["result"], json.dumps(verdict).encode() + b"\n")
    os._exit(0)


main()
