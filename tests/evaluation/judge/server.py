"""An OpenAI-compatible server on loopback whose judge has planted biases and faults.

The judge reads the delimiters that the message announces, looks at what stands between them, and obeys what stands outside. Its noise depends
on the text of a request and on how often that text came, not on the order of requests.
"""

import collections
import hashlib
import http.server
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cora_cli import writing
from cora_cli.evaluation.judge.config import JudgeConfig


@dataclass
class Biases:
    """What is planted. `slope` is in points per 100 characters; `first` and `longer` are the shares of pairs decided by that alone."""

    good: float = 60.0
    bad: float = 20.0
    slope: float = 0.0
    noise: float = 0.0
    first: float = 0.0
    longer: float = 0.0
    misjudged: float = 0.0
    seed: int = 1


@dataclass
class Request:
    message: str
    body: dict[str, Any]
    headers: dict[str, str]
    at: float
    answered: bool = False


@dataclass
class Server:
    """The state of a running server. `fault` names what goes wrong with the n-th request (from 0), or is None."""

    biases: Biases = field(default_factory=Biases)
    fault: Callable[[int], str | None] = lambda n: None
    seconds: float = 0.0
    say: Callable[[str], str] | None = None
    requests: list[Request] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    _now: int = 0
    _seen: collections.Counter = field(default_factory=collections.Counter)

    @property
    def answered(self) -> list[str]:
        return [request.message for request in self.requests if request.answered]

    def reply(self, message: str) -> str:
        with self.lock:
            self._seen[message] += 1
            draw = random.Random(f"{self.biases.seed} {self._seen[message]} {message}")
        texts, outside = split(message)
        if self.say:
            return self.say(message)
        keys = re.findall(r'"(\w+)": <number>', outside)
        if re.search(r"give \S+ .*100|prefer|100 points", outside.replace("from 0 to 100", ""), re.IGNORECASE):
            return json.dumps(dict.fromkeys(keys, 100) or {"better": "second"})
        b = self.biases
        if keys:
            fixed = random.Random(hashlib.sha256(f"{texts['task']}{texts['answer']}".encode()).digest())
            good = is_good(texts["task"], texts["answer"]) != (fixed.random() < b.misjudged)
            level = (b.good if good else b.bad) + b.slope * len(texts["answer"]) / 100
            return json.dumps({key: round(min(max(level + draw.gauss(0, b.noise), 0), 100), 3) for key in keys})
        answers = [texts["answer-1"], texts["answer-2"]]
        if draw.random() < b.first:
            return json.dumps({"better": "first"})
        if draw.random() < b.longer and len(answers[0]) != len(answers[1]):
            return json.dumps({"better": "first" if len(answers[0]) > len(answers[1]) else "second"})
        worth = [is_good(texts["task"], answer) for answer in answers]
        return json.dumps({"better": "tie" if worth[0] == worth[1] else "first" if worth[0] else "second"})


def split(message: str) -> tuple[dict[str, str], str]:
    """The texts between the announced delimiters by name, and everything outside them."""
    number = re.search(r"delimiters that end in the number ([0-9a-f]{16})", message)
    assert number
    pattern = re.compile(rf"<([a-z0-9-]+)-{number[1]}>\n(.*?)\n</\1-{number[1]}>", re.DOTALL)
    return {found[1]: found[2] for found in pattern.finditer(message)}, pattern.sub("", message)


def is_good(task: str, answer: str) -> bool:
    topic = re.search(r"topic \d+\b", task)
    return bool(topic) and f"About {topic[0]}:" in answer


def _handler(state: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = Request(body["messages"][-1]["content"], body, dict(self.headers), time.monotonic())
            with state.lock:
                fault = state.fault(len(state.requests))
                state.requests.append(request)
                state._now += 1
                state.most_at_once = max(state.most_at_once, state._now)
            if state.seconds:
                time.sleep(state.seconds)
            # Before the reply, after which the client may send its next request.
            with state.lock:
                state._now -= 1
            self.answer(request, fault)

        def answer(self, request: Request, fault: str | None) -> None:
            if fault and fault[:3].isdecimal():
                status, _, wait = fault.partition(" ")
                self.send(int(status), b'{"error": "planted"}', {"Retry-After": wait} if wait else {})
                return
            if fault == "filtered":
                self.send(400, b'{"error": {"code": "content_filter", "message": "The prompt was filtered."}}', {})
                return
            if fault == "hang up":
                self.close_connection = True
                self.connection.close()
                return
            faulty = {
                "garbage": "I would say 80.",
                "range": '{"fluency": 400, "relevance": 1, "accuracy": 1}',
                "cut": '{"fluency": 4',
            }
            text: Any = faulty.get(fault or "", "") or state.reply(request.message)
            if fault == "parts":
                text = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": text}]
            complete = json.dumps(
                {
                    "model": "planted-1",
                    "choices": [
                        {
                            "message": {"role": "assistant", "content": text},
                            "finish_reason": "length" if fault == "cut" else "stop",
                        }
                    ],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 10},
                }
            ).encode()
            if fault == "half":
                self.send(200, complete[: len(complete) // 2], {"Content-Length": str(len(complete))})
                self.close_connection = True
                return
            if fault in ("slow headers", "slow body"):
                self.trickle(b"HTTP/1.1 200 OK\r\nX-Slow: " if fault == "slow headers" else b"HTTP/1.1 200 OK\r\n\r\n")
                return
            if fault == "moved":
                self.send(308, b"", {"Location": "https://elsewhere.example/v1"})
                return
            if fault == "latin-1":
                self.send(200, '{"choices": ["é"]}'.encode("latin-1"), {})
                return
            if fault == "error":
                self.send(200, b'{"error": {"message": "no such model"}}', {})
                return
            if fault == "not json":
                self.send(200, b"<html>busy</html>", {})
                return
            try:
                self.send(200, complete, {})
            except OSError:
                return  # the client is gone
            request.answered = fault is None

        def trickle(self, start: bytes) -> None:
            """Send a byte at a time, for as long as the client stays."""
            try:
                self.connection.sendall(start)
                while True:
                    self.connection.sendall(b"a")
                    time.sleep(0.01)
            except OSError:
                self.close_connection = True

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

    return Handler


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # with Python's 5, a connection of a burst is lost and tried again only after a second


@contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    """A running server; ends with the block."""
    state = Server(**settings)
    server = _Server(("127.0.0.1", 0), _handler(state))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def write_answers(folder: Path, count: int, good: float = 1.0, seed: int = 0) -> Path:
    """`predictions.jsonl` of a system whose answers are right with probability `good`; prompts and references are the same for all."""
    lines = []
    for topic in range(count):
        fixed, own = random.Random(topic), random.Random(f"{seed} {topic}")
        right = own.random() < good
        lines.append(
            {
                "index": topic,
                "prompt": f"Say something on topic {topic}.",
                "reference": f"About topic {topic}: {'fine words ' * fixed.randint(2, 30)}".strip(),
                "prediction": f"About topic {topic if right else topic + 5000}: {'new words ' * own.randint(2, 30)}".strip(),
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    writing.write_jsonl(folder / "predictions.jsonl", lines)
    return folder / "predictions.jsonl"


def judge_of(server: Server, predictions: Path, out: Path, **settings: Any) -> JudgeConfig:
    """The settings of a judging by a server, without pauses after errors."""
    fast: dict[str, Any] = {"backoff": 0.001, "judge": "planted", **settings}
    return JudgeConfig(from_predictions=str(predictions), endpoint=server.url, output_dir=str(out), **fast)
