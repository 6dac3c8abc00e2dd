"""Answers of the demo without a browser: budgets, concurrency, figures, and what is refused."""

import struct
import threading
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_opentrans import segment
from hf_opentrans.app import service as module
from hf_opentrans.app.preparation import first_classes, read_examples
from hf_opentrans.app.service import SegmentationService
from hf_opentrans.app.uploads import MOST_BYTES, read_classes, read_upload
from hf_opentrans.loading import load_segmenter
from hf_opentrans.pruning.macs import count_macs

CLASSES = "cat; sofa, couch; wall; sky; dog"


def _expected(folder, picture, budget=None):
    model: Any
    model, processor = load_segmenter(folder)
    if budget is not None:
        model.set_budget(budget)
    return segment(model, processor, picture, CLASSES)[0].segmentation


def test_both_sides_are_what_the_library_gives(service, folders, picture):
    for budget in (0.4, 0.8):
        answer = service.answer(picture, CLASSES, budget)
        assert torch.equal(answer.reference.result.segmentation, _expected(folders[1], picture))
        assert torch.equal(answer.pruned.result.segmentation, _expected(folders[0], picture, budget))
        assert (answer.pruned.budget, answer.reference.budget) == (budget, None)
        same = answer.reference.result.segmentation == answer.pruned.result.segmentation
        assert answer.agreement == pytest.approx(same.double().mean().item())
        assert answer.pruned.result.labels == ("cat", "sofa", "wall", "sky", "dog")
        assert answer.image.size == (64, 48)


def test_figures_are_counted_and_timed(service, folders, tmp_path, monkeypatch):
    clock = iter(range(1, 1000))
    monkeypatch.setattr(module, "milliseconds", lambda run, device: (run(), float(next(clock)))[1])
    square = tmp_path / "square.png"
    Image.new("RGB", (40, 40), "red").save(square)
    answer = service.answer(square, CLASSES, 0.6)
    model: Any = load_segmenter(folders[0])[0]
    model.set_budget(0.6)
    assert answer.pruned.macs == count_macs(model.vision_model.config)  # 40 pixels become the model's 32
    weights = list(model.vision_model.parameters())
    assert answer.pruned.weight_bytes == sum(4 * weight.numel() for weight in weights)
    assert answer.pruned.weight_bytes < answer.reference.weight_bytes
    assert answer.pruned.macs < answer.reference.macs
    # The reference is timed at 1, 3, 5, 7, 9, the pruned model at 2, 4, 6, 8, 10.
    assert (answer.reference.milliseconds, answer.pruned.milliseconds, answer.rounds) == (5.0, 6.0, 5)
    assert answer.speed_up == 5 / 6


def test_a_wide_picture_costs_what_its_tokens_cost(service, picture, tmp_path):
    square = tmp_path / "square.png"
    Image.new("RGB", (48, 48)).save(square)
    wide, narrow = (service.answer(path, CLASSES, 0.8).pruned.macs for path in (picture, square))
    assert wide > narrow


def test_long_passes_end_the_rounds(service, picture, monkeypatch):
    monkeypatch.setattr(module, "MOST_SECONDS", 0.0)
    assert service.answer(picture, CLASSES, 0.8).rounds == 1


def test_visitors_never_get_each_others_budget(service, folders, picture):
    budgets = (0.8, 0.4)
    expected = {budget: _expected(folders[0], picture, budget) for budget in budgets}
    assert not torch.equal(*expected.values())
    wrong, start = [], threading.Barrier(4)

    def visit(budget):
        start.wait()
        for _ in range(6):
            answer = service.answer(picture, CLASSES, budget)
            right = torch.equal(answer.pruned.result.segmentation, expected[budget])
            if not right or answer.pruned.budget != budget:
                wrong.append(budget)

    threads = [threading.Thread(target=visit, args=(budget,)) for budget in budgets * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_without_a_dense_model_the_largest_budget_is_the_reference_and_says_so(folders, picture):
    alone = SegmentationService.load(folders[0])
    answer = alone.answer(picture, CLASSES, 0.4)
    assert answer.reference.name == "largest budget, 0.8"
    assert answer.reference.budget == 0.8
    assert torch.equal(answer.reference.result.segmentation, _expected(folders[0], picture, 0.8))
    assert torch.equal(answer.pruned.result.segmentation, _expected(folders[0], picture, 0.4))


def test_a_model_without_budgets_needs_a_reference_and_no_budget(folders, picture):
    with pytest.raises(ValueError, match=r"without budgets. There is nothing to compare it with. Name the dense"):
        SegmentationService.load(folders[1])
    answer = SegmentationService.load(folders[1], folders[1]).answer(picture, CLASSES)
    assert answer.pruned.budget is None
    assert answer.agreement == 1


def test_windows_are_another_mode(service, picture):
    assert service.inferences == ("whole", "slide")
    assert service.answer(picture, CLASSES, 0.6, "slide").inference == "slide"
    with pytest.raises(ValueError, match=r"mode is 'fast'. It must be one of whole, slide"):
        service.answer(picture, CLASSES, 0.6, "fast")


@pytest.mark.parametrize("budget", [0.2, 0.81, -1, float("nan"), float("inf"), None])
def test_a_budget_outside_the_range_is_refused(service, picture, budget):
    with pytest.raises(ValueError, match=r"This model has budgets from 0.4 to 0.8. Choose one of 0.8, 0.6, 0.4."):
        service.answer(picture, CLASSES, budget)


@given(share=st.floats(0.4, 0.8))
def test_the_nearest_budget_is_used(service, share):
    nearest = service.nearest_budget(share)
    assert abs(nearest - share) <= min(abs(each - share) for each in (0.8, 0.6, 0.4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "There are no classes. At least one name is needed"),
        (" ; , ;\n", "There are no classes"),
        ("cat;;dog", "empty"),
        ("cat; cat", "cat"),
        ("; ".join(f"name {i}" for i in range(500)), "There are 500 names. At most 200 are taken here"),
        ("x" * 30_000, "The classes have 30000 characters. At most 20000"),
    ],
)
def test_names_that_cannot_be_used_are_refused(service, picture, text, message):
    with pytest.raises(ValueError, match=message):
        service.answer(picture, text, 0.6)


def test_lines_and_semicolons_separate_classes():
    assert read_classes("cat; sofa, couch\nwall;\n\n sky ", "plain").names == ("cat", "sofa", "wall", "sky")


def _png_of(width, height):
    """Return a PNG that claims a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"this is no picture", "not a picture that can be read. It must be one of JPEG"),
        (b"", "not a picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture that can be read"),
        (_png_of(7000, 7000), "too many pixels .7000 x 7000.. At most 40 million"),
        (_png_of(12_000, 12_000), "too many pixels"),
        (_png_of(60_000, 60_000), "too many pixels .far more."),
        (_png_of(900, 100), "900 x 100 pixels. The long side may be at most 8 times"),
        (_png_of(64, 64), "damaged or cut short"),
        (b"\0" * (MOST_BYTES + 1), "has 20 MiB. At most 20 MiB are read"),
    ],
    ids=["text", "nothing", "eps", "large", "larger", "bomb", "long", "damaged", "bytes"],
)
def test_uploads_that_cannot_be_used_are_refused_before_they_are_decoded(tmp_path, content, message):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_upload(path)


def test_no_picture_is_refused(service):
    with pytest.raises(ValueError, match=r"There is no picture. One is needed"):
        service.answer(None, CLASSES, 0.6)


def test_large_pictures_are_scaled_and_upright(tmp_path):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    Image.new("RGB", (3000, 2000), "blue").save(path, exif=exif)
    read = read_upload(path)
    assert read.size == (683, 1024)
    assert np.asarray(read)[5, 5].tolist()[2] > 250


def test_examples_are_read_with_their_classes(tmp_path):
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes.md").write_text("not a picture")
    (tmp_path / "examples.json").write_text('{"b.png": "cat; sky"}')
    found = read_examples(tmp_path)
    assert [(example.path.name, example.classes) for example in found] == [("a.jpg", ""), ("b.png", "cat; sky")]
    assert first_classes(found) == "cat; sky"


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, ValueError, "holds no pictures"),
        ({"examples.json": '{"b.png": "cat"}'}, FileNotFoundError, "names 'b.png', and there is no such picture"),
        ({"examples.json": '{"a.png": 3}'}, ValueError, "holds values that are no text"),
    ],
)
def test_examples_that_cannot_be_used_are_refused(tmp_path, files, error, message):
    if files:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        read_examples(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no folder"):
        read_examples(tmp_path / "none")
