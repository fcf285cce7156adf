"""A hub on this machine: what the real huggingface_hub needs of one to make repositories, push, look up and download.

It knows repositories with branches and commits, git-lfs uploads, and downloads that are redirected to another place, as the hub's
are to its CDN. It has no Xet: tests turn that off (`connected`). Faults can be switched on.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

#: Files of these kinds, and larger ones, go to git-lfs.
LFS_SUFFIXES = (".safetensors", ".data", ".engine", ".onnx")
LFS_FROM = 10_000_000
TOKENS = {"hf_owner": "me", "hf_other": "other"}


@dataclass(frozen=True)
class Content:
    """A file at one commit."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        """The sha256 of a file in git-lfs; git's hash of any other."""
        return self.sha256 if self.lfs else hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    """A repository: its commits, newest last, and its branches."""

    private: bool = False
    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, Content], branch: str = "main") -> str:
        text = f"{len(self.commits)} {branch} {sorted((name, content.sha256) for name, content in files.items())}"
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit], self.branches[branch] = dict(files), commit
        return commit

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class LocalHub:
    """The hub's content, its faults and what it was asked for."""

    repos: dict[str, Repo] = field(default_factory=dict)
    #: Uploaded files of git-lfs by sha256.
    lfs: dict[str, bytes] = field(default_factory=dict)
    #: Requests, as "GET /path".
    log: list[str] = field(default_factory=list)
    #: The files that were downloaded, in this order. One that was cut off and continued counts twice.
    downloads: list[str] = field(default_factory=list)
    #: Bytes sent as the contents of files.
    sent: int = 0
    #: Bytes received as the contents of files in git-lfs.
    received: int = 0
    #: Downloads of these files end after so many bytes, so many times.
    cut: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: Downloads of these files give other bytes, as many.
    wrong: set[str] = field(default_factory=set)
    #: Downloads of these files stop after the first bytes, until they are taken out of here.
    hold: set[str] = field(default_factory=set)
    #: Every request gets this status.
    status: int | None = None
    #: Uploads of git-lfs that are accepted before the connection breaks. None: all.
    uploads: int | None = None
    #: Why no upload of git-lfs is accepted, such as a quota.
    quota: str | None = None
    address: str = ""

    def add(self, repo: str, folder: Path, names: list[str] | None = None, *, private: bool = False) -> str:
        """A repository, or another commit of it, with the files in `folder` (or those named). Returns the commit."""
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        return self.put(repo, {name: paths[name].read_bytes() for name in names or paths}, private=private)

    def put(self, repo: str, files: Mapping[str, bytes], *, private: bool = False, branch: str = "main") -> str:
        """The same from contents."""
        found = self.repos.setdefault(repo, Repo(private))
        return found.commit({name: Content(data, is_lfs(name, len(data))) for name, data in files.items()}, branch)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository."""
        found = self.repos[repo]
        return {name: content.data for name, content in found.commits[found.branches[revision]].items()}

    @property
    def cdn(self) -> str:
        """Where large files are: under another name, so that huggingface_hub takes it for another host."""
        return self.address.replace("127.0.0.1", "localhost")


def is_lfs(name: str, size: int) -> bool:
    return size >= LFS_FROM or (size > 0 and name.endswith(LFS_SUFFIXES))


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.log.append(f"{method} {self.path}")
        if self.hub.status is not None:
            return self._error(self.hub.status, "", "out of order")
        address = urlsplit(self.path)
        for pattern, handle in ROUTES:
            if match := re.fullmatch(pattern, f"{method} {address.path}"):
                return handle(self, body, parse_qs(address.query), *map(unquote, match.groups()))
        return self._error(404, "", f"no {method} {self.path} here")

    @property
    def user(self) -> str | None:
        return TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, document: Any, status: int = 200) -> None:
        self._send(status, json.dumps(document).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X_Error_Code": code} if code else {}
        self._send(status, json.dumps({"error": message}).encode(), X_Error_Message=message, **headers)

    def _readable(self, name: str) -> Repo | None:
        """The repository, if this user may see it. If not, the error was sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.user != name.partition("/")[0]):
            self._error(404 if self.user else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _writable(self, name: str) -> Repo | None:
        if (repo := self._readable(name)) is not None and self.user != name.partition("/")[0]:
            self._error(403, "", "You don't have the rights to write to this repository")
            return None
        return repo

    def create(self, body: bytes, query: Any) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if self.user is None:
            return self._error(401, "", "Invalid username or password.")
        if self.user != name.partition("/")[0]:
            return self._error(403, "", f"You don't have the rights to create a model under {name.partition('/')[0]}")
        if name in self.hub.repos:
            return self._json({"url": f"{self.hub.address}/{name}", "error": "You already created this model repo"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[name] = Repo(private)
        self.hub.repos[name].commit({".gitattributes": Content(b"*.onnx filter=lfs\n", lfs=False)})
        return self._json({"url": f"{self.hub.address}/{name}"})

    def branch(self, body: bytes, query: Any, name: str, branch: str) -> None:
        if (repo := self._writable(name)) is None:
            return None
        if branch in repo.branches:
            return self._error(409, "", "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return self._json({})

    def info(self, body: bytes, query: Any, name: str, revision: str = "main") -> None:
        if (repo := self._readable(name)) is None:
            return None
        if (commit := repo.find(revision)) is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings: list[dict[str, Any]] = []
        for path, content in repo.commits[commit].items():
            entry: dict[str, Any] = {"rfilename": path}
            if "blobs" in query:
                entry |= {"size": len(content.data), "blobId": content.etag}
                if content.lfs:
                    entry["lfs"] = {"sha256": content.sha256, "size": len(content.data), "pointerSize": 130}
            siblings.append(entry)
        return self._json({"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": siblings})

    def preupload(self, body: bytes, query: Any, name: str, revision: str) -> None:
        if (repo := self._writable(name)) is None:
            return None
        there = repo.commits[repo.branches[revision]]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_lfs(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
                **({"oid": there[file["path"]].etag} if file["path"] in there else {}),
            }
            for file in json.loads(body)["files"]
        ]
        return self._json({"files": files})

    def batch(self, body: bytes, query: Any, name: str) -> None:
        if self._writable(name) is None:
            return None
        objects = []
        for item in json.loads(body)["objects"]:
            if self.hub.quota is not None:
                objects.append({**item, "error": {"code": 403, "message": self.hub.quota}})
                continue
            upload = {"upload": {"href": f"{self.hub.address}/lfs/{item['oid']}", "header": {}}}
            objects.append({**item, **({} if item["oid"] in self.hub.lfs else {"actions": upload})})
        return self._json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, query: Any, oid: str) -> None:
        if self.hub.uploads is not None:
            if self.hub.uploads == 0:
                self.close_connection = True
                return self.connection.close()
            self.hub.uploads -= 1
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "", "wrong content")
        self.hub.lfs[oid] = body
        self.hub.received += len(body)
        return self._send(200)

    def commit(self, body: bytes, query: Any, name: str, branch: str) -> None:
        if (repo := self._writable(name)) is None:
            return None
        files = dict(repo.commits[repo.branches[branch]])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit") not in (None, repo.branches[branch]):
                return self._error(412, "", "A commit has happened since. Please refresh and try again.")
            if item["key"] == "file":
                files[value["path"]] = Content(base64.b64decode(value["content"]), lfs=False)
            if item["key"] == "lfsFile":
                files[value["path"]] = Content(self.hub.lfs[value["oid"]], lfs=True)
            if item["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(files, branch)
        return self._json({"commitOid": oid, "commitUrl": f"{self.hub.address}/{name}/commit/{oid}", "hookOutput": ""})

    def resolve(self, body: bytes, query: Any, name: str, revision: str, path: str) -> None:
        if (repo := self._readable(name)) is None:
            return None
        if (commit := repo.find(revision)) is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if (content := repo.commits[commit].get(path)) is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{content.etag}"', "X-Linked-Size": str(len(content.data))}
        if not content.lfs:
            return self._content(path, content.data, headers)
        headers |= {"Location": f"{self.hub.cdn}/cdn/{name}/{commit}?name={quote(path)}", "X-Linked-ETag": headers["ETag"]}
        return self._send(302, **headers)

    def cdn(self, body: bytes, query: Any, name: str, commit: str) -> None:
        if "Authorization" in self.headers:  # a token is for the hub only
            return self._error(400, "", "only one auth mechanism allowed")
        path = query["name"][0]
        return self._content(path, self.hub.repos[name].commits[commit][path].data, {})

    def _content(self, path: str, data: bytes, headers: Mapping[str, str]) -> None:
        if self.command == "GET":
            self.hub.downloads.append(path)
        if path in self.hub.wrong:
            data = bytes(len(data))
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        rest = data[first:]
        self.send_response(206 if first else 200)
        for name, value in {**headers, "Content-Length": str(len(rest))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        length, times = self.hub.cut.get(path, (0, 0))
        if times:
            self.hub.cut[path] = (length, times - 1)
            rest = rest[:length]
            self.close_connection = True
        with contextlib.suppress(OSError):  # whoever asked has gone
            while path in self.hub.hold:
                self.wfile.write(rest[:1])
                rest = rest[1:]
                self.wfile.flush()
                threading.Event().wait(0.05)
            self.wfile.write(rest)
            self.hub.sent += len(rest)


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Any]] = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", lambda self, *_: self._json({"warnings": [], "errors": []})),
    (rf"POST /api/models/{_NAME}/branch/(.+)", Handler.branch),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/(.+)", Handler.commit),
    (rf"GET /api/models/{_NAME}/revision/(.+)", Handler.info),
    (rf"GET /api/models/{_NAME}", Handler.info),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/([0-9a-f]{64})", Handler.upload),
    (rf"(?:HEAD|GET) /{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    (rf"GET /cdn/{_NAME}/(.+)", Handler.cdn),
]


@contextlib.contextmanager
def running() -> Iterator[LocalHub]:
    """A hub that answers on a port of this machine."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def connect(hub: LocalHub, cache: Path, patch: pytest.MonkeyPatch, token: str | None = None) -> None:
    """Point the real huggingface_hub of this process to `hub`: an empty cache, no Xet, no waiting before it retries."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    patch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
    patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def environment(hub: LocalHub, cache: Path, token: str = "") -> dict[str, str]:
    """The same for another process."""
    return {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN_PATH": str(cache / "no-token"),
        "HF_TOKEN": token,
    }
