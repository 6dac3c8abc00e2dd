"""Configuration of a frozen CLIP with FC-CLIP's mask queries.

This file travels with checkpoints as remote code: it imports nothing but transformers, huggingface_hub and siblings.
"""

from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_mask_queries import MaskQueriesConfig
from .configuration_sparse_clip import SparseCLIPConfig


@strict
class FCCLIPConfig(MaskQueriesConfig):
    r"""Configuration of a [`FCCLIPForSegmentation`]: a [`SparseCLIPConfig`] with mask queries.

    Args:
        hidden_dim (`int`, *optional*, defaults to 256):
            Width of the pyramid, the pixel decoder, the queries and the mask features; a multiple of 32.
        num_queries (`int`, *optional*, defaults to 250):
            Masks proposed for every image.
        encoder_layers (`int`, *optional*, defaults to 6):
            Deformable attention layers of the pixel decoder.
        decoder_layers (`int`, *optional*, defaults to 9):
            Masked attention layers. transformers counts the prediction before the first layer too: this is
            `decoder_layers=10` of a `Mask2FormerConfig`.
        feedforward_dim (`int`, *optional*, defaults to 2048):
            Width of the feed-forward networks of the masked decoder; the pixel decoder's are half as wide.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Attention heads of both decoders; they divide `hidden_dim`.
        feature_layers (`list[int]`, *optional*):
            Layers of the vision tower, counted from 1, whose outputs the pyramid reads: four, the finest level first,
            or one for all levels. Defaults to the quarter points of the tower.
        ensemble_alpha (`float`, *optional*, defaults to 0.4):
            Weight of CLIP's own classification of a mask for seen classes.
        ensemble_beta (`float`, *optional*, defaults to 0.8):
            The same for unseen classes.
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
        seen_classes (`list[str]`, *optional*, defaults to `[]`):
            Names used in training, aliases joined by ";". A class of a vocabulary with one of them is seen.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels that do not count.
    """

    model_type = "sparse_clip_fcclip"
    readable_model_types = (model_type,)

    num_queries: int = 250
    ensemble_alpha: float | int = 0.4
    ensemble_beta: float | int = 0.8
    seen_classes: list[str] | tuple[str, ...] = ()

    def __post_init__(self, **kwargs: Any) -> None:
        # A list, as the saved file gives it back.
        self.seen_classes = list(self.seen_classes) if isinstance(self.seen_classes, tuple) else self.seen_classes
        super().__post_init__(**kwargs)

    @property
    def seen_names(self) -> frozenset[str]:
        """All names of all seen classes, without regard to case and spaces."""
        return frozenset(
            " ".join(name.split()).casefold()
            for entry in self.seen_classes
            for name in entry.split(";")
            if name.strip()
        )

    def __eq__(self, other: object) -> bool:
        return SparseCLIPConfig.__eq__(self, other)  # the dataclass would bring its own

    def validate_ensemble(self) -> None:
        """Part of `@strict`-powered validation."""
        for name in ("ensemble_alpha", "ensemble_beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}. It must lie in [0, 1]. Correct it.")


__all__ = ["FCCLIPConfig"]
