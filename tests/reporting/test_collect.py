import dataclasses
import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.experiments.steps import Step
from cora_cli.models.model_path import ModelPath
from cora_cli.reading import read_json, read_jsonl
from cora_cli.records import read_sealed, write_sealed
from cora_cli.reporting.collect import collect
from cora_cli.reporting.found import find_experiments
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.report_rows import read_plan
from cora_cli.rundir import EvaluationDirectory, RunDirectory
from cora_cli.training.heldout import HeldOutLoss, loss_change
from tests.evaluation.helpers import unsealed
from tests.reporting.helpers import (
    Made,
    make_grid,
    plan_entry,
    record_steps,
    write_evaluation,
    write_plan,
    write_run,
    write_scored,
)


@pytest.fixture
def grid(made_grid, tmp_path):
    return Path(shutil.copytree(made_grid, tmp_path / "grid"))


def first_run(grid, label="lora"):
    return next(RunDirectory(path) for path in sorted((grid / "runs").iterdir()) if path.name.startswith(f"tiny-{label}_"))


def reasons(grid):
    return [(entry.row.name, entry.part, entry.reason) for entry in collect(read_plan(grid)).missing]


def test_a_complete_grid_is_read_completely(made_grid):
    found = collect(read_plan(made_grid))
    assert not found.missing
    assert len(found.results) == 7
    lora = next(result for result in found.results if result.row.mode == "lora")
    assert set(lora.measures) == {LOSS, "rouge1", "rougeL", "sacrebleu"}
    assert (lora.trained, lora.adapter_bytes, lora.tokens_per_second, lora.peak_memory_bytes) == (2000, 700, 500.0, 1.5e9)
    recorded = read_json(EvaluationDirectory(lora.row.evaluation).metrics)["metrics"]["sacrebleu"]
    assert lora.measures["sacrebleu"].value == recorded["value"]


def test_a_base_model_has_the_loss_that_its_runs_had_before_their_first_step(made_grid):
    found = collect(read_plan(made_grid))
    base = next(result for result in found.results if result.row.mode == "base")
    other = next(result for result in found.results if result.row.mode == "lora")
    assert base.measures[LOSS].value == other.record["heldout"]["before"]["loss"]
    assert (base.trained, base.adapter_bytes) == (0, 0)


def without_evaluations(grid):
    plan = read_json(grid / "plan.json")
    writing.write_json(grid / "plan.json", plan | {"rows": [row | {"evaluation": None} for row in plan["rows"]]})
    return read_plan(grid)


def test_rows_that_generate_nothing_have_their_losses_and_lack_nothing(grid):
    found = collect(without_evaluations(grid))
    assert not found.missing
    assert len(found.results) == 7
    assert all(set(result.measures) == {LOSS} for result in found.results)


def test_a_base_model_that_no_run_has_measured_is_missing(grid):
    for path in (grid / "runs").iterdir():
        (path / "run.json").unlink()
    found = collect(without_evaluations(grid))
    assert not found.results
    assert "no measurements found" in [entry.reason for entry in found.missing if entry.row.mode == "base"]


def test_a_run_that_does_not_start_as_the_base_model_lends_it_no_loss(grid):
    for path in (grid / "runs").iterdir():
        record = unsealed(path / "run.json")
        writing.write_json(
            path / "run.json", record | {"plan": record["plan"] | {"a_init": "kaiming", "b_init": "orthonormal"}}
        )
    base = next(result for result in collect(read_plan(grid)).results if result.row.mode == "base")
    assert LOSS not in base.measures


def test_a_run_on_a_base_in_four_bits_lends_it_no_loss(grid):
    for path in (grid / "runs").iterdir():
        record = unsealed(path / "run.json")
        settings = record["fingerprint"]["settings"] | {"load_in_4bit": True}
        writing.write_json(path / "run.json", record | {"fingerprint": record["fingerprint"] | {"settings": settings}})
    base = next(result for result in collect(read_plan(grid)).results if result.row.mode == "base")
    assert LOSS not in base.measures


def test_a_run_counts_once_by_whichever_path_it_is_named_and_a_copy_of_it_is_refused(grid, tmp_path):
    one, other = sorted((grid / "runs").iterdir())[:2]
    (experiment,) = find_experiments([str(one), str(one / ".." / one.name), str(other)])
    assert [row.run for row in experiment.rows] == [one, other]
    copied = shutil.copytree(one, tmp_path / "copied")
    with pytest.raises(
        CoraError, match=rf"{one} and {copied} are the same training, .* would count as two seeds; report only one"
    ):
        find_experiments([str(one), str(other), str(copied)])


@pytest.mark.parametrize(("part", "name"), [("settings", "batch_size"), ("hardware", "device_reason")])
def test_a_record_without_what_the_tables_and_notes_read_is_refused_by_name(grid, part, name):
    path = first_run(grid).record
    record = read_json(path)
    del (record if part == "hardware" else record["fingerprint"])[part][name]
    writing.write_json(path, record)
    assert [reason for _, _, reason in reasons(grid) if reason.endswith(f"{part}.{name} is missing")]


def test_only_the_metrics_that_are_wanted_are_read(made_grid):
    found = collect(read_plan(made_grid), ("rougeL",))
    assert all(set(result.measures) <= {LOSS, "rougeL"} for result in found.results)


def test_a_base_model_that_a_grid_lists_once_a_seed_counts_once(tmp_path):
    rows = [Made("base", "base", seed, rank=None, rate=None) for seed in range(3)]
    assert len(collect(read_plan(make_grid(tmp_path, rows))).results) == 1


def test_a_run_with_a_file_that_this_user_may_not_read_is_missing_and_the_rest_is_reported(grid, monkeypatch):
    closed = min((grid / "runs").iterdir()) / "adapter"
    readable = Path.open

    def refuse(path, *how, **more):
        if path.parent == closed and path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return readable(path, *how, **more)

    monkeypatch.setattr(Path, "open", refuse)
    found = collect(read_plan(grid))
    assert [entry.part for entry in found.missing] == ["run"]
    assert found.missing[0].reason.endswith(".safetensors cannot be read: Permission denied")
    assert len(found.results) == 6


def test_what_is_not_finished_is_missing_with_its_reason_and_the_rest_is_reported(grid):
    runs = sorted((grid / "runs").iterdir())
    shutil.rmtree(runs[0])
    failed = unsealed(runs[1] / "run.json") | {"status": "failed", "error": "the disk is full"}
    writing.write_json(runs[1] / "run.json", failed)
    writing.write_json(runs[2] / "run.json", unsealed(runs[2] / "run.json") | {"status": "running"})
    shutil.rmtree(runs[3] / "evaluation")
    found = collect(read_plan(grid))
    assert {(entry.row.name, entry.part, entry.reason) for entry in found.missing} == {
        (runs[0].name, "run", "not started"),
        (runs[1].name, "run", "failed: the disk is full"),
        (runs[2].name, "run", "not finished (status running)"),
        (runs[3].name, "evaluation", "not evaluated yet"),
    }
    assert len(found.results) == 4
    assert LOSS in next(result for result in found.results if result.row.name == runs[3].name).measures


def test_a_run_of_a_grid_alone_is_reported_with_its_evaluation_where_another_one_was_begun(grid):
    run = first_run(grid)
    (run.root / "eval").mkdir()
    (run.root / "eval" / "generation.json").write_text("{}")
    [experiment] = find_experiments([str(run.root)])
    assert experiment.rows[0].evaluation == run.root / "evaluation"


def test_a_step_that_died_before_its_record_gives_the_last_line_of_its_log(grid):
    run = first_run(grid)
    shutil.rmtree(run.root)
    writing.write_text(grid / "logs" / f"train-{run.root.name}.log", "loading\ncora: error: no such model\n\n")
    writing.write_text(grid / "logs" / f"train-{run.root.name}1.log", "of another row\n")
    writing.write_text(grid / "logs" / f"laplace-laplace-{run.root.name}.log", "of an average of this row\n")
    ((_, _, reason),) = reasons(grid)
    assert reason.endswith(f"train-{run.root.name}.log: cora: error: no such model")


def cut(path):
    path.write_text(path.read_text()[:-30])


def edit_scores(path):
    lines = read_jsonl(path)
    lines[0]["rouge1"] += 0.25
    writing.write_jsonl(path, lines)


def edit_prediction(path):
    lines = read_jsonl(path)
    lines[0]["prediction"] = "better"
    writing.write_jsonl(path, lines)


def edit_loss(path):
    lines = read_jsonl(path)
    lines[0]["after"] -= 1
    writing.write_jsonl(path, lines)


def drop_metric(path):
    record = json.loads(path.read_text())
    del record["metrics"]["rouge1"]["ci95"]
    path.write_text(json.dumps(record))


def a_list(path):
    path.write_text("[]")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("run.json", cut),
        ("run.json", a_list),
        ("log.jsonl", cut),
        ("heldout.jsonl", edit_loss),
        ("heldout.jsonl", cut),
        ("adapter/adapter_model.safetensors", cut),
        ("adapter/adapter_model.safetensors", Path.unlink),
        ("evaluation/metrics.json", cut),
        ("evaluation/metrics.json", a_list),
        ("evaluation/metrics.json", drop_metric),
        ("evaluation/scores.jsonl", edit_scores),
        ("evaluation/scores.jsonl", Path.unlink),
        ("evaluation/predictions.jsonl", edit_prediction),
        ("evaluation/predictions.jsonl", Path.unlink),
    ],
)
def test_damage_is_one_sentence_that_names_the_place_and_spares_the_others(grid, file, damage):
    run = first_run(grid)
    damage(run.root / file)
    ((name, _, reason),) = reasons(grid)
    assert name == run.root.name
    assert str(run.root) in reason
    assert "\n" not in reason
    found = collect(read_plan(grid)).results
    assert len([result for result in found if result.row.name != name]) == 6


def test_a_log_that_was_edited_costs_the_curve_and_no_number(grid):
    run = first_run(grid)
    record = json.loads(run.record.read_text())
    write_sealed(run.record, {key: value for key, value in record.items() if key != "sha256"} | {"log_sha256": "0" * 64})
    found = collect(read_plan(grid))
    (missing,) = found.missing
    assert (missing.row.name, missing.part) == (run.root.name, "loss curve")
    assert "log.jsonl was changed after the training wrote it" in missing.reason
    assert next(result for result in found.results if result.row.name == run.root.name).log == []


def test_rows_that_were_measured_in_two_ways_are_refused(grid):
    path = first_run(grid).root / "evaluation" / "metrics.json"
    path.write_text(path.read_text().replace("smooth:exp", "smooth:floor"))
    with pytest.raises(CoraError, match=r"measured sacrebleu with different settings .* exclude it with --metrics"):
        collect(read_plan(grid))
    assert collect(read_plan(grid), ("rouge1",)).results


def test_rows_in_two_variants_of_the_metrics_are_refused(grid):
    path = first_run(grid).root / "evaluation" / "metrics.json"
    path.write_text(path.read_text().replace('"sacrebleu|', '"sacrebleu|variant:hf-evaluate|'))
    with pytest.raises(CoraError, match=r"measured sacrebleu with different settings .*variant:hf-evaluate"):
        collect(read_plan(grid))


def test_rows_of_a_group_that_answered_other_records_are_refused(tmp_path):
    grid = make_grid(tmp_path, [Made("lora", "lora")], prompts=10)
    make_grid(grid, [Made("fb", "fb")], prompts=12)
    write_plan(grid, [plan_entry(Made("lora", "lora")), plan_entry(Made("fb", "fb"))])
    with pytest.raises(CoraError, match=r"were evaluated on different records, .*; evaluate both on the same ones, or report"):
        collect(read_plan(grid))


def test_rows_that_have_equal_records_in_another_order_are_refused_as_such(tmp_path):
    lines = [{"prompt": f"p{n}", "reference": f"answer {n}", "prediction": "answer 1"} for n in range(4)]
    for name, found in (("a", lines), ("b", lines[::-1])):
        write_scored(tmp_path / name, found, {"format": 1, "name": name, "generation": {}})
    (experiment,) = find_experiments([str(tmp_path)])
    with pytest.raises(CoraError, match="have their records in another order, so"):
        collect(experiment)


def test_other_records_with_equal_references_are_not_said_to_be_in_another_order(tmp_path):
    for name, labels in (("a", ("yes", "no")), ("b", ("no", "yes"))):
        lines = [{"prompt": f"{name} {label}", "reference": label, "prediction": "yes"} for label in labels]
        write_scored(tmp_path / name, lines, {"format": 1, "name": name, "generation": {}})
    (experiment,) = find_experiments([str(tmp_path)])
    with pytest.raises(CoraError, match="were evaluated on different records"):
        collect(experiment)


def test_repeated_prompts_that_are_lists_of_messages_are_counted(tmp_path):
    talk = [{"role": "user", "content": "Name a river."}]
    lines = [{"prompt": talk, "reference": f"answer {n}", "prediction": "answer 1"} for n in range(4)]
    write_scored(tmp_path / "a", lines, {"format": 1, "name": "a", "generation": {}})
    (experiment,) = find_experiments([str(tmp_path)])
    (result,) = collect(experiment).results
    assert result.generation["repeated_prompts"] == 3


def test_losses_on_fewer_of_equal_records_are_refused_as_such(tmp_path):
    grid = make_grid(tmp_path, [Made("lora", "lora"), Made("fb", "fb")], prompts=6)
    for path in grid.rglob("run.json"):
        record = unsealed(path)
        if "-fb_" in str(path):
            run = RunDirectory(path.parent)
            lines = read_jsonl(run.heldout)[:9]
            writing.write_jsonl(run.heldout, lines)
            tokens = np.array([line["tokens"] for line in lines], dtype=float)
            before, after = (HeldOutLoss(np.array([line[when] for line in lines]), tokens) for when in ("before", "after"))
            record["heldout"] = {"before": before.summary(), "after": after.summary(), "change": loss_change(before, after)}
        writing.write_json(path, record | {"data": record["data"] | {"test_sha256": "0" * 64}})
    with pytest.raises(CoraError, match=r"loss on \d+ and 9 of equal records, as by another --eval-limit or --max-length, so"):
        collect(read_plan(grid))


def test_losses_on_other_tokens_of_equal_records_are_refused_as_such(tmp_path):
    grid = make_grid(tmp_path, [Made("lora", "lora"), Made("fb", "fb")], prompts=6)
    for path in grid.rglob("run.json"):
        record = read_json(path)
        writing.write_json(path, record | {"data": record["data"] | {"test_sha256": "0" * 64}})
    run = RunDirectory(next(path.parent for path in grid.rglob("run.json") if "-fb_" in str(path)))
    lines = [{**line, "tokens": line["tokens"] * 2} for line in read_jsonl(run.heldout)]
    writing.write_jsonl(run.heldout, lines)
    record = unsealed(run.record)
    tokens = np.array([line["tokens"] for line in lines], dtype=float)
    before, after = (HeldOutLoss(np.array([line[when] for line in lines]), tokens) for when in ("before", "after"))
    losses = {"before": before.summary(), "after": after.summary(), "change": loss_change(before, after)}
    writing.write_json(run.record, record | {"heldout": losses})
    with pytest.raises(CoraError, match="different tokens of equal records, as by another --template or --max-length, so"):
        collect(read_plan(grid))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format version 2, but this cora reads version 1"),
        ({"rows": None}, "rows must be a list, not null"),
        ({"rows": []}, "plans no rows"),
        ({"rows": [3]}, r"rows\[0\] must be a JSON object, not 3"),
        ({"title": 5}, "title must be text, not 5"),
    ],
)
def test_a_damaged_plan_is_refused_with_the_place(grid, change, message):
    plan = read_json(grid / "plan.json")
    writing.write_json(grid / "plan.json", plan | change)
    with pytest.raises(CoraError, match=message):
        read_plan(grid)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", "0", 'an integer, not "0"'),
        ("rank", 1.5, "an integer or null, not 1.5"),
        ("mode", None, "text, not null"),
        ("seed", True, "an integer, not true"),
    ],
)
def test_a_row_of_a_plan_with_a_wrong_type_is_refused_by_its_number(grid, key, value, words):
    plan = read_json(grid / "plan.json")
    plan["rows"][2][key] = value
    writing.write_json(grid / "plan.json", plan)
    with pytest.raises(CoraError, match=rf"rows\[2\].{key} must be {words}"):
        read_plan(grid)


def test_two_rows_of_one_name_are_refused(grid):
    plan = read_json(grid / "plan.json")
    writing.write_json(grid / "plan.json", plan | {"rows": [*plan["rows"], plan["rows"][0]]})
    with pytest.raises(CoraError, match="two rows are named tiny-base"):
        read_plan(grid)


def test_what_is_no_finished_directory_is_refused_with_what_it_is(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, what in (("none", "does not exist"), ("empty", "is empty"), ("file", "is a file"), (".", "holds no plan.json")):
        with pytest.raises(CoraError, match=what):
            find_experiments([str(tmp_path / name)])


@pytest.fixture
def recorded(tmp_path):
    rows = [Made("base", "base", rank=None, rate=None), Made("lora", "lora"), Made("fb", "fb", n_models=2)]
    root = make_grid(tmp_path / "grid", rows)
    record_steps(root)
    return root


def missing_of(root):
    return {entry.row.label: entry.reason for entry in collect(read_plan(root)).missing}


def test_rows_that_are_as_their_steps_left_them_are_all_reported(recorded, tmp_path):
    experiment = read_plan(recorded)
    assert experiment.conditions == ("The models are tiny.",)
    assert not missing_of(recorded)
    unchecked = read_plan(make_grid(tmp_path / "other", [Made("lora", "lora")]))
    assert "plan.json lists no steps" in unchecked.conditions[-1]


def test_runs_of_another_grid_in_the_same_directory_are_left_out_with_a_word(recorded):
    (other,) = (make_grid(recorded.parent / "other", [Made("tb", "tb")]) / "runs").iterdir()
    other.rename(recorded / "runs" / other.name)
    experiment = read_plan(recorded)
    assert other.name not in {row.name for row in experiment.rows}
    assert f"does not have runs/{other.name}, which this report leaves out" in experiment.conditions[-1]


def test_an_evaluation_in_a_run_that_the_plan_does_not_have_is_left_out_with_a_word(recorded):
    assert "leaves out" not in " ".join(read_plan(recorded).conditions)
    run = next((recorded / "runs").iterdir())
    shutil.copytree(run / "evaluation", run / "eval-elsewhere")
    shutil.copytree(run / "evaluation", run / "eval-there")
    said = f"does not have the evaluation runs/{run.name}/eval-elsewhere and 1 more, which this report leaves out; name it alone to report it."
    assert said in " ".join(read_plan(recorded).conditions)


def test_a_basis_of_an_earlier_plan_has_no_part_in_the_figure_of_the_bases(recorded):
    step = Step("basis-new", "basis", "bases/new.safetensors", {}, (), ())
    plan = read_json(recorded / "plan.json")
    writing.write_json(recorded / "plan.json", {**plan, "steps": [*plan["steps"], dataclasses.asdict(step)]})
    (recorded / "bases").mkdir()
    for name in ("old", "new"):
        (recorded / "bases" / f"{name}.safetensors").touch()
    assert [path.stem for path in read_plan(recorded).bases] == ["new"]


def test_evaluations_that_changed_places_are_noticed(recorded):
    lora, fb = (recorded / "runs" / made.name / "evaluation" for made in (Made("lora", "lora"), Made("fb", "fb", n_models=2)))
    lora.rename(recorded / "aside")
    fb.rename(lora)
    (recorded / "aside").rename(fb)
    missing = missing_of(recorded)
    assert missing.keys() == {"lora", "fb"}
    assert all("was changed or removed after it was written; run `cora ablate` again" in reason for reason in missing.values())


@pytest.mark.parametrize("file", ["run.json", "log.jsonl", "evaluation/metrics.json", "evaluation/scores.jsonl"])
def test_numbers_that_were_edited_so_that_they_still_agree_are_noticed(recorded, file):
    path = recorded / "runs" / Made("lora", "lora").name / file
    path.write_text(path.read_text() + " \n" if file.endswith(".json") else path.read_text().replace("0.", "0.0", 1))
    assert missing_of(recorded).keys() == {"lora"}


def test_a_run_of_other_settings_than_the_plans_is_not_shown_among_its_rows(recorded):
    plan = read_json(recorded / "plan.json")
    for step in plan["steps"]:
        step["facts"] |= {"max_steps": 7} if "lora" in step["name"] else {}
    writing.write_json(recorded / "plan.json", plan)
    assert missing_of(recorded) == {"lora": "created with other settings than the plan's (max_steps); run `cora ablate` again"}


def test_an_evaluation_of_a_run_that_was_made_again_is_not_shown(recorded):
    name = Made("lora", "lora").name
    path = recorded / "steps" / f"train-{name}.json"
    write_sealed(path, read_sealed(path) | {"result": "0" * 64})
    assert missing_of(recorded) == {"lora": "its inputs have changed since it ran; run `cora ablate` again"}


def test_an_evaluation_that_was_made_again_of_other_records_leaves_out_its_row_alone(recorded):
    made = Made("lora", "lora")
    write_evaluation(recorded / "runs" / made.name / "evaluation", made, np.random.default_rng(5), 4)
    missing = missing_of(recorded)
    assert missing.keys() == {"lora"}
    assert "was changed or removed after it was written; run `cora ablate` again" in missing["lora"]


def test_what_was_removed_after_it_was_written_is_said_to_be_instead_of_the_last_line_of_a_log_that_ended_well(recorded):
    lora, fb = (recorded / "runs" / made.name for made in (Made("lora", "lora"), Made("fb", "fb", n_models=2)))
    for run in (lora, fb):
        writing.write_text(
            recorded / "logs" / f"evaluate-{run.name}.log", "note: 4 of 4 answers cut at the limit of new tokens\n"
        )
    shutil.rmtree(lora)
    shutil.rmtree(fb / "evaluation")
    assert missing_of(recorded) == {
        "lora": f"{lora} was changed or removed after it was written; run `cora ablate` again",
        "fb": f"{fb / 'evaluation'} was changed or removed after it was written; run `cora ablate` again",
    }


def test_a_step_without_its_record_is_no_evidence(recorded):
    (recorded / "steps" / f"train-{Made('lora', 'lora').name}.json").unlink()
    assert "is missing or damaged; run `cora ablate` again" in missing_of(recorded)["lora"]


def test_a_plan_with_damaged_steps_is_refused(recorded):
    plan = read_json(recorded / "plan.json")
    del plan["steps"][0]["facts"]
    writing.write_json(recorded / "plan.json", plan)
    with pytest.raises(CoraError, match=r"steps\[0\].facts is missing"):
        read_plan(recorded)


def test_a_plan_carries_the_margin_and_one_from_before_margins_is_read_too(tmp_path):
    rows = [Made("lora", "lora")]
    assert read_plan(make_grid(tmp_path / "old", rows)).margin is None
    assert read_plan(make_grid(tmp_path / "new", rows, margin={LOSS: 0.01})).margin == {LOSS: 0.01}
    assert read_plan(make_grid(tmp_path / "share", rows, margin=0.2)).margin == 0.2


@pytest.mark.parametrize("of", ["another run", "the base model"])
def test_an_evaluation_of_other_weights_than_the_runs_is_missing(of: str, trained_grid, tmp_path):
    one, other, *_ = sorted(path for path in (trained_grid / "runs").iterdir() if "lora" in path.name)
    run = shutil.copytree(one, tmp_path / "run")
    (experiment,) = find_experiments([str(run)])
    assert "rougeL" in collect(experiment).results[0].measures
    shutil.rmtree(run / "evaluation")
    copied = other / "evaluation" if of == "another run" else next((trained_grid / "evaluations").iterdir())
    shutil.copytree(copied, run / "evaluation")
    found = collect(experiment)
    assert set(found.results[0].measures) == {LOSS}
    assert [missing.reason for missing in found.missing] == [
        f"{run / 'evaluation'} is an evaluation of other weights than {run / 'adapter'}; run `cora evaluate {run} --overwrite`"
    ]


@pytest.mark.parametrize(("evaluated", "measured"), [("its own", {LOSS, "rouge1", "rougeL", "sacrebleu"}), ("another", {LOSS})])
def test_an_evaluation_of_another_full_model_is_missing_without_reading_the_model(
    evaluated: str, measured: set[str], tiny_model: Path, tmp_path: Path
) -> None:
    run, made = RunDirectory(tmp_path / "run"), Made("full", "full", rank=None)
    write_run(run.root, made, np.random.default_rng(0))
    shutil.rmtree(run.adapter)
    shutil.copytree(tiny_model, run.model)
    files = run.result_files()
    sha256 = ModelPath(str(run.model), run.model, None).content_hash()
    (run.model / "model.safetensors").write_bytes(b"")  # `verify` reads it
    writing.write_json(run.record, {**unsealed(run.record), "result_files": files})
    write_evaluation(run.evaluation, made, np.random.default_rng(1), 12)
    metrics = EvaluationDirectory(run.evaluation).metrics
    record = read_json(metrics)
    record["generation"]["settings"]["model_sha256"] = sha256 if evaluated == "its own" else "cc" * 32
    writing.write_json(metrics, record)
    (experiment,) = find_experiments([str(run.root)])
    assert set(collect(experiment).results[0].measures) == measured


@pytest.mark.parametrize("change", ["seed", "run", "learning_rate"])
def test_a_plan_that_was_changed_after_it_was_written_is_refused(change: str, grid: Path) -> None:
    plan = read_json(grid / "plan.json")
    write_sealed(grid / "plan.json", plan)
    assert len(read_plan(grid).rows) == len(plan["rows"])
    assert read_sealed(grid / "plan.json") == plan
    written = read_json(grid / "plan.json")
    one, other = [row for row in written["rows"] if row["run"]][:2]
    one[change] = other[change] if change == "run" else 7
    writing.write_json(grid / "plan.json", written)
    with pytest.raises(CoraError, match=r"plan.json was changed after it was written; run `cora ablate` again"):
        read_plan(grid)


def test_a_plan_whose_sweep_has_losses_at_no_learning_rate_is_named(grid: Path) -> None:
    sweep = {"method": ["d"], "planned": [1e-3], "losses": {"high": {"2": 1.0}}, "dropped": {}, "chosen": None, "added": None}
    writing.write_json(grid / "plan.json", {**read_json(grid / "plan.json"), "sweeps": [sweep]})
    with pytest.raises(CoraError, match=r"plan.json is damaged: sweeps has losses at 'high', which is no learning rate"):
        read_plan(grid)


@pytest.mark.parametrize("version", ["1", True, 2])
def test_a_plan_of_another_format_is_refused_with_it(version: object, grid: Path) -> None:
    writing.write_json(grid / "plan.json", {**read_json(grid / "plan.json"), "format_version": version})
    with pytest.raises(CoraError, match=f"has format version {version!r}, but this cora reads version 1"):
        read_plan(grid)
