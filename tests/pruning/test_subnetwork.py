"""The subnetwork folder: a round trip, hashes, and what is refused."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModel

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
    with pytest.raises(ValueError, match=r"is not valid .* It must hold one JSON object"):
        Subnetwork.from_pretrained(tmp_path / "sub")


# Folders that are not what save_pretrained wrote.


@pytest.fixture
def saved(tmp_path, tiny_clip):
    """Return a folder with a good subnetwork."""
    make(tiny_clip)[1].save_pretrained(tmp_path / "sub")
    return tmp_path / "sub"


def edit(folder, change):
    """Change the JSON file by a function of its values."""
    path = folder / "subnetwork.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def set_at(*place, value):
    """Return a change that sets one value."""

    def change(values):
        for key in place[:-1]:
            values = values[key]
        values[place[-1]] = value

    return change


def test_a_pruned_model_may_be_given(tmp_path, tiny_clip):
    subnetwork = make(tiny_clip)[1]
    subnetwork.save_pretrained(tmp_path / "pruned" / "subnetwork")
    (tmp_path / "pruned" / "model.safetensors").write_bytes(b"of the model, and not read")
    for options in ({}, {"subfolder": "subnetwork"}):
        assert Subnetwork.from_pretrained(str(tmp_path / "pruned"), **options).plan == PLAN
    with pytest.raises(FileNotFoundError, match=r"There is no subnetwork\.json in"):
        Subnetwork.from_pretrained(tmp_path / "pruned", subfolder="elsewhere")
    subnetwork.save_pretrained(tmp_path / "both" / "subnetwork")
    subnetwork.save_pretrained(tmp_path / "both" / "a")
    assert Subnetwork.from_pretrained(tmp_path / "both", subfolder="a").plan == PLAN


def test_names_that_are_no_folder(tmp_path, saved, monkeypatch):
    with pytest.raises(ValueError, match=r"is a file\. A subnetwork is a folder"):
        Subnetwork.from_pretrained(saved / "subnetwork.json")
    for name in ("a/b/c", "./nowhere", str(tmp_path / "nowhere"), "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"There is no subnetwork\.json in .* 'user/name' on the Hub"):
            Subnetwork.from_pretrained(name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no subnetwork\.json in 'user/name'"):
        Subnetwork.from_pretrained(Path("user/name"))  # a Path is never a name on the Hub
    with pytest.raises(FileNotFoundError, match="The subnetwork 'user/name' could not be downloaded"):
        Subnetwork.from_pretrained("user/name")  # tests are offline


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("plan"), r"lacks \['plan'\]"),
        (lambda values: values.pop("vision_config"), r"lacks \['vision_config'\]"),
        (set_at("left_over", value=1), r"unknown keys \['left_over'\]"),
        (set_at("base_model", value=None), "has base_model of type NoneType"),
        (set_at("source_hashes", value=[]), "has source_hashes of type list"),
        (set_at("source_hashes", "x", value=1), "has source_hashes that are no strings"),
        (set_at("source_samples", value={"x": ["1"]}), "has source_samples of 'x' that are no list of numbers"),
        (set_at("source_samples", value={"x": [float("nan")]}), "has source_samples of 'x'"),
        (set_at("plan", value={"layers": 5}), "has a plan whose layers are no list"),
        (set_at("plan", "layers", 0, value=[1]), "has a plan whose layers are no list of objects"),
        (set_at("plan", "layers", 0, "heads", value="12"), "layer 0 has heads that are no list of whole numbers"),
        (set_at("plan", "layers", 1, "neurons", value=[0.5]), "layer 1 has neurons that are no list"),
        (set_at("plan", "layers", 1, "neurons", value=[True]), "layer 1 has neurons that are no list"),
        (set_at("plan", "layers", 0, "heads", value=[3, 1]), "has a plan that cannot be read"),
        (set_at("plan", "layers", 0, "qk_head_dim", value="8"), "layer 0 has qk_head_dim='8'"),
        (set_at("plan", "layers", 0, "heads", value=[1, 2, 3]), r"plans the widths \[3, 2.* for layer 0"),
        (set_at("plan", "layers", 0, "heads", value=[1, 4]), "keeps units in layer 0 beyond the dense 4 heads"),
        (set_at("plan", "layers", 0, "neurons", value=[5, 64]), "keeps units in layer 0 beyond .* 64 neurons"),
        (set_at("plan", "layers", 0, "v_head_dim", value=4), "plans the widths"),
        (lambda values: values["plan"]["layers"].pop(), "has a plan of 2 layers, and a vision_config of 3"),
        (set_at("vision_config", value={}), "has a plan of 3 layers, and a vision_config of 12"),
        (set_at("vision_config", "hidden_size", value="32"), "has a vision_config that gives no tower .*hidden_size"),
        (set_at("vision_config", "hidden_size", value=10**9), "gives no tower .*hidden_size=1000000000"),
        (
            set_at("vision_config", "num_hidden_layers", value=10**12),
            "gives no tower .*num_hidden_layers=1000000000000",
        ),
        (set_at("vision_config", "intermediate_size", value=-1), "gives no tower .*intermediate_size=-1"),
        (set_at("vision_config", "patch_size", value=0), "gives no tower .*patch_size=0"),
        (set_at("vision_config", "hidden_act", value="os.system"), "gives no tower .*hidden_act='os.system'"),
        (set_at("vision_config", "per_layer_config", value=[1]), "gives no tower .*per_layer_config"),
        (set_at("vision_config", "per_layer_config", "9", value={"intermediate_size": 1}), "gives no tower"),
        (set_at("vision_config", "per_layer_config", value=None), r"plans the widths \[2, 2.* for layer 0"),
        (set_at("vision_config", "attn_implementation", value="evil/kernel"), "names code"),
        (set_at("vision_config", "hidden_size", value=48), r"does not fit subnetwork\.json in \d+ tensors"),
        (set_at("vision_config", "image_size", value=8192), "does not fit .* tensors: embeddings.position_embedding"),
    ],
)
def test_changed_values_are_refused(saved, change, message):
    edit(saved, change)
    with pytest.raises(ValueError, match=message) as caught:
        Subnetwork.from_pretrained(saved)
    assert "Download it again, or save the subnetwork again." in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "[" * 100_000, "{", "", "\udcff"])
def test_other_json_is_refused(saved, text):
    (saved / "subnetwork.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match="It must hold one"):
        Subnetwork.from_pretrained(saved)


def test_absurd_files_are_refused(saved, monkeypatch):
    monkeypatch.setattr("hf_opentrans.pruning.subnetwork.MAX_JSON_BYTES", 100)
    with pytest.raises(ValueError, match="Such a file has at most 0 MiB"):
        Subnetwork.from_pretrained(saved)
    monkeypatch.undo()
    layer = {"heads": [], "neurons": []}
    edit(saved, set_at("plan", "layers", value=[layer] * 2000))
    edit(saved, set_at("vision_config", "num_hidden_layers", value=2000))
    with pytest.raises(ValueError, match=r"gives no tower .*num_hidden_layers=2000"):
        Subnetwork.from_pretrained(saved)


def test_nothing_of_the_stated_size_is_allocated(saved, monkeypatch):
    """A projection of 8 gigabytes."""
    for name, value in {"hidden_size": 2**15, "intermediate_size": 2**20, "projection_dim": 2**16}.items():
        edit(saved, set_at("vision_config", name, value=value))
    devices, usual = set(), Tower.of
    monkeypatch.setattr(
        Tower, "of", lambda model: devices.update(p.device.type for p in model.parameters()) or usual(model)
    )
    with pytest.raises(ValueError, match="does not fit"):
        Subnetwork.from_pretrained(saved)
    assert devices == {"meta"}


def damage(path, how):
    data = path.read_bytes()
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # apart from the file: it is overwritten
    name = "encoder.layers.0.mlp.fc1.weight"
    if how == "shape":
        save_file({**tensors, name: tensors[name][:1].clone()}, path)
    elif how == "left over":
        save_file({**tensors, "extra": torch.ones(1)}, path)
    elif how == "missing":
        save_file({key: value for key, value in tensors.items() if key != name}, path)
    elif how == "integers":
        save_file({**tensors, name: tensors[name].int()}, path)
    elif how == "nan":
        save_file({**tensors, name: tensors[name] / 0}, path)
    elif how == "pickle":
        torch.save(tensors, path)
    elif how == "header":
        header = json.dumps({name: {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64 - 4]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    else:
        path.write_bytes(data[: int(how)])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"in 1 tensors: encoder.layers.0.mlp.fc1.weight has the shape \(1, 32\), and should have \(2, 32\)"),
        ("left over", r"in 1 tensors: extra has the shape \(1,\), and should have none"),
        ("missing", r"encoder.layers.0.mlp.fc1.weight has the shape of none, and should have \(2, 32\)"),
        ("integers", r"holds numbers of the kinds \['F32', 'I32'\]"),
        ("nan", "'encoder.layers.0.mlp.fc1.weight' has values that are NaN or infinite"),
        ("pickle", "is cut short or no safetensors file"),
        ("header", "is cut short or no safetensors file"),
        ("0", "is cut short or no safetensors file"),
        ("100", "is cut short or no safetensors file"),
        ("-1", "is cut short or no safetensors file"),
    ],
)
def test_damaged_weights_are_refused(saved, how, message):
    damage(saved / "model.safetensors", how)
    with pytest.raises(ValueError, match=message):
        Subnetwork.from_pretrained(saved)


def test_missing_weights_are_refused(saved):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"There is no model\.safetensors beside subnetwork\.json"):
        Subnetwork.from_pretrained(saved)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places(values, prefix=()):
    """Yield the path of every value in nested dictionaries and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from places(value, (*prefix, key))


@pytest.fixture(scope="module")
def template(tmp_path_factory, tiny_clip_config):
    """Return a folder with a good subnetwork, and its values."""
    folder = tmp_path_factory.mktemp("template") / "sub"
    torch.manual_seed(0)
    make(CLIPModel(tiny_clip_config()).eval())[1].save_pretrained(folder)
    return folder, (folder / "subnetwork.json").read_text()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_other_value_is_read_or_refused(template, data):
    """One value of the JSON file is replaced by another: a clear error, or a subnetwork that builds its tower."""
    folder, text = template
    values = json.loads(text)
    place = data.draw(st.sampled_from(list(places(values))))
    set_at(*place, value=data.draw(JSON))(values)
    (folder / "subnetwork.json").write_text(json.dumps(values))
    try:
        found = Subnetwork.from_pretrained(folder)
    except ValueError as err:
        assert "again" in str(err)  # noqa: PT017 - whether it raises depends on the value
    else:
        assert tokens(found.to_model()).isfinite().all()
