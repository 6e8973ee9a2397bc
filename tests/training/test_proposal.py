"""`--learning-rate auto`: the rate that follows from a curvature, the constant against its measurement, and the run that is trained with it."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cora_cli import writing
from cora_cli.errors import CoraError, UsageError
from cora_cli.reading import read_json
from cora_cli.records import read_probe, read_run
from cora_cli.rundir import RunDirectory
from cora_cli.training import probe, proposal
from cora_cli.training.config import TrainConfig
from cora_cli.training.preflight import preflight
from cora_cli.training.preflight_text import describe
from cora_cli.training.proposal import CONSTANT, EXAMPLES, FAR, METHODS, NEAR, PRODUCTS, proposed_rate, rate_in, rounded
from cora_cli.training.run import train

from .helpers import config_for

MEASURED = json.loads((Path(__file__).parents[2] / "docs" / "results" / "rates.json").read_text())


@given(st.floats(1e-12, 1e12))
def test_a_proposal_is_the_constant_over_the_root_up_to_its_rounding(curvature):
    rate = proposed_rate(curvature)
    assert abs(math.log(rate * math.sqrt(curvature) / CONSTANT)) <= math.log(5 / 3) / 2 + 1e-9, "3 and 5 are the furthest apart"
    assert rounded(rate) == rate
    assert proposed_rate(100 * curvature) == pytest.approx(rate / 10)


def test_rounded_rates_are_those_that_people_write():
    assert [rounded(rate) for rate in (1.1e-3, 1.3e-3, 1.74e-3, 2.4e-3, 2.5e-3, 4e-4, 6e-4, 8.3e-4, 8.4e-4, 9.9)] == [
        *(1e-3, 1.5e-3, 2e-3, 2e-3, 3e-3, 5e-4, 7e-4, 7e-4, 1e-3, 10.0)
    ]


@pytest.mark.parametrize("curvature", [0.0, -3.0, math.nan, math.inf])
def test_a_loss_that_curves_upwards_nowhere_proposes_nothing(curvature):
    with pytest.raises(CoraError, match=r"needs a loss that curves upwards, and its largest eigenvalue is .*; give a number"):
        proposed_rate(curvature)


def test_the_constant_and_the_methods_that_it_fails_are_those_of_the_measurement():
    judged = MEASURED["all methods"]
    assert pytest.approx(judged["constant"], rel=1e-3) == CONSTANT
    found = judged["leave_one_out"]["auto"]
    steps = found["steps_from_best"]
    assert {label for label, step in steps.items() if abs(step) > 1 + 1e-9} == FAR
    assert (judged["methods"], judged["methods"] - len(FAR)) == (METHODS, NEAR)
    assert found["within_one_step"] >= MEASURED["enough"] > judged["leave_one_out"]["no curvature"]["within_one_step"]
    assert MEASURED["probe"]["examples"] == EXAMPLES
    assert max(one["products"] for one in MEASURED["measures"].values()) == PRODUCTS
    planned = [one["planned_rates"] for one in MEASURED["measures"].values()]
    assert all(
        (last / first) ** (1 / (len(rates) - 1)) == pytest.approx(proposal.STEP)
        for rates in planned
        for first, *_, last in [rates]
    )


def test_a_run_trains_with_the_rate_that_its_own_curvature_proposes(tiny_model, tiny_data, tmp_path):
    config = config_for(tiny_model, tiny_data, tmp_path / "auto", learning_rate="auto", max_steps=2)
    record = train(config)
    found = record["proposal"]
    rate = record["fingerprint"]["settings"]["learning_rate"]
    assert rate == found["learning_rate"] == proposed_rate(found["largest_eigenvalue"])
    assert (found["examples"], found["constant"]) == (EXAMPLES, CONSTANT)
    train(dataclasses.replace(config, learning_rate=rate, output_dir=str(tmp_path / "number")))
    auto, number = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("auto", "number"))
    assert all(torch.equal(auto[name], number[name]) for name in number)
    assert "learning_rate: auto" not in (tmp_path / "auto" / "config.yaml").read_text()


def test_a_larger_scale_of_the_adapter_curves_the_loss_more_and_lowers_the_rate(tiny_model, tiny_data, tmp_path):
    small, large = (
        probe.propose(config_for(tiny_model, tiny_data, tmp_path / "run", learning_rate="auto", alpha=alpha))
        for alpha in (8.0, 128.0)
    )
    assert large["largest_eigenvalue"] > small["largest_eigenvalue"] > 0
    assert large["learning_rate"] < small["learning_rate"]
    assert not (tmp_path / "run").exists(), "a proposal alone writes nothing"


def test_a_resumed_run_keeps_its_rate_without_measuring_again(tiny_model, tiny_data, tmp_path, monkeypatch):
    config = config_for(tiny_model, tiny_data, tmp_path / "run", learning_rate="auto", validation_size=2, save_steps=1)
    first = train(dataclasses.replace(config, stop_at=1))
    monkeypatch.setattr(probe, "propose", lambda _: pytest.fail("measured again"))
    record = train(dataclasses.replace(config, resume=True))
    assert record["status"] == "finished"
    assert record["proposal"] == first["proposal"]
    assert read_run(RunDirectory(tmp_path / "run"))["proposal"] == first["proposal"]
    train(dataclasses.replace(config, resume=True, learning_rate=first["proposal"]["learning_rate"]))
    with pytest.raises(CoraError, match="already contains a run"):
        train(config)


def test_a_run_of_a_number_is_not_resumed_with_a_proposal(tiny_model, tiny_data, tmp_path):
    config = config_for(tiny_model, tiny_data, tmp_path / "run", max_steps=1)
    train(config)
    with pytest.raises(CoraError, match=r"was begun with --learning-rate 0\.01, not auto; resume it with that"):
        train(dataclasses.replace(config, resume=True, learning_rate="auto"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "full"}, "--learning-rate auto does not go with mode full: it was measured on adapters; give a number"),
        ({"load_in_4bit": True}, "--learning-rate auto does not go with --load-in-4bit"),
        ({"shard": "fsdp"}, "--learning-rate auto does not go with --shard"),
        (
            {"probe": "p", "probe_examples": 9},
            "--learning-rate auto does not go with --probe-examples: it has examples of its own",
        ),
    ],
)
def test_what_a_proposal_does_not_go_with_is_refused_by_name(changes, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(model="m", dataset="d", output_dir="o", **{"mode": "lora", "learning_rate": "auto", **changes})


def test_too_few_examples_and_several_processes_are_refused_before_anything_is_written(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    config = config_for(tiny_model, tiny_data, tmp_path / "run", learning_rate="auto", limit=3)
    with pytest.raises(
        CoraError, match="--learning-rate auto, which measures 4, needs as many training examples, and there are 3"
    ):
        train(config)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CoraError, match="--learning-rate auto measures in one process, not in 2"):
        probe.propose(dataclasses.replace(config, limit=None))
    assert not (tmp_path / "run").exists()


def test_a_method_whose_best_rate_lay_elsewhere_is_named():
    found = {"learning_rate": 2e-3, "largest_eigenvalue": 2.4}
    assert "for 41 of 46 methods, the best rate of a sweep lay within a factor of 3.2" in proposal.describe(found, "lora")
    assert "mode lori is one of the 5 of 46 methods whose best rate lay further" in proposal.describe(found, "lori")


def test_a_dry_run_says_what_measuring_takes(tiny_model, tiny_data, tmp_path):
    config = config_for(tiny_model, tiny_data, tmp_path / "run", dry_run=True, device="cpu", learning_rate="auto")
    plan = preflight(config)
    assert plan.proposing is not None
    number = preflight(dataclasses.replace(config, learning_rate=1e-3))
    assert number.proposing is None
    assert number.measured == plan.measured
    assert "--learning-rate auto takes up to 17 gradients of 4 examples in float32: peak about" in describe(plan)
    assert "--learning-rate auto" not in describe(number)


def test_a_probe_with_auto_writes_the_proposal_of_the_run(tiny_model, tiny_data, tmp_path):
    config = config_for(tiny_model, tiny_data, tmp_path / "run", learning_rate="auto", probe=str(tmp_path / "p.json"))
    record = probe.write_proposal(config)
    assert record["proposal"] == probe.propose(dataclasses.replace(config, probe=None))
    assert record["probe"]["examples"] == EXAMPLES
    rate = record["proposal"]["learning_rate"]
    assert read_probe(tmp_path / "p.json")["fingerprint"]["settings"]["learning_rate"] == rate == rate_in(tmp_path / "p.json")
    assert not (tmp_path / "run").exists()
    probe.write_probe(dataclasses.replace(config, learning_rate=1e-3, probe=str(tmp_path / "without.json"), probe_examples=4))
    with pytest.raises(CoraError, match=r"without\.json .*proposal"):
        rate_in(tmp_path / "without.json")
    found = read_json(tmp_path / "p.json")
    writing.write_json(tmp_path / "p.json", {**found, "proposal": {**found["proposal"], "learning_rate": 2 * rate}})
    with pytest.raises(CoraError, match=r"p\.json was changed after it was written; restore it"):
        rate_in(tmp_path / "p.json")


def test_what_is_left_of_a_run_that_is_replaced_decides_nothing(tiny_model, tiny_data, tmp_path):
    config = config_for(tiny_model, tiny_data, tmp_path / "run", learning_rate="auto", max_steps=1)
    first = train(config)
    for path in (tmp_path / "run").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("run.json", "config.yaml"):
            path.unlink()
    record = tmp_path / "run" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "failed"}))
    again = train(dataclasses.replace(config, alpha=1280.0, resume=True))
    assert again["proposal"]["largest_eigenvalue"] > 10 * first["proposal"]["largest_eigenvalue"]
    assert again["fingerprint"]["settings"]["learning_rate"] == again["proposal"]["learning_rate"]
    assert again["proposal"]["learning_rate"] < first["proposal"]["learning_rate"]


def test_a_method_that_trains_nothing_gets_no_proposal():
    with pytest.raises(UsageError, match="auto does not go with mode mean-delta, which trains nothing here; give a number"):
        TrainConfig(model="m", dataset="d", output_dir="o", mode="mean-delta", start_models=("a",), learning_rate="auto")


def test_a_dry_run_refuses_what_the_run_could_not_measure(tiny_model, tiny_data, tmp_path):
    config = config_for(tiny_model, tiny_data, tmp_path / "run", dry_run=True, device="cpu", learning_rate="auto")
    with pytest.raises(CoraError, match="--learning-rate auto measures in one process, not in 2"):
        preflight(dataclasses.replace(config, processes=2))
    with pytest.raises(CoraError, match="which measures 4, needs as many training examples, and there are 3"):
        preflight(dataclasses.replace(config, limit=3))
