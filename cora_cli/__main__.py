"""The `cora` command, and `python -m cora_cli`, which is what torchrun and accelerate launch.

It imports nothing itself, so that an interrupt during the first imports ends like any other.
"""

import sys


def main() -> None:
    """Run a command line and leave with its exit code."""
    try:
        _leave_out_working_directory()
        from cora_cli.cli import main as run

        run()
    except KeyboardInterrupt:
        print("cora: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    finally:
        import signal

        # All that remains is the end of Python and its libraries: another Ctrl-C ends it without their tracebacks.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _leave_out_working_directory() -> None:
    """Search no modules where an empty entry of PYTHONPATH says to, for which `$PYTHONPATH:FOLDER` is enough while it is not set.

    It stands for the working directory, where a file that is named like a module would be imported in its place, here and in what this program starts.
    """
    import os

    stated = os.environ.get("PYTHONPATH", "")
    named = [entry for entry in stated.split(os.pathsep) if entry]
    if stated == os.pathsep.join(named):
        return
    os.environ["PYTHONPATH"] = os.pathsep.join(named)
    try:
        here = os.getcwd()  # noqa: PTH109  # pathlib is such a module
    except OSError:  # the directory was removed
        return
    if here in sys.path and here not in named:
        sys.path.remove(here)


if __name__ == "__main__":
    if not sys.flags.safe_path:
        # `python -m` puts the working directory first, where a file that is named like a module would be imported in its place.
        del sys.path[0]
    main()
