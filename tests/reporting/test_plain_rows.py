"""The rows of runs and evaluations outside a grid: which evaluation and which base model stand with which run."""

import shutil

import numpy as np
import pytest

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.reading import read_json, read_jsonl
from cora_cli.records import write_sealed
from cora_cli.reporting.collect import collect
from cora_cli.reporting.found import find_experiments
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.summary import summarise
from cora_cli.rundir import RunDirectory
from cora_cli.training.heldout import HeldOutLoss, loss_change
from tests.evaluation.helpers import unsealed
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
        record = unsealed(folder / "run.json")
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
        record = unsealed(folder / "run.json")
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
        record = unsealed(folder / "run.json")
        place = "here" if seed < 2 else "there"
        record["model"]["reference"], record["data"]["dataset"] = f"/{place}/model", f"/{place}/data.jsonl"
        record["fingerprint"] |= {"model_sha256": "aa", "tokenizer_sha256": "bb", "data_sha256": "cc"}
        watched = {"eval_steps": 1, "gradient_checkpointing": True} if seed == 3 else {}  # which train the same numbers
        record["fingerprint"]["settings"] |= watched
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
        record = unsealed(folder / "run.json")
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
    writing.write_json(run.record, {**unsealed(run.record), "heldout": measured})


def test_a_base_model_has_the_loss_of_a_run_with_its_own_prompts(runs_with_base):
    lora, fb = runs_with_base
    for folder, template in ((lora, "chat"), (fb, "alpaca")):
        record = unsealed(folder / "run.json")
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
            own = unsealed(base.row.evaluation.parent / "run.json")
            assert base.measures[LOSS].value == pytest.approx(own["heldout"]["before"]["loss"])
        assert len(bases) == 2


@pytest.mark.parametrize("asked", ["trained", "another"])
def test_a_base_model_that_was_asked_with_another_tokenizer_has_no_loss_of_its_run(asked, runs_with_base):
    run = runs_with_base[0]
    trained, place = unsealed(run / "run.json"), run / "eval-base" / "metrics.json"
    trained["fingerprint"]["tokenizer_sha256"] = "trained"
    writing.write_json(run / "run.json", trained)
    evaluated = read_json(place)
    evaluated["generation"]["text_sha256"] = asked
    writing.write_json(place, evaluated)
    (experiment,) = find_experiments([str(run), str(run / "eval-base")])
    (base,) = (result for result in collect(experiment).results if result.row.mode == "base")
    assert (LOSS in base.measures) == (asked == "trained")


def test_a_base_model_elsewhere_has_the_loss_of_a_run_with_its_own_template(runs_with_base, tmp_path):
    lora, fb = runs_with_base
    elsewhere = shutil.copytree(lora / "eval-base", tmp_path / "elsewhere")
    for folder, template in ((lora, "chat"), (fb, "alpaca")):
        record = unsealed(folder / "run.json")
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
    record = unsealed(run / "run.json")
    record["heldout"]["before"]["tokens"] = tokens
    writing.write_json(run / "run.json", record)
    with pytest.raises(CoraError, match=r"heldout\.before\.tokens"):
        find_experiments([str(run)])


def test_a_base_model_elsewhere_has_the_loss_of_the_run_that_cut_its_prompts_least(runs_with_base, tmp_path):
    lora, fb = runs_with_base
    elsewhere = shutil.copytree(lora / "eval-base", tmp_path / "elsewhere")
    for folder, tokens in ((lora, 60), (fb, 90)):
        record = unsealed(folder / "run.json")
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


@pytest.mark.parametrize("file", ["run.json", "eval/metrics.json"])
def test_a_file_of_a_later_format_is_refused_by_its_format(file, runs_with_base):
    path = runs_with_base[0] / file
    writing.write_json(path, read_json(path) | {"format": 2})
    with pytest.raises(CoraError, match=rf"{path} is damaged or from another version of cora: format must be 1, not 2"):
        find_experiments([str(path.parent)])
