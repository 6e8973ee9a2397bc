import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cora_cli
from cora_cli.cli import app

# Runs `cora` with the arguments after the first, then writes the names of all modules that were imported.
_CORA = """
import json, sys
path, *arguments = sys.argv[1:]
sys.argv = ["cora", *arguments]
from cora_cli.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
finally:
    json.dump(sorted(sys.modules), open(path, "w"))
"""
# Runs `cora` once for each line of arguments, and writes what each refused with, and the names of all modules that were imported.
_REFUSED = """
import contextlib, io, json, sys
from cora_cli.cli import main
path, *lines = sys.argv[1:]
found = []
for line in lines:
    sys.argv = ["cora", *line.split()]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main()
        except SystemExit as end:
            found.append([end.code, said.getvalue()])
json.dump({"refused": found, "modules": sorted(sys.modules)}, open(path, "w"))
"""
_JSON_DATA = """
import json, sys
from cora_cli.data.split import load_split
assert load_split(sys.argv[2], 4, 0).train
json.dump(sorted(sys.modules), open(sys.argv[1], "w"))
"""
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "numpy",
    "pydantic",
    "scipy",
    "safetensors",
    "pandas",
    "pyarrow",
    "yaml",
}
METRICS = {"nltk", "sacrebleu", "rouge_score", "bert_score", "evaluate"}
COMMANDS = [command.name for command in app.registered_commands]


def imported(script, tmp_path, *arguments):
    path = tmp_path / "modules.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", script, str(path), *map(str, arguments)], check=True, env=environment, capture_output=True
    )
    return set(json.loads(path.read_text()))


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_imports_nothing_heavy(command, tmp_path):
    found = imported(_CORA, tmp_path, *([command] if command else []), "--help")
    assert not found & (HEAVY | METRICS)
    assert not {name for name in found if name.startswith(("cora_cli.data.", "importlib.metadata"))}


REFUSED = {
    "train --rnk 3": "there is no option --rnk; did you mean --rank?",
    "train --rank x": "--rank must be an integer, not 'x'",
    "train --mode lora --model ./gone --dataset builtin:code --output-dir out": "model './gone' is neither a directory on this disk nor a hub id",
    "train --mode lora --model builtin:smollm2 --dataset gone.jsonl --output-dir out": "dataset gone.jsonl does not exist",
    "train --mode fb --basis gone.safetensors --model builtin:smollm2 --dataset builtin:code --output-dir out": "basis gone.safetensors does not",
    "train --mode lora --model builtin:smollm2 --dataset builtin:code --output-dir out --device abacus": "--device must be auto, cpu, cuda or",
    "extract-basis ./gone -o basis.safetensors": "model './gone' is neither",
    "inspect gone.safetensors": "gone.safetensors does not exist",
    "merge ./gone -o out": "model './gone' is neither",
    "evaluate gone": "gone does not exist; name run directories of `cora train`",
    "evaluate --from gone.jsonl": "gone.jsonl is not a file; --from needs the predictions.jsonl of an evaluation",
    "report gone": "gone does not exist; name the output directory",
    "doctor --output out.json": "--output has no effect without --gpu-check; add --gpu-check",
    "doctor --gpu-check --checks sped": "--checks knows no check named sped; it has attention, layouts, ",
    "demo --device abacus": "--device must be auto, cpu, cuda or cuda:<index>, not 'abacus'",
}


def test_what_the_command_line_alone_shows_is_refused_before_anything_heavy_is_imported(tmp_path):
    path = tmp_path / "found.json"
    subprocess.run([sys.executable, "-c", _REFUSED, str(path), *REFUSED], check=True, cwd=tmp_path, capture_output=True)
    found = json.loads(path.read_text())
    for (line, sentence), (code, said) in zip(REFUSED.items(), found["refused"], strict=True):
        assert said.startswith(f"cora: error: {sentence}"), line
        assert said.count("\n") == 1, line
        assert code in (1, 2), line
    # A wrong type is described by pydantic; none of the others is needed to refuse.
    assert not {*found["modules"]} & ((HEAVY | METRICS) - {"pydantic"})


def test_shells_are_given_a_completion_that_imports_nothing_heavy(tmp_path, monkeypatch):
    monkeypatch.setenv("_CORA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "cora train --gradient-acc")
    monkeypatch.setenv("COMP_CWORD", "2")
    path = tmp_path / "modules.json"
    done = subprocess.run([sys.executable, "-c", _CORA, str(path)], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["--gradient-accumulation"]
    assert not set(json.loads(path.read_text())) & ((HEAVY | METRICS) - {"pydantic"})


@pytest.mark.slow
def test_training_imports_no_metric_no_decomposition_and_no_generation(tiny_model, tiny_data, tmp_path):
    settings = [
        "--mode",
        "lora",
        "--model",
        tiny_model,
        "--dataset",
        tiny_data,
        "--test-size",
        4,
        "--max-steps",
        1,
        "--rank",
        4,
    ]
    found = imported(_CORA, tmp_path, "train", *settings, "--device", "cpu", "--output-dir", tmp_path / "run")
    assert "cora_cli.training.trainer" in found
    assert not found & (METRICS | {"matplotlib", "tensorboard", "gguf"})
    unused = (
        "cora_cli.extraction.merge",
        "cora_cli.extraction.decompose",
        "cora_cli.evaluation.generate",
        "cora_cli.embedded",
        "cora_cli.experiments",
    )
    assert not {name for name in found if name.startswith(unused)}


def test_json_data_is_read_without_the_data_set_library(tiny_data, tmp_path):
    assert not imported(_JSON_DATA, tmp_path, tiny_data) & {"datasets", "pandas", "pyarrow"}


@pytest.mark.parametrize("module", ["typer", "cora_cli.cli.train", "cora_cli.evaluation.evaluate"])
def test_an_interrupt_while_modules_are_imported_ends_quietly(module):
    script = f"""
import sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from cora_cli.__main__ import main
sys.argv = ["cora", "evaluate", "--from", {__file__!r}]
main()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr.startswith("cora: interrupted")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["--version"], ["merge"]])
def test_an_interrupt_while_python_ends_is_quiet(words):
    script = f"""
import atexit, os, signal, sys
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
from cora_cli.__main__ import main
sys.argv = ["cora", *{words!r}]
main()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGINT
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_standard_stream_neither_fails_a_command_nor_gets_into_its_files(closed, tmp_path):
    script = """
import os, sys
from cora_cli.terminal import open_missing_streams
open_missing_streams()
assert os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY) > 2
print("out", flush=True)
print("err", file=sys.stderr, flush=True)
sys.stdin.read()
"""
    ended = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" "$2" {closed}', sys.executable, script, str(tmp_path / "file")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert (ended.stdout, ended.stderr) == ("" if closed == ">&-" else "out\n", "" if closed == "2>&-" else "err\n")


@pytest.mark.parametrize("path", ["{}", ":{}", "{}::"])
def test_a_file_in_the_working_directory_is_not_imported_in_place_of_a_module(tmp_path, path):
    for name in ("typer", "random", "pathlib", "datasets"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the working directory was imported')")
    source = str(Path(cora_cli.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": path.format(source), "PYTHONSAFEPATH": ""}
    words = [sys.executable, "-m", "cora_cli", "--version"]
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("cora ")
