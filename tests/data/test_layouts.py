"""Every benchmark in every layout, as a miniature on disk: exact positions, and what goes wrong."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from hf_opentrans.data.benchmarks import BENCHMARKS, BenchmarkData, find_benchmark, open_benchmark
from hf_opentrans.data.label_rules import contiguous
from hf_opentrans.data.layouts import LAYOUTS, Layout


@dataclass
class Case:
    """A layout written out by hand: `#` is the key of the image, ids are (raw, position)."""

    name: str
    image: str
    mask: str
    ids: list[tuple[int, int]]
    listing: str = ""
    stray: bool = False  # images of another split lie in the same folder
    bits: int = 8
    keys: tuple[str, str] = ("2007_000033", "2007_000042")


ADE = [(0, -1), (1, 0), (2, 1), (150, 149)]
ADE_D2 = [(255, -1), (0, 0), (1, 1), (149, 149)]
FULL = [(65535, -1), (0, 0), (255, 255), (846, 846)]
PC59, PC59_D2 = [(0, -1), (1, 0), (59, 58)], [(255, -1), (0, 0), (58, 58)]
PC459, PC459_D2 = [(0, -1), (1, 0), (256, 255), (459, 458)], [(65535, -1), (0, 0), (255, 255), (458, 458)]
STUFF, STUFF_D2 = [(255, -1), (0, 0), (12, 11), (91, 80), (181, 170)], [(255, -1), (0, 0), (170, 170)]
LABEL_IDS = [(0, -1), (7, 0), (6, -1), (11, 2), (29, -1), (33, 18)]
CITY = ("frankfurt/frankfurt_000000_000294", "munster/munster_000000_000019")
DEVKIT, CTX = "VOCdevkit/VOC2012/", "VOCdevkit/VOC2010/"
VOC_LIST, CTX_LIST = DEVKIT + "ImageSets/Segmentation/val.txt", CTX + "ImageSets/SegmentationContext/val.txt"
FULL_D2, CTX_D2, VOC_D2 = "ADE20K_2021_17_01/", "pascal_ctx_d2/", "pascal_voc_d2/"
CAT = "coco-stuff/"
CITY_IMAGE = "cityscapes/leftImg8bit/val/#_leftImg8bit.png"
CASES = [
    Case(
        "ade20k-150", "ADEChallengeData2016/images/validation/#.jpg",
        "ADEChallengeData2016/annotations/validation/#.png", ADE,
    ),
    Case(
        "ade20k-150", "ade/ADEChallengeData2016/images/validation/#.jpg",
        "ade/ADEChallengeData2016/annotations_detectron2/validation/#.png", ADE_D2,
    ),
    *(
        Case(
            "ade20k-847", FULL_D2 + "images_detectron2/validation/#.jpg",
            f"{FULL_D2}annotations_detectron2/validation/#.{suffix}", FULL, bits=16,
        )
        for suffix in ("tif", "png")
    ),
    Case(
        "pascal-context-59", CTX + "JPEGImages/#.jpg", CTX + "SegmentationClassContext/#.png", PC59,
        listing=CTX_LIST, stray=True,
    ),
    Case(
        "pascal-context-59", CTX_D2 + "images/validation/#.jpg", CTX_D2 + "annotations_ctx59/validation/#.png", PC59_D2
    ),
    Case(
        "pascal-context-59", CTX + "JPEGImages/#.jpg", CTX + "annotations_detectron2/pc59_val/#.png", PC59_D2,
        stray=True,
    ),
    Case(
        "pascal-context-459", CTX + "JPEGImages/#.jpg", CTX + "trainval/#.mat", PC459,
        listing=CTX + "pascalcontext_val.txt", stray=True, bits=16,
    ),
    *(
        Case(
            "pascal-context-459", CTX_D2 + "images/validation/#.jpg",
            f"{CTX_D2}annotations_ctx459/validation/#.{suffix}", PC459_D2, bits=16,
        )
        for suffix in ("tif", "png")
    ),
    *(
        Case(
            "pascal-context-459", CTX + "JPEGImages/#.jpg", f"{CTX}annotations_detectron2/pc459_val/#.{suffix}",
            [*PC459_D2, (459, -1)], bits=16, stray=True,
        )
        for suffix in ("tif", "png")
    ),
    Case(
        "pascal-voc-20", DEVKIT + "JPEGImages/#.jpg", DEVKIT + "SegmentationClass/#.png",
        [(0, -1), (255, -1), (1, 0), (20, 19)], listing=VOC_LIST, stray=True,
    ),
    Case(
        "pascal-voc-20", VOC_D2 + "images/validation/#.jpg", VOC_D2 + "annotations_pascal20/validation/#.png",
        [(255, -1), (0, 0), (19, 19)],
    ),
    Case(
        "pascal-voc-20", "VOC2012/images_detectron2/val/#.jpg", "VOC2012/annotations_detectron2/val/#.png",
        [(255, -1), (0, 0), (19, 19)], stray=True,
    ),
    Case(
        "pascal-voc-21", DEVKIT + "JPEGImages/#.jpg", DEVKIT + "SegmentationClass/#.png",
        [(255, -1), (0, 0), (1, 1), (20, 20)], listing=VOC_LIST, stray=True,
    ),
    Case(
        "pascal-voc-21", VOC_D2 + "images/validation/#.jpg", VOC_D2 + "annotations_pascal21/validation/#.png",
        [(255, -1), (0, 0), (1, 1), (20, 20)],
    ),
    Case("cityscapes", CITY_IMAGE, "cityscapes/gtFine/val/#_gtFine_labelIds.png", LABEL_IDS, keys=CITY),
    Case(
        "cityscapes", CITY_IMAGE, "cityscapes/gtFine/val/#_gtFine_labelTrainIds.png",
        [(255, -1), (0, 0), (18, 18)], keys=CITY,
    ),
    Case(
        "coco-panoptic", "coco/val2017/#.jpg", "coco/panoptic_semseg_val2017/#.png",
        [(255, -1), (0, 0), (80, 80), (132, 132)],
    ),
    Case(
        "coco-stuff-171", "coco_stuff164k/images/val2017/#.jpg",
        "coco_stuff164k/annotations/val2017/#_labelTrainIds.png", STUFF_D2,
    ),
    Case(
        "coco-stuff-171", CAT + "images/val2017/#.jpg", CAT + "annotations_detectron2/val2017/#.png", STUFF_D2
    ),
    Case("coco-stuff-171", "coco_stuff164k/images/val2017/#.jpg", "coco_stuff164k/annotations/val2017/#.png", STUFF),
    Case("coco-stuff-171", "coco/val2017/#.jpg", "coco/stuffthingmaps/val2017/#.png", STUFF),
    Case("coco-stuff-171", "coco/val2017/#.jpg", "coco/stuffthingmaps_detectron2/val2017/#.png", STUFF_D2),
]  # fmt: skip
VOC = next(case for case in CASES if case.name == "pascal-voc-21")
PANOPTIC_MASKS = ["coco/annotations/panoptic_val2017/#.png", "coco/panoptic_val2017/#.png"]


def write_image(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)


def write_mask(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mat":
        savemat(path, {"LabelMap": ids})
    else:
        Image.fromarray(ids).save(path)


def build(root: Path, case: Case) -> list[list[list[int]]]:
    """Write two images of different sizes; returns the expected positions."""
    dtype = np.uint16 if case.bits == 16 else np.uint8
    expected = []
    for index, key in enumerate(case.keys):
        pairs = np.array(case.ids if index == 0 else case.ids[::-1])
        rows = np.stack([pairs] * (index + 2))
        write_image(root / case.image.replace("#", key), len(case.ids), index + 2)
        write_mask(root / case.mask.replace("#", key), rows[..., 0].astype(dtype))
        expected.append(rows[..., 1].tolist())
    if case.stray:
        write_image(root / case.image.replace("#", "2007_000001"), 3, 3)
    if case.listing:
        (root / case.listing).parent.mkdir(parents=True, exist_ok=True)
        (root / case.listing).write_text("\n".join(case.keys) + "\n")
    return expected


def build_panoptic(root: Path, mask: str) -> None:
    """Write one image of three segments and one unlabelled pixel, another of one segment."""
    annotations = []
    big = 7 + 256 * 8 + 65536 * 9
    for key, colours, categories in (
        ("000000000139", [(0, 0, 0), (5, 0, 0), (0, 1, 0), (7, 8, 9)], {5: 1, 256: 92, big: 200}),
        ("000000000285", [(5, 0, 0), (5, 0, 0), (5, 0, 0), (5, 0, 0)], {5: 90}),
    ):
        write_image(root / f"coco/val2017/{key}.jpg", 2, 2)
        write_mask(root / mask.replace("#", key), np.array(colours, np.uint8).reshape(2, 2, 3))
        segments = [{"id": i, "category_id": c, "iscrowd": 0} for i, c in categories.items()]
        annotations.append({"file_name": f"{key}.png", "image_id": int(key), "segments_info": segments})
    path = root / "coco/annotations/panoptic_val2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"annotations": annotations}))


def test_every_layout_has_a_case():
    counts = Counter(case.name for case in CASES) + Counter({"coco-panoptic": len(PANOPTIC_MASKS)})
    assert counts == Counter({name: len(layouts) for name, layouts in LAYOUTS.items() if layouts})
    assert LAYOUTS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}:{case.mask}")
def test_layout(tmp_path, case):
    expected = build(tmp_path, case)
    data = open_benchmark(case.name, tmp_path)
    assert isinstance(data, BenchmarkData)
    assert data.benchmark is find_benchmark(case.name)
    assert data.class_names == data.benchmark.class_names
    assert data.split == "val"
    assert len(data) == 2
    samples = list(data)
    assert [sample.mask.tolist() for sample in samples] == expected
    assert [sample.image_path for sample in samples] == [tmp_path / case.image.replace("#", key) for key in case.keys]
    assert [sample.mask_path for sample in samples] == [tmp_path / case.mask.replace("#", key) for key in case.keys]
    assert all(sample.mask.dtype == np.int64 for sample in samples)
    assert data[-1].mask.tolist() == expected[1]
    with pytest.raises(IndexError):
        data[2]


@pytest.mark.parametrize("mask", PANOPTIC_MASKS)
def test_panoptic(tmp_path, mask):
    build_panoptic(tmp_path, mask)
    data = open_benchmark("coco-panoptic", tmp_path)
    # Categories 1, 90, 92 and 200 are the first and last thing, the first and last stuff.
    assert [sample.mask.tolist() for sample in data] == [[[-1, 0], [80, 132]], [[79, 79], [79, 79]]]
    assert data[0].image_path == tmp_path / "coco/val2017/000000000139.jpg"


def test_the_folder_of_the_data_set_as_root(tmp_path):
    expected = build(tmp_path, VOC)
    for root in (tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2012"):
        assert open_benchmark("pascal-voc-21", root)[0].mask.tolist() == expected[0]


def test_train_split(tmp_path):
    build(tmp_path, VOC)
    (tmp_path / VOC.listing).with_name("train.txt").write_text(VOC.keys[1])
    train = open_benchmark("pascal-voc-21", tmp_path, "train")
    assert [sample.image_path.stem for sample in train] == [VOC.keys[1]]
    case = CASES[0]
    swapped = Case(case.name, case.image, case.mask, case.ids)
    swapped.image, swapped.mask = (p.replace("validation", "training") for p in (case.image, case.mask))
    expected = build(tmp_path, swapped)
    assert open_benchmark("ade20k-150", tmp_path, "train")[0].mask.tolist() == expected[0]


def test_palette_mask(tmp_path):
    expected = build(tmp_path, VOC)
    path = tmp_path / VOC.mask.replace("#", VOC.keys[0])
    with Image.open(path) as image:
        palette = Image.fromarray(np.array(image))
    palette.putpalette(list(range(255, -1, -1)) * 3)
    assert palette.mode == "P"
    palette.save(path)
    assert open_benchmark("pascal-voc-21", tmp_path)[0].mask.tolist() == expected[0]


def test_list_gives_the_order(tmp_path):
    expected = build(tmp_path, VOC)
    (tmp_path / VOC.listing).write_text("\n".join(VOC.keys[::-1]) + "\n\n")
    assert [sample.mask.tolist() for sample in open_benchmark("pascal-voc-21", tmp_path)] == expected[::-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [("", r"val\.txt names no image"), ("2007_000033\n2007_000033\n", r"val\.txt names '2007_000033' twice")],
)
def test_bad_list(tmp_path, content, message):
    build(tmp_path, VOC)
    (tmp_path / VOC.listing).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_benchmark("pascal-voc-21", tmp_path)


def test_listed_image_is_missing(tmp_path):
    build(tmp_path, VOC)
    (tmp_path / VOC.image.replace("#", VOC.keys[1])).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images that .*val\.txt names are missing.*2007_000042\.jpg"):
        open_benchmark("pascal-voc-21", tmp_path)


def test_mask_is_missing(tmp_path):
    build(tmp_path, CASES[0])
    (tmp_path / CASES[0].mask.replace("#", CASES[0].keys[1])).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images have no mask.*Add .*2007_000042\.png"):
        open_benchmark("ade20k-150", tmp_path)


def replace_mask(root: Path, case: Case, pixels: np.ndarray) -> None:
    write_mask(root / case.mask.replace("#", case.keys[0]), pixels)


def test_mask_of_another_size(tmp_path):
    build(tmp_path, VOC)
    replace_mask(tmp_path, VOC, np.zeros((5, 4), np.uint8))
    with pytest.raises(ValueError, match=r"2007_000033\.png has 4 x 5 pixels but .*2007_000033\.jpg has 4 x 2"):
        open_benchmark("pascal-voc-21", tmp_path)[0]


def test_colour_mask(tmp_path):
    build(tmp_path, VOC)
    replace_mask(tmp_path, VOC, np.zeros((2, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"2007_000033\.png has the mode RGB"):
        open_benchmark("pascal-voc-21", tmp_path)[0]


def test_id_outside_of_the_rule(tmp_path):
    build(tmp_path, VOC)
    replace_mask(tmp_path, VOC, np.full((2, 4), 21, np.uint8))
    with pytest.raises(ValueError, match=r"2007_000033\.png holds the pixel values \[21\].*0 to 20 are classes"):
        open_benchmark("pascal-voc-21", tmp_path)[0]


def test_hidden_files_are_no_images(tmp_path):
    build(tmp_path, CASES[0])
    (tmp_path / CASES[0].image.replace("#", "._2007_000033")).write_bytes(b"litter")
    assert len(open_benchmark("ade20k-150", tmp_path)) == 2


def test_panoptic_defects(tmp_path):
    build_panoptic(tmp_path, PANOPTIC_MASKS[1])
    mask = tmp_path / "coco/panoptic_val2017/000000000139.png"
    write_mask(mask, np.full((2, 2, 3), 3, np.uint8))
    with pytest.raises(ValueError, match=r"139\.png holds the segments \[197379\], which its JSON file does not list"):
        open_benchmark("coco-panoptic", tmp_path)[0]
    write_mask(mask, np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"139\.png has the mode L.*panoptic mask is an RGB image"):
        open_benchmark("coco-panoptic", tmp_path)[0]
    mask.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"139\.png cannot be read"):
        open_benchmark("coco-panoptic", tmp_path)[0]
    segments = tmp_path / "coco/annotations/panoptic_val2017.json"
    for content in ("{", "[]", '{"annotations": [{}]}'):
        segments.write_text(content)
        with pytest.raises(ValueError, match=r"panoptic_val2017\.json is not a list of COCO panoptic segments"):
            open_benchmark("coco-panoptic", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as a label map"),
        ({"Other": np.zeros((2, 4))}, "cannot be read as a label map: KeyError"),
        ({"LabelMap": np.full((2, 4), 0.5)}, "holds fractions in `LabelMap`"),
    ],
)
def test_bad_label_map(tmp_path, content, message):
    case = next(case for case in CASES if case.mask.endswith(".mat"))
    build(tmp_path, case)
    path = tmp_path / case.mask.replace("#", case.keys[0])
    if content is None:
        path.write_bytes(b"no matrix")
    else:
        savemat(path, content)
    with pytest.raises(ValueError, match=rf"2007_000033\.mat {message}"):
        open_benchmark("pascal-context-459", tmp_path)[0]


def test_layout_with_other_classes(tmp_path):
    build(tmp_path, CASES[0])
    layout = Layout("odd", (".",), "images/{split}/{key}.jpg", "annotations/{split}/{key}.png", contiguous(7))
    with pytest.raises(ValueError, match=r"layout 'odd' has 7 classes but ade20k-150 has 150"):
        BenchmarkData(find_benchmark("ade20k-150"), layout, tmp_path, "val")
