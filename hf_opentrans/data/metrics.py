"""Mean intersection over union, accumulated image by image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist

from hf_opentrans._distributed import add_up, is_distributed

Absent = Literal["ignore", "zero"]
# Types for a pair of ids, the fastest first.
_PAIRS = (torch.int16, torch.int32, torch.int64)
_TAKEN = ("uint8", "int8", "int16", "int32", "int64")


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a segmentation, all from 0 to 1, over all pixels seen so far.

    Attributes:
        mean_iou: Mean of `per_class_iou` without its nan entries.
        pixel_accuracy: Share of labelled pixels with the right class.
        mean_accuracy: Mean over the classes in the target of the share of their pixels found.
        frequency_weighted_iou: IoU weighted by the share of the class in the target.
        per_class_iou: Intersection over union of each class; nan for a class that is neither in
            the target nor predicted on a labelled pixel, with `absent="ignore"` for every class that is not in the
            target.
        per_class_accuracy: Share of the pixels of each class that were found; nan for a class that is not in the
            target.
        target_pixels: How many labelled pixels are of each class.
        predicted_pixels: How many labelled pixels were predicted as each class.
        absent: The rule for classes that are predicted but not in the target. Two `mean_iou` of different rules
            must not be compared.
    """

    mean_iou: float
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted_iou: float
    per_class_iou: tuple[float, ...]
    per_class_accuracy: tuple[float, ...] = ()
    target_pixels: tuple[int, ...] = ()
    predicted_pixels: tuple[int, ...] = ()
    absent: Absent = "zero"

    def per_class_table(self, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
        """Return header and cells of a table with a line per class; "-" stands for nan.

        Args:
            names: Names by class id.

        Raises:
            ValueError: If there are more or fewer names than classes.
        """
        if len(names) != len(self.per_class_iou):
            raise ValueError(
                f"There are {len(names)} `names` for {len(self.per_class_iou)} classes. Every class needs one. "
                "Pass the names in the order of the class ids."
            )
        header = ["class", "IoU", "accuracy", "target pixels", "predicted pixels"]
        columns = zip(
            names,
            self.per_class_iou,
            self.per_class_accuracy,
            self.target_pixels,
            self.predicted_pixels,
            strict=True,
        )
        cells = [
            [name, _percent(iou), _percent(accuracy), f"{wanted:,}", f"{found:,}"]
            for name, iou, accuracy, wanted, found in columns
        ]
        return header, cells


class MeanIoU:
    """Counts classes pixel by pixel; batching and order do not change the scores.

    The counts stay on the device of the first prediction; their memory does not depend on the number of images.

    Args:
        num_classes: Number of classes, at least 1. Class ids are 0 to `num_classes - 1`.
        ignore_index: Target value of unlabelled pixels, which do not count. A prediction may
            hold it too: there it means "no answer" and is wrong on a labelled pixel.
        absent: What a class counts in `mean_iou` that is predicted on labelled pixels but is nowhere in the target.
            "zero": 0, as in mmsegmentation and `evaluate`. "ignore": it is left out, as in detectron2.

    Raises:
        ValueError: If `num_classes` is below 1, `ignore_index` is a class id, or `absent` is unknown.

    Example:
        >>> metric = MeanIoU(num_classes=2)
        >>> metric.update(np.array([0, 1, 1]), np.array([0, 0, 1]))
        >>> metric.compute().per_class_iou
        (0.5, 0.5)
    """

    def __init__(self, num_classes: int, ignore_index: int = -1, *, absent: Absent = "zero") -> None:
        """Start with no pixels."""
        check_classes(num_classes, ignore_index, absent)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.absent: Absent = absent
        # Rows are the target, columns the prediction; the first of each is the ignore index.
        self._counts = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
        self._is_empty = True

    @property
    def state(self) -> torch.Tensor:
        """All that was counted, as a copy: int64 of shape `(classes + 1, classes + 1)`.

        Rows are the target, columns the prediction, the last of each the ignore index. States add up: see `add_state`.
        """
        return self._counts.roll((-1, -1), (0, 1))

    def update(self, prediction: torch.Tensor | np.ndarray, target: torch.Tensor | np.ndarray) -> None:
        """Add the pixels of one or more images. The arguments are not changed.

        Args:
            prediction: Class ids of any integer type and any shape.
            target: Class ids or `ignore_index`, of the same shape; moved to the device of
                `prediction`.

        Raises:
            TypeError: If one of them does not hold integers.
            ValueError: If the shapes differ, or a value is neither a class id nor
                `ignore_index`.
        """
        prediction, target = id_maps(prediction, target)
        if prediction.numel() == 0:
            return
        counts = self._count(prediction, target)
        if self._is_empty:
            self._counts = self._counts.to(counts.device)
            self._is_empty = False
        self._counts += counts.to(self._counts.device)

    def compute(self) -> SegmentationScores:
        """Compute the scores of all pixels so far; the counts stay.

        Returns:
            The scores. Classes absent from both prediction and target are left out of means.

        Raises:
            RuntimeError: If no labelled pixel was seen, so that there is nothing to score.
        """
        exact = self._counts.cpu()[1:]
        wanted, found = exact.sum(1), exact[:, 1:].sum(0)
        hits, in_target, in_prediction = (part.double() for part in (exact[:, 1:].diagonal(), wanted, found))
        if in_target.sum() == 0:
            raise RuntimeError(
                "There are 0 labelled pixels. A score needs at least one pixel whose target is a "
                "class id. Call `update` first, or check `ignore_index`."
            )
        iou = hits / (in_target + in_prediction - hits)
        is_present = in_target > 0
        if self.absent == "ignore":
            iou[~is_present] = torch.nan
        weights = in_target[is_present] / in_target.sum()
        return SegmentationScores(
            mean_iou=iou.nanmean().item(),
            pixel_accuracy=(hits.sum() / in_target.sum()).item(),
            mean_accuracy=(hits[is_present] / in_target[is_present]).mean().item(),
            frequency_weighted_iou=(weights * iou[is_present]).sum().item(),
            per_class_iou=tuple(iou.tolist()),
            per_class_accuracy=tuple((hits / in_target).tolist()),
            target_pixels=tuple(wanted.tolist()),
            predicted_pixels=tuple(found.tolist()),
            absent=self.absent,
        )

    def merge(self, other: "MeanIoU") -> None:
        """Add the counts of another metric, for example of another process.

        Args:
            other: Not changed.

        Raises:
            ValueError: If it counts other classes or another ignore index.
        """
        ours = (self.num_classes, self.ignore_index)
        theirs = (other.num_classes, other.ignore_index)
        if ours != theirs:
            raise ValueError(
                f"`other` has (num_classes, ignore_index) = {theirs}, this metric {ours}. "
                "Merged metrics must agree. Make both with the same arguments."
            )
        self.add_state(other.state)

    def add_state(self, state: torch.Tensor) -> None:
        """Add the `state` of another metric with the same arguments, or the sum of several.

        Args:
            state: Of shape `(classes + 1, classes + 1)`, on any device. Not changed.

        Raises:
            ValueError: If it has another shape or type, or holds a negative count.
        """
        self._counts += checked_state(state, self._counts).roll((1, 1), (0, 1))

    def sum_over_processes(self) -> None:
        """Add up the counts of all processes of `torch.distributed`: afterwards every process holds the total.

        Without a process group nothing happens. Call it once, after the last `update`: a second call would count
        everything again.
        """
        self._counts = summed_over_processes(self._counts)

    def reset(self) -> None:
        """Forget all pixels."""
        self._counts.zero_()

    def _count(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Count the pairs of ids, in the layout of `_counts`.

        A boolean gather of the labelled pixels would cost more than all of the rest, so ignored pixels get a row and
        a column of their own. The narrowest integers that hold a pair are counted fastest.
        """
        side = self.num_classes + 1
        kind = next(kind for kind in _PAIRS if side * side - 1 <= torch.iinfo(kind).max)
        found, wanted = self._codes(prediction, "prediction"), self._codes(target, "target")
        pairs = torch.add(found.to(kind), wanted.to(kind), alpha=side)
        return torch.bincount(pairs.flatten(), minlength=side * side).view(side, side)

    def _codes(self, ids: torch.Tensor, argument: str) -> torch.Tensor:
        """Return 0 for the ignore index and `id + 1` for a class.

        Raises:
            ValueError: If an id is neither.
        """
        if self.num_classes < 255 and self.ignore_index in (-1, 255) and self._is_in_bytes(ids):
            codes = ids.to(torch.uint8) + 1  # a byte holds -1 as 255, and 255 + 1 as 0
            if int(codes.amax()) <= self.num_classes:
                return codes
        ids = ids.to(torch.int64)  # comparing uint8 with -1 would wrap around
        is_ignored = ids == self.ignore_index
        check_ids(ids, is_ignored, argument, self.num_classes, self.ignore_index)
        return ids.masked_fill(is_ignored, -1) + 1

    def _is_in_bytes(self, ids: torch.Tensor) -> bool:
        """Whether bytes tell all ids from the ignore index."""
        if ids.dtype == torch.uint8 and self.ignore_index == 255:
            return True
        low, high = (int(end) for end in ids.aminmax())
        return low >= min(0, self.ignore_index) and high <= max(self.num_classes - 1, self.ignore_index)


def check_classes(num_classes: int, ignore_index: int, absent: str) -> None:
    """Refuse arguments that no metric of class ids can work with.

    Raises:
        ValueError: If `num_classes` is below 1, `ignore_index` is a class id, or `absent` is unknown.
    """
    if num_classes < 1:
        raise ValueError(f"`num_classes` is {num_classes}. There must be at least 1 class. Raise it.")
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"`ignore_index` is {ignore_index}, which is also a class id. It must be outside "
            f"of 0 to {num_classes - 1}. Use -1 or 255, and map the pixels to it."
        )
    if absent not in get_args(Absent):
        raise ValueError(
            f"`absent` is {absent!r}. It says what a class counts that is predicted but not in the target. "
            'Use "zero" (mmsegmentation, evaluate) or "ignore" (detectron2).'
        )


def check_ids(ids: torch.Tensor, is_ignored: torch.Tensor, argument: str, num_classes: int, ignore_index: int) -> None:
    """Refuse values that are neither a class id nor the ignore index.

    Raises:
        ValueError: With the first eight of them.
    """
    # The ignore index is no class id, so exactly the ignored pixels may be outside.
    wrong = ((ids < 0) | (ids >= num_classes)) & ~is_ignored
    if wrong.any():
        raise ValueError(
            f"`{argument}` holds {ids[wrong].unique()[:8].tolist()}. Its values must be 0 to {num_classes - 1}, or "
            f"{ignore_index} to ignore. Map other values to the ignore index."
        )


def id_maps(
    prediction: torch.Tensor | np.ndarray, target: torch.Tensor | np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as tensors of uint8, or of signed integers, on the device of `prediction`; not to be changed.

    Raises:
        TypeError: If one of them does not hold integers.
        ValueError: If the shapes differ.
    """
    one = _integers(prediction, "prediction")
    other = _integers(target, "target").to(one.device)
    if one.shape != other.shape:
        raise ValueError(
            f"`prediction` has the shape {tuple(one.shape)} but `target` has "
            f"{tuple(other.shape)}. They must be equal. Resize the logits to the size of "
            "the target before taking the class."
        )
    return one, other


def _integers(ids: torch.Tensor | np.ndarray, argument: str) -> torch.Tensor:
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":
        # Copies what torch cannot take: read-only and reversed arrays, other byte orders, unsigned types.
        kind = ids.dtype if ids.dtype.name in _TAKEN and ids.dtype.isnative else np.int64
        return torch.from_numpy(np.require(ids, kind, ["C", "W"]))
    if isinstance(ids, torch.Tensor) and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        return ids if str(ids.dtype).removeprefix("torch.") in _TAKEN else ids.to(torch.int64)
    kind = getattr(ids, "dtype", type(ids).__name__)
    raise TypeError(
        f"`{argument}` is of the type {kind}. It must be a tensor or array of integer class ids. "
        "For logits take `logits.argmax(1)` first."
    )


def checked_state(state: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return counts of another process, on the device of `own`.

    Raises:
        ValueError: If they cannot be added to `own`, or one is negative.
    """
    if state.shape != own.shape or state.dtype != own.dtype or bool((state < 0).any()):
        raise ValueError(
            f"`state` is of {state.dtype} and of the shape {tuple(state.shape)}; its smallest count is "
            f"{state.min().item() if state.numel() else None}. It must be the `state` of a metric with the same "
            f"arguments: counts of {own.dtype}, of the shape {tuple(own.shape)}. Gather the states as they are."
        )
    return state.to(own.device)


def summed_over_processes(counts: torch.Tensor) -> torch.Tensor:
    """Return the sum over all processes on the same device, or `counts` itself without a process group."""
    if not is_distributed():
        return counts
    # A process that saw no image has its counts on the CPU, which NCCL does not reach; gloo always reaches it.
    total = counts.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    add_up(total)
    return total.to(counts.device)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"
