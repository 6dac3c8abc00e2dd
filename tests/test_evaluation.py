"""Fidelity, segmentation scores and zero-shot accuracy against brute force and hand-made cases."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_opentrans import DenseCLIPForSegmentation, OpenVocabularyProcessor, Vocabulary, evaluation
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.evaluation import (
    center_crops,
    evaluate_segmentation,
    fidelity,
    folder_samples,
    projected_tokens,
    zero_shot_accuracy,
)

NAMES = ["cat", "sofa; couch", "sky"]


@pytest.fixture
def segmenter(tiny_clip_folder):
    return DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder).eval()


@pytest.fixture
def processor(tiny_image_processor, tiny_tokenizer):
    return OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer)


def test_a_model_is_faithful_to_itself(segmenter, tiny_images, tiny_image_processor):
    measured = fidelity(segmenter, segmenter, tiny_images, image_processor=tiny_image_processor, batch_size=3)
    assert measured.class_token == pytest.approx(1, abs=1e-6)
    assert measured.patch_tokens == pytest.approx(1, abs=1e-6)
    assert measured.to_dict()["images"] == 8


def test_fidelity_is_the_mean_cosine_whatever_the_batches(
    segmenter, make_tiny_clip, tiny_images, tiny_image_processor
):
    other = DenseCLIPForSegmentation(segmenter.config).eval()
    other.load_state_dict(make_tiny_clip(seed=1).state_dict())
    pixels = tiny_image_processor(tiny_images, return_tensors="pt")["pixel_values"]
    cosines = []
    with torch.no_grad():
        for model in (segmenter, other):
            vision = model.vision_model
            hidden = vision.post_layernorm(vision(pixels).last_hidden_state)
            cosines.append(model.visual_projection(hidden))
    expected = torch.nn.functional.cosine_similarity(*cosines, dim=-1)
    for batch_size in (3, 8):
        measured = fidelity(other, segmenter, tiny_images, image_processor=tiny_image_processor, batch_size=batch_size)
        assert measured.class_token == pytest.approx(float(expected[:, 0].mean()), abs=1e-5)
        assert measured.patch_tokens == pytest.approx(float(expected[:, 1:].mean()), abs=1e-5)


def test_resolution_decides_the_crops_and_the_tokens(segmenter, tiny_images, tiny_image_processor):
    pixels = center_crops(tiny_images, tiny_image_processor, 48)
    assert pixels.shape == (8, 3, 48, 48)
    with torch.no_grad():
        class_token, patch_tokens = projected_tokens(segmenter, pixels)
    assert class_token.shape == (8, 16)
    assert patch_tokens.shape == (8, 36, 16)
    torch.testing.assert_close(patch_tokens.norm(dim=-1), torch.ones(8, 36))


def test_segmentation_scores_equal_a_brute_force_loop(segmenter, processor, tiny_images):
    rng = np.random.default_rng(0)
    masks = [rng.integers(-1, 3, size=(40, 48)) for _ in tiny_images]
    calls = []
    scores = evaluate_segmentation(
        segmenter,
        processor,
        zip(tiny_images, masks, strict=True),
        NAMES,
        on_image=lambda: calls.append(1),
        mode="vanilla",
    )
    vocabulary = segmenter.encode_vocabulary(Vocabulary(NAMES, templates="photo"), processor.tokenizer)
    counts = np.zeros((3, 3), dtype=int)
    for image, mask in zip(tiny_images, masks, strict=True):
        inputs = processor(image, size_divisor=8)
        with torch.no_grad():
            logits = segmenter(inputs["pixel_values"], vocabulary=vocabulary, mode="vanilla").logits
        big = torch.nn.functional.interpolate(logits, (40, 48), mode="bilinear")
        winner = big[0].argmax(0)
        for truth, query in zip(mask.flatten().tolist(), winner.flatten().tolist(), strict=True):
            if truth >= 0:
                counts[truth, [0, 1, 1, 2][query]] += 1
    hits = counts.diagonal()
    assert calls == [1] * 8
    assert scores.pixel_accuracy == pytest.approx(hits.sum() / counts.sum(), abs=1e-3)
    iou = hits / (counts.sum(0) + counts.sum(1) - hits)
    assert scores.mean_iou == pytest.approx(iou.mean(), abs=1e-3)


def test_samples_of_a_folder_are_images_with_their_masks(tmp_path, tiny_images):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.json").write_text('{"id_to_name": {"4": "cat", "7": "sky"}}', encoding="utf-8")
    for index, image in enumerate(tiny_images):
        image.save(tmp_path / "images" / f"{index}.png")
        Image.new("L", image.size, (4, 7)[index % 2]).save(tmp_path / "masks" / f"{index}.png")
    folder = SegmentationFolder(tmp_path)
    samples = list(folder_samples(folder, limit=3))
    assert [int(mask.max()) for _, mask in samples] == [0, 1, 0]
    assert samples[0][0].size == (48, 40)
    assert len(list(folder_samples(folder))) == len(list(folder_samples(folder, limit=99))) == 8


def hand_made(monkeypatch, classes):
    """Return a stand-in whose class tokens and text embeddings are unit vectors chosen by the test."""

    def encode(vocabulary: Vocabulary, _tokenizer: Any) -> Vocabulary:
        return Vocabulary(vocabulary.classes, text_embeddings=torch.eye(4)[: len(vocabulary.queries)])

    tokens = iter(torch.eye(4)[classes].split(2))
    monkeypatch.setattr(evaluation, "projected_tokens", lambda _model, batch: (next(tokens)[: len(batch)], None))
    config = SimpleNamespace(segmentation_templates="plain", vision_config=SimpleNamespace(image_size=32))
    model: Any = SimpleNamespace(config=config, encode_vocabulary=encode)
    return model


@pytest.mark.parametrize(
    ("names", "answers", "expected"),
    [
        # Image i shows query [0, 1, 2, 2, 1][i].
        (["cat", "dog", "sky"], [0, 1, 2, 2, 1], 1.0),
        (["cat", "dog", "sky"], [0, 2, 2, 0, 1], 0.6),
        (["cat", "dog; puppy", "sky"], [0, 1, 1, 1, 2], 0.8),  # queries 1 and 2 are both class 1
    ],
)
def test_zero_shot_accuracy_of_a_hand_made_case(
    monkeypatch, tiny_images, tiny_image_processor, names, answers, expected
):
    model = hand_made(monkeypatch, [0, 1, 2, 2, 1])
    processor: Any = SimpleNamespace(tokenizer=None, image_processor=tiny_image_processor)
    accuracy = zero_shot_accuracy(model, processor, tiny_images[:5], answers, names, batch_size=2)
    assert accuracy == pytest.approx(expected)


def test_zero_shot_accuracy_runs_on_a_real_model(segmenter, processor, tiny_images):
    whole = zero_shot_accuracy(segmenter, processor, tiny_images, [0] * 8, NAMES)
    parts = [zero_shot_accuracy(segmenter, processor, tiny_images, [i] * 8, NAMES, batch_size=3) for i in range(3)]
    assert whole == parts[0]
    assert sum(parts) == pytest.approx(1)
