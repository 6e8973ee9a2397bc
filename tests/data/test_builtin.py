import ast
import datetime
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from functools import cache

import pytest

from cora_cli.data.builtin import BUILTIN, load_builtin
from cora_cli.data.builtin.build import Dice, Draft, build
from cora_cli.data.builtin.catalogue import FAMILIES
from cora_cli.data.builtin.functions import fails
from cora_cli.data.builtin.words import articles, fill, listing
from cora_cli.errors import CoraError
from cora_cli.rundir import sha256_json

TASKS = [name for name in BUILTIN if name.startswith("task-")]

# A change here changes what every earlier run was trained on: it must be meant.
DIGESTS = {
    "instruct": "b9fe819b7c86b4b8ff1a5382d6a6b04989afeecb2748711a469a7dbd0a944ea5",
    "code": "8eb1bbd8efcccbbaec39448afa9945b89b60b81b6821f4b236404ea02a813ba7",
    "task-sentiment": "8a78e2099799501bdacdd4084199890f2f53104d363a3825932d4291f8920d4f",
    "task-arithmetic": "2879b0b7b927a2ed4544378ec65d4e4b2c0a7443c1072dd97e350072baeae322",
    "task-json": "cf1b5db733130ce7b3b903c65cedb541f99490e9b362ce23a941553f52f28144",
    "task-rewrite": "4c4e45fa8aa3d06c5c39a0e20956134810b25f0ca5126a32d357ca9c905a3672",
    "task-sql": "b769222b30c2a994051f58bd4c096e2bcd3be221fe39a3bdfa62183fad254f28",
}


@cache
def split(name):
    return load_builtin(name)


def everything(name):
    return split(name).train + split(name).test


def prompts(records):
    return [(record["instruction"], record["input"]) for record in records]


def matches(pattern, name="instruct", column="instruction"):
    """Records whose column matches the whole pattern, with the match; at least a few, so that no check runs on nothing."""
    found = [(record, match) for record in everything(name) if (match := re.fullmatch(pattern, record[column], re.DOTALL))]
    assert len(found) >= 5, pattern
    return found


@pytest.mark.parametrize("name", BUILTIN)
def test_a_shipped_set_has_the_promised_size_and_columns(name):
    train, test = (2000, 200) if name in {"instruct", "code"} else (300, 50)
    assert len(split(name).train) >= train
    assert len(split(name).test) >= test
    columns = {"instruction", "input", "output"} | ({"assertions"} if name == "code" else set())
    for record in everything(name):
        assert set(record) == columns
        assert all(isinstance(record[column], str) for column in ("instruction", "input", "output"))
        assert record["instruction"].strip()
        assert record["output"].strip()
        assert all(record[column] == record[column].strip() for column in ("instruction", "input", "output"))


@pytest.mark.parametrize("name", BUILTIN)
def test_no_prompt_occurs_twice_and_so_none_is_on_both_sides(name):
    assert max(Counter(prompts(everything(name))).values()) == 1


@pytest.mark.parametrize("name", BUILTIN)
def test_a_shipped_set_has_the_pinned_content(name):
    assert sha256_json([split(name).train, split(name).test]) == DIGESTS[name]


def test_the_content_depends_neither_on_the_hash_seed_nor_on_heavy_packages():
    program = (
        "import sys; from cora_cli.data.builtin import BUILTIN, load_builtin; from cora_cli.rundir import sha256_json;"
        "print([sha256_json([s.train, s.test]) for s in map(load_builtin, BUILTIN)]);"
        "print(sorted({'torch', 'numpy', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    digests, heavy = done.stdout.strip().split("\n")
    assert ast.literal_eval(digests) == [DIGESTS[name] for name in BUILTIN]
    assert heavy == "[]"


def test_what_the_caller_changes_does_not_come_back():
    first = load_builtin("task-sql")
    first.train[0]["output"] = "changed"
    first.test.clear()
    code = load_builtin("code")
    code.train[0]["assertions"].clear()
    assert load_builtin("task-sql").train[0]["output"] != "changed"
    assert load_builtin("task-sql").test
    assert load_builtin("code").train[0]["assertions"]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(CoraError, match=r"builtin:poems.*builtin:instruct.*builtin:code.*builtin:task-sql"):
        load_builtin("poems")


def test_every_name_has_families_and_the_other_way_round():
    assert set(BUILTIN) == set(FAMILIES)
    assert len(FAMILIES["instruct"]) > 30


@pytest.mark.parametrize("task", TASKS)
def test_nothing_held_out_in_the_general_sets_occurs_in_a_task(task):
    held_out = [record for name in ("instruct", "code") for record in split(name).test]
    texts = {record["input"] or record["instruction"] for record in held_out}
    answers = {record["output"] for record in held_out}
    assert not texts & {record["input"] for record in everything(task) if task != "task-sql"}  # there the input is the schema
    assert not answers & {record["output"] for record in everything(task)}


@pytest.mark.parametrize("name", BUILTIN)
def test_lengths_stay_modest(name):
    lengths = [len(" ".join((record["instruction"], record["input"], record["output"]))) for record in everything(name)]
    assert 200 < sum(lengths) / len(lengths) < 400  # characters; a token is about 3.5 of them
    assert max(lengths) < 900


@pytest.mark.parametrize("name", BUILTIN)
def test_no_template_shows_through(name):
    for record in everything(name):
        text = " ".join((record["instruction"], record["input"], record["output"]))
        if name != "code":
            assert not re.search(r"\{[a-z]+\d?\}", text), text
            assert not re.search(r"\b[Aa] (?:[aei]|o(?!ne\b))\w+ ", record["output"]), text
            assert not re.search(r"\b1 (?:days|hours|minutes|words|places)\b", text), text
            assert "  " not in record["instruction"], text


# --- code


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


# --- instruct: answers recomputed by other means


@pytest.mark.parametrize("name", ["instruct", "task-arithmetic"])
def test_every_calculation_shown_is_right(name):
    number = r"-?\$?\d+(?:\.\d+)?"
    checked = 0
    for record in everything(name):
        text = re.sub(r" (?:km/h|km|h)\b(?= [×÷=])", "", record["output"])
        for left, right in re.findall(
            rf"((?:\(?{number}\)?(?: [-+×÷] |/))+\(?{number}\)?|2 × \({number} \+ {number}\)) = ({number})", text
        ):
            parts = left.replace("×", "*").replace("÷", "//" if "remainder" in text else "/").replace("$", "")
            exact = re.sub(r"\d+(?:\.\d+)?", lambda match: f"Fraction('{match[0]}')", parts)
            assert eval(exact, {"Fraction": Fraction}) == Fraction(right.replace("$", "")), (left, right)
            checked += 1
    assert checked > 150


def test_temperatures_follow_the_formula():
    for record, _ in matches(r"(Convert|What is) -?\d+ (°|degrees).*"):
        a, unit, b, _ = re.search(r"So (-?\d+) °(C|F) is (-?\d+) °(C|F)\.", record["output"]).groups()
        celsius, fahrenheit = (int(a), int(b)) if unit == "C" else (int(b), int(a))
        assert 5 * (fahrenheit - 32) == 9 * celsius
        assert a in record["instruction"]


def test_units_use_exact_factors():
    seconds = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800}
    millimetres = {"millimetres": 1, "centimetres": 10, "metres": 1000, "kilometres": 1_000_000}
    others = [{"grams": 1, "kilograms": 1000, "tonnes": 10**6}, {"inches": 1, "feet": 12, "yards": 36}, {"ounces": 1, "pounds": 16},
              {"pints": 1, "gallons": 8}, {"millilitres": 1, "litres": 1000}]  # fmt: skip
    for record, _ in matches(r"One \w+ is \d+ .*", column="output"):
        a, first, b, second = re.search(r"so (\d+) (\w+) are .* = (\d+) (\w+)\.", record["output"]).groups()
        scale = next(scale for scale in (seconds, millimetres, *others) if first in scale)
        assert int(a) * scale[first] == int(b) * scale[second]
        assert a in record["instruction"]


def test_sorted_lists_are_sorted():
    keys = {
        "from smallest to largest": (int, False), "from largest to smallest": (int, True), "in alphabetical order": (str, False),
        "in reverse alphabetical order": (str, True), "from shortest": (lambda word: (len(word), word), False), "by their last letter": (lambda word: (word[::-1][0], word), False),
    }  # fmt: skip
    for record, _ in matches(
        r"(Sort|Put|Arrange|Write|List) (these|the) (numbers|words|list|following|words below).*(order|smallest|largest|same)\."
    ):
        key, down = next(value for phrase, value in keys.items() if phrase in record["instruction"])
        given = re.split(r", |\n", record["input"])
        answer = [re.sub(r"^\d+\. ", "", item) for item in re.split(r", |\n", record["output"])]
        assert answer == sorted(given, key=key, reverse=down)


def test_filtered_words_are_those_that_fit():
    tests = {
        r"start with the letter (\w)": lambda word, a: word[0] == a, r"exactly (\d+) letters": lambda word, a: len(word) == int(a),
        r"more than (\d+) letters": lambda word, a: len(word) > int(a), r"not contain the letter (\w)": lambda word, a: word.count(a) == 0,
        r" (?<!not )contain the letter (\w)": lambda word, a: word.count(a) > 0,
    }  # fmt: skip
    for record, _ in matches(r"(Which of these words|List only the words that|Keep the words that) .*"):
        match, test = next(
            (match, test) for pattern, test in tests.items() if (match := re.search(pattern, record["instruction"]))
        )
        kept = [word for word in record["input"].split(", ") if test(word, match[1])]
        assert record["output"].startswith(", ".join(kept) if kept else "None of the words")
        assert not re.search(r"\((\d+) words?\)", record["output"]) or f"({len(kept)} word" in record["output"]


def test_dates_agree_with_the_calendar():
    for record, match in matches(r"Which date is (\d+) days? after \w+, (\d+ \w+ \d+)\?"):
        start = datetime.datetime.strptime(match[2], "%d %B %Y").date()
        later = start + datetime.timedelta(days=int(match[1]))
        assert start.strftime("%A, ") in record["instruction"]
        answer = re.sub(r"(\d)(st|nd|rd|th)", r"\1", record["output"].rsplit(" is ", 1)[1])
        assert datetime.datetime.strptime(answer, "%A, the %d of %B %Y.").date() == later
        assert f"{later:%A}," in answer


def test_converted_dates_name_the_same_day():
    forms = {"YYYY-MM-DD": "%Y-%m-%d", "DD/MM/YYYY": "%d/%m/%Y", "MM/DD/YYYY": "%m/%d/%Y"}

    def read(text, hint):
        named = (
            [form for label, form in forms.items() if label in hint] if "/" in text else ["%Y-%m-%d", "%B %d, %Y", "%d %B %Y"]
        )
        for form in named:
            try:
                return datetime.datetime.strptime(text, form)
            except ValueError:
                continue
        raise AssertionError(text)

    date = r"(\d+[/-]\d+[/-]\d+|\w+ \d+, \d{4}|\d+ \w+ \d{4})"
    for record, match in matches(rf"(?:Write the date|Convert|Change this date,) {date}( \(.*?\))?,? (?:in|to|into) (.*)\."):
        assert read(match[1], match[2] or "") == read(record["output"], match[3])


def test_clock_times_add_up():
    def minutes(text):
        return sum(
            int(number) * (60 if unit.startswith("hour") else 1)
            for number, unit in re.findall(r"(\d+) (hours?|minutes?)", text)
        )

    def clock(text):
        return int(text.split(":")[0]) * 60 + int(text.split(":")[1])

    for record, _ in matches(r"The [\w ]+ (starts at|lasts from|must end at) .*"):
        text = record["instruction"] + " " + record["output"]
        first, last = sorted({clock(time) for time in re.findall(r"\d+:\d\d", text)})
        assert last - first == minutes(record["output"])


def test_timetables_keep_the_durations_and_the_breaks():
    for record, match in matches(r"(?:Make a timetable|Plan these tasks|I start at).*?(\d\d:\d\d).*"):
        pause = int(found[1]) if (found := re.search(r"break of (\d+)", record["instruction"])) else 0
        time = datetime.datetime.strptime(match[1], "%H:%M")
        expected = []
        for chore, length in re.findall(r"- (.*) \((\d+) minutes\)", record["input"]):
            end = time + datetime.timedelta(minutes=int(length))
            expected.append(f"{time:%H:%M}-{end:%H:%M} {chore.capitalize()}")
            time = end + datetime.timedelta(minutes=pause)
        assert record["output"].split("\n") == expected


def test_tables_are_read_correctly():
    for record, match in matches(r"Look at the table\. Which \w+ has the (highest|lowest) (\w+)\?"):
        rows = [line.split(",") for line in record["input"].split("\n")[1:]]
        wanted = sorted(rows, key=lambda row: int(row[1]))[-1 if match[1] == "highest" else 0]
        assert record["output"].lower().startswith(wanted[0].lower())
        assert wanted[1] in record["output"]


@pytest.mark.parametrize("name", ["instruct", "task-json"])
def test_extracted_json_has_the_keys_asked_for_and_values_from_the_text(name):
    for record, match in matches(r".*(?:as JSON: |with the keys |Keys: |object with )([\w, ]+?)(?:\.| from).*", name):
        fields = json.loads(record["output"])
        assert list(fields) == match[1].split(", ")
        assert all(str(value) in record["input"] for value in fields.values())


@pytest.mark.parametrize("name", ["instruct", "task-sql"])
def test_queries_run_on_their_table_and_mention_what_was_asked(name):
    checked = 0
    for record in everything(name):
        if not record["input"].startswith("CREATE TABLE"):
            continue
        database = sqlite3.connect(":memory:")
        database.execute(record["input"])
        database.execute(record["output"])
        for value in re.findall(r"'([^']+)'|(?<= )(\d+)(?=[ ;])", record["output"]):
            assert (value[0] or value[1]) in record["instruction"]
        checked += 1
    assert checked > 40


def test_evidence_of_a_sentiment_stands_in_the_review():
    for record in everything("task-sentiment"):
        label, evidence = re.fullmatch(r"Sentiment: (positive|negative|mixed)\nEvidence: (.*)", record["output"]).groups()
        assert all(part.lower() in record["input"].lower() for part in evidence.split("; ")), label


# --- building


def numbered(dice):
    number = dice.below(500)
    return Draft(f"question {number}", f"answer {number}", group=str(number // 7))


def test_a_group_is_never_on_both_sides():
    made = build("seed", [numbered], 200, 60)
    sides = [{int(record["instruction"].split()[1]) // 7 for record in records} for records in (made.train, made.test)]
    assert (len(made.train), len(made.test)) == (200, 60)
    assert not sides[0] & sides[1]


def test_without_a_group_another_wording_of_the_same_text_stays_on_one_side():
    def worded(dice):
        return Draft(dice.choice(("Explain.", "Describe.", "Tell me.")), "answer", f"text {dice.below(300)}")

    made = build("seed", [worded], 200, 40)
    assert not {record["input"] for record in made.train} & {record["input"] for record in made.test}


def test_excluded_texts_and_answers_are_not_drawn():
    made = build("seed", [numbered], 200, 40, excluded=frozenset({"answer 3", "answer 8", "5"}))
    drawn = {int(record["instruction"].split()[1]) for record in made.train + made.test}
    assert not drawn & {3, 8, *range(35, 42)}


def test_families_that_are_too_small_are_reported():
    with pytest.raises(ValueError, match="are needed"):
        build("seed", [lambda dice: Draft(f"q{dice.below(9)}", "a")], 20, 5)


def test_another_seed_gives_other_records():
    assert build("one", [numbered], 100, 20).train != build("two", [numbered], 100, 20).train


def test_dice_stay_within_their_bounds_and_reach_them():
    dice = Dice("seed")
    assert {dice.between(2, 4) for _ in range(100)} == {2, 3, 4}
    assert sorted(dice.shuffled(range(20))) == list(range(20))
    assert len(set(dice.sample(range(20), 20))) == 20
    with pytest.raises(ValueError, match="cannot draw"):
        dice.sample(range(3), 4)


def test_slots_are_filled_consistently_and_differ_where_numbered():
    for seed in range(20):
        one, two = fill(Dice(str(seed)), ["{name} and {name2}", "{name2} or {name}"])
        assert one.split(" and ") == two.split(" or ")[::-1]
        assert len(set(one.split(" and "))) == 2


def test_small_grammar():
    assert (
        articles("a umbrella, A otter, a uniform, a hour, a 8 and a one")
        == "an umbrella, An otter, a uniform, an hour, an 8 and a one"
    )
    assert [listing(["a"]), listing(["a", "b"]), listing(["a", "b", "c"], "or")] == ["a", "a and b", "a, b or c"]
