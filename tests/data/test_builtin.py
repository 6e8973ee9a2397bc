"""The shipped sets as wholes: their sizes, content and splits, and how sets are built."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from cora_cli.data.builtin import BUILTIN, load_builtin
from cora_cli.data.builtin.build import Dice, Draft, build
from cora_cli.data.builtin.catalogue import FAMILIES
from cora_cli.data.builtin.words import articles, fill, listing
from cora_cli.errors import CoraError
from cora_cli.hashing import sha256_json
from tests.data.shipped import everything, prompts, split

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
        "import sys; from cora_cli.data.builtin import BUILTIN, load_builtin; from cora_cli.hashing import sha256_json;"
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
