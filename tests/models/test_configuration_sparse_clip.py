"""Configurations: per-layer widths, equality, copies, and what they refuse."""

import copy
import pickle
from typing import Any

import pytest
from transformers import CLIPConfig, CLIPVisionConfig

from hf_opentrans import SparseCLIPConfig, SparseCLIPVisionConfig

LAYERS = {
    0: {"num_attention_heads": 3, "intermediate_size": 20, "masked_heads": [0, 2]},
    2: {"skip": ["mlp"], "qk_head_dim": 4, "v_head_dim": 6},
}


def vision_config(**values: Any):
    base: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    base |= {"image_size": 32, "patch_size": 8}
    return SparseCLIPVisionConfig(**(base | values))


def make(kind, **values):
    if kind == "vision":
        return vision_config(per_layer_config=LAYERS, pruning_config={"keep": 0.6}, **values)
    return SparseCLIPConfig(vision_config=vision_config(per_layer_config=LAYERS, **values), segmentation_mode="sclip")


def test_layers_read_their_own_widths():
    layers = make("vision").per_layer_config
    assert [layer.num_attention_heads for layer in layers] == [3, 4, 4]
    assert [layer.intermediate_size for layer in layers] == [20, 64, 64]
    assert [(layer.qk_head_dim, layer.v_head_dim) for layer in layers] == [(8, 8), (8, 8), (4, 6)]


def test_head_dim_is_that_of_the_dense_model():
    assert vision_config().head_dim == 8
    config = vision_config(head_dim=5)
    assert (config.head_dim, config.qk_head_dim, config.v_head_dim) == (5, 5, 5)
    # It stays what it was when heads go, and through to_dict.
    again = SparseCLIPVisionConfig(**{k: v for k, v in make("vision").to_dict().items() if k != "model_type"})
    assert again.head_dim == 8


def test_heads_need_not_divide_the_hidden_size():
    assert vision_config(num_attention_heads=3).head_dim == 10


@pytest.mark.parametrize("kind", ["vision", "clip"])
@pytest.mark.parametrize("way", ["same", "deepcopy", "pickle", "disk", "dictionary"])
def test_copies_are_equal(tmp_path, kind, way):
    config = make(kind)
    if way == "disk":
        config.save_pretrained(tmp_path)
    again = {
        "same": lambda: make(kind),
        "deepcopy": lambda: copy.deepcopy(config),
        "pickle": lambda: pickle.loads(pickle.dumps(config)),
        "disk": lambda: type(config).from_pretrained(tmp_path),
        "dictionary": lambda: type(config).from_dict(config.to_dict()),
    }[way]()
    assert again == config
    vision = again if kind == "vision" else again.vision_config
    assert isinstance(vision, SparseCLIPVisionConfig)
    assert [layer.num_attention_heads for layer in vision.per_layer_config] == [3, 4, 4]
    assert getattr(vision.per_layer_config[2], "skip", None) == ["mlp"]


@pytest.mark.parametrize("kind", ["vision", "clip"])
def test_different_configs_are_not_equal(kind):
    config = make(kind)
    assert config != make(kind, hidden_size=64)
    assert config != config.to_dict()
    assert make("vision") != make("clip")
    assert vision_config() != make("vision")
    layers = {**LAYERS, 0: {"num_attention_heads": 2}}
    assert vision_config(per_layer_config=layers) != vision_config(per_layer_config=LAYERS)


def test_a_deep_copy_shares_nothing():
    config = make("vision")
    again = copy.deepcopy(config)
    assert again.pruning_config is not None
    again.pruning_config["keep"] = 0.1
    assert config.pruning_config == {"keep": 0.6}


def test_stock_configs_are_read(tmp_path, tiny_clip_config):
    stock = tiny_clip_config()
    assert isinstance(stock, CLIPConfig)
    stock.save_pretrained(tmp_path / "clip")
    assert isinstance(stock.vision_config, CLIPVisionConfig)
    stock.vision_config.save_pretrained(tmp_path / "vision")
    whole = SparseCLIPConfig.from_pretrained(tmp_path / "clip")
    assert isinstance(whole.vision_config, SparseCLIPVisionConfig)
    for folder in ("clip", "vision"):
        vision = SparseCLIPVisionConfig.from_pretrained(tmp_path / folder)
        assert vision.model_type == "sparse_clip_vision_model"
        assert (vision.hidden_size, vision.head_dim, vision.projection_dim) == (32, 8, 16)
    given = SparseCLIPConfig(vision_config=stock.vision_config, text_config=stock.text_config)
    assert given.vision_config == vision_config(projection_dim=16)
    assert isinstance(stock.vision_config, CLIPVisionConfig)
    assert not isinstance(stock.vision_config, SparseCLIPVisionConfig)


def test_other_models_are_refused(tmp_path):
    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a model of type 'clip_vision_model'.*with both towers"):
        SparseCLIPConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"num_attention_heads": -1}, "Layer 1 has num_attention_heads=-1. It must be at least 0"),
        ({"intermediate_size": -3}, "Layer 1 has intermediate_size=-3. It must be at least 0"),
        ({"qk_head_dim": 0}, "Layer 1 has qk_head_dim=0. It must be at least 1"),
        ({"v_head_dim": 0}, "Layer 1 has v_head_dim=0. It must be at least 1"),
        ({"masked_heads": [4]}, r"Layer 1 masks heads \[4\]. Indices must lie in \[0, 4\)"),
        ({"masked_neurons": [-1]}, r"Layer 1 masks neurons \[-1\]. Indices must lie in \[0, 64\)"),
        ({"num_attention_heads": 2, "masked_heads": [3]}, r"Indices must lie in \[0, 2\)"),
        ({"skip": ["attn"]}, r"Layer 1 skips \['attn'\]. Only \['attention', 'mlp'\] can be skipped"),
    ],
)
def test_impossible_layers_are_refused(layer, message):
    with pytest.raises(Exception, match=message) as caught:
        vision_config(per_layer_config={1: layer})
    assert isinstance(caught.value, ValueError) or isinstance(caught.value.__cause__, ValueError)


def test_an_unknown_mode_is_refused():
    with pytest.raises(Exception, match=r"segmentation_mode is 'magic'. It must be one of"):
        SparseCLIPConfig(segmentation_mode="magic")
