"""Folders of images and masks: the layouts that load, and one message for each defect."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_opentrans.data.folder import SegmentationFolder

IDS = np.array([[0, 3], [40, 3], [0, 40]])
CLASSES = {"id_to_name": {"40": "sky", "3": "road"}, "ignore_id": 0}
# Order of the file: sky = 0, road = 1.
EXPECTED = [[-1, 1], [0, 1], [-1, 0]]


def make_folder(root: Path, split: str = "", ids: np.ndarray = IDS) -> Path:
    """Write one image and its mask; returns the path of the mask."""
    for kind in ("images", "masks"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    (root / "classes.json").write_text(json.dumps(CLASSES))
    Image.new("RGB", IDS.shape[::-1]).save(root / "images" / split / "a.jpg")
    mask = root / "masks" / split / "a.png"
    Image.fromarray(ids.astype(np.uint8)).save(mask)
    return mask


def write_classes(root: Path, **changes: object) -> None:
    (root / "classes.json").write_text(json.dumps(CLASSES | changes))


def test_ids_become_positions_in_file_order(tmp_path: Path) -> None:
    mask_path = make_folder(tmp_path)
    folder = SegmentationFolder(tmp_path)
    assert folder.class_names == ("sky", "road")
    assert len(folder) == 1
    assert folder.split is None
    (sample,) = folder
    assert sample.image_path == tmp_path / "images" / "a.jpg"
    assert sample.mask_path == mask_path
    assert sample.mask.dtype == np.int64
    assert sample.mask.tolist() == EXPECTED
    assert folder[-1].mask.tolist() == EXPECTED
    with pytest.raises(IndexError):
        folder[1]


def test_16_bit_mask(tmp_path: Path) -> None:
    mask = make_folder(tmp_path)
    write_classes(tmp_path, id_to_name={"40": "sky", "3": "road", "4000": "sea"}, ignore_id=65535)
    ids = np.where(IDS == 0, 65535, IDS)
    ids[0, 0] = 4000
    Image.fromarray(ids.astype(np.uint16)).save(mask)
    assert SegmentationFolder(tmp_path)[0].mask.tolist() == [[2, 1], [0, 1], [-1, 0]]


def test_palette_mask(tmp_path: Path) -> None:
    mask = make_folder(tmp_path)
    image = Image.fromarray(IDS.astype(np.uint8))
    image.putpalette(list(range(255, -1, -1)) * 3)
    assert image.mode == "P"
    image.save(mask)
    assert SegmentationFolder(tmp_path)[0].mask.tolist() == EXPECTED


def test_two_level_mask(tmp_path: Path) -> None:
    mask = make_folder(tmp_path)
    write_classes(tmp_path, id_to_name={"0": "back", "1": "front"}, ignore_id=None)
    image = Image.fromarray(IDS == 3)
    assert image.mode == "1"
    image.save(mask)
    folder = SegmentationFolder(tmp_path)
    assert folder.ignore_id is None
    assert folder[0].mask.tolist() == [[0, 1], [0, 1], [0, 0]]


def test_splits(tmp_path: Path) -> None:
    make_folder(tmp_path, "val")
    assert SegmentationFolder(tmp_path).split == "val"
    make_folder(tmp_path, "train")
    assert len(SegmentationFolder(tmp_path, "train")) == 1
    with pytest.raises(ValueError, match=r"no split 'test'.*\['train', 'val'\]"):
        SegmentationFolder(tmp_path, "test")
    with pytest.raises(ValueError, match=r"`split` is None.*\['train', 'val'\]"):
        SegmentationFolder(tmp_path)


def test_split_of_a_folder_without_splits(tmp_path: Path) -> None:
    make_folder(tmp_path)
    with pytest.raises(ValueError, match=r"no split 'val'.*no splits.*Leave `split` out"):
        SegmentationFolder(tmp_path, "val")


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "images" / "._a.jpg").write_bytes(b"litter")
    (tmp_path / "images" / "notes.txt").write_text("litter")
    assert len(SegmentationFolder(tmp_path)) == 1


def test_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        SegmentationFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no file .*classes\.json"):
        SegmentationFolder(tmp_path)
    write_classes(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*images"):
        SegmentationFolder(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in .*images"):
        SegmentationFolder(tmp_path)
    Image.new("RGB", (2, 3)).save(tmp_path / "images" / "a.jpg")
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images have no mask.*Add .*a\.png"):
        SegmentationFolder(tmp_path)
    make_folder(tmp_path)
    Image.new("RGB", (2, 3)).save(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match="several images named 'a'"):
        SegmentationFolder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"id_to_name": {"0": "a", "0": "b"}}', "key '0' occurs twice"),
        ("[]", "no list of classes"),
        ('{"id_to_name": {}}', "no list of classes"),
        ('{"id_to_name": {"x": "a"}}', "holds the id 'x' in `id_to_name`"),
        ('{"id_to_name": {"-1": "a"}}', "holds the id '-1'"),
        ('{"id_to_name": {"65536": "a"}}', "holds the id '65536'"),
        ('{"id_to_name": {"0": ""}}', "names the class 0 ''"),
        ('{"id_to_name": {"0": 7}}', "names the class 0 7"),
        ('{"id_to_name": {"0": "a", "1": "a"}}', r"lists class 'a' \(id 1\) twice"),
        ('{"id_to_name": {"1": "a", "01": "b"}}', r"lists class 'b' \(id 01\) twice"),
        ('{"id_to_name": {"0": "a"}, "ignore_id": true}', "holds the id True in `ignore_id`"),
        ('{"id_to_name": {"0": "a"}, "ignore_id": 0}', "`ignore_id` 0, which is also"),
    ],
)
def test_bad_classes(tmp_path: Path, content: str, message: str) -> None:
    make_folder(tmp_path)
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=rf"classes\.json.*{message}"):
        SegmentationFolder(tmp_path)


def test_classes_in_another_encoding(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "classes.json").write_bytes('{"id_to_name": {"0": "Käse"}}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes\.json is not UTF-8"):
        SegmentationFolder(tmp_path)


def test_mask_with_an_unlisted_id(tmp_path: Path) -> None:
    make_folder(tmp_path, ids=np.where(IDS == 40, 41, IDS))
    with pytest.raises(ValueError, match=r"a\.png holds the pixel values \[41\].*`ignore_id` \(0\)"):
        SegmentationFolder(tmp_path)[0]


def test_colour_mask(tmp_path: Path) -> None:
    mask = make_folder(tmp_path)
    Image.new("RGB", (2, 3)).save(mask)
    with pytest.raises(ValueError, match=r"a\.png has the mode RGB"):
        SegmentationFolder(tmp_path)[0]


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_mask(tmp_path: Path, content: bytes) -> None:
    make_folder(tmp_path).write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        SegmentationFolder(tmp_path)[0]


def test_cut_off_mask(tmp_path: Path) -> None:
    mask = make_folder(tmp_path)
    mask.write_bytes(mask.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        SegmentationFolder(tmp_path)[0]


def test_unreadable_image(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read"):
        SegmentationFolder(tmp_path)[0]


def test_mask_of_another_size(tmp_path: Path) -> None:
    make_folder(tmp_path, ids=IDS.T)
    with pytest.raises(ValueError, match=r"a\.png has 3 x 2 pixels but .*a\.jpg has 2 x 3"):
        SegmentationFolder(tmp_path)[0]
