"""Benchmarks by name: class lists, how they are found, and the conversion to our own folder layout."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hf_opentrans
from hf_opentrans.data import BENCHMARKS, SegmentationData, SegmentationFolder, class_names, open_benchmark
from hf_opentrans.data.benchmarks import Benchmark, find_benchmark, read_class_names
from hf_opentrans.data.convert import convert_benchmark
from hf_opentrans.data.label_rules import contiguous
from hf_opentrans.models.vocabulary import BACKGROUND_WORDS, Vocabulary

LISTS = {
    "ade20k-150": (150, "wall", "flag"),
    "ade20k-847": (847, "wall", "adding machine"),
    "pascal-context-59": (59, "aeroplane", "wood"),
    "pascal-context-459": (459, "accordion", "wool"),
    "pascal-voc-20": (20, "aeroplane", "tv monitor"),
    "pascal-voc-21": (21, "background", "tv monitor"),
    "cityscapes": (19, "road", "bicycle"),
    "coco-panoptic": (133, "person", "rug"),
    "coco-stuff-171": (171, "person", "wood"),
}


@pytest.fixture(autouse=True)
def _no_root(monkeypatch):
    monkeypatch.delenv("OVS_DATA", raising=False)


def labels(name: str) -> list[str]:
    return [entry.split(";")[0] for entry in class_names(name)]


def write_pair(image: Path, mask: Path, ids: np.ndarray) -> None:
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", ids.shape[::-1]).save(image)
    Image.fromarray(ids).save(mask)


def write_ade(root: Path, ids: np.ndarray, folder: str = "validation", key: str = "ADE_val_00000001") -> Path:
    """Write one image in the official layout; returns the mask."""
    base = root / "ADEChallengeData2016"
    mask = base / "annotations" / folder / f"{key}.png"
    write_pair(base / "images" / folder / f"{key}.jpg", mask, ids)
    return mask


ADE_IDS = np.array([[0, 1, 150]], np.uint8)
ADE_POSITIONS = [[-1, 0, 149]]


@pytest.mark.parametrize("name", LISTS)
def test_class_list(name):
    count, first, last = LISTS[name]
    names = labels(name)
    assert (len(names), names[0], names[-1]) == (count, first, last)
    assert len({label.casefold() for label in names}) == count
    benchmark = BENCHMARKS[name]
    assert benchmark.label_rule is not None
    assert benchmark.label_rule.num_classes == count
    assert {layout.rule.num_classes for layout in benchmark.layouts} == {count}
    assert Vocabulary(class_names(name)).names == tuple(names)
    assert set(benchmark.splits) == {"train", "val"}


def test_registry():
    assert {*LISTS, "scenes"} == set(BENCHMARKS)
    assert all(BENCHMARKS[name].name == name for name in BENCHMARKS)
    assert BENCHMARKS["scenes"].class_names == ()
    hub = {name: (b.hub_id, b.hub_revision) for name, b in BENCHMARKS.items() if b.hub_id}
    assert hub == {
        "ade20k-150": ("zhoubolei/scene_parse_150", "refs/convert/parquet"),
        "ade20k-847": ("1aurent/ADE20K", None),
    }


def test_class_names_hold_aliases():
    assert "sofa; couch" in class_names("ade20k-150")[23]
    assert class_names("cityscapes")[0] == "road; railroad"


def test_background_of_voc():
    background, *others = class_names("pascal-voc-21")
    assert tuple(others) == class_names("pascal-voc-20")
    # The words of our own vocabulary, which models may not import from here.
    assert background.split("; ") == ["background", *BACKGROUND_WORDS]
    spoken = {alias.casefold() for entry in others for alias in entry.split("; ")}
    assert not spoken & set(background.split("; "))


def test_context_classes_are_among_the_459():
    assert set(labels("pascal-context-59")) - set(labels("pascal-context-459")) == {"dining table"}  # there "table"


def test_each_list_names_source_and_licence():
    assets = Path(hf_opentrans.__file__).parent / "assets" / "vocabularies"
    assert {path.stem for path in assets.glob("*.json")} == {b.vocabulary for b in BENCHMARKS.values() if b.vocabulary}
    for path in assets.glob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        assert content["source"]
        assert content["licence"]
    assert len(list(assets.glob("LICENSE-*.txt"))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a list of classes"),
        ('{"count": 1, "classes": [{"name": "a"}]}', "is not a list of classes: KeyError"),
        ('{"count": 2, "classes": [{"name": "a", "aliases": []}]}', "lists 1 classes but its `count` is 2"),
        (
            '{"count": 2, "classes": [{"name": "a", "aliases": []}, {"name": "A", "aliases": []}]}',
            "lists the class 'a' twice",
        ),
    ],
)
def test_bad_class_list(tmp_path, content, message):
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"list\.json {message}"):
        read_class_names(path)


def test_class_list_of_the_wrong_length():
    odd = Benchmark("odd", "Odd", contiguous(7), {}, "nowhere", vocabulary="cityscapes_19")
    with pytest.raises(ValueError, match=r"cityscapes_19\.json lists 19 classes for odd, whose masks have 7"):
        _ = odd.class_names


def test_unknown_name_and_split(tmp_path):
    with pytest.raises(ValueError, match=r"no benchmark 'ade'.*ade20k-150, ade20k-847.*scenes"):
        open_benchmark("ade", tmp_path)
    with pytest.raises(ValueError, match="no benchmark 'ade'"):
        find_benchmark("ade")
    with pytest.raises(ValueError, match=r"cityscapes has no split 'test'.*\['train', 'val'\]"):
        open_benchmark("cityscapes", tmp_path, "test")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_set_says_where_it_looked_and_where_to_get_it(tmp_path, name):
    with pytest.raises(FileNotFoundError) as caught:
        open_benchmark(name, tmp_path)
    message = str(caught.value)
    assert f"was not found in {tmp_path}" in message
    assert BENCHMARKS[name].source in message
    assert "Nothing is downloaded" in message
    for layout in BENCHMARKS[name].layouts:
        assert layout.convention in message
        assert layout.folders[0] in message
    with pytest.raises(FileNotFoundError, match=r"neither `root` nor the environment variable OVS_DATA is set"):
        open_benchmark(name)


def test_empty_folders_are_not_a_set(tmp_path):
    mask = write_ade(tmp_path, ADE_IDS)
    mask.unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations/validation/\*\.png"):
        open_benchmark("ade20k-150", tmp_path)


def test_root_from_the_environment(tmp_path, monkeypatch):
    write_ade(tmp_path, ADE_IDS)
    monkeypatch.setenv("OVS_DATA", str(tmp_path))
    assert open_benchmark("ade20k-150")[0].mask.tolist() == ADE_POSITIONS
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_benchmark("ade20k-150", tmp_path / "nowhere")


def test_plain_folder(write_segmentation_folder, tiny_images, monkeypatch):
    classes = {"id_to_name": {"5": "sky", "3": "road"}}
    folder = write_segmentation_folder(
        {"train": tiny_images[:2], "val": tiny_images[:1]}, lambda image, _: np.full((40, 48), 3, np.uint8), classes
    )
    data = open_benchmark(folder, split="val")
    assert isinstance(data, SegmentationFolder)
    assert isinstance(data, SegmentationData)
    assert (data.class_names, len(data), int(data[0].mask.max())) == (("sky", "road"), 1, 1)
    assert len(open_benchmark(str(folder), split="train")) == 2
    with pytest.raises(ValueError, match="`split` is None"):
        open_benchmark(folder)
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_benchmark(folder / "nowhere")
    monkeypatch.chdir(folder.parent)
    assert len(open_benchmark(folder.name, split="val")) == 1


def test_own_folder_under_the_root(tmp_path):
    own = tmp_path / "cityscapes"
    write_pair(own / "images/val/a.png", own / "masks/val/a.png", np.array([[7, 0]], np.uint8))
    names = {str(7 + i): f"class {i}" for i in range(19)}
    (own / "classes.json").write_text(json.dumps({"id_to_name": names, "ignore_id": 0}))
    for root in (tmp_path, own):
        data = open_benchmark("cityscapes", root)
        assert data[0].mask.tolist() == [[0, -1]]
        assert data.class_names[0] == "class 0"
        assert getattr(data, "benchmark", None) is BENCHMARKS["cityscapes"]
    (own / "classes.json").write_text(json.dumps({"id_to_name": {"0": "a"}}))
    with pytest.raises(ValueError, match=r"classes\.json lists 1 classes but cityscapes has 19"):
        open_benchmark("cityscapes", tmp_path)


def test_scenes(tmp_path):
    own = tmp_path / "scenes"
    for split in ("train", "val"):
        write_pair(own / f"images/{split}/0.png", own / f"masks/{split}/0.png", np.array([[0, 255]], np.uint8))
    (own / "classes.json").write_text(json.dumps({"id_to_name": {"0": "cat"}, "ignore_id": 255}))
    data = open_benchmark("scenes", tmp_path)
    assert (data.split, data.class_names, data[0].mask.tolist()) == ("val", ("cat",), [[0, -1]])
    assert open_benchmark("scenes", own, "train").split == "train"


def test_convert(tmp_path):
    root, output = tmp_path / "data", tmp_path / "out" / "ade20k-150"
    write_ade(root, ADE_IDS)
    write_ade(root, ADE_IDS[:, ::-1].copy(), "training", "ADE_train_00000001")
    assert convert_benchmark("ade20k-150", root, output, ["val", "train"]) == output
    for data in (SegmentationFolder(output, "val"), open_benchmark("ade20k-150", tmp_path / "out")):
        assert data.class_names == class_names("ade20k-150")
        assert [sample.mask.tolist() for sample in data] == [ADE_POSITIONS]
    assert SegmentationFolder(output, "train")[0].mask.tolist() == [[149, 0, -1]]
    with Image.open(output / "masks/val/ADE_val_00000001.png") as mask:
        assert (mask.mode, np.array(mask).tolist()) == ("L", [[255, 0, 149]])
    image = output / "images/val/ADE_val_00000001.jpg"
    assert image.samefile(root / "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg")
    assert [path.name for path in output.parent.iterdir()] == ["ade20k-150"]


def test_convert_copies_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    write_ade(tmp_path, ADE_IDS)
    monkeypatch.setattr(os, "link", refuse)
    output = convert_benchmark("ade20k-150", tmp_path, tmp_path / "out")
    source = tmp_path / "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg"
    image = output / "images/val/ADE_val_00000001.jpg"
    assert image.read_bytes() == source.read_bytes()
    assert not image.samefile(source)


def test_convert_leaves_the_permissions_of_the_images(tmp_path):
    write_ade(tmp_path, ADE_IDS)
    source = tmp_path / "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg"
    source.chmod(0o440)
    output = convert_benchmark("ade20k-150", tmp_path, tmp_path / "out")
    assert source.stat().st_mode & 0o777 == 0o440
    umask = os.umask(0)
    os.umask(umask)
    assert output.stat().st_mode & 0o777 == 0o777 & ~umask


def test_convert_16_bits(tmp_path):
    base = tmp_path / "ADE20K_2021_17_01"
    ids = np.array([[0, 255, 846, 65535]], np.uint16)
    write_pair(base / "images_detectron2/validation/a.jpg", base / "annotations_detectron2/validation/a.tif", ids)
    output = convert_benchmark("ade20k-847", tmp_path, tmp_path / "out")
    assert SegmentationFolder(output)[0].mask.tolist() == [[0, 255, 846, -1]]


def test_convert_again_replaces_but_never_drops(tmp_path):
    root, output = tmp_path / "data", tmp_path / "out"
    write_ade(root, ADE_IDS)
    write_ade(root, ADE_IDS, "training")
    convert_benchmark("ade20k-150", root, output)
    write_ade(root, ADE_IDS * 0)
    convert_benchmark("ade20k-150", root, output)
    assert SegmentationFolder(output)[0].mask.tolist() == [[-1, -1, -1]]
    with pytest.raises(FileExistsError, match=r"holds ade20k-150, splits \['val'\], which writing .*\['train'\]"):
        convert_benchmark("ade20k-150", root, output, "train")
    with pytest.raises(FileExistsError, match=r"holds ade20k-150.*writing cityscapes"):
        convert_benchmark("cityscapes", root, output)
    (output / "benchmark.json").write_text("[]")
    with pytest.raises(FileExistsError, match=r"benchmark\.json was not written by this function"):
        convert_benchmark("ade20k-150", root, output)
    with pytest.raises(ValueError, match="`split` is"):
        convert_benchmark("ade20k-150", root, output, [])


def test_convert_refuses_other_folders(tmp_path):
    write_ade(tmp_path, ADE_IDS)
    own = tmp_path / "mine"
    own.mkdir()
    (own / "classes.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"already holds classes\.json"):
        convert_benchmark("ade20k-150", tmp_path, own)


def test_failed_convert_leaves_nothing(tmp_path):
    root, output = tmp_path / "data", tmp_path / "out" / "set"
    write_ade(root, ADE_IDS)
    convert_benchmark("ade20k-150", root, output)
    write_ade(root, ADE_IDS, key="ADE_val_00000002").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"ADE_val_00000002\.png cannot be read"):
        convert_benchmark("ade20k-150", root, output)
    assert [path.name for path in output.parent.iterdir()] == ["set"]
    assert SegmentationFolder(output)[0].mask.tolist() == ADE_POSITIONS


def test_convert_images_of_one_name(tmp_path):
    base = tmp_path / "cityscapes"
    for city in ("bonn", "ulm"):
        write_pair(
            base / f"leftImg8bit/val/{city}/a_leftImg8bit.png",
            base / f"gtFine/val/{city}/a_gtFine_labelIds.png",
            np.array([[7]], np.uint8),
        )
    with pytest.raises(ValueError, match="Two images are named 'a_leftImg8bit'"):
        convert_benchmark("cityscapes", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
