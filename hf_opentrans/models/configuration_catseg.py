"""Configuration of a CLIP with CAT-Seg's cost aggregation.

This file travels with checkpoints as remote code: it imports nothing but transformers, huggingface_hub and siblings.
"""

from typing import Any, cast

from huggingface_hub.dataclasses import strict

from .configuration_limits import check_number, check_size
from .configuration_sparse_clip import SparseCLIPConfig

UP_BLOCKS = 2

# Greatest value of each; they are positive.
_MOST = dict.fromkeys(("cost_channels", "guidance_channels", "text_guidance_channels", "aggregation_heads"), 2**14)
_MOST |= {"aggregation_blocks": 2**8, "window_size": 2**14, "vocab_prefilter": 2**20, "classifier_scale": 1e6}


@strict
class CATSegConfig(SparseCLIPConfig):
    r"""Configuration of a [`CATSegForSegmentation`]: a [`SparseCLIPConfig`] with a cost aggregation.

    Args:
        cost_channels (`int`, *optional*, defaults to 128):
            Width of the embedded cost of a class, all through the aggregation.
        aggregation_blocks (`int`, *optional*, defaults to 2):
            Blocks of spatial and class aggregation.
        window_size (`int`, *optional*, defaults to 12):
            Side of the windows of the spatial aggregation, in patches. Smaller maps are one window.
        aggregation_heads (`int`, *optional*, defaults to 4):
            Attention heads of the aggregation; they divide `cost_channels`.
        decoder_channels (`list[int]`, *optional*, defaults to `[64, 32]`):
            Width of the two blocks of the decoder, each twice as fine as the one before. The maps of the tower that
            guide a block get half of its width.
        guidance_channels (`int`, *optional*, defaults to 128):
            Width of CLIP's dense tokens where they guide the spatial aggregation.
        text_guidance_channels (`int`, *optional*, defaults to 128):
            Width of the text embeddings where they guide the class aggregation.
        guidance_layers (`list[int]`, *optional*):
            Two layers of the vision tower, counted from 1, whose outputs guide the decoder: that of the fine block,
            and that of the coarse block. Defaults to a third and two thirds of the layers.
        vocab_prefilter (`int`, *optional*):
            Names that every image keeps for the aggregation: those with the highest cosine anywhere in it. The others
            get a very low logit, and do not count in the loss. Defaults to all.
        cost_residual (`bool`, *optional*, defaults to `True`):
            Whether the decoder adds to the cosines of CLIP's dense tokens (read in `segmentation_mode`), and begins
            with adding nothing: untrained, the model segments as CLIP does.
        classifier_scale (`float`, *optional*):
            Initial factor on these cosines; it is learned. Defaults to `segmentation_logit_scale`.
        classifier_bias (`float`, *optional*, defaults to 0.0):
            Initial offset of all logits; it is learned. The sigmoid of the loss asks for logits below zero where a
            class is absent: minus the scale times the mean cosine is a calm start. No class decision depends on it.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels that do not count.
    """

    model_type = "sparse_clip_catseg"
    readable_model_types = (model_type,)

    cost_channels: int = 128
    aggregation_blocks: int = 2
    window_size: int = 12
    aggregation_heads: int = 4
    decoder_channels: list[int] | tuple[int, ...] = (64, 32)
    guidance_channels: int = 128
    text_guidance_channels: int = 128
    guidance_layers: list[int] | tuple[int, ...] | None = None
    vocab_prefilter: int | None = None
    cost_residual: bool = True
    classifier_scale: float | int | None = None
    classifier_bias: float | int = 0.0
    semantic_loss_ignore_index: int = 255

    @property
    def initial_scale(self) -> float:
        """Factor on the cosines before training."""
        return float(self.segmentation_logit_scale if self.classifier_scale is None else self.classifier_scale)

    @property
    def tapped_layers(self) -> tuple[int, int]:
        """Layers whose outputs guide the fine and the coarse block of the decoder, counted from 1."""
        if self.guidance_layers is not None:
            fine, coarse = self.guidance_layers
            return fine, coarse
        layers = cast("Any", self.vision_config).num_hidden_layers
        return max(1, round(layers / 3)), max(1, round(2 * layers / 3))

    def __eq__(self, other: object) -> bool:
        return SparseCLIPConfig.__eq__(self, other)  # the dataclass would bring its own

    def validate_aggregation(self) -> None:
        """Part of `@strict`-powered validation."""
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and not value > 0:  # so written, NaN is refused too
                raise ValueError(f"{name} is {value}. It must be positive. Correct it.")
            check_number(name, value, 0, most)
        check_number("classifier_bias", self.classifier_bias, -1e6, 1e6)
        if self.cost_channels % self.aggregation_heads:
            raise ValueError(
                f"cost_channels is {self.cost_channels}, with aggregation_heads={self.aggregation_heads}. The heads "
                "must divide the channels. Correct one of them."
            )

    def validate_decoder(self) -> None:
        """Part of `@strict`-powered validation."""
        if len(self.decoder_channels) != UP_BLOCKS or min(self.decoder_channels) < 1:
            raise ValueError(
                f"decoder_channels is {self.decoder_channels}. It must hold two positive integers. Correct it."
            )
        check_size("decoder_channels", max(self.decoder_channels), 1, 2**14)
        layers = getattr(self.vision_config, "num_hidden_layers", None)
        if layers == 1:
            raise ValueError(
                "The vision tower has 1 layer. The decoder is guided by a layer before the last. Give a deeper tower."
            )
        if self.guidance_layers is None or not layers:
            return
        if len(self.guidance_layers) != UP_BLOCKS or not all(1 <= layer < layers for layer in self.guidance_layers):
            raise ValueError(
                f"guidance_layers is {self.guidance_layers}. It must hold two integers in [1, {layers - 1}]: layers "
                "before the last. Correct it."
            )


__all__ = ["CATSegConfig"]
