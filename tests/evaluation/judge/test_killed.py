"""A judging that is killed at any moment repeats no request whose answer it has."""

import json
import signal
import subprocess
import sys
import time

import pytest

from cora_cli import hashing
from cora_cli.evaluation.judge.endpoint import Endpoint
from cora_cli.evaluation.judge.judge import judge
from tests.evaluation.judge.server import judge_of, serving, write_answers

CONCURRENCY = 4


def kill_at(tmp_path, moments, count):
    """Run `cora judge`, kill it whenever so many more requests were answered, and check after each what is sent again."""
    path = write_answers(tmp_path / "answers", count)
    out = tmp_path / "out"
    with serving(seconds=0.004) as server:
        config = judge_of(server, path, out, retest=False, concurrency=CONCURRENCY)
        identity = Endpoint(config).identity
        words = ["judge", "--from", str(path), "-o", str(out), "--endpoint", server.url, "--judge", "planted", "--no-retest"]
        command = [sys.executable, "-m", "cora_cli", *words, "--concurrency", str(CONCURRENCY), "--backoff", "0.001"]
        repeated = 0
        for moment in moments:
            known, sent, answered = kept(out), len(server.requests), len(server.answered)
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(server.answered) < answered + moment and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            new = [request.message for request in server.requests[sent:]]
            assert not {hashing.sha256_json([identity, message, 0]) for message in new} & known
        record, _ = judge(config)
        repeated = len(server.requests) - len({request.message for request in server.requests})
        assert repeated <= CONCURRENCY * len(moments)
    with serving() as server:
        calm, _ = judge(judge_of(server, path, tmp_path / "calm", retest=False))
    assert record["rubrics"] == calm["rubrics"]


def kept(out):
    """The hashes of the requests with a complete line in the file."""
    file = out / "judgments.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return {json.loads(line)["request_sha256"] for line in lines}


@pytest.mark.slow
def test_three_kills(tmp_path) -> None:
    kill_at(tmp_path, [1, 7, 20], 12)


@pytest.mark.slow
def test_twenty_kills(tmp_path) -> None:
    kill_at(tmp_path, [1 + 5 * n % 17 for n in range(20)], 30)


def test_half_a_line_of_a_killed_command_is_dropped(tmp_path) -> None:
    path = write_answers(tmp_path / "answers", 6)
    with serving() as server:
        config = judge_of(server, path, tmp_path / "out", rubric=("paper",))
        expected, out = judge(config)
        complete = out.judgments.read_bytes()
        for cut in (1, 40, len(complete.splitlines()[-1])):
            out.judgments.write_bytes(complete[:-cut])
            out.result.unlink()
            sent = len(server.requests)
            found, _ = judge(config)
            assert len(server.requests) == sent + 1
            assert found["rubrics"] == expected["rubrics"]
