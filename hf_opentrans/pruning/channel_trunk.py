"""The trunk of a CLIP ResNet: its bottlenecks, what they cost, and how they are sliced."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.functional import normalize, relu
from transformers.initialization import no_init_weights

from hf_opentrans.models.configuration_clip_resnet import CLIPResNetVisionConfig
from hf_opentrans.models.modeling_clip_resnet import CLIPResNetBottleneck, CLIPResNetVisionModel

STRIDE = 32  # pixels per position of the last stage
# Channels that one bottleneck keeps: between its first and second, and between its second and third convolution.
Kept = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Trunk:
    """A view of a model; shares its weights."""

    model: CLIPResNetVisionModel

    @property
    def bottlenecks(self) -> list[CLIPResNetBottleneck]:
        """The bottlenecks of all stages, first to last."""
        return [cast("CLIPResNetBottleneck", module) for module in self._named().values()]

    @property
    def names(self) -> list[str]:
        """Their names in the model."""
        return list(self._named())

    @property
    def widths(self) -> list[tuple[int, int]]:
        """The inner channels of every bottleneck."""
        return [(block.conv1.out_channels, block.conv2.out_channels) for block in self.bottlenecks]

    def _named(self) -> dict[str, nn.Module]:
        return {n: m for n, m in self.model.named_modules() if isinstance(m, CLIPResNetBottleneck)}

    def stem(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what the first bottleneck reads, `(batch_size, width, height / 4, width / 4)`."""
        model = self.model
        for conv, norm in ((model.conv1, model.bn1), (model.conv2, model.bn2), (model.conv3, model.bn3)):
            pixels = relu(norm(conv(pixels)))
        return model.avgpool(pixels)

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn the last stage into unit tokens `(batch_size, 1 + positions, dim)`, the image first."""
        pool = self.model.attnpool
        dense = pool.dense(hidden).flatten(2).transpose(1, 2)
        return normalize(torch.cat([pool(hidden)[:, None], dense], 1), dim=-1)


@dataclass(frozen=True)
class Observed:
    """What one bottleneck computed, and what went into and out of two of its convolutions.

    Args:
        output: Of the bottleneck.
        inputs: Of "conv2" and "conv3", by name.
        outputs: Of the same.
    """

    output: torch.Tensor
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


def observe(block: CLIPResNetBottleneck, hidden: torch.Tensor) -> Observed:
    """Run a bottleneck and note what its second and third convolution read and wrote."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def note(name: str) -> None:
        def hook(_: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs[name], outputs[name] = given[0], output

        handles.append(getattr(block, name).register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        note("conv2")
        note("conv3")
        return Observed(block(hidden), inputs, outputs)
    finally:
        for handle in handles:
            handle.remove()


def shortcut(block: CLIPResNetBottleneck, hidden: torch.Tensor) -> torch.Tensor:
    """Return what a bottleneck adds its convolutions' result to."""
    return hidden if block.downsample is None else block.downsample(hidden)


@dataclass(frozen=True)
class BottleneckCost:
    """What the three convolutions of one bottleneck cost.

    Args:
        unit: "macs" or "params".
        inputs, outputs: Channels of the residual stream before and after.
        positions: Of the first and second convolution; 1 for parameters.
        pooled: Of the third.
    """

    unit: str
    inputs: int
    outputs: int
    positions: int
    pooled: int

    def of(self, first: int, second: int) -> int:
        """Return the cost at these inner channels; the 3x3 convolution has 9 times their product."""
        return self.positions * first * (self.inputs + 9 * second) + self.pooled * second * self.outputs


@dataclass(frozen=True)
class TrunkCost:
    """What all convolutions cost: multiply-accumulates of one image, or weights.

    Args:
        bottlenecks: One cost per bottleneck.
        rest: Of the stem and of the shortcuts, which pruning does not touch.
    """

    bottlenecks: tuple[BottleneckCost, ...]
    rest: int

    @classmethod
    def of(cls, trunk: Trunk, unit: str, side: int) -> "TrunkCost":
        """Count a trunk.

        Args:
            trunk: Dense or pruned.
            unit: "macs" or "params".
            side: Of the square image in pixels, a multiple of 32.
        """
        counts_macs = unit == "macs"
        model, positions = trunk.model, (side // 2) ** 2
        stem = sum(conv.weight.numel() for conv in (model.conv1, model.conv2, model.conv3))
        rest = stem * (positions if counts_macs else 1)
        positions, costs = positions // 4, []
        for block in trunk.bottlenecks:
            pooled = positions // (4 if isinstance(block.avgpool, nn.AvgPool2d) else 1)
            inputs, outputs = block.conv1.in_channels, block.conv3.out_channels
            at, after = (positions, pooled) if counts_macs else (1, 1)
            costs.append(BottleneckCost(unit, inputs, outputs, at, after))
            rest += 0 if block.downsample is None else inputs * outputs * after
            positions = pooled
        return cls(tuple(costs), rest)

    def fixed(self) -> int:
        """Cost of everything that pruning does not touch."""
        return self.rest

    def total(self, widths: Sequence[tuple[int, int]]) -> int:
        """Cost of all convolutions at these inner channels."""
        return self.rest + sum(cost.of(*pair) for cost, pair in zip(self.bottlenecks, widths, strict=True))


def slice_channels(model: CLIPResNetVisionModel, kept: Sequence[Kept]) -> CLIPResNetVisionModel:
    """Return a physically smaller copy that computes what is left when the other inner channels are zero."""
    state = dict(model.state_dict())
    for name, (first, second) in zip(Trunk(model).names, kept, strict=True):
        for number, channels in ((1, first), (2, second)):
            index = torch.tensor(channels, device=model.device)
            for key in (f"{name}.conv{number}.weight", *(f"{name}.bn{number}.{part}" for part in _PARTS)):
                state[key] = state[key].index_select(0, index)
            reader = f"{name}.conv{number + 1}.weight"
            state[reader] = state[reader].index_select(1, index)
    config: CLIPResNetVisionConfig = copy.deepcopy(model.config)
    widths = [[len(first), len(second)] for first, second in kept]
    if widths != [list(pair) for pair in config.bottlenecks]:
        config.inner_channels = widths
    with no_init_weights():
        small = CLIPResNetVisionModel._from_config(config, dtype=model.dtype)
    small.load_state_dict({name: value.detach().clone() for name, value in state.items()})
    small.config.name_or_path = model.config.name_or_path
    return small.to(model.device).train(model.training)  # pyright: ignore[reportArgumentType]


_PARTS = ("weight", "bias", "running_mean", "running_var")
