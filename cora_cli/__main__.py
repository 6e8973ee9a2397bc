"""The `cora` command, and `python -m cora_cli`, which is what torchrun and accelerate launch.

It imports nothing itself, so that an interrupt during the first imports ends like any other.
"""

import sys


def main() -> None:
    """Run a command line and leave with its exit code."""
    try:
        from cora_cli.cli import main as run

        run()
    except KeyboardInterrupt:
        print("cora: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
