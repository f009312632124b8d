"""A hub on the loopback: the part of its HTTP that huggingface_hub asks for when it downloads a model.

`hub.add("org/name", folder)` publishes; `hub.requests` is what was asked of it, as "GET /api/models/org/name".
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]
PIECES = 100  # that a slow download comes in


@dataclass
class Repository:
    """`branches` name commits, commits hold files. Private: nothing is seen without the token; gated: no file is."""

    license: str | None
    private: bool
    gated: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        """The full commit of a branch, or of a commit's first seven digits or more."""
        short = revision if re.fullmatch("[0-9a-f]{7,40}", revision) else "none"
        return self.branches.get(revision) or next((full for full in self.commits if full.startswith(short)), None)


@dataclass
class Hub:
    token = "hf_of_a_friend"
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    capture_errors: dict[str, int] = field(default_factory=dict)  # part of a path -> the status it is answered with
    seconds: dict[str, float] = field(default_factory=dict)  # file name -> how long its download takes
    breaking: list[str] = field(default_factory=list)  # files whose next download breaks off in the middle
    silent: bool = False  # takes a request and never answers

    def add(
        self,
        repo: str,
        files: Path | Files,
        *,
        branch: str = "main",
        license: str | None = "apache-2.0",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Publish a folder, or files by name, as the head of a branch. Returns the commit."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        repository = self.repositories.setdefault(repo, Repository(license, private, gated))
        commit = _sha1(f"{branch} {sorted((name, _sha1(data)) for name, data in files.items())}".encode())
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def wait_for(self, request: str, timeout: float = 30) -> None:
        """Until something has been asked: `hub.wait_for("GET .*/model.safetensors")`."""
        deadline = time.monotonic() + timeout
        while not any(re.match(request, asked) for asked in self.requests):
            assert time.monotonic() < deadline, f"{request}: never asked, only {self.requests}"
            time.sleep(0.02)

    def downloads(self) -> list[str]:
        """The files fetched, in order."""
        fetched = (re.fullmatch("GET /.*/resolve/[^/]+/(.+)", asked) for asked in self.requests)
        return [match[1] for match in fetched if match]


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        while self.hub.silent:
            time.sleep(0.05)
        try:
            self._route(path)
        except ConnectionError:  # the other side has gone, as it may
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815  # http.server calls it by this name

    def log_message(self, format: str, *args: object) -> None: ...

    def _route(self, path: str) -> None:
        for part, status in self.hub.capture_errors.items():
            if part in path:
                return self._refuse(status, "", "something is wrong")
        token = self.headers["Authorization"]
        if token not in (None, f"Bearer {self.hub.token}"):
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        for pattern, answer in (
            ("/api/models/([^/]+/[^/]+)()", self._info),
            ("/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            ("/api/models/([^/]+/[^/]+)/tree/(.+)", self._tree),
            ("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            if match := re.fullmatch(pattern, path):
                repo, revision, *file = match.groups()
                repository = self.hub.repositories.get(repo)
                if not repository or (repository.private and not token):
                    return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
                if not (commit := repository.commit(revision or "main")):
                    return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                if file and repository.gated and not token:
                    return self._refuse(403, "GatedRepo", f"Access to model {repo} is restricted")
                return answer(repo, repository, commit, *file)
        return self._refuse(404, "", "no such page")

    def _info(self, repo: str, repository: Repository, commit: str) -> None:
        siblings = [
            {"rfilename": name, "size": len(data), "blobId": _sha1(data)}
            for name, data in repository.commits[commit].items()
        ]
        card = {"license": repository.license} if repository.license else {}
        self._json({"id": repo, "sha": commit, "siblings": siblings, "cardData": card, "gated": repository.gated})

    def _tree(self, repo: str, repository: Repository, commit: str) -> None:
        files = repository.commits[commit].items()
        self._json([{"type": "file", "path": name, "size": len(data), "oid": _sha1(data)} for name, data in files])

    def _file(self, repo: str, repository: Repository, commit: str, name: str) -> None:
        if (data := repository.commits[commit].get(name)) is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_sha1(data)}"', "Accept-Ranges": "bytes"}
        status, start = 200, 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            status, start = 206, int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self._send(status, data[start:], headers, name)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers | {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], name: str = "") -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.hub.breaking:
            self.hub.breaking.remove(name)
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        pieces = PIECES if name in self.hub.seconds else 1
        size = max(1, -(-len(body) // pieces))
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            time.sleep(self.hub.seconds.get(name, 0) / pieces)


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
