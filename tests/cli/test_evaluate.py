import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cora_cli import writing
from cora_cli.cli import app
from cora_cli.cli.evaluate import _comparable
from cora_cli.evaluation import backend
from cora_cli.evaluation.scoring import Evaluation
from cora_cli.reading import read_json, read_jsonl
from cora_cli.rundir import RunDirectory
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train

HELD_OUT = 6
FAST = [
    "--dtype",
    "fp32",
    "--device",
    "cpu",
    "--batch-size",
    "4",
    "--max-new-tokens",
    "6",
    "--metrics",
    "rouge,bleu",
    "--bootstrap",
    "100",
]


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two finished LoRA runs that differ in their seed."""
    root = tmp_path_factory.mktemp("trained")
    for seed in (0, 1):
        config = TrainConfig(
            model=str(tiny_model),
            dataset=str(tiny_data),
            output_dir=str(root / f"seed{seed}"),
            mode="lora",
            rank=4,
            max_steps=2,
            batch_size=8,
            test_size=HELD_OUT,
            learning_rate=0.03,
            seed=seed,
            dtype="fp32",
            device="cpu",
        )
        train(config)
    return [root / f"seed{seed}" for seed in (0, 1)]


@pytest.fixture(scope="module")
def favourable(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records whose references are the answers of the first run, which it therefore gives exactly."""
    directory = tmp_path_factory.mktemp("favourable")
    assert cora(runs[0], "-o", directory / "eval", *FAST).exit_code == 0
    records = read_jsonl(RunDirectory(runs[0]).test_records)
    answers = read_jsonl(directory / "eval" / "predictions.jsonl")
    answered = [{**record, "output": line["prediction"]} for record, line in zip(records, answers, strict=True)]
    writing.write_jsonl(directory / "records.jsonl", answered)
    return directory / "records.jsonl"


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    pairs = [("the cat sat", "the cat sat down"), ("", "nothing"), ("one two", "two one")]
    writing.write_jsonl(tmp_path / "predictions.jsonl", [{"prediction": p, "reference": r} for p, r in pairs])
    return tmp_path / "predictions.jsonl"


def cora(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def rows(output: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line.startswith("|")]


def test_answers_that_all_score_the_same_have_no_interval(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat", "one two three four", "a red boat sails home"]
    writing.write_jsonl(tmp_path / "p.jsonl", [{"prediction": text, "reference": text} for text in texts])
    result = cora("--from", tmp_path / "p.jsonl", "--metrics", "rouge,bleu", "--bootstrap", "100")
    assert result.exit_code == 0, result.stderr
    _, _, (_, *cells) = rows(result.stdout)
    assert cells == ["1.000 –", "1.000 –", "1.000 –", "100.00 –"]
    (path,) = tmp_path.rglob("metrics.json")
    assert [metric["ci95"] for metric in read_json(path)["metrics"].values()] == [None] * 4


def test_answers_that_were_cut_are_empty_or_hold_thoughts_are_counted(tmp_path: Path) -> None:
    answers = [
        ("a b", "a b", "length"),
        ("<think>hm</think>a", "a", "stop"),
        ("", "a", "stop"),
        ("<think>a", "<think>a", "stop"),
    ]
    lines = [{"prediction": one, "reference": other, "finish_reason": reason} for one, other, reason in answers]
    writing.write_jsonl(tmp_path / "answers.jsonl", lines)
    command = ["evaluate", "--from", str(tmp_path / "answers.jsonl"), "-o", str(tmp_path / "out"), "--metrics", "rouge"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    shares = ("cut at the limit of new tokens", "empty", "with thoughts, which text metrics score as a part of them")
    said = "; ".join(f"1 of 4 answers {share}" for share in shares)
    assert said in " ".join(result.output.split())
    assert read_json(tmp_path / "out" / "metrics.json")["shortcomings"] == {"cut": 1, "empty": 1, "thoughts": 1}


def test_one_run_prints_a_row_with_intervals_and_every_signature(runs: list[Path], tmp_path: Path) -> None:
    result = cora(runs[0], "-o", tmp_path / "out", *FAST)
    assert result.exit_code == 0, result.stderr
    header, _, *body = rows(result.stdout)
    assert header == ["run", "rouge1", "rouge2", "rougeL", "sacrebleu"]
    metrics = read_json(tmp_path / "out" / "metrics.json")["metrics"]
    (row,) = body
    assert row[0] == str(runs[0])
    for name, cell in zip(header[1:], row[1:], strict=True):
        digits = 2 if name == "sacrebleu" else 3
        interval = metrics[name]["ci95"]  # none where all records agree
        shown = "–" if interval is None else "[{:.{digits}f}, {:.{digits}f}]".format(*interval, digits=digits)
        assert cell == f"{metrics[name]['value']:.{digits}f} {shown}"
        assert f"\n{name}: {metrics[name]['signature']}\n" in result.stdout
    assert f"over the n = {HELD_OUT} records" in result.stdout
    assert "paired differences" not in result.stdout


def test_several_runs_print_a_row_each_and_their_differences_from_the_first(
    runs: list[Path], favourable: Path, tmp_path: Path
) -> None:
    result = cora(*runs, "--dataset", favourable, "-o", tmp_path, *FAST)
    assert result.exit_code == 0, result.stderr
    table, _, differences = result.stdout.partition("paired differences")
    assert differences.startswith(f" from {runs[0]}, with two-sided p-values")
    assert [row[0] for row in rows(table)[2:]] == [str(run) for run in runs]
    header, _, row = rows(differences)
    assert row[0] == str(runs[1])
    metrics = [read_json(tmp_path / run.name / "metrics.json")["metrics"] for run in runs]
    assert metrics[0]["rouge1"]["value"] == 1 > metrics[1]["rouge1"]["value"]
    for name, cell in zip(header[1:], row[1:], strict=True):
        shown = re.fullmatch(r"(-?[\d.]+) p[=<]([\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]", cell)
        assert shown
        value, p, low, high = map(float, shown.groups())
        assert value == pytest.approx(metrics[1][name]["value"] - metrics[0][name]["value"], abs=0.006)
        assert low <= value <= high
        assert 0 < p <= 1


def test_runs_with_other_held_out_records_get_their_table_but_no_comparison(
    runs: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    writing.write_jsonl(tmp_path / "other.jsonl", [{"instruction": f"say {n}", "output": f"{n}"} for n in range(10)])
    config = TrainConfig(
        model=str(tiny_model),
        dataset=str(tmp_path / "other.jsonl"),
        output_dir=str(tmp_path / "other"),
        mode="lora",
        rank=2,
        max_steps=2,
        dtype="fp32",
        device="cpu",
    )
    train(config)
    result = cora(runs[0], tmp_path / "other", "-o", tmp_path / "out", *FAST)
    assert result.exit_code == 0, result.stderr
    assert len(rows(result.stdout)) == 4, result.stderr
    assert re.search(r"over the records, which differ: n = \d+ of \S+, n = 1 of \S+other\]", " ".join(result.stdout.split()))
    assert "paired differences" not in result.stdout
    assert f"{runs[0]} answered other records than the others, so it is compared with none" in " ".join(result.stdout.split())


def test_each_run_is_compared_with_its_own_base_and_over_its_own_records() -> None:
    made = [
        ("m", "a", True),
        ("one", "a", False),
        ("two (base)", "a", False),
        ("n", "a", True),
        ("three", "a", False),
        ("four", "b", False),
    ]
    groups = _comparable([Evaluation(name, {}, {}, records, "", of_base) for name, records, of_base in made])
    assert [[one.name for one in group] for group in groups] == [["m", "one", "two (base)"], ["n", "three"], ["four"]]


def test_runs_that_were_asked_other_prompts_with_equal_references_are_compared_with_a_note(
    runs: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    found = []
    for number, question in enumerate(("say yes to", "agree with")):
        data, run = tmp_path / f"{number}.jsonl", tmp_path / f"run{number}"
        writing.write_jsonl(data, [{"instruction": f"{question} {n}", "output": "yes"} for n in range(8)])
        settings = {"mode": "lora", "rank": 2, "max_steps": 1, "dtype": "fp32", "device": "cpu", "test_size": 2}
        train(TrainConfig(model=str(tiny_model), dataset=str(data), output_dir=str(run), **settings))
        found.append(run)
    note = f"note: {found[1]} was asked other prompts than {found[0]}, with equal references"
    assert note in cora(*found, "-o", tmp_path / "out", *FAST).stdout
    assert "other prompts" not in cora(*runs, "-o", tmp_path / "same", *FAST).stdout


def test_values_per_token_of_different_tokenizers_are_not_compared(tiny_model: Path, tmp_path: Path) -> None:
    letters = Path(shutil.copytree(tiny_model, tmp_path / "letters"))
    tokenizer = read_json(letters / "tokenizer.json")
    tokenizer["model"]["merges"] = []
    writing.write_json(letters / "tokenizer.json", tokenizer)
    writing.write_jsonl(tmp_path / "data.jsonl", [{"instruction": f"say {n}", "output": "many words"} for n in range(8)])
    found = []
    for model in (tiny_model, letters):
        found.append(tmp_path / f"run of {model.name}")
        settings = {"mode": "lora", "rank": 2, "max_steps": 1, "dtype": "fp32", "device": "cpu", "test_size": 2}
        train(TrainConfig(model=str(model), dataset=str(tmp_path / "data.jsonl"), output_dir=str(found[-1]), **settings))
    result = cora(*found, "-o", tmp_path / "out", *("rouge1,nll" if one == "rouge,bleu" else one for one in FAST))
    assert result.exit_code == 0, result.stderr
    tokens = re.findall(r"nll\|over:reference-tokens\|tokens:(\d+)", result.stdout)
    assert len(tokens) == 2
    assert int(tokens[0]) < int(tokens[1])
    _, rouge, nll = rows(result.stdout)[-1]
    assert "p=" in rouge
    assert nll == "–"
    assert f"note: nll of {found[1]} and of {found[0]} have different signatures, so they are not compared" in result.stdout


def test_of_several_processes_one_prints_the_plan(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    printed = []
    for rank in ("0", "1"):
        for name, value in {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
            monkeypatch.setenv(name, value)
        result = cora(runs[0], *FAST, "--dry-run")
        assert result.exit_code == 0, result.stderr
        printed.append(result.stdout)
    assert f"{runs[0].name}: {HELD_OUT} prompts" in printed[0]
    assert printed[1] == ""


def test_a_configuration_file_names_the_runs_and_a_flag_overrides_it(runs: list[Path], tmp_path: Path) -> None:
    settings = {
        "runs": [str(run) for run in runs],
        "output-dir": str(tmp_path / "out"),
        "limit": 5,
        "metrics": ["bleu", "rouge1"],
    }
    (tmp_path / "evaluate.yaml").write_text(json.dumps(settings))
    numbers = [argument for argument in FAST if argument not in ("--metrics", "rouge,bleu")]
    result = cora("--config", tmp_path / "evaluate.yaml", "--limit", 2, *numbers)
    assert result.exit_code == 0, result.stderr
    assert rows(result.stdout)[0] == ["run", "rouge1", "sacrebleu"]
    assert len(read_jsonl(tmp_path / "out" / "seed1" / "predictions.jsonl")) == 2


def test_a_bare_model_and_finished_predictions_give_the_same_table(tiny_model: Path, runs: list[Path], tmp_path: Path) -> None:
    test = RunDirectory(runs[0]).test_records
    first = cora("--model", tiny_model, "--dataset", test, "-o", tmp_path / "base", *FAST)
    assert first.exit_code == 0, first.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "load_model", lambda *_: pytest.fail("a model was loaded"))
        again = cora("--from", tmp_path / "base" / "predictions.jsonl", "--metrics", "rouge,bleu", "--bootstrap", 100)
    assert again.exit_code == 0, again.stderr
    assert again.stdout == first.stdout


def test_the_seed_affects_only_the_intervals(predictions: Path) -> None:
    results = []
    for seed in (0, 0, 1):
        result = cora("--from", predictions, "--metrics", "rouge1", "--bootstrap", 101, "--seed", seed)
        assert result.exit_code == 0, result.stderr
        results.append(read_json(predictions.parent / "metrics.json")["metrics"]["rouge1"])
    assert results[0] == results[1]
    assert results[0]["value"] == results[2]["value"]
    assert "seed:1" in results[2]["signature"]


# Errors


def assert_one_line(result: Any, exit_code: int, message: str) -> None:
    assert result.exit_code == exit_code, result.stderr
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("cora: error: ")
    assert message in lines[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give exactly one of: run directories, --model, or --from"),
        (["run", "--model", "m", "--dataset", "d", "-o", "o"], "give exactly one of: run directories, --model, or --from"),
        (["run", "--from", "p.jsonl"], "give exactly one of: run directories, --model, or --from"),
        (["--model", "m", "-o", "o"], "--model needs --dataset"),
        (["--model", "m", "--dataset", "d"], "--output-dir DIR (where to write)"),
        (["--from", "p.jsonl", "--limit", "3"], "--limit has no effect with --from"),
        (["run", "--metrics", "rouge,chrf"], "unknown metric 'chrf'; choose from rouge, meteor, bleu, bertscore"),
        (["run", "--metrics", ""], "--metrics is empty; give it a value, or leave it out"),
        (["run", "--batch-size", "-4"], "--batch-size must be at least 1, not -4"),
        (["run", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, not 0"),
        (["run", "--limit", "-1"], "--limit must be at least 1, not -1"),
        (["run", "--bootstrap", "5"], "--bootstrap must be at least 100, not 5"),
        (["run", "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:<index>, not 'tpu'"),
    ],
)
def test_invalid_requests_exit_2_with_one_line(arguments: list[str], message: str) -> None:
    result = cora(*arguments)
    assert_one_line(result, 2, message)
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--limit", "few"], ["--template", "vicuna"], ["--dtype", "int4"], ["--frobnicate"]])
def test_values_and_flags_that_do_not_exist_exit_2(arguments: list[str]) -> None:
    result = cora("run", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_files_exit_1_with_one_line(tmp_path: Path, predictions: Path) -> None:
    assert_one_line(cora(tmp_path / "nowhere"), 1, "does not exist; name run directories of `cora train`")
    assert_one_line(cora("--from", tmp_path / "nowhere.jsonl"), 1, "is not a file")
    model = ("--model", tmp_path / "nowhere", "--dataset", "builtin:code", "-o", tmp_path / "out")
    assert_one_line(cora(*model), 1, "neither a directory on this disk nor a hub id")
    predictions.write_text("{broken\n")
    assert_one_line(cora("--from", predictions), 1, "predictions.jsonl, line 1: not valid JSON")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = cora("--from", tmp_path / "nowhere.jsonl", "--debug")
    assert result.exit_code == 1
    assert "is not a file" in str(result.exception)


def test_the_installed_command_refuses_an_invalid_request_without_loading_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    process = subprocess.run(
        [sys.executable, "-m", "cora_cli", "evaluate", "--metrics", "chrf", "run"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )
    assert process.returncode == 2
    assert process.stderr.splitlines() == [process.stderr.strip()]
    assert process.stderr.startswith("cora: error: unknown metric 'chrf'")
