"""Which runs outside a grid are seeds of one method, and how methods are told apart."""

import shutil

import pytest

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.inspection.prediction import used_bases
from cora_cli.reading import read_json
from cora_cli.records import write_sealed
from cora_cli.reporting.collect import collect
from cora_cli.reporting.found import find_experiments
from cora_cli.reporting.summary import summarise
from tests.evaluation.helpers import unsealed


def test_plain_runs_and_evaluations_make_one_experiment(trained_grid):
    runs = sorted((trained_grid / "runs").iterdir())
    (experiment,) = find_experiments([*map(str, runs), str(trained_grid / "evaluations" / "base")])
    assert {row.label for row in experiment.rows} == {"base", "lora", "fb", "fb orthonormal"}
    assert len({row.group for row in experiment.rows}) == 1
    found = collect(experiment)
    assert not found.missing
    assert len(found.results) == 7


def test_unlike_plain_runs_of_one_mode_get_unlike_labels(trained_grid, tmp_path):
    run = next(path for path in sorted((trained_grid / "runs").iterdir()) if "lora" in path.name)
    other = shutil.copytree(run, tmp_path / "longer")
    record = unsealed(other / "run.json")
    record["fingerprint"]["settings"]["max_steps"] = 9
    writing.write_json(other / "run.json", record)
    (experiment,) = find_experiments([str(run), str(other)])
    assert [row.label for row in experiment.rows] == ["lora max_steps=4", "lora max_steps=9"]


@pytest.mark.parametrize(
    ("place", "values", "labels"),
    [
        (("plan", "alpha"), (8.0, 16.0), ["lora alpha=8", "lora alpha=16"]),
        (("hardware", "processes"), (1, 2), ["lora processes=1", "lora processes=2"]),
        (("fingerprint", "start_models_sha256"), (["one"], ["other"]), None),
        (("fingerprint", "peft"), ({"r": 2}, {"r": 4}), None),
    ],
)
def test_plain_runs_that_differ_in_more_than_the_seed_are_no_seeds_of_one_method(place, values, labels, trained_grid, tmp_path):
    runs = [path for path in sorted((trained_grid / "runs").iterdir()) if "lora" in path.name]
    made = []
    for run, value in zip(runs, values, strict=True):
        made.append(shutil.copytree(run, tmp_path / run.name))
        record = unsealed(made[-1] / "run.json")
        record[place[0]][place[1]] = value
        writing.write_json(made[-1] / "run.json", record)
    (experiment,) = find_experiments([str(run) for run in made])
    found = [row.label for row in experiment.rows]
    assert found[0] != found[1]
    assert labels in (None, found)


def test_runs_with_unlike_settings_are_of_unlike_strata_where_losses_are_correlated_with_captures(trained_grid, tmp_path):
    one, again = (
        shutil.copytree(path, tmp_path / path.name) for path in sorted((trained_grid / "runs").iterdir()) if "fb_" in path.name
    )
    alike = used_bases([str(one), str(again)])
    assert [(len(used.losses), used.learning_rate, used.rates) for used in alike] == [(2, 0.03, (0.03,))]
    record = unsealed(again / "run.json")
    record["fingerprint"]["settings"]["max_steps"] = 9
    writing.write_json(again / "run.json", record)
    found = used_bases([str(one), str(again)])
    assert [(used.stratum, len(used.losses)) for used in found] == [
        (f"{alike[0].stratum}, max_steps=4", 1),
        (f"{alike[0].stratum}, max_steps=9", 1),
    ]


@pytest.mark.parametrize("key", ["model_sha256", "data_sha256"])
def test_grids_of_other_models_or_data_under_one_name_are_of_unlike_strata_where_losses_are_correlated_with_captures(
    key, trained_grid, tmp_path
):
    copy = shutil.copytree(trained_grid, tmp_path / "copy")
    (alike,) = {used.stratum for used in used_bases([str(trained_grid)])}
    assert [(used.stratum, len(used.losses)) for used in used_bases([str(trained_grid), str(copy)])] == [(alike, 2)] * 2
    for run in (copy / "runs").iterdir():
        record = unsealed(run / "run.json")
        record["fingerprint"][key] = "other" + record["fingerprint"][key][5:]
        writing.write_json(run / "run.json", record)
    found = used_bases([str(trained_grid), str(copy)])
    assert [(used.stratum.startswith(alike), len(used.losses)) for used in found] == [(True, 2)] * 4
    assert len({used.stratum for used in found}) == 2


def test_learning_rates_under_labels_of_their_own_are_those_of_one_b_where_losses_are_correlated_with_captures(
    trained_grid, tmp_path
):
    copy = shutil.copytree(trained_grid, tmp_path / "copy")
    plan = read_json(copy / "plan.json")
    for row in plan["rows"]:
        row |= {"label": f"{row['label']} fast", "learning_rate": row["learning_rate"] and 0.5}
    write_sealed(copy / "plan.json", {key: value for key, value in plan.items() if key != "sha256"})
    found = used_bases([str(trained_grid), str(copy)])
    assert [(len(used.losses), used.learning_rate, used.rates) for used in found] == [(2, 0.03, (0.03, 0.5))] * 2


def test_a_rate_at_which_a_run_diverged_is_one_that_was_tried_where_losses_are_correlated_with_captures(trained_grid, tmp_path):
    run = next(path for path in sorted((trained_grid / "runs").iterdir()) if "fb_" in path.name)
    one, lost = (shutil.copytree(run, tmp_path / name) for name in ("one", "lost"))
    record = unsealed(lost / "run.json")
    record["fingerprint"]["settings"]["learning_rate"] = 0.5
    writing.write_json(lost / "run.json", {**record, "status": "failed", "error": "the loss is nan", "diverged": True})
    (used,) = used_bases([str(one), str(lost)])
    assert (used.learning_rate, used.rates) == (0.03, (0.03, 0.5))


def test_rates_of_another_b_are_neither_lost_nor_tried_for_this_one_where_losses_are_correlated_with_captures(
    trained_grid, tmp_path
):
    def at(rate, like, **changes):
        run = next(path for path in sorted((trained_grid / "runs").iterdir()) if like in path.name)
        copy = shutil.copytree(run, tmp_path / f"{like}{rate}")
        record = unsealed(copy / "run.json")
        record["fingerprint"]["settings"]["learning_rate"] = rate
        writing.write_json(copy / "run.json", {**record, **changes})
        return str(copy)

    diverged = {"status": "failed", "error": "the loss is nan", "diverged": True}
    runs = [
        at(0.03, "fb_"),
        at(0.5, "fb_"),
        at(0.03, "fb-orthonormal", **diverged),
        at(0.5, "fb-orthonormal"),
        at(0.7, "fb-orthonormal"),
    ]
    of_file, random = sorted(used_bases(runs), key=lambda used: used.basis is None)
    assert (of_file.learning_rate, of_file.rates) == (0.03, (0.03, 0.5))
    assert (random.learning_rate, random.rates) == (0.5, (0.03, 0.5, 0.7))


def test_a_scale_that_follows_the_rank_is_no_part_of_a_label(trained_grid, tmp_path):
    run = next(path for path in sorted((trained_grid / "runs").iterdir()) if "lora" in path.name)
    other = shutil.copytree(run, tmp_path / "other")
    record = unsealed(other / "run.json")
    record["plan"] |= {"rank": 8, "alpha": 16.0}
    writing.write_json(other / "run.json", record)
    (experiment,) = find_experiments([str(run), str(other)])
    assert [(row.label, row.rank) for row in experiment.rows] == [("lora", 4), ("lora", 8)]


@pytest.mark.parametrize("changed", ["model_sha256", "tokenizer_sha256", "data_sha256"])
def test_runs_on_a_model_or_data_that_changed_under_its_name_are_no_seeds_of_one_method(changed, trained_grid, tmp_path):
    one, again = (path for path in sorted((trained_grid / "runs").iterdir()) if "lora" in path.name)
    other = shutil.copytree(again, tmp_path / "other")
    record = unsealed(other / "run.json")
    writing.write_json(other / "run.json", record | {"fingerprint": record["fingerprint"] | {changed: "0123456789ab" * 5}})
    (experiment,) = find_experiments([str(one), str(other)])
    groups = [row.group for row in experiment.rows]
    assert groups[0] != groups[1]
    assert f", {changed.removesuffix('_sha256').replace('model', 'weights')} sha256 0123456789ab" in groups[1]
    (alike,) = find_experiments([str(one), str(again)])
    assert len({row.group for row in alike.rows}) == 1


def test_runs_that_divide_one_data_set_otherwise_stay_in_one_group(trained_grid, tmp_path):
    one, again = (path for path in sorted((trained_grid / "runs").iterdir()) if "lora" in path.name)
    other = shutil.copytree(again, tmp_path / "other")
    record = unsealed(other / "run.json")
    settings = record["fingerprint"]["settings"] | {"validation_size": 4}
    writing.write_json(
        other / "run.json", record | {"fingerprint": record["fingerprint"] | {"settings": settings, "data_sha256": "0" * 64}}
    )
    (experiment,) = find_experiments([str(one), str(other)])
    assert len({row.group for row in experiment.rows}) == 1
    assert [row.label for row in experiment.rows] == ["lora validation_size=None", "lora validation_size=4"]


def test_held_out_losses_on_other_records_of_the_same_lengths_are_not_compared(trained_grid, tmp_path):
    one, again = (path for path in sorted((trained_grid / "runs").iterdir()) if "lora" in path.name)
    other = shutil.copytree(again, tmp_path / "other", ignore=shutil.ignore_patterns("evaluation"))
    record = unsealed(other / "run.json")
    settings = record["fingerprint"]["settings"] | {"split_seed": 1}
    divided = {
        "fingerprint": record["fingerprint"] | {"settings": settings},
        "data": record["data"] | {"test_sha256": "0" * 64},
    }
    writing.write_json(other / "run.json", record | divided)
    (experiment,) = find_experiments([str(one), str(other)])
    with pytest.raises(CoraError, match="measured their held-out loss on different records"):
        collect(experiment)


@pytest.mark.parametrize(
    ("mode", "b_init", "label"),
    [("mica", "minor", "mica"), ("dora", "zeros", "dora"), ("lora-mini", "basis", "lora-mini basis"), ("tb", "basis", "tb")],
)
def test_the_label_of_a_plain_run_names_its_start_only_where_it_is_not_the_modes_own(
    mode, b_init, label, trained_grid, tmp_path
):
    run = shutil.copytree(next(iter(sorted((trained_grid / "runs").iterdir()))), tmp_path / "run")
    record = unsealed(run / "run.json")
    changed = {"mode": mode, "plan": record["plan"] | {"mode": mode, "b_init": b_init}}
    writing.write_json(run / "run.json", record | changed)
    (experiment,) = find_experiments([str(run)])
    assert [row.label for row in experiment.rows] == [label]


def test_plain_runs_on_two_bases_of_as_many_models_are_two_methods(trained_grid, tmp_path):
    run = next(path for path in sorted((trained_grid / "runs").iterdir()) if "fb_" in path.name)
    other, again = (shutil.copytree(run, tmp_path / name) for name in ("other", "again"))
    changed = unsealed(other / "run.json")
    changed["basis"] |= {"path": "other.safetensors", "sha256": "0" * 64}
    writing.write_json(other / "run.json", changed)
    writing.write_json(
        again / "run.json",
        changed | {"basis": {**changed["basis"], "path": "copy.safetensors"}, "seeds": {"seed": 9, "split_seed": 0}},
    )
    (experiment,) = find_experiments([str(run), str(other), str(again)])
    labels = [row.label for row in experiment.rows]
    assert labels[0] != labels[1] == labels[2]
    (alone,) = find_experiments([str(other), str(again)])
    assert {row.label for row in alone.rows} == {"fb"}


@pytest.mark.parametrize(
    ("source", "of_base", "n_models"), [(None, False, 0), ("org/fine-tuned", False, 1), ("org/a-copy", True, 0)]
)
def test_a_basis_of_the_base_model_alone_is_of_no_models_and_not_informed(source, of_base, n_models, trained_grid, tmp_path):
    runs = [shutil.copytree(path, tmp_path / path.name) for path in sorted((trained_grid / "runs").iterdir())]
    for run in runs:
        record = unsealed(run / "run.json")
        if record["basis"]:
            record["basis"]["of_base"] = of_base
            sources = record["basis"]["sources"]
            sources[0]["reference"] = source or record["model"]["reference"]
            sources += [{**sources[0], "reference": f"{source}-copied"}] if source else []
        writing.write_json(run / "run.json", record)
    (experiment,) = find_experiments(list(map(str, runs)))
    assert {row.n_models for row in experiment.rows if row.label == "fb"} == {n_models}
    headline = summarise(collect(experiment)).groups[0].verdict.headline
    assert ("no method here takes its B from fine-tuned models" in headline) is (n_models == 0)


def test_plain_runs_on_bases_that_were_written_to_one_path_are_two_methods(trained_grid, tmp_path):
    runs = [path for path in sorted((trained_grid / "runs").iterdir()) if "fb_" in path.name]
    later = shutil.copytree(runs[1], tmp_path / "later")
    record = unsealed(later / "run.json")
    record["basis"]["sha256"] = record["fingerprint"]["basis_sha256"] = "0" * 64
    writing.write_json(later / "run.json", record)
    (summary,) = [summarise(collect(each)) for each in find_experiments([str(runs[0]), str(later)])]
    path, known = record["basis"]["path"], read_json(runs[0] / "run.json")["basis"]["sha256"][:12]
    labels = [line.method.first.row.label for line in summary.groups[0].lines]
    assert labels == [f"fb basis={path} sha256 {known}", f"fb basis={path} sha256 {'0' * 12}"]
