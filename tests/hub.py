"""A hub on localhost: the part of the Hugging Face Hub's HTTP API that loading models and datasets uses.

`Hub` serves repositories from memory, at one commit each, with the status codes and headers that `huggingface_hub` and
`datasets` read. A program reaches it by HF_ENDPOINT. Faults are planted per repository.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_ROUTES = {
    "info": re.compile(r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+(?:/[^/]+)?)(?:/revision/(?P<revision>[^/]+))?$"),
    "tree": re.compile(r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)/?(?P<path>.*)$"),
    "paths": re.compile(r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)$"),
    "preupload": re.compile(r"/api/(?P<kind>models)/(?P<id>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)$"),
    "commit": re.compile(r"/api/(?P<kind>models)/(?P<id>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)$"),
    "resolve": re.compile(
        r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$",
    ),
}


@dataclass
class Repository:
    """One repository at one commit."""

    files: Mapping[str, bytes]
    """Path to content."""
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    gated: int | None = None
    """Status of every file, such as 401 without a token and 403 without access; None for all."""
    moved_to: str | None = None
    """Id that the repository was renamed to."""
    broken_after: int | None = None
    """Bytes of its largest file that are sent before the connection ends."""
    failures: list[int] = field(default_factory=list)
    """Status codes, such as 429 and 500, of the next requests of files, one each."""
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    """Title and paths of every commit that was made here, in order."""

    def sha256(self, path: str) -> str:
        return hashlib.sha256(self.files[path]).hexdigest()

    @property
    def largest(self) -> str:
        return max(self.files, key=lambda path: len(self.files[path]))


class Hub:
    """A server of repositories, on a free port of localhost, for the length of a `with` block."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        """By kind (`models` or `datasets`) and id."""
        self.requests: list[str] = []
        """Method and path of every request, in order."""
        self.may_write = True
        """Whether a token may make repositories and commits."""
        self.silent = False
        """Whether connections end without an answer."""
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._handler = Handler
        self._port = 0

    def __enter__(self) -> Hub:
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse connections meanwhile."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Keep the screen to the tests."""

    def _answer(self) -> None:
        if self.server_hub.silent:
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path)
        self.server_hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/":
            return self._send(200, b"a hub", {})
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        for name, route in _ROUTES.items():
            if match := route.match(path):
                found = match.groupdict()
                kind = found["kind"] or "models"
                repository = self.server_hub.repositories.get((kind, found["id"]))
                if repository is None:
                    return self._refuse(404, "RepoNotFound", "Repository not found")
                if repository.moved_to:
                    return self._send(307, b"", {"Location": self.path.replace(found["id"], repository.moved_to)})
                if found["revision"] not in (None, "main", repository.commit):
                    return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {found['revision']}")
                return getattr(self, f"_{name}")(kind, found, repository, body)
        return self._refuse(404, "EntryNotFound", "no such route")

    def _create(self, asked: dict[str, Any]) -> None:
        hub, name = self.server_hub, f"{asked.get('organization') or 'owner'}/{asked['name']}"
        if not hub.may_write:
            return self._refuse(403, "", "You don't have the rights to create a model under this namespace")
        if ("models", name) in hub.repositories:
            return self._refuse(409, "", "You already created this model repo")
        hub.repositories["models", name] = Repository({})
        self._send_json({"url": f"{hub.url}/{name}", "name": name})

    def _preupload(self, kind: str, found: dict[str, str], repository: Repository, body: bytes) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        self._send_json(
            {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]}
        )

    def _commit(self, kind: str, found: dict[str, str], repository: Repository, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line]
        files = {
            one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"
        }
        repository.files = {**repository.files, **files}
        repository.commits.append((lines[0]["value"]["summary"], list(files)))
        url = f"{self.server_hub.url}/{found['id']}/commit/{repository.commit}"
        self._send_json({"success": True, "commitOid": repository.commit, "commitUrl": url, "hookOutput": ""})

    def _info(self, kind: str, found: dict[str, str], repository: Repository, _: bytes) -> None:
        self._send_json(
            {
                "_id": "0" * 24,
                "id": found["id"],
                "sha": repository.commit,
                "private": False,
                "gated": "manual" if repository.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": path} for path in repository.files],
            }
        )

    def _tree(self, kind: str, found: dict[str, str], repository: Repository, _: bytes) -> None:
        folder = f"{found['path']}/" if found["path"] else ""
        entries = [_entry(repository, path) for path in repository.files if path.startswith(folder)]
        folders = {
            folder + path.removeprefix(folder).split("/")[0]
            for path in repository.files
            if "/" in path.removeprefix(folder) and path.startswith(folder)
        }
        if folder and not entries:
            return self._refuse(404, "EntryNotFound", f"{found['path']} does not exist")
        if "recursive=true" not in self.path.lower():
            entries = [entry for entry in entries if "/" not in str(entry["path"]).removeprefix(folder)]
        self._send_json(
            [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)] + entries
        )

    def _paths(self, kind: str, found: dict[str, str], repository: Repository, body: bytes) -> None:
        asked = (
            json.loads(body)["paths"] if body.startswith(b"{") else re.findall(r"paths=([^&]+)", unquote(body.decode()))
        )
        entries = [_entry(repository, path) for path in asked if path in repository.files]
        folders = [path for path in asked if any(file.startswith(f"{path}/") for file in repository.files)]
        self._send_json(entries + [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders])

    def _resolve(self, kind: str, found: dict[str, str], repository: Repository, _: bytes) -> None:
        path = found["path"]
        if repository.gated:
            return self._refuse(repository.gated, "GatedRepo", f"Access to {kind[:-1]} {found['id']} is restricted")
        if repository.failures:
            return self._refuse(repository.failures.pop(0), "", "try again")
        if path not in repository.files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        content = repository.files[path]
        headers = {
            "ETag": f'"{repository.sha256(path)}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'inline; filename="{path.rpartition("/")[2]}"',
        }
        status, start = 200, 0
        if asked := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", "")):
            status, start = 206, int(asked[1])
            end = int(asked[2]) + 1 if asked[2] else len(content)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            content = content[start:end]
        cut = None
        if self.command == "GET" and repository.broken_after is not None and path == repository.largest:
            cut = repository.broken_after
        self._send(status, content, headers, cut=cut)

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str], *, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None and cut < len(content):
            self.close_connection = True


def _entry(repository: Repository, path: str) -> dict[str, Any]:
    content = repository.files[path]
    return {
        "type": "file",
        "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
        "size": len(content),
        "path": path,
    }
