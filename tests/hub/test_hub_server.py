"""The loopback Hub itself: what it keeps, what it refuses, and that its faults do what they say."""

import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from hypothesis import given
from hypothesis import strategies as st

hub_server, hub_store = sys.modules["hub_server"], sys.modules["hub_store"]  # conftest.py has imported them
SCRIPT = Path(__file__).resolve().parents[1] / "hub_server.py"
NAME = "tester/model"
HELLO = "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object of b"hello\n"


@pytest.fixture
def folder(tmp_path):
    """Return a folder of a text file, a file inside a folder, and a weight file."""
    root = tmp_path / "folder"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "hello.txt").write_bytes(b"hello\n")
    (root / "sub" / "deep" / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return root


@pytest.fixture
def pushed(api, folder):
    """Return the commit of the folder's first upload."""
    api.create_repo(NAME)
    return api.upload_folder(repo_id=NAME, folder_path=folder)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def ask(hub, method, path, body=None, token=True, **headers):
    """Send one request without the client; return status, headers and body."""
    authorization = {"Authorization": f"Bearer {hub.environment['HF_TOKEN']}"} if token else {}
    connection = http.client.HTTPConnection("127.0.0.1", int(hub.url.rpartition(":")[2]), timeout=20)
    try:
        connection.request(method, path, body, {**authorization, **headers})
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()
    finally:
        connection.close()


def commit_lines(*operations, **header):
    lines = [{"key": "header", "value": {"summary": "by hand", **header}}]
    lines += [{"key": key, "value": value} for key, value in operations]
    return b"\n".join(json.dumps(line).encode() for line in lines)


# Revisions.


def test_what_is_uploaded_comes_back(hub, api, folder, pushed):
    assert hub.files(NAME) == contents(folder)
    local = Path(snapshot_download(NAME))
    assert contents(folder).items() <= contents(local).items()
    assert local.name == pushed.oid == hub.commits(NAME)[0].oid
    assert hub.unknown == []


def test_an_upload_of_the_same_makes_no_commit(hub, api, folder, pushed):
    before = hub.commits(NAME)
    assert api.upload_folder(repo_id=NAME, folder_path=folder).oid == pushed.oid
    assert hub.commits(NAME) == before
    assert len([path for path in hub.paths("PUT") if path.startswith("/lfs/")]) == 1


def test_every_revision_stays_readable(hub, api, folder, pushed):
    old = contents(folder)
    api.create_tag(NAME, tag="v1")
    api.create_branch(NAME, branch="feature/x")
    (folder / "hello.txt").write_text("changed")
    new = api.upload_folder(repo_id=NAME, folder_path=folder)
    (folder / "hello.txt").write_text("elsewhere")
    api.upload_folder(repo_id=NAME, folder_path=folder, revision="feature/x")
    texts = {
        name: Path(hf_hub_download(NAME, "hello.txt", revision=name)).read_text()
        for name in ("main", new.oid, "v1", pushed.oid, pushed.oid[:9], "feature/x")
    }
    old_text, names = "hello\n", ("v1", pushed.oid, pushed.oid[:9])
    assert texts == {"main": "changed", new.oid: "changed", "feature/x": "elsewhere"} | dict.fromkeys(names, old_text)
    assert hub.files(NAME, pushed.oid) == old
    titles = [commit.title for commit in api.list_repo_commits(NAME)]
    assert titles == ["Upload folder using huggingface_hub"] * 2 + ["initial commit"]


def test_branches_and_tags(api, pushed):
    api.create_branch(NAME, branch="other", revision=pushed.oid)
    api.create_tag(NAME, tag="v1", revision="other")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(NAME, branch="other")
    api.create_branch(NAME, branch="other", exist_ok=True)
    api.create_tag(NAME, tag="v1", exist_ok=True)
    refs = api.list_repo_refs(NAME)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": pushed.oid, "other": pushed.oid}
    assert [(ref.name, ref.ref) for ref in refs.tags] == [("v1", "refs/tags/v1")]
    api.delete_branch(NAME, branch="other")
    api.delete_tag(NAME, tag="v1")
    assert not api.revision_exists(NAME, "other")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(NAME, tag="v1")
    with pytest.raises(HfHubHTTPError, match="main cannot be deleted"):
        api.delete_branch(NAME, branch="main")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME, revision="nowhere")


def test_a_commit_on_an_old_parent_is_refused(hub, api, pushed):
    def add(text, parent):
        operations = [CommitOperationAdd("hello.txt", text)]
        return api.create_commit(NAME, operations, commit_message="m", parent_commit=parent)

    add(b"one", pushed.oid)
    with pytest.raises(HfHubHTTPError, match="412"):
        add(b"two", pushed.oid)
    assert hub.files(NAME)["hello.txt"] == b"one"


def test_a_commit_is_applied_as_a_whole_or_not_at_all(hub, api, pushed):
    before = hub.commits(NAME)
    with pytest.raises(EntryNotFoundError):
        api.create_commit(NAME, [CommitOperationAdd("new", b"1"), CommitOperationDelete("absent")], commit_message="m")
    assert hub.commits(NAME) == before
    assert "new" not in hub.files(NAME)
    api.create_commit(NAME, [CommitOperationAdd("new", b"1"), CommitOperationDelete("sub/")], commit_message="m")
    assert set(hub.files(NAME)) == {"hello.txt", "model.safetensors", "new"}


# Files.


def test_listings(api, folder, pushed):
    entries = {entry.path: entry for entry in api.list_repo_tree(NAME, recursive=True)}
    assert set(entries) == {".gitattributes", "sub", "sub/deep", *contents(folder)}
    assert (entries["hello.txt"].blob_id, entries["hello.txt"].size) == (HELLO, 6)
    weights = (folder / "model.safetensors").read_bytes()
    assert entries["model.safetensors"].lfs.sha256 == hashlib.sha256(weights).hexdigest()
    assert entries["model.safetensors"].size == len(weights)
    assert {entry.path for entry in api.list_repo_tree(NAME)} == {*entries} - {"sub/deep", "sub/deep/config.json"}
    assert [entry.path for entry in api.list_repo_tree(NAME, "sub")] == ["sub/deep"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(NAME, "absent"))
    found = api.get_paths_info(NAME, ["sub", "hello.txt", "absent"])
    assert {entry.path for entry in found} == {"sub", "hello.txt"}


def test_info(api, folder, pushed):
    info = api.model_info(NAME, files_metadata=True)
    assert (info.id, info.sha, info.private, info.author) == (NAME, pushed.oid, False, "tester")
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert sizes["hello.txt"] == 6
    assert set(sizes) == {".gitattributes", *contents(folder)}
    lfs = {sibling.rfilename: sibling.lfs for sibling in info.siblings if sibling.lfs}
    assert list(lfs) == ["model.safetensors"]
    assert api.model_info(NAME, revision=pushed.oid[:8]).sha == pushed.oid


def test_file_headers(hub, api, folder, pushed):
    metadata = api.get_hf_file_metadata(url=f"{hub.url}/{NAME}/resolve/main/hello.txt")
    assert (metadata.commit_hash, metadata.etag, metadata.size) == (pushed.oid, HELLO, 6)
    path = f"/{NAME}/resolve/main/model.safetensors"
    weights = (folder / "model.safetensors").read_bytes()
    status, headers, body = ask(hub, "HEAD", path)
    digest = f'"{hashlib.sha256(weights).hexdigest()}"'
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(weights)))
    assert headers["ETag"] == headers["X-Linked-Etag"] == digest
    assert headers["X-Linked-Size"] == str(len(weights))


@given(
    data=st.binary(min_size=1, max_size=40),
    bounds=st.tuples(st.none() | st.integers(0, 50), st.none() | st.integers(0, 50)),
)
def test_ranges(data, bounds):
    repo = hub_store.Repo("tester/ranges", "model", False)
    commit = repo.commit("main", {"file": hub_store.Blob(data)}, "m")
    first, last = bounds
    text = "".join(["bytes=", "" if first is None else str(first), "-", "" if last is None else str(last)])
    found = hub_store.resolve(hub_store.Call("GET", [], {}, {"range": text}, b"", True), commit, "file")
    expected = data
    if first is not None:
        expected = data[first:] if last is None else data[first : last + 1]
    elif last is not None:
        expected = data[-last:] if last else b""
    if not expected:
        assert (found.status, found.headers["Content-Range"]) == (416, f"bytes */{len(data)}")
    elif bounds == (None, None):
        assert (found.status, found.body) == (200, data)
    else:
        assert (found.status, found.body) == (206, expected)
        start, _, total = found.headers["Content-Range"].removeprefix("bytes ").replace("/", "-").split("-")
        assert (int(total), data[int(start) :].startswith(expected)) == (len(data), True)


# Who may do what.


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_private_repositories_are_hidden(hub, api, kind):
    api.create_repo(NAME, repo_type=kind, private=True, space_sdk="static" if kind == "space" else None)
    api.upload_file(path_or_fileobj=b"hello\n", path_in_repo="a.txt", repo_id=NAME, repo_type=kind)
    stranger = HfApi(endpoint=hub.url, token=False)
    assert api.repo_info(NAME, repo_type=kind).private is True
    with pytest.raises(RepositoryNotFoundError):
        stranger.repo_info(NAME, repo_type=kind)
    prefix = "" if kind == "model" else f"{kind}s/"
    assert ask(hub, "GET", f"/{prefix}{NAME}/resolve/main/a.txt", token=False)[0] == 401
    assert ask(hub, "GET", f"/{prefix}{NAME}/resolve/main/a.txt")[2] == b"hello\n"
    api.update_repo_settings(NAME, repo_type=kind, private=False)
    assert stranger.repo_info(NAME, repo_type=kind).private is False
    assert hub.files(NAME, kind=kind) == {"a.txt": b"hello\n"}


def test_strangers_write_nothing(hub, api, pushed):
    stranger = HfApi(endpoint=hub.url, token=False)
    before = hub.commits(NAME)
    with pytest.raises(HfHubHTTPError, match="401"):
        stranger.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME)
    with pytest.raises(HfHubHTTPError, match="401"):
        stranger.create_repo("tester/other")
    for method, path in (
        ("POST", f"/api/models/{NAME}/commit/main"),
        ("POST", f"/{NAME}.git/info/lfs/objects/batch"),
        ("POST", f"/api/models/{NAME}/tag/main"),
        ("PUT", f"/api/models/{NAME}/settings"),
    ):
        assert ask(hub, method, path, b"{}", token=False)[0] == 401
    assert ask(hub, "PUT", "/lfs/guessed", b"1")[0] == 403
    assert hub.commits(NAME) == before


def test_a_wrong_token_is_an_error(hub, api, pushed):
    wrong = HfApi(endpoint=hub.url, token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        wrong.whoami()
    with pytest.raises(HfHubHTTPError, match="401"):
        wrong.model_info(NAME)
    assert api.whoami()["name"] == "tester"
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("someone/else")


def test_the_token_is_not_kept(hub, api, pushed):
    token = hub.environment["HF_TOKEN"]
    assert token not in repr(vars(hub))
    assert all(token not in part for request in hub.requests for part in request)


def test_only_this_machine_can_connect(hub):
    assert hub.url.startswith("http://127.0.0.1:")
    other = "127.0.0.2"  # loopback as well, another address
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect((other, int(hub.url.rpartition(":")[2])))


def test_create_delete_move(hub, api):
    assert str(api.create_repo(NAME)) == f"{hub.url}/{NAME}"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(NAME)
    assert api.create_repo(NAME, exist_ok=True).repo_id == NAME
    assert api.create_repo("model", exist_ok=True).repo_id == NAME  # in the owner's namespace
    api.move_repo(NAME, "tester/moved")
    assert not api.repo_exists(NAME)
    api.delete_repo("tester/moved")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("tester/moved")


# What is refused.


def test_content_must_have_the_hash_that_was_announced(hub, api, pushed):
    oid = hashlib.sha256(b"right").hexdigest()
    batch = json.dumps({"objects": [{"oid": oid, "size": 5}]}).encode()
    reply = json.loads(ask(hub, "POST", f"/{NAME}.git/info/lfs/objects/batch", batch)[2])
    path = reply["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.url)
    pointer = commit_lines(("lfsFile", {"path": "w.bin", "algo": "sha256", "oid": oid, "size": 5}))
    for body in (b"wrong", b"right ", b""):
        assert ask(hub, "PUT", path, body, token=False)[0] == 400
    assert ask(hub, "POST", f"/api/models/{NAME}/commit/main", pointer)[0] == 400
    assert "w.bin" not in hub.files(NAME)
    assert ask(hub, "PUT", path, b"right", token=False)[0] == 200
    assert ask(hub, "POST", f"/api/models/{NAME}/commit/main", pointer)[0] == 200
    assert hub.files(NAME)["w.bin"] == b"right"


@pytest.mark.parametrize("path", ["../out", "/etc/x", "a//b", "a/../b", ".git/config", ""])
def test_paths_outside_are_refused(hub, api, pushed, path):
    body = commit_lines(("file", {"path": path, "content": "MQ==", "encoding": "base64"}))
    assert ask(hub, "POST", f"/api/models/{NAME}/commit/main", body)[0] == 400
    assert len(hub.commits(NAME)) == 2


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"key": "file"}', b'{"key": "header", "value": 1}\n{}'])
def test_malformed_commits_are_refused(hub, api, pushed, body):
    assert ask(hub, "POST", f"/api/models/{NAME}/commit/main", body)[0] == 400
    assert len(hub.commits(NAME)) == 2


def test_large_bodies_are_refused(hub, api, pushed):
    limit = hub_server.BODY_LIMIT
    port = int(hub.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"PUT /lfs/x HTTP/1.1\r\nHost: h\r\nContent-Length: {limit + 1}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(4096)
    batch = json.dumps({"objects": [{"oid": "0" * 64, "size": limit + 1}]}).encode()
    reply = json.loads(ask(hub, "POST", f"/{NAME}.git/info/lfs/objects/batch", batch)[2])
    assert reply["objects"][0]["error"]["code"] == 422


@pytest.mark.parametrize("header", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_half_a_body_is_no_body(hub, api, pushed, header):
    token, port = hub.environment["HF_TOKEN"], int(hub.url.rpartition(":")[2])
    lines = commit_lines(("file", {"path": "half", "content": "MQ==", "encoding": "base64"})) + b"\n"
    body = lines if "Length" in header else b"%x\r\n" % len(lines) + lines + b"\r\n"  # and no last chunk
    start = f"POST /api/models/{NAME}/commit/main HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {token}\r\n{header}"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(start.encode() + b"\r\n\r\n" + body)
        connection.shutdown(socket.SHUT_WR)
        assert b" 200 " not in connection.recv(4096)
    assert "half" not in hub.files(NAME)


def test_chunked_bodies(hub, api, pushed):
    body = commit_lines(("file", {"path": "chunked", "content": "MQ==", "encoding": "base64"}))
    parts = iter([body[:30], body[30:]])
    assert ask(hub, "POST", f"/api/models/{NAME}/commit/main", parts)[0] == 200
    assert hub.files(NAME)["chunked"] == b"1"


def test_unknown_requests_are_listed(hub, api, pushed):
    assert ask(hub, "GET", f"/api/models/{NAME}/discussions")[0] == 404
    assert ask(hub, "GET", "/api/collections")[0] == 404
    assert [request.path for request in hub.unknown] == [f"/api/models/{NAME}/discussions", "/api/collections"]


def test_cards_without_an_end_are_refused(api, pushed):
    with pytest.raises(ValueError, match="The metadata block has no end"):
        api.upload_file(path_or_fileobj=b"---\nlicense: mit\n", path_in_repo="README.md", repo_id=NAME)


# Faults.

BROKEN = (ConnectionError, http.client.HTTPException)


@pytest.mark.parametrize(
    ("mode", "is_carried_out"), [("drop", False), ("500", False), ("lost", True), ("truncated", True)]
)
def test_faults(hub, api, pushed, mode, is_carried_out):
    body = commit_lines(("file", {"path": "new", "content": "MQ==", "encoding": "base64"}))
    hub.fail(mode=mode)
    if mode == "500":
        assert ask(hub, "POST", f"/api/models/{NAME}/commit/main", body)[0] == 500
    else:
        with pytest.raises(BROKEN):
            ask(hub, "POST", f"/api/models/{NAME}/commit/main", body)
    assert ("new" in hub.files(NAME)) == is_carried_out
    assert hub.requests[-1].outcome == mode
    assert ask(hub, "GET", f"/api/models/{NAME}")[0] == 200  # once only


def test_faults_are_counted(hub):
    hub.fail(2, mode="500", times=2, contains="GET /api/whoami")
    statuses = [ask(hub, "GET", path)[0] for path in ["/api/whoami-v2", "/api/models/a/b"] + ["/api/whoami-v2"] * 3]
    assert statuses == [200, 404, 500, 500, 200]
    hub.fail(mode="500", times=None)
    assert [ask(hub, "GET", "/api/whoami-v2")[0] for _ in range(3)] == [500] * 3
    hub.heal()
    assert ask(hub, "GET", "/api/whoami-v2")[0] == 200
    with pytest.raises(ValueError, match="mode is 'hang'"):
        hub.fail(mode="hang")


def test_another_process_can_set_faults(hub):
    count = len(hub.requests)
    assert ask(hub, "POST", "/-/fail", json.dumps({"nth": 2, "mode": "500"}).encode())[0] == 200
    assert [ask(hub, "GET", "/api/whoami-v2")[0] for _ in range(3)] == [200, 500, 200]
    assert ask(hub, "POST", "/-/fail", b'{"mode": "hang"}')[0] == 400
    ask(hub, "POST", "/-/fail", json.dumps({"mode": "500", "times": None}).encode())
    ask(hub, "POST", "/-/heal", b"")
    assert ask(hub, "GET", "/api/whoami-v2")[0] == 200
    assert len(hub.requests) == count + 4  # these requests are not counted themselves


def test_the_script_prints_what_a_client_needs(tmp_path):
    command = [sys.executable, str(SCRIPT), "--home", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ""}) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline().split() for _ in range(7)]
            environment = dict(entry.split("=", 1) for word, entry in lines if word == "export")
            api = ["GET", "/api/whoami-v2", None, {"Authorization": f"Bearer {environment['HF_TOKEN']}"}]
            connection = http.client.HTTPConnection(environment["HF_ENDPOINT"].removeprefix("http://"), timeout=20)
            connection.request(*api)
            assert json.loads(connection.getresponse().read())["name"] == "tester"
            connection.close()
        finally:
            process.terminate()  # SIGINT is ignored where the tests themselves run in the background
    assert process.returncode == 0
    assert environment["HF_HUB_DISABLE_XET"] == "1"
    assert environment["HF_HOME"] == str(tmp_path)
