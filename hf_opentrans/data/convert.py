"""Write a benchmark as a folder of our own layout, which opens without knowing the benchmark."""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_opentrans._files import check_output_folder
from hf_opentrans.data.benchmarks import find_benchmark, open_benchmark
from hf_opentrans.data.folder import IGNORE_INDEX, SegmentationData

_MARKER = "benchmark.json"


def convert_benchmark(
    name: str, root: str | Path | None, output: str | Path, split: str | Sequence[str] = "val"
) -> Path:
    """Write a benchmark as `images/SPLIT`, `masks/SPLIT` and `classes.json`.

    Images are hard links where the file system allows it, else copies; masks are PNG files of class
    positions with 8 bits, or 16 for 255 classes and more. The folder appears as a whole or not at all.

    Args:
        name: A name in `BENCHMARKS`.
        root: See `open_benchmark`.
        output: New or empty, or an earlier conversion of the same splits, which is replaced.
        split: One split, or several.

    Returns:
        The folder; `open_benchmark` and `SegmentationFolder` read it.

    Raises:
        FileExistsError: If `output` holds something else, or splits that are not written anew.
        FileNotFoundError: If the benchmark is not on disk.
        ValueError: If a mask is malformed, or two images have the same name.
    """
    benchmark = find_benchmark(name)
    splits = (split,) if isinstance(split, str) else tuple(split)
    if not splits or len(set(splits)) < len(splits):
        raise ValueError(f"`split` is {split!r}. It must name at least one split, each once. Give for example 'val'.")
    target = check_output_folder(output, marker=_MARKER).resolve()
    _check_same(target, name, splits)
    parts = [open_benchmark(name, root, part) for part in splits]
    names = parts[0].class_names
    if any(part.class_names != names for part in parts):
        raise ValueError(f"The splits {splits} of {name} list different classes. Convert them one by one.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True) as held:
        # A folder inside of the private one gets the usual permissions. The images may be links to files of the user,
        # so no permissions are changed here.
        folder = Path(held) / "new"
        for part, part_name in zip(parts, splits, strict=True):
            _write_split(part, part_name, folder)
        classes = {"id_to_name": {str(i): label for i, label in enumerate(names)}, "ignore_id": _ignore_id(names)}
        _write_json(folder / "classes.json", classes)
        facts = {"name": name, "title": benchmark.title, "source": benchmark.source, "splits": list(splits)}
        _write_json(folder / _MARKER, facts)
        _replace(folder, target, Path(held) / "old")
    return target


def _replace(folder: Path, target: Path, previous: Path) -> None:
    """Move a folder to its place; what was there goes to `previous`, or back if that fails."""
    if target.exists():
        target.rename(previous)
    try:
        folder.rename(target)
    except BaseException:
        if previous.exists():
            previous.rename(target)
        raise


def _check_same(target: Path, name: str, splits: Sequence[str]) -> None:
    """Refuse to replace another benchmark, or to drop a split that was converted earlier."""
    marker = target / _MARKER
    if not marker.is_file():
        return
    try:
        held: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        held_name, held_splits = held["name"], list(held["splits"])
    except (ValueError, TypeError, KeyError) as err:
        raise FileExistsError(f"{marker} was not written by this function: {err!r}. Choose another folder.") from err
    if held_name != name or set(held_splits) - set(splits):
        raise FileExistsError(
            f"{target} holds {held_name}, splits {held_splits}, which writing {name}, splits {list(splits)}, would "
            "delete. The folder is replaced as a whole. Choose another folder, or name all splits at once."
        )


def _write_split(data: SegmentationData, split: str, folder: Path) -> None:
    images, masks = folder / "images" / split, folder / "masks" / split
    for path in (images, masks):
        path.mkdir(parents=True)
    ignore_id = _ignore_id(data.class_names)
    dtype = np.uint8 if ignore_id == 255 else np.uint16
    stems: Counter[str] = Counter()
    for sample in data:
        stem = sample.image_path.stem
        stems[stem] += 1
        if stems[stem] > 1:
            raise ValueError(f"Two images are named {stem!r}, such as {sample.image_path}. Rename one, or its folder.")
        _link(sample.image_path, images / sample.image_path.name)
        ids = np.where(sample.mask == IGNORE_INDEX, ignore_id, sample.mask)
        Image.fromarray(ids.astype(dtype)).save(masks / f"{stem}.png")


def _ignore_id(names: Sequence[str]) -> int:
    return 255 if len(names) <= 255 else 65535


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)  # the file itself, not a link to it that may break
    except OSError:  # another disk, a file system without links, or files of somebody else
        shutil.copyfile(source, target)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
