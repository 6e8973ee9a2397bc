import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cora_cli.basis.choices import BasisChoices
from cora_cli.cli.command import command
from cora_cli.cli.extract_basis import ExtractConfig
from cora_cli.device import select_hardware
from cora_cli.errors import CoraError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.experiments.estimate import estimate_steps, trained_parameters
from cora_cli.experiments.execute import done_steps
from cora_cli.experiments.inputs import data_key
from cora_cli.experiments.plan_record import plan_record
from cora_cli.experiments.plan_text import render_plan
from cora_cli.experiments.shapes import check_shapes
from cora_cli.experiments.steps import Plan, Step, StepFlags, make_plan
from cora_cli.experiments.trainings import GridMemory
from cora_cli.training.config import TrainConfig
from tests.counting import assert_linear
from tests.experiments.helpers import SHAPES, grid_of, inputs_of, plan_of

UNMEASURED = GridMemory({}, {}, (), 0, 0, 0, select_hardware("cpu", "fp32"))


def kinds(plan: Plan) -> list[str]:
    return [step.kind for step in plan.steps.values()]


def only(plan: Plan, kind: str) -> Step:
    (step,) = [step for step in plan.steps.values() if step.kind == kind]
    return step


def parsed(step: Step) -> Any:
    """The configuration that a step's arguments give on the real command line."""
    classes = {"train": TrainConfig, "extract-basis": ExtractConfig, "evaluate": EvaluateConfig}
    seen: list[Any] = []
    app = typer.Typer(rich_markup_mode=None)
    app.callback()(lambda: None)
    command(app, step.argv[0], classes[step.argv[0]], seen.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cora_cli.cli.inputs.check_inputs", lambda config: None)  # no step has run
        result = CliRunner().invoke(app, list(step.argv))
    assert result.exit_code == 0, result.stderr
    return seen[0]


def test_rows_share_fine_tunes_bases_and_the_evaluation_of_the_base_model() -> None:
    plan = plan_of(grid_of({"mode": "base"}, {"mode": ["fb", "tb"], "seed": [0, 1]}))
    assert sorted(kinds(plan)) == sorted(["model", "basis", *["train"] * 4, *["evaluate"] * 5])
    basis = only(plan, "basis")
    assert basis.needs == (only(plan, "model").name,)
    assert all(step.needs == (basis.name,) for step in plan.steps.values() if step.kind == "train")


def test_every_step_comes_after_its_dependencies() -> None:
    plan = plan_of(grid_of({"mode": ["fb", "tb"], "n_models": [0, 1, 2, 3]}, {"mode": "lora"}, {"mode": "base"}))
    order = list(plan.steps)
    assert all(order.index(need) < order.index(name) for name, step in plan.steps.items() for need in step.needs)


def test_a_basis_is_extracted_once_at_the_largest_rank_or_at_that_of_the_file() -> None:
    assert only(plan_of(grid_of({"mode": "fb", "rank": [4, 16, 8]})), "basis").facts["rank"] == 16
    fixed = {"train": {"max_steps": 1}, "basis": {"rank": 32}}
    assert only(plan_of(grid_of({"mode": "fb", "rank": [4, 16]}, defaults=fixed)), "basis").facts["rank"] == 32


@pytest.mark.parametrize(
    "row", [{"method": "pca"}, {"share": "projection"}, {"source_seed": 5}, {"n_models": 1}, {"n_models": 0}]
)
def test_rows_whose_bases_differ_share_none(row: dict[str, Any]) -> None:
    plan = plan_of(grid_of({"mode": "fb", "n_models": 2, "seed": 9}, {"mode": "fb", "label": "other", "n_models": 2, **row}))
    assert kinds(plan).count("basis") == 2


def test_the_control_without_models_takes_its_basis_from_the_base_model() -> None:
    step = only(plan_of(grid_of({"mode": "fb", "n_models": 0})), "basis")
    assert parsed(step).models == ("base",)
    assert step.needs == ()


def test_a_basis_of_differences_names_the_base_that_is_subtracted() -> None:
    step = only(plan_of(grid_of({"mode": "fb", "source": "delta", "sources": ["a"]})), "basis")
    assert (parsed(step).base, parsed(step).source) == ("base", "delta")


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ({"base": "x"}, {"model", "basis", "train", "evaluate"}),
        ({"org/a": "x"}, {"basis", "train", "evaluate"}),
        ({"tasks": "x"}, {"model", "basis", "train", "evaluate"}),
        ({"records": "x"}, {"train", "evaluate"}),
        ({}, set()),
    ],
)
def test_keys_depend_on_the_contents_of_inputs(change: dict[str, str], touched: set[str]) -> None:
    grid = grid_of({"mode": "fb"})
    before, after = ({step.kind: step.key for step in plan_of(grid, **hashes).steps.values()} for hashes in ({}, change))
    assert {kind for kind in before if before[kind] != after[kind]} == touched


def test_keys_depend_on_settings_but_not_on_paths_or_labels() -> None:
    def keys(out: str = "out", **row: Any) -> dict[str, str]:
        return {step.kind: step.key for step in plan_of(grid_of({"mode": "fb", **row}), Path(out)).steps.values()}

    assert keys() == keys("elsewhere") == keys(label="mine")
    assert keys()["train"] != keys(learning_rate=1e-2)["train"]
    assert keys()["basis"] == keys(learning_rate=1e-2)["basis"]


def test_the_arguments_of_every_step_give_its_settings_on_the_command_line() -> None:
    row = {
        "mode": "fb",
        "alpha": 6.5,
        "target_modules": ["q_proj"],
        "share": "projection",
        "rslora": True,
        "learning_rate": 1e-4,
    }
    plan = plan_of(grid_of({**row, "sources": ["a", "c"]}, {"mode": "base"}), Path("somewhere/out"))
    steps = {
        kind: [step for step in plan.steps.values() if step.kind == kind] for kind in ("model", "basis", "train", "evaluate")
    }
    model, basis, train = (parsed(steps[kind][0]) for kind in ("model", "basis", "train"))
    assert (model.mode, model.dataset, model.max_steps, model.resume) == ("lora", "tasks", 2, True)
    assert basis.models == ("org/a", f"somewhere/out/{steps['model'][0].output}")
    assert basis.choices() == BasisChoices(share="projection", rank=4, target_modules=("q_proj",))
    assert (train.alpha, train.rslora, train.learning_rate, train.target_modules) == (6.5, True, 1e-4, ("q_proj",))
    assert (train.basis, train.resume, train.device, train.dtype) == (basis.output, True, "cpu", "fp32")
    tuned, base = (parsed(step) for step in steps["evaluate"])
    assert tuned.runs == (train.output_dir,)
    assert (base.model, base.dataset, base.template) == ("base", "somewhere/out/records/data.jsonl", "auto")
    assert (tuned.limit, base.limit, tuned.metrics, base.metrics) == (3, 3, ("rouge",), ("rouge",))


def test_a_base_model_answers_the_held_out_records_with_the_template_of_the_runs() -> None:
    plan = plan_of(grid_of({"mode": "base"}, defaults={"train": {"template": "alpaca"}}))
    assert plan.records == {"records/data.jsonl": inputs_of().datasets["records"].test}
    assert parsed(only(plan, "evaluate")).template == "alpaca"


def test_a_row_needs_its_own_steps_and_no_others() -> None:
    plan = plan_of(grid_of({"mode": ["fb", "lora"]}))
    assert {plan.steps[name].kind for name in plan.needed_for(["lora_r4_lr3e-4_seed0"])} == {"train", "evaluate"}
    assert len(plan.needed_for(["cora-fb_r4_n3_lr3e-4_seed0"])) == 4


def test_the_record_describes_each_row_and_where_its_files_are() -> None:
    grid = grid_of({"mode": "fb", "sources": ["a", "c"]}, {"mode": "base"}, {"mode": "basis"})
    fb, base, basis = plan_record(plan_of(grid))["rows"]
    assert fb | {"basis": None} == {
        "name": "cora-fb_r4_n2_lr3e-4_seed0",
        "printed": None,
        "group": "data",
        "mode": "fb",
        "label": "fb",
        "rank": 4,
        "n_models": 2,
        "sources": ["org/a", "tasks"],
        "learning_rate": 3e-4,
        "seed": 0,
        "model": "base",
        "dataset": "records",
        "run": f"runs/{fb['name']}",
        "evaluation": f"runs/{fb['name']}/evaluation",
        "basis": None,
        "stage": None,
    }
    assert fb["basis"].startswith("bases/")
    assert (base["run"], base["basis"], base["rank"], base["learning_rate"]) == (None, None, None, None)
    assert base["evaluation"].startswith("evaluations/")
    assert (basis["run"], basis["evaluation"], basis["group"]) == (None, None, None)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"mode": "base"}, 0),
        ({"mode": "fb"}, 4 * 6 * 64),
        ({"mode": "tb"}, 4 * (6 * 64 + 2 * (64 + 32 + 32))),
        ({"mode": "lora", "rank": 2, "target_modules": ["q_proj"]}, 2 * 2 * (64 + 64)),
        ({"mode": "fb", "b_init": "zeros"}, 0),
        ({"mode": "fa-basis"}, 4 * 2 * (64 + 32 + 32)),
        ({"mode": "lora-xs"}, 4 * 4 * 6),
        ({"mode": "lora-mini", "outer_rank": 6}, 2 * 4 * 6 * 6),
        ({"mode": "full"}, 10**6),
    ],
)
def test_trained_parameters_are_counted_from_shapes(row: dict[str, Any], expected: int) -> None:
    assert trained_parameters(grid_of(row).rows[0], inputs_of().models["base"]) == expected
    assert trained_parameters(grid_of(row).rows[0], None) == (0 if row["mode"] == "base" else None)


def test_every_step_is_estimated_and_more_work_takes_longer() -> None:
    def estimates(steps: int) -> dict[str, float]:
        plan = plan_of(grid_of({"mode": "fb"}, defaults={"train": {"max_steps": steps, "rank": 4}}))
        found = estimate_steps(plan, inputs_of(), 1e9)
        assert found.keys() == plan.steps.keys()
        return {plan.steps[name].kind: estimate.seconds for name, estimate in found.items()}

    few, many = estimates(10), estimates(1000)
    assert many["train"] > 10 * few["train"]
    assert (many["basis"], many["evaluate"]) == (few["basis"], few["evaluate"])


def test_several_processes_share_epochs_and_prompts() -> None:
    def seconds(gpus: int) -> dict[str, float]:
        asked = {"train": {"gpus": gpus}, "evaluate": {"gpus": gpus}}
        plan = plan_of(grid_of({"mode": "lora"}, defaults={"train": {"epochs": 4.0, "rank": 4}}, resources=asked))
        return {plan.steps[name].kind: each.seconds for name, each in estimate_steps(plan, inputs_of(), 1e7).items()}

    alone, four = seconds(1), seconds(4)
    assert four["train"] < 0.6 * alone["train"]
    assert four["evaluate"] < 0.6 * alone["evaluate"]


def test_decompositions_before_training_and_records_to_select_by_are_estimated_too() -> None:
    def seconds(mode: str, **changes: Any) -> float:
        plan = plan_of(grid_of({"mode": mode}, defaults={"train": {"max_steps": 1, "rank": 4, **changes}}))
        inputs = inputs_of()
        inputs.datasets[data_key("records", plan.grid.train)] = inputs.datasets["records"]
        return estimate_steps(plan, inputs, 1e9)[only(plan, "train").name].seconds

    assert seconds("lora") == seconds("lora-fa") < seconds("pissa") == seconds("mica")
    assert seconds("lora", validation_size=9) > seconds("lora", validation_size=2)


def test_memory_is_estimated_with_4_bits_short_rows_and_a_divided_base() -> None:
    def size(gpus: int = 1, **train: Any) -> float:
        defaults = {"train": {"max_steps": 1, "rank": 1, "batch_size": 8, **train}}
        plan = plan_of(grid_of({"mode": "lora"}, defaults=defaults, resources={"train": {"gpus": gpus}}))
        return estimate_steps(plan, inputs_of(), 1e9)[only(plan, "train").name].bytes

    weights, biggest, largest = sum(out * inside for out, inside in SHAPES.values()), max(SHAPES.values()), size()
    assert largest - size(load_in_4bit=True) == pytest.approx((1.5 - 1 / 64) * weights - 2 * biggest[0] * biggest[1], rel=0.01)
    assert size(tokens_per_row=200) < 0.9999 * largest
    assert size(tokens_per_row=10**6) == largest
    assert size(gpus=8, shard="fsdp") < size(gpus=8)


def test_a_basis_of_the_input_side_is_decomposed_in_the_input_dimension() -> None:
    """Every weight here has 64 inputs, but two thirds of them only 32 outputs."""
    plan = plan_of(grid_of({"mode": ["fb", "fa-basis"]}))
    estimates = estimate_steps(plan, inputs_of(), 1e6)
    by_side = {step.facts["side"]: estimates[name] for name, step in plan.steps.items() if step.kind == "basis"}
    assert by_side["input"].seconds > by_side["output"].seconds
    assert by_side["input"].bytes > by_side["output"].bytes


def test_a_b_from_the_gradient_takes_the_time_of_its_decomposition() -> None:
    plan = plan_of(grid_of({"mode": "fb", "b_init": ["orthonormal", "gradient"]}))
    estimates = estimate_steps(plan, inputs_of(), 1e6)
    seconds = {name: one.seconds for name, one in estimates.items() if name.startswith("train-")}
    drawn, computed = (next(value for name, value in seconds.items() if start in name) for start in ("orthonormal", "gradient"))
    assert computed > drawn


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"mode": "fb", "b_init": "gradient", "rank": 33}, "rank 33 exceeds the 32 rows"),
        ({"mode": "fb", "rank": 33}, "rank 33 exceeds the 32 rows of model.layers.0.self_attn.k_proj"),
        ({"mode": "fb", "b_init": "orthonormal", "rank": 33}, "rank 33 exceeds the 32 rows"),
        ({"mode": "pissa", "rank": 33}, "rank 33 exceeds the 32 rows"),
        ({"mode": "lora-mini", "rank": 20}, "rank 40 exceeds the 32 rows"),
        ({"mode": "fa-basis", "rank": 65}, "rank 65 exceeds the 64 columns of model.layers.0.self_attn.k_proj"),
        (
            {"mode": "fb", "share": "global"},
            "share global needs weights with equal out-dimensions, but those of base are 32, 64",
        ),
        ({"mode": "lora", "target_modules": ["q_proj", "o_proj"]}, "base has no weight for target module o_proj"),
        ({"mode": "fb", "side": "input"}, "k_proj has the shape (32, 64); use side output"),
    ],
)
def test_settings_that_do_not_fit_the_shapes_are_refused_before_anything_runs(row: dict[str, Any], message: str) -> None:
    with pytest.raises(CoraError) as error:
        check_shapes(grid_of(row), inputs_of())
    assert message in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {"mode": "fa-basis", "rank": 64},
        {"mode": "fa-basis", "share": "layer", "merge": "gram"},
        {"mode": "lora", "rank": 33},
        {"mode": "lora-mini", "rank": 16},
    ],
)
def test_what_the_shapes_allow_is_not_refused(row: dict[str, Any]) -> None:
    check_shapes(grid_of(row), inputs_of())


def test_what_the_file_of_a_method_says_determines_the_run(tmp_path: Path) -> None:
    file = tmp_path / "method.json"
    keys = []
    for rank in (2, 3):
        file.write_text(f'{{"peft_type": "LOHA", "r": {rank}}}')
        keys.append(only(plan_of(grid_of({"mode": "peft", "peft_config": str(file)})), "train").key)
    assert keys[0] != keys[1]


def test_a_source_of_another_shape_is_refused_before_anything_runs() -> None:
    inputs = inputs_of()
    other = dataclasses.replace(inputs.models["org/a"], shapes=dict.fromkeys(SHAPES, (8, 8)))
    inputs.models["org/a"] = other
    with pytest.raises(CoraError, match="source model org/a has other weight shapes than base"):
        check_shapes(grid_of({"mode": "fb", "sources": ["a"]}), inputs)


def test_a_grid_that_generates_nothing_has_no_evaluations_and_its_base_row_no_step() -> None:
    plan = plan_of(grid_of({"mode": "base"}, {"mode": "lora"}, defaults={"train": {"max_steps": 1}, "evaluate": False}))
    assert kinds(plan) == ["train"]
    assert [(row["run"] is None, row["evaluation"]) for row in plan_record(plan)["rows"]] == [(True, None), (False, None)]
    shown = render_plan(
        plan, inputs_of(), dict.fromkeys(plan.steps, False), {}, [row.name for row in plan.grid.rows], "", UNMEASURED
    )
    assert "1 training run;" in shown
    assert "evaluations" not in shown


def test_a_plan_costs_in_proportion_to_its_rows(tmp_path: Path) -> None:
    def plan(rows: int) -> Callable[[], str]:
        def work() -> str:
            grid = grid_of({"mode": ["fb", "lora"], "seed": list(range(rows // 2))})
            inputs = inputs_of()
            check_shapes(grid, inputs)
            plan = make_plan(grid, tmp_path, inputs, StepFlags("cpu", "fp32"))
            plan_record(plan)
            estimates = estimate_steps(plan, inputs, 1e11)
            return render_plan(
                plan, inputs, done_steps(plan), estimates, [row.name for row in grid.rows], "a machine", UNMEASURED
            )

        return work

    assert_linear(plan)


def test_a_shape_is_looked_up_once_for_all_rows_with_the_same_target_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("cora_cli.experiments.inputs.is_target", lambda module, name: asked.append(name) or name in module)
    inputs = inputs_of()
    check_shapes(grid_of({"mode": "lora", "seed": list(range(20))}), inputs)
    once = len(asked)
    check_shapes(grid_of({"mode": "lora", "seed": list(range(40))}), inputs)
    assert (once > 0, len(asked)) == (True, once)


def test_draws_are_those_of_the_rows_that_learn_a_distribution() -> None:
    grid = grid_of({"mode": ["lora", "scalabl"]}, {"mode": "base"}, defaults={"train": {}, "evaluate": {"draws": 3}})
    steps = {step.name: parsed(step).draws for step in plan_of(grid).steps.values() if step.kind == "evaluate"}
    assert len(steps) == 3
    assert {name: draws for name, draws in steps.items() if draws is not None} == {
        next(name for name in steps if "scalabl" in name): 3
    }


def test_adapters_are_left_unmerged_where_there_are_any() -> None:
    grid = grid_of({"mode": ["lora", "full"]}, {"mode": "base"}, defaults={"train": {}, "evaluate": {"merge": False}})
    steps = {step.name: parsed(step).merge for step in plan_of(grid).steps.values() if step.kind == "evaluate"}
    assert [name for name, merge in steps.items() if not merge] == [next(name for name in steps if "lora" in name)]
    assert len(steps) == 3


@pytest.mark.parametrize("own", [False, True])
def test_every_step_of_a_model_with_code_of_its_own_may_run_it(own: bool) -> None:
    """Otherwise the flag changes nothing, so that trainings of before stay done."""
    grid = grid_of({"mode": "fb", "n_models": 3}, {"mode": "lora", "laplace": {}}, {"mode": "base"})
    inputs = inputs_of()
    inputs.models["base"] = dataclasses.replace(inputs.models["base"], has_own_code=own)
    trusted = make_plan(grid, Path("out"), inputs, StepFlags("cpu", "fp32", trust_remote_code=True))
    kinds = {step.kind for step in trusted.steps.values() if "--trust-remote-code" in step.argv}
    assert kinds == ({"model", "train", "laplace", "evaluate"} if own else set())
    assert own or trusted.steps == plan_of(grid).steps
    plain = make_plan(grid, Path("out"), inputs, StepFlags("cpu", "fp32"))
    same = {step.key for step in trusted.steps.values()} & {step.key for step in plain.steps.values()}
    assert not own or not same  # also of the evaluation of the base, which rests on no training
