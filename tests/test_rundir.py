import json

import pytest

from cora_cli import hashing, writing
from cora_cli.errors import CoraError
from cora_cli.rundir import EvaluationDirectory, RunDirectory


def test_constructing_directories_touches_nothing_and_a_run_exists_with_its_record(tmp_path):
    run = RunDirectory(tmp_path / "run")
    evaluation = EvaluationDirectory(run.evaluation)
    assert not (tmp_path / "run").exists()
    assert not run.exists()
    assert evaluation.metrics == tmp_path / "run" / "eval" / "metrics.json"
    writing.write_json(run.record, {"status": "running"})
    assert run.exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == {"status": "running"}


def test_a_hidden_file_beside_the_result_of_a_run_changes_nothing_and_another_one_does(tmp_path):
    run = RunDirectory(tmp_path)
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_text("weights")
    writing.write_json(run.record, {"result_sha256": run.result_hash()})
    (run.adapter / ".DS_Store").write_text("x")
    run.check_result()
    (run.adapter / "more.json").write_text("{}")
    with pytest.raises(CoraError, match="was changed after its training had finished"):
        run.check_result()
    listed = {name: digest for name, digest in run.result_files().items() if name != "more.json"}
    writing.write_json(run.record, {"result_sha256": hashing.sha256_json(listed), "result_files": listed})
    with pytest.raises(CoraError, match=r"more\.json was put next to the result of a finished run .*; move it out of"):
        run.check_result()


def test_a_record_that_states_another_seed_than_the_adapter_is_refused(tmp_path):
    run = RunDirectory(tmp_path)
    run.adapter.mkdir()
    writing.write_json(run.adapter / "cora.json", {"plan": {"seed": 0}})
    record = {"result_sha256": run.result_hash(), "seeds": {"seed": 0, "split_seed": 3}}
    writing.write_json(run.record, record)
    run.check_result()
    writing.write_json(run.record, {**record, "seeds": {"seed": 1, "split_seed": 3}})
    with pytest.raises(
        CoraError, match=r"run\.json was changed .*: it states the seed 1, but .*cora\.json the seed 0; restore"
    ):
        run.check_result()


def test_the_evaluations_of_a_run_at_lower_ranks_are_found_by_rank(tmp_path):
    for name in ("eval", "eval-base", "eval-rank-10", "eval-rank-2", "eval-rank-9", "eval-rank-best"):
        (tmp_path / name).mkdir()
        if name != "eval-rank-9":  # which has not been scored yet
            (tmp_path / name / "metrics.json").write_text("{}")
    assert RunDirectory(tmp_path).evaluations_at_ranks() == [tmp_path / "eval-rank-2", tmp_path / "eval-rank-10"]
