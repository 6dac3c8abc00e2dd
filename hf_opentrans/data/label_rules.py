"""What the pixel values of a mask stand for: raw ids to contiguous class positions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from hf_opentrans.data.folder import IGNORE_INDEX

_UNKNOWN = -2


@dataclass(frozen=True, eq=False)
class LabelRule:
    """A table from raw ids to class positions; what is not in the table is an error.

    Make one with `from_classes`, `contiguous` or `reduce_zero`.

    Attributes:
        description: The rule in words, for messages.
        num_classes: Number of classes.
        lookup: (ids,) int64, read only: the class position of every raw id, `IGNORE_INDEX` for
            ids that do not count and -2 for ids that no mask may hold.
    """

    description: str
    num_classes: int
    lookup: np.ndarray

    @classmethod
    def from_classes(
        cls, description: str, id_to_position: Mapping[int, int], ignored: Iterable[int] = ()
    ) -> "LabelRule":
        """Make a rule of an explicit table.

        Args:
            description: The rule in words, for messages.
            id_to_position: Class position of each raw id.
            ignored: Raw ids of pixels that do not count.

        Raises:
            ValueError: If an id is negative or both a class and ignored, or if the positions
                are not exactly 0 to their highest.
        """
        ignored = set(ignored)
        ids = {*id_to_position, *ignored}
        positions = set(id_to_position.values())
        if ignored & id_to_position.keys() or not ids or min(ids) < 0 or positions != set(range(len(positions))):
            raise ValueError(
                f"The label rule {description!r} is contradictory. Its ids must be at least 0, each a class or "
                "ignored but not both, and its positions 0, 1, 2, ... without a gap. Correct the table."
            )
        lookup = np.full(max(ids) + 1, _UNKNOWN, np.int64)
        lookup[list(id_to_position)] = list(id_to_position.values())
        lookup[list(ignored)] = IGNORE_INDEX
        lookup.flags.writeable = False
        return cls(description, len(positions), lookup)

    def apply(self, ids: np.ndarray, source: object = "The mask") -> np.ndarray:
        """Map raw ids to class positions. The argument is not changed.

        Args:
            ids: Raw ids of any integer type and any shape.
            source: The file, for messages.

        Returns:
            int64 of the same shape: 0 to `num_classes - 1`, `IGNORE_INDEX` where nothing counts.

        Raises:
            TypeError: If `ids` does not hold integers.
            ValueError: If an id is not in the table; names `source` and the id.

        Example:
            >>> reduce_zero(2).apply(np.array([0, 1, 2], np.uint8)).tolist()
            [-1, 0, 1]
        """
        if ids.dtype.kind not in "iu":
            raise TypeError(f"{source} holds {ids.dtype} values. Ids are integers. Read the mask without scaling it.")
        wide = ids.astype(np.int64)  # in 8 bits, 0 minus 1 would be 255
        is_outside = (wide < 0) | (wide >= len(self.lookup))
        positions = self.lookup[np.where(is_outside, 0, wide)]
        is_unknown = is_outside | (positions == _UNKNOWN)
        if is_unknown.any():
            raise ValueError(
                f"{source} holds the pixel values {np.unique(wide[is_unknown])[:8].tolist()}. Its ids must follow the "
                f"rule: {self.description}. Check that the masks are of this benchmark and of this layout."
            )
        return positions


def contiguous(num_classes: int, ignored: int = 255) -> LabelRule:
    """Make the rule of converted masks: the id is the position, one more id does not count."""
    return LabelRule.from_classes(
        f"0 to {num_classes - 1} are classes, {ignored} is ignored", {i: i for i in range(num_classes)}, [ignored]
    )


def reduce_zero(num_classes: int) -> LabelRule:
    """Make the rule of masks with 0 = other, which does not count: position = id minus 1."""
    return LabelRule.from_classes(
        f"1 to {num_classes} are classes, 0 is ignored", {i + 1: i for i in range(num_classes)}, [0]
    )


def _in_order(description: str, ids: Iterable[int], ignored: Iterable[int]) -> LabelRule:
    return LabelRule.from_classes(description, {class_id: i for i, class_id in enumerate(ids)}, ignored)


# VOC: 255 is the border between objects ("void"), 0 is background.
VOC_21 = contiguous(21)
VOC_20 = _in_order("1 to 20 are classes, 0 (background) and 255 (border) are ignored", range(1, 21), [0, 255])

# Cityscapes: labels.py of cityscapesScripts defines the ids 0 to 33; 19 of them are evaluated. The 35th label, licence
# plate, has the id -1 and is never drawn. Its order is also that of the trainIds, which `contiguous(19)` reads.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_LABEL_IDS = _in_order(
    "labelIds 0 to 33, of which 19 are classes and the others are ignored",
    _CITYSCAPES_IDS,
    set(range(34)) - set(_CITYSCAPES_IDS),
)

# PASCAL-Context 459 by CAT-Seg: raw id minus 1 in 16 bits, where 0 wraps to 65535; the id that it ignores is 459.
CONTEXT_459_CONVERTED = _in_order("0 to 458 are classes, 459 and 65535 are ignored", range(459), [459, 65535])

# COCO-Stuff: the PNG files hold the category id minus 1, and 11 of the 182 categories were never annotated.
_STUFF_UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
COCO_STUFF_RAW = _in_order(
    "0 to 181 without the 11 unused ids are classes, 255 is ignored",
    [i for i in range(182) if i not in _STUFF_UNUSED],
    [255],
)

# COCO panoptic: 80 things (the ids of COCO detection, 1 to 90 with gaps), then 53 merged stuff categories.
_THING_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_STUFF = (92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151)
_STUFF += (154, 155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, *range(184, 201))
COCO_CATEGORIES = _in_order(
    "the 133 category ids from 1 to 200 are classes, 0 is ignored",
    [*(i for i in range(1, 91) if i not in _THING_UNUSED), *_STUFF],
    [0],
)
