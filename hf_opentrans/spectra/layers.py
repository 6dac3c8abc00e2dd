"""Which modules of a model have a weight matrix, and where they stand."""

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Linear layers that are this much longer than wide have no bulk to speak of (the reference skips them too).
MOST_ELONGATED = 8.0
_FUSED = re.compile(r"qkv|in_proj|c_attn|query_key_value")


@dataclass(frozen=True)
class MatrixLayer:
    """A module with a weight matrix.

    Args:
        name: Exact name in the model.
        type: For people and for comparisons: the last part of the name of a linear layer ("q_proj"), or "conv3x3".
        group: Layers that do the same job all over one tower: the name with "*" for its numbers, or the type of a
            convolution.
        block: The name up to its first number, that number included ("encoder.layers.3"); the parent where there is
            none.
        parts: Matrices that lie one above the other in the weight: 3 for a fused q-k-v projection.
    """

    name: str
    type: str
    group: str
    block: str
    parts: int = 1


def find_layers(
    model: nn.Module,
    target_modules: str | Collection[str] | None = None,
    exclude_modules: str | Collection[str] | None = None,
) -> dict[str, MatrixLayer]:
    """Return the linear and convolution layers of a model, in its order.

    Output embeddings are left out: they share their weight with the input embeddings or stand in for them.

    Args:
        model: Any model.
        target_modules: As in PEFT: a regular expression for the whole name, or names of which a layer's is one or ends
            with one after a dot. Defaults to all.
        exclude_modules: The same, of what to leave out.

    Raises:
        ValueError: If there is no such layer.
    """
    get_output: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = get_output()
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D, *CONVOLUTIONS)) or module is output:
            continue
        if target_modules is not None and not matches(name, target_modules):
            continue
        if exclude_modules is not None and matches(name, exclude_modules):
            continue
        found[name] = _describe(name, module)
    if not found:
        chosen = "" if target_modules is None else f" that target_modules={target_modules!r} names"
        raise ValueError(
            f"The {type(model).__name__} has no linear or convolution layer{chosen}. Spectra need weight matrices. "
            "Give another model, or other names."
        )
    return found


def matches(name: str, wanted: str | Collection[str]) -> bool:
    """Tell whether a module's name is meant: by a regular expression, or by one of several names or endings."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == item or name.endswith(f".{item}") for item in wanted)


def exactly(names: Iterable[str]) -> str:
    """Return a regular expression for these names and no others: PEFT takes the names of a list as endings."""
    return "|".join(map(re.escape, names))


def is_elongated(module: nn.Module, most: float = MOST_ELONGATED) -> bool:
    """Tell whether a linear layer is too long for its width to have a spectrum worth fitting."""
    if isinstance(module, CONVOLUTIONS):
        return False
    sides = cast("torch.Tensor", module.weight).shape
    return max(sides) / max(1, min(sides)) >= most


def by_group(layers: Iterable[MatrixLayer]) -> dict[str, list[str]]:
    """Return the names of every group."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(layer.group, []).append(layer.name)
    return found


def by_block(layers: Iterable[MatrixLayer]) -> dict[str, list[str]]:
    """Return the names of every block, in the model's order."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(layer.block, []).append(layer.name)
    return found


def how_many(fraction: float, count: int) -> int:
    """Return how many of `count` a fraction is, rounded up as the strict median does: 28 of 55 for one half.

    Raises:
        ValueError: If the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}. It must lie in (0, 1]: the share of layers to train. Correct it.")
    return min(count, max(1, math.ceil(fraction * count - 1e-9)))


def _describe(name: str, module: nn.Module) -> MatrixLayer:
    parts = name.split(".")
    numbers = [position for position, part in enumerate(parts) if part.isdigit()]
    block = ".".join(parts[: numbers[0] + 1]) if numbers else ".".join(parts[:-1])
    if isinstance(module, CONVOLUTIONS):
        kernel = "x".join(map(str, module.kernel_size))
        return MatrixLayer(name, f"conv{kernel}", f"conv{kernel}", block)
    named = [part for part in parts if not part.isdigit()]
    group = ".".join("*" if part.isdigit() else part for part in parts)
    return MatrixLayer(name, named[-1] if named else name, group, block, _parts(parts[-1], module))


def _parts(last: str, module: nn.Module) -> int:
    outputs, inputs = cast("torch.Tensor", module.weight).shape
    if isinstance(module, Conv1D):
        outputs, inputs = inputs, outputs
    return 3 if outputs == 3 * inputs and _FUSED.search(last) else 1
