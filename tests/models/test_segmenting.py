"""The three-line use: images in, results out."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_opentrans import (
    CATSegForSegmentation,
    DeepLabV3PlusForSegmentation,
    DenseCLIPForSegmentation,
    FCCLIPForSegmentation,
    OpenVocabularyProcessor,
    Vocabulary,
    segment,
)
from hf_opentrans.loading import load_segmenter
from hf_opentrans.models.segmenting import SegmentationOptions, as_vocabulary

QUERIES = {"hidden_dim": 64, "num_queries": 4, "encoder_layers": 1, "decoder_layers": 1, "feedforward_dim": 16}


@pytest.fixture
def parts(tiny_clip_folder) -> tuple[DenseCLIPForSegmentation, OpenVocabularyProcessor]:
    return (
        DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder),
        OpenVocabularyProcessor.from_pretrained(tiny_clip_folder),
    )


def test_segment_equals_the_single_steps(parts, tiny_images):
    model, processor = parts
    labels = ["cat", "sofa; couch", "wall"]
    results = segment(model, processor, tiny_images[:3], labels)
    vocabulary = model.encode_vocabulary(Vocabulary(labels, templates="photo"), processor.tokenizer)
    batch = processor(tiny_images[:3], size_divisor=8)
    with torch.no_grad():
        outputs = model(batch["pixel_values"], vocabulary=vocabulary)
    expected = processor.post_process_semantic_segmentation(outputs, batch["target_sizes"])
    for ours, theirs, image in zip(results, expected, tiny_images, strict=False):
        torch.testing.assert_close(ours.scores, theirs.scores)
        assert torch.equal(ours.segmentation, theirs.segmentation)
        assert ours.labels == ("cat", "sofa", "wall")
        assert ours.image is not None
        assert ours.image.size == image.size


def test_images_of_all_kinds_and_sizes_keep_their_order(parts, tmp_path):
    model, processor = parts
    sizes = [(48, 40), (1, 1), (40, 48), (48, 40), (300, 10), (48, 40)]
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    images[3] = images[3].convert("L")
    images[5].save(tmp_path / "a.png")
    together = segment(model, processor, [*images[:5], tmp_path / "a.png"], ["cat", "dog"], batch_size=2)
    for image, result, (width, height) in zip(images, together, sizes, strict=True):
        assert result.segmentation.shape == (height, width)
        alone = segment(model, processor, image, ["cat", "dog"])[0]
        torch.testing.assert_close(alone.scores, result.scores, atol=1e-5, rtol=1e-4)


def test_one_pass_per_batch_whatever_the_number_of_names(parts, tiny_images):
    model, processor = parts
    calls = []
    model.vision_model.embeddings.register_forward_hook(lambda *_: calls.append(1))
    segment(model, processor, tiny_images, [f"name {index}" for index in range(50)], batch_size=8)
    assert len(calls) == 1


def test_slide_and_mode_and_threshold(parts, tiny_images):
    model, processor = parts
    results = segment(model, processor, tiny_images[0], ["cat", "dog"], mode="sclip", inference="slide", threshold=1.0)
    assert results[0].segmentation.unique().tolist() == [-1]
    with pytest.raises(ValueError, match="mode is 'magic'"):
        segment(model, processor, tiny_images[0], ["cat"], mode="magic")
    with pytest.raises(ValueError, match="occurs twice"):
        segment(model, processor, tiny_images[0], ["cat", "cat"])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DeepLabV3PlusForSegmentation, {"decoder_channels": 8}),
        (CATSegForSegmentation, {"cost_channels": 8}),
        (FCCLIPForSegmentation, QUERIES),
    ],
)
def test_trained_segmenters_are_used_alike(parts, tiny_images, tmp_path, kind, options):
    dense, processor = parts
    trained = kind.from_clip(dense, **options)
    for part in (trained, processor):
        part.save_pretrained(tmp_path / "trained")
    model, loaded = load_segmenter(tmp_path / "trained")
    assert type(model) is kind
    labels = ["cat", "sofa; couch", "wall"]
    results = segment(model, loaded, tiny_images[:3], labels)
    assert [result.segmentation.shape for result in results] == [(40, 48)] * 3
    assert all(0 <= int(result.segmentation.min()) <= int(result.segmentation.max()) < 3 for result in results)
    if kind is DeepLabV3PlusForSegmentation:  # untrained, it adds nothing to the CLIP's embeddings
        found = segment(dense, processor, tiny_images[0], labels)[0]
        assert (results[0].segmentation == found.segmentation).float().mean() > 0.9
    choices: list[dict[str, Any]] = [{"mode": "sclip"}, {"inference": "slide"}]
    for choice in choices:
        with pytest.raises(ValueError, match="A trained segmenter reads whole images in the mode"):
            segment(model, loaded, tiny_images[0], labels, **choice)


def test_labels_in_every_form(parts, tiny_images):
    model, processor = parts
    expected = segment(model, processor, tiny_images[0], ["cat", "sofa; couch"])[0]
    for labels in ("cat; sofa, couch", Vocabulary(["cat", ["sofa", "couch"]])):
        found = segment(model, processor, tiny_images[0], labels)[0]
        assert found.labels == expected.labels
        assert torch.equal(found.segmentation, expected.segmentation)


def test_a_background_joins_a_vocabulary():
    encoded = Vocabulary(["cat"], templates="plain").encode(lambda texts: torch.eye(2)[: len(texts)])
    both = as_vocabulary(encoded, "photo", background=["sky"])
    assert both.names == ("cat", "background")
    assert both.templates == ("{}",)
    assert both.text_embeddings is None  # they would lack the new words
    assert as_vocabulary(encoded, "photo") is encoded
    with pytest.raises(ValueError, match="'background' occurs twice"):
        as_vocabulary(both, "photo", background=["sky"])


def test_wrong_options_are_refused_before_images_are_read(parts):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mode": "magic"}, r"mode is 'magic'. It must be one of vanilla, maskclip, .*Leave it out"),
        ({"inference": "tiles"}, r"inference is 'tiles'. It must be 'whole' or 'slide'"),
        ({"resolution": 0}, r"resolution is 0. It must be a whole number from 1 up"),
        ({"resolution": 3.5}, r"resolution is 3.5. It must be a whole number"),
        ({"batch_size": 0}, r"batch_size is 0. It must be a whole number from 1 up. Correct it"),
        ({"batch_size": None}, r"batch_size is None. It must be a whole number"),
        ({"threshold": -0.1}, r"threshold is -0.1. It is a probability and must lie in 0..1"),
        ({"threshold": "0.5"}, r"threshold is '0.5'. It is a probability"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            segment(parts[0], parts[1], "missing.png", ["cat"], **options)
    of_numpy: dict[str, Any] = {"threshold": np.float32(0.5), "resolution": np.int64(32)}
    assert SegmentationOptions(**of_numpy).resolution == 32
