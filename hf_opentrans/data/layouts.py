"""Where the benchmarks lie on people's disks, and what the masks hold there.

A pattern such as `gtFine/{split}/{key}_gtFine_labelIds.png` holds the name of the split and the
key of the image. None of the folders is ours: each layout names the project whose convention it
is. Nothing is downloaded or written here.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from hf_opentrans.data.folder import check_pairs
from hf_opentrans.data.label_rules import (
    CITYSCAPES_LABEL_IDS,
    COCO_CATEGORIES,
    COCO_STUFF_RAW,
    CONTEXT_459_CONVERTED,
    VOC_20,
    VOC_21,
    LabelRule,
    contiguous,
    reduce_zero,
)

_ADE_SPLITS = {"train": "training", "val": "validation"}
_SPLITS = {"train": "train", "val": "val"}


@dataclass(frozen=True, eq=False)
class Layout:
    """One way to lay out one benchmark.

    Attributes:
        convention: The project or projects that use it.
        folders: Where the folder of the data set may lie, relative to the root.
        images: Pattern of the images, relative to that folder.
        masks: Pattern of the masks; `.mat` files hold the ids as `LabelMap`.
        rule: What the ids in the masks stand for.
        listing: Text files with one key per line, of which the first that exists counts. Without
            them the keys are those of the images, or of the masks (`listed_by_masks`).
        segments: JSON file that gives every segment of a panoptic mask its category; it also
            lists the keys.
        splits: Name of each split in this layout.
        listed_by_masks: Whether the images of other splits lie in the same folder.
        is_nested: Whether a key is `folder/name`.
    """

    convention: str
    folders: tuple[str, ...]
    images: str
    masks: str
    rule: LabelRule
    listing: tuple[str, ...] = ()
    segments: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: dict(_SPLITS))
    listed_by_masks: bool = False
    is_nested: bool = False

    def find(self, root: Path, split: str) -> Path | None:
        """Return the folder of the data set if everything that the layout needs is there.

        Args:
            root: Holds one of `folders`, or is itself the folder of the data set.
            split: Such as "val".
        """
        if split not in self.splits:
            return None
        bases = (root / folder for folder in (*self.folders, "."))
        return next((base for base in bases if base.is_dir() and self._is_complete(base, split)), None)

    def describe(self, split: str) -> str:
        """Say in one line which files the layout needs for a split, relative to the root."""
        name = self.splits.get(split, split)
        needs = [self.images, self.masks, *([" or ".join(self.listing)] if self.listing else [])]
        needs += [self.segments] if self.segments else []
        files = ", ".join(part.format(split=name, key="*/*" if self.is_nested else "*") for part in needs)
        return f"{' or '.join(self.folders)}: {files} ({self.convention})"

    def pairs(self, base: Path, split: str) -> tuple[tuple[Path, Path], ...]:
        """Return (image, mask) of every image, in the order of the list or of the names.

        Raises:
            FileNotFoundError: If an image or a mask is missing; names the file.
            ValueError: If a list is empty or names an image twice.
        """
        keys, source = self._keys(base, split)
        pairs = tuple((self._path(base, self.images, split, k), self._path(base, self.masks, split, k)) for k in keys)
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice or not keys:
            wrong = f"names {twice[0]!r} twice" if twice else "names no image"
            raise ValueError(f"{source} {wrong}. It must name every image once. Restore the official file.")
        missing = [image for image, _ in pairs if not image.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(pairs)} images that {source} names are missing; the first is {missing[0]}. "
                "A benchmark is scored on all of its images. Add the file."
            )
        check_pairs(pairs)
        return pairs

    def read_segments(self, base: Path, split: str) -> dict[str, dict[int, int]]:
        """Read the category of every segment of every panoptic mask: file name -> id -> category.

        Raises:
            ValueError: If the file is not such a list; names it.
        """
        path = self._path(base, self.segments or "", split)
        try:
            annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
            return {
                entry["file_name"]: {int(part["id"]): int(part["category_id"]) for part in entry["segments_info"]}
                for entry in annotations
            }
        except (ValueError, TypeError, KeyError) as err:
            raise ValueError(
                f"{path} is not a list of COCO panoptic segments: {err!r}. It must be JSON with `annotations`, each "
                "with `file_name` and `segments_info`. Restore the official file."
            ) from err

    def _is_complete(self, base: Path, split: str) -> bool:
        has_list = not self.listing or self._find_listing(base, split) is not None
        has_segments = self.segments is None or self._path(base, self.segments, split).is_file()
        has_files = all(any(self._glob(base, pattern, split)) for pattern in (self.images, self.masks))
        return has_list and has_segments and has_files

    def _keys(self, base: Path, split: str) -> tuple[list[str], Path]:
        """Return the keys, and the file or folder that lists them."""
        listing = self._find_listing(base, split)
        if listing is not None:
            lines = listing.read_text(encoding="utf-8-sig").splitlines()
            return [line.strip() for line in lines if line.strip()], listing
        if self.segments is not None:
            names = self.read_segments(base, split)
            return sorted(Path(name).stem for name in names), self._path(base, self.segments, split)
        pattern = self.masks if self.listed_by_masks else self.images
        folder, suffix = self._cut(base, pattern, split)
        found = self._glob(base, pattern, split)
        return sorted(path.relative_to(folder).as_posix().removesuffix(suffix) for path in found), folder

    def _find_listing(self, base: Path, split: str) -> Path | None:
        paths = (self._path(base, pattern, split) for pattern in self.listing)
        return next((path for path in paths if path.is_file()), None)

    def _glob(self, base: Path, pattern: str, split: str) -> Iterator[Path]:
        folder, suffix = self._cut(base, pattern, split)
        found = folder.glob(f"*/*{suffix}" if self.is_nested else f"*{suffix}")
        # Names that start with a dot are litter of file managers, such as ._photo.jpg.
        return (path for path in found if not path.name.startswith("."))

    def _cut(self, base: Path, pattern: str, split: str) -> tuple[Path, str]:
        """Return the folder in front of the key and what follows the key."""
        before, _, suffix = pattern.partition("{key}")
        return self._path(base, before, split), suffix

    def _path(self, base: Path, pattern: str, split: str, key: str = "") -> Path:
        return base / pattern.format(split=self.splits[split], key=key)


def read_label_map(path: Path) -> np.ndarray:
    """Read the ids of a MATLAB file of PASCAL-Context: (height, width) integers.

    Raises:
        ValueError: If the file cannot be read or holds no `LabelMap`; names it.
    """
    from scipy.io.matlab import MatReadError, loadmat  # slow to import, and only one archive holds such files

    try:
        label_map = np.asarray(loadmat(path)["LabelMap"])
    except (MatReadError, OSError, ValueError, TypeError, KeyError, NotImplementedError, zlib.error) as err:
        raise ValueError(
            f"{path} cannot be read as a label map: {err!r}. It must be a MATLAB file with a matrix `LabelMap`. "
            "Replace the file."
        ) from err
    # loadmat returns what MATLAB stored, which may be whole numbers in a float type.
    whole = label_map.astype(np.int64)
    if not np.array_equal(whole, label_map):
        raise ValueError(f"{path} holds fractions in `LabelMap`. Ids are whole numbers. Replace the file.")
    return whole


def read_panoptic(path: Path, segments: Mapping[int, int]) -> np.ndarray:
    """Read a COCO panoptic PNG as category ids: (height, width) int64, 0 where nothing is labelled.

    Args:
        path: Colours hold the segment id: red + 256 green + 65536 blue.
        segments: Category of every segment id of this file.

    Raises:
        ValueError: If the file is no picture of colours or holds a segment that `segments` lacks.
    """
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError) as err:
        raise ValueError(f"{path} cannot be read as an image: {err}. Replace the file.") from err
    if mode != "RGB":
        raise ValueError(
            f"{path} has the mode {mode}. A COCO panoptic mask is an RGB image whose colours are segment ids. Restore "
            "the official file, or rename the folder if these are semantic masks."
        )
    colours = pixels.astype(np.int64) @ np.array([1, 256, 65536])
    ids, inverse = np.unique(colours, return_inverse=True)
    unknown = [i for i in ids.tolist() if i and i not in segments]
    if unknown:
        raise ValueError(
            f"{path} holds the segments {unknown[:8]}, which its JSON file does not list. Every segment needs a "
            "category. Restore the official files."
        )
    return np.array([segments.get(i, 0) for i in ids.tolist()], np.int64)[inverse.reshape(colours.shape)]


def _ade20k_150() -> Iterator[Layout]:
    # The official archive, ADEChallengeData2016.zip; mmsegmentation puts it in a folder `ade`.
    folders = ("ADEChallengeData2016", "ade/ADEChallengeData2016")
    images = "images/{split}/{key}.jpg"
    yield Layout(
        "official archive, mmsegmentation",
        folders,
        images,
        "annotations/{split}/{key}.png",
        reduce_zero(150),
        splits=_ADE_SPLITS,
    )
    yield Layout(
        "detectron2, FC-CLIP, CAT-Seg",
        folders,
        images,
        "annotations_detectron2/{split}/{key}.png",
        contiguous(150),
        splits=_ADE_SPLITS,
    )


def _ade20k_847() -> Iterator[Layout]:
    # MaskFormer's converter, which FC-CLIP ships too, scales images and masks alike to a short side of at most 512.
    for suffix in ("tif", "png"):
        yield Layout(
            "detectron2, FC-CLIP",
            ("ADE20K_2021_17_01", "ade/ADE20K_2021_17_01"),
            "images_detectron2/{split}/{key}.jpg",
            f"annotations_detectron2/{{split}}/{{key}}.{suffix}",
            contiguous(847, 65535),
            splits=_ADE_SPLITS,
        )


_VOC_2010 = ("VOCdevkit/VOC2010", "VOC2010")


def _pascal_context_59() -> Iterator[Layout]:
    # The official annotations are JSON; all three projects convert them, with 0 = background or shifted by one.
    yield Layout(
        "mmsegmentation",
        _VOC_2010,
        "JPEGImages/{key}.jpg",
        "SegmentationClassContext/{key}.png",
        reduce_zero(59),
        listing=("ImageSets/SegmentationContext/{split}.txt",),
    )
    yield Layout(
        "FC-CLIP, ODISE",
        ("pascal_ctx_d2",),
        "images/{split}/{key}.jpg",
        "annotations_ctx59/{split}/{key}.png",
        contiguous(59),
        splits=_ADE_SPLITS,
    )
    yield Layout(
        "CAT-Seg",
        _VOC_2010,
        "JPEGImages/{key}.jpg",
        "annotations_detectron2/pc59_{split}/{key}.png",
        contiguous(59),
        listed_by_masks=True,
    )


def _pascal_context_459() -> Iterator[Layout]:
    # The official archive is trainval.tar.gz in VOC2010. CAT-Seg ships the first list, mmsegmentation makes the other.
    yield Layout(
        "official archive",
        _VOC_2010,
        "JPEGImages/{key}.jpg",
        "trainval/{key}.mat",
        reduce_zero(459),
        listing=("pascalcontext_{split}.txt", "ImageSets/SegmentationContext/{split}.txt"),
    )
    for suffix in ("tif", "png"):
        yield Layout(
            "FC-CLIP, ODISE",
            ("pascal_ctx_d2",),
            "images/{split}/{key}.jpg",
            f"annotations_ctx459/{{split}}/{{key}}.{suffix}",
            contiguous(459, 65535),
            splits=_ADE_SPLITS,
        )
        yield Layout(
            "CAT-Seg",
            _VOC_2010,
            "JPEGImages/{key}.jpg",
            f"annotations_detectron2/pc459_{{split}}/{{key}}.{suffix}",
            CONTEXT_459_CONVERTED,
            listed_by_masks=True,
        )


def _pascal_voc(classes: int) -> Iterator[Layout]:
    # The official archive is what mmsegmentation reads. CAT-Seg's converted masks always lie beside it.
    folders = ("VOCdevkit/VOC2012", "VOC2012")
    yield Layout(
        "official archive, mmsegmentation",
        folders,
        "JPEGImages/{key}.jpg",
        "SegmentationClass/{key}.png",
        VOC_20 if classes == 20 else VOC_21,
        listing=("ImageSets/Segmentation/{split}.txt",),
    )
    yield Layout(
        "FC-CLIP, ODISE",
        ("pascal_voc_d2",),
        "images/{split}/{key}.jpg",
        f"annotations_pascal{classes}/{{split}}/{{key}}.png",
        contiguous(classes),
        splits=_ADE_SPLITS,
    )
    if classes == 20:
        # SimSeg (zsseg), and SAN and OVSeg after it. Images without a labelled pixel have no mask there.
        yield Layout(
            "SimSeg, SAN, OVSeg",
            folders,
            "images_detectron2/{split}/{key}.jpg",
            "annotations_detectron2/{split}/{key}.png",
            contiguous(20),
            listed_by_masks=True,
        )


def _cityscapes() -> Iterator[Layout]:
    # labelTrainIds are made by cityscapesScripts, as mmsegmentation and detectron2 ask; labelIds are in the archive.
    for convention, kind, rule in (
        ("official archive", "labelIds", CITYSCAPES_LABEL_IDS),
        ("mmsegmentation, detectron2", "labelTrainIds", contiguous(19)),
    ):
        yield Layout(
            convention,
            ("cityscapes",),
            "leftImg8bit/{split}/{key}_leftImg8bit.png",
            f"gtFine/{{split}}/{{key}}_gtFine_{kind}.png",
            rule,
            is_nested=True,
        )


def _coco_panoptic() -> Iterator[Layout]:
    # The official panoptic archive unpacks beside its JSON files (mmdetection); detectron2 moves it one folder up.
    for convention, folder in (("official archive, mmdetection", "annotations/"), ("detectron2, FC-CLIP", "")):
        yield Layout(
            convention,
            ("coco",),
            "{split}2017/{key}.jpg",
            folder + "panoptic_{split}2017/{key}.png",
            COCO_CATEGORIES,
            segments="annotations/panoptic_{split}2017.json",
        )
    yield Layout(
        "Mask2Former, FC-CLIP",
        ("coco",),
        "{split}2017/{key}.jpg",
        "panoptic_semseg_{split}2017/{key}.png",
        contiguous(133),
    )


def _coco_stuff_171() -> Iterator[Layout]:
    # mmsegmentation writes its masks beside the official ones, which are in stuffthingmaps_trainval2017.zip.
    beside = "annotations/{split}2017/{key}"
    for convention, folders, images, masks, rule in (
        ("mmsegmentation", ("coco_stuff164k",), "images/", f"{beside}_labelTrainIds.png", contiguous(171)),
        ("CAT-Seg", ("coco-stuff",), "images/", "annotations_detectron2/{split}2017/{key}.png", contiguous(171)),
        ("official masks", ("coco_stuff164k", "coco-stuff"), "images/", f"{beside}.png", COCO_STUFF_RAW),
        ("official masks", ("coco",), "", "stuffthingmaps/{split}2017/{key}.png", COCO_STUFF_RAW),
        ("SAN, OVSeg, FC-CLIP", ("coco",), "", "stuffthingmaps_detectron2/{split}2017/{key}.png", contiguous(171)),
    ):
        yield Layout(convention, folders, f"{images}{{split}}2017/{{key}}.jpg", masks, rule)


def _tuples(layouts: Mapping[str, Iterable[Layout]]) -> dict[str, tuple[Layout, ...]]:
    return {name: tuple(items) for name, items in layouts.items()}


# The first layout of a benchmark that is complete is read.
LAYOUTS: Mapping[str, tuple[Layout, ...]] = _tuples(
    {
        "ade20k-150": _ade20k_150(),
        "ade20k-847": _ade20k_847(),
        "pascal-context-59": _pascal_context_59(),
        "pascal-context-459": _pascal_context_459(),
        "pascal-voc-20": _pascal_voc(20),
        "pascal-voc-21": _pascal_voc(21),
        "cityscapes": _cityscapes(),
        "coco-panoptic": _coco_panoptic(),
        "coco-stuff-171": _coco_stuff_171(),
        "scenes": (),
    }
)
