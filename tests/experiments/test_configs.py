"""Every shipped grid file parses, can be planned, and has the settings of the paper."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cora_cli.errors import CoraError, UsageError
from cora_cli.experiments.estimate import trained_parameters
from cora_cli.experiments.grid import Grid, build_grid, load_grid
from cora_cli.experiments.inputs import Inputs, ModelFacts
from cora_cli.experiments.paper import paper_tables
from cora_cli.experiments.plan_record import plan_record
from cora_cli.experiments.preset import small
from cora_cli.experiments.shipped import find_grid, shipped_grids, write_copy
from cora_cli.experiments.steps import StepFlags, make_plan
from cora_cli.experiments.tasks import TASKS
from cora_cli.methods.registry import METHODS

# Modes whose count a rank sets alone.
RANKED = (
    *("lora", "fb", "tb", "rslora", "lora+", "dora", "lora-fa", "fa-basis", "mica", "pissa", "milora", "olora"),
    *("lora-xs", "lora-mini", "sharelora-a", "lora-sb", "miss", "hira", "qa-lora"),
)
PARTS = ("rank", "small", "four-bit")
CONFIGS = Path(__file__).parents[2] / "configs"
GRIDS = [path for path in sorted(CONFIGS.rglob("*.yaml")) if "grid" in yaml.safe_load(path.read_text())]
TABLES = ["table1", "table2", "table3", "table4", "table5", "table6"]


@pytest.fixture
def smollm2_shapes() -> ModelFacts:
    """The weights of SmolLM2-135M that adapters change."""
    kinds = {
        "self_attn.q": (576, 576),
        "self_attn.k": (192, 576),
        "self_attn.v": (192, 576),
        "self_attn.o": (576, 576),
        "mlp.down": (576, 1536),
    }
    shapes = {f"model.layers.{layer}.{kind}_proj": shape for layer in range(30) for kind, shape in kinds.items()}
    return ModelFacts("smollm2", None, shapes, 134_515_008, 28_311_552, heads=9)


def paper_grid(name: str, preset: str | None = None, model: str | None = None) -> Grid:
    return load_grid(CONFIGS / "paper" / f"{name}.yaml", preset, model)


def test_all_grids_were_found() -> None:
    assert {path.stem for path in GRIDS} == {*TABLES, "figure-variance", "quick", "honest", "baselines", "prediction", *PARTS}


def test_a_shipped_grid_is_found_by_its_name_and_a_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: path.resolve() for name, path in shipped_grids().items()} == {
        path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in GRIDS
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "honest").mkdir()  # such as an output directory
    (tmp_path / "quick").write_text("name: mine\n")
    assert find_grid("honest").resolve() == CONFIGS / "honest.yaml"
    assert find_grid("quick") == Path("quick")
    with pytest.raises(
        UsageError, match="there is no grid file honst, and no grid of that name comes with cora; it has baselines, honest"
    ):
        find_grid("honst")


@pytest.mark.parametrize("name", ["honest", "baselines"])
def test_a_copy_of_a_shipped_grid_has_the_same_rows(name: str, tmp_path: Path) -> None:
    write_copy(find_grid(name), tmp_path / "mine.yaml")
    assert load_grid(tmp_path / "mine.yaml") == load_grid(find_grid(name))
    with pytest.raises(CoraError, match="exists; choose another name"):
        write_copy(find_grid(name), tmp_path / "mine.yaml")


# The grid of prediction has more source models than the preset provides, and a small scale of its own.
@pytest.mark.parametrize(
    ("path", "preset"),
    [*((path, None) for path in GRIDS), *((path, "small") for path in GRIDS if path.stem != "prediction")],
    ids=lambda value: getattr(value, "stem", value),
)
def test_every_grid_parses_and_plans_without_models_or_data(path: Path, preset: str | None, tiny_multihead_model: Path) -> None:
    grid = load_grid(path, preset, str(tiny_multihead_model) if preset else None)
    plan = make_plan(grid, Path("out"), Inputs({}, {}, {}), StepFlags("auto", "auto"))
    assert [row["name"] for row in plan_record(plan)["rows"]] == [row.name for row in grid.rows]
    assert all(row.dataset or row.mode == "basis" for row in grid.rows)
    assert grid.conditions


@pytest.mark.parametrize("preset", [None, "small"])
def test_grids_with_the_papers_numbers_use_the_metrics_of_evaluate_and_say_so(
    preset: str | None, tiny_multihead_model: Path
) -> None:
    for path in GRIDS:
        if preset and path.stem == "prediction":
            continue
        grid = load_grid(path, preset, str(tiny_multihead_model) if preset else None)
        printed = any(row.printed for row in grid.rows)
        if grid.evaluate is not None and path.parent.name != "paper":
            assert not printed
            assert "metric_variant" not in grid.evaluate, path
        if printed:
            assert grid.evaluate is not None
            assert grid.evaluate["metric_variant"] == "hf-evaluate"
            said = " ".join(grid.conditions)
            for part in (
                "variant hf-evaluate",
                "0.429 at r = 8 (table 3)",
                "0.401 at r = 48",
                "keeps 13.1 %",
                "chance is 8.3 %",
            ):
                assert part in said


def test_the_numbers_that_contradict_each_other_are_the_papers() -> None:
    tables = {name: table["rows"] for name, table in paper_tables().items()}
    assert tables["rank"]["CoRA_yahma_FB_8"]["rouge1"] == 0.429
    assert tables["main"]["CoRA_yahma_FB_5"]["rouge1"] == tables["number_of_models"]["CoRA_yahma_FB_5"]["rouge1"] == 0.401
    code = tables["main"]["code_FineTuning"]
    assert [code[name] for name in ("rouge1", "rouge2", "rougeL")] == [0.463, 0.355, 0.456]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert code[name] == max(row[name] for rows in tables.values() for row in rows.values() if name in row)
    assert code["bertscore_f1"] == min(row["bertscore_f1"] for row in tables["main"].values()) == 0.885


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("preset", [None, "small"])
def test_a_table_has_every_printed_row_once_and_the_base_model(
    name: str, preset: str | None, tiny_multihead_model: Path
) -> None:
    grid = paper_grid(name, preset, str(tiny_multihead_model) if preset else None)
    assert grid.paper_table is not None
    printed = [row.printed for row in grid.rows if row.printed]
    assert sorted(printed) == sorted(paper_tables()[grid.paper_table]["rows"])
    added = {row.mode for row in grid.rows if not row.printed}
    assert added == ({"base", "lora"} if grid.judge else {"base"})


@pytest.mark.parametrize("name", TABLES)
def test_a_printed_row_has_the_settings_in_its_name(name: str) -> None:
    for row in paper_grid(name).rows:
        if row.printed:
            words = row.printed.replace("yhama", "yahma").replace("FBL", "FB").split("_")
            assert row.dataset in words
            mode = {"FineTuning": "full", "LoRA": "lora", "FB": "fb", "TB": "tb"}
            assert row.mode == next((mode[word] for word in words[::-1] if word in mode), "fb")
            if name == "table1":
                assert words[-1] == str(row.n_models)
            elif name == "table4":
                start = {"0": "zeros", "1": "ones", "ran": "random"}[words[-1]]
                assert (row.rank, (row.train or {})["b_init"]) == (48, start)
            elif words[-1].isdigit() and (name == "table3" or row.mode == "lora"):
                assert words[-1] == str(row.rank)
            elif row.mode in ("fb", "tb"):
                assert (row.rank, row.n_models) == (48, 5)


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_follow_the_text_of_the_paper(name: str) -> None:
    grid = paper_grid(name)
    assert grid.model == "meta-llama/Llama-2-13b-hf"
    assert len(grid.models) == 5
    for row in grid.rows:
        if row.basis is not None:
            assert (row.basis["share"], row.basis["merge"]) == ("global", "mean")
        if row.mode in ("lora", "fb", "tb"):
            assert (row.train or {})["a_init"] == "gaussian"


def test_the_honest_grid_sweeps_every_mode_and_has_every_control() -> None:
    grid = load_grid(CONFIGS / "honest.yaml")
    swept: dict[str, set[float | None]] = {}
    for row in grid.rows:
        swept.setdefault(row.label, set()).add(row.learning_rate)
    assert swept.keys() == {"base", "lora", "fb", "tb", "fb orthonormal", "tb orthonormal", "fb n=0", "lora r=31", "full"}
    swept.pop("base")
    assert all(len(rates) == 3 for rates in swept.values())
    assert grid.sweep is not None
    assert grid.confirm is not None
    assert len(grid.confirm.seeds) == 5
    assert grid.train["validation_size"] >= 48


def test_a_grid_with_stages_keeps_them_at_the_small_scale() -> None:
    small = load_grid(CONFIGS / "honest.yaml", "small")
    assert small.sweep is not None
    assert small.sweep.rungs is None, "the rungs of the complete scale may lie beyond the steps of the small one"
    assert small.confirm == load_grid(CONFIGS / "honest.yaml").confirm


def baselines(part: str | None = None) -> Grid:
    return load_grid(CONFIGS / "baselines" / f"{part}.yaml" if part else CONFIGS / "baselines.yaml")


def counts_of(grid: Grid, shapes: ModelFacts) -> dict[tuple[str, int | None], int | None]:
    return {(row.label, row.rank): trained_parameters(row, shapes) for row in grid.rows if row.mode != "base"}


def test_the_grid_of_baselines_has_equal_trained_parameters(smollm2_shapes: ModelFacts) -> None:
    grid = baselines()
    counts = counts_of(grid, smollm2_shapes)
    alike = {key: count for key, count in counts.items() if count and count == pytest.approx(counts["fb", 48], rel=0.02)}
    assert {label for label, _ in counts.keys() - alike.keys()} == {"mean-delta", "eva", "cola", "increlora", "ensemble lora"}
    said = " ".join(grid.conditions)
    assert all(f"{count:,}" in said for count in alike.values())


def test_the_grids_of_baselines_have_every_method() -> None:
    modes = {row.mode for part in (None, "small") for row in baselines(part).rows}
    assert modes == {"base", *METHODS} - {"full", "peft"}


def test_rows_that_start_from_models_train_after_these_and_name_them() -> None:
    grid = baselines()
    plan = make_plan(grid, Path("out"), Inputs({}, {}, {}), StepFlags("auto", "auto"))
    row = next(row for row in grid.rows if row.label == "lora mean-delta")
    assert row.name.startswith("lora-mean-delta_r31_n5_lr")
    step = plan.of_kind(row.name, "train")
    assert step is not None
    models = step.argv[step.argv.index("--start-models") + 1].split(",")
    assert len(models) == len(step.needs) == len(step.facts["start_models"]) == 5
    assert all(plan.steps[need].kind == "model" for need in step.needs)
    assert plan.of_kind(row.name, "basis") is None
    both = next(row for row in grid.rows if row.label == "fb mean-delta")
    assert len(plan.steps[f"train-{both.name}"].needs) == 6


def test_the_parts_at_equal_rank_and_at_small_budgets_are_that(smollm2_shapes: ModelFacts) -> None:
    rank, small_budgets = baselines("rank"), baselines("small")
    assert {row.rank for row in rank.rows if row.mode != "base"} == {31}
    for grid in (rank, small_budgets):
        said = " ".join(grid.conditions)
        assert all(f"{count:,}" in said for count in counts_of(grid, smollm2_shapes).values() if count is not None)
    assert all((count or 0) <= 104_000 for count in counts_of(small_budgets, smollm2_shapes).values())


def test_every_method_of_a_small_budget_has_a_lora_of_its_size(smollm2_shapes: ModelFacts) -> None:
    counts = {row.label: (row.mode, trained_parameters(row, smollm2_shapes)) for row in baselines("small").rows if row.train}
    loras = [count for mode, count in counts.values() if mode == "lora"]
    for label, (_, count) in counts.items():
        assert count is not None
        assert any(abs(lora - count) <= 0.05 * count for lora in loras if lora is not None), label


def test_the_grid_in_four_bits_compares_them_with_lora_on_the_base_model_in_bf16() -> None:
    rows = baselines("four-bit").rows
    four_bit = [row for row in rows if (row.train or {}).get("load_in_4bit")]
    assert {(row.mode, row.rank) for row in four_bit} == {("lora", 31), ("fb", 48)}
    assert {(row.mode, row.rank) for row in rows if row not in four_bit} == {("base", None), ("lora", 31)}
    assert {row.label for row in four_bit}.isdisjoint(row.label for row in rows if row not in four_bit)


@pytest.mark.parametrize("part", [None, *PARTS])
def test_every_baseline_is_swept_and_confirmed_like_lora(part: str | None) -> None:
    grid = baselines(part)
    methods: dict[tuple[str, int | None], int] = {}
    for row in grid.rows:
        if row.mode != "base":
            methods[row.label, row.rank] = methods.get((row.label, row.rank), 0) + 1
    assert set(methods.values()) == {3}
    assert {"lora", "fb", "fb orthonormal"} <= {label.partition(" load")[0] for label, _ in methods}
    assert grid.sweep is not None
    assert grid.confirm is not None
    assert len(grid.confirm.seeds) == 3


def test_the_grid_of_prediction_has_thirteen_bases_alike_in_every_stratum_one_of_them_planted() -> None:
    grid = load_grid(CONFIGS / "prediction.yaml")
    strata: dict[tuple[object, object], list[object]] = {}
    for row in grid.rows:
        if row.train is not None:
            assert row.rank == 16
            name = (row.label.removeprefix(row.mode), row.n_models, row.learning_rate)
            strata.setdefault((row.dataset, row.mode), []).append(name)
    assert strata.keys() == {(data, mode) for data in ("code", "instruct", "sql") for mode in ("fb", "tb")}
    first, *others = strata.values()
    assert all(other == first for other in others)
    assert len(set(first)) == len(first) == 13 * 2, "thirteen bases, two rates each"
    assert {row.n_models for row in grid.rows if row.basis} == {0, 1, 2, 3, 4, 5}
    learned = {name: settings["dataset"] for name, settings in grid.models.items() if isinstance(settings, dict)}
    targets = set(grid.datasets.values())
    planted = [row.sources for row in grid.rows if any(learned[name] in targets for name in row.sources)]
    assert len(planted) == 2 * len(strata)
    assert {frozenset(learned[name] for name in sources) for sources in planted} == {frozenset(targets)}


@pytest.mark.parametrize("mode", RANKED)
def test_no_other_rank_is_closer_to_the_trained_parameters_of_fb(mode: str, smollm2_shapes: ModelFacts) -> None:
    grid = baselines()
    row = next(row for row in grid.rows if row.mode == mode)
    wanted = trained_parameters(next(row for row in grid.rows if row.mode == "fb"), smollm2_shapes) or 0
    off = [
        abs(
            (trained_parameters(dataclasses.replace(row, train={**(row.train or {}), "rank": rank}), smollm2_shapes) or 0)
            - wanted
        )
        for rank in ((row.rank or 0) + step for step in (-1, 0, 1))
    ]
    assert off[1] == min(off)


def test_the_small_preset_replaces_the_scale_and_keeps_the_method(tiny_model: Path) -> None:
    paper, small = paper_grid("table1"), paper_grid("table1", "small", str(tiny_model))
    assert small.preset == "small"
    assert small.model == str(tiny_model)
    assert list(small.models) == list(TASKS)
    assert small.datasets == {"yahma": "builtin:instruct", "code": "builtin:code"}
    for row, smaller in zip(paper.rows, small.rows, strict=True):
        assert (row.mode, row.n_models, row.dataset, row.seed, row.printed) == (
            *(smaller.mode, smaller.n_models, smaller.dataset, smaller.seed, smaller.printed),
        )
        if smaller.train:
            assert (smaller.train["a_init"], smaller.train["max_steps"]) == ("gaussian", 12)
            assert "epochs" not in smaller.train
    assert "bertscore_model" not in small.evaluate


def test_the_small_preset_reports_where_grouped_queries_prevent_the_paper_s_setting(
    tiny_model: Path, tiny_multihead_model: Path
) -> None:
    grouped, plain = (paper_grid("table1", "small", str(model)) for model in (tiny_model, tiny_multihead_model))
    shares = [{(row.basis or {}).get("share") for row in grid.rows if row.basis} for grid in (grouped, plain)]
    assert shares == [{"projection"}, {"global"}]
    said = ["grouped queries" in " ".join(grid.conditions) for grid in (grouped, plain)]
    assert said == [True, False]


def test_the_small_preset_limits_ranks_to_the_model_and_reports_it(tiny_model: Path) -> None:
    grid = paper_grid("figure-variance", "small", str(tiny_model))
    assert [row.basis_rank for row in grid.rows] == [31, 31]
    assert "The basis has rank 31 instead of 4096: this model's narrowest weight allows no more." in grid.conditions


def test_the_small_preset_gives_full_fine_tuning_its_own_learning_rate(tiny_model: Path) -> None:
    rates = {row.mode: row.learning_rate for row in paper_grid("table2", "small", str(tiny_model)).rows}
    assert rates == {"base": None, "full": 5e-5, "lora": 1e-3, "fb": 1e-3, "tb": 1e-3}


@pytest.mark.parametrize("where", ["defaults", "row"])
def test_the_small_preset_sweeps_proposed_learning_rates_as_the_grid_does(where: str, tiny_model: Path) -> None:
    rate = {"learning_rate": "auto"}
    defaults, block = (rate, {}) if where == "defaults" else ({}, rate)
    values = {
        **{"name": "auto", "model": "m", "datasets": {"d": "data"}, "defaults": {"train": {**defaults, "validation_size": 8}}},
        **{"sweep": {"seeds": [9]}, "confirm": {"seeds": [0, 1, 2]}, "grid": [{"mode": "lora", **block}]},
    }
    adapted = build_grid(small(values, str(tiny_model), has_bases=False), "auto.yaml", "small")
    assert [row.is_auto for row in adapted.rows] == [True]


def test_the_small_preset_names_the_settings_that_it_leaves_out(tiny_model: Path) -> None:
    values = {
        **{"name": "left", "model": "m", "datasets": {"d": "data"}},
        "defaults": {
            "train": {"rank": 4, "epochs": 3, "weight_decay": 0.1, "tokens_per_row": 512},
            "evaluate": {"temperature": 0.7, "limit": 5, "metrics": ["rouge"]},
        },
        "grid": [{"mode": "lora", "max_length": 64}],
    }
    said = [sentence for sentence in small(values, str(tiny_model), False)["conditions"] if "defaults:" in sentence]
    assert said == [
        "These settings of the grid do not apply at this scale, and have their defaults: train: max_length, weight_decay; evaluate: temperature."
    ]


def test_the_small_preset_generates_nothing_where_the_grid_does_not(tiny_model: Path) -> None:
    values = {"name": "losses", "model": "m", "datasets": {"d": "data"}, "grid": [{"mode": "lora"}]}
    adapted = small({**values, "defaults": {"evaluate": False}}, str(tiny_model), has_bases=False)
    assert adapted["defaults"]["evaluate"] is False
    assert "answers" not in " ".join(adapted["conditions"])
    assert "answers 40 prompts" in " ".join(small(values, str(tiny_model), has_bases=False)["conditions"])


def test_the_small_preset_trains_no_models_for_a_table_without_bases(tiny_model: Path) -> None:
    grid = paper_grid("table4", "small", str(tiny_model))
    assert grid.models == {}
    assert not any("source models are fine-tunes" in sentence or "per projection" in sentence for sentence in grid.conditions)


def documented(number: int) -> dict[str, Any]:
    """A block of YAML from docs/grids.md."""
    text = (CONFIGS.parent / "docs" / "grids.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("```yaml\n")[1:][number].partition("```")[0])


def test_the_grid_file_in_the_documents_is_valid() -> None:
    names = [row.name for row in build_grid(documented(0), "grids.md").rows]
    assert len(names) == 1 + 9 + 18 + 1 + 2
    assert "cora-fb_r48_n3_lr1e-3_seed0" in names


def test_what_the_documents_add_to_a_grid_file_is_valid() -> None:
    whole = documented(0)
    sharded, staged, judged, averaged, stages = (documented(number) for number in range(1, 6))
    plain = {**whole, "grid": [{"mode": "base"}, {"mode": "lora", "learning_rate": [1.0e-4, 3.0e-4, 1.0e-3]}]}
    defaults = {"train": {"max_steps": 200, "validation_size": 200}}
    assert build_grid({**plain, **sharded}, "grids.md").rows[1].training.shard == "fsdp"
    assert build_grid({**plain, "defaults": defaults, **staged}, "grids.md").confirm is not None
    assert build_grid({**plain, **judged}, "grids.md").judge is not None
    assert [row.shown_mode for row in build_grid({**plain, **averaged}, "grids.md").rows[::3]] == [
        "lora",
        "ensemble lora",
        "laplace lora",
    ]
    assert build_grid({**plain, **stages}, "grids.md").sweep is not None


def test_a_divided_model_needs_a_grid_with_several_processes() -> None:
    values = {"name": "g", "model": "m", "datasets": {"d": "data"}, "grid": [{"mode": "lora", "shard": "fsdp"}]}
    with pytest.raises(UsageError, match="lora: shard fsdp needs several processes; set nodes or gpus in resources: train"):
        build_grid(values, "g.yaml")
    spread = {**values, "resources": {"train": {"gpus": 2}}}
    assert build_grid(spread, "g.yaml").rows[0].training.shard == "fsdp"
    with pytest.raises(
        UsageError, match="models: a: shard fsdp needs several processes; set nodes or gpus in resources: model"
    ):
        build_grid({**spread, "models": {"a": {"dataset": "data", "shard": "fsdp"}}}, "g.yaml")


@pytest.mark.parametrize("nested", [True, False])
def test_the_small_preset_reads_the_width_of_nested_configurations_and_of_other_families(nested: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4} if nested else {"n_embd": 64, "n_head": 4}
    config = {"model_type": "gemma3", "text_config": sizes} if nested else {"model_type": "gpt2", **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    grid = paper_grid("figure-variance", "small", str(tmp_path))
    assert [row.basis_rank for row in grid.rows] == [63, 63]
