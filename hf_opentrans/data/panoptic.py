"""Panoptic quality: things and stuff in one score, accumulated image by image."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_opentrans.data.metrics import checked_state, id_maps, summed_over_processes

Segments = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PanopticMean:
    """Means over the classes of a kind; nan if none of them was seen.

    Attributes:
        pq: Panoptic quality, sum of IoU of the matches / (matches + half of all unmatched segments).
        sq: Segmentation quality, mean IoU of the matches.
        rq: Recognition quality, matches / (matches + half of all unmatched segments).
        classes: How many classes count: those with a segment in target or prediction.
    """

    pq: float
    sq: float
    rq: float
    classes: int


@dataclass(frozen=True)
class PanopticScores:
    """Panoptic quality of all images seen so far, from 0 to 1.

    Attributes:
        overall, things, stuff: Means over all classes, over those with instances, over the others.
        per_class_pq, per_class_sq, per_class_rq: By class id; nan for a class without any segment.
        matched, false_positives, false_negatives: Segments by class id.
    """

    overall: PanopticMean
    things: PanopticMean
    stuff: PanopticMean
    per_class_pq: tuple[float, ...]
    per_class_sq: tuple[float, ...]
    per_class_rq: tuple[float, ...]
    matched: tuple[int, ...]
    false_positives: tuple[int, ...]
    false_negatives: tuple[int, ...]


@dataclass(frozen=True)
class _Side:
    """The segments of one map.

    Args:
        classes: Class id of every segment.
        is_crowd: Which of them are crowds.
        places: Position of every pixel's segment; the number of segments for void.
    """

    classes: torch.Tensor
    is_crowd: torch.Tensor
    places: torch.Tensor


class PanopticQuality:
    """Matches predicted segments with those of the target, as the COCO panoptic API does (Kirillov et al. 2019).

    Two segments of a class match if their IoU is above 0.5, without the predicted pixels that are void in the target.
    A predicted segment that matches nothing is no false positive if more than half of it is void or crowd of its
    class. A crowd in the target matches nothing and is no false negative.

    Args:
        num_classes: Number of classes, at least 1. Class ids are 0 to `num_classes - 1`.
        things: Ids of the classes that have instances.
        void_ids: Values of pixels without a segment, unless a segment has this id. transformers leaves 0 or -1,
            this package -1, COCO 0.

    Raises:
        ValueError: If `num_classes` is below 1 or one of `things` is no class id.

    Example:
        >>> metric = PanopticQuality(num_classes=2, things=[1])
        >>> segments = [{"id": 0, "label_id": 0}, {"id": 1, "label_id": 1}]
        >>> metric.update(np.array([0, 0, 1, 1]), segments, np.array([0, 0, 0, 1]), segments)
        >>> round(metric.compute().overall.pq, 4)  # the thing has an IoU of 1/2: no match
        0.3333
    """

    def __init__(self, num_classes: int, things: Collection[int], void_ids: Collection[int] = (-1, 0)) -> None:
        """Start with no images."""
        if num_classes < 1:
            raise ValueError(f"`num_classes` is {num_classes}. There must be at least 1 class. Raise it.")
        wrong = sorted(label for label in things if not 0 <= label < num_classes)
        if wrong:
            raise ValueError(
                f"`things` holds {wrong}. They must be class ids, 0 to {num_classes - 1}. Leave them out."
            )
        self.num_classes, self.things, self.void_ids = num_classes, frozenset(things), frozenset(void_ids)
        # Matches, false positives, false negatives.
        self._counts = torch.zeros(3, num_classes, dtype=torch.int64)
        self._iou = torch.zeros(num_classes, dtype=torch.float64)

    @property
    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All that was counted, as copies: see `add_state`.

        Matches, false positives and false negatives by class, int64 of shape `(3, classes)`; and the sum of the IoU
        of the matches, float64.
        """
        return self._counts.clone(), self._iou.clone()

    def update(
        self,
        prediction_map: torch.Tensor | np.ndarray,
        prediction_segments: Segments,
        target_map: torch.Tensor | np.ndarray,
        target_segments: Segments,
    ) -> None:
        """Add one image. The arguments are not changed.

        Args:
            prediction_map: Segment id per pixel, as `post_process_panoptic_segmentation` gives it.
            prediction_segments: Its "segments_info": "id" and "label_id" (or COCO's "category_id") of each.
            target_map: Segment id per pixel, of the same shape.
            target_segments: The same for the target; those with a true "iscrowd" are crowds. A segment without
                pixels is a false negative.

        Raises:
            TypeError: If a map does not hold integers.
            ValueError: If the shapes differ, an id is there twice, a pixel has an unknown id, a predicted segment has
                no pixels, or a class is out of range.
        """
        found_map, wanted_map = id_maps(prediction_map, target_map)
        found = self._read(found_map, prediction_segments, "prediction")
        wanted = self._read(wanted_map, target_segments, "target")
        shape = len(wanted.classes) + 1, len(found.classes) + 1
        pairs = wanted.places * shape[1] + found.places
        # Pixels of every pair of segments; void is last.
        shared = torch.bincount(pairs, minlength=shape[0] * shape[1]).cpu().view(shape)
        area = shared[:, :-1].sum(0)
        if bool((area == 0).any()):
            empty = [prediction_segments[int(place)]["id"] for place in (area == 0).nonzero()]
            raise ValueError(
                f"The predicted segments {empty} have no pixels. Every segment needs some. Leave them out of the "
                "segments, or do not shrink the map."
            )
        self._match(shared, area, found, wanted)

    def compute(self) -> PanopticScores:
        """Compute the scores of all images so far; the counts stay.

        Raises:
            RuntimeError: If no segment was seen, so that there is nothing to score.
        """
        matched, positives, negatives = self._counts
        if self._counts.sum() == 0:
            raise RuntimeError(
                "There are 0 segments. A score needs at least one, in the target or predicted. Call `update` first."
            )
        total = matched.double() + (positives + negatives) / 2  # 0 / 0 is nan
        pq, rq = self._iou / total, matched / total
        # Without a match the quality of matches is 0, as in the COCO API.
        sq = torch.where(total > 0, self._iou / matched.clamp(min=1), torch.nan)
        is_thing = torch.tensor([label in self.things for label in range(self.num_classes)])

        def mean(chosen: torch.Tensor) -> PanopticMean:
            chosen = chosen & (total > 0)
            return PanopticMean(*(part[chosen].mean().item() for part in (pq, sq, rq)), classes=int(chosen.sum()))

        return PanopticScores(
            mean(torch.ones_like(is_thing)),
            mean(is_thing),
            mean(~is_thing),
            *(tuple(part.tolist()) for part in (pq, sq, rq, matched, positives, negatives)),
        )

    def merge(self, other: "PanopticQuality") -> None:
        """Add the counts of another metric, for example of another process.

        Args:
            other: Not changed.

        Raises:
            ValueError: If it counts other classes.
        """
        ours, theirs = ((metric.num_classes, sorted(metric.things)) for metric in (self, other))
        if ours != theirs:
            raise ValueError(
                f"`other` has (num_classes, things) = {theirs}, this metric {ours}. "
                "Merged metrics must agree. Make both with the same arguments."
            )
        self.add_state(other.state)

    def add_state(self, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Add the `state` of another metric with the same arguments, or the sum of several.

        Args:
            state: The counts and the sums of IoU, on any device. Not changed.

        Raises:
            ValueError: If one has another shape or type, or holds a negative value.
        """
        pairs = zip(state, (self._counts, self._iou), strict=True)
        counts, iou = (checked_state(theirs, own) for theirs, own in pairs)
        self._counts += counts
        self._iou += iou

    def sum_over_processes(self) -> None:
        """Add up the counts of all processes of `torch.distributed`; once, after the last `update`."""
        self._counts = summed_over_processes(self._counts)
        self._iou = summed_over_processes(self._iou)

    def reset(self) -> None:
        """Forget all images."""
        self._counts.zero_()
        self._iou.zero_()

    def _match(self, shared: torch.Tensor, area: torch.Tensor, found: _Side, wanted: _Side) -> None:
        """Count matches and what is left over.

        Args:
            shared: Pixels of every pair of segments, of shape `(target + 1, predicted + 1)`; void is last.
            area: Pixels of every predicted segment.
            found: The predicted segments.
            wanted: The segments of the target.
        """
        inside, void = shared[:-1, :-1], shared[-1, :-1]
        union = area + shared[:-1].sum(1, keepdim=True) - inside - void
        is_same = wanted.classes[:, None] == found.classes
        # In whole numbers, "IoU above 0.5" is exact. Segments of a map do not overlap, so at most one can match.
        is_match = is_same & ~wanted.is_crowd[:, None] & (2 * inside > union)
        crowded = (inside * (is_same & wanted.is_crowd[:, None])).sum(0)
        is_false = ~is_match.any(0) & (2 * (void + crowded) <= area)
        is_missed = ~is_match.any(1) & ~wanted.is_crowd
        rows, columns = is_match.nonzero(as_tuple=True)
        kinds = (wanted.classes[rows], found.classes[is_false], wanted.classes[is_missed])
        self._counts += torch.stack([torch.bincount(kind, minlength=self.num_classes) for kind in kinds])
        iou = inside[rows, columns].double() / union[rows, columns]
        self._iou.index_add_(0, wanted.classes[rows], iou)

    def _read(self, ids: torch.Tensor, segments: Segments, argument: str) -> _Side:
        """Check the segments of a map, and number its pixels by them."""
        order = {int(segment["id"]): place for place, segment in enumerate(segments)}
        if len(order) != len(segments):
            listed = [segment["id"] for segment in segments]
            raise ValueError(
                f"The {argument} segments have the ids {listed}, some of them twice. An id stands for one segment. "
                "Number the segments."
            )
        labels = [segment["label_id"] if "label_id" in segment else segment["category_id"] for segment in segments]
        wrong = sorted({label for label in labels if not 0 <= label < self.num_classes})
        if wrong:
            raise ValueError(
                f"The {argument} segments are of the classes {wrong}. They must be 0 to {self.num_classes - 1}. Map "
                "the category ids of the dataset to class ids."
            )
        present, inverse = ids.flatten().to(torch.int64).unique(return_inverse=True)
        unknown = [value for value in present.tolist() if value not in order and value not in self.void_ids]
        if unknown:
            raise ValueError(
                f"The {argument} map holds the ids {unknown[:8]}, which are no segment. A pixel without a segment "
                f"must be one of {sorted(self.void_ids)}. Name the others in `void_ids`."
            )
        places = torch.tensor([order.get(value, len(segments)) for value in present.tolist()], dtype=torch.int64)
        is_crowd = [bool(segment.get("iscrowd", False)) for segment in segments]
        return _Side(
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(is_crowd, dtype=torch.bool),
            places.to(ids.device)[inverse],
        )
