"""Every kind of model through `torch.export` and back."""

from typing import Any

import pytest
import torch

from hf_opentrans import (
    CATSegForSegmentation,
    DeepLabV3PlusForSegmentation,
    SparseCLIPVisionModelWithProjection,
    Vocabulary,
)
from hf_opentrans.deploy import (
    ExportConfig,
    ExportedTower,
    ExportRecord,
    TorchExportSegmenter,
    export_model,
    load_exported,
)

HERE = ExportConfig(format="torch-export")
NAMES = ["cat", "sofa; couch", "wall"]


def check_same(model, processor, folder, config) -> Any:
    """Export with a vocabulary, load, and compare with the model."""
    record = export_model(model, processor, folder, config, vocabulary=Vocabulary(NAMES))
    again = load_exported(folder)
    vocabulary = model.encode_vocabulary(Vocabulary(NAMES), processor.tokenizer)
    pixels = torch.randn(2, 3, *record.image_size)
    with torch.no_grad():
        expected = model(pixels, vocabulary=vocabulary).logits
    torch.testing.assert_close(again(pixels).logits, expected, atol=1e-4, rtol=1e-4)
    return again


def test_pruned_models(pruned, parts, tmp_path):
    check_same(pruned, parts[1], tmp_path / "out", HERE)
    assert "1 MLPs without neurons replaced by their bias" in ExportRecord.load(tmp_path / "out").folded


SLOW = pytest.mark.slow  # its graph has a thousand nodes
HEADS: dict[Any, dict[str, Any]] = {
    DeepLabV3PlusForSegmentation: {"decoder_channels": 24, "skip_channels": 8, "atrous_rates": [1, 2]},
    CATSegForSegmentation: {
        "cost_channels": 16,
        "aggregation_blocks": 1,
        "window_size": 3,
        "aggregation_heads": 2,
        "decoder_channels": [8, 4],
        "guidance_channels": 6,
        "text_guidance_channels": 5,
    },
}


@pytest.mark.parametrize("kind", [DeepLabV3PlusForSegmentation, pytest.param(CATSegForSegmentation, marks=SLOW)])
def test_trained_segmenters(parts, tmp_path, tiny_images, kind):
    model = kind.from_clip(parts[0], **HEADS[kind]).eval()
    again = check_same(model, parts[1], tmp_path / "out", ExportConfig(format="torch-export", resolution=16))
    (result,) = again.segment(tiny_images[0])
    assert result.segmentation.shape == (40, 48)


def test_a_tower(parts, tmp_path):
    tower = SparseCLIPVisionModelWithProjection(parts[0].vision_model.config).eval()
    export_model(tower, parts[1].image_processor, tmp_path / "out", HERE)
    again = load_exported(tmp_path / "out")
    assert type(again) is ExportedTower
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = tower(pixels)
    found = again(pixels)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.pooler_output, expected.image_embeds, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="TorchExportSegmenter needs logits"):
        TorchExportSegmenter.from_pretrained(tmp_path / "out")
