"""A local HTTP server that speaks the Hub's protocol as huggingface_hub 2 does with `HF_HUB_DISABLE_XET=1`.

    with HubServer(folder) as hub:
        environment = hub.environment  # HF_ENDPOINT, HF_TOKEN ...; for a process with an empty cache of its own

`hub.log` lists what was asked. `hub.intercept`, a function of a request's handler, stands in for the faults of networks
and servers: where it returns True, it has answered.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.support.hub_store import LFS_BYTES, LFS_SUFFIXES, Commit, HubStore, Repo, StoredFile, changed


TOKEN = "stand-in-token"
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
ID = r"(?P<name>[\w.-]+/[\w.-]+?)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{ID}"
FILES = rf"/(?:(?P<kind>datasets|spaces)/)?{ID}"


class RequestError(Exception):
    """An answer other than success: status, message, and the code by which huggingface_hub tells errors apart."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    """Finds the method for a request's path; what it returns is the answer's JSON."""

    protocol_version = "HTTP/1.1"
    hub: "HubServer"
    timeout = 60

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # the client was killed, or has had enough
            self.close_connection = True

    def answer(self) -> None:
        """Any request."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command != "PUT" else b""
        url = urlsplit(self.path)
        self.path, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.log.append((self.command, self.path))
        if self.hub.intercept is not None and self.hub.intercept(self):
            return
        try:
            self.send(*self._dispatch(url.path))
        except RequestError as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": str(refused)}
            self.send({"error": str(refused)}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def _dispatch(self, raw_path: str) -> tuple[Any, ...]:
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, raw_path)
            if match and self.command in (method, "HEAD" if method == "GET" else method):
                found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if self.command in ("POST", "PUT") and "/cdn/" not in raw_path:
                    self._authorize()
                result = function(self, **found)
                return result if isinstance(result, tuple) else (result,)
        raise RequestError(404, f"{self.command} {raw_path}: no such page")

    def _authorize(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RequestError(401, "Invalid credentials in Authorization header")

    def send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Bytes as they are, anything else as JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Tests read `hub.log`."""

    def json(self) -> Any:
        return json.loads(self.body)

    def repo(self, kind: str, name: str) -> Repo:
        repo = self.hub.store.repos.get((KINDS.get(kind, "model"), name))
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise RequestError(
                401 if "Authorization" not in self.headers else 404, "Repository not found", "RepoNotFound"
            )
        return repo

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise RequestError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


def create_repo(on: Handler) -> Any:
    asked = on.json()
    kind, name = asked.get("type") or "model", f"{asked['organization'] or 'user'}/{asked['name']}"
    url = {"url": f"{on.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}", "name": name}
    if (kind, name) in on.hub.store.repos:
        return {**url, "error": "You already created this repo"}, 409
    on.hub.store.create(
        kind, name, asked.get("visibility") == "private" or bool(asked.get("private")), asked.get("sdk")
    )
    return url


def validate_yaml(on: Handler) -> Any:
    head = re.match(r"---\r?\n(.*?)\r?\n---", on.json()["content"], re.DOTALL)
    try:
        data = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError as error:
        return {"errors": [{"message": str(error)}], "warnings": []}, 400
    if on.json()["repoType"] == "space" and "sdk" not in (data or {}):
        return {"errors": [{"message": '"sdk" is required'}], "warnings": []}, 400
    return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}


def whoami(on: Handler) -> Any:
    on._authorize()
    return {"type": "user", "name": "user", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": "write"}}}


def info(on: Handler, kind: str, name: str, revision: str = "main") -> Any:
    repo = on.repo(kind, name)
    commit = on.commit_of(repo, revision)
    siblings = [{"rfilename": path} for path in commit.files]
    about = {"id": name, "author": name.split("/")[0], "sha": commit.oid, "private": repo.private, "gated": False}
    return {**about, "tags": [], "downloads": 0, "siblings": siblings, "sdk": repo.sdk}


def refs(on: Handler, kind: str, name: str) -> Any:
    found: dict[str, list[dict[str, str]]] = {"heads": [], "tags": [], "pr": []}
    for ref, oid in on.repo(kind, name).refs.items():
        _, part, short = ref.split("/", 2)
        found[part].append({"name": short, "ref": ref, "targetCommit": oid})
    return {"branches": found["heads"], "tags": found["tags"], "converts": [], "pullRequests": found["pr"]}


def branch(on: Handler, kind: str, name: str, branch: str) -> Any:
    repo = on.repo(kind, name)
    if f"refs/heads/{branch}" in repo.refs:
        return {"error": "Reference already exists"}, 409
    start = on.json().get("startingPoint", "main") if on.body else "main"
    repo.refs[f"refs/heads/{branch}"] = on.commit_of(repo, start).oid
    return {}


def entry(path: str, file: StoredFile) -> dict[str, Any]:
    lfs = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.sha256 else {}
    return {"type": "file", "path": path, "size": file.size, "oid": file.oid, **lfs}


def folders(files: dict[str, StoredFile]) -> list[dict[str, Any]]:
    names = {path.rsplit("/", depth)[0] for path in files for depth in range(1, path.count("/") + 1)}
    return [
        {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
        for name in sorted(names)
    ]


def tree(on: Handler, kind: str, name: str, revision: str, path: str = "") -> Any:
    files = on.commit_of(on.repo(kind, name), revision).files
    everything = folders(files) + [entry(file_path, file) for file_path, file in files.items()]
    prefix = f"{path}/" if path else ""
    below = [one for one in everything if one["path"].startswith(prefix)]
    if path and not below:
        raise RequestError(404, f"{path} does not exist", "EntryNotFound")
    deep = on.query.get("recursive", [""])[0].lower() in ("1", "true")
    return [one for one in below if deep or "/" not in one["path"][len(prefix) :]]


def paths_info(on: Handler, kind: str, name: str, revision: str) -> Any:
    files = on.commit_of(on.repo(kind, name), revision).files
    as_json = "json" in on.headers.get("Content-Type", "")
    wanted = on.json()["paths"] if as_json else parse_qs(on.body.decode())["paths"]
    everything = {one["path"]: one for one in folders(files)} | {p: entry(p, f) for p, f in files.items()}
    return [everything[path.strip("/")] for path in wanted if path.strip("/") in everything]


def preupload(on: Handler, kind: str, name: str, revision: str) -> Any:
    files = on.commit_of(on.repo(kind, name), revision).files
    return {
        "files": [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) or asked["size"] > LFS_BYTES else "regular",
                "shouldIgnore": False,
                "oid": files[path].key if path in files else None,
            }
            for asked in on.json()["files"]
            for path in [asked["path"]]
        ]
    }


def lfs_batch(on: Handler, name: str, kind: str = "models") -> Any:
    on.repo(kind, name)
    objects = []
    for asked in on.json()["objects"]:
        oid = asked["oid"]
        actions = {"upload": {"href": f"{on.hub.storage}/cdn/{oid}"}, "verify": {"href": f"{on.hub.url}/lfs-verify"}}
        objects.append({**asked, **({} if on.hub.store.path(oid).exists() else {"actions": actions})})
    return {"transfer": "basic", "objects": objects}


def upload(on: Handler, oid: str) -> Any:
    content = on.rfile.read(int(on.headers["Content-Length"]))
    if hashlib.sha256(content).hexdigest() != oid:
        raise RequestError(400, "The content is not what its hash says.")
    on.hub.store.write(oid, content)
    return {}


def verify(on: Handler) -> Any:
    path = on.hub.store.path(on.json()["oid"])
    if not path.exists() or path.stat().st_size != on.json()["size"]:
        raise RequestError(400, "The upload is not complete.")
    return {}


def commit(on: Handler, kind: str, name: str, revision: str) -> Any:
    repo = on.repo(kind, name)
    header, *operations = [json.loads(line) for line in on.body.splitlines()]
    head = on.commit_of(repo, revision)
    if header["value"].get("parentCommit", head.oid) != head.oid:
        raise RequestError(412, "A commit has happened since. Please refresh and try again.")
    files = head.files
    try:
        for operation in operations:
            files = changed(on.hub.store, files, operation)
    except KeyError as error:
        raise RequestError(404, f"A file with this name doesn't exist: {error}", "EntryNotFound") from error
    ref, pull_request = f"refs/heads/{revision}", None
    if on.query.get("create_pr") == ["1"]:
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        ref, pull_request = f"refs/pr/{number}", f"{on.hub.url}/{name}/discussions/{number}"
        repo.refs[ref] = head.oid
    made = on.hub.store.commit(repo, ref, header["value"]["summary"], files)
    url = f"{on.hub.url}/{'' if repo.kind == 'model' else kind + '/'}{name}/commit/{made.oid}"
    return {"success": True, "commitOid": made.oid, "commitUrl": url, "pullRequestUrl": pull_request}


def resolve(on: Handler, name: str, revision: str, path: str, kind: str = "models") -> Any:
    at = on.commit_of(on.repo(kind, name), revision)
    headers = {"X-Repo-Commit": at.oid}
    if path not in at.files:
        return {"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"}
    file = at.files[path]
    if file.sha256 is None:
        return ranged(on, file.key, headers)
    headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    return b"", 302, {**headers, "Location": f"{on.hub.storage}/cdn/{file.sha256}"}


def download(on: Handler, oid: str) -> Any:
    return ranged(on, oid, {})


def ranged(on: Handler, key: str, headers: dict[str, str]) -> Any:
    """A content, or the part of it that the Range header names."""
    content = on.hub.store.path(key).read_bytes()
    headers = {"ETag": f'"{key}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", on.headers.get("Range", ""))
    if not wanted:
        return content, 200, headers
    start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
    part = content[start:stop]
    return part, 206, {**headers, "Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"}


ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", "/api/repos/create", create_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", "/api/whoami-v2", whoami),
    ("GET", API, info),
    ("GET", rf"{API}/revision/(?P<revision>[^/]+)", info),
    ("GET", rf"{API}/refs", refs),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", branch),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", tree),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", paths_info),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", commit),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", "/cdn/(?P<oid>[0-9a-f]{64})", upload),
    ("POST", "/lfs-verify", verify),
    ("GET", "/cdn/(?P<oid>[0-9a-f]{64})", download),
    ("GET", rf"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True


class HubServer:
    """The server in a thread of this process, from `with` to its end.

    Args:
        folder: where contents are kept.
    """

    def __init__(self, folder: Path):
        self.store = HubStore(folder)
        self.log: list[tuple[str, str]] = []
        self.intercept: Callable[[Handler], bool] | None = None
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}"  # another host, as the Hub's large files have
        self.environment = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def repo(self, name: str, kind: str = "model") -> Repo:
        """What was published under a name."""
        return self.store.repos[kind, name]
