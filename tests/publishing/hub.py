"""A hub on this machine: the part of the Hugging Face API through which its client creates a repository and commits files."""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKEN = "hf_test"


@dataclass
class Repository:
    """Its files and whether it is private."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)

    def download(self, folder: Path) -> Path:
        """All files in `folder`, as the hub's client would put them there."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder


@dataclass
class Hub:
    """The server's address, its repositories by name, and the requests that it got."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield hub
        server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def _handle(self, method: str) -> None:
        body = self._body()
        self.state.requests.append(f"{method} {self.path}")
        if method != "PUT" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        routes = [
            ("GET", r"/api/models/([^/]+/[^/]+)", self._info),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", lambda _: self._answer(200, {"errors": [], "warnings": []})),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/main", self._modes),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/blobs/([0-9a-f]{64})", self._blob),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/main", self._commit),
        ]
        for wanted, pattern, answer in routes:
            if wanted == method and (found := re.fullmatch(pattern, self.path.partition("?")[0])):
                return answer(body, *found.groups())
        return self._answer(404, {"error": f"no route {method} {self.path}"})

    def _info(self, _: bytes, name: str) -> None:
        if name not in self.state.repositories:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        found = self.state.repositories[name]
        siblings = [{"rfilename": path} for path in (".gitattributes", *found.files)]
        return self._answer(200, {"id": name, "private": found.private, "siblings": siblings, "sha": "0" * 40})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.state.repositories[name] = Repository(private)
        self._answer(200, {"url": f"{self.state.address}/{name}", "name": name, "id": name})

    def _modes(self, body: bytes, _: str) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

        files = [entry["path"] for entry in json.loads(body)["files"]]
        self._answer(200, {"files": [{"path": path, "uploadMode": mode(path), "shouldIgnore": False} for path in files]})

    def _batch(self, body: bytes, _: str) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.state.address}/blobs/{entry['oid']}"}}}
            for entry in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _blob(self, body: bytes, oid: str) -> None:
        right = hashlib.sha256(body).hexdigest() == oid
        self.state.blobs[oid] = body
        self._answer(200 if right else 400, {})

    def _commit(self, body: bytes, name: str) -> None:
        files = self.state.repositories[name].files
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self._answer(200, {"commitUrl": f"{self.state.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, code: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        for key, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(content)
