"""Every content of a file is a value of the expected shape or one sentence."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from cora_cli.errors import CoraError, UsageError
from cora_cli.reading import Malformed, decode_json, fault_of, parse_json, read_json, read_jsonl, read_text, read_yaml


class Part(TypedDict):
    rank: int
    rate: NotRequired[float | None]


class Whole(TypedDict):
    part: Part
    interval: tuple[float, float]
    kind: Literal["a", "b"]


WHOLE = {"part": {"rank": 1}, "interval": [0, 1.5], "kind": "a", "more": None}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5_000, "too many digits"),
        (r'["\ud800"]', "half of a character"),
        (r'{"\udc00": 1}', "half of a character"),
        ("1 2", "nothing may follow"),
        ("", "Expecting value"),
    ],
)
def test_json_that_cannot_be_used_is_refused_with_the_reason(text: str, words: str) -> None:
    with pytest.raises(Malformed, match=words):
        parse_json(text)


def test_a_byte_order_mark_before_a_value_is_passed_over_in_every_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf1\n\xef\xbb\xbf2\n")
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert read_jsonl(tmp_path / "a.jsonl") == [1, 2]


def test_a_pair_of_escaped_surrogates_is_one_character() -> None:
    assert parse_json(r'"\ud83d\ude00"') == "\N{GRINNING FACE}"


def test_one_of_several_values_is_decoded_with_its_end() -> None:
    assert decode_json('[1, {"a": 2}]', 4) == ({"a": 2}, 12)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"part": {"rank": True}}, "part.rank must be an integer, not true"),
        ({"part": {}}, "part.rank is missing"),
        ({"part": {"rank": 2**63}}, "part.rank must be an integer, not an integer of more than 63 bits"),
        ({"part": {"rank": 1, "rate": float("nan")}}, "part.rate must be a finite number or null, not NaN"),
        ({"part": [1]}, "part must be a JSON object, not a list of 1 values"),
        ({"interval": [1]}, "interval must be a list of 2 values, not a list of 1 values"),
        ({"interval": [1, "x"]}, 'interval[1] must be a finite number, not "x"'),
        ({"kind": "c"}, 'kind must be one of a, b, not "c"'),
        ({"kind": []}, "kind must be one of a, b, not a list of 0 values"),
    ],
)
def test_the_part_that_has_another_shape_is_named(change: dict[str, Any], fault: str | None) -> None:
    assert fault_of({**WHOLE, **change}, Whole) == fault


def test_of_alternatives_the_one_of_the_values_kind_explains_the_fault() -> None:
    assert fault_of({"rank": "x"}, Part | None) == 'rank must be an integer, not "x"'
    assert fault_of({}, Part | None) == "rank is missing"


def test_the_file_and_the_line_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"rank": 1}\n{"rank": null}\n')
    with pytest.raises(CoraError, match=r"a.jsonl, line 2, is damaged .*: rank must be an integer, not null"):
        read_jsonl(path, Part)


@pytest.mark.parametrize("name", ["\0", "n" * 300, "."])
def test_a_name_that_no_file_has_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CoraError):
        read_json(tmp_path / name)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{upper}: &{upper} [{', '.join([f'*{lower}'] * 9)}]\n" for lower, upper in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "more than 100,000 values"),
        ("a: &a [*a]", "more than 100,000 values"),
        ("a: 1\nb: [3, 010]", "line 2: YAML reads 010 as 8; write 8 if you mean that, or quote it"),
        ("a: -1:30", "line 1: YAML reads -1:30 as -90;"),
        ("a: 1:30.5", "line 1: YAML reads 1:30.5 as 90.5;"),
        ("a: " + "9" * 5_000, "4300 digits"),
        ("[" * 5_000, "nested too deeply"),
        (r'a: "\ud800"', "half of a character"),
        ("a: !!bool x", "cannot be read"),
        ("a: b: c", "line 1, column 5: mapping values"),
        ("a: \x01", "control character"),
    ],
)
def test_yaml_that_cannot_be_used_is_refused_once_and_by_its_file(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_yaml(path, "grid file")
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"grid file {path} is not valid YAML: ")
    assert "<unicode string>" not in str(caught.value)


def test_numbers_in_yaml_that_read_one_way_only_are_numbers_and_dates_are_text(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("[0, 007, -3, 1_000, 0x10, 0.5, 1.e+3, .inf, 2026-01-05, 2024-13-45]".join(("a: ", "")))
    found = read_yaml(tmp_path / "own.yaml", "grid file")["a"]
    assert found == [0, 7, -3, 1000, 16, 0.5, 1000.0, math.inf, "2026-01-05", "2024-13-45"]


@pytest.mark.parametrize("read", [read_text, read_json, read_jsonl, lambda path: read_yaml(path, "grid file")])
def test_a_pointer_of_git_lfs_is_called_one(read: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    with pytest.raises(
        CoraError, match="a is only a pointer of Git LFS, in place of the file itself; fetch it with `git lfs pull`"
    ):
        read(tmp_path / "a")
