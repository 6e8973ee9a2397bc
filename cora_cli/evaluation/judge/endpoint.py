"""A judge behind an OpenAI-compatible chat endpoint: bounded concurrency, waits that grow after errors, and one request at a time each.

The threads only send and receive. The caller's thread decides what is sent when, and sees every outcome.
"""

import datetime
import email.utils
import functools
import heapq
import http.client
import io
import ipaddress
import json
import math
import os
import queue
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from cora_cli.environment import checked_proxy
from cora_cli.errors import CoraError
from cora_cli.evaluation.judge.asking import Call, NoReply, Reply
from cora_cli.evaluation.judge.config import JudgeConfig
from cora_cli.progress import note
from cora_cli.reading import Malformed, parse_json

LONGEST_WAIT = 60.0
"""Seconds; a wait that the server asks for may be longer, up to `LONGEST_RETRY_AFTER`."""
LONGEST_RETRY_AFTER = 600.0
LARGEST_REPLY = 4 << 20
SHORTEST_SECRET = 8
"""Characters of a key that is worth hiding. Servers without keys are given one such as `0`, which replies hold for other reasons."""
FAILURES_IN_A_ROW = 10
"""After so many calls without a reply the endpoint counts as down."""


_OF_MESSAGE = (400, 413, 422)
"""How servers refuse a message, as too long or for what it says, each in words of its own; and any message, for the settings of the request."""


class Refused(Exception):
    """The endpoint refuses this request for a reason that waiting does not change."""


class Unavailable(Exception):
    """No reply this time. `after` is how long the server asks to wait, `paid` whether it may have computed one, and `to_message` that the server gives
    none to this message, but may to others."""

    def __init__(self, reason: str, paid: bool, after: float | None = None, to_message: bool = False) -> None:
        super().__init__(reason)
        self.paid, self.after, self.to_message = paid, after, to_message


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would carry the key to another place."""

    def redirect_request(self, *_: Any) -> None:
        """No request."""


class _Timed(io.RawIOBase):
    """What a socket receives until a deadline, however slowly it comes; a timeout of the socket alone starts again with every byte."""

    def __init__(self, connection: socket.socket, received: io.RawIOBase, deadline: float) -> None:
        self._socket, self._received, self._deadline = connection, received, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._received.readinto(buffer)

    def close(self) -> None:
        self._received.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    """A response whose headers and body end by a deadline."""

    def __init__(self, connection: socket.socket, *details: Any, deadline: float, **more: Any) -> None:
        super().__init__(connection, *details, **more)
        self.fp = io.BufferedReader(_Timed(connection, self.fp.detach(), deadline))


def _timed(kind: type[http.client.HTTPConnection], host: str, timeout: float, **more: Any) -> http.client.HTTPConnection:
    """A connection whose responses, a proxy's own among them, end `timeout` seconds from now."""
    connection = kind(host, timeout=timeout, **more)
    response = functools.partial(_TimedResponse, deadline=time.monotonic() + timeout)
    # http.client only calls it, but typeshed declares a class.
    connection.response_class = response  # type: ignore[assignment]
    return connection


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(_timed, http.client.HTTPConnection), request)


class _Encrypted(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(_timed, http.client.HTTPSConnection), request)


class Endpoint:
    """See the module; the settings are those of `cora judge`."""

    def __init__(self, config: JudgeConfig) -> None:
        assert config.endpoint is not None
        self._url = f"{config.endpoint.rstrip('/')}/chat/completions"
        self._key = os.environ.get(config.key_variable, "").strip()
        self._config = config
        if not all("!" <= sign <= "~" for sign in self._key):
            raise CoraError(
                f"the key in {config.key_variable} holds a space or a character that no key has; set the variable again"
            )
        self.has_replied = False
        body: dict[str, Any] = {"model": config.judge, "temperature": 0, "max_tokens": config.max_tokens, "stream": False}
        body |= config.request_parameters()
        self._body = {name: value for name, value in body.items() if value is not None}
        self.identity = {"endpoint": config.endpoint.rstrip("/"), "model": config.judge, "parameters": self._body}
        host = urlsplit(self._url).hostname or ""
        own = _is_loopback(host)
        if self._key and not own and self._url.startswith("http:"):
            note(
                f"the key in {config.key_variable} is sent to {host} without encryption, because the address is http, not https"
            )
        self._proxy = "" if own else checked_proxy(self._url)
        # A proxy of the environment cannot reach this machine's own server.
        proxies = [urllib.request.ProxyHandler({})] if own else []
        self._opener = urllib.request.build_opener(_NoRedirect, _Plain, _Encrypted, *proxies)

    def ask(self, calls: Sequence[Call], allowed: Callable[[Call], bool]) -> Iterator[tuple[Call, Reply | NoReply]]:
        """See `Judge`."""
        traffic = _Traffic(self._config, calls, self._request, self.has_replied)
        try:
            while traffic.send(allowed):
                if (arrived := traffic.arrived()) is not None and (seen := traffic.judge(*arrived)) is not None:
                    yield arrived[0], seen
        finally:
            traffic.close()
            self.has_replied = traffic.has_replied
        if traffic.fatal is not None:
            raise traffic.fatal

    def _request(self, message: str) -> Reply:
        """One request. Raises `Unavailable` if another may succeed, else `Refused`."""
        body = {**self._body, "messages": [{"role": "user", "content": message}]}
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "cora-cli"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._config.timeout) as response:
                text = self._read(response)
        except urllib.error.HTTPError as error:
            raise self._of_status(error) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise Refused(
                    f"its certificate is not valid: {error.reason.verify_message}; if an authority of your own signed it, name the file of that "
                    "authority's certificate in the environment variable SSL_CERT_FILE"
                ) from error
            if getattr(error.reason, "reason", None) == "WRONG_VERSION_NUMBER":
                raise Refused("it does not encrypt: its address begins with http, not https") from error
            # Nothing was sent, or the connection ended before any answer: the server may still have computed one.
            raise Unavailable(
                self._without_key(f"no connection: {error.reason}{self._proxy}"), paid=_was_sent(error.reason)
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, TimeoutError):
                raise Unavailable(
                    f"the reply took longer than the {self._config.timeout:g} s of --timeout", paid=True
                ) from error
            if isinstance(error, UnicodeDecodeError):
                raise Unavailable("the reply is not UTF-8 text", paid=True) from error
            detail = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise Unavailable(self._without_key(f"the reply was cut off: {detail}{self._proxy}"), paid=True) from error
        return self._reply(text)

    def _read(self, response: Any) -> str:
        """The body of a response, within the size that is allowed."""
        parts, size = [], 0
        while chunk := response.read1(1 << 16):
            parts.append(chunk)
            size += len(chunk)
            if size > LARGEST_REPLY:
                raise OSError("it is too long")
        stated = response.headers.get("Content-Length", "")
        if stated.isdecimal() and int(stated) != size:
            raise OSError(f"{size} of {stated} bytes came")
        return b"".join(parts).decode("utf-8")

    def _of_status(self, error: urllib.error.HTTPError) -> Exception:
        try:
            detail = self._without_key(" ".join(error.read(4096).decode("utf-8", errors="replace").split()))[:300]
        except (OSError, http.client.HTTPException):
            detail = ""
        status = f"status {error.code}" + (f": {detail}" if detail else "") + (self._proxy if error.code == 407 else "")
        if 300 <= error.code < 400 and (place := error.headers.get("Location")):
            return Refused(f"status {error.code}: it leads to {self._without_key(place)[:200]}, and no redirect is followed")
        if error.code in _OF_MESSAGE:
            return Unavailable(status, paid=False, to_message=True)
        if error.code not in (408, 409, 425, 429) and error.code < 500:
            return Refused(status)
        after = retry_after(error.headers.get("Retry-After"))
        if after is not None and after > LONGEST_RETRY_AFTER:
            return Refused(f"{status}; it asks to wait for {after:.0f} s")
        return Unavailable(status, paid=False, after=after)

    def _reply(self, text: str) -> Reply:
        try:
            value = parse_json(text)
            choice = value["choices"][0]
            content = choice["message"].get("content")
            usage, is_cut = value.get("usage"), choice.get("finish_reason") == "length"
        except (Malformed, LookupError, TypeError, AttributeError) as error:
            shown = self._without_key(" ".join(text.split()))[:200]
            raise Unavailable(f"the body of the reply was no chat completion: {shown!r}", paid=True) from error
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            content = "".join(part for part in parts if isinstance(part, str))
        counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
        known = [count if type(count) is int and 0 <= count < 10**9 else None for count in counts]
        model = value.get("model")
        return Reply(
            self._without_key(content) if isinstance(content, str) else "",
            known[0],
            known[1],
            self._without_key(model)[:200] if isinstance(model, str) else None,
            is_cut,
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "<key>") if len(self._key) >= SHORTEST_SECRET else text


class _Traffic:
    """The calls of one `ask`: those that wait for their time, those that are under way, and whether anything more is sent.

    `fatal` is the reason why no call can succeed, raised once all replies under way have come.
    """

    def __init__(self, config: JudgeConfig, calls: Sequence[Call], request: Callable[[str], Reply], has_replied: bool) -> None:
        self._config, self._request, self._draw = config, request, random.Random()
        self._threads = min(config.concurrency, len(calls))
        self._todo: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Call, Reply | Exception]] = queue.SimpleQueue()
        for _ in range(self._threads):
            # Daemons: an interrupted command does not wait for replies.
            threading.Thread(target=self._work, daemon=True).start()
        # The time of the next try, the place in line, how often it was tried, the call.
        self._waiting = [(0.0, place, 0, call) for place, call in enumerate(calls)]
        self._under_way: dict[int, tuple[int, int]] = {}
        self._pause, self._failed_in_a_row, self._stopped = 0.0, 0, False
        self.fatal: CoraError | None = None
        self._refused: Exception | None = None
        self.has_replied = has_replied

    def send(self, allowed: Callable[[Call], bool]) -> bool:
        """Send what is due and allowed. Returns whether there is anything to wait for."""
        while self._has_room and self._due() <= time.monotonic():
            if not allowed(self._waiting[0][3]):
                self._stopped = True
                break
            _, place, tries, call = heapq.heappop(self._waiting)
            self._under_way[call.number] = (place, tries)
            self._todo.put(call)
        return bool(self._under_way) or self._has_room

    @property
    def _has_room(self) -> bool:
        return bool(self._waiting) and not self._stopped and len(self._under_way) < self._threads

    def _due(self) -> float:
        return max(self._waiting[0][0], self._pause)

    def arrived(self) -> tuple[Call, Reply | Exception] | None:
        """The next outcome; None if it is time to send another request first."""
        try:
            return self._done.get(timeout=max(self._due() - time.monotonic(), 0.0) if self._has_room else None)
        except queue.Empty:
            return None

    def judge(self, call: Call, outcome: Reply | Exception) -> Reply | NoReply | None:
        """What an outcome means for the caller, and when the call is tried again; None where no call can succeed."""
        place, tries = self._under_way.pop(call.number)
        if isinstance(outcome, Reply):
            self._failed_in_a_row, self.has_replied = 0, True
            return outcome
        if not isinstance(outcome, Unavailable):
            self._stop(_fatal(outcome))
            return None
        if outcome.to_message and self.has_replied:
            return NoReply(str(outcome), outcome.paid, last=True)
        last = outcome.to_message or tries >= self._config.retries
        self._failed_in_a_row += last
        self._refused = outcome if outcome.to_message else self._refused
        if outcome.to_message and self._failed_in_a_row >= FAILURES_IN_A_ROW:
            self._stop(_fatal(Refused(str(outcome))))
        if self._failed_in_a_row >= FAILURES_IN_A_ROW:
            self._stop(
                CoraError(
                    f"{self._config.endpoint} gave no reply to {self._failed_in_a_row} calls in a row ({outcome}); what was judged is kept: run "
                    "the same command again once it answers"
                )
            )
        if outcome.after is not None:
            self._pause = max(self._pause, time.monotonic() + outcome.after)
        if not last:
            wait = min(self._config.backoff * 2 ** min(tries, 30), LONGEST_WAIT) * 2 * self._draw.random()
            heapq.heappush(self._waiting, (time.monotonic() + wait, place, tries + 1, call))
        return NoReply(str(outcome), outcome.paid, last)

    def _stop(self, why: CoraError) -> None:
        self._stopped, self.fatal = True, self.fatal or why

    def _work(self) -> None:
        while (call := self._todo.get()) is not None:
            try:
                outcome: Reply | Exception = self._request(call.message)
            except Exception as error:  # whatever it is, the caller's thread decides
                outcome = error
            self._done.put((call, outcome))

    def close(self) -> None:
        """End the threads that wait for work. A server that refused messages and gave no reply at all refuses the request."""
        if self._refused is not None and not self.has_replied:
            self._stop(_fatal(Refused(str(self._refused))))
        for _ in range(self._threads):
            self._todo.put(None)


def retry_after(value: str | None) -> float | None:
    """The seconds of a `Retry-After`, which is a number or a date; None if it is missing or neither."""
    if value is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d+)?\s*", value):
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    then = then if then.tzinfo else then.replace(tzinfo=datetime.UTC)
    return max(math.ceil((then - datetime.datetime.now(datetime.UTC)).total_seconds()), 0)


def _was_sent(reason: object) -> bool:
    """Whether a request may have reached the server although there is no connection any more."""
    return not isinstance(reason, ConnectionRefusedError | socket.gaierror)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _fatal(error: Exception) -> CoraError:
    if isinstance(error, Refused):
        return CoraError(
            f"the endpoint refuses the request ({error}); what was judged is kept: correct --endpoint, --judge, the key or --parameters, and "
            "run the command again"
        )
    return CoraError(f"a request cannot be sent: {type(error).__name__}: {error}")
