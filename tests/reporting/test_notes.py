"""The notes under a report's tables: what the rows differ by apart from their methods, and where a number says less than it seems to."""

import dataclasses
import re

import numpy as np
import pytest

from cora_cli import hashing, writing
from cora_cli.data.records import repeated_notice
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.reading import read_json, read_jsonl
from cora_cli.reporting.answers import answer_sets
from cora_cli.reporting.collect import collect
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.report import report
from cora_cli.reporting.report_rows import Experiment, read_plan
from cora_cli.reporting.results import Collection
from cora_cli.reporting.summary import summarise
from cora_cli.reporting.tables import scores_table
from cora_cli.reporting.training_conditions import _start
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from tests.reporting.helpers import Made, make_grid, result, write_scored


def test_rows_of_other_settings_and_of_trained_prompts_are_named_under_the_table(tmp_path):
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb"), Made("lora", "lora")], prompts=6)
    text = report([str(grid)])
    assert "were trained on" not in text
    assert "different settings" not in text
    assert "The scores are of" not in text
    metrics = next(path for path in sorted(grid.rglob("metrics.json")) if "lora" in str(path))
    record = read_json(metrics)
    settings = {**record["generation"]["settings"], "max_new_tokens": 64, "template": "plain"}
    generation = {"settings": settings, "prompts_trained_on": 2, "dataset": "/data/other.jsonl"}
    writing.write_json(metrics, {**record, "generation": generation})
    text = " ".join(report([str(grid)]).split())
    assert "The scores are of the records of /data/other.jsonl, and the held-out loss of those that the runs held out." in text
    assert "2 of its prompts were trained on" in text
    assert re.search(r"Asked otherwise than the training, .* was: \S*lora\S* \(template plain, trained with alpaca\)\.", text)
    assert "different settings, from which differences between rows may come: max_new_tokens (16, 64)" in text
    for path in grid.rglob("run.json"):
        writing.write_json(path, {**read_json(path), "heldout": None})
        (path.parent / "heldout.jsonl").unlink()
    assert "The scores are of the records of /data/other.jsonl. " in " ".join(report([str(grid)]).split())


def test_seeds_whose_answers_average_other_numbers_of_draws_are_not_pooled_without_a_word(tmp_path):
    rows = [Made("scalabl", "scalabl", seed, b_init="zeros") for seed in (0, 1)]
    grid = make_grid(tmp_path / "grid", rows, prompts=6)
    metrics = sorted(grid.rglob("metrics.json"))
    for place, drawn in zip(metrics, ({"draws": [10]}, {}), strict=True):
        record = read_json(place)
        settings = {**record["generation"]["settings"], **drawn}
        writing.write_json(place, {**record, "generation": {**record["generation"], "settings": settings}})
    text = " ".join(report([str(grid)]).split())
    assert "different settings, from which differences between rows may come: draws of the weights (10, 0)." in text
    assert "The means over seeds mix them: scalabl r=4." in text


def test_answers_of_merged_weights_that_lost_much_of_the_change_are_named_under_the_table(tmp_path):
    rows = [Made("lora", "lora", seed) for seed in (0, 1)]
    grid = make_grid(tmp_path / "grid", [*rows, Made("fb", "fb")], prompts=6)
    assert "rounding lost" not in report([str(grid)])
    metrics = next(path for path in sorted(grid.rglob("metrics.json")) if "lora" in str(path))
    record = read_json(metrics)
    writing.write_json(metrics, {**record, "generation": {**record["generation"], "rounded_away": 0.85}})
    text = " ".join(report([str(grid)]).split())
    assert "Answers of merged weights, where rounding lost much of the adapter's change, unlike in the held-out loss" in text
    assert "keeps it): lora r=4 85% in 1 of 2 runs." in text


def test_answers_to_another_prompt_than_the_one_shown_say_so(tmp_path):
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb"), Made("lora", "lora")], prompts=6)
    predictions = next(path for path in grid.rglob("predictions.jsonl") if "lora" in str(path))
    lines = [
        {**line, "prompt": f"### {line['prompt']}" if line["index"] < 2 else line["prompt"]} for line in read_jsonl(predictions)
    ]
    write_scored(predictions.parent, lines, read_json(predictions.with_name("metrics.json")))
    (answers,) = answer_sets(summarise(collect(read_plan(grid))))
    noted = [[answer.notes for answer in record.answers] for record in answers.prompts]
    assert noted == [[(), ("asked by another prompt than the one shown",) if place < 2 else ()] for place in range(6)]


def test_answers_whose_scores_say_less_than_they_seem_to_are_counted_by_row_under_the_table(tmp_path):
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb"), *(Made("lora", "lora", seed=seed) for seed in (0, 1))], prompts=6)
    assert "Answers cut" not in report([str(grid)])
    for predictions in (path for path in grid.rglob("predictions.jsonl") if "lora" in str(path)):
        lines = [{**line, "finish_reason": "length" if line["index"] < 2 else "stop"} for line in read_jsonl(predictions)]
        lines[0]["prediction"] = f"<think>hm</think>{lines[0]['prediction']}"
        write_scored(predictions.parent, lines, read_json(predictions.with_name("metrics.json")))
    text = " ".join(report([str(grid)]).split())
    assert "Answers cut at the limit of new tokens: lora r=4 4 of 12." in text
    assert "Answers with thoughts, which text metrics score as a part of them: lora r=4 2 of 12." in text
    assert "Answers empty" not in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "cuda:0", "device_reason": "NVIDIA H100"}, "device (NVIDIA H100, cpu)"),
        ({"threads": 16}, "threads (16, THREADS)"),
        ({"fast_path": "compile"}, "fast path (compile, none)"),
        ({"tokens_per_row": 512}, "tokens per row (512, none)"),
        ({"device_reason": "asked for"}, ""),
    ],
)
def test_speeds_of_different_machines_are_named_under_the_table_of_costs(tmp_path, change, said):
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb"), Made("lora", "lora")], prompts=6)
    place = next(path for path in grid.rglob("run.json") if "fb" in str(path))
    record = read_json(place)
    threads = str(record["hardware"]["threads"])
    writing.write_json(place, {**record, "hardware": {**record["hardware"], **change}})
    text = " ".join(report([str(grid)]).split())
    note = f"Not all rows were trained on one machine or in one way, from which differences in tokens/s and memory may come: {said.replace('THREADS', threads)}."
    assert (note in text) == bool(said)
    assert ("on one machine or in one way" in text) == bool(said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gradient_checkpointing": True}, "gradient checkpointing (on, off)"),
        ({"batch_size": 4, "gradient_accumulation": 2}, "batch size (4, 8)"),
    ],
)
def test_costs_of_unlike_passes_are_named_under_their_table(tmp_path, settings, said):
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb"), Made("lora", "lora")], prompts=6)
    place = next(path for path in grid.rglob("run.json") if "fb" in str(path))
    record = read_json(place)
    record["fingerprint"]["settings"] |= settings
    writing.write_json(place, record)
    assert f"from which differences in tokens/s and memory may come: {said}." in " ".join(report([str(grid)]).split())


@pytest.mark.parametrize(
    ("settings", "steps", "found", "named"),
    [
        ({}, 100, "optimizer steps (20, 100)", "optimizer steps 100 and 20"),
        ({"batch_size": 32}, 20, "examples per step (8, 32)", "examples per step 32 and 8"),
        ({"gradient_accumulation": 4}, 20, "examples per step (8, 32)", "examples per step 32 and 8"),
        ({"batch_size": 2, "gradient_accumulation": 4}, 20, "", ""),
        ({"weight_decay": 0.1}, 20, "", ""),  # not recorded by the other
        ({"train_on": "all"}, 20, "train on (last, all)", "train on all and last"),
    ],
)
def test_rows_that_were_not_trained_alike_are_named_under_the_table_and_in_their_comparison(
    tmp_path, settings, steps, found, named
):
    grid = make_grid(tmp_path / "grid", [Made("lora", "lora"), Made("fb", "fb", n_models=2)], prompts=6)
    assert "trained alike" not in report([str(grid)])
    place = next(path for path in grid.rglob("run.json") if "-fb_" in str(path))
    record = read_json(place)
    record["fingerprint"]["settings"] |= settings
    writing.write_json(place, {**record, "speed": {**record["speed"], "steps": steps}})
    text = " ".join(report([str(grid)]).split())
    note = f"Not all rows were trained alike, from which differences between them may come: {found}."
    assert (note in text, f"not trained alike: {named})" in text) == (bool(found), bool(named))


@pytest.mark.parametrize(
    ("plan", "said"),
    [({"alpha": 64}, "scale of B·A"), ({"rslora": True}, "scale of B·A"), ({"a_init": "gaussian"}, "")],
)
def test_another_scale_is_named_and_the_start_of_a_only_within_a_mode(plan, said, tmp_path):
    grid = make_grid(tmp_path / "grid", [Made("lora", "lora"), Made("fb", "fb", n_models=2)], prompts=6)
    place = next(path for path in grid.rglob("run.json") if "-fb_" in str(path))
    record = read_json(place)
    writing.write_json(place, {**record, "plan": {**record["plan"], **plan}})
    text = " ".join(report([str(grid)]).split())
    assert ("not trained alike: scale of B·A" in text) == bool(said)
    assert _start({"mode": "fb", "a_init": "zeros"}) == {"a_init of fb": "zeros"}


def test_next_to_the_papers_numbers_stands_of_which_model_data_and_rank_those_of_the_rows_are(tmp_path):
    rows = [Made("base", "base", rank=None, rate=None), Made("fb", "fb", printed="CoRA_code_FB_5", n_models=2)]
    text = " ".join(report([str(make_grid(tmp_path / "grid", rows, prompts=6, paper_table="main"))]).split())
    published = "the number published in the paper (arXiv 2409.02119v1, meta-llama/Llama-2-13b-hf, one seed, no interval)."
    assert f"In parentheses: {published} The numbers here are of tiny-model on tiny-data, rank 4." in text
    unlike = "rouge1, rougeL as cora computes them by default (--metric-variant hf-evaluate is closer)"
    assert f"Measured otherwise than most likely in the paper: {unlike}." in text


def test_a_bertscore_of_the_embedded_encoder_is_said_to_be_on_another_scale_than_the_papers():
    bert = result("fb", bertscore_f1=[0.7, 0.8], rouge1=[0.3, 0.4])
    signatures = {
        "bertscore_f1": "bertscore_f1|encoder:builtin:all-MiniLM-L6-v2|layer:6",
        "rouge1": "rouge1|variant:hf-evaluate|bs:1000",
    }
    for name, said in signatures.items():
        bert.measures[name] = dataclasses.replace(bert.measures[name], signature=said)
    bert = dataclasses.replace(bert, row=dataclasses.replace(bert.row, printed="CoRA_code_FB_5"))
    experiment = Experiment("tiny", "Tiny", "main", None, (), (bert.row,))
    (group,) = summarise(Collection(experiment, [bert], [])).groups
    said = "Measured otherwise than most likely in the paper: bertscore_f1 on a small encoder (MiniLM-L6), so on another scale."
    assert said in scores_table(group, "main").notes


@pytest.mark.parametrize(("truncated", "said"), [(5, True), (0, False)])
def test_a_maximum_length_that_cut_training_records_is_a_difference_of_training(tmp_path, truncated, said):
    grid = make_grid(tmp_path / "grid", [Made("lora", "lora"), Made("fb", "fb", n_models=2)], prompts=6)
    for place in grid.rglob("run.json"):
        record = read_json(place)
        record["fingerprint"]["settings"]["max_length"] = 48 if "-fb_" in str(place) else 1024
        record["data"]["train"]["truncated"] = truncated if "-fb_" in str(place) else 0
        writing.write_json(place, record)
    text = " ".join(report([str(grid)]).split())
    assert ("differences between them may come: max length (1,024, 48)." in text) is said
    assert ("not trained alike: max length 48 and 1,024)" in text) is said


@pytest.mark.parametrize(("margin", "said"), [(1e-9, True), (0.01, False)])
def test_a_margin_that_is_printed_as_zero_is_explained(tmp_path, margin, said):
    made = [Made(mode, mode, seed, n_models=n) for seed in range(3) for mode, n in (("lora", None), ("fb", 2))]
    grid = make_grid(tmp_path / "grid", made, prompts=6, margin={"rougeL": margin})
    text = " ".join(report([str(grid)]).split())
    assert ("A margin that rounds to zero" in text) is said


def test_rates_at_which_trainings_diverged_are_named_and_are_no_failure_of_the_sweep(tmp_path):
    losses = {1e-4: 1.2, 1e-3: 1.0, 1e-2: 1.3}
    made = [Made(mode, mode, loss=loss, rate=rate) for mode in ("lora", "fb") for rate, loss in losses.items()]
    grid = make_grid(tmp_path / "grid", made, prompts=6)
    assert "diverged" not in report([str(grid)])
    place = next(path for path in grid.rglob("run.json") if "-fb_" in str(path) and "0.01" in str(path))
    writing.write_json(place, {**read_json(place), "status": "failed", "error": "the loss is nan", "diverged": True})
    text = " ".join(report([str(grid)]).split())
    assert "Learning rates at which trainings diverged: fb r=4 0.01 (1 seed; tried and not chosen)." in text
    assert "Learning rates not swept alike" not in text
    assert "At the edge of the sweep" not in text
    failed = {name: value for name, value in read_json(place).items() if name != "diverged"}
    writing.write_json(place, failed)
    assert "Learning rates not swept alike" in " ".join(report([str(grid)]).split())


def test_a_comparison_says_how_many_trainings_of_its_methods_diverged(tmp_path):
    made = [Made(mode, mode, seed, n_models=n) for seed in range(4) for mode, n in (("lora", None), ("fb", 2))]
    grid = make_grid(tmp_path / "grid", made, prompts=6)
    assert "diverged" not in report([str(grid)])
    place = next(path for path in grid.rglob("run.json") if "-fb_" in str(path))
    writing.write_json(place, {**read_json(place), "status": "failed", "error": "the loss is nan", "diverged": True})
    (comparison,) = re.findall(r"- (fb r=4 n=2 compared with lora r=4 .*?\)\.) ", " ".join(report([str(grid)]).split()))
    assert "without 1 of 4 trainings of fb r=4 n=2, which diverged, so that it may look better than it is" in comparison


def test_a_rate_does_not_win_by_the_seeds_that_survived_it(tmp_path):
    losses = {1e-4: 1.2, 1e-3: 1.0, 1e-2: 0.5}
    made = [Made("fb", "fb", seed, loss=loss, rate=rate) for rate, loss in losses.items() for seed in (0, 1)]
    grid = make_grid(tmp_path / "grid", made, prompts=6)
    assert "(mean over seeds): fb r=4 0.01." in " ".join(report([str(grid)]).split())
    place = next(path for path in grid.rglob("run.json") if "lr0.01_seed0" in str(path))
    writing.write_json(place, {**read_json(place), "status": "failed", "error": "the loss is nan", "diverged": True})
    text = " ".join(report([str(grid)]).split())
    assert (
        "with its lowest held-out loss of those at which no training diverged, where there are any (mean over seeds): fb r=4 0.001."
        in text
    )
    assert (
        "chosen: the learning rate of the method with the lowest held-out loss of those at which no training diverged" in text
    )
    assert "Learning rates at which trainings diverged: fb r=4 0.01 (1 seed; tried and not chosen)." in text
    assert "Not every learning rate has finished with the same seeds" not in text


def test_what_a_resumed_run_began_with_is_named(tmp_path):
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb")], prompts=6)
    (place,) = grid.rglob("run.json")
    record = read_json(place)
    began = {"hardware_before": [{**record["hardware"], "device": "cuda:0", "device_reason": "NVIDIA H100"}]}
    writing.write_json(place, {**record, **began, "versions_before": {"torch": "2.10.0"}})
    text = " ".join(report([str(grid)]).split())
    assert "differences in tokens/s and memory may come: device (NVIDIA H100, cpu)." in text
    assert "torch 2.10.0 / 2.13.0." in text


def test_seeds_of_a_method_that_were_not_trained_alike_are_named_in_its_comparison(tmp_path):
    grid = make_grid(
        tmp_path / "grid", [Made(mode, mode, seed, n_models=n) for seed in (0, 1) for mode, n in (("lora", None), ("fb", 2))]
    )
    place = next(path for path in grid.rglob("run.json") if "-fb_" in str(path) and "seed1" in str(path))
    record = read_json(place)
    writing.write_json(place, {**record, "hardware": {**record["hardware"], "processes": 8}})
    assert "not trained alike: examples per step 8 and 64)" in " ".join(report([str(grid)]).split())


@pytest.mark.parametrize(
    ("truncated", "said"),
    [
        (0, "different prompts, from which differences between rows may come: template (alpaca, chat)."),
        (3, "differences between rows may come: template (alpaca, chat); max_length (512, 1024)."),
    ],
)
def test_rows_whose_held_out_loss_is_of_other_prompts_are_named_under_the_table(tmp_path, truncated, said):
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb"), Made("lora", "lora")], prompts=6)
    assert "different prompts" not in report([str(grid)])
    for mode, template, length in (("fb", "alpaca", 512), ("lora", "chat", 1024)):
        path = next(path for path in grid.rglob("run.json") if f"-{mode}_" in str(path))
        record = read_json(path)
        record["data"] |= {"template": template, "test": {**record["data"]["test"], "truncated": truncated}}
        record["fingerprint"]["settings"]["max_length"] = length
        writing.write_json(path, record)
    text = " ".join(report([str(grid)]).split())
    assert said in text
    assert "not trained alike: max length 512 and 1,024, template alpaca and chat)." in text


def test_rows_that_were_asked_other_prompts_with_equal_references_are_named(tmp_path):
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb"), Made("lora", "lora")], prompts=6)
    assert "the same prompts" not in report([str(grid)])
    path = next(path for path in sorted(grid.rglob("predictions.jsonl")) if "lora" in str(path))
    path.write_text(path.read_text().replace("prompt 3", "prompt three"))
    metrics = path.with_name("metrics.json")
    writing.write_json(metrics, {**read_json(metrics), "predictions_sha256": hashing.sha256_file(path)})
    assert "not all rows were asked the same prompts" in " ".join(report([str(grid)]).split())


def test_records_with_one_prompt_are_counted_by_a_training_an_evaluation_and_a_report(tiny_model, tiny_data, tmp_path, capfd):
    records = read_jsonl(tiny_data)
    twice = [{**record, "output": record["output"] + end} for record in records[:6] for end in ("", " in all")]
    writing.write_jsonl(tmp_path / "held-out.jsonl", twice)
    out = tmp_path / "run"
    inputs = {"model": str(tiny_model), "dataset": str(tiny_data), "test_dataset": str(tmp_path / "held-out.jsonl")}
    train(TrainConfig(**inputs, output_dir=str(out), mode="lora", max_steps=1, rank=4, device="cpu"))
    evaluate(EvaluateConfig(runs=(str(out),), metrics=("rouge",), max_new_tokens=2, limit=4, device="cpu"))
    said = " ".join(capfd.readouterr().err.split())
    assert f"held-out records: {repeated_notice(6, 12)}" in said
    assert f"{out / 'test.jsonl'}, records: {repeated_notice(2, 4)}" in said
    assert "intervals are too narrow: 6 of 12 held-out ones, 2 of 4 answered ones." in " ".join(report([str(out)]).split())


def test_a_method_whose_held_out_records_are_known_to_the_models_behind_it_is_named(tmp_path):
    grid = make_grid(tmp_path / "grid", [Made("lora", "lora"), Made("fb", "fb", n_models=1)])
    path = next((grid / "runs").glob("*fb*")) / "run.json"
    record = read_json(path)
    record["data"]["held_out_trained_on"] = 7
    writing.write_json(path, record)
    said = "so that its held-out loss says little about new ones: fb r=4 n=1 7 of 30."
    text = " ".join(report([str(grid)]).split())
    assert said in text
    (comparison,) = re.findall(r"- fb r=4 n=1 compared with lora r=4 [^-].*?\.(?= (?:Tests|-))", text)
    assert "fb r=4 n=1 or the models behind it were trained on 7 of the 30 prompts" in comparison


@pytest.mark.parametrize(("skew", "said"), [(2.0, True), (0.05, False)])
def test_an_interval_that_its_half_length_misrepresents_is_printed_with_its_ends(skew, said):
    nats = np.exp(skew * np.random.default_rng(0).standard_normal(20))
    losses = {seed: np.stack([10 * nats + 0.01 * seed, np.full(20, 10)], axis=1) for seed in range(3)}
    results = [result("lora", seed, **{LOSS: statistics}) for seed, statistics in losses.items()]
    experiment = Experiment("tiny", "Tiny", None, None, (), tuple(one.row for one in results))
    (group,) = summarise(Collection(experiment, results, [])).groups
    estimate = group.lines[0].estimates[LOSS]
    note = f"which ± does not show: lora r=4 n=1 held-out loss [{estimate.low:.3f}, {estimate.high:.3f}]."
    assert (note in " ".join(scores_table(group, None).notes)) == said


def test_metrics_that_are_left_out_are_named_since_tests_are_not_corrected_over_them(made_grid):
    said = "Measured, but left out by --metrics, so that p-values are not corrected over them"
    assert f"{said}: rouge1, sacrebleu." in " ".join(report([str(made_grid)], metrics=("rougeL",)).split())
    assert said not in report([str(made_grid)])


def notes_of_tests(grid):
    """The notes of the table of tests, as they are printed."""
    printed = " ".join(report([str(grid)]).partition("the tests behind the verdict")[2].split())
    return printed.partition("Rule: ")[2].partition(" Conditions ---")[0]


def test_a_method_that_trains_nothing_is_shown_without_a_learning_rate(tmp_path):
    swept = [Made("lora", "lora", loss=loss, rate=rate) for rate, loss in ((1e-3, 0.5), (1e-2, 0.6))]
    grid = make_grid(tmp_path / "grid", [*swept, Made("mean-delta", "mean-delta", rate=1e-3, trained=0)])
    rates = re.findall("with its lowest held-out loss .*?: (.*?)\\. ", report([str(grid)], "markdown"))
    assert rates == ["lora r=4 0.001"]


def test_the_note_of_the_tests_names_rates_that_were_not_swept_alike_and_rates_at_the_edge(tmp_path):
    rows = [Made("base", "base", rank=None, rate=None)]
    for rate in (1e-3, 3e-3, 1e-2):
        rows += [
            Made("fb", "fb", loss=0.5 + (rate != 3e-3), n_models=2, rate=rate),
            Made("fb orthonormal", "fb", loss=0.5 + (rate != 1e-2), b_init="orthonormal", rate=rate),
        ]
    rows.append(Made("lora", "lora"))
    notes = notes_of_tests(make_grid(tmp_path, rows, prompts=6))
    pairs = "fb r=4 n=2 and lora r=4; fb orthonormal r=4 and lora r=4"
    assert f"Learning rates not swept alike, so neither better, worse nor equivalent: {pairs}." in notes
    assert (
        "Best learning rate at the edge of the sweep, so that a better one may lie outside it, and neither better, worse nor equivalent: "
        "fb r=4 n=2 and fb orthonormal r=4 (that of fb orthonormal r=4)." in notes
    )
    assert "Nothing is decided with fewer than 3 seeds on a side, nor unless the learning rates were swept alike: " in notes
    assert "No random control" not in notes


@pytest.mark.parametrize(
    ("seeds", "said"), [((0, 1), None), ((0,), "lora r=4 by seed 0"), ((2,), "by different seeds, which favours a rate")]
)
def test_the_note_of_a_sweep_names_the_seeds_where_not_every_rate_has_finished_all(seeds, said, tmp_path):
    rows = [Made("lora", "lora", seed, rate=1e-3) for seed in (0, 1)] + [
        Made("lora", "lora", seed, rate=1e-2) for seed in seeds
    ]
    text = report([str(make_grid(tmp_path, rows, prompts=6))])
    assert ("Not every learning rate has finished with the same seeds" in text) == (said is not None)
    assert said is None or said in text


def test_the_note_of_the_tests_names_an_informed_b_without_a_random_control(tmp_path):
    rows = [Made("fb", "fb", n_models=2), Made("fb random", "fb", b_init="orthonormal"), Made("tb", "tb", n_models=2)]
    notes = notes_of_tests(make_grid(tmp_path, [*rows, Made("lora", "lora")], prompts=6))
    assert "No random control of this form, so no conclusion about the information in B: tb r=4 n=2 and lora r=4." in notes


def test_the_note_under_a_table_names_every_unit_though_its_first_row_lacks_one(tmp_path):
    grid = make_grid(tmp_path / "grid", [Made("base", "base", rank=None, rate=None), Made("fb", "fb", n_models=2)])
    record = grid / "runs" / Made("fb", "fb", n_models=2).name / "run.json"
    changed = read_json(record)
    changed["plan"]["a_init"] = "gaussian"  # does not start as the base model, so lends it no loss
    writing.write_json(record, changed)
    assert "held-out loss in nats per response token over 30 records" in report([str(grid)])
