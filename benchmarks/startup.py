"""How long `cora --help` and every `cora X --help` take compared with `python -c "import typer"`: in turn, the best of several runs.

Every side is a process of this Python, timed from start to end. The program itself lists its commands.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

from harness import record

TARGET = 3.0
PEER = 'python -c "import typer"'


def sides() -> dict[str, list[str]]:
    """Name -> arguments of Python. The peer comes first."""
    import typer

    from cora_cli.cli import app

    commands = typer.main.get_group(app).commands
    helps = {
        " ".join(["cora", *name, "--help"]): ["-m", "cora_cli", *name, "--help"] for name in ([], *([c] for c in commands))
    }
    return {PEER: ["-c", "import typer"], **helps}


def seconds(arguments: list[str]) -> float:
    """Wall-clock seconds of one process, which must succeed."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Time all sides in turn, print the table and add it to the results."""
    from cora_cli.render.markdown_table import markdown_table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often every side is timed")
    options = parser.parse_args()
    measured = sides()
    for arguments in measured.values():  # fills the page cache
        seconds(arguments)
    times: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(options.rounds):
        for name, arguments in measured.items():
            times[name].append(seconds(arguments))
    unit = min(times[PEER])
    ratios = [min(found) / unit for name, found in times.items() if name != PEER]
    rows = [[PEER, f"{unit:.3f}", f"{statistics.median(times[PEER]):.3f}", "", ""]]
    for name, found in list(times.items())[1:]:
        ratio = min(found) / unit
        verdict = f"{TARGET:g} {'reached' if ratio <= TARGET else 'missed'}"
        rows.append([name, f"{min(found):.3f}", f"{statistics.median(found):.3f}", f"{ratio:.2f}", verdict])
    headers = ["start-up", "best s", "median s", "best ÷ import typer", "target, at most"]
    text = markdown_table(headers, rows) + f"\n\n{options.rounds} rounds in turn, {os.cpu_count()} cores."
    print(text)
    worst = f"{min(ratios):.2f} to {max(ratios):.2f} × its time"
    summary = [["start-up", PEER, worst, f"{TARGET:g} {'reached' if max(ratios) <= TARGET else 'missed'}", ""]]
    record("startup", {"markdown": text, "summary": summary, "options": vars(options), "seconds": times})


if __name__ == "__main__":
    main()
