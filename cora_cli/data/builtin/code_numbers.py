"""Code tasks on single numbers and dates: digits, divisors, recurrences, thresholds, calendars.

Dates are passed as ISO strings, so that assertions need no imports.
"""

from cora_cli.data.builtin.build import Dice, Draft
from cora_cli.data.builtin.functions import Task, present
from cora_cli.data.builtin.words import DAYS, counted, listing

NUMBER_NAMES = ("n", "number", "value", "num")


def digits(dice: Dice) -> Draft:
    """Choose digits of a number and combine them."""
    n, k = dice.choice(NUMBER_NAMES), dice.between(3, 6)
    key, which, condition = dice.choice((
        ("all", "digits", ""), ("even", "even digits", " if int(d) % 2 == 0"), ("odd", "odd digits", " if int(d) % 2 == 1"),
        ("above", f"digits above {k}", f" if int(d) > {k}"), ("below", f"digits below {k}", f" if int(d) < {k}"), ("nonzero", "digits other than 0", " if d != '0'"),
    ))  # fmt: skip
    name, does, body, bug = dice.choice((
        ("sum", f"returns the sum of the {which} of the non-negative integer {n}", f"return sum(int(d) for d in str({n}){condition})", ("int(d) for", "1 for")),
        ("count", f"counts the {which} of the non-negative integer {n}", f"return sum(1 for d in str({n}){condition})", ("1 for", "2 for")),
        ("list", f"returns the {which} of the non-negative integer {n} as a list of integers, from left to right",
         f"return [int(d) for d in str({n}){condition}]", ("int(d) for", "d for")),
        ("largest", f"returns the largest of the {which} of the non-negative integer {n}, or None if there is none",
         f"return max((int(d) for d in str({n}){condition}), default=None)", ("max", "min")),
        ("product", f"multiplies the {which} of the non-negative integer {n}; without any the result is 1",
         f"result = 1\nfor d in str({n}):\n    {condition.strip() + ':' + chr(10) + '        ' if condition else ''}result *= int(d)\nreturn result", ("result = 1", "result = 0")),
        ("reverse", f"builds an integer from the {which} of the non-negative integer {n} in reverse order, or returns 0 if there is none",
         f"kept = [d for d in str({n}){condition}]\nreturn int(''.join(reversed(kept)) or 0)", ("reversed(kept)", "kept")),
        ("distinct", f"counts how many different values the {which} of the non-negative integer {n} have",
         f"return len({{d for d in str({n}){condition}}})", ("{d for d in str(" + n + ")" + condition + "}", f"str({n})")),
    ))  # fmt: skip
    cases = [(dice.between(10_000, 999_999),), (dice.between(100, 9_999),), (0,)]
    return present(dice, Task(f"digits {key} {name}", f"{name}_digits", n, does, body, cases, bug=bug))


def ranges(dice: Dice) -> Draft:
    """All integers up to n with a property: list, count, sum or the last of them."""
    n, a, b = dice.choice(NUMBER_NAMES), *dice.sample((2, 3, 4, 5, 6, 7), 2)
    key, such, condition = dice.choice((
        ("prime", "that are prime", "i > 1 and all(i % j for j in range(2, int(i**0.5) + 1))"), ("divisors", "that divide {n}", "{n} % i == 0"),
        ("either", f"that are divisible by {a} or {b}", f"i % {a} == 0 or i % {b} == 0"), ("both", f"that are divisible by {a} but not by {b}", f"i % {a} == 0 and i % {b} != 0"),
        ("square", "that are squares of integers", "int(i**0.5) ** 2 == i"), ("palindrome", "that read the same backwards", "str(i) == str(i)[::-1]"),
        ("digitsum", f"whose digit sum is divisible by {a}", f"sum(map(int, str(i))) % {a} == 0"), ("ends", f"that end with the digit {a}", f"i % 10 == {a}"),
        ("own", "that are divisible by their last digit", "i % 10 != 0 and i % (i % 10) == 0"), ("contains", f"that contain the digit {b}", f"'{b}' in str(i)"),
    ))  # fmt: skip
    such, condition = such.format(n=n), condition.format(n=n)
    name, does, body, bug = dice.choice((
        ("list", f"returns all integers from 1 to {n} (inclusive) {such}", f"return [i for i in range(1, {n} + 1) if {condition}]", (f"{n} + 1", n)),
        ("count", f"counts the integers from 1 to {n} (inclusive) {such}", f"return sum(1 for i in range(1, {n} + 1) if {condition})", ("sum(1", "sum(i")),
        ("sum", f"returns the sum of the integers from 1 to {n} (inclusive) {such}",
         f"total = 0\nfor i in range(1, {n} + 1):\n    if {condition}:\n        total += i\nreturn total", ("+= i", "+= 1")),
        ("largest", f"returns the largest of the integers from 1 to {n} (inclusive) {such}, or None if there is none",
         f"for i in range({n}, 0, -1):\n    if {condition}:\n        return i\nreturn None", (f"range({n}, 0, -1)", f"range(1, {n} + 1)")),
    ))  # fmt: skip
    suffix = dice.choice(("numbers", "integers", "up_to", key))
    return present(
        dice,
        Task(
            f"ranges {key} {name}",
            f"{name}_{suffix}",
            n,
            does,
            body,
            [(dice.between(12, 40),), (dice.between(41, 70),), (1,)],
            bug=bug,
        ),
    )


def recursion(dice: Dice) -> Draft:
    """Recurrences and classic recursive functions with changed rules."""
    n, p, q, k = dice.choice(("n", "k", "m")), dice.between(2, 5), dice.between(1, 6), dice.between(2, 4)
    first, second = dice.numbers(2, 1, 7)
    name = dice.choice(("compute", "calculate", "solve", "evaluate"))
    key, does, body, cases = dice.choice((
        ("linear", f"returns term number {n} of the sequence that starts with {first} (term 0) and in which every next term is {p} times the one before plus {q}",
         f"if {n} == 0:\n    return {first}\nreturn {p} * {name}({n} - 1) + {q}", [(0,), (1,), (5,)]),
        ("two", f"returns term number {n} of the sequence with the terms {first} (number 0) and {second} (number 1), in which every later term is the sum of the two before it",
         f"if {n} == 0:\n    return {first}\nif {n} == 1:\n    return {second}\nreturn {name}({n} - 1) + {name}({n} - 2)", [(0,), (4,), (7,)]),
        ("weighted", f"returns term number {n} of the sequence {first}, {second}, ... (counted from 0), in which each term is {p} times the last one plus {q} times the one before that",
         f"a, b = {first}, {second}\nfor _ in range({n}):\n    a, b = b, {p} * b + {q} * a\nreturn a", [(0,), (3,), (6,)]),
        ("step product", f"multiplies {n}, {n} - {k}, {n} - {2 * k} and so on as long as the factors are positive, by recursion",
         f"if {n} <= 0:\n    return 1\nreturn {n} * {name}({n} - {k})", [(0,), (5,), (9,)]),
        ("step sum", f"adds up {n}, {n} - {k}, {n} - {2 * k} and so on as long as the numbers are positive, by recursion",
         f"if {n} <= 0:\n    return 0\nreturn {n} + {name}({n} - {k})", [(0,), (5,), (11,)]),
        ("halving", f"counts how often {n} can be divided by {k} (rounding down) until it is 0, by recursion",
         f"if {n} == 0:\n    return 0\nreturn 1 + {name}({n} // {k})", [(0,), (20,), (81,)]),
        ("base", f"writes the non-negative integer {n} in base {p + 1} as a string, by recursion",
         f"if {n} < {p + 1}:\n    return str({n})\nreturn {name}({n} // {p + 1}) + str({n} % {p + 1})", [(0,), (19,), (100,)]),
        ("steps", f"counts the steps until {n} becomes 1 if it is halved when even and else replaced by {n} times 3 plus 1",
         f"if {n} == 1:\n    return 0\nreturn 1 + {name}({n} // 2 if {n} % 2 == 0 else 3 * {n} + 1)", [(1,), (6,), (16,)]),
        ("stairs", f"counts the ways to climb {n} stairs when each step takes {listing([str(i) for i in range(1, k + 1)], 'or')} stairs",
         f"if {n} <= 1:\n    return 1\nreturn sum({name}({n} - i) for i in range(1, min({n}, {k}) + 1))", [(0,), (3,), (6,)]),
        ("countdown", f"returns the list of all numbers from {n} down to 0 in steps of {k}, by recursion",
         f"if {n} < 0:\n    return []\nreturn [{n}, *{name}({n} - {k})]", [(0,), (9,), (12,)]),
    ))  # fmt: skip
    variation = {"linear": p, "two": first, "weighted": p, "base": p, "steps": n}.get(key, k)
    return present(dice, Task(f"recursion {key} {variation}", name, n, does, body, cases))


def thresholds(dice: Dice) -> Draft:
    """Numbers sorted into classes, tariffs, limits and rounding rules."""
    x = dice.choice(("x", "value", "amount", "score"))
    low, high = dice.between(5, 30), dice.between(40, 90)
    fee, rate, k = dice.between(2, 9), dice.between(2, 6), dice.choice((5, 10, 20, 25))
    a, b, c = dice.choice(
        (
            ("low", "medium", "high"),
            ("cold", "mild", "hot"),
            ("small", "normal", "large"),
            ("fail", "pass", "honours"),
            ("slow", "steady", "fast"),
        )
    )
    strict = dice.chance(0.5)
    sign, below = ("<=", "up to") if strict else ("<", "below")
    d, e = dice.sample((2, 3, 4, 5, 7), 2)
    key, name, does, body, bug = dice.choice((
        ("classes", "classify", f"returns '{a}' for {x} {below} {low}, '{b}' for {x} {below} {high}, and '{c}' otherwise",
         f"if {x} {sign} {low}:\n    return '{a}'\nif {x} {sign} {high}:\n    return '{b}'\nreturn '{c}'", (f"{sign} {high}", f"> {high}")),
        ("two classes", "classify", f"returns '{a}' if {x} is {below} {low}, and '{c}' otherwise", f"return '{a}' if {x} {sign} {low} else '{c}'", (f"'{a}' if", f"'{c}' if")),
        ("tariff", "price", f"computes a price: a basic fee of {fee} plus {rate} for each unit of {x} {'above' if strict else 'from'} {low}{'' if strict else ' on'}, "
         f"where {x} is an integer", f"return {fee} + {rate} * max(0, {x} - {low if strict else low - 1})", (f"{fee} + ", "")),
        ("limit", "clamp", f"returns {x}, but at least {low} and at most {high}", f"return max({low}, min({x}, {high}))", ("max(", "min(")),
        ("nearest", "round_to", f"rounds the integer {x} {'down' if strict else 'up'} to a multiple of {k}",
         f"return {x} // {k} * {k}" if strict else f"return -(-{x} // {k}) * {k}", (f" * {k}", "")),
        ("fizz", "word_for", f"returns '{a}' if {x} is divisible by {d}, '{c}' if it is divisible by {e}, both joined by a hyphen if it is divisible by both, and else {x} as a string",
         f"parts = []\nif {x} % {d} == 0:\n    parts.append('{a}')\nif {x} % {e} == 0:\n    parts.append('{c}')\nreturn '-'.join(parts) or str({x})", (f"% {e} == 0", f"% {e} == 1")),
        ("inside", "in_range", f"checks whether {x} lies between {low} and {high}, both {'included' if strict else 'excluded'}",
         f"return {low} {sign} {x} {sign} {high}", (f"{x} {sign} {high}", f"{x} {sign} {high + 100}")),
        ("distance", "outside_by", f"returns how far {x} lies outside the interval from {low} to {high}, or 0 if it lies inside",
         f"if {x} < {low}:\n    return {low} - {x}\nif {x} > {high}:\n    return {x} - {high}\nreturn 0", (f"{low} - {x}", f"{x} - {low}")),
        ("discount", "discounted", f"subtracts {k} percent from the integer {x} if it is {'above' if strict else 'at least'} {low}, rounding the discount down",
         f"if {x} {'>' if strict else '>='} {low}:\n    {x} -= {x} * {k} // 100\nreturn {x}", ("-=", "+=")),
    ))  # fmt: skip
    cases = [(value,) for value in (low, high, low - 3, high + dice.between(1, 60), d * e * dice.between(1, 4))]
    label = a if key in {"classes", "two classes", "fizz"} else ""
    return present(
        dice,
        Task(
            f"thresholds {key} {strict} {label}",
            name,
            x,
            does,
            body,
            dice.sample(cases, 3) if key != "limit" else cases[:4],
            bug=bug,
        ),
    )


def dates(dice: Dice) -> Draft:
    """Arithmetic and formats of dates given as YYYY-MM-DD."""
    d, k = dice.choice(("day", "text", "iso", "date_text")), dice.between(2, 60)
    index = dice.below(7)
    weekday, number = DAYS[index], dice.choice((1, 15, 28))
    parse = f"date.fromisoformat({d})"
    key, name, does, body, imports = dice.choice((
        ("add", "add_days", f"returns the date that lies {counted(k, 'day')} after the date {d}, both as YYYY-MM-DD",
         f"return ({parse} + timedelta(days={k})).isoformat()", "date, timedelta"),
        ("subtract", "days_before", f"returns the date that lies {counted(k, 'day')} before the date {d}, both as YYYY-MM-DD",
         f"return ({parse} - timedelta(days={k})).isoformat()", "date, timedelta"),
        ("weeks", "add_weeks", f"returns the date {k} weeks after {d}, both as YYYY-MM-DD", f"return ({parse} + timedelta(weeks={k})).isoformat()", "date, timedelta"),
        (f"is {weekday}", f"is_{weekday.lower()}", f"checks whether the date {d} (YYYY-MM-DD) is a {weekday}", f"return {parse}.weekday() == {index}", "date"),
        (f"next {weekday}", f"next_{weekday.lower()}", f"returns the first {weekday} after the date {d}, both as YYYY-MM-DD",
         f"current = {parse} + timedelta(days=1)\nwhile current.weekday() != {index}:\n    current += timedelta(days=1)\nreturn current.isoformat()", "date, timedelta"),
        ("weekend", "is_weekend", f"checks whether the date {d} (YYYY-MM-DD) falls on a Saturday or Sunday", f"return {parse}.weekday() >= 5", "date"),
        ("quarter", "quarter", f"returns the quarter of the year (1 to 4) of the date {d} (YYYY-MM-DD)", f"return ({parse}.month - 1) // 3 + 1", "date"),
        ("left", "days_left", f"returns how many days remain in the year after the date {d} (YYYY-MM-DD)",
         f"current = {parse}\nreturn (date(current.year, 12, 31) - current).days", "date"),
        ("of year", "day_of_year", f"returns which day of the year the date {d} (YYYY-MM-DD) is, counted from 1",
         f"current = {parse}\nreturn (current - date(current.year, 1, 1)).days + 1", "date"),
        ("slashes", "reformat", f"converts {d} from YYYY-MM-DD to DD/MM/YYYY", f"year, month, number = {d}.split('-')\nreturn f'{{number}}/{{month}}/{{year}}'", ""),
        ("american", "reformat", f"converts {d} from YYYY-MM-DD to MM/DD/YYYY", f"year, month, number = {d}.split('-')\nreturn f'{{month}}/{{number}}/{{year}}'", ""),
        ("german", "reformat", f"converts {d} from YYYY-MM-DD to DD.MM.YYYY", f"return '.'.join(reversed({d}.split('-')))", ""),
        (f"month day {number}", "same_month", f"returns day {number} of the month of the date {d}, both as YYYY-MM-DD", f"return {parse}.replace(day={number}).isoformat()", "date"),
        ("until", "days_until", f"returns how many days lie between the date {d} (YYYY-MM-DD) and 2030-01-{k % 28 + 1:02d}; earlier dates give positive numbers",
         f"return (date(2030, 1, {k % 28 + 1}) - {parse}).days", "date"),
        ("leap", "has_leap_day", f"checks whether the year of the date {d} (YYYY-MM-DD) is a leap year",
         f"year = int({d}[:4])\nreturn year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)", ""),
        ("age", "age_on", f"returns the age in full years at the end of {2024 + k} of a person born on {d} (YYYY-MM-DD)", f"return {2024 + k} - int({d}[:4])", ""),
    ))  # fmt: skip
    cases = [(f"{dice.between(1996, 2026)}-{dice.between(1, 12):02d}-{dice.between(1, 28):02d}",) for _ in range(2)] + [
        ("2024-02-29",)
    ]
    return present(
        dice, Task(f"dates {key}", name, d, does, body, cases, imports=f"from datetime import {imports}" if imports else "")
    )


FAMILIES = (digits, ranges, recursion, thresholds, dates)
