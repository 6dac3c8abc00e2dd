"""The Auto class: which checkpoint becomes which segmenter."""

import pytest
from transformers import BertConfig

from hf_opentrans import (
    AutoModelForOpenVocabularySegmentation,
    CATSegForSegmentation,
    DeepLabV3PlusForSegmentation,
    DenseCLIPForSegmentation,
    GKCForSegmentation,
    SparseCLIPModel,
)

SMALL = {"decoder_channels": 24, "skip_channels": 8, "atrous_rates": [1, 2]}


def test_a_stock_clip_needs_no_training(tiny_clip_folder):
    model = AutoModelForOpenVocabularySegmentation.from_pretrained(tiny_clip_folder, segmentation_mode="sclip")
    assert type(model) is DenseCLIPForSegmentation
    assert model.config.segmentation_mode == "sclip"


def test_saved_segmenters_come_back_as_what_they_were(tmp_path, tiny_clip_folder):
    clip = SparseCLIPModel.from_pretrained(tiny_clip_folder)
    made = {
        "clip": (clip, DenseCLIPForSegmentation),
        "dense": (DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder), DenseCLIPForSegmentation),
        "deeplab": (DeepLabV3PlusForSegmentation.from_clip(clip, **SMALL), DeepLabV3PlusForSegmentation),
        "catseg": (CATSegForSegmentation.from_clip(clip, cost_channels=16), CATSegForSegmentation),
        "gkc": (
            GKCForSegmentation.from_clip(clip, hidden_dim=32, encoder_layers=1, decoder_layers=1),
            GKCForSegmentation,
        ),
    }
    for name, (model, kind) in made.items():
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path / name)
        assert type(loaded) is kind
        assert type(AutoModelForOpenVocabularySegmentation.from_config(loaded.config)) is kind
        again = AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path / name, config=loaded.config)
        assert type(again) is kind


def test_other_models_are_refused(tmp_path, tiny_clip):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 'bert'. An open-vocabulary segmenter is one of clip, "):
        AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path)
    tiny_clip.vision_model.save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match=r"tower' holds a model of type 'clip_vision_model'"):
        AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path / "tower")


def test_it_has_no_instances():
    with pytest.raises(OSError, match="It only chooses a class"):
        AutoModelForOpenVocabularySegmentation()
