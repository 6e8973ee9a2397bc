"""What represents the program's objects among the tests: an operation on one is done in the program, unless it would tell the program a value that it is
expected to return. Such a value is compared and computed with here.
"""

import functools
import json
import operator
from typing import Any

from wire import BINARY, IN_PLACE, METHODS


class Remote:
    """An object of the program."""

    __slots__ = ("__weakref__", "_remote_classes", "_remote_name", "_remote_peer")

    def __init__(self, peer: Any, name: str, classes: list[tuple[str, str]]) -> None:
        object.__setattr__(self, "_remote_peer", peer)
        object.__setattr__(self, "_remote_name", name)
        object.__setattr__(self, "_remote_classes", classes)

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

    def __mro_entries__(self, _: Any) -> Any:
        raise TypeError("tests cannot derive from a class of the program, which is in another process")

    def __deepcopy__(self, _: Any) -> Any:
        return self._remote_peer.request("deepcopy", self)

    def __eq__(self, other: object) -> Any:
        if _may_see(self, other):
            return self._remote_peer.request("eq", self, other)
        plain = self._remote_peer.request("plain", self)
        return bool(plain) and plain[0] == other

    def __ne__(self, other: object) -> Any:
        return self._remote_peer.request("ne", self, other) if _may_see(self, other) else not self == other

    def __hash__(self) -> int:
        plain = self._remote_peer.request("plain", self)
        return hash(plain[0]) if plain else int(self._remote_peer.request("hash", self))


def is_remote(value: object) -> bool:
    """Whether a value stands for an object of the program."""
    return issubclass(type(value), Remote)


def _is_own(value: Remote) -> bool:
    """Whether an object is of a class that the problem asks for, whose operators are therefore under test."""
    return value._remote_classes[0][1] in value._remote_peer.classes


def _may_see(value: Remote, other: object) -> bool:
    """Whether the program may be told `other`, to compute or compare with: an expected value must stay here."""
    return is_remote(other) or _is_own(value)


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


class _Methods(Remote):
    """Special methods that objects have or have not, for `remote_class`."""

    def __hash__(self) -> int:
        return int(self._remote_peer.request("hash", self)) if _is_own(self) else super().__hash__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._remote_peer.request("call", self, args, tuple(kwargs.items()))

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
        return any(one is value or one == value for one in self._remote_peer.request("iter", self))


for _name in ["str", "repr", "format", "copy"]:
    setattr(Remote, f"__{_name}__", _unary(_name))
for _name in ["lt", "le", "gt", "ge"]:
    setattr(Remote, f"__{_name}__", _binary(_name))
_OF_OBJECT = property(lambda self: self._remote_peer.request("getattr", self, "__doc__"))
"""The documentation, which is that of the object, not of its class here."""


@functools.cache
def remote_class(methods: frozenset[str]) -> type[Remote]:
    """The class that represents objects of the program with these special methods, so that the tests find those alone."""
    own: dict[str, Any] = {"__slots__": (), "__doc__": _OF_OBJECT}
    for name in methods.intersection(METHODS):
        operation = f"{name}_" if f"{name}_" in BINARY else name
        if operation in BINARY or name == "divmod":
            own[f"__{name}__"] = _binary(operation)
            own[f"__r{name}__"] = _binary(operation, reflected=True)
        elif name in IN_PLACE:
            own[f"__{name}__"] = _binary(name)
        else:
            own[f"__{name}__"] = vars(_Methods).get(f"__{name}__") or _unary(name)
    return type("Remote", (Remote,), own)


class _Types(type):
    """What makes `type` of the tests (`TypeOf`) act like Python's."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and is_remote(args[0]):
            return args[0]._remote_peer.request("type", args[0])
        found = type(*args, **kwargs)
        return cls if found is type else found

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type)


class TypeOf(type, metaclass=_Types):
    """`type` for the tests, which gives the program's class for one of its objects."""


async def awaited(remote: Remote) -> Any:
    """What a coroutine of the program returns; it runs over there, to its end."""
    return remote._remote_peer.request("await", remote)
