"""The rows of runs and evaluations outside a grid: which are compared, and what each is called."""

import shutil

import numpy as np
import pytest

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.inspection.prediction import used_bases
from cora_cli.reading import read_json, read_jsonl
from cora_cli.records import write_sealed
from cora_cli.reporting.collect import collect
from cora_cli.reporting.found import find_experiments
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.summary import summarise
from cora_cli.rundir import RunDirectory
from cora_cli.training.heldout import HeldOutLoss, loss_change
from tests.reporting.helpers import Made, write_evaluation, write_run


@pytest.fixture
def runs_with_base(tmp_path):
    """Two runs of `cora train`, each evaluated with its base model."""
    made = [Made("lora", "lora"), Made("fb", "fb", skill=0.6)]
    folders = [tmp_path / each.mode for each in made]
    for folder, each in zip(folders, made, strict=True):
        write_run(folder, each, np.random.default_rng(0))
        write_evaluation(folder / "eval", each, np.random.default_rng(1), 12)
        base = Made("base", "base", skill=0.3, rank=None, rate=None)
        write_evaluation(folder / "eval-base", base, np.random.default_rng(2), 12)
    return folders


def test_the_base_model_that_was_evaluated_with_runs_is_one_row(runs_with_base):
    (experiment,) = find_experiments([str(runs_with_base[0].parent)])
    assert [(row.label, row.evaluation.parent.name) for row in experiment.rows] == [
        ("fb", "fb"),
        ("lora", "lora"),
        ("base", "fb"),
    ]
    assert len({row.group for row in experiment.rows}) == 1
    base = collect(experiment).results[-1]
    assert base.measures[LOSS].value == read_json(runs_with_base[0] / "run.json")["heldout"]["before"]["loss"]
    (named,) = find_experiments([str(runs_with_base[0]), str(runs_with_base[0] / "eval-base")])
    assert [row.label for row in named.rows] == ["lora", "base"]


def test_an_evaluation_in_a_run_that_is_not_its_own_is_left_out_with_a_word(runs_with_base, capsys):
    run = runs_with_base[0]
    find_experiments([str(run)])
    assert "left out" not in capsys.readouterr().err
    write_evaluation(run / "elsewhere", Made("lora", "lora", skill=0.9), np.random.default_rng(3), 20)
    (experiment,) = find_experiments([str(run)])
    assert [row.label for row in experiment.rows] == ["lora", "base"]
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"{run / 'elsewhere'} is left out: a run is reported with its own evaluation alone; name it alone to report it" in said
    )
    (alone,) = find_experiments([str(run / "elsewhere")])
    assert [row.evaluation.name for row in alone.rows] == ["elsewhere"]
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("input_", "groups", "models", "datasets"),
    [(None, 1, 1, 1), ("model_sha256", 2, 2, 1), ("tokenizer_sha256", 2, 1, 1), ("data_sha256", 2, 1, 2)],
)
def test_runs_on_copies_of_one_model_and_data_set_are_one_group_with_one_base(runs_with_base, input_, groups, models, datasets):
    for folder, place in zip(runs_with_base, ("here", "there"), strict=True):
        record = read_json(folder / "run.json")
        record["model"]["reference"], record["data"]["dataset"] = f"/{place}/model", f"/{place}/data.jsonl"
        record["fingerprint"] |= {"model_sha256": "aa", "tokenizer_sha256": "bb", "data_sha256": "cc"}
        if input_:
            record["fingerprint"][input_] = place
        writing.write_json(folder / "run.json", record)
        for evaluation in ("eval", "eval-base"):
            metrics = read_json(folder / evaluation / "metrics.json")
            weights = record["fingerprint"]["model_sha256"]
            settings = {**metrics["generation"]["settings"], "model": f"/{place}/model", "model_sha256": weights}
            writing.write_json(folder / evaluation / "metrics.json", {**metrics, "generation": {"settings": settings}})
    (experiment,) = find_experiments(list(map(str, runs_with_base)))
    assert len({row.group for row in experiment.rows}) == groups
    assert sum(row.mode == "base" for row in experiment.rows) == groups
    assert experiment.rows[0].group.startswith("/here/model on /here/data.jsonl")
    # Methods are compared, and seeds counted as one method's, by these names.
    assert len({row.model for row in experiment.rows}) == models
    assert len({row.dataset for row in experiment.rows if row.run}) == datasets


def test_one_model_at_two_paths_is_one_although_the_data_were_divided_otherwise(runs_with_base):
    for number, folder in enumerate(runs_with_base):
        record = read_json(folder / "run.json")
        record["model"]["reference"] = f"/{number}/model"
        record["fingerprint"] |= {"data_sha256": f"{number}" * 64}
        record["fingerprint"]["settings"]["validation_size"] = number
        writing.write_json(folder / "run.json", record)
    (experiment,) = find_experiments(list(map(str, runs_with_base)))
    assert {row.group.split(" on ")[0] for row in experiment.rows if row.run} == {"/0/model"}
    assert len({row.group for row in experiment.rows if row.run}) == 1


def test_a_damaged_evaluation_of_a_run_takes_nothing_from_the_report_but_its_scores(runs_with_base):
    (runs_with_base[0] / "eval" / "metrics.json").write_text("{", encoding="utf-8")
    (experiment,) = find_experiments(list(map(str, runs_with_base)))
    found = collect(experiment)
    assert [(entry.row.label, entry.part) for entry in found.missing] == [("lora", "evaluation")]
    assert [LOSS in result.measures for result in found.results] == [True, True, True]


@pytest.mark.parametrize("damaged", ["eval", "eval-rank-2"])
def test_a_damaged_evaluation_next_to_those_at_lower_ranks_ends_no_report(damaged, runs_with_base, capsys):
    lora = runs_with_base[0]
    shutil.copytree(lora / "eval", lora / "eval-rank-2")
    (lora / damaged / "metrics.json").write_text("{", encoding="utf-8")
    (experiment,) = find_experiments(list(map(str, runs_with_base)))
    ranks = [row.evaluation.name for row in experiment.rows if row.evaluation and "rank" in row.evaluation.name]
    assert ranks == ([] if damaged == "eval-rank-2" else ["eval-rank-2"])
    assert (f"{lora / 'eval-rank-2'} is left out: " in capsys.readouterr().err) is (not ranks)
    assert [entry.part for entry in collect(experiment).missing] == (["evaluation"] if ranks else [])


def test_a_damaged_evaluation_of_a_base_ends_no_report(runs_with_base, capsys):
    (runs_with_base[0] / "eval-base" / "metrics.json").write_text("{", encoding="utf-8")
    (experiment,) = find_experiments(list(map(str, runs_with_base)))
    assert [row.label for row in experiment.rows] == ["lora", "fb", "base"]
    assert f"{runs_with_base[0] / 'eval-base'} is left out: " in capsys.readouterr().err


def test_seeds_on_copies_of_one_model_and_data_set_are_those_of_one_method(tmp_path):
    for seed in range(4):
        folder = tmp_path / str(seed)
        write_run(folder, Made("lora", "lora", seed=seed), np.random.default_rng(seed))
        record = read_json(folder / "run.json")
        place = "here" if seed < 2 else "there"
        record["model"]["reference"], record["data"]["dataset"] = f"/{place}/model", f"/{place}/data.jsonl"
        record["fingerprint"] |= {"model_sha256": "aa", "tokenizer_sha256": "bb", "data_sha256": "cc"}
        writing.write_json(folder / "run.json", record)
    (experiment,) = find_experiments([str(tmp_path)])
    (group,) = summarise(collect(experiment)).groups
    assert [line.method.seeds for line in group.lines] == [(0, 1, 2, 3)]


def test_a_base_model_with_other_weights_than_the_runs_has_no_loss_of_theirs(runs_with_base):
    for folder, digest in ((runs_with_base[0] / "eval-base", "cc" * 32), (runs_with_base[1] / "eval-base", "aa" * 32)):
        record = read_json(folder / "metrics.json")
        record["generation"]["settings"]["model_sha256"] = digest
        writing.write_json(folder / "metrics.json", record)
    (experiment,) = find_experiments([str(path) for folder in runs_with_base for path in (folder, folder / "eval-base")])
    evaluated = [result for result in collect(experiment).results if result.row.run is None]
    assert [LOSS in result.measures for result in evaluated] == [False, True]
    assert [result.row.label for result in evaluated] == ["tiny-model, weights sha256 cccccccccccc", "base"]


def of_model(folder, model):
    """Let an evaluation be one of another model, or of another program's answers."""
    record = read_json(folder / "metrics.json")
    settings = {**record["generation"]["settings"], "model": model, "model_sha256": "cc" * 32} if model else {}
    writing.write_json(
        folder / "metrics.json", {**record, "name": "chat-4", "generation": {"settings": settings} if model else {}}
    )
    return folder


def test_a_run_that_is_evaluated_at_lower_ranks_alone_lacks_no_evaluation(runs_with_base):
    lora, fb = runs_with_base
    for folder in (lora, fb):
        shutil.rmtree(folder / "eval-base")
    (lora / "eval").rename(lora / "eval-rank-2")
    shutil.rmtree(fb / "eval")
    (experiment,) = find_experiments([str(lora), str(fb)])
    assert [(entry.row.name, entry.reason) for entry in collect(experiment).missing] == [(str(fb), "not evaluated yet")]
    assert [row.evaluation and row.evaluation.name for row in experiment.rows] == [None, "eval-rank-2", "eval"]


def test_an_evaluation_that_is_named_next_to_its_run_counts_once(runs_with_base):
    lora = runs_with_base[0]
    (experiment,) = find_experiments([str(lora / "eval"), str(lora)])
    assert [row.label for row in experiment.rows] == ["lora", "base"]


@pytest.mark.parametrize(("model", "label", "mode"), [("instruct", "instruct", "model"), (None, "chat-4", "answers")])
def test_what_is_not_the_base_model_of_a_run_is_not_called_base_next_to_it(runs_with_base, tmp_path, model, label, mode):
    lora, fb = runs_with_base
    other = of_model(shutil.copytree(lora / "eval-base", tmp_path / "other"), model)
    (experiment,) = find_experiments([str(lora), str(other)])
    found = {result.row.label: result for result in collect(experiment).results}
    assert found.keys() == {"lora", "base", label}
    assert (found[label].row.mode, found[label].trained) == (mode, None)
    for folder in (lora, fb):
        shutil.rmtree(folder / "eval-base")
    (experiment,) = find_experiments([str(lora), str(other)])
    assert [row.label for row in experiment.rows] == ["lora", label]


def test_a_copy_of_the_base_model_elsewhere_is_called_base(runs_with_base, tmp_path):
    lora, fb = runs_with_base
    copy = shutil.copytree(lora / "eval-base", tmp_path / "copy")
    for folder in (lora, fb):
        shutil.rmtree(folder / "eval-base")
    record = read_json(copy / "metrics.json")
    record["generation"]["settings"]["model"] = "elsewhere/tiny-model"
    record["generation"]["settings"]["model_sha256"] = read_json(lora / "run.json")["fingerprint"]["model_sha256"]
    writing.write_json(copy / "metrics.json", record)
    (experiment,) = find_experiments([str(lora), str(copy)])
    assert [(row.label, row.mode) for row in experiment.rows] == [("lora", "lora"), ("base", "base")]
    assert len({row.model for row in experiment.rows}) == 1  # by which its scores give margins


def test_answers_of_one_name_go_by_their_directories_where_there_are_several(runs_with_base, tmp_path):
    one = of_model(shutil.copytree(runs_with_base[0] / "eval-base", tmp_path / "one"), None)
    other = shutil.copytree(one, tmp_path / "other")
    for named, labels in (([one], ["chat-4"]), ([one, other], [f"chat-4 {one}", f"chat-4 {other}"])):
        (experiment,) = find_experiments(list(map(str, named)))
        assert [row.label for row in experiment.rows] == labels


def test_evaluations_of_two_models_are_called_by_them(runs_with_base, tmp_path):
    one = shutil.copytree(runs_with_base[0] / "eval-base", tmp_path / "one")
    other = of_model(shutil.copytree(one, tmp_path / "other"), "instruct")
    (alone,) = find_experiments([str(one)])
    assert [row.label for row in alone.rows] == ["base"]
    (experiment,) = find_experiments([str(one), str(other)])
    assert [row.label for row in experiment.rows] == ["tiny-model", "instruct"]


@pytest.mark.parametrize("place", [0, 1])
def test_an_evaluation_of_the_base_model_stands_with_the_runs_whose_records_it_answered(runs_with_base, tmp_path, place):
    folders = []
    for number, folder in enumerate(runs_with_base):
        record = read_json(folder / "run.json")
        record["data"]["dataset"], record["fingerprint"]["data_sha256"] = f"data-{number}", f"{number}" * 64
        writing.write_json(folder / "run.json", record)
        folders += [folder / "eval", folder / "eval-base"]
        for evaluation in folders[-2:]:
            record = read_json(evaluation / "metrics.json")
            record["generation"]["settings"]["records_sha256"] = f"{number}" * 64
            writing.write_json(evaluation / "metrics.json", record)
    elsewhere = shutil.copytree(runs_with_base[place] / "eval-base", tmp_path / "elsewhere")
    for folder in runs_with_base:
        shutil.rmtree(folder / "eval-base")
    (experiment,) = find_experiments([*map(str, runs_with_base), str(elsewhere)])
    *runs, base = experiment.rows
    assert [row.group == base.group for row in runs] == [number == place for number in range(2)]


def scale_loss_before(folder, share):
    """Let a run begin at another held-out loss, as it does with other prompts."""
    run = RunDirectory(folder)
    lines = [{**line, "before": line["before"] * share} for line in read_jsonl(run.heldout)]
    writing.write_jsonl(run.heldout, lines)
    before, after, tokens = (np.array([line[key] for line in lines], dtype=float) for key in ("before", "after", "tokens"))
    losses = HeldOutLoss(before, tokens), HeldOutLoss(after, tokens)
    measured = {"before": losses[0].summary(), "after": losses[1].summary(), "change": loss_change(*losses)}
    writing.write_json(run.record, {**read_json(run.record), "heldout": measured})


def test_a_base_model_has_the_loss_of_a_run_with_its_own_prompts(runs_with_base):
    lora, fb = runs_with_base
    for folder, template in ((lora, "chat"), (fb, "alpaca")):
        record = read_json(folder / "run.json")
        record["data"]["template"] = template
        writing.write_json(folder / "run.json", record)
        record = read_json(folder / "eval-base" / "metrics.json")
        record["generation"]["template"] = template
        writing.write_json(folder / "eval-base" / "metrics.json", record)
    scale_loss_before(fb, 0.5)
    for first, second in ((lora, fb), (fb, lora)):
        (experiment,) = find_experiments([str(path) for folder in (first, second) for path in (folder, folder / "eval-base")])
        bases = [result for result in collect(experiment).results if result.row.mode == "base"]
        for base in bases:
            own = read_json(base.row.evaluation.parent / "run.json")
            assert base.measures[LOSS].value == pytest.approx(own["heldout"]["before"]["loss"])
        assert len(bases) == 2


def test_a_base_model_elsewhere_has_the_loss_of_a_run_with_its_own_template(runs_with_base, tmp_path):
    lora, fb = runs_with_base
    elsewhere = shutil.copytree(lora / "eval-base", tmp_path / "elsewhere")
    for folder, template in ((lora, "chat"), (fb, "alpaca")):
        record = read_json(folder / "run.json")
        writing.write_json(folder / "run.json", record | {"data": record["data"] | {"template": template}})
        shutil.rmtree(folder / "eval-base")
    scale_loss_before(lora, 0.5)
    record = read_json(elsewhere / "metrics.json")
    writing.write_json(elsewhere / "metrics.json", record | {"generation": record["generation"] | {"template": "alpaca"}})
    (experiment,) = find_experiments([str(lora), str(fb), str(elsewhere)])
    (base,) = [result for result in collect(experiment).results if result.row.mode == "base"]
    assert base.measures[LOSS].value == pytest.approx(read_json(fb / "run.json")["heldout"]["before"]["loss"])


@pytest.mark.parametrize("tokens", ["x", [3], {}, 10**400])
def test_held_out_tokens_that_are_no_number_are_named(runs_with_base, tokens):
    run, _ = runs_with_base
    record = read_json(run / "run.json")
    record["heldout"]["before"]["tokens"] = tokens
    writing.write_json(run / "run.json", record)
    with pytest.raises(CoraError, match=r"heldout\.before\.tokens"):
        find_experiments([str(run)])


def test_a_base_model_elsewhere_has_the_loss_of_the_run_that_cut_its_prompts_least(runs_with_base, tmp_path):
    lora, fb = runs_with_base
    elsewhere = shutil.copytree(lora / "eval-base", tmp_path / "elsewhere")
    for folder, tokens in ((lora, 60), (fb, 90)):
        record = read_json(folder / "run.json")
        record["data"]["test"]["tokens"] = tokens
        writing.write_json(folder / "run.json", record)
    scale_loss_before(lora, 0.5)
    for folder in runs_with_base:
        shutil.rmtree(folder / "eval-base")
    (experiment,) = find_experiments([str(lora), str(fb), str(elsewhere)])
    (base,) = [result for result in collect(experiment).results if result.row.mode == "base"]
    assert base.measures[LOSS].value == pytest.approx(read_json(fb / "run.json")["heldout"]["before"]["loss"])


@pytest.mark.parametrize("setting", ["model", "model_sha256", "records_sha256", "template", "max_new_tokens"])
def test_a_base_model_that_was_evaluated_otherwise_than_the_run_is_no_row_which_is_said(runs_with_base, setting, capsys):
    path = runs_with_base[0] / "eval-base" / "metrics.json"
    record = read_json(path)
    record["generation"]["settings"][setting] = "other"
    writing.write_json(path, record)
    (experiment,) = find_experiments([str(runs_with_base[0])])
    assert [row.label for row in experiment.rows] == ["lora"]
    assert "eval-base is left out: it has another" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["other numbers", "a pointer of Git LFS", "missing"])
def test_a_base_model_next_to_a_run_whose_evaluation_cannot_be_read_is_said_to_be_left_out(runs_with_base, damage, capsys):
    path = runs_with_base[0] / "eval" / "metrics.json"
    if damage == "other numbers":
        write_sealed(path, read_json(path))
        path.write_text(path.read_text(encoding="utf-8").replace('"value": ', '"value": 1'), encoding="utf-8")
    elif damage == "missing":
        path.unlink()
    else:
        path.write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    (experiment,) = find_experiments([str(runs_with_base[0])])
    assert [row.label for row in experiment.rows] == ["lora"]
    assert f"eval-base is left out: the evaluation of {runs_with_base[0]}, which it belongs to" in capsys.readouterr().err


def test_the_base_model_of_a_full_fine_tuning_is_a_row_although_the_run_answered_as_another_model(runs_with_base):
    path = runs_with_base[0] / "eval" / "metrics.json"
    record = read_json(path)
    record["generation"]["settings"] |= {"model": str(runs_with_base[0] / "model"), "model_sha256": "cc" * 32}
    writing.write_json(path, record)
    (experiment,) = find_experiments([str(runs_with_base[0])])
    assert [row.label for row in experiment.rows] == ["lora", "base"]


def test_a_base_model_that_was_evaluated_by_fewer_metrics_than_the_run_is_a_row_and_by_other_ones_is_none(runs_with_base):
    path = runs_with_base[0] / "eval-base" / "metrics.json"
    record = read_json(path)
    fewer = {name: metric for name, metric in record["metrics"].items() if name != "rougeL"}
    for metrics, labels in (
        (fewer, ["lora", "base"]),
        ({**fewer, "rouge1": {**fewer["rouge1"], "signature": "other"}}, ["lora"]),
    ):
        writing.write_json(path, {**record, "metrics": metrics})
        (experiment,) = find_experiments([str(runs_with_base[0])])
        assert [row.label for row in experiment.rows] == labels


def test_a_base_model_is_one_row_where_one_of_its_evaluations_was_scored_by_further_metrics(runs_with_base):
    path = runs_with_base[0] / "eval-base" / "metrics.json"
    record = read_json(path)
    fewer = {name: metric for name, metric in record["metrics"].items() if name != "rougeL"}
    writing.write_json(path, {**record, "metrics": fewer})
    (experiment,) = find_experiments(list(map(str, runs_with_base)))
    assert [(row.label, row.evaluation.parent.name) for row in experiment.rows][2:] == [("base", "fb")]


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
    record = read_json(other / "run.json")
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
        record = read_json(made[-1] / "run.json")
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
    record = read_json(again / "run.json")
    record["fingerprint"]["settings"]["max_steps"] = 9
    writing.write_json(again / "run.json", record)
    found = used_bases([str(one), str(again)])
    assert [(used.stratum, len(used.losses)) for used in found] == [
        (f"{alike[0].stratum}, max_steps=4", 1),
        (f"{alike[0].stratum}, max_steps=9", 1),
    ]


def test_a_rate_at_which_a_run_diverged_is_one_that_was_tried_where_losses_are_correlated_with_captures(trained_grid, tmp_path):
    run = next(path for path in sorted((trained_grid / "runs").iterdir()) if "fb_" in path.name)
    one, lost = (shutil.copytree(run, tmp_path / name) for name in ("one", "lost"))
    record = read_json(lost / "run.json")
    record["fingerprint"]["settings"]["learning_rate"] = 0.5
    writing.write_json(lost / "run.json", {**record, "status": "failed", "error": "the loss is nan", "diverged": True})
    (used,) = used_bases([str(one), str(lost)])
    assert (used.learning_rate, used.rates) == (0.03, (0.03, 0.5))


def test_a_scale_that_follows_the_rank_is_no_part_of_a_label(trained_grid, tmp_path):
    run = next(path for path in sorted((trained_grid / "runs").iterdir()) if "lora" in path.name)
    other = shutil.copytree(run, tmp_path / "other")
    record = read_json(other / "run.json")
    record["plan"] |= {"rank": 8, "alpha": 16.0}
    writing.write_json(other / "run.json", record)
    (experiment,) = find_experiments([str(run), str(other)])
    assert [(row.label, row.rank) for row in experiment.rows] == [("lora", 4), ("lora", 8)]


@pytest.mark.parametrize("changed", ["model_sha256", "tokenizer_sha256", "data_sha256"])
def test_runs_on_a_model_or_data_that_changed_under_its_name_are_no_seeds_of_one_method(changed, trained_grid, tmp_path):
    one, again = (path for path in sorted((trained_grid / "runs").iterdir()) if "lora" in path.name)
    other = shutil.copytree(again, tmp_path / "other")
    record = read_json(other / "run.json")
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
    record = read_json(other / "run.json")
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
    record = read_json(other / "run.json")
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
    record = read_json(run / "run.json")
    changed = {"mode": mode, "plan": record["plan"] | {"mode": mode, "b_init": b_init}}
    writing.write_json(run / "run.json", record | changed)
    (experiment,) = find_experiments([str(run)])
    assert [row.label for row in experiment.rows] == [label]


def test_plain_runs_on_two_bases_of_as_many_models_are_two_methods(trained_grid, tmp_path):
    run = next(path for path in sorted((trained_grid / "runs").iterdir()) if "fb_" in path.name)
    other, again = (shutil.copytree(run, tmp_path / name) for name in ("other", "again"))
    changed = read_json(other / "run.json")
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


def test_plain_runs_on_bases_that_were_written_to_one_path_are_two_methods(trained_grid, tmp_path):
    runs = [path for path in sorted((trained_grid / "runs").iterdir()) if "fb_" in path.name]
    later = shutil.copytree(runs[1], tmp_path / "later")
    record = read_json(later / "run.json")
    record["basis"]["sha256"] = record["fingerprint"]["basis_sha256"] = "0" * 64
    writing.write_json(later / "run.json", record)
    (summary,) = [summarise(collect(each)) for each in find_experiments([str(runs[0]), str(later)])]
    path, known = record["basis"]["path"], read_json(runs[0] / "run.json")["basis"]["sha256"][:12]
    labels = [line.method.first.row.label for line in summary.groups[0].lines]
    assert labels == [f"fb basis={path} sha256 {known}", f"fb basis={path} sha256 {'0' * 12}"]


@pytest.mark.parametrize("file", ["run.json", "eval/metrics.json"])
def test_a_file_of_a_later_format_is_refused_by_its_format(file, runs_with_base):
    path = runs_with_base[0] / file
    writing.write_json(path, read_json(path) | {"format": 2})
    with pytest.raises(CoraError, match=rf"{path} is damaged or from another version of cora: format must be 1, not 2"):
        find_experiments([str(path.parent)])
