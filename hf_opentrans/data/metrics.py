"""Mean intersection over union, accumulated image by image."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a segmentation, all from 0 to 1, over all pixels seen so far.

    Attributes:
        mean_iou: Mean of `per_class_iou` without its nan entries.
        pixel_accuracy: Share of labelled pixels with the right class.
        mean_accuracy: Mean over the classes in the target of the share of their pixels found.
        frequency_weighted_iou: IoU weighted by the share of the class in the target.
        per_class_iou: Intersection over union of each class; nan for a class that is neither in
            the target nor predicted on a labelled pixel.
    """

    mean_iou: float
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted_iou: float
    per_class_iou: tuple[float, ...]


class MeanIoU:
    """Counts classes pixel by pixel; batching and order do not change the scores.

    The counts stay on the device of the first prediction.

    Args:
        num_classes: Number of classes, at least 1. Class ids are 0 to `num_classes - 1`.
        ignore_index: Target value of unlabelled pixels, which do not count. A prediction may
            hold it too: there it means "no answer" and is wrong on a labelled pixel.

    Raises:
        ValueError: If `num_classes` is below 1 or `ignore_index` is a class id.

    Example:
        >>> metric = MeanIoU(num_classes=2)
        >>> metric.update(np.array([0, 1, 1]), np.array([0, 0, 1]))
        >>> metric.compute().per_class_iou
        (0.5, 0.5)
    """

    def __init__(self, num_classes: int, ignore_index: int = -1) -> None:
        """Start with no pixels."""
        if num_classes < 1:
            raise ValueError(f"`num_classes` is {num_classes}. There must be at least 1 class. Raise it.")
        if 0 <= ignore_index < num_classes:
            raise ValueError(
                f"`ignore_index` is {ignore_index}, which is also a class id. It must be outside "
                f"of 0 to {num_classes - 1}. Use -1 or 255, and map the pixels to it."
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        # One more row and column for the ignore index, so that no boolean mask is needed.
        self._counts = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
        self._is_empty = True

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
        prediction = _to_int64(prediction, "prediction")
        target = _to_int64(target, "target").to(prediction.device)
        if prediction.shape != target.shape:
            raise ValueError(
                f"`prediction` has the shape {tuple(prediction.shape)} but `target` has "
                f"{tuple(target.shape)}. They must be equal. Resize the logits to the size of "
                "the target before taking the class."
            )
        if prediction.numel() == 0:
            return
        rows = self._to_bins(target, "target")
        columns = self._to_bins(prediction, "prediction")
        bins = self.num_classes + 1
        # The boolean gather of labelled pixels would cost more than all of the rest: counting
        # the ignored pixels too and leaving their row out at the end is about 15 times faster.
        pairs = torch.add(columns, rows, alpha=bins).flatten()
        counts = torch.bincount(pairs, minlength=bins * bins)
        if self._is_empty:
            self._counts = self._counts.to(counts.device)
            self._is_empty = False
        self._counts += counts.view(bins, bins).to(self._counts.device)

    def compute(self) -> SegmentationScores:
        """Compute the scores of all pixels so far; the counts stay.

        Returns:
            The scores. Classes absent from both prediction and target are left out of means.

        Raises:
            RuntimeError: If no labelled pixel was seen, so that there is nothing to score.
        """
        counts = self._counts.cpu().double()[: self.num_classes]
        hits = counts.diagonal()
        in_target = counts.sum(1)
        in_prediction = counts[:, : self.num_classes].sum(0)
        if in_target.sum() == 0:
            raise RuntimeError(
                "There are 0 labelled pixels. A score needs at least one pixel whose target is a "
                "class id. Call `update` first, or check `ignore_index`."
            )
        iou = hits / (in_target + in_prediction - hits)
        is_present = in_target > 0
        weights = in_target[is_present] / in_target.sum()
        return SegmentationScores(
            mean_iou=iou.nanmean().item(),
            pixel_accuracy=(hits.sum() / in_target.sum()).item(),
            mean_accuracy=(hits[is_present] / in_target[is_present]).mean().item(),
            frequency_weighted_iou=(weights * iou[is_present]).sum().item(),
            per_class_iou=tuple(iou.tolist()),
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
        self._counts += other._counts.to(self._counts.device)

    def reset(self) -> None:
        """Forget all pixels."""
        self._counts.zero_()

    def _to_bins(self, ids: torch.Tensor, argument: str) -> torch.Tensor:
        """Check the range, and map the ignore index to the extra bin."""
        lowest, highest = torch.stack(ids.aminmax()).tolist()
        if lowest >= 0 and highest < self.num_classes:
            return ids
        is_ignored = ids == self.ignore_index
        is_outside = (ids < 0) | (ids >= self.num_classes)
        # The ignore index is no class id, so exactly the ignored pixels may be outside.
        if not torch.equal(is_outside, is_ignored):
            wrong = ids[is_outside & ~is_ignored].unique()[:8].tolist()
            raise ValueError(
                f"`{argument}` holds {wrong}. Its values must be 0 to {self.num_classes - 1}, or "
                f"{self.ignore_index} to ignore. Map other values to the ignore index."
            )
        return ids.masked_fill(is_ignored, self.num_classes)


def _to_int64(ids: torch.Tensor | np.ndarray, argument: str) -> torch.Tensor:
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":
        # astype copies, which also makes read-only and reversed arrays fit for torch.
        return torch.from_numpy(ids.astype(np.int64))
    if isinstance(ids, torch.Tensor) and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        # Comparing uint8 with -1 would wrap around, so the type is widened first.
        return ids.to(torch.int64)
    kind = getattr(ids, "dtype", type(ids).__name__)
    raise TypeError(
        f"`{argument}` is of the type {kind}. It must be a tensor or array of integer class ids. "
        "For logits take `logits.argmax(1)` first."
    )
