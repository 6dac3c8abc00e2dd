"""Configuration of a CLIP with a DeepLabV3+ decoder.

This file travels with checkpoints as remote code: it imports nothing but transformers, huggingface_hub and siblings.
"""

from huggingface_hub.dataclasses import strict

from .configuration_limits import check_number, check_size
from .configuration_sparse_clip import SparseCLIPConfig

UNTRAINED_SCALE = 10.0  # random embeddings compared with names: a sharp softmax would be sure of nonsense


@strict
class DeepLabV3PlusConfig(SparseCLIPConfig):
    r"""Configuration of a [`DeepLabV3PlusForSegmentation`]: a [`SparseCLIPConfig`] with a decoder.

    Args:
        decoder_channels (`int`, *optional*, defaults to 256):
            Width of the pyramid and of the decoder.
        skip_channels (`int`, *optional*, defaults to 48):
            Width of the low-level features in the decoder.
        low_level_layer (`int`, *optional*):
            Layer of the vision tower after which the low-level features are taken, counted from 1. Defaults to a third
            of the layers.
        atrous_rates (`list[int]`, *optional*, defaults to `[3, 6, 9]`):
            Dilations of the pyramid, in patches.
        clip_residual (`bool`, *optional*, defaults to `True`):
            Whether the decoder adds to CLIP's own dense embedding (read in `segmentation_mode`), and begins with
            adding nothing. Otherwise it learns the embedding from scratch, as the reference does: names that training
            never shows are then out of reach.
        classifier_scale (`float`, *optional*):
            Initial factor on the cosines of pixels and names; it is learned. Defaults to `segmentation_logit_scale`
            with `clip_residual`, and to 10 without.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels that do not count.
    """

    model_type = "sparse_clip_deeplabv3plus"
    readable_model_types = (model_type,)

    decoder_channels: int = 256
    skip_channels: int = 48
    low_level_layer: int | None = None
    atrous_rates: list[int] | tuple[int, ...] = (3, 6, 9)
    clip_residual: bool = True
    classifier_scale: float | int | None = None
    semantic_loss_ignore_index: int = 255

    @property
    def initial_scale(self) -> float:
        """Factor on the cosines before training."""
        default = self.segmentation_logit_scale if self.clip_residual else UNTRAINED_SCALE
        return float(default if self.classifier_scale is None else self.classifier_scale)

    def __eq__(self, other: object) -> bool:
        return SparseCLIPConfig.__eq__(self, other)  # the dataclass would bring its own

    def validate_decoder(self) -> None:
        """Part of `@strict`-powered validation."""
        for name, most in (("decoder_channels", 2**14), ("skip_channels", 2**14), ("classifier_scale", 1e6)):
            value = getattr(self, name)
            if value is not None and not value > 0:  # so written, NaN is refused too
                raise ValueError(f"{name} is {value}. It must be positive. Correct it.")
            check_number(name, value, 0, most)
        if not self.atrous_rates or min(self.atrous_rates) < 1:
            raise ValueError(f"atrous_rates is {self.atrous_rates}. It must hold positive integers. Correct it.")
        check_size("the number of atrous_rates", len(self.atrous_rates), 1, 2**6)
        check_size("atrous_rates", max(self.atrous_rates), 1, 2**12)
        layers = getattr(self.vision_config, "num_hidden_layers", None)
        if self.low_level_layer is not None and layers and not 1 <= self.low_level_layer <= layers:
            raise ValueError(f"low_level_layer is {self.low_level_layer}. It must lie in [1, {layers}]. Correct it.")


__all__ = ["DeepLabV3PlusConfig"]
