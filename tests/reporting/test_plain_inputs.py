"""One content has one name in a report, and one name one content."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from cora_cli.reporting.plain_inputs import Plain, named_by_contents
from tests.reporting.helpers import ROW

PATHS = st.sampled_from(["here", "there", "elsewhere"])
CONTENTS = st.sampled_from(["a" * 64, "b" * 64, "c" * 64])
MADE_OF = st.tuples(PATHS, CONTENTS, PATHS, CONTENTS, CONTENTS, st.booleans())


def plain(model, weights, dataset, data, tokenizer, trained=True, held_out=None, **split):
    row = dataclasses.replace(ROW, group="" if not trained else "any", model=model, dataset=dataset if trained else "")
    hashes = {"model_sha256": weights, "data_sha256": data, "tokenizer_sha256": tokenizer, "settings": split}
    if trained:
        prints = {name: value for name, value in hashes.items() if value is not None}
        return Plain(row, {"fingerprint": prints, "data": {"test_sha256": held_out} if held_out else {}}, {})
    return Plain(row, {}, {"generation": {"settings": {"model_sha256": weights}}})


@given(st.lists(MADE_OF, min_size=2, max_size=7))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_names_are_equal_where_contents_are_and_only_there(made):
    named = named_by_contents([plain(*each) for each in made])
    found = list(zip(made, named, strict=True))
    for (_, weights, _, data, tokenizer, trained), one in found:
        for (_, other_weights, _, other_data, other_tokenizer, other_trained), other in found:
            assert (one.row.model == other.row.model) == (weights == other_weights)
            if trained and other_trained:
                assert (one.row.dataset == other.row.dataset) == (data == other_data)
                same = (weights, data, tokenizer) == (other_weights, other_data, other_tokenizer)
                assert (one.row.group == other.row.group) == same


def test_what_was_not_hashed_goes_by_its_path():
    rows = [plain("m", None, "d", None, None, trained=trained) for trained in (True, True, False)]
    assert {one.row.model for one in named_by_contents(rows)} == {"m"}
    changed = [*rows, plain("m", "a" * 64, "d", None, None), plain("m", "b" * 64, "d", None, None)]
    named = [one.row.model for one in named_by_contents(changed)]
    assert named == ["m", "m", "m", f"m, weights sha256 {'a' * 12}", f"m, weights sha256 {'b' * 12}"]


def test_data_that_were_divided_otherwise_have_other_hashes_and_are_the_same():
    rows = [plain("m", "a", "d", "1", "t", split_seed=0), plain("m", "a", "d", "2", "t", split_seed=1)]
    assert {one.row.group for one in named_by_contents(rows)} == {"m on d"}
    again = [*rows, plain("m", "a", "d", "3", "t", split_seed=1)]
    assert [one.row.dataset for one in named_by_contents(again)] == ["d", "d, data sha256 2", "d, data sha256 3"]


def test_runs_on_fewer_records_of_a_file_are_compared_unless_the_file_has_changed():
    rows = [plain("m", "a", "d", "1", "t", held_out="x"), plain("m", "a", "d", "2", "t", held_out="x", limit=8)]
    rows.append(plain("m", "a", "d", "3", "t", held_out="x", train_on="all"))
    assert {one.row.group for one in named_by_contents(rows)} == {"m on d"}
    changed = [*rows, plain("m", "a", "d", "4", "t", held_out="y", limit=4)]
    *same, other = (one.row.dataset for one in named_by_contents(changed))
    assert set(same) == {"d, held-out sha256 x"}
    assert other == "d, held-out sha256 y"
