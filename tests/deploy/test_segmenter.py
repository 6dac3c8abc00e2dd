"""Exported segmenters on images of any size: windows, stretching, labels, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_opentrans import Vocabulary, segment
from hf_opentrans.deploy import load_exported
from hf_opentrans.deploy.segmenter import covering_size, window_corners

NAMES = ["cat", "sofa; couch", "wall"]


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, size=(4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def check_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-3)
        assert float((ours.segmentation == theirs.segmentation).float().mean()) > 0.995
        assert ours.labels == theirs.labels
        assert ours.image is not None


def test_windows_are_those_of_slide(parts, free_folder):
    model, processor = parts
    images = [picture(70, 41), picture(32, 90, 1), picture(32, 32, 2), picture(200, 150, 3)]
    found = load_exported(free_folder).segment(images, NAMES, batch_size=3)
    check_same(found, segment(model, processor, images, NAMES, inference="slide", resolution=32))
    assert [result.segmentation.shape for result in found] == [(41, 70), (90, 32), (32, 32), (150, 200)]


def test_a_square_image_takes_one_pass(parts, free_folder):
    model, processor = parts
    again = load_exported(free_folder)
    check_same(again.segment(picture(50, 50), NAMES), segment(model, processor, picture(50, 50), NAMES))


def test_stretched_images_take_one_pass(parts, free_folder):
    model, processor = parts
    image = picture(70, 41)
    again = load_exported(free_folder)
    seen = []
    run = again._session.run
    again._session.run = lambda inputs: (seen.append(len(inputs["pixel_values"])), run(inputs))[1]  # pyright: ignore[reportAttributeAccessIssue]
    (found,) = again.segment(image, NAMES, fit="stretch")
    assert seen == [1]
    pixels = processor.image_processor(
        image, size={"height": 32, "width": 32}, do_center_crop=False, return_tensors="pt"
    )["pixel_values"]
    vocabulary = model.encode_vocabulary(Vocabulary(NAMES), processor.tokenizer)
    with torch.no_grad():
        outputs = model(pixels, vocabulary=vocabulary)
    (expected,) = processor.post_process_semantic_segmentation(outputs, [(41, 70)])
    check_same([found], [expected])


def test_kinds_of_images_and_labels(free_folder, tmp_path):
    again = load_exported(free_folder)
    image = picture(48, 40)
    image.save(tmp_path / "a.png")
    (expected,) = again.segment(image, NAMES)
    vocabulary = again.encode_vocabulary(Vocabulary(NAMES))
    vocabulary.save_pretrained(tmp_path / "names")
    for given_image, labels in (
        (tmp_path / "a.png", NAMES),
        (np.asarray(image), Vocabulary(NAMES)),
        (image, vocabulary),
        (image, tmp_path / "names"),
        (image, str(tmp_path / "names" / "vocabulary.json")),
    ):
        (found,) = again.segment(given_image, labels)
        assert torch.equal(found.segmentation, expected.segmentation)
    (found,) = again.segment(image, NAMES, threshold=0.999)
    assert float(found.segmentation.max()) == -1


def test_what_is_refused(free_folder, tmp_path):
    again = load_exported(free_folder)
    vocabulary = again.encode_vocabulary(Vocabulary(NAMES))
    with pytest.raises(ValueError, match=r"have the shape \(1, 3, 32, 40\).*\(batch_size, 3, 32, 32\).*32x40"):
        again(torch.zeros(1, 3, 32, 40), vocabulary=vocabulary)
    with pytest.raises(ValueError, match="There is no encoded text"):
        again(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"shape \(2, 5\). They must be \(queries, 16\)"):
        again(torch.zeros(1, 3, 32, 32), text_embeddings=torch.zeros(2, 5))
    image = picture(40, 40)
    with pytest.raises(ValueError, match="There are no labels"):
        again.segment(image)
    with pytest.raises(ValueError, match=r"fit is 'crop'\. It must be one of windows, stretch"):
        again.segment(image, NAMES, fit="crop")
    with pytest.raises(ValueError, match="batch_size is 0"):
        again.segment(image, NAMES, batch_size=0)
    with pytest.raises(TypeError, match="The classes are one string"):
        again.segment(image, "cat; dog")
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(ValueError, match="is not an image"):
        again.segment(tmp_path / "no.png", NAMES)
    foreign = replace(vocabulary, encoder="another")
    foreign.save_pretrained(tmp_path / "names")
    for labels in (foreign, tmp_path / "names"):
        with pytest.raises(ValueError, match="made with another model: its text tower has the fingerprint another"):
            again.segment(image, labels)
    with pytest.raises(FileNotFoundError, match=r"There is no vocabulary\.json in"):
        again.segment(image, tmp_path / "none")


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 900),
    width=st.integers(1, 900),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    patch=st.sampled_from([8, 14, 16]),
)
def test_windows_cover_every_patch(height, width, rows, columns, patch):
    window = rows * patch, columns * patch
    size = covering_size((height, width), window, patch)
    assert all(side % patch == 0 and side >= least for side, least in zip(size, window, strict=True))
    assert max(size) <= max(6 * min(window) + patch, *window)
    seen = torch.zeros(size[0] // patch, size[1] // patch)
    for y, x in window_corners(size, window, patch):
        assert y % patch == x % patch == 0
        seen[y // patch : y // patch + rows, x // patch : x // patch + columns] += 1
    assert int(seen.min()) >= 1
    if size == window:
        assert list(window_corners(size, window, patch)) == [(0, 0)]
