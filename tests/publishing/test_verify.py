"""`cora verify`: hashes, losses and metrics are computed again, and the file that is not as recorded is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cora_cli import hashing, writing
from cora_cli.cli import app
from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics import score_all
from cora_cli.evaluation.metrics.pass_at import Attempts
from cora_cli.publishing.verify import verify
from cora_cli.reading import read_json, read_jsonl
from tests.evaluation.helpers import evaluate_run, unsealed


def test_a_run_as_it_was_written_passes(finished: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(finished)])
    assert result.exit_code == 0, result.stderr
    assert f"{finished}/adapter: 3 files with the recorded hash" in result.stdout
    assert "heldout.jsonl: gives the recorded losses before and after training" in result.stdout
    assert f"{finished}/eval: rouge1, rougeL, sacrebleu, nll of 4 predictions computed again, as recorded" in result.stdout
    assert "config.yaml: the recorded settings" in result.stdout
    assert result.stdout.endswith(f"{finished} is as recorded\n")


def test_settings_without_the_file_to_compare_them_with_are_said(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "config.yaml").unlink()
    result = CliRunner().invoke(app, ["verify", str(run)])
    assert (result.exit_code, "config.yaml: missing, so the settings in run.json were" in result.stdout) == (0, True)


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])


def other_loss(path: Path) -> None:
    record = unsealed(path)
    record["heldout"]["after"]["loss"] += 0.01
    writing.write_json(path, record)


def edited(*place: str, by: Any) -> Callable[[Path], None]:
    """Changes one entry of a JSON file."""

    def damage(path: Path) -> None:
        record = part = unsealed(path)
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = by
        writing.write_json(path, record)

    return damage


def other_value(path: Path) -> None:
    record = unsealed(path)
    record["metrics"]["rougeL"]["value"] += 0.01
    writing.write_json(path, record)


def other_interval(path: Path) -> None:
    record = unsealed(path)
    record["metrics"]["rougeL"]["ci95"][0] -= 0.01
    writing.write_json(path, record)


def better_scores(path: Path) -> None:
    """Raise the scores and the value in the record alike, so that the one gives the other."""
    lines = read_jsonl(path)
    writing.write_jsonl(path, [{**line, "rouge1": line["rouge1"] + 0.1} for line in lines])
    metrics = path.with_name("metrics.json")
    record = unsealed(metrics)
    record["metrics"]["rouge1"]["value"] = sum(line["rouge1"] + 0.1 for line in lines) / len(lines)
    record["scores_sha256"] = hashing.sha256_file(path)
    writing.write_json(metrics, record)


def other_order(path: Path) -> None:
    """The same records, so the same means, but each stands in the place of another."""
    path.write_text("".join(reversed(path.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")


def other_mode(path: Path) -> None:
    writing.write_json(path, {**unsealed(path), "mode": "full"})


def no_rouge1(path: Path) -> None:
    record = unsealed(path)
    del record["metrics"]["rouge1"]
    writing.write_json(path, record)


def sealed_interval(path: Path) -> None:
    record = read_json(path)
    record["metrics"]["rougeL"]["ci95"] = None
    writing.write_json(path, record)


def impossible_bootstrap(entry: str, value: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        record = unsealed(path)
        writing.write_json(path, {**record, "bootstrap": {**record["bootstrap"], entry: value}})

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("adapter/adapter_model.safetensors", flip, "adapter/adapter_model.safetensors was changed after its training"),
        ("adapter/adapter_config.json", Path.unlink, "adapter/adapter_config.json is missing"),
        ("test.jsonl", flip, "test.jsonl was changed after it was written"),
        ("test.jsonl", Path.unlink, "test.jsonl is missing"),
        ("log.jsonl", flip, "log.jsonl was changed after the training wrote it"),
        ("log.jsonl", Path.unlink, "log.jsonl does not exist, although the training wrote it"),
        ("trained_prompts.txt", flip, "trained_prompts.txt was changed after it was written"),
        ("heldout.jsonl", other_order, "heldout.jsonl was altered after it was written: it does not have the hash in run.json"),
        (
            "eval/scores.jsonl",
            other_order,
            "eval/scores.jsonl was altered after it was written: it does not have the hash in metrics.json",
        ),
        (
            "run.json",
            other_mode,
            "run.json was changed after it was written: its mode is full, but the run was trained with lora",
        ),
        ("run.json", other_loss, "heldout.jsonl was altered after it was written"),
        (
            "run.json",
            edited("heldout", "after", "ci95", by=[0.1, 0.2]),
            "its heldout.after.ci95 is [0.1, 0.2], but heldout.jsonl",
        ),
        (
            "run.json",
            edited("heldout", "change", "value", by=-1.0),
            "its heldout.change.value is -1.0, but heldout.jsonl gives",
        ),
        ("run.json", edited("heldout", "before", "tokens", by=1), "its heldout.before.tokens is 1, but heldout.jsonl gives"),
        ("run.json", edited("plan", "rank", by=64), "its plan is not the one in"),
        (
            "run.json",
            edited("fingerprint", "settings", "learning_rate", by=0.5),
            "config.yaml have another learning_rate (0.5 and ",
        ),
        ("eval/metrics.json", edited("generation", "settings", by={}), "metrics.json have another settings"),
        ("eval/generation.json", edited("seconds", by=0.1), "metrics.json have another seconds"),
        ("eval/predictions.jsonl", flip, "eval/predictions.jsonl was altered after it was scored"),
        ("eval/metrics.json", other_value, "eval/scores.jsonl was altered"),
        ("eval/metrics.json", sealed_interval, "eval/metrics.json was changed after it was written"),
        ("eval/metrics.json", other_interval, "eval/metrics.json does not hold the interval of rougeL that"),
        ("eval/metrics.json", impossible_bootstrap("resamples", 10**9), "no intervals come from 1000000000 resamples"),
        (
            "eval/metrics.json",
            impossible_bootstrap("seed", -1),
            "eval/metrics.json was changed after it was written: no intervals come",
        ),
        (
            "eval/metrics.json",
            edited("bootstrap", by={}),
            "eval/metrics.json is damaged or from another version of cora: bootstrap.",
        ),
        ("eval/metrics.json", no_rouge1, "eval/metrics.json was changed after it was written: it has no rouge1"),
        ("eval/scores.jsonl", better_scores, "eval/metrics.json does not hold the rouge1 that"),
    ],
)
def test_what_is_not_as_recorded_is_named(run: Path, name: str, damage: Callable[[Path], Any], says: str) -> None:
    damage(run / name)
    result = CliRunner().invoke(app, ["verify", str(run)])
    assert result.exit_code == 1
    assert says in result.stderr
    assert "cora: error: " in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("eval/metrics.json", edited("generation", "settings", "decoding", by=None), "metrics.json have another settings"),
        (
            "eval/metrics.json",
            edited("generation", "settings", "adapter_sha256", by=None),
            "metrics.json have another settings",
        ),
        ("eval/generation.json", edited("seconds", by=0.1), "metrics.json have another seconds"),
        ("eval/metrics.json", no_rouge1, "metrics.json was changed after it was written: it has no rouge1"),
        ("eval/metrics.json", sealed_interval, "metrics.json was changed after it was written"),
        (
            "run.json",
            edited("heldout", "after", "ci95", by=[0.1, 0.2]),
            "its heldout.after.ci95 is [0.1, 0.2], but heldout.jsonl",
        ),
        ("run.json", edited("heldout", "before", "tokens", by=1), "its heldout.before.tokens is 1, but heldout.jsonl"),
    ],
)
def test_a_report_names_what_is_not_as_recorded_too(run: Path, name: str, damage: Callable[[Path], Any], says: str) -> None:
    damage(run / name)
    result = CliRunner().invoke(app, ["report", str((run / name).parent)])
    assert result.exit_code == 1
    assert says in result.stderr


def test_an_evaluation_is_verified_alone(finished: Path) -> None:
    assert len(verify(finished / "eval")) == 1


@pytest.mark.slow
def test_every_metric_of_texts_is_computed_again(run: Path) -> None:
    evaluate_run(run, metrics=("rouge1", "meteor", "sacrebleu", "bertscore_f1"), output_dir=str(run / "all"))
    assert f"{run}/all: rouge1, meteor, sacrebleu, bertscore_f1 of 4 predictions computed again, as recorded" in verify(run)


def test_pass_at_k_follows_from_the_stored_fates(run: Path) -> None:
    out, fates = run / "eval", [["passed", "failed"], ["failed"] * 2, ["passed"] * 2, ["failed", "passed"]]
    lines = read_jsonl(out / "predictions.jsonl")
    attempts = Attempts([2] * 4, [one.count("passed") for one in fates], "limit:1s|sandbox:none|python:3")
    texts = [line["prediction"] for line in lines], [line["reference"] for line in lines]
    scored = score_all(["pass@1"], *texts, bootstrap=100, attempts=attempts)
    writing.write_jsonl(out / "scores.jsonl", [{"pass@1": value} for value in scored.per_example["pass@1"]])
    record = unsealed(out / "metrics.json") | {"scores_sha256": hashing.sha256_file(out / "scores.jsonl")}
    writing.write_json(out / "metrics.json", {**record, "metrics": scored.metrics})
    programs = [{"limit_seconds": 1, "programs": [{"fate": fate, "detail": ""} for fate in one]} for one in fates]
    writing.write_jsonl(out / "executions.jsonl", programs)
    assert verify(out) == [f"{out}: pass@1 of 4 predictions computed again, as recorded"]
    programs[1]["programs"][0]["fate"] = "passed"
    writing.write_jsonl(out / "executions.jsonl", programs)
    with pytest.raises(CoraError, match="does not hold the pass@1"):
        verify(out)


def test_a_metric_that_only_a_download_could_compute_is_said_to_be_left_out(run: Path) -> None:
    path = run / "eval" / "metrics.json"
    record = unsealed(path)
    value = record["metrics"].pop("rouge1")
    value["signature"] = "bertscore_f1|encoder:org/encoder@abc|layer:17|bs:100"
    record["metrics"] = {"bertscore_f1": value, **record["metrics"]}
    scores = run / "eval" / "scores.jsonl"
    scores.write_text(scores.read_text(encoding="utf-8").replace('"rouge1"', '"bertscore_f1"'), encoding="utf-8")
    writing.write_json(path, {**record, "scores_sha256": hashing.sha256_file(scores)})
    found = "\n".join(verify(run))
    assert "bertscore_f1 not computed again, since the encoder org/encoder@abc is not on this disk" in found
    assert "rougeL, sacrebleu, nll of 4 predictions computed again" in found


def test_other_versions_are_said_where_the_values_agree(run: Path) -> None:
    path = run / "eval" / "metrics.json"
    record = unsealed(path)
    record["metrics"]["rouge1"]["signature"] += "|version:0"
    writing.write_json(path, record)
    assert "rouge1 is as recorded, although it was measured with other versions" in "\n".join(verify(run))


def test_a_metric_that_this_version_does_not_have_is_said_to_be_left_out(run: Path) -> None:
    place = run / "eval" / "metrics.json"
    record = unsealed(place)
    scores = read_jsonl(place.with_name("scores.jsonl"))
    writing.write_jsonl(place.with_name("scores.jsonl"), [{**line, "charm": line["rouge1"]} for line in scores])
    record["metrics"]["charm"] = record["metrics"]["rouge1"]
    record["scores_sha256"] = hashing.sha256_file(place.with_name("scores.jsonl"))
    writing.write_json(place, record)
    assert f"{run / 'eval'}: charm is no metric of this version, so not computed again" in verify(run / "eval")


@pytest.mark.parametrize("evaluated", ["0" * 64, None])  # None: the base model without an adapter
def test_an_evaluation_of_other_weights_in_the_run_is_refused(run: Path, evaluated: str | None) -> None:
    generation, metrics = run / "eval" / "generation.json", run / "eval" / "metrics.json"
    record = json.loads(generation.read_text(encoding="utf-8"))
    record["settings"]["adapter_sha256"] = evaluated
    writing.write_json(generation, record)
    writing.write_json(metrics, {**unsealed(metrics), "generation": record})
    with pytest.raises(CoraError, match=r"eval is an evaluation of other weights than .*--overwrite`"):
        verify(run)


def test_a_run_that_is_not_finished_and_other_folders_are_refused(run: Path, tmp_path: Path) -> None:
    writing.write_json(run / "run.json", {**unsealed(run / "run.json"), "status": "running"})
    with pytest.raises(CoraError, match=r"is not finished \(status running\)"):
        verify(run)
    with pytest.raises(CoraError, match=r"holds neither run\.json nor metrics\.json"):
        verify(tmp_path)
    with pytest.raises(CoraError, match="is not a directory"):
        verify(tmp_path / "none")
