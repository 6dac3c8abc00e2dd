"""Boundary IoU: golden value, equality with SciPy's erosion of one mask after another, and errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion

from hf_opentrans.data.boundary import BoundaryIoU

CLASSES = 3


def test_golden() -> None:
    # 10 x 10 pixels: a boundary of 1 pixel (2 % of 14). Target: all of class 0: its boundary are the 36 pixels at the
    # border. Prediction: one pixel in the middle is class 1: 36 and its 8 neighbours; class 1: the pixel itself.
    target = torch.zeros(10, 10, dtype=torch.int64)
    prediction = target.clone()
    prediction[5, 5] = 1
    metric = BoundaryIoU(2)
    metric.update(prediction, target)
    assert metric.compute().per_class == (36 / 44, 0.0)
    assert metric.compute().boundary_iou == 18 / 44
    other = BoundaryIoU(2, absent="ignore")
    other.update(prediction, target)
    assert other.compute().boundary_iou == 36 / 44


def brute_force(images: list[tuple[np.ndarray, np.ndarray]], ratio: float, absent: str) -> list[float]:
    sums = np.zeros((2, CLASSES))
    in_target = np.zeros(CLASSES)
    for prediction, target in images:
        steps = max(1, round(ratio * math.hypot(*target.shape)))
        for c in range(CLASSES):
            masks = [target == c, (prediction == c) & (target >= 0)]
            inner = [binary_erosion(m, np.ones((3, 3)), iterations=steps, border_value=0) for m in masks]
            edges = [np.greater(m, part) for m, part in zip(masks, inner, strict=True)]
            sums[:, c] += (edges[0] & edges[1]).sum(), (edges[0] | edges[1]).sum()
            in_target[c] += edges[0].sum()
    nothing = in_target == 0 if absent == "ignore" else sums[1] == 0
    return [math.nan if out else both / either for both, either, out in zip(*sums, nothing, strict=True)]


@st.composite
def label_maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    coarse = rng.integers(-1, CLASSES, (draw(st.integers(1, 4)), draw(st.integers(1, 5))))
    coarse[0, 0] = 0
    target = np.kron(coarse, np.ones((draw(st.integers(1, 7)), draw(st.integers(1, 7))), int))
    prediction = np.roll(target, rng.integers(0, 3, 2), (0, 1))
    noise = rng.random(target.shape) < draw(st.sampled_from([0.0, 0.1]))
    return np.where(noise, rng.integers(-1, CLASSES, target.shape), prediction), target


@given(
    st.lists(label_maps(), min_size=1, max_size=3),
    st.sampled_from([0.02, 0.1, 0.3]),
    st.sampled_from(["zero", "ignore"]),
    st.randoms(),
)
@settings(max_examples=60, deadline=None)
def test_equals_erosion_of_every_mask(images, ratio, absent, random) -> None:
    parts = []
    for prediction, target in images:
        part = BoundaryIoU(CLASSES, dilation_ratio=ratio, absent=absent)
        part.update(prediction, torch.tensor(target).to(torch.int16))
        parts.append(part)
    random.shuffle(parts)
    whole = BoundaryIoU(CLASSES, dilation_ratio=ratio, absent=absent)
    for part in parts:
        whole.merge(part)
    expected = brute_force(images, ratio, absent)
    assert whole.compute().per_class == pytest.approx(expected, nan_ok=True)
    assert whole.compute().boundary_iou == pytest.approx(np.nanmean(expected))


def test_a_batch_is_its_images() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randint(0, CLASSES, (2, 4, 9, 13), generator=generator)
    batch, single = BoundaryIoU(CLASSES, 255), BoundaryIoU(CLASSES, 255)
    target[1, :3] = 255
    batch.update(prediction, target)
    for one, other in zip(prediction, target, strict=True):
        single.update(one, other)
    assert torch.equal(batch.state, single.state)
    assert batch.state.sum() > 0
    batch.reset()
    assert batch.state.sum() == 0


def test_errors() -> None:
    metric = BoundaryIoU(2)
    with pytest.raises(RuntimeError, match="0 labelled pixels"):
        metric.compute()
    with pytest.raises(ValueError, match=r"shape \(4,\). Outlines need"):
        metric.update(np.zeros(4, int), np.zeros(4, int))
    with pytest.raises(ValueError, match=r"`target` holds \[2\]"):
        metric.update(np.zeros((1, 1), int), np.full((1, 1), 2))
    with pytest.raises(ValueError, match="`dilation_ratio` is 0"):
        BoundaryIoU(2, dilation_ratio=0)
    with pytest.raises(ValueError, match="At most 16777216"):
        BoundaryIoU(2**24 + 1)
    with pytest.raises(ValueError, match=r"= \(2, -1, 0.1\), this metric \(2, -1, 0.02\)"):
        metric.merge(BoundaryIoU(2, dilation_ratio=0.1))
    with pytest.raises(ValueError, match=r"shape \(3, 3\).*shape \(3, 2\)"):
        metric.add_state(BoundaryIoU(3).state)
