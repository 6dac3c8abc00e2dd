"""Boundary IoU: how well the outlines of the classes fit, accumulated image by image."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import max_pool2d, pad

from hf_opentrans.data.metrics import (
    Absent,
    check_classes,
    check_ids,
    checked_state,
    id_maps,
    summed_over_processes,
)

_NO_CLASS = -1
_LARGEST_ID = 2**24  # float32 holds every whole number up to here


@dataclass(frozen=True)
class BoundaryScores:
    """Boundary IoU over all images seen so far, from 0 to 1.

    Attributes:
        boundary_iou: Mean of `per_class` without its nan entries.
        per_class: Boundary IoU of each class; nan for a class that has no boundary in target and prediction, with
            `absent="ignore"` for every class that has none in the target.
        absent: The rule for classes that are predicted but not in the target.
    """

    boundary_iou: float
    per_class: tuple[float, ...]
    absent: Absent


class BoundaryIoU:
    """Counts pixels near the outlines (Cheng et al. 2021, arXiv 2103.16562), the semantic variant.

    The boundary of a class is its mask without the mask eroded by `dilation_ratio` of the image's diagonal; the
    border of the image counts as an outline. The IoU of the boundaries of target and prediction is taken per class,
    over all images. Unlabelled pixels belong to no class in both, so that the outline along them is the same.

    Args:
        num_classes: Number of classes, at least 1. Class ids are 0 to `num_classes - 1`.
        ignore_index: Target value of unlabelled pixels, which do not count. In a prediction it means "no answer".
        dilation_ratio: Width of the boundary as a share of the image's diagonal; at least one pixel is taken.
        absent: As for `MeanIoU`.

    Raises:
        ValueError: If `num_classes` is below 1 or above 2^24, `ignore_index` is a class id, `absent` is unknown, or
            `dilation_ratio` is not in 0..1.

    Example:
        >>> metric = BoundaryIoU(num_classes=2)
        >>> target = torch.tensor([[0, 0, 1, 1]])
        >>> metric.update(target, target)
        >>> metric.compute().per_class
        (1.0, 1.0)
    """

    def __init__(
        self, num_classes: int, ignore_index: int = -1, *, dilation_ratio: float = 0.02, absent: Absent = "zero"
    ) -> None:
        """Start with no pixels."""
        check_classes(num_classes, ignore_index, absent)
        if num_classes > _LARGEST_ID:
            raise ValueError(
                f"`num_classes` is {num_classes}. At most {_LARGEST_ID} are told apart. Use fewer classes."
            )
        if not 0 < dilation_ratio < 1:
            raise ValueError(
                f"`dilation_ratio` is {dilation_ratio}. It must be above 0 and below 1. The paper takes 0.02."
            )
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.dilation_ratio = dilation_ratio
        self.absent: Absent = absent
        self._counts = torch.zeros(3, num_classes, dtype=torch.int64)

    @property
    def state(self) -> torch.Tensor:
        """All that was counted, as a copy: int64 of shape `(3, classes)`.

        Rows: pixels of both boundaries, of the target's, of the prediction's. States add up: see `add_state`.
        """
        return self._counts.clone()

    def update(self, prediction: torch.Tensor | np.ndarray, target: torch.Tensor | np.ndarray) -> None:
        """Add one image or a batch of equally large ones. The arguments are not changed.

        Args:
            prediction: Class ids of any integer type, of shape `(height, width)` or `(images, height, width)`.
            target: Class ids or `ignore_index`, of the same shape.

        Raises:
            TypeError: If one of them does not hold integers.
            ValueError: If the shapes differ or are no images, or a value is neither a class id nor `ignore_index`.
        """
        prediction, target = id_maps(prediction, target)
        if target.ndim not in (2, 3):
            raise ValueError(
                f"The maps have the shape {tuple(target.shape)}. Outlines need (height, width) or (images, height, "
                "width). Pass whole images."
            )
        if target.numel() == 0:
            return
        wanted, found = self._to_classes(target, "target"), self._to_classes(prediction, "prediction")
        found = found.masked_fill(wanted == _NO_CLASS, _NO_CLASS)
        in_target, in_prediction = self._near_outline(wanted), self._near_outline(found)
        both = in_target & in_prediction & (wanted == found)
        parts = [wanted[both], wanted[in_target], found[in_prediction]]
        counts = torch.stack([torch.bincount(ids, minlength=self.num_classes) for ids in parts])
        self._counts = self._counts.to(counts.device) + counts

    def compute(self) -> BoundaryScores:
        """Compute the scores of all images so far; the counts stay.

        Raises:
            RuntimeError: If no labelled pixel was seen, so that there is nothing to score.
        """
        both, in_target, in_prediction = self._counts.cpu().double()
        if in_target.sum() == 0:
            raise RuntimeError(
                "There are 0 labelled pixels. A score needs at least one pixel whose target is a "
                "class id. Call `update` first, or check `ignore_index`."
            )
        iou = both / (in_target + in_prediction - both)
        if self.absent == "ignore":
            iou[in_target == 0] = torch.nan
        return BoundaryScores(iou.nanmean().item(), tuple(iou.tolist()), self.absent)

    def merge(self, other: "BoundaryIoU") -> None:
        """Add the counts of another metric, for example of another process.

        Args:
            other: Not changed.

        Raises:
            ValueError: If it was made with other arguments.
        """
        ours, theirs = ((metric.num_classes, metric.ignore_index, metric.dilation_ratio) for metric in (self, other))
        if ours != theirs:
            raise ValueError(
                f"`other` has (num_classes, ignore_index, dilation_ratio) = {theirs}, this metric {ours}. "
                "Merged metrics must agree. Make both with the same arguments."
            )
        self.add_state(other._counts)

    def add_state(self, state: torch.Tensor) -> None:
        """Add the `state` of another metric with the same arguments, or the sum of several.

        Args:
            state: Of shape `(3, classes)`, on any device. Not changed.

        Raises:
            ValueError: If it has another shape or type, or holds a negative count.
        """
        self._counts += checked_state(state, self._counts)

    def sum_over_processes(self) -> None:
        """Add up the counts of all processes of `torch.distributed`; once, after the last `update`."""
        self._counts = summed_over_processes(self._counts)

    def reset(self) -> None:
        """Forget all images."""
        self._counts = torch.zeros_like(self._counts)

    def _to_classes(self, ids: torch.Tensor, argument: str) -> torch.Tensor:
        """Check the range, and mark the pixels of no class."""
        ids = ids.to(torch.int64)
        is_ignored = ids == self.ignore_index
        check_ids(ids, is_ignored, argument, self.num_classes, self.ignore_index)
        return ids.masked_fill(is_ignored, _NO_CLASS)

    def _near_outline(self, classes: torch.Tensor) -> torch.Tensor:
        """Return where a class is without its erosion: where the window around the pixel holds anything else.

        So all classes are eroded at once. The minimum over the square window is taken row by row, then column by
        column.
        """
        height, width = classes.shape[-2:]
        distance = max(1, round(self.dilation_ratio * math.hypot(height, width)))
        batch = classes.reshape(-1, 1, height, width).float()
        padded = pad(batch, [distance] * 4, value=_NO_CLASS)
        side = 2 * distance + 1

        def largest(values: torch.Tensor) -> torch.Tensor:
            return max_pool2d(max_pool2d(values, (1, side), stride=1), (side, 1), stride=1)

        is_mixed = largest(padded) != -largest(-padded)
        return is_mixed.view(classes.shape) & (classes != _NO_CLASS)
