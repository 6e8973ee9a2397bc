import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from cora_cli import hashing, writing
from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.basis.choices import BasisChoices
from cora_cli.cli.evaluate import metrics_table
from cora_cli.data.records import is_among, prompt_hash
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.scoring import paired_differences
from cora_cli.evaluation.targets import find_targets, trained_prompts
from cora_cli.extraction.extract import extract_basis
from cora_cli.models.references import resolve_model
from cora_cli.models.trained_on import trained_on
from cora_cli.reading import read_json, read_jsonl
from cora_cli.rundir import EvaluationDirectory, RunDirectory

from .helpers import FAST, HELD_OUT, evaluate_model, evaluate_run, make_run, unsealed


def test_a_prompt_has_one_hash_in_every_schema():
    pair = {"prompt": "Say hi", "completion": "hi"}
    alpaca = {"instruction": "Say hi", "input": "", "output": "hi"}
    talk = {"messages": [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"}]}
    hashes = {prompt_hash(pair, "prompt"), prompt_hash(alpaca, "alpaca"), prompt_hash(talk, "messages")}
    assert len(hashes) == 1
    assert prompt_hash({**talk, "tools": [{"name": "x"}]}, "messages") not in hashes
    assert prompt_hash({**alpaca, "input": "now"}, "alpaca") not in hashes


def test_prompts_that_differ_in_white_space_alone_are_one_prompt(run: Path, tiny_data: Path, tmp_path: Path):
    talk = {"messages": [{"role": "user", "content": " Say\n hi "}, {"role": "assistant", "content": "hi"}]}
    assert prompt_hash(talk, "messages") == prompt_hash({"prompt": "Say hi", "completion": ""}, "prompt")
    assert prompt_hash({"prompt": "Sayhi"}, "prompt") != prompt_hash({"prompt": "Say hi"}, "prompt")
    known = read_jsonl(tiny_data)
    writing.write_jsonl(
        tmp_path / "spaced.jsonl", [{**record, "instruction": record["instruction"] + " \n"} for record in known]
    )
    result = evaluate_run(run, dataset=str(tmp_path / "spaced.jsonl"), output_dir=str(tmp_path / "out"), exclude_trained=True)
    assert result.record["metrics"]["rouge1"]["n"] == HELD_OUT


def test_hashes_of_earlier_versions_which_took_white_space_as_it_is_are_known_too():
    record = {"instruction": "Say\nhi", "input": "", "output": ""}
    earlier = {hashing.sha256_text('[["user", "Say\\nhi"]]')[:32]}
    assert is_among(record, "alpaca", earlier)
    assert not is_among({**record, "instruction": "Say hi"}, "alpaca", earlier)


def test_hashes_of_earlier_versions_which_took_every_entry_of_a_message_are_known_too():
    record = {"messages": [{"role": "user", "content": "Say  hi", "id": 1}, {"role": "assistant", "content": "hi", "id": 2}]}
    earlier = {hashing.sha256_text('[{"content": "Say hi", "id": 1, "role": "user"}]')[:32]}
    assert is_among(record, "messages", earlier)


def test_an_adapter_that_was_taken_away_from_its_record_says_so(
    run: Path, trained: dict[str, Path], tiny_data: Path, tmp_path: Path, capfd
):
    said = "was trained by cora, but the record of its prompts is not next to it"
    for place in (run / "adapter", trained["full"] / "model"):
        copy = shutil.copytree(place, tmp_path / f"copy of {place.name}")
        for model, expected in ((place, False), (copy, True)):
            config = EvaluateConfig(model=str(model), dataset=str(tiny_data), output_dir=str(tmp_path / "out"))
            trained_prompts(find_targets(config))
            assert (f"{model} {said}" in " ".join(capfd.readouterr().err.split())) is expected


def test_leaving_an_adapter_unmerged_needs_an_adapter(trained: dict[str, Path], tiny_model: Path, tiny_data: Path):
    given = {"dataset": str(tiny_data), "output_dir": "out", "merge": False}
    for what in ({"model": str(tiny_model)}, {"runs": (str(trained["full"]),)}):
        with pytest.raises(
            CoraError, match=r"--no-merge has no effect: .* is a complete model, without an adapter; leave it out"
        ):
            find_targets(EvaluateConfig(**what, **given))


def test_a_run_records_the_prompts_that_it_was_trained_on(run: Path, tiny_data: Path):
    hashes = (run / "trained_prompts.txt").read_text().split()
    held_out = {prompt_hash(record, "alpaca") for record in read_jsonl(run / "test.jsonl")}
    assert len(hashes) == len(set(hashes)) > 0
    assert held_out.isdisjoint(hashes)


def test_records_of_the_training_are_left_out_where_the_file_is_the_runs_own(run: Path, tiny_data: Path, tmp_path: Path, capfd):
    result = evaluate_run(run, dataset=str(tiny_data), output_dir=str(tmp_path / "out"))
    total = len(read_jsonl(tiny_data))
    assert result.record["metrics"]["rouge1"]["n"] == HELD_OUT
    message = " ".join(capfd.readouterr().err.split())
    assert f"{total - HELD_OUT} of {total} prompts of {tiny_data} were trained on; they are left out" in message


def test_in_another_file_they_are_counted_and_left_out_on_request(run: Path, tiny_data: Path, tmp_path: Path, capfd):
    copy = tmp_path / "copy.jsonl"
    writing.write_jsonl(copy, read_jsonl(tiny_data)[:8])
    everything = evaluate_run(run, dataset=str(copy), output_dir=str(tmp_path / "all"))
    known = json.loads((tmp_path / "all" / "generation.json").read_text())["prompts_trained_on"]
    assert everything.record["metrics"]["rouge1"]["n"] == 8
    assert known > 0
    assert f"{known} of 8 prompts of {copy} were trained on; --exclude-trained leaves them out" in " ".join(
        capfd.readouterr().err.split()
    )
    rest = evaluate_run(run, dataset=str(copy), output_dir=str(tmp_path / "rest"), exclude_trained=True)
    assert rest.record["metrics"]["rouge1"]["n"] == 8 - known


def test_what_an_evaluation_was_trained_on_is_counted_among_the_prompts_that_it_answers_and_not_for_the_base_model(
    run: Path, tiny_data: Path, tmp_path: Path
):
    held_out = {prompt_hash(record, "alpaca") for record in read_jsonl(run / "test.jsonl")}
    copy = tmp_path / "copy.jsonl"
    known = [record for record in read_jsonl(tiny_data) if prompt_hash(record, "alpaca") not in held_out]
    writing.write_jsonl(copy, [*read_jsonl(run / "test.jsonl")[:1], *known])
    evaluate_run(run, dataset=str(copy), output_dir=str(tmp_path / "out"), limit=3, with_base=True)
    counted = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("out*/**/generation.json")}
    assert [one.get("prompts_trained_on", 0) for _, one in sorted(counted.items())] == [0, 2], counted.keys()


def test_an_evaluation_says_whose_records_it_answers_where_they_are_not_the_held_out_ones(run: Path, tmp_path: Path):
    own, other = tmp_path / "own.jsonl", tmp_path / "other.jsonl"
    shutil.copy(run / "test.jsonl", own)
    writing.write_jsonl(other, [*read_jsonl(own)[:1], {**read_jsonl(own)[1], "output": "of its own"}])
    spaced = tmp_path / "spaced.json"
    spaced.write_text(json.dumps(read_jsonl(own), indent=2), "utf-8")
    places = {"own": None, "run": run / "test.jsonl", "copy": own, "spaced": spaced, "other": other}
    for name, place in places.items():
        dataset = str(place) if place else None
        evaluate_run(run, dataset=dataset, output_dir=str(tmp_path / name), limit=2, with_base=True)
    said = {path.parent: json.loads(path.read_text()).get("dataset") for path in tmp_path.rglob("generation.json")}
    assert {place.parent.name for place, dataset in said.items() if dataset == str(other) and place.name == run.name} == {
        "other"
    }
    assert {place.parent.name for place, dataset in said.items() if dataset and place.name == "base"} == {
        "copy",
        "spaced",
        "other",
    }


def test_a_run_that_held_nothing_out_answers_another_data_set(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    run = tmp_path / "run"
    make_run(tiny_model, tiny_data, run, mode="lora", max_steps=1, test_size=0)
    evaluate_run(run, dataset=str(tiny_data), limit=2, exclude_trained=False)
    assert json.loads((run / "eval" / "generation.json").read_text())["dataset"] == str(tiny_data)


def test_which_split_was_trained_and_answered_is_recorded(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    records = datasets.Dataset.from_list(read_jsonl(tiny_data))
    parts = datasets.DatasetDict({"small": records.select(range(20)), "other": records.select(range(20, 23))})
    parts.save_to_disk(str(tmp_path / "parts"))
    held_out = tmp_path / "held_out.jsonl"
    writing.write_jsonl(held_out, list(records.select(range(23, 26))))
    run = tmp_path / "run"
    own = {"split": "small", "test_size": None, "test_dataset": str(held_out)}
    make_run(tiny_model, tmp_path / "parts", run, mode="lora", max_steps=1, **own)
    evaluate_run(run, dataset=str(tmp_path / "parts"), split="other", limit=2)
    data, made = read_json(run / "run.json")["data"], read_json(run / "eval" / "generation.json")
    assert (data["split"], data["test_dataset"], made["split"]) == ("small", str(held_out), "other")
    assert "subset" not in data


def test_a_model_without_a_record_says_that_nothing_is_left_out(tiny_model: Path, tiny_data: Path, tmp_path: Path, capfd):
    result = evaluate_model(tiny_model, tiny_data, tmp_path / "out", exclude_trained=True, limit=3)
    assert result.record["metrics"]["rouge1"]["n"] == 3
    said = f"--exclude-trained leaves no prompt out: of {tiny_model}, no record says which prompts it was trained on"
    assert said in " ".join(capfd.readouterr().err.split())


def test_a_file_of_training_records_alone_leaves_nothing_to_answer(run: Path, tiny_data: Path, tmp_path: Path):
    held_out = {prompt_hash(record, "alpaca") for record in read_jsonl(run / "test.jsonl")}
    trained = [record for record in read_jsonl(tiny_data) if prompt_hash(record, "alpaca") not in held_out]
    writing.write_jsonl(tmp_path / "trained.jsonl", trained[:3])
    given = {"dataset": str(tmp_path / "trained.jsonl"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(CoraError, match=r"all 3 prompts .* were trained on, which leaves none to answer; --no-exclude-trained"):
        evaluate_run(run, **given, exclude_trained=True)
    assert evaluate_run(run, **given).record["metrics"]["rouge1"]["n"] == 3


def test_an_adapter_directory_of_a_run_knows_its_prompts_too(run: Path, tiny_data: Path, tmp_path: Path):
    result = evaluate_model(run / "adapter", tiny_data, tmp_path / "out")
    assert result.record["metrics"]["rouge1"]["n"] == HELD_OUT


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_base_model_answers_the_same_records_first(trained: dict[str, Path], tiny_model: Path, tmp_path: Path, kind: str):
    config = EvaluateConfig(runs=(str(trained[kind]),), with_base=True, output_dir=str(tmp_path / "out"), **FAST)
    base, run = evaluate(config)
    assert base.name == f"{tiny_model} (base)"
    assert paired_differences(run, base)["rouge1"].n == HELD_OUT
    assert base.name in metrics_table([base, run])
    alone = evaluate_model(tiny_model, RunDirectory(trained[kind]).test_records, tmp_path / "alone", template="chat")
    answers = [EvaluationDirectory(tmp_path / place).predictions.read_bytes() for place in ("out/base", "alone")]
    assert answers[0] == answers[1]
    assert alone.record["metrics"] == base.record["metrics"]


def test_several_runs_of_one_base_share_its_evaluation(trained: dict[str, Path], tmp_path: Path):
    runs = (str(trained["lora"]), str(trained["fb"]))
    results = evaluate(EvaluateConfig(runs=runs, with_base=True, output_dir=str(tmp_path / "out"), **FAST))
    assert len(results) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["base", "fb", "lora"]


def test_one_base_that_answers_two_kinds_of_prompts_has_two_names(trained: dict[str, Path], run: Path, tiny_model: Path):
    record = unsealed(run / "run.json")
    writing.write_json(run / "run.json", {**record, "data": {**record["data"], "template": "plain"}})
    asked = EvaluateConfig(runs=(str(trained["fb"]), str(run)), with_base=True)
    names = [target.name for target in find_targets(asked)]
    assert names == [f"{tiny_model} (base)", str(trained["fb"]), f"{tiny_model} (base of {run})", str(run)]
    with pytest.raises(
        CoraError, match=r"\(base of .*run\) would be written to the same directory out/base; evaluate their runs"
    ):
        find_targets(dataclasses.replace(asked, output_dir="out"))


def test_a_full_fine_tuning_whose_base_has_moved_is_told_how_to_name_it(trained: dict[str, Path], tmp_path: Path):
    run = Path(shutil.copytree(trained["full"], tmp_path / "run"))
    record = unsealed(run / "run.json")
    moved = {**record["model"], "reference": str(tmp_path / "moved")}
    writing.write_json(run / "run.json", {**record, "model": moved})
    with pytest.raises(CoraError, match=r"base model of .*run cannot be found \(pass its path with --base\): .*moved"):
        find_targets(EvaluateConfig(runs=(str(run),), with_base=True))


def test_with_base_needs_runs():
    with pytest.raises(UsageError, match="--with-base needs run directories"):
        EvaluateConfig(model="m", dataset="d", output_dir="o", with_base=True)


def test_a_changed_list_of_trained_prompts_is_refused(run: Path, tiny_data: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    lines = (copy / "trained_prompts.txt").read_text().splitlines(keepends=True)
    (copy / "trained_prompts.txt").write_text("".join(lines[:2]))
    with pytest.raises(CoraError, match=r"trained_prompts.txt was changed after it was written"):
        trained_prompts(find_targets(EvaluateConfig(runs=(str(copy),), dataset=str(tiny_data))))


def test_a_checkpoint_in_a_run_directory_knows_the_prompts_of_its_run(run: Path, tiny_data: Path, tmp_path: Path):
    checkpoint = shutil.copytree(run / "adapter", run / "checkpoints" / "checkpoint-7")
    config = EvaluateConfig(model=str(checkpoint), dataset=str(tiny_data), output_dir=str(tmp_path / "out"))
    (target,) = find_targets(config)
    assert target.adapter is not None
    assert target.adapter.path == checkpoint
    assert trained_prompts([target]).hashes


@pytest.fixture
def merged(run: Path, tmp_path: Path) -> Path:
    """The run merged into its base, outside the run's directory."""
    merge_adapter(resolve_model(str(run)), tmp_path / "merged")
    return tmp_path / "merged"


def test_a_merged_run_and_an_exported_adapter_know_what_they_were_trained_on(
    run: Path, merged: Path, tiny_data: Path, tmp_path: Path
):
    export_adapter(resolve_model(str(run)), tmp_path / "exported")
    hashes = set((run / "trained_prompts.txt").read_text().split())
    for model in (merged, tmp_path / "exported"):
        shutil.move(model, tmp_path / "elsewhere")
        found = trained_prompts(
            find_targets(EvaluateConfig(model=str(tmp_path / "elsewhere"), dataset=str(tiny_data), output_dir="out"))
        )
        assert found.hashes == hashes
        assert str(tiny_data) in found.datasets, "its prompts are left out by default"
        record = read_json(tmp_path / "elsewhere" / "trained_on.json")
        writing.write_json(tmp_path / "elsewhere" / "trained_on.json", {**record, "datasets": []})
        with pytest.raises(CoraError, match=r"trained_on.json was changed after it was written; restore it"):
            trained_on(resolve_model(str(tmp_path / "elsewhere")))
        shutil.rmtree(tmp_path / "elsewhere")


def test_a_model_that_was_trained_again_knows_the_prompts_of_both_trainings(
    merged: Path, tiny_data: Path, records: Path, tmp_path: Path, capfd
):
    earlier = set((merged / "trained_prompts.txt").read_text().split())
    mixed = tmp_path / "mixed.jsonl"
    writing.write_jsonl(mixed, [*read_jsonl(tiny_data), *({"instruction": f"new {n}", "output": "x"} for n in range(3))])
    again = make_run(merged, mixed, tmp_path / "again", mode="lora", rank=8, split_seed=1)
    held_out = [prompt_hash(record, "alpaca") for record in read_jsonl(again / "test.jsonl")]
    known = sum(digest in earlier for digest in held_out)
    assert known > 0
    said = f"{known} of {HELD_OUT} held-out records have prompts that {merged} was already trained on"
    assert said in " ".join(capfd.readouterr().err.split())
    new = {prompt_hash({"instruction": f"new {n}", "input": "", "output": ""}, "alpaca") for n in range(3)}
    assert set((again / "trained_prompts.txt").read_text().split()) >= earlier | (new - set(held_out))
    shutil.rmtree(merged)
    assert trained_on(resolve_model(str(again))).prompts >= earlier


@pytest.mark.parametrize("behind", ["basis", "start"])
def test_a_run_knows_the_prompts_of_the_models_behind_its_basis_and_of_those_that_it_starts_from(
    behind: str, tiny_model: Path, tiny_data: Path, tmp_path: Path, capfd
):
    source = make_run(tiny_model, tiny_data, tmp_path / "source", mode="lora", rank=8, split_seed=1)
    settings: dict[str, Any] = {"mode": "lora", "start": "mean-delta", "start_models": (str(source),)}
    if behind == "basis":
        basis = tmp_path / "basis.safetensors"
        extract_basis([resolve_model(str(source))], basis, BasisChoices(rank=8), None, torch.device("cpu"))
        settings = {"mode": "fb", "basis": str(basis)}
    capfd.readouterr()
    run = make_run(tiny_model, tiny_data, tmp_path / "run", rank=8, **settings)
    said = " ".join(capfd.readouterr().err.split())
    earlier = set((source / "trained_prompts.txt").read_text().split())
    known = sum(prompt_hash(record, "alpaca") in earlier for record in read_jsonl(run / "test.jsonl"))
    assert known > 0
    assert f"{known} of {HELD_OUT} held-out records have prompts that {source} was already trained on" in said
    assert read_json(run / "run.json")["data"]["held_out_trained_on"] == known  # which a report says
    assert trained_on(resolve_model(str(run))).prompts >= earlier


@pytest.mark.parametrize("file", ["trained_prompts.txt", pytest.param("run.json", marks=pytest.mark.slow)])
def test_a_basis_serves_a_training_where_the_record_of_one_of_its_sources_is_damaged(
    file: str, tiny_model: Path, tiny_data: Path, tmp_path: Path, capfd
):
    source = make_run(tiny_model, tiny_data, tmp_path / "source", mode="lora", rank=8)
    basis = tmp_path / "basis.safetensors"
    extract_basis([resolve_model(str(source))], basis, BasisChoices(rank=8), None, torch.device("cpu"))
    (source / file).write_text("{}")
    run = make_run(tiny_model, tiny_data, tmp_path / "run", rank=8, mode="fb", basis=str(basis))
    assert trained_on(resolve_model(str(run))).prompts
    said = " ".join(capfd.readouterr().err.split())
    assert said.count(f"which prompts {source}, a source of the basis, was trained on is not known: ") == 1


def test_a_merged_run_of_an_early_version_says_that_its_prompts_are_not_known(run: Path, records: Path, tmp_path: Path, capfd):
    record = unsealed(run / "run.json")
    del record["data"]["trained_prompts_sha256"]
    (run / "run.json").write_text(json.dumps(record))
    (run / "trained_prompts.txt").unlink()
    merge_adapter(resolve_model(str(run)), tmp_path / "merged")
    trained_prompts(find_targets(EvaluateConfig(model=str(tmp_path / "merged"), dataset=str(records), output_dir="out")))
    assert "merged was trained by a version that did not record its prompts" in " ".join(capfd.readouterr().err.split())


def test_prompts_in_another_template_than_that_of_the_training_are_named(merged: Path, records: Path, tmp_path: Path, capfd):
    evaluate_model(merged, records, tmp_path / "out", limit=1)
    said = " ".join(capfd.readouterr().err.split())
    assert f"{merged} was trained with the template chat, but these prompts have the template plain" in said
    assert "follow each other as they are (template plain); --template chat" in said
    evaluate_model(merged, records, tmp_path / "chat", limit=1, template="chat")
    said = " ".join(capfd.readouterr().err.split())
    assert "was trained with the template" not in said
    assert "follow each other as they are" not in said
