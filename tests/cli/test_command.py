"""Precedence of flags, files and defaults, how commands end, and what `--help` may import, for all commands."""

import dataclasses
import errno
import importlib
import json
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from cora_cli.cli import app
from cora_cli.cli.command import clean_errors, command
from cora_cli.cli.extract_basis import ExtractConfig
from cora_cli.environment import quiet_libraries
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.settings import setting
from cora_cli.training.config import TrainConfig

COMMANDS = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
CONFIGS = Path(__file__).parents[2] / "configs"


@dataclasses.dataclass(frozen=True)
class Cake:
    """One setting of every kind."""

    guests: tuple[str, ...] = setting("Who eats.", argument=True)
    flour: str = setting("Which flour.")
    eggs: int = setting("How many.", 3)
    sugar: float | None = setting("Kilograms.", None)
    layers: tuple[str, ...] = setting("From below.", ("sponge", "cream"))
    toppings: tuple[str, ...] = setting("Given one by one.", (), repeated=True)
    shape: Literal["round", "square"] = setting("Seen from above.", "round")
    iced: bool = setting("With icing.", False)
    baked: bool = setting("Baked at all.", True)
    to: str = setting("Where it goes.", "table", flags=("--to", "-t"))

    def __post_init__(self) -> None:
        if self.eggs < 0:
            raise UsageError(f"--eggs must be at least 0, not {self.eggs}")


def invoke(*arguments: str, run: Callable[[Cake], None] | None = None) -> tuple[Any, list[Cake]]:
    """The result of `cora bake ARGUMENTS`, and the configuration that arrived."""
    seen: list[Cake] = []
    toy = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    toy.callback()(lambda: None)
    command(toy, "bake", Cake, run or seen.append)
    return CliRunner().invoke(toy, ["bake", *arguments]), seen


def baked(*arguments: str) -> Cake:
    result, seen = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return seen[0]


def written(directory: Path, text: str) -> str:
    path = directory / "cake.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_apply_where_nothing_is_given() -> None:
    assert baked("ann", "bob", "--flour", "rye") == Cake(("ann", "bob"), "rye")


def test_a_flag_overrides_the_file_and_the_file_overrides_the_default(tmp_path: Path) -> None:
    text = (
        "flour: rye\neggs: 4\nsugar: 2.5e-1\nlayers: [jam]\niced: true\nbaked: false\nshape: square\nto: bed\nguests: [ann]\n"
    )
    file = written(tmp_path, text)
    assert baked("--config", file) == Cake(("ann",), "rye", 4, 0.25, ("jam",), (), "square", True, False, "bed")
    flags = ["--eggs=5", "--sugar=1", "--layers=a, b", "--no-iced", "--baked", "--shape=round", "-t", "sea", "--flour=corn"]
    expected = Cake(("bob",), "corn", 5, 1.0, ("a", "b"), (), "round", False, True, "sea")
    assert baked("bob", *flags, "--config", file) == expected
    assert baked("--config", file, "bob", *flags) == expected


def test_an_integer_of_a_file_may_be_in_exponent_form(tmp_path: Path) -> None:
    assert baked("a", "--config", written(tmp_path, "flour: rye\neggs: 1e3")).eggs == 1000


def test_a_flag_overrides_the_file_even_with_the_default_s_value(tmp_path: Path) -> None:
    assert baked("a", "--config", written(tmp_path, "flour: rye\neggs: 4"), "--eggs", "3").eggs == 3


def test_lists_come_repeated_from_flags_and_as_lists_from_files(tmp_path: Path) -> None:
    assert baked("a", "--flour=x", "--toppings", "nut", "--toppings", "fig, fresh").toppings == ("nut", "fig, fresh")
    assert baked("a", "--config", written(tmp_path, "flour: x\ntoppings: [nut, fig]")).toppings == ("nut", "fig")
    assert baked("a", "--config", written(tmp_path, "flour: x\ntoppings: nut\nguests: bob")).toppings == ("nut",)
    assert baked("--config", written(tmp_path, "flour: x\nguests: bob")).guests == ("bob",)


def test_a_path_below_the_home_directory_is_found_in_flags_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "cake.yaml").write_text("to: ~/shelf\nlayers: [~/a, b]\n")
    cake = baked("--config", str(tmp_path / "cake.yaml"), "--flour=~", "--toppings=~/c", "~/guest")
    home = f"{tmp_path / 'home'}"
    assert (cake.to, cake.layers, cake.toppings) == (f"{home}/shelf", (f"{home}/a", "b"), (f"{home}/c",))
    assert (cake.guests, cake.flour) == ((f"{home}/guest",), "~")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--to=", "ann"], "--to"),
        (["ann", " "], "guests"),
        (["ann", "--toppings", ""], "--toppings"),
        (["ann", "--layers= ,"], "--layers"),
        (["--config=cake.yaml", "ann"], "--to"),
    ],
)
def test_an_empty_value_is_not_taken_for_none(
    arguments: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, 'to: ""')
    result, seen = invoke("--flour=rye", *arguments)
    assert (result.exit_code, seen) == (2, [])
    assert f"{name} is empty; give it a value, or leave it out" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "name"), [(["--to=caf\udce9"], "--to"), (["--layers=a,caf\udce9"], "--layers"), (["caf\udce9"], "guests")]
)
def test_a_name_that_no_record_can_hold_is_refused(arguments: list[str], name: str) -> None:
    result, seen = invoke("--flour=rye", *arguments, "ann")
    assert (result.exit_code, seen) == (2, [])
    assert "caf\\xe9, whose bytes are no UTF-8; rename it" in result.stderr
    assert f"error: {name} is" in result.stderr
    # Where the locale is not UTF-8, the bytes of a character come as surrogates too.
    assert invoke("--flour=rye", "caf\udcc3\udca9")[0].exit_code == 0


def test_files_may_write_names_with_dashes_numbers_as_text_and_leave_values_empty(tmp_path: Path) -> None:
    cake = baked("a", "--config", written(tmp_path, "flour: 405\neggs: '7'\nsugar: null\nlayers:\n  - 1\n  - 2\n"))
    assert (cake.flour, cake.eggs, cake.sugar, cake.layers) == ("405", 7, None, ("1", "2"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "flour: x\nflower: y\nsalt: 1\n",
            "has unknown keys: flower (did you mean flour?), salt; known keys: baked, eggs, flour, guests, iced,",
        ),
        ("flour: x\nguest: 2\n", "has unknown keys: guest (did you mean guests?)\n"),
        ("flour: x\nconfig: y\n", "has unknown keys: config;"),
        ("flour: x\nno-iced: true\n", "has unknown keys: no_iced (did you mean iced?)\n"),
        ("- flour\n", "must hold `name: value` lines, not a list"),
        ("flour: [", "is not valid YAML: "),
        ("flour: {a: b}\n", "flour must be a single value or a list, not {'a': 'b'}"),
        ("flour: !!python/object/apply:os.getcwd []\n", "is not valid YAML: "),
        (None, "missing.yaml does not exist"),
    ],
)
def test_an_invalid_file_is_a_usage_error(text: str | None, message: str, tmp_path: Path) -> None:
    file = written(tmp_path, text) if text is not None else str(tmp_path / "missing.yaml")
    result, seen = invoke("a", "--config", file)
    assert (result.exit_code, seen, result.stdout) == (2, [], "")
    assert result.stderr.startswith(f"cora: error: configuration file {file}")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("flour: 2026_11_26", "2026_11_26"), ("flour: 0x1F", "0x1F"), ("flour: 'no'", "no"), ("flour: 2026-11-26", "2026-11-26")],
)
def test_text_in_a_file_is_taken_as_it_is_written(text: str, expected: str, tmp_path: Path) -> None:
    assert baked("a", "--config", written(tmp_path, text)).flour == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flour: no", "line 2: flour must be text, but YAML reads no as true or false; quote it if you mean the text"),
        ("flour: 1.10", "line 2: flour must be text, but YAML reads 1.10 as a number; quote it if you mean the text"),
        ("layers: [jam, off]", "line 2: layers must be text, but YAML reads off as true or false"),
        ("guests: [1.5]", "guests must be text, but YAML reads 1.5 as a number"),
        ("layers: [jam, null]", "layers must be a list of texts, and None is none"),
        ("layers: [[jam, fig]]", "layers must be a list of texts, and ['jam', 'fig'] is none"),
        ("flour: [rye, corn]", "flour takes a single value, not a list of 2"),
    ],
)
def test_a_file_s_value_that_would_silently_become_another_text_is_refused(text: str, message: str, tmp_path: Path) -> None:
    result, seen = invoke("a", "--config", written(tmp_path, f"eggs: 1\n{text}\n"))
    assert (result.exit_code, seen) == (2, [])
    assert message in result.stderr


def test_a_file_that_names_one_option_under_two_spellings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("flour: rye\nto: oven\neggs: 1\n")
    assert baked("me", "--config", str(path)).to == "oven"

    toy = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    toy.callback()(lambda: None)
    command(toy, "train", TrainConfig, lambda config: None)
    path.write_text("learning_rate: 1e-4\nlearning-rate: 2e-4\n")
    result = CliRunner().invoke(toy, ["train", "--config", str(path)])
    assert result.exit_code == 2
    assert "sets the same option as 'learning_rate' and as 'learning-rate'; remove one of them" in result.output


@pytest.mark.parametrize(
    "text", ["eggs: 2.5", "eggs: true", "eggs: many", "sugar: sweet", "iced: 7", "shape: oval", "eggs: [1, 2]"]
)
def test_a_file_s_value_of_the_wrong_type_is_a_usage_error_that_names_the_flag(text: str, tmp_path: Path) -> None:
    result, seen = invoke("a", "--config", written(tmp_path, f"flour: x\n{text}\n"))
    assert (result.exit_code, seen) == (2, [])
    assert f"--{text.partition(':')[0]}" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["--flour=x", "--eggs=two", "a"], ["a"], ["--flour=x"], ["a", "--flour=x", "--salt"]])
def test_flags_that_are_wrong_missing_or_unknown_are_usage_errors(arguments: list[str]) -> None:
    result, seen = invoke(*arguments)
    assert (result.exit_code, seen) == (2, [])


def test_an_invalid_configuration_is_one_line_and_exit_code_2() -> None:
    result, seen = invoke("a", "--flour=x", "--eggs=-1")
    assert (result.exit_code, seen, result.stderr) == (2, [], "cora: error: --eggs must be at least 0, not -1\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CoraError("the oven is cold"), 1, "cora: error: the oven is cold\n"),
        (UsageError("no such cake"), 2, "cora: error: no such cake\n"),
        (
            ValueError("two\nlines"),
            1,
            "cora: error: unexpected ValueError: two lines (run again with --debug for the traceback)\n",
        ),
        (KeyboardInterrupt(), 130, "cora: interrupted\n"),
    ],
)
def test_errors_end_in_one_line_and_their_exit_code(error: BaseException, code: int, line: str) -> None:
    def fail(_: Cake) -> None:
        raise error

    result, _ = invoke("a", "--flour=x", run=fail)
    assert (result.exit_code, result.stderr, result.stdout) == (code, line, "")


@pytest.mark.parametrize("name", ["merge", "export", "laplace", "extract-basis", "train"])
def test_an_interrupt_after_the_output_has_appeared_does_not_say_that_nothing_was_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: Any) -> None:
        if config.seed:  # for this one, the interrupt comes after the output
            (tmp_path / "out").touch()
        raise KeyboardInterrupt

    def said(seed: int) -> str:
        toy = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
        toy.callback()(lambda: None)
        module = importlib.import_module(f"cora_cli.cli.{name.replace('-', '_')}")
        monkeypatch.setattr(module, "run", interrupted)
        module.register(toy)
        (model := tmp_path / "model").mkdir(exist_ok=True)
        (model / "run.json").touch()
        own = {
            "train": ["--mode=lora", f"--model={model}", f"--dataset={model}", "--output-dir=x", f"--probe={tmp_path / 'out'}"],
            "extract-basis": [str(model), str(model), f"-o{tmp_path / 'out'}"],
        }.get(name, [str(model), f"-o{tmp_path / 'out'}"])
        result = CliRunner().invoke(toy, [name, *own, f"--seed={seed}"])
        assert result.exit_code == 130, result.stderr
        return result.stderr

    assert said(0) == "cora: interrupted; nothing was written\n"
    assert said(1) == f"cora: interrupted; {tmp_path / 'out'} is complete: it appears all at once or not at all\n"


def test_debug_lets_the_error_through() -> None:
    def fail(_: Cake) -> None:
        raise CoraError("the oven is cold")

    result, _ = invoke("a", "--flour=x", "--debug", run=fail)
    assert isinstance(result.exception, CoraError)
    assert "cora: error" not in result.stderr


def cora(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cora_cli", *arguments], capture_output=True, text=True, check=False)


def test_the_real_command_ends_with_code_2_and_shows_a_traceback_only_for_debug() -> None:
    plain, debug = cora("evaluate", "--model", "m"), cora("evaluate", "--model", "m", "--debug")
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.startswith("cora: error: --model needs --dataset")
    assert plain.stderr.count("\n") == 1
    assert "Traceback" in debug.stderr
    assert debug.returncode != 0


def test_help_of_every_command_imports_nothing_heavy() -> None:
    program = f"""
import json, sys
from typer.testing import CliRunner
from cora_cli.cli import app, main
results = [CliRunner().invoke(app, [*words, "--help"]) for words in {[[], *([name] for name in COMMANDS)]}]
results.append(CliRunner().invoke(app, ["--version"]))
print(json.dumps([[result.exit_code, result.stdout] for result in results]))
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    answers, modules = (json.loads(line) for line in finished.stdout.splitlines())
    assert [code for code, _ in answers] == [0] * len(answers)
    for name, (_, text) in zip(COMMANDS, answers[1:], strict=False):
        assert f"Usage: cora {name}" in text or f"Usage: root {name}" in text
        assert all(flag in text for flag in ("--config", "--seed", "--debug"))
        assert name in answers[0][1]
    heavy = {
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "numpy",
        "scipy",
        "nltk",
        "bert_score",
        "evaluate",
        "rich",
    }
    assert not heavy & set(modules)


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"train", "evaluate"}))
def test_a_command_whose_work_is_not_shared_is_refused_in_several_processes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(variable, value)
    required = {"merge", "laplace", "extract-basis", "report", "export", "verify", "inspect"}
    outputs = {"merge", "laplace", "extract-basis", "export"}
    arguments = {"publish": ["thing", "--to", "us/it"]} | {
        command: ["thing", *(["-o", "out"] if command in outputs else [])] for command in required
    }
    result = CliRunner().invoke(app, [name, *arguments.get(name, [])])
    assert result.exit_code == 2
    assert f"cora {name} runs in one process, not in 2; start it without a launcher such as torchrun" in result.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["extract-basis", "train", "merge"])
def test_a_command_without_its_arguments_shows_its_help(name: str) -> None:
    result = CliRunner().invoke(app, [name])
    assert result.exit_code == 2
    assert f"{name} [OPTIONS]" in result.stdout + result.stderr


# Not a grid, but a file that the tables' grids include.
INCLUDED = {CONFIGS / part / "common.yaml" for part in ("paper", "baselines")}


@pytest.mark.parametrize("path", [path for path in sorted(CONFIGS.rglob("*.yaml")) if path not in INCLUDED], ids=str)
def test_every_shipped_configuration_parses_as_its_first_line_says(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    words = shlex.split(first.partition(" cora_cli " if " cora_cli " in first else " cora ")[2])
    name = str(path.relative_to(CONFIGS.parent))
    if words[0] == "ablate":  # a grid is the command's argument; what is in it, tests/experiments/test_configs.py judges
        assert words[1:] == [name]
        return
    assert words[1:3] == ["--config", name]
    classes = {"train": TrainConfig, "extract-basis": ExtractConfig, "evaluate": EvaluateConfig}
    seen: list[Any] = []
    parser = typer.Typer(rich_markup_mode=None)
    parser.callback()(lambda: None)
    command(parser, words[0], classes[words[0]], seen.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cora_cli.cli.inputs.check_inputs", lambda config: None)  # what the files name is the user's
        result = CliRunner().invoke(parser, [words[0], "--config", str(path), *words[3:]])
    assert result.exit_code == 0, result.stderr
    assert isinstance(seen[0], classes[words[0]])


def test_warnings_of_the_libraries_that_only_this_program_could_heed_stay_off_the_screen():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries()
        for module in ("peft.tuners.lora", "transformers.modeling_utils", "numpy.linalg"):
            warnings.warn_explicit("odd", UserWarning, "file.py", 1, module=module, registry={})
    assert len(caught) == 1


def test_a_machine_without_a_place_for_temporary_files_is_told_the_variable_that_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere/at/all"])
    with pytest.raises(typer.Exit), clean_errors(debug=False):
        tempfile.mkdtemp()
    assert "set the environment variable TMPDIR to one" in capsys.readouterr().err


def test_a_working_directory_that_was_removed_and_a_home_that_is_not_known_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(typer.Exit), clean_errors(debug=False):
        Path("run").absolute()
    assert "the working directory was removed" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(typer.Exit), clean_errors(debug=False):
        Path("~/cora").expanduser()
    assert "set the environment variable HOME" in capsys.readouterr().err


def test_imported_code_that_ends_the_program_does_not_look_like_success(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as left, clean_errors(debug=False):
        exec("raise SystemExit(0)")
    assert left.value.exit_code == 1
    assert "such as a model's own (--trust-remote-code), ended the program" in capsys.readouterr().err


def test_a_name_that_is_no_utf8_is_not_blamed_on_the_locale(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), clean_errors(debug=False):
        raise UnicodeEncodeError("utf-8", "caf\udce9/config.json", 3, 4, "surrogates not allowed")
    said = capsys.readouterr().err
    assert r"cannot use the name 'caf\\xe9/config.json', whose bytes are no UTF-8; choose another name" in said
    assert "locale" not in said


def test_a_copy_that_fills_the_disk_is_about_what_it_writes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), clean_errors(debug=False):
        raise OSError(errno.ENOSPC, "No space left on device", "/from/config.json", None, "/to/config.json")
    assert capsys.readouterr().err == "cora: error: /to/config.json cannot be used: No space left on device\n"


def test_a_package_that_breaks_when_it_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ops_of_another_torch").mkdir()
    (tmp_path / "ops_of_another_torch" / "__init__.py").write_text("int('nms')")
    (tmp_path / "user_of_ops.py").write_text("import ops_of_another_torch")
    (tmp_path / "user_of_none.py").write_text("import not_there.at_all")
    monkeypatch.syspath_prepend(tmp_path)

    def lazily(name: str) -> None:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ModuleNotFoundError(f"Could not import module {name!r}") from error

    said = {}
    for begin in (importlib.import_module, lazily):
        for name in ("user_of_ops", "user_of_none"):
            with pytest.raises(typer.Exit), clean_errors(debug=False):
                begin(name)
            said.setdefault(name, set()).add(capsys.readouterr().err)
    help_ = "; install a version of it that fits the others, or uninstall it if nothing needs it\n"
    assert said["user_of_ops"] == {
        f"cora: error: the package ops_of_another_torch cannot be imported (invalid literal for int() with base 10: 'nms'){help_}"
    }
    assert said["user_of_none"] == {
        f"cora: error: the package not_there cannot be imported (No module named 'not_there'){help_}"
    }


def test_a_package_that_states_no_version_is_named_in_place_of_the_one_that_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half_there-1.0.dist-info").mkdir()
    (tmp_path / "half_there-1.0.dist-info" / "METADATA").touch()
    (tmp_path / "an_old_one-1.0.dist-info").mkdir()
    (tmp_path / "an_old_one-1.0.dist-info" / "METADATA").write_bytes(b"Name: an-old-one\nVersion: 1.0\nAuthor: Ren\xe9\n")
    asks = "from importlib.metadata import version\nfrom packaging.version import parse\nparse(str(version('half-there')))"
    (tmp_path / "asks_for_it.py").write_text(asks)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(typer.Exit), clean_errors(debug=False):
        importlib.import_module("asks_for_it")
    assert capsys.readouterr().err == (
        f"cora: error: the package half_there is damaged: {tmp_path}/half_there-1.0.dist-info states no version (Invalid version: 'None'); install a "
        "version of it that fits the others, or uninstall it if nothing needs it\n"
    )


def test_an_unknown_home_is_said_to_be_the_reason_also_in_the_words_of_nltk(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        RuntimeError("Could not determine home directory."),
        ValueError("Could not find a default download directory"),
    ):
        with pytest.raises(typer.Exit), clean_errors(debug=False):
            raise words
        assert "set the environment variable HOME\n" in capsys.readouterr().err


def test_a_package_of_a_version_that_a_library_refuses_is_named_also_where_the_error_is_its_own_cause(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = ImportError(
        "Found an incompatible version of torchao. Found version 0.10.0, but only versions above 0.16.0 are supported"
    )
    for cause in (None, error):
        with pytest.raises(typer.Exit), clean_errors(debug=False):
            raise error from cause
        assert (
            "a package is missing or does not fit the others (Found an incompatible version of torchao. Found version 0.10.0,"
            in (capsys.readouterr().err)
        )


def test_a_failure_after_the_imports_is_not_blamed_on_a_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), clean_errors(debug=False):
        json.loads("{")
    assert "unexpected JSONDecodeError" in capsys.readouterr().err


def test_a_dry_run_names_an_output_directory_that_is_a_file(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    dry_runs = {
        "train": ["--model", tiny_model, "--dataset", tiny_data, "--mode", "lora", "--max-steps", 1],
        "evaluate": ["--model", tiny_model, "--dataset", tiny_data],
        "inspect": [tiny_model, "--rank", 2],
        "ablate": ["honest", "--model", tiny_model, "--measure", 1],
    }
    for name, arguments in dry_runs.items():
        done = CliRunner().invoke(app, [name, *map(str, arguments), "-o", str(file), "--dry-run", "--device", "cpu"])
        assert f"output directory {file} is a file; choose a new or empty directory" in done.stderr, name
        assert done.exit_code == (0 if name == "train" else 1)
