"""What the code set promises: references that pass, stubs, repairs and errors that are as their instructions say."""

import ast
import re

import pytest

from cora_cli.data.builtin.build import Dice
from cora_cli.data.builtin.catalogue import FAMILIES
from cora_cli.data.builtin.functions import fails
from tests.data.shipped import everything


def calls(record):
    """(argument list, expected value) of each `assert f(...) == value`."""
    for line in record["assertions"]:
        comparison = ast.parse(line).body[0].test
        yield [ast.literal_eval(argument) for argument in comparison.left.args], ast.literal_eval(comparison.comparators[0])


def test_the_reference_code_passes_its_assertions():
    for record in everything("code"):
        assert record["assertions"]
        assert all(isinstance(line, str) and isinstance(ast.parse(line).body[0], ast.Assert) for line in record["assertions"])
        exec("\n".join([record["output"], *record["assertions"]]), {})


def test_code_to_be_repaired_fails_an_assertion():
    broken = [
        record
        for record in everything("code")
        if "has a bug" in record["instruction"] or "repair the mistake" in record["instruction"]
    ]
    assert len(broken) > 100
    assert all(fails(record["input"], record["assertions"]) for record in broken)


def test_a_stub_is_the_beginning_of_its_answer():
    stubs = [record for record in everything("code") if record["input"].endswith('"""')]
    assert len(stubs) > 200
    assert all(record["output"].startswith(record["input"] + "\n    ") for record in stubs)


def test_functions_that_promise_an_error_raise_it():
    found = [
        (r, m)
        for r in everything("code")
        if (m := re.search(r"raises? a ValueError with the message '([\w ]+)'", r["instruction"]))
    ]
    bad = {
        "parse_int": ["x"],
        "parse_float": ["x"],
        "safe_divide": [1, 0],
        "safe_remainder": [1, 0],
        "item_at": [[], 0],
        "mean": [[]],
    }
    bad |= {"position_of": [[], 1], "second_word": ["one"], "extension": ["none"], "sum_strings": [["x"]]}
    checked = 0
    for record, match in found:
        names = {}
        exec(record["output"], names)
        for name, arguments in bad.items():
            if name in names:
                with pytest.raises(ValueError, match=match[1]):
                    names[name](*arguments)
                checked += 1
    assert checked > 5


CONDITIONS = {
    r"\beven ": lambda x, _: x % 2 == 0, r"\bodd ": lambda x, _: x % 2 == 1, "positive ": lambda x, _: x > 0, "negative ": lambda x, _: x < 0,
    r"above (-?\d+)": lambda x, a: x > a[0], r"below (\d+)": lambda x, a: x < a[0], r"not divisible by (\d+)": lambda x, a: x % a[0] != 0,
    r"(?<!not )divisible by (\d+)": lambda x, a: x % a[0] == 0, r"between (\d+) and (\d+)": lambda x, a: a[0] <= x <= a[1],
    r"other than (\d+)": lambda x, a: x != a[0],
}  # fmt: skip
MAPPINGS = {
    "squares of": lambda x, _: x**2, "doubles of": lambda x, _: x + x, "absolute values": lambda x, _: max(x, -x), "last digits": lambda x, _: int(str(x)[-1]),
    r"increased by (\d+)": lambda x, a: x + a[0], r"multiplied by (\d+)": lambda x, a: x * a[0],
}  # fmt: skip
REDUCTIONS = {
    r"he sum of|return the sum|Return the sum": sum, "list of": list, "distinct": lambda xs: len(set(xs)), "ascending": sorted,
    "descending": lambda xs: sorted(xs)[::-1], "largest of": lambda xs: max(xs) if xs else None, "smallest of": lambda xs: min(xs) if xs else None,
}  # fmt: skip


def only(table, text):
    """The one entry whose pattern occurs in the text, with the numbers that it captured."""
    found = [
        (function, [int(group) for group in match.groups()])
        for pattern, function in table.items()
        if (match := re.search(pattern, text))
    ]
    assert len(found) <= 1, (text, found)
    return found[0] if found else None


def test_pipelines_do_what_their_instruction_says():
    checked = 0
    for record in everything("code"):
        if not re.search(r"def (process|select|compute|transform|pick)_(?!words)(\w+)\(\2\)", record["output"]):
            continue
        if (
            not re.search(r"\b(numbers|integers|elements)\b", record["instruction"] + record["input"])
            or "records" in record["instruction"] + record["input"]
        ):
            continue
        text = (
            re.sub(r"For example.*", "", record["instruction"])
            + " "
            + (record["input"] if record["input"].endswith('"""') else "")
        )
        condition, bounds = only(CONDITIONS, text)
        mapping, constants = only(MAPPINGS, text) or (lambda x, _: x, [])
        reduction, _ = only(REDUCTIONS, text)
        for (values,), expected in calls(record):
            assert reduction([mapping(x, constants) for x in values if condition(x, bounds)]) == expected, record
        checked += 1
    assert checked > 80


def test_code_is_held_out_by_function_and_variation_not_by_prompt():
    dice = Dice("groups")
    for family in FAMILIES["code"]:
        drafts = [family(dice) for _ in range(60)]
        assert all(draft.group and draft.group not in draft.prompt for draft in drafts)
        assert len({draft.group for draft in drafts}) > 5
