"""Code tasks on lists and numbers in them: filter-map-reduce pipelines, windows, nested lists, sorting and searching.

Most families combine two or three independent choices, so that complete combinations can be held out.
"""

from cora_cli.data.builtin.build import Dice, Draft
from cora_cli.data.builtin.functions import Task, present
from cora_cli.data.builtin.words import counted

LIST_NAMES = ("numbers", "values", "items", "data", "nums", "xs", "scores", "amounts")


def _numbers(dice: Dice, low: int = -20, high: int = 40) -> list[int]:
    return dice.numbers(dice.between(4, 7), low, high)


# (words before the noun, words after it, condition on x); {k} is a constant of the task.
PREDICATES = (
    ("even ", "", "x % 2 == 0"), ("odd ", "", "x % 2 != 0"), ("positive ", "", "x > 0"), ("negative ", "", "x < 0"),
    ("", " above {k}", "x > {k}"), ("", " below {k}", "x < {k}"), ("", " divisible by {d}", "x % {d} == 0"),
    ("", " that are not divisible by {d}", "x % {d} != 0"), ("", " between {d} and {k}", "{d} <= x <= {k}"), ("", " other than {k}", "x != {k}"),
)  # fmt: skip
MAPPINGS = (
    ("the {}", "x"), ("the squares of the {}", "x * x"), ("the doubles of the {}", "2 * x"), ("the absolute values of the {}", "abs(x)"),
    ("the last digits of the {}", "abs(x) % 10"), ("the {}, each increased by {m},", "x + {m}"), ("the {}, each multiplied by {m},", "x * {m}"),
)  # fmt: skip
REDUCTIONS = (
    ("returns the sum of {}", "sum({})"), ("returns a list of {}", "[{}]"), ("counts the distinct values among {}", "len({{{}}})"),
    ("returns {} in ascending order", "sorted({})"), ("returns {} in descending order", "sorted(({}), reverse=True)"),
    ("returns the largest of {}, or None if there is none", "max(({}), default=None)"),
    ("returns the smallest of {}, or None if there is none", "min(({}), default=None)"),
)  # fmt: skip


def pipeline(dice: Dice) -> Draft:
    """Filter, map and reduce a list of integers, as a comprehension or as a loop."""
    before, after, condition = dice.choice(PREDICATES)
    mapped, expression = dice.choice(MAPPINGS)
    does, reduction = dice.choice(REDUCTIONS)
    constants = {"k": dice.between(6, 15), "d": dice.between(3, 5), "m": dice.between(2, 9)}
    noun = dice.choice(("numbers", "integers", "elements"))
    xs = dice.choice(LIST_NAMES)
    x = dice.choice(("x", "n", "value", "v"))
    condition, expression = (part.format(**constants).replace("x", x) for part in (condition, expression))
    chosen = mapped.format(f"{before}{noun}{after}".format(**constants), **constants)
    body = f"return {reduction.format(f'{expression} for {x} in {xs} if {condition}')}"
    if does.startswith("returns the sum") and dice.chance(0.4):
        body = f"total = 0\nfor {x} in {xs}:\n    if {condition}:\n        total += {expression}\nreturn total"
    elif does.startswith("returns a list") and dice.chance(0.4):
        body = f"result = []\nfor {x} in {xs}:\n    if {condition}:\n        result.append({expression})\nreturn result"
    bug = (f"if {condition}", f"if not ({condition})") if dice.chance(0.5) else None
    return present(dice, Task(
        f"pipeline {before}{after}|{mapped}|{does}",
        dice.choice(("process", "select", "compute", "transform", "pick")) + "_" + xs,
        xs, f"{does.format(chosen).replace(',,', ',').rstrip(',')}" + dice.choice(("", f" in the list {xs}" if "None" not in does and "order" not in does else "")),
        body, [(_numbers(dice),), (_numbers(dice),), ([],)], bug=bug,
    ))  # fmt: skip


def windows(dice: Dice) -> Draft:
    """Chunks, sliding windows, neighbours and running values."""
    xs, k = dice.choice(LIST_NAMES), dice.between(2, 4)
    number, what, start, step = dice.choice((
        ("sum", "sum", "sum(part)", "total += x"), ("maximum", "max", "max(part)", "total = max(total, x)"),
        ("minimum", "min", "min(part)", "total = min(total, x)"), ("length", "len", "len(part)", ""), ("first element", "first", "part[0]", ""),
        ("last element", "last", "part[-1]", ""), ("spread (largest minus smallest)", "spread", "max(part) - min(part)", ""),
    ))  # fmt: skip
    kind = dice.below(5)
    if kind == 0:
        name, does = (
            f"chunk_{what}",
            f"splits {xs} into chunks of {k} and returns the {number} of each chunk; the last chunk may be shorter",
        )
        body = f"parts = [{xs}[i:i + {k}] for i in range(0, len({xs}), {k})]\nreturn [{start} for part in parts]"
        bug = (f", {k})]", ")]")
    elif kind == 1:
        name, does = f"sliding_{what}", f"returns the {number} of every window of {k} neighbouring elements of {xs}"
        body = f"windows = [{xs}[i:i + {k}] for i in range(len({xs}) - {k - 1})]\nreturn [{start} for part in windows]"
        bug = (f" - {k - 1}", "")
        if what in {"len", "first"}:
            bug = (f"i + {k}", f"i + {k + 1}") if what == "len" else (f" - {k - 1}", f" - {k}")
    elif kind == 2 and step:
        name, does = f"running_{what}", f"returns a list with the running {number} of {xs}"
        body = f"if not {xs}:\n    return []\ntotal = {xs}[0]\nresult = [total]\nfor x in {xs}[1:]:\n    {step}\n    result.append(total)\nreturn result"
        bug = (f"{xs}[1:]", xs) if what == "sum" else ("result = [total]", "result = []")
    elif kind == 3:
        gap = dice.between(1, 3)
        word, sign = dice.choice((("larger", ">"), ("smaller", "<")))
        name = f"count_{word}"
        does = f"counts the elements of {xs} that are {word} than the one {'directly' if gap == 1 else f'{gap} places'} before them"
        body = f"return sum(1 for i in range({gap}, len({xs})) if {xs}[i] {sign} {xs}[i - {gap}])"
        bug, number = (f" {sign} ", " != "), f"{word} {gap}"
    else:
        steps = dice.between(1, 3)
        side, part = dice.choice((("left", f"{xs}[k:] + {xs}[:k]"), ("right", f"{xs}[-k:] + {xs}[:-k]")))
        name, does = f"rotate_{side}", f"rotates {xs} by {counted(steps, 'place')} to the {side}; an empty list stays empty"
        body = f"if not {xs}:\n    return []\nk = {steps} % len({xs})\nreturn {part}"
        bug, number = None, f"{side} {steps}"
    cases = [(dice.numbers(dice.between(6, 8), 0, 30),), (dice.numbers(5, 0, 30),)]
    return present(dice, Task(f"windows {kind} {number} {k if kind < 2 else ''}", name, xs, does, body, cases, bug=bug))


def nested(dice: Dice) -> Draft:
    """Recursion over lists within lists."""
    xs, k = dice.choice(("nested", "tree", "data", "items")), dice.between(2, 15)
    what, base, join = dice.choice((
        ("the sum of all numbers", "item", "sum"), ("how many numbers there are", "1", "sum"), (f"how many numbers are above {k}", f"int(item > {k})", "sum"),
        ("the sum of the even numbers", "item if item % 2 == 0 else 0", "sum"), ("the sum of the squares of all numbers", "item * item", "sum"),
        ("the largest number", "item", "max"), ("the smallest number", "item", "min"), (f"how often {k} occurs", f"int(item == {k})", "sum"),
        ("the sum of the absolute values", "abs(item)", "sum"), (f"the sum of all numbers, each multiplied by {k},", f"item * {k}", "sum"),
    ))  # fmt: skip
    name = dice.choice(("deep", "nested", "recursive")) + "_" + {"sum": "total", "max": "max", "min": "min"}[join]
    does = f"returns {what} in {xs}, a list that can contain numbers and further lists"
    body = f"return {join}({name}(item) if isinstance(item, list) else {base} for item in {xs})"
    if join == "sum" and dice.chance(0.5):
        body = f"total = 0\nfor item in {xs}:\n    if isinstance(item, list):\n        total += {name}(item)\n    else:\n        total += {base}\nreturn total"
    a, b, c, d, e = dice.numbers(5, 0, 20)
    cases = [([a, [b, [c, d]], e],), ([[k], [a, [b]], k],)]
    return present(dice, Task(f"nested {what.replace(str(k), 'k')}", name, xs, does, body, cases))


def sorting(dice: Dice) -> Draft:
    """Orders of words or numbers by a key, with ties settled by the value."""
    words = dice.chance(0.5)
    xs = dice.choice(("words", "names", "labels") if words else LIST_NAMES)
    what, key = dice.choice(
        (("length", "len(x)"), ("last letter", "x[-1]"), ("number of vowels", "sum(c in 'aeiou' for c in x)"), ("first letter", "x[0]"),
         ("number of different letters", "len(set(x))"), ("reversed spelling", "x[::-1]"))
        if words else
        (("absolute value", "abs(x)"), ("last digit", "abs(x) % 10"), ("sum of digits", "sum(map(int, str(abs(x))))"),
         ("number of digits", "len(str(abs(x)))"), ("distance from {k}", "abs(x - {k})"), ("remainder modulo {k}", "x % {k}"))
    )  # fmt: skip
    k = dice.between(3, 9)
    shown, key = what.format(k=k), key.format(k=k)
    down, kind = dice.chance(0.4), dice.choice(("all", "first", "group", "all"))
    order = "descending" if down else "ascending"
    reverse = ", reverse=True" if down else ""
    if kind == "all":
        name, does = (
            "sort_" + xs,
            f"returns {xs} sorted by their {shown} in {order} order, with ties in {order} order of the elements",
        )
        body = f"return sorted({xs}, key=lambda x: ({key}, x){reverse})"
    elif kind == "first":
        count = dice.between(2, 3)
        name, does = (
            f"top_{xs}",
            f"returns the {count} elements of {xs} with the {'largest' if down else 'smallest'} {shown}, ties in {order} order of the elements",
        )
        body = f"ordered = sorted({xs}, key=lambda x: ({key}, x){reverse})\nreturn ordered[:{count}]"
    else:
        order = ""
        name, does = "group_" + xs, f"groups {xs} by their {shown} and returns a dictionary of lists"
        body = f"groups = {{}}\nfor x in {xs}:\n    groups.setdefault({key}, []).append(x)\nreturn groups"
    pool = ("apple", "fig", "kiwi", "plum", "banana", "pear", "melon", "otter", "deer", "tiger", "wolf", "seal", "camel")
    cases = [(dice.sample(pool, 4) if words else dice.sample(range(1, 120), 5),) for _ in range(2)]
    return present(dice, Task(f"sorting {what} {kind} {order}", name, xs, does, body, cases))


def searching(dice: Dice) -> Draft:
    """Positions, pairs, runs and duplicates, with loops."""
    xs, k = dice.choice(LIST_NAMES), dice.between(5, 20)
    x = dice.choice(("x", "value", "item"))
    word, condition = dice.choice((
        ("even", f"{x} % 2 == 0"), ("negative", f"{x} < 0"), (f"above {k}", f"{x} > {k}"), (f"below {k}", f"{x} < {k}"), ("odd", f"{x} % 2 != 0"),
        ("divisible by 3", f"{x} % 3 == 0"), (f"equal to {k}", f"{x} == {k}"), ("zero", f"{x} == 0"),
    ))  # fmt: skip
    variation = word.replace(str(k), "k")
    name, does, body, bug = dice.choice((
        ("first_index", f"returns the index of the first element of {xs} that is {word}, or -1 if there is none",
         f"for i, {x} in enumerate({xs}):\n    if {condition}:\n        return i\nreturn -1", ("return i", "return " + x)),
        ("last_index", f"returns the index of the last element of {xs} that is {word}, or -1 if there is none",
         f"for i in range(len({xs}) - 1, -1, -1):\n    {x} = {xs}[i]\n    if {condition}:\n        return i\nreturn -1", (", -1, -1", ", 0, -1")),
        ("all_indices", f"returns the indices of all elements of {xs} that are {word}",
         f"return [i for i, {x} in enumerate({xs}) if {condition}]", ("[i for", f"[{x} for")),
        ("longest_run", f"returns the length of the longest run of neighbouring elements of {xs} that are {word}",
         f"best = current = 0\nfor {x} in {xs}:\n    current = current + 1 if {condition} else 0\n    best = max(best, current)\nreturn best",
         ("else 0", "else current")),
        ("split_list", f"returns two lists: the elements of {xs} that are {word}, and the others",
         f"yes, no = [], []\nfor {x} in {xs}:\n    (yes if {condition} else no).append({x})\nreturn yes, no", ("return yes, no", "return no, yes")),
        ("take_until", f"returns the elements of {xs} before the first one that is {word}",
         f"result = []\nfor {x} in {xs}:\n    if {condition}:\n        break\n    result.append({x})\nreturn result", ("break", "continue")),
        ("replace_all", f"returns a copy of {xs} in which every element that is {word} is replaced by None",
         f"return [None if {condition} else {x} for {x} in {xs}]", None),
    ))  # fmt: skip
    cases = [([*_numbers(dice, -9, 25), dice.choice((0, k))],), ([1, k, 0, 6, -3, k + 1],), ([],)]
    return present(dice, Task(f"searching {name} {variation}", name, xs, does, body, cases, bug=bug))


def matrices(dice: Dice) -> Draft:
    """Rows, columns, diagonals and grids."""
    m, k = dice.choice(("matrix", "grid", "rows", "table")), dice.between(2, 9)
    what, function = dice.choice((("sum", "sum"), ("largest value", "max"), ("smallest value", "min")))
    variation, name, does, body = dice.choice((
        (f"rows {what}", f"row_{function}", f"returns the {what} of each row of {m}", f"return [{function}(row) for row in {m}]"),
        (f"columns {what}", f"column_{function}", f"returns the {what} of each column of {m}", f"return [{function}(column) for column in zip(*{m})]"),
        (f"diagonal {what}", f"diagonal_{function}", f"returns the {what} of the main diagonal of the square list of lists {m}",
         f"return {function}({m}[i][i] for i in range(len({m})))"),
        (f"antidiagonal {what}", f"antidiagonal_{function}", f"returns the {what} of the diagonal from top right to bottom left of {m}",
         f"return {function}(row[-1 - i] for i, row in enumerate({m}))"),
        ("transpose", "transpose", f"swaps rows and columns of {m}", f"return [list(column) for column in zip(*{m})]"),
        ("turn", "turn_right", f"turns {m} by 90 degrees clockwise", f"return [list(row) for row in zip(*{m}[::-1])]"),
        ("mirror", "mirror", f"mirrors each row of {m} from left to right", f"return [row[::-1] for row in {m}]"),
        ("flip", "flip", f"puts the rows of {m} in reverse order", f"return {m}[::-1]"),
        ("scale", "scale", f"multiplies every element of {m} by {k}", f"return [[{k} * x for x in row] for row in {m}]"),
        ("shift", "shift", f"adds {k} to every element of {m}", f"return [[x + {k} for x in row] for row in {m}]"),
        ("count", "count_in_grid", f"counts how often {k} occurs in {m}", f"return sum(row.count({k}) for row in {m})"),
        ("flatten", "flatten", f"joins the rows of {m} into one list", f"return [x for row in {m} for x in row]"),
    ))  # fmt: skip
    suffix = "" if dice.chance(0.5) else "_of_" + m
    cases = [([dice.numbers(3, 0, 9) for _ in range(3)],), ([[k, 1], [2, k]],)]
    return present(dice, Task(f"matrices {variation}", name + suffix, m, does, body, cases))


FAMILIES = (pipeline, windows, nested, sorting, searching, matrices)
