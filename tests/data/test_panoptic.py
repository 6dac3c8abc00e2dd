"""Panoptic quality: golden values, equality with an independent derivation, void and crowds, and errors."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_opentrans.data.panoptic import PanopticQuality

CLASSES, THINGS = 3, [1, 2]


def test_golden() -> None:
    # target:     class 0 (stuff): 6 pixels; thing A of class 1: 4; thing B of class 1: 4; void: 2.
    # prediction: class 0: the 6 and 1 of A -> IoU 6/7; A: the other 3 -> IoU 3/4; B: 1 of 4 -> IoU 1/4, no match:
    #             a false positive, and the target's B is a false negative; a segment of class 2: 3 pixels of B and
    #             the 2 void ones: 2 of 5 are not more than half, so it is a false positive too.
    # class 0: PQ = 6/7. class 1: 1 match, 1 FP, 1 FN -> PQ = 3/4 / 2, SQ = 3/4, RQ = 1/2. class 2: FP -> 0.
    target = np.array([1] * 6 + [2] * 4 + [3] * 4 + [0] * 2)
    prediction = np.array([5] * 7 + [6] * 3 + [7] + [8] * 3 + [8] * 2)
    metric = PanopticQuality(CLASSES, THINGS)
    metric.update(
        prediction,
        [{"id": i, "label_id": label, "score": 0.5} for i, label in ((5, 0), (6, 1), (7, 1), (8, 2))],
        target,
        [{"id": i, "category_id": label} for i, label in ((1, 0), (2, 1), (3, 1))],
    )
    scores = metric.compute()
    assert scores.per_class_pq == pytest.approx((6 / 7, 3 / 8, 0))
    assert scores.per_class_sq == pytest.approx((6 / 7, 3 / 4, 0))
    assert scores.per_class_rq == pytest.approx((1, 1 / 2, 0))
    assert (scores.matched, scores.false_positives, scores.false_negatives) == ((1, 1, 0), (0, 1, 1), (0, 1, 0))
    assert (scores.overall.classes, scores.things.classes, scores.stuff.classes) == (3, 2, 1)
    assert scores.overall.pq == pytest.approx((6 / 7 + 3 / 8) / 3)
    assert (scores.things.pq, scores.things.sq, scores.things.rq) == pytest.approx((3 / 16, 3 / 8, 1 / 4))
    assert scores.stuff.pq == pytest.approx(6 / 7)


def one(label: int, segment: int = 1, **more: object) -> dict:
    return {"id": segment, "label_id": label, **more}


def counts(prediction: list[int], segments: list[dict], target: list[int], wanted: list[dict]) -> list[list[int]]:
    metric = PanopticQuality(CLASSES, THINGS)
    metric.update(np.array(prediction), segments, np.array(target), wanted)
    return metric.state[0].tolist()


def test_an_iou_of_one_half_is_no_match() -> None:
    # 2 of 4 pixels: exactly 1/2. 3 pixels of 5 are more.
    assert counts([1, 1, 0, 0], [one(1)], [1] * 4, [one(1)]) == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert counts([1, 1, 1, 0, 0], [one(1)], [1] * 5, [one(1)]) == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_void_in_the_target_counts_for_nobody() -> None:
    # 1 of 2 target pixels, and 5 predicted void ones: the union is 2 without them, and 3 of 4 pixels would be 3/4.
    metric = PanopticQuality(CLASSES, THINGS)
    metric.update(np.array([1] * 9), [one(1)], np.array([1] * 4 + [0] * 5), [one(1)])
    assert metric.compute().per_class_pq[1] == 1.0


@pytest.mark.parametrize(("void", "false"), [(2, 1), (3, 0)])
def test_a_prediction_that_is_mostly_void_is_no_false_positive(void: int, false: int) -> None:
    target = [0] * void + [2] * (4 - void)
    found = counts([1] * 4 + [0], [one(1)], [*target, 2], [one(0, 2)])
    assert found[1] == [0, false, 0]
    assert found[2] == [1, 0, 0]


def test_a_crowd_excuses_predictions_of_its_class_alone() -> None:
    crowd = [one(1, 1, iscrowd=1)]
    assert counts([1] * 4, [one(1)], [1] * 4, crowd) == [[0] * 3, [0] * 3, [0] * 3]
    assert counts([1] * 4, [one(2)], [1] * 4, crowd) == [[0] * 3, [0, 0, 1], [0] * 3]
    # Void and crowd together are more than half.
    assert counts([1] * 5, [one(1)], [1, 1, 0, 2, 2], [*crowd, one(2, 2)])[1] == [0, 0, 0]


def pixels(ids: np.ndarray, segment: int) -> set[int]:
    return {place for place, value in enumerate(ids.flatten().tolist()) if value == segment}


def brute_force(images: list[tuple]) -> list[Fraction | None]:
    """PQ of each class from sets of pixels, as the COCO definition words it."""
    totals = [[Fraction(0), 0, 0, 0] for _ in range(CLASSES)]
    for prediction, segments, target, wanted in images:
        void = set(range(target.size)).difference(*(pixels(target, s["id"]) for s in wanted))
        matched = set()
        for real in wanted:
            if real.get("iscrowd"):
                continue
            hit = None
            for guess in segments:
                a, b = pixels(prediction, guess["id"]), pixels(target, real["id"])
                iou = Fraction(len(a & b), len((a - void) | b)) if (a - void) | b else Fraction(0)
                if guess["label_id"] == real["label_id"] and iou > Fraction(1, 2):
                    hit = (guess["id"], iou)
            if hit is None:
                totals[real["label_id"]][3] += 1
            else:
                matched.add(hit[0])
                totals[real["label_id"]][0] += hit[1]
                totals[real["label_id"]][1] += 1
        for guess in segments:
            if guess["id"] in matched:
                continue
            crowd = [
                pixels(target, s["id"]) for s in wanted if s.get("iscrowd") and s["label_id"] == guess["label_id"]
            ]
            a = pixels(prediction, guess["id"])
            if 2 * len(a & void.union(*crowd)) <= len(a):
                totals[guess["label_id"]][2] += 1
    sums = [(iou, Fraction(2 * tp + fp + fn, 2)) for iou, tp, fp, fn in totals]
    return [iou / total if total else None for iou, total in sums]


@st.composite
def panoptic_maps(draw: st.DrawFn) -> tuple:
    pixels = draw(st.integers(1, 30))
    target = np.array(draw(st.lists(st.integers(-1, 3), min_size=pixels, max_size=pixels)))
    changed = st.lists(st.sampled_from([None, None, None, None, -1, 0, 1, 2, 3]), min_size=pixels, max_size=pixels)
    prediction = np.array([old if new is None else new for old, new in zip(target, draw(changed), strict=True)])
    labels = draw(st.lists(st.integers(0, CLASSES - 1), min_size=4, max_size=4))
    guesses = [draw(st.sampled_from([label, label, label, 2])) for label in labels]
    crowds = draw(st.lists(st.sampled_from([0, 0, 1]), min_size=4, max_size=4))
    wanted = [one(label, i, iscrowd=crowd) for i, (label, crowd) in enumerate(zip(labels, crowds, strict=True))]
    segments = [one(label, i) for i, label in enumerate(guesses) if (prediction == i).any()]
    return prediction, segments, target, wanted


@given(st.lists(panoptic_maps(), min_size=1, max_size=4), st.randoms())
@settings(max_examples=80, deadline=None)
def test_equals_brute_force_for_any_merge_order(images: list[tuple], random) -> None:
    parts = []
    for image in images:
        part = PanopticQuality(CLASSES, THINGS)
        prediction, segments, target, wanted = image
        part.update(torch.tensor(prediction), segments, torch.tensor(target), wanted)
        parts.append(part)
    random.shuffle(parts)
    whole = PanopticQuality(CLASSES, THINGS)
    for part in parts:
        whole.merge(part)
    expected = brute_force(images)
    if whole.state[0].sum() == 0:
        assert expected == [None] * CLASSES
        return
    scores = whole.compute()
    assert scores.per_class_pq == pytest.approx([math.nan if v is None else float(v) for v in expected], nan_ok=True)
    known = [value for value in expected if value is not None]
    assert scores.overall.pq == pytest.approx(float(sum(known) / len(known)))
    for pq, sq, rq in zip(scores.per_class_pq, scores.per_class_sq, scores.per_class_rq, strict=True):
        assert pq == pytest.approx(sq * rq, nan_ok=True)


def test_reset_and_a_target_segment_without_pixels() -> None:
    metric = PanopticQuality(CLASSES, THINGS)
    metric.update(np.array([0]), [], np.array([0]), [one(1)])
    assert metric.state[0].tolist() == [[0] * 3, [0] * 3, [0, 1, 0]]
    assert math.isnan(metric.compute().stuff.pq)
    metric.reset()
    with pytest.raises(RuntimeError, match="There are 0 segments"):
        metric.compute()


def test_errors() -> None:
    ids, metric = np.array([1, 1]), PanopticQuality(CLASSES, THINGS)
    with pytest.raises(ValueError, match=r"`things` holds \[3\]"):
        PanopticQuality(3, [1, 3])
    with pytest.raises(ValueError, match="`num_classes` is 0"):
        PanopticQuality(0, [])
    with pytest.raises(ValueError, match=r"shape \(2,\) but `target` has \(3,\)"):
        metric.update(ids, [one(1)], np.array([1, 1, 1]), [one(1)])
    with pytest.raises(ValueError, match=r"target segments have the ids \[1, 1\]"):
        metric.update(ids, [one(1)], ids, [one(1), one(2)])
    with pytest.raises(ValueError, match=r"prediction segments are of the classes \[3\]"):
        metric.update(ids, [one(3)], ids, [one(1)])
    with pytest.raises(ValueError, match=r"prediction map holds the ids \[1\].*one of \[-1, 0\]"):
        metric.update(ids, [], ids, [one(1)])
    with pytest.raises(ValueError, match=r"predicted segments \[2\] have no pixels"):
        metric.update(ids, [one(1), one(1, 2)], ids, [one(1)])
    with pytest.raises(TypeError, match="`prediction` is of the type float64"):
        metric.update(np.zeros(2), [one(1)], ids, [one(1)])
    with pytest.raises(ValueError, match=r"\(3, \[1\]\), this metric \(3, \[1, 2\]\)"):
        metric.merge(PanopticQuality(3, [1]))
    assert metric.state[0].sum() == 0
