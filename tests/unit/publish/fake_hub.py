"""A Hub on this machine: the HTTP calls that huggingface_hub makes to create a repository and to
commit files, plain ones and ones of large file storage.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"
LFS = (".safetensors", ".npz", ".bin")


class FakeHub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repos: repository -> path -> content, after each commit.
        private: repository -> whether it is private.
        calls: method and path of each request.
        messages: of the commits.
        may_write: whether commits are taken.
        role: of the token, as the Hub names it.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Calls)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.messages: list[str] = []
        self.may_write = True
        self.role = "write"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Calls(BaseHTTPRequestHandler):
    """A request."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.body())

    def do_PUT(self) -> None:
        body = self.body()
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.server.calls.append("PUT /blob")
        self.server.blobs[self.path.rpartition("/")[2]] = body
        self.send(200, {})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if "error" in value:
            self.send_header("X-Error-Message", value["error"])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self, body: bytes) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.calls.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/whoami-v2":
            about = {"type": "access_token", "accessToken": {"role": hub.role}}
            return self.send(200, {"type": "user", "name": "owner", "orgs": [], "auth": about})
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        repo = "/".join(path.removeprefix("/api/models").removesuffix(LFS_CALL).split("/")[1:3])
        if repo not in hub.repos:
            return self.send(404, {"error": "Repository not found"})
        if path == f"/api/models/{repo}":
            return self.send(200, {"id": repo, "private": hub.private[repo]})
        if path == f"/api/models/{repo}/tree/main":
            rows = [{"type": "file", "path": one, "size": len(content), "oid": "0"}
                    for one, content in hub.repos[repo].items()]  # fmt: skip
            return self.send(200, rows)
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {"path": one["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if one["path"].endswith(LFS) else "regular"}
                for one in files
            ]  # fmt: skip
            return self.send(200, {"files": modes})
        if path.endswith(LFS_CALL):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/blob/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.send(200, {"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            return self.commit(repo, [json.loads(line) for line in body.splitlines()])
        self.send(404, {"error": f"no such call: {path}"})

    def create(self, asked: dict[str, Any]) -> None:
        hub, repo = self.server, f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "owner":
            return self.send(403, {"error": "You don't have the rights to create a model"})
        if repo in hub.repos:
            return self.send(409, {"url": f"{hub.url}/{repo}", "error": "You already created it"})
        hub.repos[repo] = {}
        # huggingface_hub 1 and 2 say the visibility, 0 whether it is private
        hub.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.send(200, {"url": f"{hub.url}/{repo}"})

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        hub = self.server
        if not hub.may_write:
            return self.send(403, {"error": "Forbidden: the token may only read"})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                hub.messages.append(value["summary"])
            elif line["key"] == "file":
                hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del hub.repos[repo][value["path"]]
            else:
                assert line["key"] == "lfsFile", line
                hub.repos[repo][value["path"]] = hub.blobs[value["oid"]]
        self.send(200, {"commitUrl": f"{hub.url}/{repo}/commit/abc", "commitOid": "abc"})


LFS_CALL = ".git/info/lfs/objects/batch"


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub that answers in a thread."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(10)
