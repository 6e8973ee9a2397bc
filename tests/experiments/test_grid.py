from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from cora_cli.errors import UsageError
from cora_cli.experiments.grid import build_grid, load_grid
from cora_cli.experiments.rows import RowMode, short
from cora_cli.experiments.values import read_yaml
from tests.experiments.helpers import BASE, grid_of


def names(*blocks: Any, **changes: Any) -> list[str]:
    return [row.name for row in grid_of(*blocks, **changes).rows]


def test_lists_are_combined_in_the_order_of_the_file() -> None:
    assert names({"mode": "lora", "rank": [4, 8], "seed": [0, 1]}) == [
        "lora_r4_lr3e-4_seed0",
        "lora_r4_lr3e-4_seed1",
        "lora_r8_lr3e-4_seed0",
        "lora_r8_lr3e-4_seed1",
    ]


def test_a_name_holds_what_identifies_a_row_and_no_more() -> None:
    assert names({"mode": "base"}) == ["base"]
    assert names({"mode": "fb", "learning_rate": "1e-4"}) == ["cora-fb_r4_n3_lr1e-4_seed0"]
    assert names({"mode": "tb", "n_models": 0}) == ["cora-tb_r4_n0_lr3e-4_seed0"]
    assert names({"mode": "fb", "b_init": "orthonormal"}) == ["cora-fb-orthonormal_r4_lr3e-4_seed0"]
    assert names({"mode": "full", "learning_rate": 1.5e-5}) == ["full_lr1.5e-5_seed0"]
    assert names({"mode": "basis", "method": ["svd", "pca"]}) == ["basis-svd_module_r48_n3", "basis-pca_module_r48_n3"]
    # A setting is part of the name only if it varies within the block.
    assert names({"mode": "lora", "alpha": 8}) == ["lora_r4_lr3e-4_seed0"]
    assert names({"mode": "lora", "alpha": [8, 16.0]}) == ["lora_r4_lr3e-4_alpha-8_seed0", "lora_r4_lr3e-4_alpha-16_seed0"]
    assert names({"mode": "lora", "target_modules": [["q_proj"], ["k_proj", "v_proj"]]})[1] == (
        "lora_r4_lr3e-4_target-modules-k_proj+v_proj_seed0"
    )
    two = {"data": "records", "more": "tasks"}
    assert names({"mode": "base", "dataset": ["data", "more"]}, datasets=two) == ["base_data", "base_more"]


@pytest.mark.parametrize(
    ("value", "text"), [(1e-4, "1e-4"), (1.5e-5, "1.5e-5"), (0.25, "0.25"), (3.0, "3"), (0.0, "0"), (0.01, "0.01")]
)
def test_numbers_in_names_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_explicit_rows_take_the_settings_of_their_block() -> None:
    rows = grid_of({"mode": "lora", "seed": [0, 1], "rows": [{"rank": 2}, {"rank": 3, "label": "three"}]}).rows
    assert [(row.rank, row.seed, row.label) for row in rows] == [
        (2, 0, "lora"),
        (2, 1, "lora"),
        (3, 0, "three"),
        (3, 1, "three"),
    ]


def test_defaults_apply_to_every_row_in_which_they_have_an_effect() -> None:
    full, lora = grid_of(
        {"mode": "full"},
        {"mode": "lora", "seed": 3},
        defaults={"train": {"a_init": "gaussian", "alpha": 4, "learning_rate": "2e-3"}},
    ).rows
    assert full.train == {"learning_rate": 2e-3}
    assert lora.train == {"a_init": "gaussian", "alpha": 4.0, "learning_rate": 2e-3, "seed": 3}


def test_n_models_are_chosen_at_random_by_a_seed_and_keep_the_order_of_the_pool() -> None:
    pool = {name: f"org/{name}" for name in "edcba"}

    def chosen(seed: int, count: int = 2) -> tuple[str, ...]:
        return grid_of({"mode": "fb", "n_models": count, "source_seed": seed}, models=pool).rows[0].sources

    assert chosen(1) == chosen(1)
    assert len({chosen(seed) for seed in range(20)}) > 5
    assert chosen(0, 5) == tuple("edcba")
    assert all(list(chosen(seed)) == sorted(chosen(seed), reverse=True) for seed in range(20))
    assert chosen(0, 0) == ()
    # The mode, rank and learning rate of a row do not affect the choice: rows are compared on one basis.
    rows = grid_of({"mode": ["fb", "tb"], "rank": [4, 8], "n_models": 3}, models=pool).rows
    assert len({row.sources for row in rows}) == 1


def test_printed_names_are_filled_from_the_row() -> None:
    grid = grid_of({"mode": "lora", "rank": [48, 24], "printed": "LoRA_code_{rank}"}, paper_table="main")
    assert [row.printed for row in grid.rows] == ["LoRA_code_48", "LoRA_code_24"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"mode": "fb", "rnak": 3}, "grid, block 1: unknown key 'rnak' (did you mean rank?)"),
        ({"mode": "fbl"}, f"mode must be one of {', '.join(get_args(RowMode))}, not 'fbl'"),
        ({"rank": 3}, "mode is missing; it must be one of base, basis, lora"),
        ({"mode": "lora", "rank": []}, "rank must not be an empty list"),
        ({"mode": "lora", "rows": []}, "rows must be a list of at least one row"),
        ({"mode": "lora", "rank": "many"}, "rank must be an integer, not 'many'"),
        ({"mode": "lora", "rank": True}, "rank must be an integer, not True"),
        ({"mode": "lora", "rank": "1e-1"}, "rank must be an integer, not '1e-1'"),
        ({"mode": "lora", "rank": "08"}, "rank must be an integer, not '08'"),
        ({"mode": "lora", "learning_rate": "fast"}, "learning_rate must be a number or one of auto, not 'fast'"),
        ({"mode": "lora", "label": ""}, "label must be text that is not empty, or left out, not ''"),
        ({"mode": "lora", "learning_rate": -1.0}, "--learning-rate must be positive, not -1.0"),
        ({"mode": "lora", "n_models": 2}, "n_models has no effect in mode lora; leave it out"),
        ({"mode": "base", "seed": 1}, "seed has no effect in mode base"),
        ({"mode": "full", "rank": 8}, "rank has no effect in mode full"),
        ({"mode": "lora", "epochs": [1, 3], "max_steps": 2}, "epochs has no effect with --max-steps, which decides"),
        ({"mode": "lora", "b_init": "ones"}, "b_init has no effect in mode lora"),
        ({"mode": "fb", "b_init": "ones", "share": "layer"}, "share has no effect in mode fb with b_init ones"),
        ({"mode": "fb", "n_models": 4}, "n_models must be 0 to 3, the number of models in the file, not 4"),
        ({"mode": "fb", "n_models": 1, "sources": ["a"]}, "set either sources or n_models, not both"),
        ({"mode": "fb", "sources": ["a", "z"]}, "sources must be names from models (a, b, c), not 'z'"),
        ({"mode": "fb", "sources": ["a", "a"]}, "sources must not name a model twice"),
        ({"mode": "fb", "n_models": 0, "source": "delta"}, "the base would be subtracted from itself"),
        (
            {"mode": "fb", "rank": 64, "basis_rank": 48},
            "rank 64 needs a basis of at least that rank, but the grid sets the basis rank to 48",
        ),
        ({"mode": "fb", "share": "all"}, "share must be one of module, layer, projection, global, not 'all'"),
        ({"mode": "lora", "dataset": "date"}, "dataset must be one of data, not 'date'"),
        ({"mode": "lora", "test_size": 5}, "unknown key 'test_size'"),
        ({"mode": "lora", "seed": [0, 0]}, "several rows have the name lora_r4_lr3e-4_seed0"),
        ({"mode": "lora", "printed": "x"}, "rows with a printed name need paper_table"),
        ({"mode": "lora", "printed": "{colour}"}, "printed '{colour}' uses 'colour', which this row does not set"),
        ({"mode": "lora", "printed": "{mode.colour}"}, "printed '{mode.colour}' uses "),
        (["mode"], "grid, block 1 must hold `name: value` lines"),
    ],
)
def test_an_invalid_block_is_refused(block: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        grid_of(block)
    assert str(error.value).startswith("grid file tiny.yaml: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, "unknown key 'modle' (did you mean model?)"),
        ({"model": None}, "model is missing"),
        ({"datasets": None}, "datasets is missing; write a line"),
        ({"models": {"a b": "x"}, "grid": []}, "'a b' is not a valid name"),
        ({"models": {"x": {"max_steps": 2}}}, "models: x has training settings but no dataset"),
        ({"models": {"a": "org/a", "b": "org/b", "c": "org/a"}}, "models: a and c are the same model, which would count twice"),
        ({"models": {"x": {"dataset": "d"}, "y": {"dataset": "d", "mode": "lora"}}}, "models: x and y are the same model"),
        ({"models": {"x": {"dataset": "d", "mode": "fb"}}}, "models: x: mode must be one of lora, full, not 'fb'"),
        ({"datasets": {"d": 3}}, "datasets: d must be a hub id, path or builtin name, not 3"),
        ({"defaults": {"trian": {}}}, "defaults: unknown key 'trian' (did you mean train?)"),
        ({"defaults": {"train": {"output_dir": "x"}}}, "unknown key 'output_dir'"),
        ({"defaults": {"evaluate": {"ranks": ["1"]}}}, "defaults: evaluate: unknown key 'ranks'"),
        ({"defaults": {"evaluate": {"metrics": ["rogue"]}}}, "unknown metric 'rogue'"),
        (
            {"datasets": {"d" + "é" * 108: "x", "e": "y"}, "grid": [{"mode": "lora", "dataset": "d" + "é" * 108}]},
            f"the name of the row lora_d{'é' * 54}… is 238 bytes long, and its files could not be named; use shorter names",
        ),
        ({"paper_table": "tabel"}, "paper_table must be one of number_of_models, main, rank, ablation"),
        ({"grid": []}, "grid must be a list of at least one block"),
        ({"grid": {"mode": "fb"}}, "grid must be a list of at least one block"),
        (
            {"paper_table": "main", "grid": [{"mode": "lora", "printed": "LoRA_code_42"}]},
            "unknown key 'LoRA_code_42' (did you mean LoRA_code_4",
        ),
    ],
)
def test_an_invalid_file_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        build_grid({**BASE, "grid": [{"mode": "lora"}], **changes}, "tiny.yaml")
    assert message in str(error.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(UsageError) as error:
        grid_of({"mode": "lora", "rnak": 1}, {"mode": "fb", "n_models": 9}, modle=1)
    assert all(word in str(error.value) for word in ("rnak", "not 9", "modle"))


def test_a_file_below_the_home_directory_is_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "common.yaml").write_text("name: theirs\n")
    (tmp_path / "own.yaml").write_text("include: ~/common.yaml\n")
    assert read_yaml(tmp_path / "own.yaml") == {"name": "theirs"}


def test_a_file_includes_another_and_its_own_values_win(tmp_path: Path) -> None:
    (tmp_path / "common.yaml").write_text(
        "model: m\nconditions: [common]\ndatasets: {d: x}\ndefaults: {train: {rank: 4, alpha: 8}, evaluate: {limit: 5}}\n"
    )
    (tmp_path / "own.yaml").write_text(
        "include: common.yaml\nconditions: [own]\ndefaults: {train: {rank: 6}}\ngrid: [{mode: lora}]\n"
    )
    grid = load_grid(tmp_path / "own.yaml")
    assert (grid.name, grid.model, grid.conditions, grid.evaluate) == ("own", "m", ("common", "own"), {"limit": 5})
    assert grid.rows[0].train == {"rank": 6, "alpha": 8.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "own.yaml does not exist"),
        ("a: [", "is not valid YAML"),
        ("- a", "must hold `name: value` lines, not a list"),
        ("include: own.yaml", "includes itself"),
        ("include: other.yaml", "other.yaml does not exist"),
        ("include: [a]", "include must name one file"),
        ("include: ''", "include must name one file, not ''"),
        ("model: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UsageError, match="grid file") as error:
        load_grid(tmp_path / "own.yaml")
    assert message in str(error.value)


def test_settings_that_vary_are_in_the_label_so_that_they_are_separate_methods() -> None:
    rows = grid_of(
        {"mode": "lora", "alpha": [4.0, 8.0], "rank": [4, 8], "seed": [0, 1]},
        {"mode": "fb", "label": "mine", "share": ["module", "projection"], "sources": [["a"], ["a", "b"]]},
    ).rows
    assert {row.label for row in rows[:8]} == {"lora alpha=4", "lora alpha=8"}
    assert [row.label for row in rows[8:]] == [
        "mine share=module sources=a",
        "mine share=module sources=a+b",
        "mine share=projection sources=a",
        "mine share=projection sources=a+b",
    ]


@pytest.mark.parametrize(
    ("one", "other", "differing"),
    [
        ({"alpha": 4}, {"alpha": 16, "seed": 1}, "alpha"),
        ({"alpha": 4}, {"alpha": 16, "learning_rate": 1e-3}, "alpha"),
        ({"mode": "fb", "sources": ["a"]}, {"mode": "fb", "sources": ["b"], "seed": 1}, "sources"),
        ({"mode": "fb"}, {"mode": "fb", "share": "layer", "method": "pca", "seed": 1}, "method, share"),
        ({"ensemble": 2}, {"ensemble": 3, "seed": 1}, "ensemble"),
        ({"label": "mine", "max_steps": 2}, {"label": "mine", "max_steps": 3, "seed": 1}, "max_steps"),
    ],
)
def test_two_methods_under_one_label_are_refused_since_they_would_count_as_seeds_of_one(
    one: Any, other: Any, differing: str
) -> None:
    with pytest.raises(
        UsageError, match=f", but differ in {differing}, and would count as seeds of one method; give them different labels"
    ):
        grid_of({"mode": "lora", **one}, {"mode": "lora", **other})
    assert len(grid_of({"mode": "lora", **one, "label": "first"}, {"mode": "lora", **other, "label": "second"}).rows) == 2


def test_blocks_may_add_seeds_and_rates_to_a_method_and_its_defaults_may_be_written_out() -> None:
    assert len(grid_of({"mode": "lora", "seed": [0, 1]}, {"mode": "lora", "seed": 2, "alpha": 8}).rows) == 3
    assert len(grid_of({"mode": "lora", "label": "lora alpha=8"}, {"mode": "lora", "alpha": [8, 4], "seed": 1}).rows) == 3


def test_one_training_under_two_names_is_refused() -> None:
    with pytest.raises(
        UsageError, match="lora_r4_lr3e-4_seed0 and lora_r4_lr3e-4_alpha-8_seed0 are one training, which would count as two"
    ):
        grid_of({"mode": "lora", "label": "lora alpha=8"}, {"mode": "lora", "alpha": [8, 4]})
    with pytest.raises(
        UsageError, match=r"are one training under two names; both draw the same source models; leave one of them"
    ):
        grid_of({"mode": "fb", "source_seed": [0, 1]})
    with pytest.raises(
        UsageError, match=r"lora_r4_lr3e-4_seed0 and .* are one training under two names; leave one of them out"
    ):
        grid_of({"mode": "lora"}, {"mode": "lora", "alpha": [8, 4]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {"a": "org/a", 2: "org/b"}}, "models: 2 is not a valid name"),
        ({"models": {True: {"dataset": "tasks"}}}, "models: True is not a valid name"),
        ({"datasets": {1: "records"}}, "datasets: 1 is not a valid name"),
        ({"name": "../up"}, "name: '../up' is not a valid name"),
        ({"name": "g" * 300}, f"name: {'g' * 60}… is 300 bytes long, and its files could not be named; use a shorter name"),
        ({"conditions": "One sentence."}, "conditions must be a list of sentences, not 'One sentence.'"),
        ({"conditions": [5]}, "conditions must be a list of sentences, not [5]"),
    ],
)
def test_invalid_names_and_conditions_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        grid_of({"mode": "base"}, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["model: m\nmodel: n\n", "model: m\ngrid:\n  - {mode: lora, rank: 4, rank: 8}\n"])
def test_a_duplicate_key_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"has the key '(model|rank)' twice in the same mapping"):
        load_grid(tmp_path / "grid.yaml")


def test_settings_of_the_small_preset_may_not_vary(tiny_model: Path, tmp_path: Path) -> None:
    values = {**BASE, "datasets": {"data": "builtin:code"}}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**values, "grid": [{"mode": "lora", "batch_size": [2, 4]}]}))
    with pytest.raises(UsageError, match="preset small sets batch_size itself"):
        load_grid(path, "small", str(tiny_model))
    rates = [{"learning_rate": 1e-3}, {"learning_rate": 1e-2}]
    path.write_text(
        yaml.safe_dump({**values, "grid": [{"mode": "lora", "rows": rates}, {"mode": "fb", "share": ["global", "projection"]}]})
    )
    rows = load_grid(path, "small", str(tiny_model)).rows
    assert [row.learning_rate for row in rows[:2]] == [1e-3, 1e-2]
    assert len(rows) == 3


def test_the_small_preset_names_the_source_models_that_some_row_uses(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    row = {"mode": "fb", "share": "projection"}
    for block in ({**row, "sources": "b"}, {**row, "n_models": 0}, {**row, "n_models": 2, "source_seed": [1, 2, 3]}, row):
        path.write_text(yaml.safe_dump({**BASE, "datasets": {"data": "builtin:code"}, "grid": [block]}))
        grid = load_grid(path, "small", str(tiny_model))
        used = [name for name in grid.models if any(name in row.sources for row in grid.rows)]
        said = [sentence for sentence in grid.conditions if "source models" in sentence]
        assert said == ([f"The source models were fine-tuned here, 8 steps each on {', '.join(used)}."] if used else [])


def test_baselines_are_ordinary_rows_and_fa_basis_gets_a_basis_of_the_input_side() -> None:
    grid = grid_of(
        {"mode": ["pissa", "lora+", "dora"], "rank": 4},
        {"mode": "fa-basis", "rank": 4},
        {"mode": "lora+", "lora_plus_ratio": 2.0, "label": "small ratio", "seed": 1},
    )
    assert [row.name for row in grid.rows][:4] == [
        "pissa_r4_lr3e-4_seed0",
        "lora-plus_r4_lr3e-4_seed0",
        "dora_r4_lr3e-4_seed0",
        "fa-basis_r4_n3_lr3e-4_seed0",
    ]
    assert [row.basis["side"] if row.basis else None for row in grid.rows] == [None, None, None, "input", None]
    with pytest.raises(UsageError, match="lora_plus_ratio has no effect in mode pissa"):
        grid_of({"mode": "pissa", "lora_plus_ratio": 2.0})


def test_a_row_s_name_is_one_folder_s_name(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("loha.json", "lokr.json")]
    for file in files:
        file.write_text(f'{{"peft_type": "{file.stem.upper()}"}}')
    names = [row.name for row in grid_of({"mode": "peft", "peft_config": list(map(str, files))}).rows]
    assert [name for name in names if "/" in name] == []
    assert ["peft-config-loha.json" in name for name in names] == [True, False]
    with pytest.raises(UsageError, match=r"cannot name a folder; the values that tell rows apart must consist of letters"):
        grid_of({"mode": "lora", "target_modules": [["q_proj"], ["a/../../k_proj"]]})


def test_an_integer_in_exponent_form_is_one_although_yaml_reads_text() -> None:
    (row,) = grid_of({"mode": "lora", "rank": "1e1", "max_steps": "1.5e3"}).rows
    assert (row.train["rank"], row.train["max_steps"]) == (10, 1500)


def test_a_margin_in_exponent_form_is_a_number_although_yaml_reads_text() -> None:
    assert grid_of({"mode": "lora"}, margin="1e-2").margin == 0.01
    assert grid_of({"mode": "lora"}, margin={"rouge1": "5e-3"}).margin == {"rouge1": 0.005}


@pytest.mark.parametrize("margin", [None, 0.2, {"heldout_loss": 0.01, "rouge1": 0.005}])
def test_the_margin_of_equivalence_reaches_the_grid(margin: Any) -> None:
    assert grid_of({"mode": "lora"}, margin=margin).margin == margin


@pytest.mark.parametrize(
    ("margin", "message"),
    [
        (0, "margin must be a share of what training gains, above 0 and at most 1"),
        (1.5, "margin must be a share of what training gains, above 0 and at most 1"),
        ("small", "margin must be a share of what training gains"),
        ({"heldout_loss": -1}, "margin: heldout_loss must be a number above 0, not -1"),
        ({"rouge1": "nan"}, "margin: rouge1 must be a number above 0 and below 1, the end of its scale, not 'nan'"),
        ({"rouge1": 1}, "margin: rouge1 must be a number above 0 and below 1, the end of its scale, not 1"),  # a percentage
        ({"sacrebleu": 100}, "margin: sacrebleu must be a number above 0 and below 100, the end of its scale, not 100"),
        (True, "margin must be a share of what training gains"),
        ({"rogue1": 0.1}, "rouge1"),
    ],
)
def test_an_impossible_margin_is_refused(margin: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        grid_of({"mode": "lora"}, margin=margin)


@pytest.mark.parametrize("data", ["x_lr1e-4", "lr1e-4", "lr1e-4_"])
@pytest.mark.parametrize("several", [False, True])
def test_a_stage_changes_the_rate_in_a_row_s_name_and_not_the_data_set_s_name(data: str, several: bool) -> None:
    block = {"mode": "lora", "learning_rate": 1e-4, "dataset": data}
    (row,) = grid_of(block, datasets={data: "a.jsonl", **({"other": "b.jsonl"} if several else {})}).rows
    assert row.at(3e-3, 7, "confirm").name == f"lora_{data + '_' if several else ''}r4_lr3e-3_seed7"
