"""Features that a frozen tower computed once: what is kept, and that heads train on it as on images."""

import numpy as np
import pytest
import torch

from hf_opentrans import CATSegForSegmentation, DeepLabV3PlusForSegmentation, GKCForSegmentation
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.loading import load_dense_clip
from hf_opentrans.training import RegionTeacher, SegmentationDataset
from hf_opentrans.training.cached_features import CachedFeatures, collate_features

SMALL_QUERIES = {"hidden_dim": 32, "num_queries": 4, "encoder_layers": 1, "decoder_layers": 1, "feedforward_dim": 16}


@pytest.fixture
def clip(tiny_clip_folder):
    return load_dense_clip(str(tiny_clip_folder))


@pytest.fixture
def folder(write_segmentation_folder, tiny_images):
    """Return four images with two classes side by side."""

    def mask_of(image, _):
        return (np.arange(image.width) >= image.width // 2).astype(np.uint8)[None].repeat(image.height, 0)

    path = write_segmentation_folder({"train": tiny_images[:4]}, mask_of, {"id_to_name": {0: "cat", 1: "dog"}})
    return SegmentationFolder(path, "train")


def crops(folder, clip, **options):
    return SegmentationDataset(folder, clip[1].image_processor, resolution=32, **options)


@pytest.mark.parametrize("kind", [DeepLabV3PlusForSegmentation, CATSegForSegmentation, GKCForSegmentation])
def test_kept_features_give_the_loss_of_their_crops(clip, folder, kind):
    options = SMALL_QUERIES if kind is GKCForSegmentation else {}
    model = kind.from_clip(clip[0], **options).eval()
    data = CachedFeatures(model, crops(folder, clip), copies=2, batch_size=3)
    assert len(data) == 8
    text = torch.nn.functional.normalize(torch.randn(2, 16), dim=-1)
    batch = collate_features([data[index] for index in range(4, 8)])  # the second epoch's
    again = crops(folder, clip)
    again.set_epoch(1)
    pixels = torch.stack([again[index]["pixel_values"] for index in range(4)])
    assert torch.equal(batch["labels"], torch.stack([again[index]["labels"] for index in range(4)]))
    with torch.no_grad():
        torch.manual_seed(0)
        found = model(**batch, text_embeddings=text)
        torch.manual_seed(0)
        expected = model(pixels, text_embeddings=text, labels=batch["labels"])
    torch.testing.assert_close(found.loss, expected.loss, rtol=5e-3, atol=1e-4)  # kept in half precision
    torch.testing.assert_close(found.logits, expected.logits, rtol=2e-2, atol=5e-2)


def test_copies_are_other_crops(clip, folder):
    model = DeepLabV3PlusForSegmentation.from_clip(clip[0]).eval()
    data = CachedFeatures(model, crops(folder, clip), copies=2)
    assert not torch.equal(data[0]["features"][0], data[4]["features"][0])


def test_regions_travel_with_their_crops(clip, folder):
    model = GKCForSegmentation.from_clip(clip[0], **SMALL_QUERIES).eval()
    teacher = RegionTeacher(clip[0], clip[1].image_processor, side=32)
    data = CachedFeatures(model, crops(folder, clip), teacher=teacher)
    batch = collate_features([data[index] for index in range(3)])
    assert [len(rows) for rows in batch["region_embeddings"]] == [len(labels.unique()) for labels in batch["labels"]]
    text = torch.nn.functional.normalize(torch.randn(2, 16), dim=-1)
    with_regions = model(**batch, text_embeddings=text).loss
    del batch["region_embeddings"]
    assert with_regions > model(**batch, text_embeddings=text).loss


def test_no_copies_are_refused(clip, folder):
    with pytest.raises(ValueError, match=r"copies is 0. It must be at least 1"):
        CachedFeatures(DeepLabV3PlusForSegmentation.from_clip(clip[0]), crops(folder, clip), copies=0)
