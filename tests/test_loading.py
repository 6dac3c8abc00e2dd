"""Loading any CLIP folder, and one clear sentence for each way in which it can be wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, CLIPTextModel, CLIPVisionModel, CLIPVisionModelWithProjection

from hf_opentrans import (
    DenseCLIPForSegmentation,
    SparseCLIPModel,
    SparseCLIPVisionModel,
    SparseCLIPVisionModelWithProjection,
)
from hf_opentrans.loading import embedded_folder, load_clip, load_segmenter, resolve_model

LOADERS = pytest.mark.parametrize("load", [load_clip, load_segmenter])


def weights(folder):
    return folder / "model.safetensors"


@LOADERS
def test_a_stock_folder_loads_with_its_processor(tiny_clip_folder, tiny_clip, load):
    loaded = load(tiny_clip_folder)
    model, processor = loaded if isinstance(loaded, tuple) else (loaded.model, loaded.processor)
    assert type(model) is (DenseCLIPForSegmentation if load is load_segmenter else SparseCLIPModel)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny_clip.state_dict().items())
    assert processor.image_processor.size["shortest_edge"] == 32
    assert processor.tokenizer("cat")["input_ids"]


def test_a_segmenter_folder_stays_a_segmenter(tmp_path, tiny_clip_folder):
    model, processor = load_segmenter(tiny_clip_folder)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    assert type(load_clip(tmp_path / "saved").model) is DenseCLIPForSegmentation


@pytest.mark.parametrize(
    ("stock", "sparse"),
    [
        (CLIPVisionModel, SparseCLIPVisionModel),
        (CLIPVisionModelWithProjection, SparseCLIPVisionModelWithProjection),
    ],
)
def test_vision_only_folders_load(tmp_path, tiny_clip_config, tiny_image_processor, stock, sparse):
    model = stock(tiny_clip_config().vision_config).eval()
    for part in (model, tiny_image_processor):
        part.save_pretrained(tmp_path)
    loaded = load_clip(tmp_path)
    assert type(loaded.model) is sparse
    assert loaded.image_processor is loaded.processor
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(pixels)[0], model(pixels)[0])
    with pytest.raises(ValueError, match="Give a CLIP model with both towers"):
        load_segmenter(tmp_path)


def test_half_precision_is_read_as_single_and_remembered(tmp_path, tiny_clip, tiny_image_processor, tiny_tokenizer):
    for part in (tiny_clip.half(), tiny_image_processor, tiny_tokenizer):
        part.save_pretrained(tmp_path, **({"max_shard_size": "50KB"} if part is tiny_clip else {}))
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = load_clip(tmp_path)
    assert loaded.disk_dtype == torch.float16
    assert loaded.model.dtype == torch.float32


def test_embedded_model_has_a_name(tmp_path, monkeypatch, clip_scenes):
    assert resolve_model("clip-scenes") == str(embedded_folder()) == str(clip_scenes)
    assert resolve_model("somebody/clip") == "somebody/clip"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip-scenes").mkdir()  # a folder of the user goes first
    assert resolve_model("clip-scenes") == "clip-scenes"


@LOADERS
@pytest.mark.parametrize("name", ["./absent", "/no/such/folder", "a/b/c"])
def test_missing_folder(load, name):
    with pytest.raises(FileNotFoundError, match=f"There is no model folder '{name}'"):
        load(name)


@LOADERS
def test_unknown_name_says_what_a_model_needs(load):
    with pytest.raises(FileNotFoundError, match=r"There is no folder 'nobody/nothing', and .* could not be loaded"):
        load("nobody/nothing")


@LOADERS
def test_file_instead_of_a_folder(tmp_path, load):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is a file\. A model is a folder"):
        load(tmp_path / "file")


@LOADERS
def test_folder_without_config(tmp_path, load):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path)


@LOADERS
@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"", b"\xff\xfe\x00"])
def test_config_that_is_no_json_object(tiny_clip_folder, load, content):
    (tiny_clip_folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tiny-clip.* is not valid.*Save or download the model again") as caught:
        load(tiny_clip_folder)
    assert "\n" not in str(caught.value)


@LOADERS
@pytest.mark.parametrize("size", [0, 4, 1000, -100])
def test_weights_cut_short(tiny_clip_folder, load, size):
    content = weights(tiny_clip_folder).read_bytes()
    weights(tiny_clip_folder).write_bytes(content[:size])
    with pytest.raises(ValueError, match="are damaged or cut short") as caught:
        load(tiny_clip_folder)
    assert "\n" not in str(caught.value)


@LOADERS
def test_no_weights(tiny_clip_folder, load):
    weights(tiny_clip_folder).unlink()
    with pytest.raises(FileNotFoundError, match=r"could not be loaded: .*model\.safetensors"):
        load(tiny_clip_folder)


@LOADERS
@pytest.mark.parametrize("name", ["vision_model.encoder.layers.1.mlp.fc2.bias", "text_projection.weight"])
def test_missing_tensor(tiny_clip_folder, load, name):
    tensors = load_file(weights(tiny_clip_folder))
    matches = [key for key in tensors if key.endswith(name)]
    assert len(matches) == 1
    del tensors[matches[0]]
    save_file(tensors, weights(tiny_clip_folder), metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of the weights"):
        load(tiny_clip_folder)


@LOADERS
def test_tensor_that_is_not_finite(tiny_clip_folder, load):
    tensors = load_file(weights(tiny_clip_folder))
    tensors["text_projection.weight"][0, 0] = float("nan")
    save_file(tensors, weights(tiny_clip_folder), metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'text_projection\.weight' has values that are NaN"):
        load(tiny_clip_folder)


@LOADERS
def test_text_only_model(tmp_path, tiny_clip_config, load):
    CLIPTextModel(tiny_clip_config().text_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'clip_text_model'"):
        load(tmp_path)


@LOADERS
def test_other_model(tmp_path, load):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'bert'"):
        load(tmp_path)


@LOADERS
@pytest.mark.parametrize("pattern", ["*processor*", "tokenizer*"])
def test_missing_processor_files(tiny_clip_folder, load, pattern):
    found = list(tiny_clip_folder.glob(pattern))
    assert found
    for path in found:
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"could not be loaded.*processor's files") as caught:
        load(tiny_clip_folder)
    assert "\n" not in str(caught.value)


@LOADERS
def test_shapes_that_disagree_with_the_config(tiny_clip_folder, load):
    path = tiny_clip_folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["vision_config"]["intermediate_size"] = 48
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="do not have the shapes"):
        load(tiny_clip_folder)


def test_vision_folder_without_image_processor(tmp_path, tiny_clip_config):
    CLIPVisionModel(tiny_clip_config().vision_config).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="processor's files"):
        load_clip(tmp_path)


def test_a_folder_may_be_given_as_a_path_or_a_string(tiny_clip_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_clip_folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    assert load_clip("copy").path == "copy"
    assert load_clip(str(tiny_clip_folder)).path == str(tiny_clip_folder)
