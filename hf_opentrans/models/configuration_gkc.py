"""Configuration of a CLIP with mask queries that learn from CLIP's view of the regions.

This file travels with checkpoints as remote code: it imports nothing but transformers, huggingface_hub and siblings.
"""

from huggingface_hub.dataclasses import strict

from .configuration_limits import check_number, check_size
from .configuration_mask_queries import MaskQueriesConfig
from .configuration_sparse_clip import SparseCLIPConfig

DISTILLATIONS = ("none", "vanilla", "vision")


@strict
class GKCConfig(MaskQueriesConfig):
    r"""Configuration of a [`GKCForSegmentation`]: a [`SparseCLIPConfig`] with mask queries, and what they learn from.

    Args:
        hidden_dim (`int`, *optional*, defaults to 256):
            Width of the pyramid, the pixel decoder, the queries and the mask features; a multiple of 32.
        num_queries (`int`, *optional*, defaults to 100):
            Masks proposed for every image.
        encoder_layers (`int`, *optional*, defaults to 6):
            Deformable attention layers of the pixel decoder.
        decoder_layers (`int`, *optional*, defaults to 9):
            Masked attention layers; the prediction before the first is not one of them.
        feedforward_dim (`int`, *optional*, defaults to 2048):
            Width of the feed-forward networks of the masked decoder; the pixel decoder's are half as wide.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Attention heads of both decoders; they divide `hidden_dim`.
        feature_layers (`list[int]`, *optional*):
            Layers of the vision tower, counted from 1, whose outputs the pyramid reads: four, the finest level first,
            or one for all levels. Defaults to the quarter points of the tower.
        class_weight (`float`, *optional*, defaults to 2.0):
            Weight of the cross-entropy, in the loss and in the matching.
        mask_weight (`float`, *optional*, defaults to 5.0):
            Weight of the binary cross-entropy of masks.
        dice_weight (`float`, *optional*, defaults to 5.0):
            Weight of the dice loss of masks.
        no_object_weight (`float`, *optional*, defaults to 0.1):
            Weight of queries without a mask in the cross-entropy.
        train_num_points (`int`, *optional*, defaults to 12544):
            Pixels on which masks are compared. Where an image has no more labelled pixels, all are.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels that do not count.
        distillation (`str`, *optional*, defaults to `"vision"`):
            What queries learn from CLIP's embeddings of their regions: `"vanilla"`, the embeddings themselves;
            `"vision"`, these and the relations that the class names have to each other; `"none"`, nothing.
        distillation_weight (`float`, *optional*, defaults to 2.0):
            Weight of the distillation, for each output of the decoder.
        max_regions (`int`, *optional*, defaults to 200):
            Regions of a batch that are distilled; where there are more, a random choice of so many.
        clip_residual (`bool`, *optional*, defaults to `False`):
            Whether queries add to the tower's own dense embedding, averaged over their masks, and begin with adding
            nothing: names that training never shows are then not lost, and few steps are enough. Otherwise they learn
            the embedding from scratch, as published.
    """

    model_type = "sparse_clip_gkc"
    readable_model_types = (model_type,)

    distillation: str = "vision"
    distillation_weight: float | int = 2.0
    max_regions: int = 200
    clip_residual: bool = False

    def __eq__(self, other: object) -> bool:
        return SparseCLIPConfig.__eq__(self, other)  # the dataclass would bring its own

    def validate_distillation(self) -> None:
        """Part of `@strict`-powered validation."""
        if self.distillation not in DISTILLATIONS:
            raise ValueError(
                f"distillation is {self.distillation!r}. It must be one of {', '.join(DISTILLATIONS)}. Correct it."
            )
        if self.distillation_weight < 0:
            raise ValueError(
                f"distillation_weight is {self.distillation_weight}. It must not be negative. Correct it."
            )
        if self.max_regions <= 0:
            raise ValueError(f"max_regions is {self.max_regions}. It must be positive. Correct it.")
        check_number("distillation_weight", self.distillation_weight, 0.0, 1e6)
        check_size("max_regions", self.max_regions, 1, 2**20)


__all__ = ["GKCConfig"]
