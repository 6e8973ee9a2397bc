"""A run that is killed anywhere and resumed is, to the last bit, the run that was not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer

from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError
from cora_cli.extraction.extract import extract_basis
from cora_cli.models.references import resolve_model
from cora_cli.training import run as run_module
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from tests.methods.helpers import older_factors

from .families import COMMON, EXPERTS
from .helpers import KILLED, RunProcess, assert_b_is_basis, checkpoint_names, config_for, log_lines, losses, record_of

STEPS = 14
# 38 training records in optimizer batches of 2 x 2: ten steps an epoch, of which the last has half a batch; dropout uses up
# random numbers at every step.
LONG = {
    "mode": "tb",
    "test_size": 2.0,
    "max_steps": STEPS,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "dropout": 0.1,
    "save_steps": 4,
}


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_model: Path, tiny_data: Path, tiny_basis: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, Path]:
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    config = config_for(tiny_model, tiny_data, output, basis=str(tiny_basis), **LONG)
    train(config)
    return config, output


def assert_same_run(output: Path, expected: Path) -> None:
    assert log_lines(output) == log_lines(expected)
    assert [line["step"] for line in log_lines(output)] == list(range(1, STEPS + 1))
    speed, tokens = record_of(output)["speed"], record_of(expected)["speed"]["tokens"]
    assert (speed["steps"], speed["tokens"]) == (STEPS, tokens), "the speed is that of all sessions"
    assert tokens == sum(line["tokens"] for line in log_lines(expected)) > 0
    assert (output / "heldout.jsonl").read_bytes() == (expected / "heldout.jsonl").read_bytes()
    found, wanted = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (output, expected))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("kill_at", "settings", "continued_from"),
    [
        pytest.param(
            ("cora_cli.training.trainer.append_line", 2), {}, 0, id="before the first checkpoint", marks=pytest.mark.slow
        ),
        pytest.param(("cora_cli.training.trainer.append_line", 7), {}, 4, id="in the middle of an epoch"),
        pytest.param(("cora_cli.training.trainer.append_line", 14), {}, 12, id="in the second epoch", marks=pytest.mark.slow),
        pytest.param(
            ("cora_cli.training.trainer.append_line", 12),
            {"save_steps": 5},
            10,
            id="after a checkpoint between epochs",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("transformers.Trainer._save_optimizer_and_scheduler", 2),
            {},
            4,
            id="in a half-written checkpoint",
            marks=pytest.mark.slow,
        ),
        pytest.param(("pathlib.Path.rename", 2), {}, 4, id="before a checkpoint gets its name", marks=pytest.mark.slow),
        pytest.param(("shutil.rmtree", 2), {"keep_checkpoints": 1}, 8, id="while an old checkpoint is removed"),
        pytest.param(("cora_cli.training.run._save_result", 1), {}, 14, id="after the last step", marks=pytest.mark.slow),
        pytest.param(
            ("cora_cli.adapters.storage.save_file", 1), {}, 14, id="while the adapter is written", marks=pytest.mark.slow
        ),
    ],
)
def test_killed_run_resumes_to_the_same_bits(
    kill_at: tuple[str, int],
    settings: dict[str, Any],
    continued_from: int,
    uninterrupted: tuple[TrainConfig, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, expected = uninterrupted
    config = replace(config, output_dir=str(tmp_path / "run"), **settings)
    assert RunProcess(config, kill_at=kill_at).wait() == (KILLED, "")
    assert not (tmp_path / "run" / "adapter").exists()
    assert record_of(tmp_path / "run")["status"] == "running"

    record = train(replace(config, resume=True))

    resumed = f"resuming after step {continued_from}" in capsys.readouterr().err
    assert resumed == (continued_from > 0)
    assert (record["status"], record["resumed"]) == ("finished", 1)
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.slow
def test_a_resumed_run_may_be_killed_again(uninterrupted: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, expected = uninterrupted
    config = replace(config, output_dir=str(tmp_path / "run"))
    log = tmp_path / "run" / "log.jsonl"
    assert RunProcess(config, kill_at=("cora_cli.training.trainer.append_line", 6)).wait()[0] == KILLED
    with log.open("a") as file:
        file.write('{"step": 6, "epoch": 0.6, "lo')
    again = replace(config, resume=True)
    assert RunProcess(again, kill_at=("cora_cli.training.trainer.append_line", 6)).wait()[0] == KILLED
    assert [line["step"] for line in log_lines(tmp_path / "run")] == list(range(1, 10))

    assert train(again)["resumed"] == 2
    assert_same_run(tmp_path / "run", expected)


def test_a_run_that_goes_on_with_other_versions_or_elsewhere_records_those_that_it_began_with(
    uninterrupted: tuple[TrainConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = uninterrupted
    shutil.copytree(output, tmp_path / "run")
    record = record_of(output)
    began = {"versions": {**record["versions"], "torch": "1.0"}, "hardware": {**record["hardware"], "threads": 99}}
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "interrupted", **began}))
    for _ in range(2):  # however often it is resumed
        found = train(replace(config, output_dir=str(tmp_path / "run"), resume=True))
        assert (found["versions"], found["versions_before"]) == (record["versions"], {"torch": "1.0"})
        assert (found["hardware"], found["hardware_before"]) == (record["hardware"], [began["hardware"]])
        (tmp_path / "run" / "run.json").write_text(json.dumps({**found, "status": "interrupted"}))
    assert f"was begun with torch 1.0 (now {record['versions']['torch']})" in capsys.readouterr().err


@pytest.mark.slow
def test_a_kept_checkpoint_interval_is_that_of_the_resumption(uninterrupted: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, _ = uninterrupted
    config = replace(config, output_dir=str(tmp_path / "run"))
    assert RunProcess(config, kill_at=("cora_cli.training.trainer.append_line", 6)).wait()[0] == KILLED

    train(replace(config, resume=True, save_steps=3, keep_checkpoints=10))

    assert checkpoint_names(tmp_path / "run") == [f"checkpoint-{step}" for step in (12, 14, 4, 6, 9)]


@pytest.mark.slow
def test_fb_keeps_b_and_full_its_losses_when_resumed(
    tiny_model: Path, tiny_data: Path, tiny_basis: Path, tmp_path: Path
) -> None:
    common = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
    for mode, basis in (("fb", str(tiny_basis)), ("full", None)):
        whole = config_for(tiny_model, tiny_data, tmp_path / f"{mode}-whole", mode=mode, basis=basis, **common)
        train(whole)
        config = replace(whole, output_dir=str(tmp_path / mode))
        assert RunProcess(config, kill_at=("cora_cli.training.trainer.append_line", 4)).wait()[0] == KILLED
        train(replace(config, resume=True))
        assert log_lines(tmp_path / mode) == log_lines(tmp_path / f"{mode}-whole")
    assert_b_is_basis(tmp_path / "fb", tiny_basis)


@pytest.mark.parametrize("flip", [pytest.param("lora_B", marks=pytest.mark.slow), "q_proj.base_layer"])
def test_the_trained_set_is_asserted_again_on_resume(
    flip: str, tiny_model: Path, tiny_data: Path, tiny_basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="fb", basis=str(tiny_basis), save_steps=1)
    monkeypatch.setattr(run_module, "_save_result", lambda *_: (_ for _ in ()).throw(CoraError("stopped")))
    with pytest.raises(CoraError, match="stopped"):
        train(config)
    monkeypatch.undo()
    original = Trainer._load_from_checkpoint

    def flipping(self: Trainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if flip in name:
                parameter.requires_grad_(True)

    monkeypatch.setattr(Trainer, "_load_from_checkpoint", flipping)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-3")

    if flip == "lora_B":
        assert train(replace(config, resume=True))["parameters"]["trained"] == 1536
        assert_b_is_basis(tmp_path / "run", tiny_basis)
    else:
        with pytest.raises(
            CoraError, match=r"mode fb does not train the parameters it should: 2 differ, such as \S+base_layer"
        ):
            train(replace(config, resume=True))
        assert log_lines(tmp_path / "run")[-1]["step"] == 2


def test_resuming_a_finished_run_does_nothing(
    uninterrupted: tuple[TrainConfig, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    monkeypatch.setattr(run_module, "assemble", lambda *_: pytest.fail("a model was loaded"))

    assert train(replace(config, resume=True)) == record_of(output)

    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert "already finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 5e-3}, r"learning_rate \(0.01 in the run, 0.005 now\)"),
        ({"seed": 1, "rank": 2}, r"rank \(4 in the run, 2 now\), seed \(0 in the run, 1 now\)"),
        ({"split_seed": 1}, "data_sha256 .*, split_seed"),
        ({"dtype": "bf16"}, r"dtype \(fp32 in the run, bf16 now\)"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(
    changes: dict[str, Any], named: str, uninterrupted: tuple[TrainConfig, Path]
) -> None:
    config, output = uninterrupted
    with pytest.raises(CoraError, match=f"cannot be resumed with other inputs than it was started with: {named}"):
        train(replace(config, resume=True, **changes))
    assert record_of(output)["status"] == "finished"


def test_a_run_that_lacks_memory_goes_on_with_gradient_checkpointing(
    uninterrupted: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    config, expected = uninterrupted
    output = Path(shutil.copytree(expected, tmp_path / "run"))
    for name in ("adapter", f"checkpoints/checkpoint-{STEPS}"):
        shutil.rmtree(output / name)
    (output / "run.json").write_text(json.dumps({**record_of(output), "status": "running"}))
    record = train(replace(config, output_dir=str(output), resume=True, gradient_checkpointing=True))
    assert record["fingerprint"]["settings"]["gradient_checkpointing"]
    assert losses(output) == pytest.approx(losses(expected), rel=1e-5)


def test_resuming_with_another_number_of_processes_is_refused_since_each_adds_its_own_batch(
    uninterrupted: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    config, output = uninterrupted
    shutil.copytree(output, tmp_path / "run")
    record = record_of(output)
    record["hardware"]["processes"] = 2
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(CoraError, match=r"with other inputs than it was started with: processes \(2 in the run, 1 now\)$"):
        train(replace(config, output_dir=str(tmp_path / "run"), resume=True))


def test_a_run_of_lora_xs_goes_on_with_the_factors_in_its_checkpoint(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions had Σ in the other frozen factor."""
    config = config_for(tiny_model, tiny_data, tmp_path / "expected", mode="lora-xs", rank=4, max_steps=4, save_steps=2)
    with monkeypatch.context() as earlier:
        earlier.setattr("cora_cli.methods.parts.singular.principal_factors", older_factors)
        train(config)
        config = replace(config, output_dir=str(tmp_path / "run"))
        shutil.copytree(tmp_path / "expected", tmp_path / "run")
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record_of(tmp_path / "run"), "status": "running"}))
    train(replace(config, resume=True))
    found, wanted = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("run", "expected"))
    assert all(torch.allclose(found[key], wanted[key], atol=1e-7) for key in wanted)


def test_a_run_goes_on_with_layers_whose_names_a_rule_for_names_in_files_fits(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """PEFT would rename Laguna's `shared_experts`, and so drop their factors in a checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    settings = {**COMMON, **EXPERTS, "num_attention_heads_per_layer": None, "mlp_layer_types": ["sparse", "sparse"]}
    base = AutoConfig.for_model("laguna", **settings | {"vocab_size": len(tokenizer), "max_position_embeddings": 512})
    AutoModelForCausalLM.from_config(base).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = config_for(
        tmp_path / "model", tiny_data, tmp_path / "run", target_modules=("shared_experts.down_proj",), max_steps=4, save_steps=2
    )
    train(config)
    wanted = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record_of(tmp_path / "run"), "status": "running"}))
    train(replace(config, resume=True))
    found = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("what", ["model", "data", "basis"])
def test_resuming_with_other_inputs_under_the_same_name_is_refused(
    what: str, tiny_model: Path, tiny_data: Path, uninterrupted: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    paths = {"model": tmp_path / "model", "data": tmp_path / "data.jsonl", "basis": tmp_path / "basis.safetensors"}
    shutil.copytree(tiny_model, paths["model"])
    shutil.copy(tiny_data, paths["data"])
    shutil.copy(str(uninterrupted[0].basis), paths["basis"])
    config = config_for(paths["model"], paths["data"], tmp_path / "run", mode="fb", basis=str(paths["basis"]), max_steps=1)
    train(config)
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record_of(tmp_path / "run"), "status": "running"}))
    if what == "model":
        weights = load_file(paths["model"] / "model.safetensors")
        weights["model.norm.weight"] *= 2
        save_file(weights, paths["model"] / "model.safetensors", metadata={"format": "pt"})
    elif what == "data":
        paths["data"].write_text(paths["data"].read_text().replace("Count to 7.", "Count up to 7."))
    else:
        extract_basis(
            [resolve_model(str(paths["model"]))], paths["basis"], BasisChoices(rank=6), None, torch.device("cpu"), True
        )

    with pytest.raises(
        CoraError,
        match=rf"other inputs than it was started with: {what}_sha256 \([0-9a-f]{{64}} in the run, [0-9a-f]{{64}} now\)$",
    ):
        train(replace(config, resume=True))


def test_another_run_is_refused_without_resume_and_left_alone(uninterrupted: tuple[TrainConfig, Path]) -> None:
    config, output = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(CoraError, match="already contains a run; choose a new directory, or continue that run with --resume"):
        train(config)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_with_foreign_files_is_refused_and_left_alone(
    resume: bool, uninterrupted: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CoraError, match="contains other files; choose a new or empty directory"):
        train(replace(uninterrupted[0], output_dir=str(tmp_path), resume=resume))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_starts_a_run_that_is_not_there(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    record = train(config_for(tiny_model, tiny_data, tmp_path / "run", max_steps=1, resume=True))
    assert record["status"] == "finished"
    assert "resumed" not in record


def test_a_run_that_an_earlier_version_began_keeps_its_warm_up(tiny_model, tiny_data, tmp_path, monkeypatch):
    """Earlier versions rounded the warm-up down and did not record it."""
    output = tmp_path / "run"
    config = config_for(tiny_model, tiny_data, output, max_steps=7, warmup_ratio=0.2, save_steps=3)
    with monkeypatch.context() as earlier:
        earlier.setattr("cora_cli.training.arguments.warmup_steps", lambda ratio, steps: int(ratio * steps))
        train(config)
    expected = log_lines(output)
    record = record_of(output)
    assert record.pop("warmup_steps") == 1
    for _ in range(2):
        (output / "run.json").write_text(json.dumps({**record, "status": "running"}))
        shutil.rmtree(output / "adapter")
        shutil.rmtree(output / "checkpoints" / "checkpoint-7")
        record = train(replace(config, resume=True))
        assert record["warmup_steps"] == 1
        assert log_lines(output) == expected


def test_a_run_is_not_resumed_with_another_chat_template(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = config_for(model, tiny_data, tmp_path / "run", max_steps=1)
    record = train(config)
    template = model / "chat_template.jinja"
    template.write_text("Answer. " + template.read_text())
    with pytest.raises(CoraError, match=r"cannot be resumed with other inputs .*: tokenizer_sha256 \("):
        train(replace(config, resume=True))
    del record["fingerprint"]["tokenizer_sha256"]  # as earlier versions wrote it
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert train(replace(config, resume=True))["status"] == "finished"


@pytest.mark.parametrize(
    "recorded", [pytest.param(True, marks=pytest.mark.slow), False], ids=["recorded", "begun by an earlier version"]
)
def test_a_run_resumed_on_another_day_keeps_the_date_in_its_prompts(
    recorded: bool, dated_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    config = config_for(dated_model, tiny_data, output, max_steps=4, save_steps=2)
    monkeypatch.setattr("cora_cli.data.templates.today", lambda: "2030-01-01")
    record = train(config)
    assert record["data"]["template_date"] == record["fingerprint"]["settings"]["template_date"] == "2030-01-01"
    expected = log_lines(output)

    record |= {"status": "running", "started": "2030-01-01T12:00:00+00:00"}
    if not recorded:
        del record["data"]["template_date"], record["fingerprint"]["settings"]["template_date"]
    (output / "run.json").write_text(json.dumps(record))
    shutil.rmtree(output / "adapter")
    shutil.rmtree(output / "checkpoints" / "checkpoint-4")
    monkeypatch.setattr("cora_cli.data.templates.today", lambda: "2030-01-02")
    with pytest.raises(CoraError, match=r"template_date \(2030-01-01 in the run, 2030-01-02 now\)"):
        train(replace(config, resume=True, template_date="2030-01-02"))
    assert train(replace(config, resume=True))["data"]["template_date"] == "2030-01-01"
    assert log_lines(output) == expected


def test_a_run_is_repeated_on_another_day_from_its_configuration(
    dated_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cora_cli.data.templates.today", lambda: "2030-01-01")
    train(config_for(dated_model, tiny_data, tmp_path / "run", max_steps=1))
    date = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["template_date"]
    monkeypatch.setattr("cora_cli.data.templates.today", lambda: "2030-01-02")
    for name, given in (("again", {"template_date": date}), ("other", {})):
        train(config_for(dated_model, tiny_data, tmp_path / name, max_steps=1, **given))
    assert log_lines(tmp_path / "again") == log_lines(tmp_path / "run") != log_lines(tmp_path / "other")


def test_a_resumption_says_how_many_steps_its_log_has_lost(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", max_steps=4, validation_size=4, eval_steps=1)
    train(replace(config, stop_at=2))
    log = tmp_path / "run" / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"step": 1,' not in line or "heldout_loss" in line))
    train(replace(config, resume=True))
    assert [line["step"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line] == [2, 3, 4]
    assert (
        "log.jsonl has lost 1 of 2 steps: the speed in run.json and the curve in reports will lack them"
        in capsys.readouterr().err
    )


def test_the_configuration_of_a_run_names_its_directory_wherever_it_is_given(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(config_for(tiny_model, tiny_data, Path("run"), max_steps=1))
    assert yaml.safe_load(Path("run", "config.yaml").read_text())["output_dir"] == str(tmp_path / "run")


def test_a_date_is_refused_where_the_template_writes_none(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(CoraError, match=r"--template-date has no effect: the template chat of .* writes no date"):
        train(config_for(tiny_model, tiny_data, tmp_path / "run", template_date="2030-01-01"))
    assert not (tmp_path / "run").exists()
