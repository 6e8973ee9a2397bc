"""The `cora` command line: one small module per command, which checks its settings, calls one function and prints the result.

Nothing heavy is imported here: `--help` must be fast, so each command imports its dependencies when it runs.
"""

import os
import sys

import typer

from cora_cli.cli import (
    ablate,
    demo,
    doctor,
    evaluate,
    export,
    extract_basis,
    inspect,
    judge,
    laplace,
    list_outputs,
    merge,
    publish,
    report,
    train,
    verify,
)
from cora_cli.cli.command import clean_errors
from cora_cli.cli.usage import Group
from cora_cli.environment import forget_settings, quiet_libraries
from cora_cli.terminal import open_missing_streams, show

app = typer.Typer(
    name="cora",
    cls=Group,
    help="Experiments with CoRA (arXiv 2409.02119): LoRA whose B is a common subspace of fine-tuned models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain text: `--help` takes twice as long with rich.
    rich_markup_mode=None,
    # Without a default, typer converts the values of the group's own options and imports pydantic to do so.
    context_settings={
        "default_map": {"help": False, "install_completion": False, "show_completion": False},
        "help_option_names": ["-h", "--help"],
    },
)
for module in (
    extract_basis,
    inspect,
    train,
    laplace,
    evaluate,
    judge,
    ablate,
    report,
    list_outputs,
    merge,
    export,
    publish,
    verify,
    demo,
    doctor,
):
    module.register(app)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the versions and exit.", is_eager=True)
) -> None:
    if version:
        show(_versions())
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def _versions() -> str:
    """The version on the first line, then those of what decides results; a package that is missing is left out."""
    import contextlib
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    from cora_cli import __version__

    found = [f"Python {sys.version.split()[0]}"]
    for package in ("torch", "transformers", "peft", "accelerate", "datasets"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version_of(package)}")
    return f"cora {__version__}\n{', '.join(found)}"


def main() -> None:
    """Entry point of the `cora` command."""
    open_missing_streams()
    quiet_libraries()
    # Python programs that this one starts, however they are started, do not import modules from the working directory.
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        with clean_errors("--debug" in sys.argv):
            forget_settings()
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    app(prog_name="cora")
