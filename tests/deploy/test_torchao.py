"""int8 in PyTorch: what is quantised, what is left, how close it is, and what is refused."""

import sys
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from hf_opentrans import CLIPResNetVisionConfig, CLIPResNetVisionModel, SparseCLIPVisionModel
from hf_opentrans.deploy import torchao as ours
from hf_opentrans.deploy.torchao import TORCHAO_PRECISIONS, int8_layers, quantize_torchao


@pytest.fixture
def torchao():
    """Skip where torchao is missing: importing it must not fail the tests by its own warnings."""
    with ours._quiet():
        return pytest.importorskip("torchao", reason="needs the extra torchao")


def _tokens(model, pixels):
    with torch.no_grad():
        return model.vision_model(pixels).last_hidden_state


@pytest.mark.parametrize("precision", TORCHAO_PRECISIONS)
def test_the_copy_is_int8_smaller_and_close(torchao, parts, precision):
    model = parts[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small: Any = quantize_torchao(model, precision)
    assert type(small) is type(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found, old = int8_layers(small), int8_layers(model)
    assert len(found.quantized) == 12  # two blocks of six
    assert not old.quantized
    weight: Any = small.get_parameter("vision_model.encoder.layers.0.mlp.fc1.weight")
    assert weight.qdata.dtype == torch.int8
    for name in ("visual_projection.weight", "text_model.encoder.layers.0.mlp.fc1.weight"):
        assert type(small.get_parameter(name)) is torch.nn.Parameter
    weights = [model.get_parameter(f"{name}.weight") for name in found.quantized]
    vision, scales = sum(weight.nbytes for weight in weights), 4 * sum(map(len, weights))
    assert old.weight_bytes - found.weight_bytes >= vision - vision // 4 - 2 * scales
    pixels = torch.randn(2, 3, 32, 32)
    cosine = cosine_similarity(_tokens(model, pixels), _tokens(small, pixels), dim=-1)
    assert 0.99 < float(cosine.min()) < 1 - 1e-7  # close, and not the same computation
    result = small(pixels, text_embeddings=torch.randn(3, 16))
    assert result.logits.isfinite().all()


def test_the_text_tower_on_request(torchao, parts):
    model, processor = parts
    small: Any = quantize_torchao(model, include_text=True)
    assert any(name.startswith("text_model.") for name in int8_layers(small).quantized)
    tokens = processor.tokenizer(["a cat", "the sky"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected, found = (m.get_text_features(**tokens).pooler_output for m in (model, small))
    assert float(cosine_similarity(expected, found, dim=-1).min()) > 0.99


def test_empty_layers_and_odd_widths(torchao, pruned):
    pixels = torch.randn(2, 3, 32, 32)
    weights, dynamic = (quantize_torchao(pruned, precision) for precision in TORCHAO_PRECISIONS)
    for small in (weights, dynamic):
        cosine = cosine_similarity(_tokens(pruned, pixels), _tokens(small, pixels), dim=-1)
        assert float(cosine.min()) > 0.99
    prefix = "vision_model.encoder.layers"
    in_weights, in_dynamic = (int8_layers(small).quantized for small in (weights, dynamic))
    assert not any(name.startswith(f"{prefix}.0.") for name in in_weights)  # neither heads nor neurons
    assert {f"{prefix}.1.mlp.fc1", f"{prefix}.1.mlp.fc2"} <= set(in_weights)  # 17 neurons
    assert not {f"{prefix}.1.mlp.fc1", f"{prefix}.1.mlp.fc2"} & set(in_dynamic)  # CUDA has no such product
    assert f"{prefix}.3.mlp.fc1" in in_dynamic
    assert int8_layers(dynamic).left[f"{prefix}.1.mlp.fc1"] == "float32"


@pytest.mark.parametrize("precision", TORCHAO_PRECISIONS)
def test_a_tower_is_saved_and_loaded(torchao, pruned, precision, tmp_path):
    tower = pruned.vision_model
    small = quantize_torchao(tower, precision)
    small.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < sum(tensor.nbytes for tensor in tower.state_dict().values())
    again = SparseCLIPVisionModel.from_pretrained(tmp_path)
    assert int8_layers(again) == int8_layers(small)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected, found = (m(pixels).last_hidden_state for m in (small, again))
    assert torch.equal(expected, found)
    assert not hasattr(tower.config, "quantization_config")


def test_two_towers_say_that_they_cannot_be_saved(torchao, parts, tmp_path):
    small = quantize_torchao(parts[0])
    with pytest.raises(ValueError, match=r"weights outside all modules.*Save the model before quantize_torchao"):
        small.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_quantised_again(torchao, parts):
    with pytest.raises(ValueError, match="quantised already"):
        quantize_torchao(quantize_torchao(parts[0]))


def test_what_is_refused(parts, make_tiny_clip, monkeypatch):
    with pytest.raises(ValueError, match=r"precision is 'int4'. It must be one of int8-weights, int8-dynamic"):
        quantize_torchao(parts[0], "int4")
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        quantize_torchao(make_tiny_clip().train())
    resnet = CLIPResNetVisionModel(CLIPResNetVisionConfig(width=8, depths=(1, 1, 1, 1), image_size=32))
    with pytest.raises(TypeError, match=r"CLIPResNetVisionModel. It must be or hold a CLIP vision tower"):
        quantize_torchao(resnet.eval())
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r'`torchao` is needed .*pip install "hf_opentrans\[torchao\]"'):
        quantize_torchao(parts[0])
