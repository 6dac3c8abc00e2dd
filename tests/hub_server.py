"""A Hugging Face Hub for tests: in memory, on 127.0.0.1, without Xet, for one user.

It speaks what the `huggingface_hub` client asks for when models, adapters and data sets are pushed and loaded: create,
delete and move repositories, preupload, LFS, commit, info, tree, resolve with ranges, branches and tags. Revisions are
real: every commit keeps its files, and can be read by its oid. Uploads are checked against their hashes.

In a test use the fixture `hub` (tests/hub/conftest.py). By hand:

    python tests/hub_server.py

prints the environment that a client needs; it must be set before `huggingface_hub` is imported.

Faults: `fail(nth, mode=..., times=..., contains=...)` lets requests fail, counted from the call on; `heal` ends it.

    drop       the connection breaks before the body is read; nothing is carried out
    500        answered with an error; nothing is carried out
    lost       carried out, and the connection breaks before the answer
    truncated  carried out, and the connection breaks in the middle of the answer

Another process sets them with `POST /-/fail` (a JSON object of the arguments) and `POST /-/heal`.

Left out: Xet, pull requests, gated repositories, discussions, search, redirects to a CDN.
"""

import argparse
import hashlib
import hmac
import json
import re
import secrets
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import hub_store as store
from hub_store import Answer, Call, Commit, HubError, Repo, answer

BODY_LIMIT = 64 * 2**20  # bytes of one request
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
MODES = ("drop", "500", "lost", "truncated")
NAME = re.compile(r"[\w.-]{1,96}")


class Request(NamedTuple):
    """A line of the request log: no headers and no query, because they may hold secrets."""

    method: str
    path: str
    outcome: str  # status code, or the fault that was set


@dataclass
class _Fault:
    nth: int
    mode: str
    times: int | None
    contains: str


class HubServer:
    """The server. Use it as a context manager, or `start` and `stop`.

    Args:
        token: What clients must send; only its hash is kept.
        user: Owner of the repositories.
        port: 0 takes a free one.
    """

    def __init__(self, token: str, user: str = "tester", port: int = 0) -> None:
        self._token_hash = hashlib.sha256(token.encode()).digest()
        self.user = user
        self.requests: list[Request] = []
        self.unknown: list[Request] = []  # what the protocol does not know
        self.errors: list[str] = []  # tracebacks of the server's own faults
        self._repos: dict[tuple[str, str], Repo] = {}
        self._tickets: dict[str, tuple[Repo, str, int]] = {}
        self._fault: _Fault | None = None
        self._lock = threading.RLock()
        self._http = _Server(("127.0.0.1", port), _Handler)
        self._http.hub = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def start(self) -> "HubServer":
        self._thread.start()
        return self

    def stop(self) -> None:
        self._http.shutdown()
        self._http.close_connections()
        self._http.server_close()  # waits for the threads
        self._thread.join()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What tests set and read.

    def fail(self, nth: int = 1, *, mode: str = "drop", times: int | None = 1, contains: str = "") -> None:
        """Let requests fail, from the `nth` on that comes after this call.

        Args:
            nth: Counted from 1, among those that match.
            mode: One of `MODES`.
            times: How many fail; None: all until `heal`.
            contains: Only requests whose "METHOD /path" contains this count.
        """
        if mode not in MODES or nth < 1:
            raise ValueError(
                f"mode is {mode!r}, nth is {nth}. Modes are {MODES}, and nth counts from 1. Correct them."
            )
        with self._lock:
            self._fault = _Fault(nth, mode, times, contains)

    def heal(self) -> None:
        """End what `fail` began."""
        with self._lock:
            self._fault = None

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Return the files of a revision, without .gitattributes."""
        with self._lock:
            files = self._repos[kind, name].at(revision).files
            return {path: blob.data for path, blob in files.items() if path != ".gitattributes"}

    @property
    def repositories(self) -> list[tuple[str, str]]:
        """Kind and name of every repository."""
        return sorted(self._repos)

    def commits(self, name: str, revision: str = "main", kind: str = "model") -> list[Commit]:
        """Return the commits of a revision, latest first; the last is the Hub's own."""
        with self._lock:
            return list(self._repos[kind, name].history(revision))

    # What the handler calls.

    def next_fault(self, line: str) -> str | None:
        with self._lock:
            fault = self._fault
            if fault is None or fault.contains not in line:
                return None
            fault.nth -= 1
            if fault.nth > 0:
                return None
            if fault.times is not None and fault.nth <= -fault.times:
                self._fault = None
                return None
            return fault.mode

    def is_user(self, authorization: str | None) -> bool:
        """Tell the owner from an anonymous visitor; a wrong token is an error."""
        if authorization is None:
            return False
        digest = hashlib.sha256(authorization.removeprefix("Bearer ").encode()).digest()
        if not hmac.compare_digest(digest, self._token_hash):
            raise HubError(401, "Invalid credentials in Authorization header")
        return True

    def answer(self, call: Call) -> Answer:
        with self._lock:
            return self._route(call)

    def _route(self, call: Call) -> Answer:
        match call.parts:
            case ["-", action]:
                return self._control(call, action)
            case ["lfs", ticket] if call.method == "PUT":
                return self._receive(call, ticket)
            case ["api", "whoami-v2"] if call.is_user:
                access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
                return answer({"type": "user", "id": "0", "name": self.user, "orgs": [], "auth": access})
            case ["api", "whoami-v2"]:
                raise HubError(401, "Invalid username or password.")
            case ["api", "validate-yaml"]:
                return store.validate_yaml(call.json["content"])
            case ["api", "repos", action]:
                return self._manage(call, action)
            case ["api", kinds, *rest] if kinds in KINDS:
                repo, rest = self._find(call, KINDS[kinds], rest)
                return self._api(call, repo, rest)
            case ["api", *_]:
                return self._unknown(call)
            case [kinds, *rest] if kinds in KINDS:
                return self._files(call, *self._find(call, KINDS[kinds], rest))
            case _:
                return self._files(call, *self._find(call, "model", call.parts))

    def _control(self, call: Call, action: str) -> Answer:
        """Set faults for a client in another process."""
        if action == "fail":
            self.fail(**call.json)
        else:
            self.heal()
        return answer({})

    def _find(self, call: Call, kind: str, parts: list[str]) -> tuple[Repo, list[str]]:
        """Split a path into the repository and the rest; hide private ones from strangers."""
        name = "/".join(parts[:2]).removesuffix(".git")
        repo = self._repos.get((kind, name))
        if repo is None or (repo.private and not call.is_user):
            raise HubError(404 if call.is_user else 401, f"Repository not found: {name}", "RepoNotFound")
        return repo, parts[2:]

    def _manage(self, call: Call, action: str) -> Answer:
        """Create, delete or move a repository."""
        values = call.json
        kind = values.get("type") or "model"
        if not call.is_user:
            raise HubError(401, "Invalid username or password.")
        if action == "move":
            repo = self._repos.pop((kind, values["fromRepo"]), None)
            if repo is None:
                raise HubError(404, "Repository not found", "RepoNotFound")
            repo.name = values["toRepo"]
            self._repos[kind, repo.name] = repo
            return answer({})
        owner, name = values.get("organization") or self.user, values["name"]
        key = (kind, f"{owner}/{name}")
        if owner != self.user:
            raise HubError(403, f"You have no rights to the namespace {owner}")
        if action == "delete":
            if self._repos.pop(key, None) is None:
                raise HubError(404, "Repository not found", "RepoNotFound")
            return answer({})
        if action != "create" or kind not in KINDS.values() or not NAME.fullmatch(name):
            raise HubError(400, f"Cannot {action} a {kind} of the name {name!r}")
        status = 409 if key in self._repos else 200
        private = values.get("private", values.get("visibility") == "private")
        repo = self._repos.setdefault(key, Repo(key[1], kind, bool(private)))
        extra = {"error": "You already created this repo"} if status == 409 else {}
        return answer({"url": f"{self.url}/{repo.path}", "name": repo.name, "id": repo.name, **extra}, status)

    def _api(self, call: Call, repo: Repo, parts: list[str]) -> Answer:
        action, revision, *rest = [*parts, "", ""][: max(2, len(parts))]
        revision = revision or "main"
        reading: dict[str, Callable[[], Answer]] = {
            "": lambda: store.info(call, repo, revision),
            "revision": lambda: store.info(call, repo, revision),
            "tree": lambda: store.tree(repo.at(revision), "/".join(rest), call.query.get("recursive") == ["true"]),
            "refs": lambda: store.refs(repo),
            "commits": lambda: answer([store.log_entry(commit, self.user) for commit in repo.history(revision)]),
            "auth-check": lambda: answer({}),
        }
        if call.method == "GET" and action in reading and not (parts[-1:] == ["write"] and not call.is_user):
            return reading[action]()
        if call.method == "POST" and action == "paths-info":
            return answer(list(store.paths_info(repo.at(revision), parse_qs(call.body.decode()).get("paths", []))))
        if not call.is_user:
            raise HubError(401, "Invalid username or password.")
        start = call.json.get("startingPoint", "main") if action == "branch" and call.body else "main"
        writing: dict[tuple[str, str], Callable[[], Answer]] = {
            ("POST", "preupload"): lambda: store.preupload(repo.at(revision), call.json),
            ("POST", "commit"): lambda: self._commit(call, repo, revision),
            ("POST", "branch"): lambda: store.add_ref(repo.branches, revision, repo.at(start)),
            ("POST", "tag"): lambda: store.add_ref(repo.tags, call.json["tag"], repo.at(revision)),
            ("DELETE", "branch"): lambda: store.remove_ref(repo.branches, revision),
            ("DELETE", "tag"): lambda: store.remove_ref(repo.tags, revision),
            ("PUT", "settings"): lambda: store.set_visibility(repo, call.json),
        }
        if (call.method, action) not in writing:
            return self._unknown(call)
        return writing[call.method, action]()

    def _files(self, call: Call, repo: Repo, parts: list[str]) -> Answer:
        """Answer what is asked outside of /api: the bytes of a file, and where to put LFS objects."""
        match parts:
            case ["resolve", revision, *path] if path and call.method in ("GET", "HEAD"):
                return store.resolve(call, repo.at(revision), "/".join(path))
            case ["info", "lfs", "objects", "batch"] if call.method == "POST":
                if not call.is_user:
                    raise HubError(401, "Invalid username or password.")
                objects = [self._upload_action(repo, item["oid"], item["size"]) for item in call.json["objects"]]
                return answer({"transfer": "basic", "objects": objects})
            case _:
                return self._unknown(call)

    def _upload_action(self, repo: Repo, oid: str, size: int) -> dict[str, Any]:
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if size > BODY_LIMIT:
            return {**entry, "error": {"code": 422, "message": f"at most {BODY_LIMIT} bytes"}}
        if oid not in repo.uploads:
            ticket = secrets.token_hex(16)  # as a signed URL: whoever has it may write this one object
            self._tickets[ticket] = (repo, oid, size)
            entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{ticket}"}}
        return entry

    def _receive(self, call: Call, ticket: str) -> Answer:
        if ticket not in self._tickets:
            raise HubError(403, "Unknown upload")
        repo, oid, size = self._tickets[ticket]
        if len(call.body) != size or hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, f"The content is not that of {oid}")
        repo.uploads[oid] = call.body
        return Answer(200, b"", {"ETag": f'"{oid}"'})

    def _commit(self, call: Call, repo: Repo, branch: str) -> Answer:
        """Apply all operations or none."""
        if "create_pr" in call.query:
            raise HubError(400, "Pull requests are not supported")
        if branch not in repo.branches:
            raise HubError(404, f"There is no branch {branch}", "RevisionNotFound")
        header, *operations = (json.loads(line) for line in call.body.split(b"\n") if line.strip())
        if header["key"] != "header":
            raise HubError(400, "The first line must be the header")
        parent = header["value"].get("parentCommit")
        if parent is not None and not repo.branches[branch].startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.at(branch).files)
        for operation in operations:
            store.apply(operation["key"], operation["value"], files, repo)
        made = repo.commit(branch, files, header["value"]["summary"], header["value"].get("description", ""))
        url = f"{self.url}/{repo.path}/commit/{made.oid}"
        return answer({"success": True, "commitOid": made.oid, "commitUrl": url})

    def _unknown(self, call: Call) -> Answer:
        self.unknown.append(Request(call.method, "/" + "/".join(call.parts), "404"))
        raise HubError(404, "This server does not know that request")


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close waits for them
    request_queue_size = 64
    hub: HubServer

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connections: set[Any] = set()

    def close_connections(self) -> None:
        """End the threads that wait for the next request of a client."""
        for connection in list(self.connections):
            with suppress(OSError):  # the client may have been faster
                connection.shutdown(2)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # clients may go away at any moment
            self.hub.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the delayed acknowledgement of its header
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: `requests` is the log."""

    def _serve(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        is_control = url.path.startswith("/-/")
        fault = None if is_control else hub.next_fault(f"{self.command} {url.path}")
        if fault == "drop":
            hub.requests.append(Request(self.command, url.path, fault))
            self.close_connection = True
            return
        found = self._answer(url.path, url.query, fault)
        if not is_control:
            hub.requests.append(Request(self.command, url.path, fault or str(found.status)))
        if fault == "lost":
            self.close_connection = True
            return
        self.send_response(found.status)
        for name, value in {**found.headers, "Content-Length": str(len(found.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        body = b"" if self.command == "HEAD" else found.body
        if fault == "truncated":
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 (the base class asks for these names)

    def _answer(self, path: str, query: str, fault: str | None) -> Answer:
        try:
            body = self._body()
            if fault == "500":
                return answer({"error": "Internal Server Error"}, 500)
            is_user = self.server.hub.is_user(self.headers.get("Authorization"))
            headers = {name.lower(): value for name, value in self.headers.items() if name.lower() != "authorization"}
            parts = [unquote(part) for part in path.strip("/").split("/")]
            return self.server.hub.answer(Call(self.command, parts, parse_qs(query), headers, body, is_user))
        except HubError as err:
            found = answer({"error": err.message}, err.status)
            found.headers.update(
                {"X-Error-Message": " ".join(err.message.split()).encode("ascii", "replace").decode()}
            )
            found.headers.update({"X-Error-Code": err.code} if err.code else {})
            return found
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            return answer({"error": f"Malformed request: {err!r}"}, 400)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return b"".join(self._chunks())
        size = int(self.headers.get("Content-Length") or 0)
        return self._read(size, size)

    def _chunks(self) -> Iterator[bytes]:
        total = 0
        while size := int(self.rfile.readline(64).split(b";")[0], 16):
            total += size
            yield self._read(size, total)
            self.rfile.readline(8)
        self.rfile.readline(8)

    def _read(self, size: int, total: int) -> bytes:
        if total > BODY_LIMIT:
            self.close_connection = True
            raise HubError(413, f"at most {BODY_LIMIT} bytes")
        data = self.rfile.read(size)
        if len(data) < size:  # half an upload must never be taken for a whole one
            raise ConnectionError("the client went away")
        return data


def environment(url: str, token: str, home: str) -> dict[str, str]:
    """Return what a client's process needs in its environment before `huggingface_hub` is imported."""
    flags = ["DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_UPDATE_CHECK", "DISABLE_PROGRESS_BARS"]
    return {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HOME": home, **{f"HF_HUB_{flag}": "1" for flag in flags}}


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hugging Face Hub in memory, on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--home", default="hub-home", help="folder for the client's cache")
    arguments = parser.parse_args()
    token = f"hf_{secrets.token_hex(8)}"
    with HubServer(token, port=arguments.port) as hub:
        for name, value in environment(hub.url, token, arguments.home).items():
            sys.stdout.write(f"export {name}={value}\n")
        sys.stdout.flush()
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        with suppress(KeyboardInterrupt):
            stopped.wait()


if __name__ == "__main__":
    main()
