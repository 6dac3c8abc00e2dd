"""The original method's accounting: zeros counted as if they were gone. Beside it, what the tensors really hold.

Iterative magnitude pruning leaves tensors of full size; its published "Params" and "FLOPs" subtract the zeros, and
"FLOPs" are multiply-accumulates.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn


@dataclass(frozen=True)
class NominalAccount:
    """A model before and after rounds of magnitude pruning.

    Args:
        candidates: Convolutions that are pruned: all but the first.
        conv_weights: Weights of the candidates.
        conv_macs: Multiply-accumulates of those candidates that the reference counts, for one image.
        density: Share of the candidates' weights that is left.
        params: Parameters that the tensors hold, before and after alike.
        macs: Multiply-accumulates of all convolutions that kernels compute, before and after alike.
    """

    candidates: int
    conv_weights: int
    conv_macs: int
    density: float
    params: int
    macs: int

    @property
    def nominal_params(self) -> int:
        """Parameters without the zeros."""
        return self.params - round((1 - self.density) * self.conv_weights)

    @property
    def nominal_macs(self) -> int:
        """Multiply-accumulates without those of zeros."""
        return self.macs - round((1 - self.density) * self.conv_macs)


def nominal_account(
    model: nn.Module,
    resolution: tuple[int, int],
    *,
    rounds: int = 22,
    rate: float = 0.1,
    mac_modules: str = r"layer\d\..*",
) -> NominalAccount:
    """Count a model with convolutions as the reference does.

    Args:
        model: Takes `pixel_values`; for example a `CLIPResNetVisionModel`. It is not run: shapes alone are followed.
        resolution: Height and width of the image in pixels.
        rounds: Rounds of pruning; the published figures fit 22.
        rate: Share of the weights alive that a round removes.
        mac_modules: Regular expression for the names of the candidates whose multiply-accumulates are subtracted. The
            published drops fit those of the four stages without the stem.

    Raises:
        ValueError: If the rate is not in (0, 1), or the model has fewer than two convolutions.
    """
    if not 0 < rate < 1 or rounds < 0:
        raise ValueError(f"rate is {rate} and rounds {rounds}. They must lie in (0, 1) and above -1. Correct them.")
    macs: dict[str, int] = {}
    hooks = []
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if len(layers) < 2:
        raise ValueError(
            f"The {type(model).__name__} has {len(layers)} convolutions. The reference prunes all but the first. Give "
            "a model with several, such as CLIPResNetVisionModel."
        )
    shell = copy.deepcopy(model).to("meta").eval()
    for name, module in shell.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(_counter(macs, name)))
    with torch.no_grad():
        shell(pixel_values=torch.empty(1, 3, *resolution, device="meta"))
    _, *candidates = layers
    return NominalAccount(
        candidates=len(candidates),
        conv_weights=sum(layers[name].weight.numel() for name in candidates),
        conv_macs=sum(macs[name] for name in candidates if re.fullmatch(mac_modules, name)),
        density=(1 - rate) ** rounds,
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=sum(macs.values()),
    )


def _counter(found: dict[str, int], name: str) -> Callable[..., None]:
    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found[name] = output.shape[-2] * output.shape[-1] * cast("torch.Tensor", module.weight).numel()

    return count
