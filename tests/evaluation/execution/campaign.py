"""Run the hostile programs next to a server on loopback and a secret, and look at the machine before and after.

`python -m tests.evaluation.execution.campaign docs/execution.md` runs all of them and writes the tables of that page.
"""

import dataclasses
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cora_cli.evaluation.execution.run import Outcome, run
from cora_cli.render.markdown_table import markdown_table
from tests.evaluation.execution.hostile import BREACH, ESCAPE, EXHAUSTION, HOSTILE, PRETENCE, PROBLEM, SECRET, Hostile

SECONDS = 1
BEGIN, END = "<!-- campaign: begin -->\n", "<!-- campaign: end -->\n"


@dataclasses.dataclass
class Campaign:
    """What became of each program, and what the machine shows of it."""

    outcomes: list[tuple[Hostile, Outcome]]
    connections: int
    left: set[int]
    changed: list[str]

    def faults(self) -> list[str]:
        """One sentence for everything that a program reached, or that became of it and should not have."""
        found = [
            f"{hostile.name}: {outcome.fate} {outcome.detail}"
            for hostile, outcome in self.outcomes
            if outcome.fate not in hostile.fates or BREACH in outcome.detail or SECRET in outcome.detail
        ]
        found += [f"{self.connections} connections to the host"] if self.connections else []
        found += [f"processes are left: {sorted(self.left)}"] if self.left else []
        return [*found, *(f"{path} was changed" for path in self.changed)]


def run_campaign(programs: Sequence[Hostile], at_once: int = 1) -> Campaign:
    """Run `programs`, some at once."""
    with tempfile.TemporaryDirectory() as folder, _server() as (port, connections):
        secret = Path(folder, "secret.txt")
        secret.write_text(SECRET, encoding="utf-8")
        os.environ["CORA_TEST_SECRET"] = SECRET
        before, watched = _sandboxed(), (secret, Path("/usr/lib"), Path("/"), Path.home())
        states = [_state(path) for path in watched]
        try:
            sources = [hostile.source.replace("{port}", str(port)) for hostile in programs]
            with ThreadPoolExecutor(at_once) as pool:
                outcomes = list(pool.map(lambda source: run(PROBLEM, source, SECONDS), sources))
        finally:
            del os.environ["CORA_TEST_SECRET"]
        changed = [str(path) for path, state in zip(watched, states, strict=True) if _state(path) != state]
        return Campaign(list(zip(programs, outcomes, strict=True)), len(connections), _sandboxed() - before, changed)


def _state(path: Path) -> object:
    return (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else sorted(path.iterdir())


def _sandboxed() -> set[int]:
    """The processes that run the script of a sandbox: those of this process and orphans, not those of tests that run at the same time."""
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if _runs_sandbox(number := int(process.name)):
                    above = _ancestors(number)
                    # The first one below init is a shell or a test runner, unless what started the sandbox is gone.
                    if os.getpid() in above or _runs_sandbox([number, *above][-2]):
                        found.add(number)
            except OSError:
                continue
    return found


def _runs_sandbox(process: int) -> bool:
    return b"/cora/main.py" in Path(f"/proc/{process}/cmdline").read_bytes()


def _ancestors(process: int) -> list[int]:
    found = []
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(process)
    return found


@contextmanager
def _server() -> Iterator[tuple[int, list[object]]]:
    """A server on loopback, and the connections that it got."""
    connections: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        stop = threading.Event()

        def accept() -> None:
            while not stop.is_set():
                try:
                    connections.append(server.accept())
                except TimeoutError:
                    continue

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1], connections
        finally:
            stop.set()
            thread.join()


def tables(campaign: Campaign) -> str:
    """What became of every program, in Markdown."""
    found = dict(campaign.outcomes)
    passed = sum(outcome.fate == "passed" for outcome in found.values())
    text = (
        f"{len(found)} programs, each with a limit of {SECONDS} s: {passed} passed, {campaign.connections} connections reached the host, "
        f"{len(campaign.left)} processes were left behind, and {len(campaign.changed)} of the watched files and directories changed. "
        f"{len(campaign.faults())} of the results differ from what the tests expect.\n"
    )
    for title, programs in (
        ("Exhaust the machine", EXHAUSTION),
        ("Reach what is outside", ESCAPE),
        ("Pass without being right", PRETENCE),
    ):
        rows = [[one.name, one.tries, found[one].fate, found[one].detail.replace("|", "\\|")[:80]] for one in programs]
        text += f"\n{title}:\n\n{markdown_table(['program', 'tries to', 'fate', 'detail'], rows)}\n"
    return text


def main(page: Path) -> None:
    """Run all programs and replace the tables of `page`; ends with status 1 and the reasons if a result is not as expected."""
    campaign = run_campaign(HOSTILE, at_once=2)
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(before + BEGIN + tables(campaign) + END + rest.partition(END)[2], encoding="utf-8")
    if faults := campaign.faults():
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
