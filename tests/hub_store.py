"""What the loopback Hub keeps and answers: repositories, commits, files, and the protocol's replies about them."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple

LFS_SIZE = 10 * 2**20  # larger files go through LFS, whatever they are
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".onnx", ".npz", ".zip", ".png", ".jpg")


class HubError(Exception):
    """An answer with an error status; `code` is the client's key to the kind of error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Blob:
    """One version of a file."""

    data: bytes = field(repr=False)
    is_lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git itself stores of an LFS file."""
        lines = ["version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.data)}"]
        return ("\n".join(lines) + "\n").encode()

    @cached_property
    def git_oid(self) -> str:
        stored = self.pointer if self.is_lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """The whole content of a repository at one moment."""

    oid: str
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, Blob] = field(repr=False)


class Repo:
    """Commits, branches and tags of one repository, and the large files that were uploaded to it."""

    def __init__(self, name: str, kind: str, private: bool) -> None:
        self.name, self.kind, self.private = name, kind, private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.uploads: dict[str, bytes] = {}  # by sha256
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit("main", {".gitattributes": Blob(attributes.encode())}, "initial commit")

    @property
    def path(self) -> str:
        return self.name if self.kind == "model" else f"{self.kind}s/{self.name}"

    def commit(self, branch: str, files: dict[str, Blob], title: str, message: str = "") -> Commit:
        parent = self.branches.get(branch)
        date = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"
        content = [len(self.commits), parent, title, message, date, *((p, b.git_oid) for p, b in files.items())]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, message, date, dict(files))
        self.branches[branch] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        """Return the commit of a branch, a tag or an oid (seven characters are enough)."""
        name = "main" if revision == "HEAD" else revision
        oid = self.branches.get(name) or self.tags.get(name)
        if oid is None and len(name) >= 7:
            oid = next((known for known in self.commits if known.startswith(name)), None)
        if oid is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> Iterator[Commit]:
        """Yield the commits of a revision, latest first."""
        commit: Commit | None = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None


class Call(NamedTuple):
    """A request as the protocol sees it."""

    method: str
    parts: list[str]  # of the path, each unquoted by itself: a branch may hold a slash
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    is_user: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


def answer(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def validate_yaml(content: str) -> Answer:
    if content.startswith("---\n") and "\n---" not in content[3:]:
        return answer({"errors": [{"message": "The metadata block has no end"}], "warnings": []}, 400)
    return answer({"errors": [], "warnings": []})


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.data)}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry


def _folder(path: str, commit: Commit) -> dict[str, Any]:
    inside = [(p, blob.git_oid) for p, blob in sorted(commit.files.items()) if p.startswith(f"{path}/")]
    oid = hashlib.sha1(json.dumps(inside).encode()).hexdigest()
    return {"type": "directory", "path": path, "oid": oid, "size": 0}


def tree(commit: Commit, folder: str, recursive: bool) -> Answer:
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(commit.files.items()):
        if path.startswith(prefix):
            inner = path.removeprefix(prefix).split("/")
            for depth in range(1, len(inner)):
                name = prefix + "/".join(inner[:depth])
                entries.setdefault(name, _folder(name, commit))
            entries[path] = _entry(path, blob)
    if folder and not entries:
        raise HubError(404, f"{folder} does not exist", "EntryNotFound")
    return answer([entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(prefix)])


def paths_info(commit: Commit, paths: list[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        if path in commit.files:
            yield _entry(path, commit.files[path])
        elif any(known.startswith(f"{path}/") for known in commit.files):
            yield _folder(path, commit)


def info(call: Call, repo: Repo, revision: str) -> Answer:
    commit = repo.at(revision)
    siblings: list[dict[str, Any]] = []
    for path, blob in commit.files.items():
        details: dict[str, Any] = {"size": len(blob.data), "blobId": blob.git_oid} if "blobs" in call.query else {}
        if details and blob.is_lfs:
            details["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
        siblings.append({"rfilename": path, **details})
    state = {"private": repo.private, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
    owner = repo.name.split("/")[0]
    who = {"_id": repo.name, "id": repo.name, "author": owner, "sha": commit.oid, "lastModified": commit.date}
    return answer({**who, **state, "siblings": siblings})


def refs(repo: Repo) -> Answer:
    names = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
    refs = {
        key: [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in found.items()]
        for key, (kind, found) in names.items()
    }
    return answer({**refs, "converts": [], "pullRequests": []})


def log_entry(commit: Commit, user: str) -> dict[str, Any]:
    entry = {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date}
    return {**entry, "authors": [{"user": user}]}


def add_ref(refs: dict[str, str], name: str, commit: Commit) -> Answer:
    if name in refs:
        raise HubError(409, f"Reference already exists: {name}")
    refs[name] = commit.oid
    return answer({})


def remove_ref(refs: dict[str, str], name: str) -> Answer:
    if name == "main":
        raise HubError(403, "main cannot be deleted")
    if refs.pop(name, None) is None:
        raise HubError(404, f"There is no reference {name}", "RevisionNotFound")
    return answer({})


def set_visibility(repo: Repo, values: dict[str, Any]) -> Answer:
    repo.private = values.get("private", values.get("visibility") == "private")
    return answer({"private": repo.private})


def preupload(commit: Commit, values: dict[str, Any]) -> Answer:
    files = []
    for item in values["files"]:
        path, known = item["path"], commit.files.get(item["path"])
        is_binary = b"\0" in base64.b64decode(item["sample"])
        is_lfs = item["size"] > LFS_SIZE or path.endswith(LFS_SUFFIXES) or is_binary
        oid = None if known is None else known.etag
        files.append({"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, "oid": oid})
    return answer({"files": files})


def apply(key: str, value: dict[str, Any], files: dict[str, Blob], repo: Repo) -> None:
    path = value["path"]
    if path.startswith("/") or any(part in ("", ".", "..", ".git") for part in path.rstrip("/").split("/")):
        raise HubError(400, f"{path!r} is no path of a repository")
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"], validate=True))
    elif key == "lfsFile":
        data = repo.uploads.get(value["oid"])
        if data is None or len(data) != value.get("size", len(data)):
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = Blob(data, is_lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        inside = path.rstrip("/") + "/"
        gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(inside))]
        if not gone:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f"Unknown operation {key!r}")


def resolve(call: Call, commit: Commit, path: str) -> Answer:
    blob = commit.files.get(path)
    if blob is None:
        raise HubError(404, f"{path} does not exist", "EntryNotFound")
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    headers["Content-Type"] = "application/octet-stream"
    if blob.is_lfs:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
    wanted, size = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", "")), len(blob.data)
    if wanted is None or wanted.groups() == ("", ""):
        return Answer(200, blob.data, headers)
    first, last = wanted.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        return Answer(416, b"", {"Content-Range": f"bytes */{size}"})
    return Answer(206, blob.data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})
