"""`cora publish`: what reaches a hub through the hub's own client, and what is refused before."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from cora_cli import writing
from cora_cli.cli import app
from cora_cli.errors import CoraError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.models.references import resolve_model
from cora_cli.models.trained_on import trained_on
from cora_cli.publishing.publish import files_of
from cora_cli.publishing.verify import verify
from cora_cli.reading import read_json, read_jsonl
from cora_cli.records import write_sealed
from cora_cli.reporting.report import report
from cora_cli.rundir import RunDirectory
from cora_cli.training.run import train
from tests.evaluation.helpers import FAST, evaluate_run, unsealed
from tests.training.helpers import config_for

from .hub import Hub, Repository

IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])


def cora(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_file_that_is_changed_while_it_is_uploaded_is_named(
    finished: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    own = HfApi.create_commit

    def commit(self: HfApi, *args: Any, **named: Any) -> Any:
        done = own(self, *args, **named)
        (run / "test.jsonl").write_text("")
        return done

    monkeypatch.setattr(HfApi, "create_commit", commit)
    result = cora("publish", run, "--to", "org/name")
    assert result.exit_code == 1
    assert "test.jsonl was changed while it was uploaded to org/name" in result.stderr


def test_what_is_published_verifies_and_loads_where_it_lies(finished: Path, hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    result = cora("publish", finished, "--to", "org/name", "--private")
    assert result.exit_code == 0, result.stderr
    assert f"{hub.address}/org/name/commit/" in result.stdout
    found = hub.repositories["org/name"]
    assert found.private
    there = found.download(tmp_path / "there")
    assert {path.name for path in there.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "cora.json", "README.md", "run.json", "config.yaml", "log.jsonl",
        "heldout.jsonl", "test.jsonl", "trained_prompts.txt", "eval", "SHA256SUMS",
    }  # fmt: skip
    sentences = verify(there)
    assert "SHA256SUMS: 14 files with the listed hashes" in sentences
    assert any("rouge1, rougeL, sacrebleu, nll of 4 predictions computed again, as recorded" in each for each in sentences)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, str(there)).eval()
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(finished / "adapter")).eval()
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert trained_on(resolve_model(str(there))).prompts == trained_on(resolve_model(str(finished))).prompts
    text = report([str(there)], "markdown")
    assert text.count("rougeL") == report([str(finished)], "markdown").count("rougeL") > 0


def test_the_card_has_the_evaluation_and_the_name(finished: Path) -> None:
    text = files_of(RunDirectory(finished), "org/name")["README.md"].decode()
    metric = read_json(finished / "eval" / "metrics.json")["metrics"]["rougeL"]
    low, high = metric["ci95"]
    assert f"{metric['value']:.4f} [{low:.4f}, {high:.4f}]" in text
    assert 'PeftModel.from_pretrained(base, "org/name")' in text
    assert "Verdict" not in text


def test_the_card_says_which_scores_say_less_than_they_seem_to(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    lines = read_jsonl(tiny_data)
    writing.write_jsonl(tmp_path / "other.jsonl", [{**line, "output": "你好"} for line in lines])
    held_out = len(read_jsonl(run / "test.jsonl"))
    evaluate_run(run, dataset=str(tmp_path / "other.jsonl"), output_dir=str(run / "again"), metrics=("rouge1",))
    text = files_of(RunDirectory(run), "org/name")["README.md"].decode()
    assert (
        f"again: {len(lines) - held_out} of its {len(lines)} prompts were trained on, so its scores say little about new ones."
        in text
    )
    assert f"again: {len(lines)} of {len(lines)} answers cut at the limit of new tokens." in text
    assert re.search(rf"again: rouge1: {len(lines)} of {len(lines)} references have .*even a perfect answer may score 0", text)


def test_the_card_says_of_which_model_and_answers_scores_are_that_are_not_those_of_the_run_by_itself(
    run: Path, tiny_model: Path, tiny_data: Path
) -> None:
    other = run.parent / "other"
    train(config_for(tiny_model, tiny_data, other, seed=1, max_steps=1))
    evaluate_run(run, with_base=True, metrics=("rouge1", "rougeL", "sacrebleu", "nll"))
    evaluate(EvaluateConfig(runs=(str(run), str(other)), ensemble=True, output_dir=str(run / "both"), **FAST))
    evaluate_run(other, output_dir=str(run / "elsewhere"), metrics=("rouge1",))
    sampled = {"samples": 2, "temperature": 0.5}
    evaluate_run(run, output_dir=str(run / "sampled"), template="alpaca", metrics=("rouge1",), max_new_tokens=3, **sampled)
    evaluate_run(run, output_dir=str(run / "same"), metrics=("rouge1",))
    (run / "copied").mkdir()
    writing.write_jsonl(run / "copied" / "predictions.jsonl", read_jsonl(run / "same" / "predictions.jsonl"))
    evaluate(EvaluateConfig(from_predictions=str(run / "copied" / "predictions.jsonl"), metrics=("rouge1",)))
    text = files_of(RunDirectory(run), "org/name")["README.md"].decode()
    trained = read_json(run / "run.json")["data"]["template"]
    for sentence in (
        "eval-base: its scores are those of the base model.",
        "both: its scores are those of an ensemble of 2 models.",
        "elsewhere: its scores are those of other weights than these.",
        "sampled: its answers were sampled at temperature 0.5, 2 per record, seed 0; of several, text metrics score the first.",
        f"sampled: its prompts are not those of the training (template alpaca, trained with {trained}).",
        "copied: nothing records which model gave its answers.",
    ):
        assert f"\n\n{sentence}\n\n" in text
    assert not re.search(r"^(eval|same): (its|nothing)", text, re.MULTILINE)
    unlike = r"with different settings, from which differences between these scores may come: max\\_new\\_tokens \d+ \(.*eval.*\), 3 \(sampled\)"
    assert re.search(unlike, text)


def test_the_card_says_which_scores_are_of_a_lower_rank_or_of_draws(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    nested, drawn = tmp_path / "nested", tmp_path / "drawn"
    train(config_for(tiny_model, tiny_data, nested, mode="dylora", max_steps=2))
    evaluate_run(nested, ranks=("2",), metrics=("rouge1",))
    train(config_for(tiny_model, tiny_data, drawn, mode="scalabl", max_steps=2))
    evaluate_run(drawn, draws=3, metrics=("rouge1",))
    texts = [files_of(RunDirectory(run), "org/name")["README.md"].decode() for run in (nested, drawn)]
    assert "eval-rank-2: its scores are those of the first 2 of 4 ranks." in texts[0]
    assert "eval: its scores are those of probabilities averaged over 3 draws of the weights, not of their mean." in texts[1]


def test_the_card_says_which_answers_are_of_weights_that_lost_the_change_by_rounding(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    train(config_for(tiny_model, tiny_data, tmp_path / "run", learning_rate=1e-6))
    for name, settings in {"eval": {}, "apart": {"merge": False}, "exact": {"dtype": "fp32"}}.items():
        evaluate_run(
            tmp_path / "run", output_dir=str(tmp_path / "run" / name), **{"dtype": "bf16", "metrics": ("rouge1",), **settings}
        )
    text = files_of(RunDirectory(tmp_path / "run"), "org/name")["README.md"].decode()
    assert re.findall(
        r"^(\w+): its answers are of merged weights, where rounding lost \d+% of the adapter's change\.", text, re.M
    ) == ["eval"]
    computed = r"^(\w+): its answers were computed in bf16, the losses above in fp32\.$"
    assert sorted(re.findall(computed, text, re.MULTILINE)) == ["apart", "eval"]


def written(run: Path, there: Path) -> Path:
    """The published files of a run, in a folder."""
    for name, content in files_of(RunDirectory(run), "org/name").items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return there


def test_hashes_with_a_byte_order_mark_and_windows_line_ends_are_those_of_the_same_files(
    finished: Path, tmp_path: Path
) -> None:
    there = written(finished, tmp_path / "there")
    expected = verify(there)
    sums = there / "SHA256SUMS"
    sums.write_bytes(b"\xef\xbb\xbf" + sums.read_bytes().replace(b"\n", b"\r\n"))
    assert verify(there) == expected


def test_a_changed_byte_in_any_published_file_is_refused_by_its_name(finished: Path, tmp_path: Path) -> None:
    there = written(finished, tmp_path / "there")
    verify(there)
    for path in [path for path in there.rglob("*") if path.is_file()]:
        before = path.read_bytes()
        path.write_bytes(before[:20] + bytes([before[20] ^ 1]) + before[21:])
        named = path.relative_to(there).as_posix() if path.name != "SHA256SUMS" else ""
        with pytest.raises(
            CoraError, match=rf"there/{re.escape(named)}.*(was changed after it was published|expected a SHA-256)"
        ):
            verify(there)
        path.unlink()
        if path.name not in ("SHA256SUMS", "run.json"):
            with pytest.raises(CoraError, match=rf"there/{re.escape(named)} is missing"):
                verify(there)
        path.write_bytes(before)


def test_the_records_can_stay_at_home(finished: Path, hub: Hub, tmp_path: Path) -> None:
    assert cora("publish", finished, "--to", "org/name", "--no-records").exit_code == 0
    files = hub.repositories["org/name"].files
    assert not [name for name in files if name == "test.jsonl" or name.startswith("eval")]
    secret = read_json_line(finished / "test.jsonl")["instruction"].encode()
    assert not [name for name, content in files.items() if secret in content]
    verify(hub.repositories["org/name"].download(tmp_path / "there"))


def read_json_line(path: Path) -> dict[str, str]:
    return json.loads(path.read_text(encoding="utf-8").splitlines()[0])


def test_files_that_are_there_are_replaced_only_on_request(finished: Path, hub: Hub) -> None:
    hub.repositories["org/name"] = Repository(files={"old.bin": b"old"})
    refused = cora("publish", finished, "--to", "org/name")
    assert refused.exit_code == 1
    assert (
        "org/name holds files already, such as old.bin; choose another name, or replace all of them with --overwrite"
        in refused.stderr
    )
    assert hub.repositories["org/name"].files == {"old.bin": b"old"}
    assert cora("publish", finished, "--to", "org/name", "--overwrite").exit_code == 0
    assert "old.bin" not in hub.repositories["org/name"].files
    assert "run.json" in hub.repositories["org/name"].files


def test_private_is_refused_where_the_repository_is_public(finished: Path, hub: Hub) -> None:
    hub.repositories["org/name"] = Repository()
    refused = cora("publish", finished, "--to", "org/name", "--private")
    assert refused.exit_code == 1
    assert "org/name exists and is public" in refused.stderr
    assert not hub.repositories["org/name"].files


def test_dry_run_lists_files_and_sizes_without_a_token_or_a_network(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    result = cora("publish", finished, "--to", "org/name", "--dry-run")
    assert result.exit_code == 0
    size = (finished / "adapter" / "adapter_model.safetensors").stat().st_size
    assert re.search(
        rf"^adapter_model\.safetensors +{size:,}  .*/adapter/adapter_model\.safetensors$", result.stdout, re.MULTILINE
    )
    assert re.search(r"^README\.md +[\d,]+  written for it$", result.stdout, re.MULTILINE)
    assert result.stdout.endswith("15 files would go to org/name; nothing was uploaded\n")


@pytest.mark.parametrize("name", ["name", "org/", "org/a b", "org/a--b", "a/b/c", "org/-a", "https://huggingface.co/org/name"])
def test_a_name_that_the_hub_does_not_allow_is_a_usage_error(name: str) -> None:
    result = cora("publish", "anything", "--to", name)
    assert result.exit_code == 2
    assert f"--to must be a name on the hub such as org/name, not {name!r}" in result.stderr


def test_a_run_that_is_not_as_recorded_is_refused(run: Path) -> None:
    record = unsealed(run / "run.json")
    writing.write_json(run / "run.json", {**record, "status": "interrupted"})
    refused = cora("publish", run, "--to", "org/name", "--dry-run")
    assert (refused.exit_code, "is not finished (status interrupted)" in refused.stderr) == (1, True)
    writing.write_json(run / "run.json", record)
    (run / "adapter" / "cora.json").write_text("{}", encoding="utf-8")
    refused = cora("publish", run, "--to", "org/name", "--dry-run")
    assert (refused.exit_code, "adapter/cora.json was changed after its training" in refused.stderr) == (1, True)
    refused = cora("publish", run / "adapter", "--to", "org/name", "--dry-run")
    assert (refused.exit_code, "is not a cora run" in refused.stderr) == (1, True)


def test_without_a_token_a_network_or_permission_one_sentence_says_so(
    finished: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert (
        cora("publish", finished, "--to", "org/name").stderr
        == "cora: error: the hub refused org/name: Invalid username or password. (status 401)\n"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "while HF_HUB_OFFLINE is set; unset it" in cora("publish", finished, "--to", "org/name").stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub at http://127.0.0.1:9 cannot be reached" in cora("publish", finished, "--to", "org/name").stderr
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refused = cora("publish", finished, "--to", "org/name")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("cora: error: there is no Hugging Face token; run `hf auth login`")
    assert refused.stderr.count("\n") == 1
    assert not hub.repositories


def test_a_run_at_a_learning_rate_that_was_not_chosen_has_no_verdict(finished: Path, tmp_path: Path) -> None:
    told = json.loads(report([str(finished)], "json"))
    (line,) = [line for line in told["experiments"][0]["groups"][0]["lines"] if line["rows"] == [str(finished)]]
    line["chosen"] = False
    write_sealed(tmp_path / "report.json", {key: value for key, value in told.items() if key != "sha256"})
    with pytest.raises(CoraError, match=f"on {line['method']} is about runs at another learning rate than this run's"):
        files_of(RunDirectory(finished), "org/name", report=tmp_path / "report.json")


def test_a_verdict_about_other_scores_than_those_of_the_run_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(report([str(run)], "json"), encoding="utf-8")
    files_of(RunDirectory(run), "org/name", report=tmp_path / "report.json")
    evaluate_run(run, overwrite=True, metrics=("rouge1", "nll"), template="plain")
    with pytest.raises(
        CoraError, match=r"is about another \w+ of this run \(.*\) than its evaluations give now \(.*\); write the report"
    ):
        files_of(RunDirectory(run), "org/name", report=tmp_path / "report.json")
    files_of(RunDirectory(run), "org/name", with_records=False, report=tmp_path / "report.json")


def verdict_of_edited(told: dict[str, Any], run: Path, directory: Path) -> None:
    (directory / "report.json").write_text(json.dumps(told), encoding="utf-8")
    files_of(RunDirectory(run), "org/name", report=directory / "report.json")


def test_the_verdict_of_a_report_on_the_run_goes_into_the_card(finished: Path, run: Path, tmp_path: Path) -> None:
    told = json.loads(report([str(finished)], "json"))
    told["experiments"][0]["conditions"] = ["Seeds were added."]
    with pytest.raises(CoraError, match=r"report.json was changed after it was written; write it again with `cora report`"):
        verdict_of_edited(told, finished, tmp_path)
    write_sealed(tmp_path / "report.json", {key: value for key, value in told.items() if key != "sha256"})
    card = files_of(RunDirectory(finished), "org/name", report=tmp_path / "report.json")["README.md"].decode()
    headline = told["experiments"][0]["groups"][0]["verdict"]["headline"]
    section = card.partition("## Verdict\n\n")[2]
    assert section.replace("\\", "").startswith(headline)
    assert "\n\nSeeds were added.\n\n## How" in section
    (run / "adapter" / "cora.json").write_text((run / "adapter" / "cora.json").read_text() + "\n")
    changed = unsealed(run / "run.json") | {"result_files": RunDirectory(run).result_files()}
    writing.write_json(run / "run.json", {**changed, "result_sha256": RunDirectory(run).result_hash()})
    shutil.rmtree(run / "eval")
    with pytest.raises(CoraError, match="has no verdict on this run"):
        files_of(RunDirectory(run), "org/name", report=tmp_path / "report.json")


def test_an_edited_card_is_published_as_it_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "adapter" / "README.md"
    path.write_text(path.read_text(encoding="utf-8") + "\nMine.\n", encoding="utf-8")
    assert files_of(RunDirectory(run), "org/name")["README.md"] == path.read_bytes()
    assert "README.md was edited, so it is published as it is" in capsys.readouterr().err
    (tmp_path / "report.json").write_text(report([str(run)], "json"), encoding="utf-8")
    with pytest.raises(CoraError, match="was edited, so --report cannot add to it"):
        files_of(RunDirectory(run), "org/name", report=tmp_path / "report.json")


def test_a_run_of_an_earlier_version_is_published_with_a_card_and_verifies(run: Path, hub: Hub, tmp_path: Path) -> None:
    record = unsealed(run / "run.json")
    writing.write_json(run / "run.json", {key: value for key, value in record.items() if key != "result_files"})
    (run / "adapter" / "README.md").unlink()
    assert cora("publish", run, "--to", "org/name").exit_code == 0
    there = hub.repositories["org/name"].download(tmp_path / "there")
    verify(there)
    assert (there / "README.md").read_text(encoding="utf-8").startswith("---\n")
