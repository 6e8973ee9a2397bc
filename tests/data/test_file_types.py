"""Files and folders as data comes in: tables, compressed files, several splits, folders of `save_to_disk`."""

import bz2
import gzip
import json
import lzma
import os
import random
import zlib

import pyarrow
import pytest

from cora_cli.data import readers, texts
from cora_cli.data.readers import read_located
from cora_cli.data.split import Choice, load_records, load_split
from cora_cli.errors import CoraError

PAIR = {"prompt": "p, q", "completion": "c"}
SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def test_tables_with_tabs_and_arrays_in_objects_are_read(tmp_path):
    (tmp_path / "b.tsv").write_text("prompt\tcompletion\np, q\tc\n")
    (tmp_path / "c.json").write_text(json.dumps({"version": "1", "data": [PAIR]}))
    (tmp_path / "d.ndjson").write_text(json.dumps(PAIR))
    for name in ("b.tsv", "c.json", "d.ndjson"):
        assert load_records(str(tmp_path / name)) == ([PAIR], "prompt")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('"open\tx\na\tb"\nc\td\n', [('"open', "x"), ("a", 'b"'), ("c", "d")]),
        ('"Hello" she said\tx\na\tb\n', [('"Hello" she said', "x"), ("a", "b")]),
        ('a\t"never closed\nb\tc\n', [("a", '"never closed'), ("b", "c")]),
        ('"said ""so"""\tx\n"a\ttab"\t"two\nlines"\n', [('said "so"', "x"), ("a\ttab", "two\nlines")]),
        ('5" nails\tx\n', [('5" nails', "x")]),
    ],
)
def test_quotation_marks_of_a_tsv_file_that_quote_no_fields_are_text(written, read, tmp_path, capsys):
    (tmp_path / "a.tsv").write_text(f"prompt\tcompletion\n{written}")
    found = [(row["prompt"], row["completion"]) for _, row in read_located(str(tmp_path / "a.tsv"))]
    assert found == read
    assert ("are read as text" in capsys.readouterr().err) == (written[0] != "5" and '""' not in written)


def test_quotation_marks_of_a_tsv_file_that_may_quote_fields_or_not_are_refused(tmp_path):
    (tmp_path / "a.tsv").write_text('prompt\tcompletion\nx\ty\n"a\tb\nc"\td\n')
    with pytest.raises(
        CoraError, match=r"a\.tsv, line 4: its quotation marks may be text, or .*; save the file as CSV or JSON Lines$"
    ):
        list(read_located(str(tmp_path / "a.tsv")))


@pytest.mark.parametrize(
    "first", ["sep=,\r\n", "\ufeffSEP=,\n", '"sep=,"\n', "#TYPE System.Management.Automation.PSCustomObject\r\n"]
)
def test_the_line_in_which_excel_names_the_delimiter_is_no_header(first, tmp_path):
    (tmp_path / "a.csv").write_text(f'{first}prompt,completion\n"p, q",c\n', newline="")
    assert list(read_located(str(tmp_path / "a.csv"))) == [(f"{tmp_path}/a.csv, line 3", PAIR)]


class Watched(str):
    """A text that counts the characters among which others are looked for."""

    __slots__ = ("searched",)

    def __contains__(self, part):
        self.find(part)
        return super().__contains__(part)

    def find(self, part, start=0, end=None):
        self.searched = getattr(self, "searched", 0) + (len(self) if end is None else end) - start
        return super().find(part, start, end)

    def count(self, part, start=0, end=None):
        self.find(part, start, end)
        return super().count(part, start, end)


def test_an_array_is_searched_a_few_times_and_not_again_for_each_record(tmp_path, monkeypatch):
    text = Watched(json.dumps([PAIR] * 500, indent=1))
    (tmp_path / "a.json").write_text(text)
    monkeypatch.setattr(readers, "text_of", lambda path: text)
    assert len(list(read_located(str(tmp_path / "a.json")))) == 500
    assert 0 < text.searched < 4 * len(text)


@pytest.mark.parametrize(("ending", "compress"), COMPRESSIONS.items())
def test_a_compressed_file_is_read_with_all_its_streams_and_refused_where_one_is_damaged(ending, compress, tmp_path):
    line = f"{json.dumps(PAIR)}\n".encode()
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + line) + compress(line))
    assert load_records(str(path)) == ([PAIR, PAIR], "prompt")
    for damaged in (compress(line)[:-5], compress(line) + b"junk", compress(line) + compress(line)[:-5], b"junk"):
        path.write_bytes(damaged)
        with pytest.raises(CoraError, match=r"a\.jsonl\.\w+ cannot be decompressed"):
            load_records(str(path))


def test_a_file_with_a_stream_for_every_record_is_handed_to_each_in_small_pieces():
    given = []

    class Counted:
        def __init__(self):
            self.own = zlib.decompressobj(wbits=31)

        def decompress(self, data):
            given.append(len(data))
            return self.own.decompress(data)

        eof, unused_data = (property(lambda self, name=name: getattr(self.own, name)) for name in ("eof", "unused_data"))

    content = random.Random(0).randbytes(1 << 17)
    compressed = b"".join(
        gzip.compress(content[place : place + 64], 1) + b"\0" * (place % 3) for place in range(0, 1 << 17, 64)
    )
    assert texts._expanded(Counted)(compressed) == content
    assert sum(given) < 200 * len(compressed)
    assert texts.COMPRESSIONS[".gz"](gzip.compress(content)) == content


def test_a_pipe_is_refused_with_what_would_work(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(
        CoraError, match=r"a\.jsonl is a device or a pipe, which can be read only once; write the records to a file"
    ):
        load_records(str(tmp_path / "a.jsonl"))


def test_a_file_of_several_splits_needs_a_choice(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": [PAIR, PAIR], "test": [PAIR]}))
    assert len(load_records(str(path), Choice(split="test"))[0]) == 1
    with pytest.raises(CoraError, match="has several splits; choose one with --split: train, test"):
        load_records(str(path))
    with pytest.raises(CoraError, match="has no split dev; choose one with --split: train, test"):
        load_records(str(path), Choice(split="dev"))


def test_of_a_file_of_several_splits_the_split_test_is_held_out_and_another_is_refused_with_what_works(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", PAIR, {**PAIR, "prompt": "r"})
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": [PAIR, PAIR], "test": [PAIR]}))
    assert len(load_split(train, None, 0, test_dataset=str(path)).test) == 1
    path.write_text(json.dumps({"train": [PAIR, PAIR], "dev": [PAIR]}))
    with pytest.raises(
        CoraError, match="none is called test, which --test-dataset takes: train, dev; write the records to hold"
    ):
        load_split(train, None, 0, test_dataset=str(path))


def test_a_split_or_a_subset_of_what_has_none_is_refused(tmp_path):
    dataset = jsonl(tmp_path / "a.jsonl", PAIR)
    with pytest.raises(CoraError, match="--split test applies to data sets with several splits"):
        load_records(dataset, Choice(split="test"))
    with pytest.raises(CoraError, match="--subset main applies to data sets of the hub"):
        load_records(dataset, Choice(subset="main"))
    with pytest.raises(CoraError, match="--subset does not apply to builtin:code"):
        load_records("builtin:code", Choice(subset="main"))


def test_folders_of_save_to_disk_are_read_with_their_splits(tmp_path):
    import datasets

    one = datasets.Dataset.from_list([PAIR])
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list([PAIR, {**PAIR, "prompt": "r"}]), "test": one}).save_to_disk(
        str(tmp_path / "both")
    )
    assert load_records(str(tmp_path / "one"))[0] == [PAIR]
    assert len(load_records(str(tmp_path / "both"))[0]) == 2
    assert load_records(str(tmp_path / "both"), Choice(split="test"))[0] == [PAIR]
    split = load_split(str(tmp_path / "both"), None, 0, test_dataset=str(tmp_path / "both"))
    assert (split.test, split.train, split.overlapping) == ([PAIR], [{**PAIR, "prompt": "r"}], 1)


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
def test_a_format_that_was_saved_with_a_folder_neither_hides_columns_nor_changes_values(tmp_path, form):
    import datasets

    record = {"instruction": "i", "input": "in", "output": "o", "numbers": [1, 2]}
    rows = datasets.Dataset.from_list([record, record])
    rows.with_format(form).save_to_disk(str(tmp_path / "all"))
    rows.with_format(form, columns=["instruction", "output"]).save_to_disk(str(tmp_path / "some"))
    assert load_records(str(tmp_path / "all"))[0] == load_records(str(tmp_path / "some"))[0] == [record, record]


def test_sounds_and_images_that_nothing_reads_are_not_decoded(tmp_path):
    import datasets

    (tmp_path / "clip.wav").write_bytes(b"no sound")
    rows = datasets.Dataset.from_list([{"question": "q", "answer": "a", "clip": str(tmp_path / "clip.wav")}])
    rows.cast_column("clip", datasets.Audio()).save_to_disk(str(tmp_path / "one"))
    assert load_records(str(tmp_path / "one"))[0] == [{"prompt": "q", "completion": "a"}]


def test_what_the_package_datasets_stores_as_json_is_read_with_its_own_nulls_from_folders_and_parquet(tmp_path):
    import datasets

    def call(**arguments: object) -> list[dict[str, object]]:
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        return [{"role": "user", "content": "u"}, {"role": "assistant", "content": None, "tool_calls": calls}, SAID[-1]]

    records = [{"messages": call(x=1)}, {"messages": call(x="1", y=None)}]
    rows = datasets.Dataset.from_list(records, features=datasets.Features({"messages": datasets.List(datasets.Json())}))
    rows.save_to_disk(str(tmp_path / "folder"))
    rows.to_parquet(str(tmp_path / "file.parquet"))
    assert load_records(str(tmp_path / "folder"))[0] == load_records(str(tmp_path / "file.parquet"))[0] == records
    # Leaves of objects that are a table's own.
    leaf = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    feature = {
        "role": datasets.Value("string"),
        "content": datasets.Value("string"),
        "tool_calls": datasets.List({"function": {"name": datasets.Value("string"), "arguments": {"x": datasets.Json()}}}),
    }
    rows = datasets.Dataset.from_list(
        [{"messages": [SAID[0], leaf]}], features=datasets.Features({"messages": datasets.List(feature)})
    )
    rows.to_parquet(str(tmp_path / "leaf.parquet"))
    assert load_records(str(tmp_path / "leaf.parquet"))[0] == [{"messages": [SAID[0], leaf]}]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_wide_text_without_a_mark_is_named_with_its_encoding(encoding, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("prompt,completion\nWie groß?,größer\n".encode(encoding))
    name = "UTF-32" if encoding == "utf-32" else encoding.upper().replace("16-", "16")
    with pytest.raises(CoraError, match=f"is not UTF-8 text, but {name}; convert it: `iconv -f {name} -t UTF-8"):
        load_records(str(path))


def test_a_column_that_python_cannot_hold_is_refused_where_it_is_read_alone(tmp_path, capfd):
    import datasets

    far, zone = (
        pyarrow.array([2**62, 0], pyarrow.timestamp("us")),
        pyarrow.array([0, 0], pyarrow.timestamp("us", tz="Mars/Phobos")),
    )
    twice = pyarrow.array([[("a", 1), ("a", 2)], []], pyarrow.map_(pyarrow.string(), pyarrow.int32()))
    malformed = pyarrow.array(['{"a": 1, "a": 2}', "{}"], pyarrow.json_())
    unread = {"far": far, "zone": zone, "malformed": malformed, "twice": twice}
    table = pyarrow.table({"prompt": ["q", "r"], "completion": ["a", "b"], **unread})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table.drop_columns(["malformed", "twice"])).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        assert [record["completion"] for record in load_records(str(tmp_path / name))[0]] == ["a", "b"]
        assert "columns that are left out: far" in capfd.readouterr().err
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q", "r"], "completion": far}), tmp_path / "b.parquet")
    with pytest.raises(CoraError, match=r'b\.parquet, row 1: completion must be text, not "unreadable \(.*\): timestamp'):
        load_records(str(tmp_path / "b.parquet"))
