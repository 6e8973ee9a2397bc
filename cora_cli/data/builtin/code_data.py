"""Code tasks on records: dictionaries, filters in the manner of SQL, input that may be invalid, and small classes.

A class is checked by one assertion that creates an object and compares the results of several calls.
"""

from cora_cli.data.builtin.build import Dice, Draft
from cora_cli.data.builtin.functions import Case, Task, present, run
from cora_cli.data.builtin.words import FRUITS, NAMES, capital, listing

# What the records are, their text field with its values, their integer fields.
RECORDS = (
    ("employees", "name", "city", ("Oslo", "Lyon", "Perth"), ("age", "salary")), ("products", "title", "category", ("toy", "book", "tool"), ("price", "stock")),
    ("students", "name", "subject", ("art", "music", "maths"), ("score", "absences")), ("orders", "customer", "status", ("open", "paid", "sent"), ("total", "items")),
    ("films", "title", "genre", ("crime", "drama", "comedy"), ("minutes", "votes")), ("flights", "code", "origin", ("Cork", "Porto", "Leeds"), ("delay", "seats")),
)  # fmt: skip


def records(dice: Dice) -> Draft:
    """Select, order, group and aggregate a list of dictionaries."""
    table, label, text, options, numbers = dice.choice(RECORDS)
    number, other = dice.shuffled(numbers)
    value, limit, count = dice.choice(options), dice.between(20, 70), dice.between(2, 3)
    where, such = dice.choice((
        (f"r['{text}'] == '{value}'", f"with {text} '{value}'"), (f"r['{number}'] > {limit}", f"with {number} above {limit}"),
        (f"r['{number}'] <= {limit}", f"with {number} of at most {limit}"), (f"r['{text}'] != '{value}'", f"whose {text} is not '{value}'"),
        (f"r['{text}'] == '{value}' and r['{number}'] > {limit}", f"with {text} '{value}' and {number} above {limit}"),
    ))  # fmt: skip
    key, name, does, body = dice.choice((
        ("select", "select", f"returns the '{label}' of all records {such}", f"return [r['{label}'] for r in {table} if {where}]"),
        ("order", "ordered", f"returns the '{label}' of all records {such}, ordered by '{other}' from high to low",
         f"kept = [r for r in {table} if {where}]\nkept.sort(key=lambda r: r['{other}'], reverse=True)\nreturn [r['{label}'] for r in kept]"),
        ("sum", "total", f"returns the sum of '{other}' over all records {such}", f"return sum(r['{other}'] for r in {table} if {where})"),
        ("count", "count", f"counts the records {such}", f"return sum(1 for r in {table} if {where})"),
        ("mean", "average", f"returns the mean of '{other}' over the records {such}, or 0 if there is none",
         f"values = [r['{other}'] for r in {table} if {where}]\nreturn sum(values) / len(values) if values else 0"),
        ("best", "best", f"returns the '{label}' of the record with the highest '{other}' among those {such}, or None",
         f"best = max((r for r in {table} if {where}), key=lambda r: r['{other}'], default=None)\nreturn best['{label}'] if best else None"),
        ("group", f"count_by_{text}", f"counts the records for each '{text}' and returns a dictionary",
         f"counts = {{}}\nfor r in {table}:\n    counts[r['{text}']] = counts.get(r['{text}'], 0) + 1\nreturn counts"),
        ("group sum", f"{number}_by_{text}", f"returns a dictionary with the sum of '{number}' for each '{text}'",
         f"sums = {{}}\nfor r in {table}:\n    sums[r['{text}']] = sums.get(r['{text}'], 0) + r['{number}']\nreturn sums"),
        ("top", "top", f"returns the '{label}' of the {count} records with the {'highest' if limit % 2 else 'lowest'} '{number}'",
         f"ordered = sorted({table}, key=lambda r: r['{number}']{', reverse=True' if limit % 2 else ''})\nreturn [r['{label}'] for r in ordered[:{count}]]"),
        ("index", f"by_{label}", f"returns a dictionary from '{label}' to '{other}' for the records {such}",
         f"return {{r['{label}']: r['{other}'] for r in {table} if {where}}}"),
    ))  # fmt: skip
    fields = (text, *sorted(numbers))
    rows = [
        {
            label: label_value,
            **{field: options[dice.below(3)] if field == text else score for field, score in zip(fields, scores, strict=True)},
        }
        for label_value, scores in zip(
            ("A", "B", "C"), zip(*(dice.sample(range(10, 95), 3) for _ in fields), strict=True), strict=True
        )
    ]
    # One record gets matching values, so that the filter has something to find.
    rows[0] |= {text: value, number: limit - 5 if "<=" in where else limit + 5}
    does += dice.choice(
        (
            f" ({table} is a list of dictionaries)",
            f"; {table} is a list of dictionaries with the keys {listing([label, *fields])}",
        )
    )
    variation = "" if key in {"group", "group sum", "top"} else such.replace(value, "v").replace(str(limit), "k")
    suffix = "" if "_by_" in name else f"_{table}"
    return present(dice, Task(f"records {key} {table} {variation}", name + suffix, table, does, body, [(rows,), ([],)]))


def dictionaries(dice: Dice) -> Draft:
    """Filter, invert, merge and change dictionaries from words to numbers."""
    d, k = dice.choice(("prices", "stock", "scores", "counts", "ages")), dice.between(4, 12)
    variation, test = dice.choice((
        ("whose value is above {k}", "value > {k}"), ("whose value is at most {k}", "value <= {k}"), ("whose value is even", "value % 2 == 0"),
        ("whose key has more than 4 letters", "len(key) > 4"), ("whose key contains the letter a", "'a' in key"), ("whose value is not {k}", "value != {k}"),
    ))  # fmt: skip
    such, condition = variation.format(k=k), test.format(k=k)
    down = dice.chance(0.5)
    key, name, does, body, two = dice.choice((
        ("filter", "filter_items", f"returns a new dictionary with the entries of {d} {such}", f"return {{key: value for key, value in {d}.items() if {condition}}}", False),
        ("keys", "matching_keys", f"returns the sorted keys of the entries of {d} {such}", f"return sorted(key for key, value in {d}.items() if {condition})", False),
        ("sum", "sum_values", f"adds up the values of the entries of {d} {such}", f"return sum(value for key, value in {d}.items() if {condition})", False),
        ("delete", "remove_items", f"deletes the entries of {d} {such} from the dictionary itself and returns how many were deleted",
         f"doomed = [key for key, value in {d}.items() if {condition}]\nfor key in doomed:\n    del {d}[key]\nreturn len(doomed)", False),
        ("raise", "raise_values", f"returns a copy of {d} in which the entries {such} have their value increased by {k}",
         f"return {{key: value + {k} if {condition} else value for key, value in {d}.items()}}", False),
        ("any", "any_item", f"checks whether {d} has an entry {such}", f"return any({condition} for key, value in {d}.items())", False),
        ("partition", "split_items", f"splits {d} into two dictionaries: the entries {such}, and the others",
         f"yes, no = {{}}, {{}}\nfor key, value in {d}.items():\n    if {condition}:\n        yes[key] = value\n    else:\n        no[key] = value\nreturn yes, no", False),
        ("invert", "invert", f"swaps keys and values of {d} and collects the keys of equal values in a list",
         f"result = {{}}\nfor key, value in {d}.items():\n    result.setdefault(value, []).append(key)\nreturn result", False),
        (f"sort {down}", "ranking", f"returns the keys of {d} in {'descending' if down else 'ascending'} order of their values",
         f"return sorted({d}, key=lambda key: {d}[key]{', reverse=True' if down else ''})", False),
        (f"merge {down}", "merge", f"merges the dictionaries {d} and other; for keys in both, the {'values are added' if down else 'larger value is kept'}",
         f"result = dict({d})\nfor key, value in other.items():\n    result[key] = "
         + ("result.get(key, 0) + value" if down else "max(value, result.get(key, value))") + "\nreturn result", True),
        (f"shared {down}", "common_keys", f"returns the sorted keys that occur in {'both' if down else 'exactly one'} of the dictionaries {d} and other",
         f"return sorted({d}.keys() {'&' if down else '^'} other.keys())", True),
    ))  # fmt: skip
    fruits = dice.sample(FRUITS, 5)
    first = dict(zip(fruits[:4], dice.numbers(4, 1, 20), strict=True))
    second = dict(zip(fruits[2:], dice.numbers(3, 1, 20), strict=True))
    simple = key.split()[0] in {"invert", "sort", "merge", "shared"}
    combination = f"dictionaries {key} {'' if simple else variation}"
    cases: list[Case] = [(first, second)] if two else [(first,), ({},)]
    return present(dice, Task(combination, name, f"{d}, other" if two else d, does, body, cases))


FALLBACKS = ("None", "0", "-1", "'n/a'", "False")


def robust(dice: Dice) -> Draft:
    """Functions that return a fallback for invalid input, or raise an error."""
    fallback, k = dice.choice(FALLBACKS), dice.between(2, 50)
    x = dice.choice(("text", "raw", "value"))
    field, field_two = dice.sample(("name", "price", "city", "email", "size", "id"), 2)
    refuse = dice.chance(0.25)
    attempts: tuple[tuple[str, str, str, str, str, str, list[Case]], ...] = (
        ("int", "parse_int", x, f"converts the string {x} to an integer", f"return int({x})", "ValueError", [("17",), ("4x",), ("",)]),
        ("float", "parse_float", x, f"converts the string {x} to a float", f"return float({x})", "ValueError", [("2.5",), ("two",), ("7",)]),
        ("divide", "safe_divide", "a, b", "divides a by b", "return a / b", "ZeroDivisionError", [(9, 2), (k, 0), (0, 5)]),
        ("remainder", "safe_remainder", "a, b", "returns the remainder of a divided by b", "return a % b", "ZeroDivisionError", [(k, 4), (k, 0)]),
        ("index", "item_at", "items, i", "returns the element of items at index i", "return items[i]", "IndexError", [([k, 5, 8], 1), ([k], 3), ([], 0)]),
        ("key", f"get_{field}", "record", f"returns the value of the key '{field}' in the dictionary record", f"return record['{field}']", "KeyError",
         [({field: k},), ({field_two: 1},)]),
        ("nested", f"get_{field}_{field_two}", "record", f"returns record['{field}']['{field_two}']", f"return record['{field}']['{field_two}']", "(KeyError, TypeError)",
         [({field: {field_two: k}},), ({field: None},), ({},)]),
        ("json", "json_field", x, f"reads {x} as JSON and returns the value of its key '{field}'", f"return json.loads({x})['{field}']", "(ValueError, KeyError)",
         [(f'{{"{field}": {k}}}',), ("{}",), ("{oops",)]),
        ("position", "position_of", "items, wanted", "returns the index of wanted in the list items", "return items.index(wanted)", "ValueError",
         [([4, k, 9], k), ([1], 60)]),
        ("mean", "mean", "numbers", "returns the mean of numbers", "return sum(numbers) / len(numbers)", "ZeroDivisionError", [([k, k + 2],), ([],)]),
        ("second", "second_word", x, f"returns the second word of {x}", f"return {x}.split()[1]", "IndexError", [("red blue green",), ("red",), ("",)]),
        ("extension", "extension", x, f"returns what follows the last dot of the file name {x}", f"return {x}[{x}.rindex('.') + 1:]", "ValueError", [("a.tar.gz",), ("README",)]),
        ("sum", "sum_strings", "parts", "adds up a list of strings that hold integers", "return sum(int(part) for part in parts)", "ValueError", [(["3", str(k)],), (["3", "x"],)]),
    )  # fmt: skip
    key, name, parameters, does, attempt, errors, cases = dice.choice(attempts)
    imports = "import json" if key == "json" else ""
    if refuse:
        message = dice.choice(("bad input", "invalid value", "cannot handle this input"))
        does += f", and raises a ValueError with the message '{message}' if that is impossible"
        body = f"try:\n    {attempt}\nexcept {errors}:\n    raise ValueError('{message}')"
        return present(dice, Task(f"robust {key} refuse", name, parameters, does, body, cases[:1], imports=imports))
    body = f"try:\n    {attempt}\nexcept {errors}:\n    return {fallback}"
    does += f", or returns {fallback} if that is impossible"
    return present(dice, Task(f"robust {key} {fallback}", name, parameters, does, body, cases, imports=imports))


# Class name, parameter, attribute; then per method: name, parameters, what it does, body, arguments.
# In bodies and descriptions {a} is the attribute and {k} a constant of the task.
AMOUNT_METHODS = (
    ("add", "amount", "adds amount and returns the new {a}", "self.{a} += amount\nreturn self.{a}", "7"),
    ("take", "amount", "subtracts amount if {a} is large enough, and returns whether it did", "if amount > self.{a}:\n    return False\nself.{a} -= amount\nreturn True", "12"),
    ("double", "", "doubles {a} and returns it", "self.{a} *= 2\nreturn self.{a}", ""),
    ("reset", "", "sets {a} to 0 and returns its old value", "old = self.{a}\nself.{a} = 0\nreturn old", ""),
    ("is_empty", "", "checks whether {a} is 0", "return self.{a} == 0", ""),
    ("exceeds", "limit", "checks whether {a} is above limit", "return self.{a} > limit", "10"),
    ("cap", "", "reduces {a} to {k} if it is larger, and returns it", "self.{a} = min(self.{a}, {k})\nreturn self.{a}", ""),
)  # fmt: skip
LIST_METHODS = (
    ("add", "item", "appends item and returns the number of {a}", "self.{a}.append(item)\nreturn len(self.{a})", "'x'"),
    ("remove_first", "", "removes and returns the first of the {a}, or returns None if there is none", "return self.{a}.pop(0) if self.{a} else None", ""),
    ("remove_last", "", "removes and returns the last of the {a}, or returns None if there is none", "return self.{a}.pop() if self.{a} else None", ""),
    ("size", "", "returns the number of {a}", "return len(self.{a})", ""),
    ("has", "item", "checks whether item is among the {a}", "return item in self.{a}", "'b'"),
    ("clear", "", "removes all {a} and returns how many there were", "count = len(self.{a})\nself.{a}.clear()\nreturn count", ""),
    ("swap_ends", "", "swaps the first and the last of the {a}, if there are at least two, and returns the list",
     "if len(self.{a}) > 1:\n    self.{a}[0], self.{a}[-1] = self.{a}[-1], self.{a}[0]\nreturn self.{a}", ""),
)  # fmt: skip
BOX_METHODS = (
    ("area", "", "returns the area", "return self.width * self.height", ""),
    ("perimeter", "", "returns the perimeter", "return 2 * (self.width + self.height)", ""),
    ("is_square", "", "checks whether both sides are equal", "return self.width == self.height", ""),
    ("scale", "factor", "multiplies both sides by factor and returns them as a tuple", "self.width *= factor\nself.height *= factor\nreturn self.width, self.height", "3"),
    ("turn", "", "swaps width and height and returns them as a tuple", "self.width, self.height = self.height, self.width\nreturn self.width, self.height", ""),
    ("fits_into", "other", "checks whether neither side is longer than the same side of other", "return self.width <= other.width and self.height <= other.height", "{c}(5, 5)"),
)  # fmt: skip
AMOUNTS = (
    ("Account", "balance"),
    ("Tank", "litres"),
    ("Wallet", "coins"),
    ("Battery", "charge"),
    ("Score", "points"),
    ("Stock", "units"),
)
LISTS = (
    ("Playlist", "songs"),
    ("Queue", "items"),
    ("Basket", "goods"),
    ("Shelf", "books"),
    ("Team", "members"),
    ("Inbox", "messages"),
)
BOXES = (("Rectangle", "width, height"), ("Field", "width, height"), ("Poster", "width, height"), ("Window", "width, height"))
KINDS = (
    ("amount", AMOUNTS, AMOUNT_METHODS, ("10", "25", "5")),
    ("list", LISTS, LIST_METHODS, ("['a', 'b']", "['c']", "[]")),
    ("box", BOXES, BOX_METHODS, ("4, 6", "3, 3", "5, 2")),
)


def classes(dice: Dice) -> Draft:
    """A class with two or three methods."""
    kind, names, pool, starts = dice.choice(KINDS)
    name, parameter = dice.choice(names)
    k = dice.between(8, 40)
    methods = dice.sample(pool, dice.between(2, 3))
    fields = parameter.split(", ")
    copies = [f"        self.{field} = {'list(' + field + ')' if kind == 'list' else field}" for field in fields]
    lines = [f"class {name}:", f"    def __init__(self, {parameter}):", *copies]
    wanted, calls = [], []
    for method, arguments, does, body, values in methods:
        lines += ["", f"    def {method}({', '.join(filter(None, ('self', arguments)))}):"]
        lines += [f"        {line}" for line in body.format(a=parameter, k=k).split("\n")]
        wanted.append(f"`{method}({arguments})` {does.format(a=parameter, k=k)}")
        calls.append(f"o.{method}({values.format(c=name)})")
    code = "\n".join(lines)
    checks = []
    for start in dice.sample(starts, 2):
        expression = f"(o := {name}({start}), {', '.join(calls)})[1:]"
        outcome = run(f"{code}\nresult = repr({expression})")["result"]
        checks.append(f"assert {expression} == {outcome}")
    owner = dice.choice(NAMES)
    lead = dice.choice((
        f"Write a Python class `{name}` that is created with {parameter}. Methods: {'; '.join(wanted)}.",
        f"Implement a class `{name}({parameter})` in Python. {'. '.join(capital(part) for part in wanted)}.",
        f"{owner} needs a class `{name}` with the constructor argument{'s' if len(fields) > 1 else ''} {listing(fields)} and these methods: {'; '.join(wanted)}.",
    ))  # fmt: skip
    return Draft(lead, code, "", f"classes {kind} {' '.join(sorted(method[0] for method in methods))}", tuple(checks))


FAMILIES = (records, dictionaries, robust, classes)
