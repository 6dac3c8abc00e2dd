"""Mean IoU: golden value, equality with brute force, and independence of batching and order."""

import math
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_opentrans.data.metrics import MeanIoU

CLASSES = 4


def brute_force(prediction: np.ndarray, target: np.ndarray) -> tuple[list[float], float, float]:
    """IoU of each class, pixel accuracy and mean accuracy, straight from their definitions."""
    on = target >= 0
    iou, accuracy = [], []
    for c in range(CLASSES):
        found, wanted = (prediction == c) & on, target == c
        union = (found | wanted).sum()
        iou.append((found & wanted).sum() / union if union else math.nan)
        if wanted.any():
            accuracy.append((found & wanted).sum() / wanted.sum())
    return iou, (prediction == target)[on].mean(), float(np.mean(accuracy))


@st.composite
def label_maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    count = draw(st.integers(1, 40))
    ids = st.lists(st.integers(-1, CLASSES - 1), min_size=count, max_size=count)
    target = np.array(draw(ids))
    target[0] = max(target[0], 0)
    return np.array(draw(ids)), target


def test_golden() -> None:
    # target      0 0 0 1 1 ignored    prediction  0 0 1 1 2 0; the last pixel does not count.
    # Class 0: 2 found, union 3 -> 2/3. Class 1: 1 found, union {3, 4, 5} = 3 -> 1/3.
    # Class 2: never in the target, once predicted -> 0/1 = 0. Class 3: nowhere -> nan, left out.
    # mean = (2/3 + 1/3 + 0) / 3 = 1/3; 3 of 5 pixels right; mean accuracy = (2/3 + 1/2) / 2 = 7/12;
    # weighted = 3/5 * 2/3 + 2/5 * 1/3 = 8/15.
    metric = MeanIoU(num_classes=4)
    metric.update(np.array([0, 0, 1, 1, 2, 0]), np.array([0, 0, 0, 1, 1, -1]))
    scores = metric.compute()
    assert scores.mean_iou == pytest.approx(1 / 3)
    assert scores.pixel_accuracy == pytest.approx(3 / 5)
    assert scores.mean_accuracy == pytest.approx(7 / 12)
    assert scores.frequency_weighted_iou == pytest.approx(8 / 15)
    assert scores.per_class_iou == pytest.approx((2 / 3, 1 / 3, 0, math.nan), nan_ok=True)


def test_no_answer_is_wrong_but_belongs_to_no_class() -> None:
    metric = MeanIoU(num_classes=2, ignore_index=255)
    metric.update(torch.tensor([255, 0, 1]), torch.tensor([0, 0, 1]))
    assert metric.compute().per_class_iou == (0.5, 1.0)


@given(label_maps())
@settings(max_examples=60, deadline=None)
def test_equals_brute_force(maps: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, target = maps
    metric = MeanIoU(CLASSES)
    metric.update(prediction, target)
    scores = metric.compute()
    iou, pixel_accuracy, mean_accuracy = brute_force(prediction, target)
    assert scores.per_class_iou == pytest.approx(iou, nan_ok=True)
    assert scores.mean_iou == pytest.approx(np.nanmean(iou))
    assert scores.pixel_accuracy == pytest.approx(pixel_accuracy)
    assert scores.mean_accuracy == pytest.approx(mean_accuracy)


@given(label_maps(), st.lists(st.integers(0, 40), max_size=5), st.randoms())
@settings(max_examples=40, deadline=None)
def test_batching_and_merge_order_do_not_matter(
    maps: tuple[np.ndarray, np.ndarray], cuts: list[int], random: Random
) -> None:
    prediction, target = maps
    whole = MeanIoU(CLASSES)
    whole.update(prediction, target)
    parts = []
    bounds = sorted({0, len(target), *(cut for cut in cuts if cut < len(target))})
    for start, stop in pairwise(bounds):
        part = MeanIoU(CLASSES)
        part.update(torch.tensor(prediction[start:stop]), torch.tensor(target[start:stop]))
        parts.append(part)
    random.shuffle(parts)
    merged = MeanIoU(CLASSES)
    for part in parts:
        merged.merge(part)
    assert repr(merged.compute()) == repr(whole.compute())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_types_and_shapes_give_the_same_scores(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, CLASSES, (2, 5, 7), generator=generator)
    target = torch.randint(0, CLASSES, (2, 5, 7), generator=generator)
    target[0, 0, :3] = 255
    expected, metric = MeanIoU(CLASSES, ignore_index=255), MeanIoU(CLASSES, ignore_index=255)
    expected.update(prediction.flatten(), target.flatten())
    before = target.to(dtype).clone()
    metric.update(prediction.to(dtype), before)
    assert metric.compute() == expected.compute()
    assert torch.equal(before, target.to(dtype))


def test_read_only_and_reversed_arrays() -> None:
    target = np.array([[0, 1], [1, 1]], np.uint8)
    target.flags.writeable = False
    metric = MeanIoU(2)
    metric.update(target[::-1], target[::-1])
    assert metric.compute().mean_iou == 1.0


def test_empty_batch_and_reset() -> None:
    metric = MeanIoU(2)
    metric.update(np.zeros((0, 3), int), np.zeros((0, 3), int))
    metric.update(np.array([0]), np.array([0]))
    metric.reset()
    metric.update(np.array([0]), np.array([1]))
    assert metric.compute().mean_iou == 0.0


def test_no_labelled_pixel_is_an_error() -> None:
    metric = MeanIoU(2)
    with pytest.raises(RuntimeError, match="0 labelled pixels"):
        metric.compute()
    metric.update(np.array([0]), np.array([-1]))
    with pytest.raises(RuntimeError, match="0 labelled pixels"):
        metric.compute()


def test_shape_mismatch() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\) but `target` has \(3, 2\)"):
        MeanIoU(2).update(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2).long())


@pytest.mark.parametrize("bad", [-2, 2, 255])
def test_out_of_range_ids(bad: int) -> None:
    good = np.array([0, 1, -1])
    with pytest.raises(ValueError, match=rf"`target` holds \[{bad}\].*0 to 1"):
        MeanIoU(2).update(good, np.array([0, 1, bad]))
    with pytest.raises(ValueError, match=rf"`prediction` holds \[{bad}\].*0 to 1"):
        MeanIoU(2).update(np.array([0, 1, bad]), good)


def test_types_that_hold_no_ids() -> None:
    ids = torch.tensor([0])
    for wrong in (torch.zeros(1), torch.ones(1, dtype=torch.bool), np.zeros(1), [0]):
        with pytest.raises(TypeError, match="`prediction` is of the type"):
            MeanIoU(2).update(wrong, ids)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`num_classes` is 0"):
        MeanIoU(0)
    with pytest.raises(ValueError, match="`ignore_index` is 1, which is also a class id"):
        MeanIoU(2, ignore_index=1)
    with pytest.raises(ValueError, match=r"= \(3, -1\), this metric \(2, -1\)"):
        MeanIoU(2).merge(MeanIoU(3))
