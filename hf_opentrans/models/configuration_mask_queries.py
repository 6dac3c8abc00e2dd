"""What the configurations of all segmenters with mask queries have in common.

This file travels with checkpoints as remote code: it imports nothing but transformers, huggingface_hub and siblings.
"""

from typing import Any, cast

from huggingface_hub.dataclasses import strict

from .configuration_limits import check_number, check_size
from .configuration_sparse_clip import SparseCLIPConfig

PYRAMID_LEVELS = 4
NORM_GROUPS = 32  # of the group norms in transformers' pixel decoder
# Greatest value of each; they are positive.
_MOST = {"hidden_dim": 2**14, "num_queries": 2**16, "encoder_layers": 2**8, "decoder_layers": 2**8}
_MOST |= {"feedforward_dim": 2**18, "num_attention_heads": 2**12, "train_num_points": 2**24}
_WEIGHTS = ("class_weight", "mask_weight", "dice_weight", "no_object_weight")


@strict
class MaskQueriesConfig(SparseCLIPConfig):
    r"""A [`SparseCLIPConfig`] with mask queries; [`FCCLIPConfig`] and [`GKCConfig`] say what classifies them.

    Args:
        hidden_dim (`int`, *optional*, defaults to 256):
            Width of the pyramid, the pixel decoder, the queries and the mask features; a multiple of 32.
        num_queries (`int`, *optional*, defaults to 100):
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
    """

    hidden_dim: int = 256
    num_queries: int = 100
    encoder_layers: int = 6
    decoder_layers: int = 9
    feedforward_dim: int = 2048
    num_attention_heads: int = 8
    feature_layers: list[int] | tuple[int, ...] | None = None
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    no_object_weight: float | int = 0.1
    train_num_points: int = 12544
    semantic_loss_ignore_index: int = 255

    def __post_init__(self, **kwargs: Any) -> None:
        # A list, as the saved file gives it back.
        self.feature_layers = list(self.feature_layers) if self.feature_layers is not None else None
        super().__post_init__(**kwargs)

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """Layers that the pyramid reads, counted from 1."""
        if self.feature_layers is not None:
            return tuple(self.feature_layers)
        layers = cast("Any", self.vision_config).num_hidden_layers
        return tuple(max(1, round(layers * level / PYRAMID_LEVELS)) for level in range(1, PYRAMID_LEVELS + 1))

    def __eq__(self, other: object) -> bool:
        return SparseCLIPConfig.__eq__(self, other)  # the dataclass would bring its own

    def validate_mask_queries(self) -> None:
        """Part of `@strict`-powered validation."""
        for name, most in _MOST.items():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}. It must be positive. Correct it.")
            check_size(name, getattr(self, name), 1, most)
        if self.hidden_dim % NORM_GROUPS:
            raise ValueError(
                f"hidden_dim is {self.hidden_dim}. It must be a multiple of {NORM_GROUPS}, the groups of the pixel "
                "decoder's norms. Correct it."
            )
        if self.hidden_dim % self.num_attention_heads:
            raise ValueError(
                f"hidden_dim is {self.hidden_dim}, with num_attention_heads={self.num_attention_heads}. The heads "
                "must divide the width. Correct one of them."
            )
        layers = getattr(self.vision_config, "num_hidden_layers", None)
        if self.feature_layers is None or not layers:
            return
        if len(self.feature_layers) not in (1, PYRAMID_LEVELS) or not all(
            1 <= n <= layers for n in self.feature_layers
        ):
            raise ValueError(
                f"feature_layers is {self.feature_layers}. It must hold {PYRAMID_LEVELS} integers, or one, in "
                f"[1, {layers}]. Correct it."
            )

    def validate_mask_losses(self) -> None:
        """Part of `@strict`-powered validation."""
        for name in _WEIGHTS:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}. It must not be negative. Correct it.")
            check_number(name, getattr(self, name), 0.0, 1e6)
        if not self.class_weight + self.mask_weight + self.dice_weight:
            raise ValueError(
                "class_weight, mask_weight and dice_weight are all zero. There would be nothing to match queries by. "
                "Raise one of them."
            )


__all__ = ["MaskQueriesConfig"]
