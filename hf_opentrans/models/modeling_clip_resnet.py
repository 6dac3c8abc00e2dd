"""CLIP's ResNet image encoder (Radford et al. 2021): the backbone that the original method prunes and fine-tunes.

A ResNet with three stem convolutions, average pooling instead of strides (all convolutions but the first have stride
1), and attention instead of the last pooling. transformers has no such model. Weights are named as in OpenAI's
checkpoints without their "visual."; names of timm are translated. The inner channels of every bottleneck may be fewer
than the dense model's. This file travels with checkpoints as remote code.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import interpolate, normalize, relu, scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_clip_resnet import BOTTLENECK_EXPANSION, CLIPResNetVisionConfig


class CLIPResNetBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution around a shortcut; a stride is an average pooling."""

    def __init__(self, inputs: int, inner: tuple[int, int], outputs: int, stride: int) -> None:
        super().__init__()
        first, second = inner
        self.conv1 = nn.Conv2d(inputs, first, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(second, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            # Named as in the checkpoints: "-1" has no weights.
            parts = [("-1", nn.AvgPool2d(stride)), ("0", nn.Conv2d(inputs, outputs, 1, bias=False))]
            self.downsample = nn.Sequential(OrderedDict([*parts, ("1", nn.BatchNorm2d(outputs))]))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, inputs, height, width)` to `(batch_size, outputs, height / stride, width / stride)`."""
        inner = relu(self.bn1(self.conv1(hidden_states)))
        inner = self.avgpool(relu(self.bn2(self.conv2(inner))))
        shortcut = hidden_states if self.downsample is None else self.downsample(hidden_states)
        return relu(self.bn3(self.conv3(inner)) + shortcut)


class CLIPResNetAttentionPool(nn.Module):
    """Attention of the mean of all positions to the positions; projects into the space shared with text."""

    def __init__(self, config: CLIPResNetVisionConfig) -> None:
        super().__init__()
        self.side, width = config.image_size // 32, config.hidden_size
        self.num_heads = config.num_attention_heads
        self.positional_embedding = nn.Parameter(torch.zeros(self.side**2 + 1, width))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, config.projection_dim)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Return the positions of a grid, `(1 + height * width, channels)`: bicubic, the pooled token's first."""
        if (height, width) == (self.side, self.side):
            return self.positional_embedding
        pooled, grid = self.positional_embedding[:1], self.positional_embedding[1:]
        square = grid.T.unflatten(1, (self.side, self.side))[None]
        resized = interpolate(square.float(), size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([pooled, resized[0].flatten(1).T.to(grid.dtype)])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, channels, height, width)` to `(batch_size, projection_dim)`."""
        tokens = features.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positions(*features.shape[2:])
        q, k, v = (
            part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part, x in ((self.q_proj, tokens[:, :1]), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        return self.c_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]

    def dense(self, features: torch.Tensor) -> torch.Tensor:
        """Project every position by itself, without attention (MaskCLIP, arXiv 2112.01071)."""
        projected = self.c_proj(self.v_proj(features.flatten(2).transpose(1, 2)))
        return projected.transpose(1, 2).unflatten(2, features.shape[2:])


class CLIPResNetVisionModel(PreTrainedModel):
    """CLIP's ResNet trunk with its attention pool."""

    config: CLIPResNetVisionConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = CLIPResNetVisionConfig
    base_model_prefix = "visual"
    main_input_name = "pixel_values"
    _no_split_modules = ["CLIPResNetBottleneck"]

    def __init__(self, config: CLIPResNetVisionConfig) -> None:
        super().__init__(config)
        half = config.width // 2
        self.conv1 = nn.Conv2d(config.num_channels, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, config.width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(config.width)
        self.avgpool = nn.AvgPool2d(2)
        inner, inputs = iter(config.bottlenecks), config.width
        stages = []
        for stage, depth in enumerate(config.depths):
            outputs = config.width * BOTTLENECK_EXPANSION * 2**stage
            blocks = []
            for block in range(depth):
                blocks.append(CLIPResNetBottleneck(inputs, next(inner), outputs, 2 if stage and not block else 1))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.attnpool = CLIPResNetAttentionPool(config)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Return the map of the last stage and the image's embedding.

        Args:
            pixel_values: Images of shape `(batch_size, 3, height, width)`; both sides at least 32.
            output_hidden_states: Whether to return the maps of all four stages too, strides 4, 8, 16 and 32.
            **kwargs: Ignored.

        Returns:
            `last_hidden_state` of shape `(batch_size, 8 width * 4, height / 32, width / 32)` and `pooler_output` of
            shape `(batch_size, projection_dim)`, not normalised.

        Raises:
            ValueError: If a side is shorter than 32 pixels.
        """
        if min(pixel_values.shape[-2:]) < 32:
            raise ValueError(
                f"The image is {pixel_values.shape[-2]} x {pixel_values.shape[-1]} pixels. Both sides must be at "
                "least 32, one position of the last stage. Enlarge it."
            )
        hidden = relu(self.bn1(self.conv1(pixel_values)))
        hidden = relu(self.bn2(self.conv2(hidden)))
        hidden = self.avgpool(relu(self.bn3(self.conv3(hidden))))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden = stage(hidden)
            maps.append(hidden)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden,
            pooler_output=self.attnpool(hidden),
            hidden_states=cast("Any", tuple(maps)) if output_hidden_states else None,
        )

    def get_dense_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return unit embeddings of all positions, `(batch_size, projection_dim, height / 32, width / 32)`."""
        return normalize(self.attnpool.dense(cast("torch.Tensor", self(pixel_values).last_hidden_state)), dim=1)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], **options: Any) -> "CLIPResNetVisionModel":
        """Build the model from the weights of an OpenAI, open_clip or timm checkpoint; the sizes are read from them.

        Args:
            state: Weights, with or without "visual."; those of a text tower are left out.
            **options: Fields of the configuration that weights do not tell, such as `num_attention_heads`.

        Raises:
            ValueError: If weights are missing, left over or of other shapes.
        """
        weights = canonical_names(state)
        try:
            depths = [
                1 + max(int(name.split(".")[1]) for name in weights if name.startswith(f"layer{stage}."))
                for stage in (1, 2, 3, 4)
            ]
            width, positions = weights["conv3.weight"].shape[0], weights["attnpool.positional_embedding"].shape
            projection = weights["attnpool.c_proj.weight"].shape[0]
        except (KeyError, ValueError) as err:
            raise ValueError(
                f"The weights are not those of a CLIP ResNet: {err}. They need conv1 to conv3, layer1 to layer4 and "
                "attnpool, as OpenAI names them. Give the state dict of such a model."
            ) from err
        inner = [
            [weights[f"layer{stage}.{block}.conv{number}.weight"].shape[0] for number in (1, 2)]
            for stage, depth in enumerate(depths, 1)
            for block in range(depth)
        ]
        values = {"depths": depths, "width": width, "projection_dim": projection, "inner_channels": inner}
        values |= {"num_attention_heads": positions[1] // 64, "image_size": 32 * round((positions[0] - 1) ** 0.5)}
        full = CLIPResNetVisionConfig(**{**values, "inner_channels": None, **options})
        pruned = [tuple(pair) for pair in inner] != full.bottlenecks
        model = cls(CLIPResNetVisionConfig(**{**values, **options}) if pruned else full)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise ValueError(
                f"The weights are not those of a CLIP ResNet: {len(missing)} are missing ({missing[:2]}) and "
                f"{len(unexpected)} are foreign ({unexpected[:2]}). Give the state dict of such a model."
            )
        return model.eval()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(cast("torch.Tensor", module.running_mean))
            init.ones_(cast("torch.Tensor", module.running_var))
            init.zeros_(cast("torch.Tensor", module.num_batches_tracked))
        elif isinstance(module, CLIPResNetAttentionPool):
            init.normal_(module.positional_embedding, std=self.config.hidden_size**-0.5)


def canonical_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the image encoder's weights under OpenAI's names without "visual."; translates timm's names."""
    has_prefix = any(name.startswith("visual.") for name in state)
    found = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    weights = found if has_prefix else dict(state)
    return {_from_timm(name): value for name, value in weights.items()}


def _from_timm(name: str) -> str:
    name = re.sub(r"^stem\.conv(\d)\.(conv|bn)\.", lambda m: f"{m[2]}{m[1]}.", name)
    name = re.sub(r"^stages\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}.", name)
    name = re.sub(r"\.conv(\d)_(?:1x1|kxk)\.(conv|bn)\.", lambda m: f".{m[2]}{m[1]}.", name)
    name = re.sub(r"\.shortcut\.conv\.(conv|bn)\.", lambda m: f".downsample.{0 if m[1] == 'conv' else 1}.", name)
    name = re.sub(r"^head\.(q|k|v)\.", r"attnpool.\1_proj.", name)
    return name.replace("head.pos_embed", "attnpool.positional_embedding").replace("head.proj.", "attnpool.c_proj.")


__all__ = ["CLIPResNetVisionModel"]
