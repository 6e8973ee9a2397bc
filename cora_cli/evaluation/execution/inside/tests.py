"""Run the tests of a problem against a program on the other side of the connection, and report the verdict.

The program's functions and objects are stand-ins here. An operation on one is done over there, unless it would tell the program a value that it is
expected to return: a result is compared here.
"""

import ast
import errno
import inspect
import io
import json
import operator
import os
import sys
import traceback
import weakref
from pathlib import Path
from typing import Any

from confine import confine
from wire import BINARY, IN_PLACE, Broken, Peer, Unsupported

_REFUSED = {
    getattr(errno, name)
    for name in (
        "EPERM",
        "EACCES",
        "EROFS",
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
        "EMFILE",
        "ENFILE",
        "EAGAIN",
        "ENOSYS",
        "ENETUNREACH",
        "ENETDOWN",
    )
}


_TEXT = "text_by_program"
"""The attribute of an exception of the program that has its text, which its class may compute in a way of its own."""


class Remote:
    """An object of the program."""

    __slots__ = ("__weakref__", "_remote_classes", "_remote_name", "_remote_peer")

    def __init__(self, peer: "Tests", name: str, classes: list[tuple[str, str]]) -> None:
        object.__setattr__(self, "_remote_peer", peer)
        object.__setattr__(self, "_remote_name", name)
        object.__setattr__(self, "_remote_classes", classes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return self._remote_peer.request("call", self, args, tuple(kwargs.items()))

    def __getattr__(self, name: str) -> Any:
        return self._remote_peer.request("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._remote_peer.request("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._remote_peer.request("delattr", self, name)

    def __instancecheck__(self, instance: Any) -> bool:
        return bool(self._remote_peer.request("isinstance", instance, self))

    def __subclasscheck__(self, subclass: Any) -> bool:
        return bool(self._remote_peer.request("issubclass", subclass, self))

    @property  # type: ignore[misc]  # which is only read
    def __class__(self) -> Any:
        """A class like that of the object, so that `isinstance` knows the built-in classes that it inherits from."""
        return self._remote_peer.class_named(self._remote_classes)

    def __deepcopy__(self, _: Any) -> Any:
        return self._remote_peer.request("deepcopy", self)

    def __enter__(self) -> Any:
        return self._remote_peer.request("getattr", self, "__enter__")()

    def __exit__(self, kind: Any, error: Any, _: Any) -> Any:
        if error is None:
            return self._remote_peer.request("getattr", self, "__exit__")(None, None, None)
        return self._remote_peer.request("exit", self, json.dumps(self._remote_peer.describe(error)))

    async def __aenter__(self) -> Any:
        return await self._remote_peer.request("getattr", self, "__aenter__")()

    async def __aexit__(self, *_: Any) -> Any:
        return await self._remote_peer.request("getattr", self, "__aexit__")(None, None, None)

    def __aiter__(self) -> Any:
        return self._remote_peer.request("getattr", self, "__aiter__")()

    async def __anext__(self) -> Any:
        return await self._remote_peer.request("getattr", self, "__anext__")()

    def __contains__(self, value: Any) -> bool:
        if _may_see(self, value):
            return bool(self._remote_peer.request("contains", self, value))
        if plain := self._remote_peer.request("plain", self):
            return value in plain[0]
        return any(one is value or one == value for one in iter(self))

    def __eq__(self, other: object) -> Any:
        if _may_see(self, other):
            return self._remote_peer.request("eq", self, other)
        plain = self._remote_peer.request("plain", self)
        return bool(plain) and plain[0] == other

    def __ne__(self, other: object) -> Any:
        return self._remote_peer.request("ne", self, other) if _may_see(self, other) else not self == other

    def __hash__(self) -> int:
        return int(self._remote_peer.request("hash", self)) if _is_own(self) else hash(self._remote_name)


def _names(classes: Any) -> list[tuple[str, str]]:
    """The modules and names of classes, as the program sends them."""
    return [(str(module), str(name)) for module, name in classes] or [("builtins", "object")]


def _is_own(value: Remote) -> bool:
    """Whether an object is of a class that the problem asks for, whose operators are therefore under test."""
    return value._remote_classes[0][1] in value._remote_peer.classes


def _may_see(value: Remote, other: object) -> bool:
    """Whether the program may be told `other`, to compute or compare with: an expected value must stay here."""
    return type(other) is Remote or _is_own(value)


def _unary(operation: str) -> Any:
    def method(self: Remote, *values: Any) -> Any:
        return self._remote_peer.request(operation, self, *values)

    return method


def _binary(operation: str, reflected: bool = False) -> Any:
    def method(self: Remote, other: Any) -> Any:
        if not _may_see(self, other):
            # A copy is computed with here, but a container of the program's cannot be changed so.
            plain = self._remote_peer.request("plain", self)
            if plain and not (operation in IN_PLACE and type(plain[0]) in (list, dict, set, bytearray)):
                compute = divmod if operation == "divmod" else getattr(operator, operation)
                return compute(other, plain[0]) if reflected else compute(plain[0], other)
            kind = self._remote_classes[0][1]
            raise TypeError(
                f"{operation}: the program returned an object of its class {kind!r} where a plain value is expected"
            )
        return self._remote_peer.request(operation, *((other, self) if reflected else (self, other)))

    return method


for _name in [
    "len",
    "iter",
    "next",
    "bool",
    "str",
    "repr",
    "format",
    "int",
    "float",
    "complex",
    "round",
    "abs",
    "neg",
    "pos",
    "invert",
    "index",
    "reversed",
    "getitem",
    "setitem",
    "delitem",
    "copy",
]:
    setattr(Remote, f"__{_name}__", _unary(_name))
for _name in ["lt", "le", "gt", "ge", *IN_PLACE]:
    setattr(Remote, f"__{_name}__", _binary(_name))
for _name in [*BINARY, "divmod"]:
    setattr(Remote, f"__{_name.strip('_')}__", _binary(_name))
    setattr(Remote, f"__r{_name.strip('_')}__", _binary(_name, reflected=True))
Remote.__doc__ = property(lambda self: self._remote_peer.request("getattr", self, "__doc__"))  # type: ignore[assignment]


class _Types(type):
    """What makes `type` of the tests (`TypeOf`) act like Python's."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and type(args[0]) is Remote:
            return args[0]._remote_peer.request("type", args[0])
        found = type(*args, **kwargs)
        return cls if found is type else found

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type)


class TypeOf(type, metaclass=_Types):
    """`type` for the tests, which gives the program's class for one of its objects."""


async def _awaited(remote: Remote) -> Any:
    """What a coroutine of the program returns; it runs over there, to its end."""
    return remote._remote_peer.request("await", remote)


class Tests(Peer):
    """The side of the tests."""

    classes: frozenset[str] = frozenset()
    """The names of the classes that the problem asks for."""

    def __init__(self, receiving: int, sending: int) -> None:
        super().__init__(receiving, sending, "t")
        self.used = False
        self.namespace: dict[str, Any] = {"__name__": "tests", "type": TypeOf}
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

    def rebind(self, names: dict[str, Any]) -> None:
        """See `Peer`."""
        for name in names.keys() & self._globals.keys():
            found = self.decode(names[name])
            if self.namespace.get(name) is self._globals[name]:
                self.namespace[name] = found
            self._globals[name] = found

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
            remote = self._remotes[name] = Remote(self, name, _names(facts["classes"]))
        return _awaited(remote) if facts["coroutine"] else remote

    def encode(self, value: Any) -> Any:
        """See `Peer`."""
        return super().encode(type if value is TypeOf else value)

    def decode(self, found: Any) -> Any:
        """See `Peer`."""
        value = super().decode(found)
        return TypeOf if value is type else value

    def name_of_stand_in(self, value: Any) -> str | None:
        """See `Peer`."""
        if type(value) is Remote:
            return value._remote_name
        return self._exception_names.get(id(value)) if isinstance(value, type) else None

    def facts(self, value: Any) -> dict[str, Any]:
        """Functions and iterators may be used by the program, nothing else."""
        if isinstance(value, type) or not (callable(value) or hasattr(value, "__next__")):
            raise Unsupported(f"the tests use an object of {type(value).__name__} with the program, which cannot be sent to it")
        found: dict[str, Any] = {"iterator": hasattr(value, "__next__"), "generator": inspect.isgenerator(value)}
        if isinstance(name := getattr(value, "__name__", None), str):
            found |= {"name": name, "doc": doc if isinstance(doc := value.__doc__, str) else None}
        if inspect.isfunction(value) and not inspect.iscoroutinefunction(value):
            parameters = inspect.signature(value, follow_wrapped=False).parameters.values()
            if all(one.name.isidentifier() for one in parameters):
                found["parameters"] = [(one.name, one.kind.name, one.default is not one.empty) for one in parameters]
        return found

    def raised(self, error: dict[str, Any]) -> BaseException:
        """The exception that the program raised, as one of the same class."""
        kind = self._exception_class(error["classes"])
        if kind.__module__ == "unittest.case":  # which would skip a test, or end it without a failure
            kind = type(kind.__name__, (Exception,), {})
        args = tuple(self.decode(one) for one in error["args"]) or ((str(error["text"]),) if error["text"] else ())
        try:
            found = kind(*args)  # which sets the attributes of some, such as `errno`
        except Exception:
            found = kind.__new__(kind)
        found.args = args
        vars(found).update({str(name): self.decode(value) for name, value in error.get("attributes", {}).items()})
        vars(found).update(raised_by_program=True, **{_TEXT: str(error["text"])})
        return found

    def class_named(self, classes: list[tuple[str, str]]) -> type:
        """The class at the head of a list that goes on with those it inherits from: Python's own, or one like that of the program."""
        import builtins

        if not classes:
            return object
        module, name = classes[0]
        known = getattr(builtins if module == "builtins" else sys.modules.get(module, builtins), name, None)
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


def _namespace(peer: Tests, problem: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """The names that the tests may use: the imports and given parts of the reference, and what the program defines in place of the rest."""
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
    return peer.namespace


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
        exec(compile(tests, "tests.py", "exec", dont_inherit=True, optimize=0), _namespace(peer, problem, used))
    except Broken as error:
        return "gone", str(error)
    except BaseException as error:
        return _fate(error, tests)
    return "passed", "" if peer.used else UNUSED


def _fate(error: BaseException, tests: str) -> tuple[str, str]:
    here = not getattr(error, "raised_by_program", False)
    name = type(error).__name__
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests.py"]
    line = list(io.StringIO(tests, newline=None))[lines[-1] - 1].strip() if lines and lines[-1] else ""
    if here and isinstance(error, AssertionError):
        return "wrong", line[:200]
    if isinstance(error, MemoryError):
        return "memory", ""
    try:
        text = str(error)
    except BaseException:  # an exception of a class whose `__str__` needs what was not sent
        text = ""
    detail = f"{name}: {text}"[:200] if text else name
    if not here and (getattr(error, "errno", None) in _REFUSED or "can't start new thread" in text):
        return "refused", detail
    return "exception", detail


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
