"""Instances and panoptic maps of masks made by hand."""

import pytest
import torch

from hf_opentrans import Vocabulary
from hf_opentrans.models.modeling_mask_queries import MaskQueriesOutput
from hf_opentrans.models.processing_masks import (
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
)

NAMES = Vocabulary(["sky", "cat; kitten"])


def outputs_of(probabilities, masks, vocabulary: Vocabulary | None = NAMES):
    """Return outputs of one image; masks are rows of digits, the mask probability in tenths."""
    rows = torch.tensor([[[int(digit) for digit in row] for row in mask.split()] for mask in masks])
    return MaskQueriesOutput(
        class_queries_logits=torch.tensor([probabilities]).log(),
        masks_queries_logits=(rows[None] / 10).clamp(0.001, 0.999).logit(),
        vocabulary=vocabulary,
    )


def test_panoptic_segments_compete():
    outputs = outputs_of(
        [[0.8, 0.1, 0.1], [0.1, 0.6, 0.3], [0.1, 0.1, 0.8]],
        ["9900 9900", "0999 0099", "9999 9999"],  # the last is "no object"
    )
    (result,) = post_process_panoptic_segmentation(outputs, overlap_mask_area_threshold=0.7)
    # Pixel (0, 1): 0.8 * 0.9 for the sky, 0.6 * 0.9 for the cat, which keeps 4 of its 5 pixels.
    assert result["segmentation"].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert not result["segmentation"].is_floating_point()
    assert result["segments_info"] == [
        {"id": 0, "label_id": 0, "label": "sky", "score": 0.8, "was_fused": False},
        {"id": 1, "label_id": 1, "label": "cat", "score": 0.6, "was_fused": False},
    ]


def test_panoptic_masks_that_lose_too_much_are_left_out():
    outputs = outputs_of([[0.8, 0.1, 0.1], [0.1, 0.6, 0.3]], ["9900 9900", "0999 0000"])
    (result,) = post_process_panoptic_segmentation(outputs)  # the cat keeps 2 of 3 pixels, and 0.8 is asked for
    assert [info["label"] for info in result["segments_info"]] == ["sky"]
    assert result["segmentation"].tolist() == [[0, 0, -1, -1], [0, 0, -1, -1]]
    (result,) = post_process_panoptic_segmentation(outputs, overlap_mask_area_threshold=0.6)
    assert result["segmentation"].tolist() == [[0, 0, 1, 1], [0, 0, -1, -1]]


def test_pixels_outside_of_the_winner_are_empty():
    outputs = outputs_of([[0.9, 0.05, 0.05]], ["9400"])
    (result,) = post_process_panoptic_segmentation(outputs, overlap_mask_area_threshold=0)
    assert result["segmentation"].tolist() == [[0, -1, -1, -1]]


def test_stuff_is_fused():
    outputs = outputs_of([[0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0.9, 0.05, 0.05]], ["9000", "0090", "0009"])
    (apart,) = post_process_panoptic_segmentation(outputs)
    assert apart["segmentation"].tolist() == [[0, -1, 1, 2]]
    (fused,) = post_process_panoptic_segmentation(outputs, label_ids_to_fuse={0})
    assert fused["segmentation"].tolist() == [[0, -1, 1, 0]]
    assert [info["was_fused"] for info in fused["segments_info"]] == [True, False]
    assert fused["segments_info"][0]["score"] == pytest.approx(0.9)
    outputs = outputs_of([[0.1, 0.8, 0.1], [0.1, 0.8, 0.1]], ["9000", "0009"])
    (things,) = post_process_panoptic_segmentation(outputs, label_ids_to_fuse=[0])
    assert things["segmentation"].tolist() == [[0, -1, -1, 1]]


def test_the_threshold_drops_doubtful_masks():
    outputs = outputs_of([[0.6, 0.2, 0.2], [0.1, 0.8, 0.1]], ["9900", "0099"])
    (result,) = post_process_panoptic_segmentation(outputs, threshold=0.7)
    assert result["segmentation"].tolist() == [[-1, -1, 0, 0]]
    (nothing,) = post_process_panoptic_segmentation(outputs, threshold=0.9)
    assert nothing["segmentation"].tolist() == [[-1] * 4]
    assert nothing["segments_info"] == []


def test_instances_may_share_a_class():
    outputs = outputs_of([[0.1, 0.8, 0.1], [0.1, 0.9, 0.0001]], ["9800", "0099"])
    (result,) = post_process_instance_segmentation(outputs)
    assert result["segmentation"].tolist() == [[1, 1, 0, 0]]  # the best first
    first, second = result["segments_info"]
    assert (first["label"], second["label"]) == ("cat", "cat")
    assert first["score"] == pytest.approx(0.9 / 1.0001 * 0.9, abs=1e-5)
    assert second["score"] == pytest.approx(0.8 * 0.85, abs=1e-5)  # the mean of 0.9 and 0.8 inside


def test_the_better_instance_is_on_top():
    outputs = outputs_of([[0.1, 0.7, 0.2], [0.9, 0.05, 0.05], [0.05, 0.85, 0.1]], ["9990", "0099", "9900"])
    (result,) = post_process_instance_segmentation(outputs, threshold=0.3)
    assert [info["label"] for info in result["segments_info"]] == ["sky", "cat"]  # the third cat is wholly covered
    assert result["segmentation"].tolist() == [[1, 1, 0, 0]]
    (whole,) = post_process_instance_segmentation(outputs, threshold=0.3, return_binary_maps=True)
    assert whole["segmentation"].int().tolist() == [[[0, 0, 1, 1]], [[1, 1, 0, 0]], [[1, 1, 1, 0]]]
    assert len(whole["segments_info"]) == 3


def test_no_instance():
    outputs = outputs_of([[0.1, 0.2, 0.7]], ["9900"])
    (result,) = post_process_instance_segmentation(outputs)
    assert (result["segmentation"].tolist(), result["segments_info"]) == ([[-1] * 4], [])
    (whole,) = post_process_instance_segmentation(outputs, return_binary_maps=True)
    assert whole["segmentation"].shape == (0, 1, 4)
    (empty,) = post_process_instance_segmentation(outputs_of([[0.9, 0.05, 0.05]], ["0000"]), threshold=0)
    assert empty["segments_info"] == []


@pytest.mark.parametrize("process", [post_process_instance_segmentation, post_process_panoptic_segmentation])
def test_sizes_and_names(process):
    outputs = outputs_of([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]], ["9900", "0099"], vocabulary=None)
    (result,) = process(outputs, target_sizes=[(2, 8)])
    left, right = (int(result["segmentation"][0, column]) for column in (0, 7))
    # The enlarged masks meet at zero probability: the two columns beside the border are in neither.
    assert result["segmentation"].tolist() == [[left] * 3 + [-1] * 2 + [right] * 3] * 2
    assert {info["id"]: info["label"] for info in result["segments_info"]} == {left: "0", right: "1"}


@pytest.mark.parametrize("process", [post_process_instance_segmentation, post_process_panoptic_segmentation])
def test_impossible_outputs_are_refused(process):
    outputs = outputs_of([[0.9, 0.05, 0.05]], ["99"])
    with pytest.raises(ValueError, match=r"There are 2 target sizes for 1 images. Give one"):
        process(outputs, [(4, 4)] * 2)
    with pytest.raises(ValueError, match=r"threshold is 1.5. It must lie in 0..1"):
        process(outputs, threshold=1.5)
    with pytest.raises(ValueError, match="The outputs hold no classes of masks"):
        process(MaskQueriesOutput(masks_queries_logits=outputs.masks_queries_logits))
    with pytest.raises(ValueError, match="overlap_mask_area_threshold is -1"):
        post_process_panoptic_segmentation(outputs, overlap_mask_area_threshold=-1)
