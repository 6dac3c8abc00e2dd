"""Read a folder of images, PNG label masks and a list of classes."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

IGNORE_INDEX = -1

_IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# Pillow modes with one integer a pixel; older Pillow versions open 16-bit PNG as "I".
_MASK_MODES = {"1", "L", "P", "I", "I;16", "I;16B", "I;16L"}
_MAX_ID = 65535
_UNKNOWN = -2


@dataclass(frozen=True, eq=False)
class SegmentationSample:
    """One image and its label map.

    Attributes:
        image_path: The image; opening it is left to the caller.
        mask_path: The PNG file that `mask` was read from.
        mask: (height, width) int64, position in `SegmentationData.class_names`; -1 = ignore.
    """

    image_path: Path
    mask_path: Path
    mask: np.ndarray


class SegmentationData(ABC):
    """Images on disk with label maps, read one by one; the base of all layouts.

    A subclass sets the attributes and `_paths`, and says how a mask is read.

    Attributes:
        root: The folder.
        split: Name of the part, such as "val"; None where there is only one.
        class_names: Names by class position; ";" separates aliases.
    """

    root: Path
    split: str | None
    class_names: tuple[str, ...]
    _paths: tuple[tuple[Path, Path], ...]

    def __len__(self) -> int:
        """Count the images."""
        return len(self._paths)

    def __getitem__(self, index: int) -> SegmentationSample:
        """Read one mask; negative positions count from the end.

        Args:
            index: Position in alphabetical order of the image files, or in the order of the
                official list of images where the layout has one.

        Returns:
            The path of the image and the mask of contiguous class positions.

        Raises:
            IndexError: If there is no such position.
            ValueError: If the mask is not a valid label map of the image; names the file.
        """
        image_path, mask_path = self._paths[index]
        ids = self._read_ids(mask_path)
        check_size(image_path, mask_path, ids)
        return SegmentationSample(image_path, mask_path, self._to_positions(ids, mask_path))

    def __iter__(self) -> Iterator[SegmentationSample]:
        """Read one mask after the other."""
        return (self[index] for index in range(len(self)))

    def _read_ids(self, mask_path: Path) -> np.ndarray:
        return read_ids(mask_path)

    @abstractmethod
    def _to_positions(self, ids: np.ndarray, mask_path: Path) -> np.ndarray:
        """Map raw ids to class positions, -1 where nothing counts."""


class SegmentationFolder(SegmentationData):
    """Images and label masks in a folder.

    The layout is `images/[SPLIT/]NAME.jpg` (or another image format), `masks/[SPLIT/]NAME.png`
    and `classes.json` with `id_to_name` (pixel value -> class name; the values may have gaps,
    the order in the file is the order of the classes) and, optionally, `ignore_id` (the pixel
    value of unlabelled pixels). Masks are PNG files of 8 or 16 bits, grey or palette.

    Args:
        root: The folder.
        split: Name of a folder in `images`. Leave it out where there is only one, or none.

    Raises:
        FileNotFoundError: If the folder, `classes.json`, the images or a mask are missing.
        ValueError: If `classes.json` is malformed, names a class twice, or there is no such
            split.

    Iterating or indexing reads the masks, and raises ValueError for a mask that cannot be read,
    is not a label map, is of another size than its image or holds a pixel value that
    `classes.json` does not list.
    """

    def __init__(self, root: str | Path, split: str | None = None) -> None:
        """Read the classes and pair images with masks; reads no mask yet."""
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"There is no folder {self.root}. A data set is a folder with `images`, `masks` "
                "and `classes.json`. Check the path."
            )
        id_to_name, self.ignore_id = _read_classes(self.root / "classes.json")
        self.class_names: tuple[str, ...] = tuple(id_to_name.values())
        self.split = self._find_split(split)
        self._lookup = np.full(_MAX_ID + 1, _UNKNOWN, np.int64)
        self._lookup[list(id_to_name)] = np.arange(len(id_to_name))
        if self.ignore_id is not None:
            self._lookup[self.ignore_id] = IGNORE_INDEX
        self._paths = self._pair_paths()

    def _to_positions(self, ids: np.ndarray, mask_path: Path) -> np.ndarray:
        mask = self._lookup[ids]
        unknown = np.unique(ids[mask == _UNKNOWN])
        if len(unknown):
            raise ValueError(
                f"{mask_path} holds the pixel values {unknown[:8].tolist()}. A pixel value must "
                f"be an id of `id_to_name` in {self.root / 'classes.json'} or its `ignore_id` "
                f"({self.ignore_id}). Add the class or correct the mask."
            )
        return mask

    def _find_split(self, split: str | None) -> str | None:
        folder = self.root / "images"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"There is no folder {folder}. A data set is a folder with `images`, `masks` "
                "and `classes.json`. Add the images."
            )
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if split is None:
            if _list_images(folder) or not splits:
                return None
            if len(splits) == 1:
                return splits[0]
            raise ValueError(
                f"`split` is None but {folder} has the splits {splits}. One data set is one split. "
                "Choose one of them as `split` (`--split`)."
            )
        if split not in splits:
            there_are = f"the splits {splits}" if splits else "no splits"
            advice = "Choose one of them." if splits else "Leave `split` out."
            raise ValueError(
                f"There is no split {split!r}: {folder} has {there_are}. A split is a folder in `images`. {advice}"
            )
        return split

    def _pair_paths(self) -> tuple[tuple[Path, Path], ...]:
        """(image, mask) in alphabetical order."""
        images = _list_images(self.root / "images" / (self.split or ""))
        masks = self.root / "masks" / (self.split or "")
        if not images:
            raise FileNotFoundError(
                f"There are no images in {self.root / 'images' / (self.split or '')}. A data "
                f"set holds at least one file of the kinds {sorted(_IMAGE_SUFFIXES)}. Add images."
            )
        stems = Counter(path.stem for path in images)
        twice = [stem for stem, count in stems.items() if count > 1]
        if twice:
            raise ValueError(
                f"{images[0].parent} holds several images named {twice[0]!r}. Each mask belongs "
                "to one image. Remove or rename all but one."
            )
        pairs = tuple((path, masks / f"{path.stem}.png") for path in images)
        check_pairs(pairs)
        return pairs


def check_pairs(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Refuse images without a mask.

    Raises:
        FileNotFoundError: If a mask is missing; names the image and the mask.
    """
    missing = [pair for pair in pairs if not pair[1].is_file()]
    if missing:
        image_path, mask_path = missing[0]
        raise FileNotFoundError(
            f"{len(missing)} of {len(pairs)} images have no mask; the first is {image_path}. "
            f"Every image needs a mask of the same name. Add {mask_path}."
        )


def _list_images(folder: Path) -> list[Path]:
    # Names that start with a dot are litter of file managers, such as ._photo.jpg.
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def _read_classes(path: Path) -> tuple[dict[int, str], int | None]:
    """Pixel value -> class name in the order of the file, and the pixel value to ignore."""
    content = _read_json(path)
    content = content if isinstance(content, dict) else {}
    entries = content.get("id_to_name")
    if not isinstance(entries, dict) or not entries:
        raise ValueError(
            f"{path} has no list of classes. It must hold an object `id_to_name` that maps pixel "
            'values to class names. Write for example {"id_to_name": {"0": "sky"}}.'
        )
    id_to_name: dict[int, str] = {}
    for key, name in entries.items():
        class_id = _parse_id(key, path, "`id_to_name`")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"{path} names the class {key} {name!r}. A class name is a text that is not empty. Correct the name."
            )
        if class_id in id_to_name or name in id_to_name.values():
            raise ValueError(
                f"{path} lists class {name!r} (id {key}) twice. Ids and names must be unique, "
                "or scores of the classes are mixed. Remove or rename one."
            )
        id_to_name[class_id] = name
    ignore_id = content.get("ignore_id")
    if ignore_id is None:
        return id_to_name, None
    ignore_id = _parse_id(ignore_id, path, "`ignore_id`")
    if ignore_id in id_to_name:
        raise ValueError(
            f"{path} has the `ignore_id` {ignore_id}, which is also the class "
            f"{id_to_name[ignore_id]!r}. A pixel is either ignored or of a class. Remove one."
        )
    return id_to_name, ignore_id


def _read_json(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as err:
        raise FileNotFoundError(
            f"There is no file {path}. It lists the classes of the masks (`id_to_name`, `ignore_id`). Add it."
        ) from err
    except UnicodeDecodeError as err:
        raise ValueError(f"{path} is not UTF-8 text: {err}. Save it as UTF-8.") from err
    try:
        return json.loads(text, object_pairs_hook=_object_without_repeats)
    except ValueError as err:
        raise ValueError(f"{path} is not valid JSON: {err}. Correct the file.") from err


def _object_without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a repeated key, which the json module would drop silently."""
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"the key {repeated[0]!r} occurs twice in one object")
    return dict(pairs)


def _parse_id(value: object, path: Path, where: str) -> int:
    # str.isdecimal also accepts other scripts' digits, and bool is an int to Python.
    text = str(value)
    is_number = isinstance(value, int | str) and text.isascii() and text.isdecimal()
    if not is_number or int(text) > _MAX_ID:
        raise ValueError(
            f"{path} holds the id {value!r} in {where}. Ids are the pixel values of the masks, "
            f"whole numbers from 0 to {_MAX_ID}. Correct the id."
        )
    return int(text)


def read_ids(path: Path) -> np.ndarray:
    """Read the raw pixel values of a mask: (height, width) integers from 0 to 65535.

    Raises:
        ValueError: If the file cannot be read or is a picture of colours; names it.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            ids = np.array(image)
    except (OSError, SyntaxError, ValueError) as err:
        raise ValueError(
            f"{path} cannot be read as an image: {err}. A mask is a PNG file (or TIFF, 16 bits). Replace the file."
        ) from err
    if mode not in _MASK_MODES:
        raise ValueError(
            f"{path} has the mode {mode}. A mask holds one class id a pixel: an 8-bit, 16-bit or "
            "palette PNG, not a picture of colours. Convert the colours to ids."
        )
    if ids.dtype.kind == "i" and ids.size and not 0 <= ids.min() <= ids.max() <= _MAX_ID:
        raise ValueError(
            f"{path} holds pixel values from {ids.min()} to {ids.max()}. Ids are from 0 to "
            f"{_MAX_ID}. Save the mask as an 8-bit or 16-bit PNG."
        )
    # A boolean array would select rows of the lookup instead of indexing it.
    return ids.astype(np.uint8) if mode == "1" else ids


def check_size(image_path: Path, mask_path: Path, ids: np.ndarray) -> None:
    """Refuse a mask that is not of the size of its image.

    Raises:
        ValueError: If the sizes differ or the image cannot be read; names the files.
    """
    try:
        with Image.open(image_path) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError) as err:
        raise ValueError(f"{image_path} cannot be read as an image: {err}. Replace or remove the file.") from err
    if ids.shape != (height, width):
        raise ValueError(
            f"{mask_path} has {ids.shape[1]} x {ids.shape[0]} pixels but {image_path} has "
            f"{width} x {height}. A mask labels the pixels of its image one by one. Make the "
            "mask anew, or scale it without interpolation."
        )
