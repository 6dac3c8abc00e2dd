"""The subnetwork folder: a round trip, hashes, and what is refused."""

import hashlib
import json

import pytest
import torch
from transformers import CLIPVisionModel

from hf_opentrans import PruningPlan, Subnetwork, slice_model
from hf_opentrans.pruning import LayerPlan, to_sparse
from hf_opentrans.pruning.matching import hash_tensors
from hf_opentrans.pruning.tower import Tower

PLAN = PruningPlan((LayerPlan((1, 3), (5, 6)), LayerPlan((), (0,)), LayerPlan((0,), ())))


def make(model):
    small = slice_model(model, PLAN)
    tower = Tower.of(small)
    return small, Subnetwork(
        plan=PLAN,
        vision_config=tower.vision.config.to_dict(),
        tensors=tower.named_tensors(),
        base_model="tiny",
        base_revision=None,
        source_hashes=hash_tensors(to_sparse(model)),
        calibration={"fingerprint": "0", "seed": 0},
        budget={"unit": "macs", "keep": 0.5},
    )


def tokens(model):
    with torch.no_grad():
        return Tower.of(model).tokens(torch.ones(1, 3, 32, 32))


@pytest.mark.parametrize("with_projection", [False, True])
def test_round_trip(tmp_path, tiny_clip, with_projection):
    model = tiny_clip if with_projection else tiny_clip.vision_model
    if not with_projection:
        model = CLIPVisionModel(tiny_clip.config.vision_config).eval()
        model.load_state_dict(tiny_clip.vision_model.state_dict())
    small, subnetwork = make(model)
    subnetwork.save_pretrained(tmp_path / "sub")
    assert {path.name for path in (tmp_path / "sub").iterdir()} == {"subnetwork.json", "model.safetensors"}
    again = Subnetwork.from_pretrained(tmp_path / "sub")
    for name in ("plan", "base_model", "base_revision", "source_hashes", "calibration", "budget"):
        assert getattr(again, name) == getattr(subnetwork, name)
    assert again.vision_config == json.loads(json.dumps(subnetwork.vision_config))
    assert again.tensors.keys() == subnetwork.tensors.keys()
    assert all(torch.equal(value, subnetwork.tensors[key]) for key, value in again.tensors.items())
    built = again.to_model()
    assert ("visual_projection.weight" in again.tensors) == with_projection == (Tower.of(built).projection is not None)
    assert not built.training
    torch.testing.assert_close(tokens(built), tokens(small), atol=1e-6, rtol=1e-6)


def test_hashes_are_those_of_the_bytes(tiny_clip):
    hashes = hash_tensors(to_sparse(tiny_clip))
    weight = tiny_clip.vision_model.encoder.layers[1].mlp.fc1.weight.detach()
    expected = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    assert hashes["encoder.layers.1.mlp.fc1.weight"] == expected
    assert len(hashes) == 55 + 1  # the tower and its projection
    half = hash_tensors(to_sparse(tiny_clip.to(torch.bfloat16)))
    assert half["encoder.layers.1.mlp.fc1.weight"] != expected


def test_an_older_subnetwork_is_replaced_as_a_whole(tmp_path, tiny_clip):
    _, subnetwork = make(tiny_clip)
    subnetwork.save_pretrained(tmp_path / "sub")
    (tmp_path / "sub" / "left-over.txt").write_text("old")
    subnetwork.save_pretrained(tmp_path / "sub")
    assert {path.name for path in (tmp_path / "sub").iterdir()} == {"subnetwork.json", "model.safetensors"}


def test_foreign_folders_are_refused(tmp_path, tiny_clip):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match=r"already holds mine\.txt"):
        make(tiny_clip)[1].save_pretrained(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_broken_folders_are_refused(tmp_path, tiny_clip):
    with pytest.raises(FileNotFoundError, match=r"There is no subnetwork\.json in"):
        Subnetwork.from_pretrained(tmp_path)
    make(tiny_clip)[1].save_pretrained(tmp_path / "sub")
    path = tmp_path / "sub" / "subnetwork.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"schema_version": 99}))
    with pytest.raises(ValueError, match=r"has schema version 99. hf_opentrans reads version 1 here"):
        Subnetwork.from_pretrained(tmp_path / "sub")
    path.write_text("{ cut short")
    with pytest.raises(ValueError, match="is not valid JSON"):
        Subnetwork.from_pretrained(tmp_path / "sub")
