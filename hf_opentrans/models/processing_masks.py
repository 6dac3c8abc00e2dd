"""Masks of queries to instances and to a panoptic map.

Memory stays that of a few maps: masks are enlarged one after the other.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import interpolate

from .modeling_mask_queries import MaskQueriesOutput
from .segmentation_result import UNLABELLED
from .vocabulary import Vocabulary

INSIDE = 0.5  # probability from which a pixel is inside of a mask


def post_process_instance_segmentation(
    outputs: MaskQueriesOutput,
    target_sizes: Sequence[tuple[int, int]] | None = None,
    threshold: float = 0.5,
    return_binary_maps: bool = False,
) -> list[dict[str, Any]]:
    """Turn masks into instances: the best pairs of a mask and a class, as many as there are queries.

    The score is the class probability times the mean mask probability inside of the mask. Where instances overlap,
    the one with the higher score is on top; an instance that is wholly covered is left out.

    Args:
        outputs: Of [`FCCLIPForSegmentation`] or [`GKCForSegmentation`], called with text.
        target_sizes: `(height, width)` of every result. Defaults to the size of the masks.
        threshold: Instances with a lower score are left out. In 0..1.
        return_binary_maps: Return whole masks, covered parts and covered instances too, of shape
            `(instances, height, width)`, in place of the map.

    Returns:
        For every image "segmentation", the id of the instance of every pixel, `(height, width)`, -1 for none; and
        "segments_info", best first: "id" (its position), "label_id", "label", "score", "was_fused" (False).

    Raises:
        ValueError: If the outputs hold no classes, or the sizes or the threshold do not fit.
    """
    results = []
    for classes, masks, size in _images(outputs, target_sizes, threshold):
        instances = _instances(classes, masks, size, threshold)
        segmentation = _empty(size, masks.device)
        kept, maps = [], []
        for score, label, inside in instances:
            visible = inside & (segmentation == UNLABELLED)
            if return_binary_maps or bool(visible.any()):
                segmentation[visible] = len(kept)
                kept.append(_entry(len(kept), label, score, outputs.vocabulary, was_fused=False))
                maps.append(inside)
        if return_binary_maps:
            segmentation = torch.stack(maps) if maps else segmentation.new_zeros((0, *size), dtype=torch.bool)
        results.append({"segmentation": segmentation.cpu(), "segments_info": kept})
    return results


def post_process_panoptic_segmentation(
    outputs: MaskQueriesOutput,
    target_sizes: Sequence[tuple[int, int]] | None = None,
    threshold: float = 0.0,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] | None = None,
) -> list[dict[str, Any]]:
    """Turn masks into one segment per pixel (Mask2Former): the mask with the highest probability times score.

    Args:
        outputs: Of [`FCCLIPForSegmentation`] or [`GKCForSegmentation`], called with text.
        target_sizes: `(height, width)` of every result. Defaults to the size of the masks.
        threshold: Masks whose class probability is not higher are left out. In 0..1.
        overlap_mask_area_threshold: Masks that keep a lower share of their area, because others win the rest, are
            left out. In 0..1.
        label_ids_to_fuse: Classes whose masks form one segment: stuff, such as sky.

    Returns:
        For every image "segmentation", the id of the segment of every pixel, `(height, width)`, -1 for none; and
        "segments_info": "id" (its position), "label_id", "label", "score" (of fused masks the highest), "was_fused".

    Raises:
        ValueError: If the outputs hold no classes, or the sizes or thresholds do not fit.
    """
    _refuse_no_share("overlap_mask_area_threshold", overlap_mask_area_threshold)
    fused = frozenset(label_ids_to_fuse or ())
    results = []
    for classes, masks, size in _images(outputs, target_sizes, threshold):
        scores, labels = classes.softmax(-1).max(-1)
        kept = (labels != classes.shape[-1] - 1) & (scores > threshold)
        scores, labels = scores[kept].tolist(), labels[kept].tolist()
        winner, inside, areas = _compete(masks[kept], scores, size)
        segmentation = _empty(size, masks.device)
        segments: list[dict[str, Any]] = []
        ids: dict[int, int] = {}
        for index, (score, label) in enumerate(zip(scores, labels, strict=True)):
            won = winner == index
            part = won & inside
            if not bool(part.any()) or int(won.sum()) < overlap_mask_area_threshold * areas[index]:
                continue
            known = ids.get(label) if label in fused else None
            if known is None:
                ids[label] = known = len(segments)
                segments.append(_entry(known, label, score, outputs.vocabulary, was_fused=label in fused))
            segments[known]["score"] = max(segments[known]["score"], round(score, 6))
            segmentation[part] = known
        results.append({"segmentation": segmentation.cpu(), "segments_info": segments})
    return results


def _images(
    outputs: MaskQueriesOutput, target_sizes: Sequence[tuple[int, int]] | None, threshold: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]]:
    """Yield class logits, mask logits and size of every image."""
    classes, masks = outputs.class_queries_logits, outputs.masks_queries_logits
    if classes is None or masks is None:
        raise ValueError(
            "The outputs hold no classes of masks. They are needed. Call the model with vocabulary= or "
            "text_embeddings=."
        )
    _refuse_no_share("threshold", threshold)
    sizes = list(target_sizes or [(masks.shape[-2], masks.shape[-1])] * len(masks))
    if len(sizes) != len(masks):
        raise ValueError(
            f"There are {len(sizes)} target sizes for {len(masks)} images. Give one (height, width) each."
        )
    for image_classes, image_masks, size in zip(classes, masks, sizes, strict=True):
        yield image_classes.detach().float(), image_masks.detach().float(), (int(size[0]), int(size[1]))


def _refuse_no_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}. It must lie in 0..1. Correct it.")


def _instances(
    classes: torch.Tensor, masks: torch.Tensor, size: tuple[int, int], threshold: float
) -> list[tuple[float, int, torch.Tensor]]:
    """Return score, class and mask of every instance, best first."""
    scores = classes.softmax(-1)[:, :-1]
    best, places = scores.flatten().topk(len(masks))
    found = []
    for score, place in zip(best.tolist(), places.tolist(), strict=True):
        if score < threshold:  # the mask can only lower it
            break
        query, label = divmod(place, scores.shape[1])
        mask = _resize(masks[query], size)
        inside = mask > 0
        if bool(inside.any()):
            found.append((score * float(mask[inside].sigmoid().mean()), label, inside))
    kept = [item for item in found if item[0] >= threshold]
    return sorted(kept, key=lambda item: -item[0])


def _compete(
    masks: torch.Tensor, scores: Sequence[float], size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return the mask that wins every pixel, whether the pixel is inside of it, and the areas of all masks."""
    winner = _empty(size, masks.device)
    inside = torch.zeros(size, dtype=torch.bool, device=masks.device)
    highest = torch.full(size, -1.0, device=masks.device)
    areas = []
    for index, (mask, score) in enumerate(zip(masks, scores, strict=True)):
        probability = _resize(mask, size).sigmoid()
        is_inside = probability >= INSIDE
        better = probability * score > highest
        highest = torch.where(better, probability * score, highest)
        winner = torch.where(better, index, winner)
        inside = torch.where(better, is_inside, inside)
        areas.append(int(is_inside.sum()))
    return winner, inside, areas


def _resize(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def _empty(size: tuple[int, int], device: torch.device) -> torch.Tensor:
    return torch.full(size, UNLABELLED, dtype=torch.long, device=device)


def _entry(
    index: int, label_id: int, score: float, vocabulary: Vocabulary | None, *, was_fused: bool
) -> dict[str, Any]:
    label = str(label_id) if vocabulary is None else vocabulary.names[label_id]
    return {
        "id": index,
        "label_id": label_id,
        "label": label,
        "score": round(score, 6),
        "was_fused": was_fused,
    }
