"""Right programs pass although the tests are in another process, and wrong ones get the fate that they had in one process."""

from collections.abc import Callable

import pytest

from cora_cli.evaluation.execution.run import Outcome
from tests.evaluation.execution.helpers import needs_sandbox, outcome, outcome_together

pytestmark = needs_sandbox

STACK = """
class Empty(LookupError):
    pass

class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def pop(self):
        if not self.items: raise Empty('nothing left')
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __eq__(self, other): return self.items == (other.items if isinstance(other, Stack) else other)
    def __contains__(self, item): return item in self.items
    def __add__(self, other): return Stack(self.items + list(other))
    def __getitem__(self, place): return self.items[place]
    def __setitem__(self, place, item): self.items[place] = item
    def __lt__(self, other): return len(self) < len(other)
    def __enter__(self): return self
    def __exit__(self, *_): self.items.clear()
    def __str__(self): return 'Stack of ' + ', '.join(map(str, self.items))
"""

RIGHT = {
    "arguments are modified": (
        "def sort(xs):\n    xs.sort()\ndef add(d, k): d[k] = [k]\ndef grow(xs): xs[0].append(1); return xs",
        "a = [3, 1, 2]\nassert sort(a) is None and a == [1, 2, 3]\nd = {}\nadd(d, 'x')\nassert d == {'x': ['x']}\n"
        "n = [[]]\ninner = n[0]\nassert grow(n) is n and inner == [1] and n[0] is inner",
    ),
    "an argument is kept": (
        "class Copy:\n    def __init__(self, xs): self.xs = xs\nclass Own:\n    def __init__(self, xs): self.xs = list(xs)",
        "a = [1]\nc, o = Copy(a), Own(a)\na.append(2)\nassert c.xs == [1, 2] and o.xs == [1] and c.xs is a\nc.xs.append(3)\nassert a == [1, 2, 3]",
    ),
    "values keep their kinds": (
        "from collections import Counter, OrderedDict, deque, namedtuple, defaultdict\nfrom datetime import date, timedelta\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
        "P = namedtuple('P', 'x y')\n"
        "def values(): return [True, 1, 10**30, -2.5, float('inf'), 'é\\udc80', b'\\0', None, (1, (2,)), {1: {2}}, frozenset([1]), range(3), 1j, ...]\n"
        "def more(): return Counter('aab'), OrderedDict(a=1), deque([1, 2], 5), date(2020, 2, 29), timedelta(1, 2), Decimal('1.10'), Fraction(1, 3), P(1, 2), bytearray(b'x'), {'a': 1}.keys()\n"
        "def table(): d = defaultdict(list); d['a'].append(1); return d",
        "from collections import Counter, OrderedDict, deque\nfrom datetime import date, timedelta\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
        "wanted = [True, 1, 10**30, -2.5, float('inf'), 'é\\udc80', b'\\0', None, (1, (2,)), {1: {2}}, frozenset([1]), range(3), 1j, ...]\n"
        "found = values()\nassert found == wanted and list(map(type, found)) == list(map(type, wanted))\n"
        "c, o, q, day, delta, d, f, p, b, k = more()\nassert c == Counter('aab') and c.most_common(1) == [('a', 2)]\nassert list(o) == ['a'] and q.maxlen == 5\n"
        "assert day == date(2020, 2, 29) and delta == timedelta(1, 2) and str(d) == '1.10' and f * 3 == 1\n"
        "assert p == (1, 2) and p.y == 2 and isinstance(p, P) and b == b'x' and k == {'a'}\nassert table()['b'] == [] and table() == {'a': [1]}",
    ),
    "a class": (
        STACK,
        "s = Stack([1])\nassert len(s.push(2)) == 2 and s.push(3) is s\nassert list(s) == [1, 2, 3] and 2 in s and 9 not in s\nassert s == [1, 2, 3] and s == Stack([1, 2, 3]) and s != [1]\n"
        "assert list(s + [4]) == [1, 2, 3, 4] and s[0] == 1 and s[1:] == [2, 3]\ns[0] = 7\nassert s.items[0] == 7 and s > Stack() and sorted([s, Stack()])[1] is s\n"
        "s.items.append(8)\nassert s.pop() == 8 and str(s) == 'Stack of 7, 2, 3' and isinstance(s, Stack) and not isinstance(3, Stack)\n"
        "with s as t:\n    assert t is s\ntry:\n    s.pop()\nexcept Empty as error:\n    assert 'nothing left' in str(error) and isinstance(error, LookupError)\nelse:\n    assert False",
    ),
    "functions go both ways": (
        "def apply(f, xs): return [f(x) for x in xs]\ndef adder(n): return lambda x: x + n\ndef compose(f, g): return lambda x: f(g(x))\ndef convert(kind, xs): return list(map(kind, xs))\n"
        "def total(xs): return sum(xs)\ndef again(f, n): return f(n) if n < 1 else again(f, n - 1)",
        "assert apply(lambda x: x * 2, [1, 2]) == [2, 4] and adder(3)(4) == 7\nassert compose(adder(1), lambda x: x * 10)(2) == 21\nassert convert(int, ['1', '2']) == [1, 2] and convert(str.upper, ['a']) == ['A']\n"
        "assert total(x for x in range(4)) == 6 and total(iter([1])) == 1 and again(lambda n: adder(n)(5), 3) == 5\n"
        "import math\nassert convert(math.sqrt, [4]) == [2.0]",
    ),
    "generators": (
        "def squares(n):\n    for i in range(n): yield i * i\ndef pairs(xs): return zip(xs, xs[1:])",
        "g = squares(3)\nassert next(g) == 0 and list(g) == [1, 4] and list(g) == []\nassert list(pairs([1, 2, 3])) == [(1, 2), (2, 3)] and 4 in squares(5)\nassert [x for x in squares(2)] == [0, 1]",
    ),
    "exceptions": (
        "import json\ndef check(x):\n    if x < 0: raise ValueError('negative')\n    return {}[x]\ndef load(text): return json.loads(text)\ndef read(): open('/nothing')",
        "import json\nfor bad, kind in ((-1, ValueError), (1, KeyError)):\n    try:\n        check(bad)\n    except kind as error:\n        assert error.args\n    else:\n        assert False\n"
        "try:\n    load('{')\nexcept json.JSONDecodeError:\n    pass\ntry:\n    read()\nexcept FileNotFoundError as error:\n    assert error.errno == 2",
    ),
    "cycles": ("def ring():\n    a = []\n    a.append(a)\n    return a", "r = ring()\nassert r[0] is r and len(r) == 1"),
    "an enumeration": (
        "import enum\nclass Colour(enum.Enum):\n    RED = 1\ndef mix(): return Colour.RED",
        "assert mix() is Colour.RED and mix() == Colour.RED and mix().name == 'RED' and Colour(1) is mix()",
    ),
    "a data class": (
        "from dataclasses import dataclass\n@dataclass(order=True)\nclass Point:\n    x: int\n    y: int = 0\ndef move(p): p.x += 1; return p",
        "p = Point(1)\nassert move(p) is p and p.x == 2 and p == Point(2, 0) and Point(1) < Point(2) and repr(p) == 'Point(x=2, y=0)'\np.y = 5\nassert p.y == 5 and p != Point(2)",
    ),
    "many calls": ("def f(xs): return [x + 1 for x in xs]", "for i in range(300):\n    xs = list(range(i))\n    assert f(xs) == [x + 1 for x in xs]"),
    "rarer values": (
        "from array import array\nfrom pathlib import Path\nfrom uuid import UUID\ndef parent(p): return p.parent\ndef uuid(text): return UUID(text)\ndef grow(a): a.append(3); return a",
        "from array import array\nfrom pathlib import Path\nfrom uuid import UUID\nassert parent(Path('/a/b')) == Path('/a') and uuid('0' * 32) == UUID('0' * 32)\n"
        "a = array('i', [1])\nassert grow(a) is a and a == array('i', [1, 3])",
    ),
    "the class of an object": (
        "class Empty(ValueError): pass\nclass Items(list): pass\nclass Base: pass\nclass Derived(Base):\n    'Says what it is.'\n    def __init__(self): self.inside = [1]\ndef empty(): return Empty('none')",
        "d = Derived()\nassert type(d) is Derived and d.__class__.__name__ == 'Derived' and isinstance(d, Base) and not isinstance(d, (int, str)) and d.__doc__ == 'Says what it is.'\n"
        "assert isinstance(Items(), list) and isinstance(empty(), ValueError) and isinstance(empty(), Empty)\n"
        "assert type(3) is int and type(int) is type and type(Derived) is type and isinstance(Derived, type)",
    ),
    "copies of an object": (
        "class Box:\n    def __init__(self): self.inside = [1]",
        "import copy\nb = Box()\nshallow, deep = copy.copy(b), copy.deepcopy(b)\nshallow.inside.append(2)\nassert b.inside == [1, 2] and deep.inside == [1] and deep is not b",
    ),
    "a global variable changes": (
        "count = 0\nnames = []\ndef note(name):\n    global count, names\n    count += 1\n    names = [*names, name]",
        "note('a')\nassert count == 1 and names == ['a']\ndef later():\n    note('b')\n    return count\nassert later() == 2 and names == ['a', 'b']",
    ),
    "coroutines": (
        "import asyncio\nasync def double(x):\n    await asyncio.sleep(0)\n    if x < 0: raise ValueError('negative')\n    return [2 * x]",
        "import asyncio\nasync def both(): return await asyncio.gather(double(1), double(2))\nassert asyncio.run(double(3)) == [6] and asyncio.run(both()) == [[2], [4]]\n"
        "try:\n    asyncio.run(double(-1))\nexcept ValueError as error:\n    assert str(error) == 'negative'\nelse:\n    assert False",
    ),
    "a function of the tests has a name and parameters": (
        "import inspect\ndef calls(f):\n    return f.__name__, f.__doc__, [*inspect.signature(f).parameters], f.__code__.co_argcount, inspect.isfunction(f)\n"
        "def call(f, *args, **named): return f(*args, **named)\ndef same(f, g): return f is g",
        "def add(a, b=2, *rest, c, d=4, **more):\n    'Adds.'\n    return a, b, rest, c, d, more\n"
        "assert calls(add) == ('add', 'Adds.', ['a', 'b', 'rest', 'c', 'd', 'more'], 2, True) and same(add, add) and not same(add, calls)\n"
        "assert call(add, 1, c=3) == (1, 2, (), 3, 4, {}) and call(add, 1, 5, 6, c=3, d=7, e=8) == (1, 5, (6,), 3, 7, {'e': 8}) and call(add, c=3, b=9, a=1)[1] == 9\n"
        "def only(a, b=2, /, c=3): return a, b, c\nassert call(only, 1) == (1, 2, 3) and call(only, 1, c=5) == (1, 2, 5) and calls(lambda x: x)[0] == '<lambda>'",
    ),
    "defaults of a function of the tests": (
        "import inspect\ndef bound(f, *args):\n    found = inspect.signature(f).bind(*args)\n    found.apply_defaults()\n    return dict(found.arguments), f.__defaults__\n"
        "def call(f, *args, **named): return f(*args, **named)",
        "def f(a, b=2, *, c=(3,), d=len): return a, b, c, d is len\nassert bound(f, 1) == ({'a': 1, 'b': 2, 'c': (3,), 'd': len}, (2,)) and call(f, 1) == (1, 2, (3,), True)\n"
        "class Own: pass\ndef g(a=Own()): return isinstance(a, Own)\nassert call(g)\n"
        "def add(x, seen=[]): seen.append(x); return seen\nassert call(add, 1) == [1] and call(add, 2) == [1, 2] and add(3) == [1, 2, 3]",
    ),
    "what an object can and cannot do": (
        "class Bag:\n    def __init__(self): self.items = []\nclass Full(Bag):\n    def __len__(self): return len(self.items)\n    def __iter__(self): return iter(self.items)\n"
        "def squares():\n    yield 1\nclass Events:\n    def __init__(self): self.all = []\n    def on(self, f): self.all.append(f)\n    def off(self, f): self.all.remove(f)\n    def fire(self): [f(1) for f in self.all]",
        "import inspect, types\nfrom collections.abc import Generator, Iterable, Sized\nassert not hasattr(Bag(), '__len__') and not callable(Bag()) and not isinstance(Bag(), (Sized, Iterable)) and bool(Bag())\n"
        "assert hasattr(Full(), '__len__') and isinstance(Full(), Sized) and isinstance(Full(), Iterable) and not Full() and callable(Full) and callable(Full().__len__)\n"
        "assert isinstance(squares(), types.GeneratorType) and isinstance(squares(), Generator) and inspect.isgeneratorfunction(squares) and inspect.isfunction(squares)\n"
        "seen, e = [], Events()\ne.on(seen.append)\ne.on(e.all.count)\ne.fire()\ne.off(seen.append)\ne.fire()\nassert seen == [1] and len(e.all) == 1",
    ),
    "threads": (
        "import threading\nfrom concurrent.futures import ThreadPoolExecutor\ndef apply(f, xs):\n    with ThreadPoolExecutor(4) as pool: return list(pool.map(f, xs))\n"
        "class Counter:\n    def __init__(self): self.count, self.lock = 0, threading.Lock()\n    def add(self):\n        with self.lock: self.count += 1",
        "import threading\nassert apply(lambda x: x * x, list(range(40))) == [x * x for x in range(40)]\nc = Counter()\n"
        "threads = [threading.Thread(target=lambda: [c.add() for _ in range(20)]) for _ in range(4)]\n[one.start() for one in threads]\n[one.join() for one in threads]\nassert c.count == 80",
    ),
    "results that inherit from built-in classes": (
        "import collections, enum\nclass Colour(str, enum.Enum):\n    RED = 'red'\nclass Level(enum.IntEnum):\n    HIGH = 2\nclass Items(list):\n    def __iter__(self): return iter(())\n"
        "class Key(str):\n    def __eq__(self, other): return self.lower() == other.lower()\n    def __hash__(self): return hash(self.lower())\ndef colour(): return Colour.RED\ndef level(): return Level.HIGH\ndef items(): return Items([3])\ndef users(): return collections.UserList([1]), collections.UserDict(a=1)",
        "assert colour() == 'red' and 'e' in colour() and 'ed' in colour() and colour() + '!' == 'red!' and '!' + colour() == '!red'\n"
        "assert level() == 2 and level() > 1 and 1 < level() and level() + 1 == 3 and divmod(5, level()) == (2, 1)\n"
        "assert {Key('a'): 1}[Key('A')] == 1 and len({Key('a'), Key('A')}) == 1\n"
        "assert items() == [3] and items() + [4] == [3, 4] and 3 in items() and users()[0] == [1] and users()[1] == {'a': 1}\n"
        "assert colour() in {'red'} and {colour(): 1}['red'] == 1 and collections.Counter([level(), level()])[2] == 2",
    ),
    "exceptions have attributes and a text": (
        "class Missing(LookupError):\n    def __init__(self, key, code):\n        super().__init__(key)\n        self.code, self.tried = code, [key]\n    def __str__(self): return f'{self.code}: {self.args[0]}'\n    status = 4\n    def again(self): return self.args[0]\n"
        "def find(key): raise Missing(key, 404)\ndef leave(): raise SystemExit(3)\ndef read(): open('/nothing')\ndef decode(text): return text.decode()",
        "try:\n    find('a')\nexcept Missing as error:\n    assert (error.code, error.tried, str(error), error.args) == (404, ['a'], '404: a', ('a',))\n    assert error.status == 4 and error.again() == 'a'\nelse:\n    assert False\n"
        "try:\n    leave()\nexcept SystemExit as error:\n    assert error.code == 3\n"
        "try:\n    read()\nexcept OSError as error:\n    assert error.filename == '/nothing' and 'None' not in str(error)\n"
        "try:\n    decode(b'a\\xff')\nexcept UnicodeDecodeError as error:\n    assert (error.start, error.reason) == (1, 'invalid start byte')",
    ),
    "context managers see exceptions": (
        "class Ignoring:\n    def __init__(self, *kinds): self.kinds, self.seen = kinds, []\n    def __enter__(self): return self\n"
        "    def __exit__(self, kind, error, trace):\n        self.seen.append(str(error))\n        return kind is not None and issubclass(kind, self.kinds)",
        "i = Ignoring(ValueError)\nwith i:\n    raise ValueError('one')\nassert i.seen == ['one']\ntry:\n    with i:\n        raise KeyError('two')\nexcept KeyError:\n    pass\nelse:\n    assert False",
    ),
    "asynchronous iterators and context managers": (
        "import asyncio\nasync def count(n):\n    for i in range(n):\n        await asyncio.sleep(0)\n        yield i\nclass Open:\n    async def __aenter__(self): return [1]\n    async def __aexit__(self, *_): pass",
        "import asyncio\nasync def main():\n    async with Open() as found:\n        return found + [i async for i in count(3)]\nassert asyncio.run(main()) == [1, 0, 1, 2]",
    ),
    "its main part is not run": ("def f(): return 1\nif __name__ == '__main__':\n    print(input())", "assert f() == 1"),
    "standard output": ("def f():\n    print('hello')\n    return 1", "assert f() == 1"),
    "asyncio": ("import asyncio\nasync def g(): return 5\ndef f(): return asyncio.run(g())", "assert f() == 5"),
    "a temporary file": (
        "import tempfile\ndef f():\n    with tempfile.TemporaryFile('w+') as file:\n        file.write('x')\n        file.seek(0)\n        return file.read()",
        "assert f() == 'x'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_passes(name: str):
    source, tests = RIGHT[name]
    exec(f"{source}\n{tests}", {"__name__": "here"})  # the program is right
    assert outcome(source, tests).detail == ""
    assert outcome(source, tests).fate == "passed"


@pytest.mark.parametrize(
    ("source", "fate", "detail"),
    [
        ("def f(x): return x", "wrong", "assert f(1) == 2"),
        ("def f(x): return x / 0", "exception", "ZeroDivisionError: division by zero"),
        ("def f(x): return None", "wrong", "assert f(1) == 2"),
        ("def g(x): return x + 1", "exception", "NameError: name 'f' is not defined"),
        ("import numpy\ndef f(x): return x + 1", "exception", "ModuleNotFoundError: No module named 'numpy'"),
        ("def f(x) return x", "not code", ""),
        ("", "not code", ""),
        ("x = bytearray(10 ** 11)", "memory", ""),
        ("open('/usr/x', 'w')", "refused", "OSError: [Errno 30] Read-only file system"),
        ("import socket\nsocket.socket()", "refused", "a system call"),
        ("import os\nos.abort()", "exception", "ended by SIGABRT"),
    ],
)
def test_the_fate_of_a_program(source: str, fate: str, detail: str):
    found = outcome(source, "assert f(1) == 2", reference="def f(x): return x + 1")
    assert found.fate == fate
    assert found.detail.startswith(detail)


UNITTEST = "import unittest\nclass Test(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)\n"


@pytest.mark.parametrize("runs", ["unittest.main()", "if __name__ == '__main__':\n    unittest.main(argv=['x'])"])
@pytest.mark.parametrize("run_one", [outcome, outcome_together])
def test_tests_may_run_themselves_as_the_main_program(runs: str, run_one: Callable[..., Outcome]):
    reference = "def f(x): return x + 1"
    for source, fate in ((reference, "passed"), ("def f(x): return x", "wrong"), ("import sys\ndef f(x): sys.exit()", "wrong")):
        found = run_one(source, UNITTEST + runs, reference=reference)
        assert (found.fate, found.detail == "") == (fate, fate == "passed")


def test_a_program_ends_at_its_limit_in_processor_seconds():
    found = outcome("while True: pass", "assert f()", reference="def f(): pass", seconds=1)
    assert found.fate == "timeout"
    assert 0.5 < found.seconds < 3


@pytest.mark.slow
def test_four_busy_processes_beside_them_change_no_fate():
    import multiprocessing

    programs = [
        "def f(x): return x + 1",
        "def f(x): return x",
        "def f(x):\n    for _ in range(3 * 10 ** 6): pass\n    return x + 1",
        "while True: pass",
    ]
    programs.append("import time\ndef f(x):\n    time.sleep(1)\n    return x + 1")

    def fates():
        return [outcome(source, "assert f(1) == 2", reference="def f(x): pass", seconds=2).fate for source in programs]

    alone = fates()
    busy = [multiprocessing.get_context("spawn").Process(target=_busy, daemon=True) for _ in range(4)]
    for one in busy:
        one.start()
    try:
        assert fates() == alone == ["passed", "wrong", "passed", "timeout", "passed"]
    finally:
        for one in busy:
            one.kill()
            one.join()


def _busy():
    while True:
        pass
