import codecs
import datetime
import gzip
import inspect
import json
import math
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from cora_cli.data.formats import TEMPLATE_ARGUMENTS, shape_of
from cora_cli.data.readers import read_located
from cora_cli.data.records import unused_columns
from cora_cli.data.split import load_records, load_split
from cora_cli.errors import CoraError
from tests.data.files import ALPACA, failure, repeatable, write

# csv cannot write a NUL; everything else that UTF-8 can hold, the line ends of all systems among it.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(
    [
        'a "quoted" word',
        "two\nlines",
        "old\r\nlines",
        "a\rb",
        "\u2028",
        "x\x0cy\x85z",
        "comma, semicolon;",
        "{brace}",
        "日本語 🙂",
        " ",
    ]
)
alpaca = st.fixed_dictionaries({"instruction": texts, "input": texts, "output": texts})
prompt = st.fixed_dictionaries({"prompt": texts, "completion": texts})
messages = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": texts}), min_size=1
        ).map(lambda turns: [*turns, {"role": "assistant", "content": "ok"}])
    }
)
flat = st.lists(alpaca, min_size=1, max_size=4) | st.lists(prompt, min_size=1, max_size=4)


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
@given(records=flat)
@repeatable
def test_flat_records_of_any_text_come_back_from_every_format(records, ending, tmp_path):
    if ending == "csv":  # which cannot tell a record without any text from the empty rows of a spreadsheet
        records = [record for record in records if any(text.strip() for text in record.values())]
        assume(records)
    found, schema = load_records(str(write(tmp_path / f"data.{ending}", records)))
    assert found == records
    assert schema == ("alpaca" if "instruction" in records[0] else "prompt")


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
@given(records=st.lists(messages, min_size=1, max_size=3))
@repeatable
def test_conversations_come_back_from_every_format_that_can_nest(records, ending, tmp_path):
    assert load_records(str(write(tmp_path / f"data.{ending}", records))) == (records, "messages")


@pytest.mark.parametrize("record", [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": None, "output": "b"}])
def test_an_absent_or_null_input_is_empty(record, tmp_path):
    assert load_records(str(write(tmp_path / "a.jsonl", [record])))[0] == [{"instruction": "a", "input": "", "output": "b"}]


def test_further_columns_are_kept(tmp_path):
    record = {**ALPACA, "prompt": "p", "text": "t", "id": 7, "tags": ["x"]}
    assert load_records(str(write(tmp_path / "a.json", [record]))) == ([record], "alpaca")


def test_further_columns_that_no_json_file_can_hold_are_left_out(tmp_path):
    record = {**ALPACA, "when": datetime.datetime(2024, 5, 1), "raw": b"\xff", "score": math.nan, "id": 3}
    split = load_split(str(write(tmp_path / "a.parquet", [record, {**record, "instruction": "b"}])), 1, seed=0)
    assert split.train[0].keys() == {*ALPACA, "id"}
    assert len(split.content_hash()) == 64


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(ending, tmp_path):
    path = write(tmp_path / f"a.{ending}", [ALPACA, ALPACA])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert load_records(str(path))[0] == [ALPACA, ALPACA]


def test_a_csv_field_may_be_longer_than_the_standard_librarys_default_limit(tmp_path):
    record = {"prompt": "p", "completion": "x" * 200_000}
    assert load_records(str(write(tmp_path / "a.csv", [record])))[0] == [record]


def test_the_line_of_a_bad_record_in_an_array_over_many_lines_is_that_of_its_brace(tmp_path):
    content = '[\n  {"prompt": "a",\n   "completion": "b"},\n\n  {"prompt": "c",\n   "completion": 5}\n]\n'
    message = failure(tmp_path / "a.json", content)
    assert "line 5:" in message
    assert message.endswith('completion must be text, not 5, as in "5"')


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        ('[\n{"prompt": "a", "completion": "b"},\n{"prompt": "c" "completion": "d"}\n]', 3, "delimiter"),
        (
            '[\n{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "d"}]',
            4,
            "',' or ']' expected, found '{\"prompt\"",
        ),
        ('[{"prompt": "a", "completion": "b"},\n\n', 3, "not valid JSON"),
        ('[{"prompt": "a", "completion": "b"}\n', 2, "found ''"),
        ('[{"prompt": "a", "completion": "b"}]\n\n[{"prompt": "c", "completion": "d"}]', 3, "nothing may follow the array"),
        ('{"prompt": "a", "completion": "b"}', 1, 'expected an array of records, found \'{"prompt"'),
        ('[{"prompt": "a", "completion": "b"},\n"loose text"]', 2, 'found "loose text"'),
        ('[{"prompt": "a", "completion": "b"},\n{"prompt": "c"}]', 2, "column completion is missing; found prompt"),
        ('[\n{"prompt": "a", "completion": "cut \\ud83d"}]', 2, "half of a character and no text"),
    ],
)
def test_damaged_json_is_named_by_line_and_finding(content, line, found, tmp_path):
    message = failure(tmp_path / "a.json", content)
    assert f"line {line}:" in message
    assert found in message


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ('{"prompt": "c", "completion": "d"', "not valid JSON"),
        ("[1, 2]", "found [1, 2]"),
        ('{"prompt": "c", "text": "d"}', "column completion is missing; found prompt, text"),
        ('{"prompt": null, "completion": "d"}', "prompt must be text, not null; leave out records without it"),
        ('{"prompt": "c", "completion": ["d", "e"]}', 'completion must be text, not ["d", "e"]'),
    ],
)
def test_a_bad_jsonl_line_is_named_also_after_blank_lines(bad, found, tmp_path):
    message = failure(tmp_path / "a.jsonl", f'{{"prompt": "a", "completion": "b"}}\n\n\n{bad}\n{{}}\n')
    assert "line 4:" in message
    assert found in message


@pytest.mark.parametrize("opening", ["[\n", "{\n", "[{\n"])
def test_records_over_several_lines_are_sent_to_what_works(opening, tmp_path):
    message = failure(tmp_path / "a.jsonl", f'{opening} "prompt": "a", "completion": "b"}}\n')
    assert message.endswith("as `jq -c . OLD > NEW` writes it; an array of records has the ending .json")


def test_objects_that_follow_each_other_are_sent_to_what_makes_them_an_array(tmp_path):
    message = failure(tmp_path / "a.json", '{\n "prompt": "a"\n}\n{\n "prompt": "b"\n}\n')
    assert message.endswith("objects that follow each other become one array by `jq -s . OLD > NEW`")
    assert failure(tmp_path / "b.json", '{"prompt": "a"}\n{"prompt": "b"}\n').endswith("has the ending .jsonl")


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        ("prompt,completion\na,b\nc,d,e\n", 3, "the row has 3 columns, but the header has 2"),
        ('prompt,completion\n"a, b", "c, d"\n', 2, "quotes around a field begin right behind the delimiter, without a space"),
        ("prompt,completion\na,b\nc\n", 3, "the row has 1 column, but the header has 2"),
        (
            "prompt,completion\na,b\nprompt,completion\nc,d\n",
            3,
            "the row repeats the header, as in files put one after the other",
        ),
        ('"prompt","completion"\na,b\n\ufeff"prompt","completion"\nc,d\n', 3, "the row repeats the header"),
        ('prompt,completion\n"a\nb\nc",d\nlonely\n', 5, "the row has 1 column"),
        ('prompt,completion\na,b\n\n\n"c\nd"\n', 5, "the row has 1 column"),
        ('prompt,completion\na,b\nc,"never closed\nd,e\n', 3, "not valid CSV"),
        ('prompt,completion\na,b\nc,"d" e\n', 3, "not valid CSV"),
    ],
)
def test_a_bad_csv_row_is_named_by_the_line_it_begins_on(content, line, found, tmp_path):
    message = failure(tmp_path / "a.csv", content)
    assert f"line {line}:" in message
    assert found in message


def test_a_bad_parquet_row_is_named_by_its_number(tmp_path):
    path = write(tmp_path / "a.parquet", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}])
    assert "row 2: completion must be text, not null" in failure(path)


@pytest.mark.parametrize(
    ("talk", "found"),
    [
        ([], "not []"),
        ([{"role": "assistant", "content": "a"}], 'not [{"role": "assistant", "content": "a"}]'),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "and the last of 2 is of the role user"),
        (
            [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}],
            "and message 1 of 2, of the role user, has the content null; text is needed, or tool_calls",
        ),
        (["user", "assistant"], 'and message 1 of 2 has no role: "user"'),
        ("hello", 'not "hello"'),
    ],
)
def test_a_conversation_without_an_answer_is_refused_with_what_was_found(talk, found, tmp_path):
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    message = failure(write(tmp_path / "a.jsonl", [good, {"messages": talk}]))
    assert "line 2:" in message
    assert message.endswith(found)


def test_unknown_columns_are_named_with_the_supported_ones(tmp_path):
    message = failure(write(tmp_path / "a.csv", [{"title": "a", "body": "b"}]))
    assert "found the columns body, title" in message
    assert "a record needs instruction and output (Alpaca), instruction and response (Dolly), prompt and completion" in message
    assert message.endswith("--columns prompt=QUESTION,response=ANSWER")
    with pytest.raises(CoraError, match="found no columns"):
        shape_of(set(), "here")


def test_spaces_around_the_name_of_a_column_are_seen(tmp_path):
    (tmp_path / "a.csv").write_text("prompt, completion\na,b\n")
    with pytest.raises(CoraError, match="found the columns ' completion', prompt;"):
        load_records(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "[]"),
        ("a.json", " [\n]\n"),
        ("a.jsonl", ""),
        ("a.jsonl", "\n\n"),
        ("a.csv", ""),
        ("a.csv", "prompt,completion\n"),
    ],
)
def test_a_data_set_without_records_says_so(name, content, tmp_path):
    assert failure(tmp_path / name, content).endswith("holds no records")


def test_an_empty_or_damaged_file_of_a_format_that_cannot_be_empty_says_so(tmp_path):
    assert "expected an array of records, found ''" in failure(tmp_path / "a.json", "")
    assert "cannot be read as Parquet" in failure(tmp_path / "a.parquet", "")
    complete = write(tmp_path / "b.parquet", [ALPACA])
    complete.write_bytes(complete.read_bytes()[:-20])
    assert "cannot be read as Parquet" in failure(complete)
    latin = tmp_path / "a.csv"
    latin.write_bytes("prompt,completion\ncafé,b\n".encode("latin-1"))
    assert "a.csv is not UTF-8 text (byte 0xe9 in line 2); save it as UTF-8, or convert it: `iconv -f " in failure(latin)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda file: file.write_bytes(gzip.compress(b"prompt,completion\n")), r"but a file of gzip: add \.gz to its name"),
        (
            lambda file: pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), file),
            r"but Parquet: give it the ending \.parquet",
        ),
        (
            lambda file: zipfile.ZipFile(file, "w").writestr("a", b"\xff"),
            "but a workbook of Excel or another zip archive: save",
        ),
    ],
)
def test_a_file_of_another_kind_than_its_ending_says_is_called_what_it_is(write, said, tmp_path):
    write(tmp_path / "a.csv")
    with pytest.raises(CoraError, match=rf"a\.csv is not UTF-8 text \(byte 0x.. in line 1\), {said}"):
        list(read_located(str(tmp_path / "a.csv")))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "prompt,completion\r\ncafé,£ 1\r\n"),
        ("a.jsonl", '{"prompt": "café", "completion": "£ 1"}\n'),
        ("a.json", '[{"prompt": "café", "completion": "£ 1"}]'),
    ],
)
@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF8])
def test_a_text_file_may_begin_with_the_mark_of_its_encoding(name, content, mark, tmp_path):
    encoding = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}.get(mark, "utf-8")
    (tmp_path / name).write_bytes(mark + content.encode(encoding))
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(mark + content.encode(encoding)))
    plain = tmp_path / f"plain{name[1:]}"
    plain.write_bytes(content.encode())
    expected = [record for _, record in read_located(str(plain))]
    for file in (name, f"{name}.gz"):
        assert [record for _, record in read_located(str(tmp_path / file))] == expected
    if mark != codecs.BOM_UTF8:
        (tmp_path / name).write_bytes(mark + content.encode(encoding) + b"x")
        assert f"{name} begins as UTF-16 text, but is none: truncated data; save it as UTF-8" in failure(tmp_path / name)


def test_text_in_utf_32_is_not_taken_for_utf_16(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt,completion\na,b\n".encode("utf-32"))
    assert "is not UTF-8 text, but UTF-32; convert it" in failure(tmp_path / "a.csv")


@pytest.mark.parametrize("table", [{"prompt": {"0": "a"}, "completion": {"0": "b"}}, {"prompt": ["a"], "completion": ["b"]}])
def test_a_table_by_columns_is_refused_with_the_way_to_write_one_by_rows(table, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(table))
    assert failure(tmp_path / "a.json").endswith("; pandas writes one with DataFrame.to_json(FILE, orient='records')")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gone.json", "does not exist"),
        ("folder", "is a directory, not a file"),
        ("data.xml", "has the ending .xml; supported endings are .json, .jsonl, .ndjson, .csv, .tsv, .parquet"),
        ("data", "has the ending (none); supported endings are"),
    ],
)
def test_a_path_that_cannot_be_a_data_set_says_why(name, found, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "data.xml").write_text("<a/>")
    (tmp_path / "data").write_text("a")
    assert found in failure(tmp_path / name)


@pytest.mark.parametrize("dataset", ["gone.jsonl", "./gone", "~/gone-for-ever"])
def test_a_relative_path_that_is_missing_is_not_taken_for_a_hub_id(dataset):
    with pytest.raises(CoraError, match="does not exist"):
        load_records(dataset)


def test_a_hub_id_without_a_network_gives_one_sentence():
    with pytest.raises(
        CoraError, match="dataset 'some-org/some-data' is not a local file and could not be loaded from the hub"
    ) as caught:
        load_records("some-org/some-data")
    assert "\n" not in str(caught.value)


def test_an_unknown_built_in_set_names_those_that_exist():
    with pytest.raises(CoraError, match="builtin:instruct"):
        load_split("builtin:nothing", None, seed=0)


def test_a_directory_is_not_handed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CoraError, match="dataset folder is a directory, not a file"):
        load_records("folder")


def test_the_files_of_a_folder_can_be_read_together_as_the_error_says(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for part, prompts in (("train-00000-of-00002", "ab"), ("train-00001-of-00002", "c"), ("test-00000-of-00001", "d")):
        write(tmp_path / "folder" / f"{part}.jsonl", [{"prompt": prompt, "completion": "x"} for prompt in prompts])
    with pytest.raises(CoraError, match=r"them all: datasets\.load_dataset\('folder'\)\.save_to_disk\('NEW'\)$"):
        load_records("folder")
    datasets.load_dataset("folder", cache_dir=str(tmp_path / "cache")).save_to_disk("NEW")
    assert [record["prompt"] for record in load_records("NEW")[0]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "instruction,output,output\n2+2?,4,\n", "line 1: two columns are named 'output'"),
        (
            "a.jsonl",
            '{"prompt": "x", "completion": "y"}\n{"prompt": "a", "prompt": "b", "completion": "c"}\n',
            "line 2: not valid JSON (the key 'prompt' occurs twice",
        ),
        (
            "a.json",
            '[{"prompt": "x", "completion": "y"},\n {"prompt": "a", "completion": "c", "completion": ""}]',
            "line 2: not valid JSON (the key 'completion' occurs twice",
        ),
        (
            "b.jsonl",
            '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
            "line 1: not valid JSON (the key 'content' occurs twice",
        ),
    ],
)
def test_a_column_or_key_that_is_named_twice_is_refused_by_name(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    assert message in failure(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "instruction;output\n2+2?;4\n",
            "line 1: the header is one column, 'instruction;output'; separate the columns by commas",
        ),
        ("a.csv", "instruction\toutput\n2+2?\t4, or IV\n", "output'; separate the columns by commas"),
        ("a.tsv", "instruction,output\n2+2?,4\n", "'instruction,output'; separate the columns by tabs"),
    ],
)
def test_a_table_with_another_separator_than_its_ending_says_is_refused_by_it(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    assert message in failure(tmp_path / name)


def test_the_only_column_of_a_table_may_have_its_separator_in_its_name(tmp_path):
    (tmp_path / "a.csv").write_text('"text, raw"\none\n')
    assert [record for _, record in read_located(str(tmp_path / "a.csv"), None, None)] == [{"text, raw": "one"}]


def test_a_parquet_column_that_is_named_twice_is_refused_by_name(tmp_path):
    column = pyarrow.array(["a"])
    table = pyarrow.Table.from_arrays([column, column, column], names=["prompt", "completion", "completion"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "two columns are named 'completion'" in failure(tmp_path / "a.parquet")


def test_cells_that_mean_missing_elsewhere_stay_text(tmp_path):
    words = ["null", "NA", "None", "nan", "01234", "1.10", "true"]
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "".join(f"q,{word}\n" for word in words))
    assert [record["completion"] for record in load_records(str(tmp_path / "a.csv"))[0]] == words


def test_calls_read_from_parquet_have_their_own_arguments_only(tmp_path):
    def call(**arguments):
        return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    records = [
        {"messages": [{"role": "user", "content": "a"}, call(city="Rome")]},
        {"messages": [{"role": "user", "content": "b"}, call(zone=3)]},
    ]
    found = load_records(str(write(tmp_path / "a.parquet", records)))[0]
    functions = [record["messages"][-1]["tool_calls"][0]["function"] for record in found]
    assert [function["arguments"] for function in functions] == [{"city": "Rome"}, {"zone": 3}]


def test_an_object_in_a_parquet_map_has_its_own_entries_only(tmp_path):
    kind = pyarrow.map_(
        pyarrow.string(), pyarrow.struct([("type", pyarrow.string()), ("enum", pyarrow.list_(pyarrow.string()))])
    )
    properties = pyarrow.array([[("city", {"type": "string"}), ("unit", {"enum": ["C", "F"]})]], type=kind)
    table = pyarrow.table({"prompt": ["a"], "completion": ["b"], "properties": properties})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    ((_, record),) = read_located(str(tmp_path / "a.parquet"))
    assert record["properties"] == {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}}


def test_a_parquet_map_is_an_object_and_one_that_names_a_key_twice_is_refused(tmp_path):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string()), ("arguments", kind)])

    def file(arguments):
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "arguments": arguments}]
        table = pyarrow.table({"messages": pyarrow.array([talk], type=pyarrow.list_(message))})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    found = load_records(str(file([("city", "Rome")])))[0]
    assert found[0]["messages"][-1]["arguments"] == {"city": "Rome"}
    assert "row 1: messages must be a list of {role, content} " in (said := failure(file([("city", "Rome"), ("city", "Oslo")])))
    assert "unreadable (Converting to Python dictionary" in said


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "max_length"])
def test_template_arguments_that_are_no_variables_of_the_template_are_refused(name, tmp_path):
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "a.jsonl", [{**talk, "chat_template_kwargs": {"style": "terse", name: 1}}])
    assert f"line 1: chat_template_kwargs must not set '{name}', which is no variable of the chat template" in failure(path)


def test_the_arguments_of_transformers_are_no_variables_of_a_template():
    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"self", "kwargs"}
    assert own <= TEMPLATE_ARGUMENTS


def test_tools_written_as_json_text_are_read_and_other_values_are_refused_with_their_line(tmp_path):
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    record = {**talk, "tools": json.dumps([{"name": "clock"}])}
    assert load_records(str(write(tmp_path / "a.jsonl", [record])))[0][0]["tools"] == [{"name": "clock"}]
    assert "line 1: tools must be a list" in failure(write(tmp_path / "b.jsonl", [{**talk, "tools": 7}]))


def test_columns_that_no_template_reads_are_listed():
    records = [{**ALPACA, "id": 1}, {**ALPACA, "source": "x"}]
    assert unused_columns(records, "alpaca") == ["id", "source"]
    assert unused_columns([{"messages": [], "tools": [], "chosen": 1}], "messages") == ["chosen"]


def test_columns_whose_values_no_run_can_record_are_named(tmp_path, capfd):
    when = datetime.datetime(2024, 1, 1)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**ALPACA, "when": when, "id": 1}]), path)
    assert load_records(str(path))[0] == [{**ALPACA, "id": 1}]
    assert capfd.readouterr().err.splitlines()[-1] == f"note: {path}: columns that are left out: when"


def test_records_know_their_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [ALPACA, ALPACA])
    assert [record.where for record in load_records(str(path))[0]] == [f"{path}, line 1", f"{path}, line 2"]


def test_a_key_that_the_json_text_of_a_column_names_twice_is_refused(tmp_path):
    path = tmp_path / "tools.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": messages, "tools": '[{"name": "f", "name": "g"}]'}))
    with pytest.raises(CoraError, match=r"line 1: tools must be JSON.*name"):
        load_records(str(path))


@pytest.mark.parametrize(
    ("content", "left_out"),
    [
        ("prompt,completion,,\nq,a,,\nr,b,,\n", "3, 4"),
        ("prompt,completion\nq,a,,\nr,b, \n", "3, 4"),
        ("prompt,completion,\nq,a,\nr,b,,\n", "3, 4"),
        (",prompt,completion\n0,q,a\n1,r,b\n", "1"),
    ],
)
def test_csv_columns_without_a_name_are_left_out_and_named_once(content, left_out, tmp_path, capfd):
    (tmp_path / "a.csv").write_text(content)
    records, _ = load_records(str(tmp_path / "a.csv"))
    assert records == [{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b"}]
    assert (
        capfd.readouterr().err.splitlines()[0]
        == f"note: {tmp_path / 'a.csv'}: columns without a name are left out ({left_out})"
    )


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_a_pointer_of_git_lfs_is_called_one(ending, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    assert "is only a pointer of Git LFS, in place of the file itself" in failure(tmp_path / f"a.{ending}", pointer)


def test_csv_rows_of_empty_cells_are_left_out_and_counted(tmp_path, capfd):
    (tmp_path / "a.csv").write_text(",\nprompt,completion\nq,a\n , \n\nr,\n,\n")
    records, _ = load_records(str(tmp_path / "a.csv"))
    assert records == [{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": ""}]
    assert capfd.readouterr().err.splitlines()[0] == f"note: {tmp_path / 'a.csv'}: 3 rows of empty cells left out"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("prompt,completion,,\nq,a,,\nr,b,, and c\n", "line 3: column 4 has no name but holds ' and c'"),
        ("prompt,completion\nq,a\nr,b, and c\n", "line 3: the row has 3 columns, but the header has 2"),
        ("prompt,completion,\nq\n", "line 2: the row has 1 column, but the header has 3"),
    ],
)
def test_text_in_a_csv_column_without_a_name_is_not_dropped(content, found, tmp_path):
    assert found in failure(tmp_path / "a.csv", content)


def test_a_parquet_struct_that_names_a_field_twice_is_refused(tmp_path):
    said = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string()), ("content", pyarrow.string())])
    fields = [pyarrow.array([word]) for word in ("user", "one text", "another")]
    message = pyarrow.StructArray.from_arrays(fields, fields=list(said))
    messages = pyarrow.ListArray.from_arrays([0, 1], message)
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "a.parquet")
    with pytest.raises(CoraError, match=r'messages must be .* "unreadable \(.*duplicate field names'):
        load_records(str(tmp_path / "a.parquet"))
