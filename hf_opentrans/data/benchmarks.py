"""Segmentation benchmarks by name: class lists, where to get the data, and how to open it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from hf_opentrans.data.folder import SegmentationData, SegmentationFolder
from hf_opentrans.data.label_rules import (
    CITYSCAPES_LABEL_IDS,
    COCO_CATEGORIES,
    COCO_STUFF_RAW,
    VOC_20,
    VOC_21,
    LabelRule,
    contiguous,
    reduce_zero,
)
from hf_opentrans.data.layouts import LAYOUTS, Layout, read_label_map, read_panoptic

ROOT_VARIABLE = "OVS_DATA"
_VOCABULARIES = Path(__file__).resolve().parents[1] / "assets" / "vocabularies"
# The 26 words for "everything else" of SCLIP and NACLIP, which ProxyCLIP and Trident took over. FC-CLIP has 72 of its
# own: `background_prompts` in assets/vocabularies/pascal_voc_20.json.
_BACKGROUND = """background; sky; wall; tree; wood; grass; road; sea; river; mountain; sands; desk; bed; building;
cloud; lamp; door; window; wardrobe; ceiling; shelf; curtain; stair; floor; hill; rail; fence"""


@dataclass(frozen=True, eq=False)
class Benchmark:
    """One benchmark. The class names are read when they are first asked for.

    Attributes:
        name: As `open_benchmark` takes it.
        title: For people.
        label_rule: The ids in the official masks; None where the folder itself lists its classes.
        splits: Number of images of each split by common knowledge (not counted by us; on disk
            there may be fewer). Empty where any split goes.
        source: Official page, where the data can be had.
        vocabulary: File in `assets/vocabularies` with the class list, without ".json".
        background: Names of a class 0 in front of the vocabulary, joined by "; ".
        ignore: Raw ids in the official masks that do not count, in words.
        hub_id: Data set on the Hugging Face Hub; None where we know of none that can be trusted.
        hub_revision: Revision to load.
        notes: What to know before comparing scores.
    """

    name: str
    title: str
    label_rule: LabelRule | None
    splits: Mapping[str, int]
    source: str
    vocabulary: str | None = None
    background: str | None = None
    ignore: str = "none"
    hub_id: str | None = None
    hub_revision: str | None = None
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names in the official order, the label first and then "; "-separated aliases; () for scenes."""
        if self.vocabulary is None or self.label_rule is None:
            return ()
        names = read_class_names(_VOCABULARIES / f"{self.vocabulary}.json")
        names = names if self.background is None else (" ".join(self.background.split()), *names)
        if len(names) != self.label_rule.num_classes:
            raise ValueError(
                f"{self.vocabulary}.json lists {len(names)} classes for {self.name}, whose masks have "
                f"{self.label_rule.num_classes}. Both must agree. Reinstall the package."
            )
        return names

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts that are looked for, in this order, besides our own folder layout."""
        return LAYOUTS[self.name]


class BenchmarkData(SegmentationData):
    """A benchmark in one of the layouts that other projects use.

    Args:
        benchmark: Which one.
        layout: One of its layouts.
        root: The folder that `layout.find` returned.
        split: Such as "val".

    Raises:
        FileNotFoundError: If an image or a mask is missing.
        ValueError: If a list is malformed or the layout has other classes than the benchmark.
    """

    def __init__(self, benchmark: Benchmark, layout: Layout, root: Path, split: str) -> None:
        """Pair images with masks; reads no mask yet."""
        self.benchmark, self.layout, self.root, self.split = benchmark, layout, root, split
        self.class_names = benchmark.class_names
        if layout.rule.num_classes != len(self.class_names):
            raise ValueError(
                f"The layout {layout.convention!r} has {layout.rule.num_classes} classes but {benchmark.name} has "
                f"{len(self.class_names)}. Both must agree. Use a layout of this benchmark."
            )
        self._paths = layout.pairs(root, split)

    def _read_ids(self, mask_path: Path) -> np.ndarray:
        if mask_path.suffix == ".mat":
            return read_label_map(mask_path)
        if self.layout.segments is not None:
            return read_panoptic(mask_path, self._segments[mask_path.name])
        return super()._read_ids(mask_path)

    def _to_positions(self, ids: np.ndarray, mask_path: Path) -> np.ndarray:
        return self.layout.rule.apply(ids, mask_path)

    @cached_property
    def _segments(self) -> dict[str, dict[int, int]]:
        return self.layout.read_segments(self.root, self.split or "val")


class BenchmarkFolder(SegmentationFolder):
    """A benchmark in our own folder layout, such as `convert_benchmark` writes.

    Args:
        benchmark: Which one.
        root: The folder.
        split: Name of a folder in `images`.

    Raises:
        FileNotFoundError: See `SegmentationFolder`.
        ValueError: See there, or if the folder has another number of classes than the benchmark.
    """

    def __init__(self, benchmark: Benchmark, root: Path, split: str) -> None:
        """Read the classes and pair images with masks; reads no mask yet."""
        super().__init__(root, split)
        self.benchmark = benchmark
        if benchmark.class_names and len(self.class_names) != len(benchmark.class_names):
            raise ValueError(
                f"{self.root / 'classes.json'} lists {len(self.class_names)} classes but {benchmark.name} has "
                f"{len(benchmark.class_names)}. A part of a benchmark is not that benchmark. Open the folder by its "
                "path, or convert the benchmark anew."
            )


def open_benchmark(name: str | Path, root: str | Path | None = None, split: str | None = None) -> SegmentationData:
    """Open a benchmark that lies on disk, or a plain folder. Nothing is downloaded.

    Args:
        name: A name in `BENCHMARKS`, or the path of a folder of our own layout.
        root: The folder that holds the data sets, or the folder of this data set. Defaults to the environment
            variable `OVS_DATA`. Not used for a plain folder.
        split: Defaults to "val"; for a plain folder to the only one.

    Returns:
        The images and masks, with `class_names`. For a benchmark it also has `.benchmark`.

    Raises:
        FileNotFoundError: If the data are not there; says what was looked for and where to get them.
        ValueError: If there is no such benchmark or split, or a list or `classes.json` is malformed.
    """
    if str(name) not in BENCHMARKS and (Path(name).exists() or len(Path(name).parts) > 1):
        return SegmentationFolder(name, split)
    benchmark = find_benchmark(str(name))
    split = "val" if split is None else split
    if benchmark.splits and split not in benchmark.splits:
        raise ValueError(
            f"{benchmark.name} has no split {split!r} with public labels. It has {sorted(benchmark.splits)}. Choose "
            "one of them."
        )
    root = os.environ.get(ROOT_VARIABLE) if root is None else root
    if not root or not Path(root).is_dir():
        raise FileNotFoundError(_not_found(benchmark, split, Path(root) if root else None))
    # The folder of that name first: somebody has converted the benchmark on purpose.
    for folder in (Path(root) / benchmark.name, Path(root)):
        if (folder / "classes.json").is_file() and (folder / "images").is_dir():
            return BenchmarkFolder(benchmark, folder, split)
    for layout in benchmark.layouts:
        base = layout.find(Path(root), split)
        if base is not None:
            return BenchmarkData(benchmark, layout, base, split)
    raise FileNotFoundError(_not_found(benchmark, split, Path(root)))


def find_benchmark(name: str) -> Benchmark:
    """Look up a benchmark.

    Raises:
        ValueError: If there is none of that name; lists the names.
    """
    if name not in BENCHMARKS:
        raise ValueError(
            f"There is no benchmark {name!r} and no folder of that name. The benchmarks are {', '.join(BENCHMARKS)}. "
            "Choose one, or give the path of a folder with `images`, `masks` and `classes.json`."
        )
    return BENCHMARKS[name]


def class_names(name: str) -> tuple[str, ...]:
    """Return the classes of a benchmark in the official order, aliases joined by "; ".

    Raises:
        ValueError: If there is no such benchmark.

    Example:
        >>> class_names("cityscapes")[-1]
        'bicycle; bicycles; bike; bikes'
    """
    return find_benchmark(name).class_names


@lru_cache(maxsize=16)
def read_class_names(path: Path) -> tuple[str, ...]:
    """Read a class list with aliases.

    Raises:
        ValueError: If it is malformed, its `count` is wrong or a name occurs twice; names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = [(entry["name"], *entry["aliases"]) for entry in content["classes"]]
        count = content["count"]
    except (ValueError, TypeError, KeyError) as err:
        raise ValueError(f"{path} is not a list of classes: {err!r}. Reinstall the package.") from err
    if len(names) != count:
        raise ValueError(f"{path} lists {len(names)} classes but its `count` is {count}. Reinstall the package.")
    labels = [group[0].casefold() for group in names]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ValueError(f"{path} lists the class {twice[0]!r} twice. Names must be unique. Rename one.")
    return tuple("; ".join(dict.fromkeys(group)) for group in names)


def _not_found(benchmark: Benchmark, split: str, root: Path | None) -> str:
    where = f"in {root}" if root else f"because neither `root` nor the environment variable {ROOT_VARIABLE} is set"
    layouts = [f"{benchmark.name}: images/{split}/*, masks/{split}/*.png, classes.json (hf-opentrans)"]
    layouts += [layout.describe(split) for layout in benchmark.layouts if split in layout.splits]
    lines = "".join(f"\n  - {line}" for line in layouts)
    notes = "".join(f"\n{note}" for note in benchmark.notes)
    return (
        f"{benchmark.title} (split {split}) was not found {where}. One of these layouts must be complete:{lines}\n"
        f"Nothing is downloaded. Get the data from {benchmark.source} and give the folder above as `root` or in "
        f"{ROOT_VARIABLE}.{notes}"
    )


_CONTEXT_PAGE = "https://www.cs.stanford.edu/~roozbeh/pascal-context/"
_VOC_PAGE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
_COCO_SPLITS = {"train": 118287, "val": 5000}
_ALL = (
    Benchmark(
        name="ade20k-150",
        title="ADE20K, 150 classes (SceneParse150)",
        label_rule=reduce_zero(150),
        splits={"train": 20210, "val": 2000},
        source="http://sceneparsing.csail.mit.edu/",
        vocabulary="ade20k_150",
        ignore="0 (other)",
        hub_id="zhoubolei/scene_parse_150",
        hub_revision="refs/convert/parquet",  # the main revision is a script, which datasets >= 4 refuses
    ),
    Benchmark(
        name="ade20k-847",
        title="ADE20K, 847 classes (full)",
        label_rule=contiguous(847, 65535),
        splits={"train": 25574, "val": 2000},
        source="https://groups.csail.mit.edu/vision/datasets/ADE20K/",
        vocabulary="ade20k_847",
        ignore="65535",
        hub_id="1aurent/ADE20K",
        notes=(
            "The release 2021_17_01 needs the 16-bit conversion of MaskFormer or FC-CLIP "
            "(prepare_ade20k_full_sem_seg.py); its raw files, also those on the Hub, are not read.",
            "Several classes do not occur in val: say how absent classes count.",
        ),
    ),
    Benchmark(
        name="pascal-context-59",
        title="PASCAL-Context, 59 classes",
        label_rule=reduce_zero(59),
        splits={"train": 4998, "val": 5104},
        source=_CONTEXT_PAGE,
        vocabulary="pascal_context_59",
        ignore="0 (background)",
        notes=("The official annotations are JSON: convert them with the tool of one of these projects.",),
    ),
    Benchmark(
        name="pascal-context-459",
        title="PASCAL-Context, 459 classes",
        label_rule=reduce_zero(459),
        splits={"train": 4998, "val": 5104},
        source=_CONTEXT_PAGE,
        vocabulary="pascal_context_459",
        ignore="0",
        notes=("Several classes do not occur in val: say how absent classes count.",),
    ),
    Benchmark(
        name="pascal-voc-20",
        title="PASCAL VOC 2012, 20 classes without background",
        label_rule=VOC_20,
        splits={"train": 1464, "val": 1449},
        source=_VOC_PAGE,
        vocabulary="pascal_voc_20",
        ignore="0 (background), 255 (border)",
    ),
    Benchmark(
        name="pascal-voc-21",
        title="PASCAL VOC 2012, 20 classes and background",
        label_rule=VOC_21,
        splits={"train": 1464, "val": 1449},
        source=_VOC_PAGE,
        vocabulary="pascal_voc_20",
        background=_BACKGROUND,
        ignore="255 (border)",
        notes=("The names of the background differ between papers: here the 26 words of SCLIP and NACLIP.",),
    ),
    Benchmark(
        name="cityscapes",
        title="Cityscapes, 19 classes",
        label_rule=CITYSCAPES_LABEL_IDS,
        splits={"train": 2975, "val": 500},
        source="https://www.cityscapes-dataset.com/downloads/",
        vocabulary="cityscapes_19",
        ignore="the 15 labelIds without a trainId",
    ),
    Benchmark(
        name="coco-panoptic",
        title="COCO panoptic as semantic segmentation, 133 classes",
        label_rule=COCO_CATEGORIES,
        splits=_COCO_SPLITS,
        source="https://cocodataset.org/#download",
        vocabulary="coco_panoptic_133",
        ignore="0 (unlabelled)",
    ),
    Benchmark(
        name="coco-stuff-171",
        title="COCO-Stuff 164k, 171 classes",
        label_rule=COCO_STUFF_RAW,
        splits=_COCO_SPLITS,
        source="https://github.com/nightrome/cocostuff",
        vocabulary="coco_stuff_171",
        ignore="255 (unlabelled)",
    ),
    Benchmark(
        name="scenes",
        title="Scenes of emoji",
        label_rule=None,
        splits={},
        source="the command `hf-opentrans scenes`, which draws them",
    ),
)
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
