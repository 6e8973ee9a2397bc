import pytest

from cora_cli.evaluation.execution import sandbox
from cora_cli.evaluation.execution.run import run
from tests.evaluation.execution.campaign import run_campaign
from tests.evaluation.execution.helpers import needs_sandbox, outcome
from tests.evaluation.execution.hostile import HOSTILE, PROBLEM

QUICK = (
    "fork bomb",
    "home",
    "loopback",
    "exit",
    "equal to everything",
    "equal object of the tests",
    "near to everything",
    "marker on every file",
    "syscall mount",
)

pytestmark = needs_sandbox


def test_hostile_programs_reach_nothing_and_do_not_pass():
    campaign = run_campaign([one for one in HOSTILE if one.name in QUICK])
    assert len(campaign.outcomes) == len(QUICK)
    assert campaign.faults() == []


@pytest.mark.slow
def test_the_complete_campaign_reaches_nothing_and_leaves_nothing():
    assert len({one.name for one in HOSTILE}) == len(HOSTILE) >= 40
    assert run_campaign(HOSTILE, at_once=2).faults() == []


def test_a_program_cannot_skip_a_test_of_unittest():
    case = "import unittest\nclass Case(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)\n"
    runner = "unittest.TextTestRunner(stream=open('/dev/null', 'w'))"
    tests = (
        f"{case}loaded = unittest.defaultTestLoader.loadTestsFromTestCase(Case)\nassert {runner}.run(loaded).wasSuccessful()"
    )
    assert outcome("def f(x): return x + 1", tests).fate == "passed"
    skips = "import unittest\ndef f(x): raise unittest.SkipTest('later')"
    assert outcome(skips, tests, reference="def f(x): return x + 1").fate == "wrong"


def test_the_problem_of_the_campaign_can_be_solved():
    assert run(PROBLEM, PROBLEM.reference, 4).fate == "passed"


def test_the_number_of_processes_is_bounded_for_root_too():
    program = """
import os, time
started = 0
try:
    for _ in range(60):
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        started += 1
except OSError as error:
    failure = error.errno
user = [line.split()[1:] for line in open('/proc/self/status') if line.startswith(('Uid', 'CapEff'))]
def facts(): return started, failure, user
"""
    uid, nothing = [str(sandbox.UID)] * 4, ["0" * 16]
    test = f"started, failure, user = facts()\nassert 8 < started < {sandbox.PROCESSES}, started\nassert failure == 11 and user == {[uid, nothing]!r}, user"
    assert outcome(program, test) == outcome(program, test).__class__("passed", "", pytest.approx(0, abs=4))


def test_outside_the_sandbox_the_program_is_no_root():
    import subprocess
    from pathlib import Path

    code = "import sys, json, confine, time\nconfine.confine((), **json.loads(sys.argv[1]))\nprint('.', file=sys.stderr, flush=True)\ntime.sleep(60)"
    with sandbox.started(code, {}, sandbox.limits(5), (), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.read(1) == b"."
        tree = [process.pid]
        for pid in tree:
            tree += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        status = Path(f"/proc/{tree[-1]}/status").read_text()
    users = next(line.split()[1:] for line in status.splitlines() if line.startswith("Uid"))
    assert "0" not in users
    assert "Seccomp:\t2" in status
