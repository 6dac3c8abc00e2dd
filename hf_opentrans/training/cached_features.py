"""What a frozen tower makes of crops, computed once: heads then train without it."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from .segmentation import SegmentationDataset


class FeatureModel(Protocol):
    """A segmenter that can be run in two steps."""

    def encode(self, pixel_values: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return what `forward` takes as `features` instead of images."""
        ...


class RegionEmbedder(Protocol):
    """Gives every region of an image an embedding."""

    def embed(self, pixel_values: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> Sequence[torch.Tensor]:
        """Return one tensor per image; see `RegionTeacher.embed`."""
        ...


class CachedFeatures(Dataset[dict[str, Any]]):
    """Features and labels of the crops of a data set, kept in half precision.

    Use it with `data_collator=collate_features`, and only where the tower does not train.

    Args:
        model: A segmenter; its tower is run once per crop, without gradients.
        dataset: The crops. For training they are those of its first `copies` epochs.
        copies: Crops per image.
        batch_size: Crops per pass through the tower.
        teacher: For frameworks that learn from embeddings of regions: gives them.

    Raises:
        ValueError: If there are no copies.
    """

    def __init__(
        self,
        model: Any,
        dataset: SegmentationDataset,
        *,
        copies: int = 1,
        batch_size: int = 16,
        teacher: RegionEmbedder | None = None,
    ) -> None:
        if copies < 1:
            raise ValueError(f"copies is {copies}. It must be at least 1. Correct it.")
        self.class_names, self.ignore_index = dataset.class_names, dataset.ignore_index
        self._samples: list[dict[str, Any]] = []
        for epoch in range(copies):
            dataset.set_epoch(epoch)
            for batch in DataLoader(dataset, batch_size):
                self._encode(model, batch, teacher)

    @torch.no_grad()
    def _encode(self, model: Any, batch: dict[str, torch.Tensor], teacher: RegionEmbedder | None) -> None:
        pixels = batch["pixel_values"].to(model.device)
        regions = None if teacher is None else teacher.embed(pixels, batch["labels"], self.ignore_index)
        maps = [part.half().cpu() for part in model.eval().encode(pixels)]
        for index, labels in enumerate(batch["labels"]):
            sample: dict[str, Any] = {"features": tuple(part[index] for part in maps), "labels": labels}
            if regions is not None:
                sample["region_embeddings"] = regions[index].cpu()
            self._samples.append(sample)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._samples[index]


def collate_features(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch: maps in single precision, labels, and, where there are any, embeddings of regions as a list."""
    batch: dict[str, Any] = {
        "features": [torch.stack(parts).float() for parts in zip(*(s["features"] for s in samples), strict=True)],
        "labels": torch.stack([sample["labels"] for sample in samples]),
    }
    if "region_embeddings" in samples[0]:
        batch["region_embeddings"] = [sample["region_embeddings"] for sample in samples]
    return batch
