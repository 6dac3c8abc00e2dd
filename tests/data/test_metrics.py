"""Mean IoU: golden value, equality with brute force, and independence of batching and order."""

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_opentrans.data import metrics
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


@given(label_maps())
@settings(max_examples=60, deadline=None)
def test_classes_that_are_only_predicted_count_by_rule(maps: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, target = maps
    iou, _, _ = brute_force(prediction, target)
    in_target = [bool((target == c).any()) for c in range(CLASSES)]
    metric = MeanIoU(CLASSES, absent="ignore")
    metric.update(prediction, target)
    scores = metric.compute()
    expected = [value if there else math.nan for value, there in zip(iou, in_target, strict=True)]
    assert scores.per_class_iou == pytest.approx(expected, nan_ok=True)
    assert scores.mean_iou == pytest.approx(np.mean([value for value in expected if not math.isnan(value)]))
    assert scores.absent == "ignore"
    labelled = prediction[target >= 0]
    assert scores.target_pixels == tuple((target == c).sum() for c in range(CLASSES))
    assert scores.predicted_pixels == tuple((labelled == c).sum() for c in range(CLASSES))


def test_the_rules_differ_as_in_the_libraries() -> None:
    # Class 0: 2 of 3 pixels; class 1 is predicted once and nowhere in the target. mmsegmentation: (2/3 + 0) / 2.
    means = {}
    for absent in ("zero", "ignore"):
        metric = MeanIoU(3, absent=absent)
        metric.update(np.array([0, 0, 1]), np.array([0, 0, 0]))
        means[absent] = metric.compute().mean_iou
    assert means == pytest.approx({"zero": 1 / 3, "ignore": 2 / 3})
    default = MeanIoU(3)
    assert default.absent == "zero"
    with pytest.raises(ValueError, match="`absent` is 'nan'"):
        MeanIoU(3, absent="nan")  # type: ignore[arg-type]


def test_table_of_the_classes() -> None:
    metric = MeanIoU(3)
    metric.update(np.array([0, 0, 1]), np.array([0, 0, 0]))
    header, cells = metric.compute().per_class_table(["sky", "sea", "sand"])
    assert header == ["class", "IoU", "accuracy", "target pixels", "predicted pixels"]
    assert cells == [["sky", "66.7%", "66.7%", "3", "2"], ["sea", "0.0%", "-", "0", "1"], ["sand", "-", "-", "0", "0"]]
    with pytest.raises(ValueError, match="2 `names` for 3 classes"):
        metric.compute().per_class_table(["sky", "sea"])


def by_pairs(prediction: np.ndarray, target: np.ndarray, classes: int, ignored: int) -> np.ndarray:
    """Count pixel by pixel."""
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    for row, column in zip(target.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        counts[classes if row == ignored else row, classes if column == ignored else column] += 1
    return counts


TYPES = ["uint8", "int8", "uint16", "int16", "int32", ">i4", "uint32", "int64"]
CASES = [(4, -1), (4, 4), (4, 255), (150, 255), (150, -100), (255, 255), (300, -1), (300, 300), (300, 65535)]
CASES += [(600, -(2**31)), (256, -1), (1, 255), (20, 1000)]


@pytest.mark.parametrize(("classes", "ignored"), CASES)
def test_every_type_that_can_hold_the_ids(classes: int, ignored: int) -> None:
    rng = np.random.default_rng(classes)
    used = 0
    for ours in TYPES:
        for theirs in TYPES:
            maps = []
            for name in (ours, theirs):
                limits = np.iinfo(name)
                ids = rng.integers(0, min(classes, limits.max + 1), (9, 31))
                ids[rng.random(ids.shape) < 0.2] = ignored if limits.min <= ignored <= limits.max else 0
                maps.append(ids.astype(name))
            metric = MeanIoU(classes, ignored)
            prediction, target = maps
            metric.update(prediction, target)
            expected = by_pairs(prediction, target, classes, ignored)
            assert np.array_equal(metric.state.numpy(), expected), (ours, theirs)
            used += int((expected[-1].sum() > 0) and (expected[:, -1].sum() > 0))
    assert used > 0


def test_a_byte_that_is_no_class_is_found_out() -> None:
    good = np.array([0, 1, 255], np.uint8)
    metric = MeanIoU(2, 255)
    metric.update(good, good)
    with pytest.raises(ValueError, match=r"`target` holds \[7, 254\].*0 to 1"):
        metric.update(good, np.array([0, 7, 254], np.uint8))
    with pytest.raises(ValueError, match=r"`prediction` holds \[2\].*0 to 1"):
        metric.update(np.array([255, 2, 0], np.uint8), good)
    assert metric.state.sum() == 3  # what was refused is not counted in part


def test_memory_does_not_grow_and_states_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    whole, sizes = MeanIoU(CLASSES), set()
    states = []
    for _ in range(5):
        prediction, target = torch.randint(-1, CLASSES, (2, 3, 8, 8), generator=generator)
        part = MeanIoU(CLASSES)
        part.update(prediction, target)
        whole.update(prediction, target)
        states.append(part.state)
        sizes.add(sum(value.numel() for value in vars(whole).values() if isinstance(value, torch.Tensor)))
    assert sizes == {(CLASSES + 1) ** 2}
    gathered = MeanIoU(CLASSES)
    gathered.add_state(torch.stack(states).sum(0))
    assert torch.equal(gathered.state, whole.state)
    assert (whole.state.dtype, whole.state.shape) == (torch.int64, (CLASSES + 1, CLASSES + 1))
    whole.state.zero_()  # a copy
    assert whole.state.sum() > 0
    for wrong in (states[0][1:], states[0].float(), -1 - states[0]):
        with pytest.raises(ValueError, match="must be the `state` of a metric"):
            gathered.add_state(wrong)


# The metrics of every process, and what all of them hold after the sum.
SCRIPT = """
import multiprocessing
import sys
import torch
import torch.distributed as dist
from hf_opentrans.data.boundary import BoundaryIoU
from hf_opentrans.data.metric_loading import MeanIoUStream
from hf_opentrans.data.metrics import MeanIoU
from hf_opentrans.data.panoptic import PanopticQuality

def count(folder, rank, world):
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    iou, outline, panoptic, stream = MeanIoU(4), BoundaryIoU(4), PanopticQuality(4, [1]), MeanIoUStream(4, -1)
    generator = torch.Generator().manual_seed(0)
    for index in range(3):  # an uneven share
        prediction, target = torch.randint(0, 4, (2, 6, 7), generator=generator)
        if index % world == rank:
            iou.update(prediction, target)
            outline.update(prediction, target)
            segments = [{"id": i, "label_id": 1} for i in range(4)]
            panoptic.update(prediction, segments, torch.where(target > 1, prediction, target), segments)
            stream.add(prediction[None], target[None])
    for metric in (iou, outline, panoptic):
        metric.sum_over_processes()
    found = {"iou": iou.state, "outline": outline.state, "panoptic": panoptic.state}
    found["stream"] = stream.compute(processes=world)["mean_iou"]
    torch.save(found, f"{folder}/{world}-{rank}.pt")

count(sys.argv[1], 0, 1)
context = multiprocessing.get_context("fork")  # what took seconds to import is there already
ran = [context.Process(target=count, args=(sys.argv[1], rank, 2)) for rank in range(2)]
for process in ran:
    process.start()
for process in ran:
    process.join()
sys.exit(max(process.exitcode != 0 for process in ran))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_count_what_one_counts(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(metrics.__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, *both = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for found in both:
        assert torch.equal(found["iou"], one["iou"])
        assert torch.equal(found["outline"], one["outline"])
        assert torch.equal(found["panoptic"][0], one["panoptic"][0])
        torch.testing.assert_close(found["panoptic"][1], one["panoptic"][1], rtol=1e-12, atol=0)
        assert found["stream"] == one["stream"]
    assert one["iou"].sum() == 3 * 42
    assert one["panoptic"][0].sum() > 0


def test_without_processes_the_sum_is_what_is_there() -> None:
    metric = MeanIoU(2)
    metric.update(np.array([0, 1]), np.array([1, 1]))
    before = metric.state
    metric.sum_over_processes()
    assert torch.equal(metric.state, before)
