"""What a frozen CLIP sees in the regions of a label map: the targets of GKC's queries."""

import copy
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import interpolate, normalize

from hf_opentrans.models.modeling_sparse_clip import SparseCLIPModel

GREY = 128 / 255  # of the background, before normalisation


class RegionTeacher(nn.Module):
    """A frozen copy of a CLIP's image encoder that embeds crops of regions.

    A region is all of a class in an image: everything else is painted grey, the rest is cropped to the box of the
    region and squeezed to a square (Han et al., arXiv 2303.09181). Nothing of it is trained.

    Args:
        clip: The CLIP; it is copied, not changed.
        image_processor: Its image processor: mean and deviation are taken from it.
        side: Of the squares in pixels. Defaults to the CLIP's `image_size`.
        max_regions: Of a batch; of more, a random choice is embedded.

    Raises:
        ValueError: If the CLIP lost the MLP of its last block, or `side` or `max_regions` do not fit.
    """

    grey: torch.Tensor

    def __init__(
        self, clip: SparseCLIPModel, image_processor: Any, *, side: int | None = None, max_regions: int = 200
    ) -> None:
        super().__init__()
        tower = cast("Any", clip.vision_model.config)
        self.side, self.max_regions = int(tower.image_size) if side is None else side, max_regions
        if self.side <= 0 or self.side % tower.patch_size:
            raise ValueError(
                f"side is {self.side}. It must be a positive multiple of the patch size {tower.patch_size}. Correct "
                "it."
            )
        if max_regions <= 0:
            raise ValueError(f"max_regions is {max_regions}. It must be positive. Correct it.")
        if clip.config.segmentation_cut:
            raise ValueError(
                "The CLIP lost the MLP of its last block, which its segmentation mode does not read. The embedding of "
                "an image needs it. Give the uncut CLIP, or set distillation to 'none'."
            )
        self.vision_model = copy.deepcopy(clip.vision_model)
        self.visual_projection = copy.deepcopy(clip.visual_projection)
        mean, std = (torch.tensor(part)[:, None, None] for part in _normalisation(image_processor))
        self.register_buffer("grey", (GREY - mean) / std)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def embed(self, pixel_values: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> list[torch.Tensor]:
        """Return for every image one unit embedding per class that is present, ascending, `(classes, dim)`.

        The row of a region that is not embedded is zero: it was not among those chosen, or it is too small to have a
        pixel of the image. `GKCForSegmentation` leaves such rows out.

        Args:
            pixel_values: Normalised images, `(batch_size, 3, height, width)`.
            labels: Class of every pixel, `(batch_size, label_height, label_width)`.
            ignore_index: Label of pixels that do not count.
        """
        self.to(pixel_values.device)
        labels = labels.to(pixel_values.device)
        present = [image[image != ignore_index].unique() for image in labels]
        at_pixels = interpolate(labels[:, None].double(), size=pixel_values.shape[-2:], mode="nearest-exact")[:, 0]
        regions = [(image, int(label)) for image, ids in enumerate(present) for label in ids]
        masks = [at_pixels[image] == label for image, label in regions]
        chosen = [index for index, mask in enumerate(masks) if bool(mask.any())]
        if len(chosen) > self.max_regions:
            chosen = [chosen[int(index)] for index in torch.randperm(len(chosen))[: self.max_regions]]
        rows = pixel_values.new_zeros(len(regions), self.visual_projection.weight.shape[0], dtype=torch.float32)
        if chosen:
            crops = [self.crop(pixel_values[regions[index][0]], masks[index]) for index in chosen]
            rows[chosen] = self._embed(torch.stack(crops))
        return list(rows.split([len(ids) for ids in present]))

    def crop(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the region of an image as a square, the pixels around it grey, `(3, side, side)`.

        Args:
            image: Normalised, `(3, height, width)`.
            mask: Of the region, boolean, `(height, width)`, true somewhere.
        """
        rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
        box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        painted = torch.where(mask, image, self.grey.to(image))[(slice(None), *box)]
        size = (self.side, self.side)
        return interpolate(painted[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]

    def _embed(self, crops: torch.Tensor) -> torch.Tensor:
        crops = crops.to(self.visual_projection.weight.dtype)
        tower: Any = self.vision_model
        pooled = tower(pixel_values=crops, interpolate_pos_encoding=True).pooler_output
        return normalize(self.visual_projection(pooled).float(), dim=-1)


def _normalisation(image_processor: Any) -> tuple[list[float], list[float]]:
    """Return mean and deviation of the channels."""
    if not getattr(image_processor, "do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return list(image_processor.image_mean), list(image_processor.image_std)


__all__ = ["RegionTeacher"]
