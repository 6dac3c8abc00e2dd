"""Label rules: exact tables against independent sources, and errors instead of wrong classes."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import hf_opentrans
from hf_opentrans.data.label_rules import (
    CITYSCAPES_LABEL_IDS,
    COCO_CATEGORIES,
    COCO_STUFF_RAW,
    VOC_20,
    VOC_21,
    LabelRule,
    contiguous,
    reduce_zero,
)

VOCABULARIES = Path(hf_opentrans.__file__).parent / "assets" / "vocabularies"
# labels.py of cityscapesScripts: the trainId of the ids 0 to 33, where 255 means ignored.
CITYSCAPES_TABLE = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
CITYSCAPES_TABLE += [255, 255, 16, 17, 18]


def apply(rule, *ids):
    return rule.apply(np.array(ids)).tolist()


def listed_ids(name, key="id"):
    return [entry[key] for entry in json.loads((VOCABULARIES / f"{name}.json").read_text("utf-8"))["classes"]]


@given(
    st.integers(1, 255).flatmap(lambda n: st.tuples(st.just(n), arrays(np.uint8, (3, 5), elements=st.integers(0, n))))
)
def test_reduce_zero_equals_a_plain_loop(case):
    num_classes, ids = case
    expected = [[-1 if i == 0 else i - 1 for i in row] for row in ids.tolist()]
    positions = reduce_zero(num_classes).apply(ids)
    assert positions.tolist() == expected
    assert positions.dtype == np.int64


@given(arrays(np.uint16, (7,), elements=st.sampled_from([0, 1, 254, 255, 256, 458, 459])))
def test_reduce_zero_of_16_bits(ids):
    assert reduce_zero(459).apply(ids).tolist() == [int(i) - 1 for i in ids]


def test_argument_is_not_changed():
    ids = np.array([0, 1], np.uint8)
    reduce_zero(1).apply(ids)
    assert ids.tolist() == [0, 1]


def test_contiguous():
    assert apply(contiguous(150), 0, 149, 255) == [0, 149, -1]
    assert apply(contiguous(847, 65535), 0, 255, 846, 65535) == [0, 255, 846, -1]
    assert contiguous(847, 65535).num_classes == 847


def test_voc_with_and_without_background():
    assert apply(VOC_21, 0, 1, 20, 255) == [0, 1, 20, -1]
    assert apply(VOC_20, 0, 1, 20, 255) == [-1, 0, 19, -1]
    assert (VOC_20.num_classes, VOC_21.num_classes) == (20, 21)


def test_cityscapes_follows_the_official_table():
    assert len(CITYSCAPES_TABLE) == 34
    expected = [-1 if i == 255 else i for i in CITYSCAPES_TABLE]
    assert apply(CITYSCAPES_LABEL_IDS, *range(34)) == expected
    listed = json.loads((VOCABULARIES / "cityscapes_19.json").read_text("utf-8"))["label_ids"]
    assert apply(CITYSCAPES_LABEL_IDS, *listed) == list(range(19))


def test_coco_stuff_raw_ids_are_the_category_ids_minus_one():
    raw = [i - 1 for i in listed_ids("coco_stuff_171")]
    assert apply(COCO_STUFF_RAW, *raw) == list(range(171))
    # Three pairs of mmsegmentation's table.
    assert apply(COCO_STUFF_RAW, 0, 91, 181, 255) == [0, 80, 170, -1]
    for unused in set(range(182)) - set(raw):
        with pytest.raises(ValueError, match=rf"\[{unused}\]"):
            apply(COCO_STUFF_RAW, unused)


def test_coco_categories_are_those_of_the_list():
    assert apply(COCO_CATEGORIES, *listed_ids("coco_panoptic_133")) == list(range(133))
    assert apply(COCO_CATEGORIES, 0, 1, 90, 92, 200) == [-1, 0, 79, 80, 132]


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        (reduce_zero(150), 151),
        (reduce_zero(150), -1),
        (contiguous(19), 19),
        (contiguous(19), 256),
        (contiguous(847, 65535), 255 * 256),
        (VOC_20, 21),
        (CITYSCAPES_LABEL_IDS, 34),
        (CITYSCAPES_LABEL_IDS, 255),
        (COCO_CATEGORIES, 12),
        (COCO_CATEGORIES, 201),
    ],
)
def test_id_outside_of_the_rule_names_file_and_id(rule, wrong):
    valid = int(np.flatnonzero(rule.lookup >= 0)[0])
    with pytest.raises(ValueError, match=rf"^mask\.png holds the pixel values \[{wrong}\]\. .* rule: .* ignored"):
        rule.apply(np.array([[valid, wrong]]), "mask.png")


def test_ids_must_be_integers():
    with pytest.raises(TypeError, match=r"^mask\.png holds float64 values"):
        VOC_20.apply(np.array([1.0]), "mask.png")


@pytest.mark.parametrize(
    ("table", "ignored"), [({0: 0}, [0]), ({0: 0, 1: 2}, []), ({-1: 0}, []), ({1: 0}, [-1]), ({}, [])]
)
def test_contradictory_table(table, ignored):
    with pytest.raises(ValueError, match="'odd' is contradictory"):
        LabelRule.from_classes("odd", table, ignored)


def test_rule_is_frozen():
    with pytest.raises(ValueError, match="read-only"):
        VOC_20.lookup[0] = 3
    with pytest.raises(AttributeError):
        VOC_20.num_classes = 3  # pyright: ignore[reportAttributeAccessIssue]
