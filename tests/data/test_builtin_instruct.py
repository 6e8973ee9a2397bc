"""Answers of the instruct and task sets, recomputed by other means."""

import datetime
import json
import re
import sqlite3
from fractions import Fraction

import pytest

from tests.data.shipped import everything, matches


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
