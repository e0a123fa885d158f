"""A small server on loopback that answers as the hub does for one repository."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

REPO = "clinic/Phi-3-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40


class Hub:
    """One repository with the branch `main` and the tag `v0`, and what was asked of it."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.commits = {
            "main": COMMIT,
            "v0": OTHER_COMMIT,
            COMMIT: COMMIT,
            OTHER_COMMIT: OTHER_COMMIT,
        }
        self.folders = {COMMIT: folders["main"], OTHER_COMMIT: folders["v0"]}
        self.endpoint = ""
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.gated = False
        self.breaks = {"": 0}  # how many downloads of a file are still to be cut half way

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [
            p.rpartition("/")[2] for m, p, _ in self.requests if m == "GET" and "/resolve/" in p
        ]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range") or ""))
        if self.hub.gated:
            return self._fail(403, "GatedRepo")
        if found := re.fullmatch(rf"/api/models/{REPO}(?:/(revision|tree)/([^/]+))?/?", path):
            return self._describe(found[1], self.hub.commits.get(found[2] or "main"))
        if found := re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path):
            return self._file(self.hub.commits.get(found[1]), found[2])
        return self._fail(404, "RepoNotFound")

    def _describe(self, what: str, commit: str | None) -> None:
        if commit is None:
            return self._fail(404, "RevisionNotFound")
        files = sorted(f for f in self.hub.folders[commit].rglob("*") if f.is_file())
        names = [str(f.relative_to(self.hub.folders[commit])) for f in files]
        if what == "tree":
            rows = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)}
                for name, file in zip(names, files, strict=True)
            ]
            return self._send(json.dumps(rows).encode(), {"Content-Type": "application/json"})
        siblings = [{"rfilename": name} for name in names]
        info = {"id": REPO, "modelId": REPO, "sha": commit, "siblings": siblings, "tags": []}
        return self._send(json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, commit: str | None, name: str) -> None:
        if commit is None:
            return self._fail(404, "RevisionNotFound")
        file = self.hub.folders[commit] / name
        if not file.is_file():
            return self._fail(404, "EntryNotFound")
        data, headers = file.read_bytes(), {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit}
        cut = None
        if self.command == "GET" and self.hub.breaks.get(name, 0) > 0:
            self.hub.breaks[name] -= 1
            cut = len(data) // 2
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted:
            begin = int(wanted[1])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            return self._send(data[begin:], headers, 206, cut)
        return self._send(data, headers, 200, cut)

    def _send(
        self, data: bytes, headers: dict[str, str], status: int = 200, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True

    def _fail(self, status: int, code: str) -> None:
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
