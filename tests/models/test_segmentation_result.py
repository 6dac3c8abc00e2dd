"""The result object: list form, areas and the picture."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from hf_opentrans import SegmentationResult
from hf_opentrans.models.segmentation_result import SegmentList, class_colour


def make():
    ids = torch.tensor([[0, 0, 0, 2], [0, 0, 2, -1]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.5], [0.6, 0.5, 0.7, 0.1]])
    return SegmentationResult(ids, scores, ("cat", "dog", "wall"))


def test_to_list_has_the_shape_of_the_pipeline():
    entries = make().to_list()
    assert [entry["label"] for entry in entries] == ["cat", "wall"]  # largest first, absent ones left out
    assert [entry["score"] for entry in entries] == pytest.approx([0.7, 0.6])  # (0.9+0.8+0.7+0.6+0.5)/5, (0.5+0.7)/2
    mask = entries[0]["mask"]
    assert (mask.mode, mask.size) == ("L", (4, 2))
    assert np.asarray(mask).tolist() == [[255, 255, 255, 0], [255, 255, 0, 0]]


def test_plot_mixes_colours_and_leaves_unlabelled_pixels_alone():
    picture = make().plot(Image.new("RGB", (4, 2), (100, 100, 100)), legend=False, opacity=0.5)
    assert picture.size == (320, 160)
    corner = picture.getpixel((0, 0))
    assert corner == tuple(round(50 + colour / 2) for colour in class_colour(0))
    assert picture.getpixel((319, 159)) == (100, 100, 100)


def test_the_legend_stands_beside_the_picture():
    result = make()
    plain, sheet = result.plot(legend=False), result.plot()
    assert sheet.width > plain.width
    assert sheet.height >= plain.height
    assert np.array_equal(np.asarray(sheet)[: plain.height, : plain.width], np.asarray(plain))


@pytest.mark.parametrize("classes", [1, 20, 60])
def test_plot_with_many_classes(classes):
    ids = torch.arange(classes).repeat_interleave(4).reshape(-1, 4)
    labels = tuple(f"a rather long name {'x' * i}" for i in range(classes))
    result = SegmentationResult(ids, torch.ones(ids.shape), labels)
    plain, sheet = (result.plot(Image.new("L", (9, 9)), legend=legend) for legend in (False, True))
    assert sheet.mode == "RGB"
    # The legend stands beside a picture, and below a wide one.
    assert sheet.width * sheet.height > plain.width * plain.height


def test_nothing_labelled():
    result = SegmentationResult(torch.full((1, 1), -1), torch.zeros(1, 1), ("cat",))
    assert result.to_list() == []
    assert result.plot().size[1] >= 320


def test_colours_of_neighbours_differ():
    colours = [np.array(class_colour(index), float) for index in range(20)]
    assert len({tuple(colour) for colour in colours}) == 20
    assert min(np.abs(a - b).sum() for a, b in pairwise(colours)) > 100


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_the_picture_is_written_whole(tmp_path, suffix):
    path = make().save(tmp_path / "new" / f"a.{suffix}", legend=False)
    with Image.open(path) as written:
        assert written.size == make().plot(legend=False).size
    assert [entry.name for entry in path.parent.iterdir()] == [f"a.{suffix}"]
    for wrong in ("a", "a.txt", "a.psd"):  # Pillow reads the last one and does not write it
        with pytest.raises(ValueError, match=r"ends in '.*'. The suffix chooses the format of the picture. Use \.png"):
            make().save(tmp_path / wrong)


def test_the_list_carries_its_result():
    found = SegmentList(make())
    assert found == make().to_list()
    assert [entry["label"] for entry in found] == ["cat", "wall"]
    assert found.result.labels == ("cat", "dog", "wall")
    ground = Image.new("RGB", (4, 2), "red")
    assert np.array_equal(np.asarray(found.draw(ground)), np.asarray(make().plot(ground)))
