"""Configuration of CLIP's ResNet image encoder, the backbone of the original method.

This file travels with checkpoints as remote code: it imports nothing but transformers, huggingface_hub and siblings.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_limits import SIZES, check_size

BOTTLENECK_EXPANSION = 4


@strict
class CLIPResNetVisionConfig(PreTrainedConfig):
    r"""Configuration of a [`CLIPResNetVisionModel`]. The defaults are those of OpenAI's RN50.

    Args:
        depths (`list[int]`, *optional*, defaults to `[3, 4, 6, 3]`):
            Bottlenecks in each of the four stages.
        width (`int`, *optional*, defaults to 64):
            Inner channels of the first stage; each stage doubles them.
        projection_dim (`int`, *optional*, defaults to 1024):
            Width of the space shared with text.
        num_attention_heads (`int`, *optional*, defaults to 32):
            Heads of the attention pool.
        image_size (`int`, *optional*, defaults to 224):
            Side in pixels that the positions of the attention pool were trained for.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the image.
        inner_channels (`list[list[int]]`, *optional*):
            Of a pruned trunk: the channels between the first and the second, and between the second and the third
            convolution of every bottleneck, in order. Defaults to full width.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Deviation of random weights of the attention pool.
    """

    model_type = "clip_resnet_vision_model"

    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    projection_dim: int = 1024
    num_attention_heads: int = 32
    image_size: int = 224
    num_channels: int = 3
    inner_channels: list[list[int]] | tuple[tuple[int, int], ...] | None = None
    initializer_range: float = 0.02

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.width * BOTTLENECK_EXPANSION * 2 ** (len(self.depths) - 1)

    @property
    def bottlenecks(self) -> list[tuple[int, int]]:
        """Inner channels of every bottleneck, in order."""
        if self.inner_channels is not None:
            return [(first, second) for first, second in self.inner_channels]
        return [(self.width * 2**stage,) * 2 for stage, depth in enumerate(self.depths) for _ in range(depth)]

    def validate_trunk(self) -> None:
        """Part of `@strict`-powered validation."""
        where = "The ResNet has "
        check_size("width", self.width, 1, 2**12, where)
        check_size("num_attention_heads", self.num_attention_heads, 1, 2**12, where)
        for name in ("projection_dim", "image_size", "num_channels"):
            check_size(name, getattr(self, name), *SIZES[name], where=where)
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise ValueError(f"depths is {list(self.depths)}. It must hold four positive numbers. Correct it.")
        check_size("depths", max(self.depths), 1, 2**8, where)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}. It must divide the {self.hidden_size} channels "
                "of the last stage. Correct it."
            )
        if self.inner_channels is None:
            return
        full = [(self.width * 2**stage,) * 2 for stage, depth in enumerate(self.depths) for _ in range(depth)]
        given = self.inner_channels
        if len(given) != len(full) or any(len(pair) != 2 for pair in given):
            raise ValueError(
                f"inner_channels has {len(given)} entries. It must have two numbers for each of the {len(full)} "
                "bottlenecks. Correct it."
            )
        for index, (pair, most) in enumerate(zip(given, full, strict=True)):
            if not all(1 <= channels <= limit for channels, limit in zip(pair, most, strict=True)):
                raise ValueError(
                    f"inner_channels of bottleneck {index} is {list(pair)}. Each must lie in [1, {most[0]}]. "
                    "Correct it."
                )


__all__ = ["CLIPResNetVisionConfig"]
