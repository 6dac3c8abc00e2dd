"""Uploads and downloads that break at every request: nothing is left half done, and doing it again completes it."""

import json
from pathlib import Path
from typing import Any, cast

import httpx2
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import CLIPModel, CLIPVisionModel

from hf_opentrans import PruningPlan, SparseCLIPVisionModel, Subnetwork, slice_model
from hf_opentrans.pruning import LayerPlan, to_sparse
from hf_opentrans.pruning.matching import hash_tensors
from hf_opentrans.pruning.tower import Tower

NAME = "tester/model"
PLAN = PruningPlan((LayerPlan((1, 3), (5, 6)), LayerPlan((), (0,)), LayerPlan((0,), ())))
# Every request of a push, in this order; the tests break each of them.
PUSH = [
    "POST /api/repos/create",
    "POST /api/validate-yaml",  # of upload_folder
    "POST /api/validate-yaml",  # of create_commit
    "POST /api/models/tester/model/preupload/main",
    "POST /tester/model.git/info/lfs/objects/batch",
    "PUT /lfs/",
    "POST /api/models/tester/model/commit/main",
]
ERRORS = (HfHubHTTPError, httpx2.HTTPError, json.JSONDecodeError, RuntimeError)  # RuntimeError wraps a failed PUT


def write(folder, value):
    """Write a model of one weight file, a README and code: both versions differ in all but the code."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(bytes([value]) * 5000)
    (folder / "config.json").write_text(json.dumps({"value": value}))
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n# Version {value}\n")
    (folder / "modeling.py").write_text("VALUE = 1\n")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


@pytest.fixture
def push(api, folder):
    def push():
        api.create_repo(NAME, exist_ok=True)
        return api.upload_folder(repo_id=NAME, folder_path=folder)

    return push


@pytest.fixture
def versions(hub, push, folder):
    """Push a first version, write the second to the folder; return (files of the first, of the second, first oid)."""
    first = write(folder, 1)
    oid = push().oid
    second = write(folder, 2)
    hub.requests.clear()
    return first, second, oid


def lines(hub):
    return [f"{request.method} {request.path}" for request in hub.requests]


def downloaded(revision):
    """Return the files of a revision as the client gets them."""
    root = Path(snapshot_download(NAME, revision=revision))
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name != ".gitattributes"}


def attempt(action):
    """Do it; return whether it ended without an exception."""
    try:
        action()
    except ERRORS:
        return False
    return True


def test_these_are_the_requests_of_a_push(hub, push, versions):
    push()
    assert len(lines(hub)) == len(PUSH)
    assert all(line.startswith(expected) for line, expected in zip(lines(hub), PUSH, strict=True))


@pytest.mark.parametrize("times", [1, None], ids=["once", "from-there-on"])
@pytest.mark.parametrize("mode", ["drop", "500", "lost", "truncated"])
@pytest.mark.parametrize("nth", range(1, len(PUSH) + 1))
def test_an_interrupted_push(hub, push, versions, nth, mode, times):
    first, second, oid = versions
    hub.fail(nth, mode=mode, times=times)
    is_done = attempt(push)
    assert any(request.outcome == mode for request in hub.requests)
    now = hub.files(NAME)
    assert now in (first, second)  # never something between
    assert not is_done or now == second
    if times is None and mode in ("drop", "500"):  # the network stays away
        assert (is_done, now) == (False, first)
    hub.heal()
    assert downloaded(oid) == first

    push()
    assert hub.files(NAME) == second == downloaded("main")
    assert len(hub.commits(NAME)) == 3  # the Hub's own and one for each version: none is made twice


@pytest.mark.parametrize("mode", ["drop", "500", "lost"])
def test_what_was_uploaded_is_not_uploaded_again(hub, api, push, folder, versions, mode):
    """The second of three weight files breaks for good; the others are there, and only that one is sent again."""
    for index in range(3):
        (folder / f"model-{index}.safetensors").write_bytes(bytes([10 + index]) * 5000)
    (folder / "model.safetensors").write_bytes(bytes([1]) * 5000)  # as it was
    hub.fail(2, mode=mode, times=None, contains="PUT /lfs/")
    assert not attempt(push)
    outcomes = [request.outcome for request in hub.requests if request.method == "PUT"]
    hub.heal()
    hub.requests.clear()
    push()
    missing = 3 if mode == "lost" else 3 - outcomes.count("200")
    sent = [request.outcome for request in hub.requests if request.method == "PUT"]
    assert len(sent) == (0 if mode == "lost" else missing)
    assert {f"model-{index}.safetensors" for index in range(3)} <= set(hub.files(NAME))


@pytest.mark.parametrize("mode", ["drop", "truncated", "lost"])
def test_a_download_goes_on_where_it_broke(hub, push, versions, mode, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what is written at once
    hub.fail(mode=mode, contains=f"GET /{NAME}/resolve")
    path = Path(hf_hub_download(NAME, "model.safetensors"))
    assert path.read_bytes() == versions[0]["model.safetensors"]
    gets = [request.outcome for request in hub.requests if request.method == "GET" and "resolve" in request.path]
    assert gets == [mode, "206" if mode == "truncated" else "200"]


@pytest.mark.parametrize("mode", ["drop", "500", "truncated"])
def test_a_download_that_cannot_be_finished_leaves_no_file(hub, push, versions, mode):
    hub.fail(mode=mode, times=None, contains=f"GET /{NAME}/resolve")
    if mode != "truncated":  # every answer brings half of the rest: it ends
        with pytest.raises((OSError, httpx2.HTTPError)):
            snapshot_download(NAME)
    hub.heal()
    assert downloaded("main") == versions[0]


# Subnetworks.


@pytest.fixture
def make_subnetwork(make_tiny_clip):
    def make(seed):
        clip: CLIPModel = make_tiny_clip(seed)
        tower = Tower.of(slice_model(clip, PLAN))
        return Subnetwork(
            plan=PLAN,
            vision_config=tower.vision.config.to_dict(),
            tensors=tower.named_tensors(),
            base_model=f"tiny-{seed}",
            base_revision=None,
            source_hashes=hash_tensors(to_sparse(clip)),
            calibration={},
            budget={},
        )

    return make


def same(left, right):
    return left.base_model == right.base_model and all(
        torch.equal(value, right.tensors[name]) for name, value in left.tensors.items()
    )


def modes(requests):
    """Yield (number of the request, mode): each once, and the last, the commit, in both."""
    yield from ((nth, "drop" if nth % 2 else "lost") for nth in range(1, requests))
    yield from ((requests, mode) for mode in ("drop", "lost"))


def requests_of(hub, push):
    hub.requests.clear()
    push()
    assert "/commit/" in hub.requests[-1].path
    return len(hub.requests)


def test_an_interrupted_subnetwork(hub, api, make_subnetwork):
    old, new = make_subnetwork(1), make_subnetwork(2)
    old.push_to_hub("tester/count")
    for nth, mode in modes(requests_of(hub, lambda: new.push_to_hub("tester/count"))):
        name = f"tester/sub-{nth}-{mode}"
        commit = old.push_to_hub(name)
        hub.fail(nth, mode=mode, times=None)
        assert not attempt(lambda name=name: new.push_to_hub(name))
        hub.heal()
        is_carried_out = mode == "lost" and "/commit/" in hub.requests[-1].path
        assert same(Subnetwork.from_pretrained(name, revision=commit.oid), old)
        assert same(Subnetwork.from_pretrained(name), new if is_carried_out else old)
        new.push_to_hub(name)
        assert same(Subnetwork.from_pretrained(name), new)
        assert len(hub.commits(name)) == 3


# Models: transformers' own push.


def test_interrupted_models_stay_loadable(hub, api, make_tiny_clip):
    config = make_tiny_clip().config.vision_config
    old, new = (cast("Any", slice_model(CLIPVisionModel(config).eval(), PLAN)) for _ in range(2))

    def is_equal(name, model, revision="main"):
        loaded = SparseCLIPVisionModel.from_pretrained(name, revision=revision).state_dict()
        return all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())

    old.push_to_hub("tester/count")
    for nth, mode in modes(requests_of(hub, lambda: new.push_to_hub("tester/count"))):
        name = f"tester/tower-{nth}-{mode}"
        first = old.push_to_hub(name).oid
        hub.fail(nth, mode=mode, times=None)
        is_done = attempt(lambda name=name: new.push_to_hub(name))
        hub.heal()
        is_carried_out = is_done or (mode == "lost" and "/commit/" in hub.requests[-1].path)
        assert is_equal(name, old, first)
        assert is_equal(name, new if is_carried_out else old)
        new.push_to_hub(name)
        assert is_equal(name, new)
        assert len(hub.commits(name)) == 3
