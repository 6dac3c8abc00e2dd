"""Walk the pruned trunk beside the dense one and refit the convolutions that read fewer channels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .calibration import Calibration, check_statistics
from .channel_statistics import (
    KERNELS,
    Hidden,
    Key,
    Parts,
    draw_positions,
    embed_parts,
    read_rows,
    rows_per_image,
)
from .channel_trunk import Kept, Trunk, observe, shortcut
from .plan import PruningConfig
from .reconstruction import Rebuilt, regress
from .refit import SWEEP
from .statistics import CovarianceStatistics

# Of the largest scale of the last normalisation; a channel below it cannot make up for the gap of the stream.
SMALLEST_SCALE = 1e-3


@dataclass(frozen=True)
class _Walk:
    """What both streams are at the entry of the bottleneck at hand.

    Args:
        dense, small: The trunks.
        calibration: The images.
        dense_hidden, small_hidden: The streams; the same lists where nothing is to be propagated.
        config: Seed, and whether the pruned stream is propagated.
        on_batch: Called after every batch.
    """

    dense: Trunk
    small: Trunk
    calibration: Calibration
    dense_hidden: Hidden
    small_hidden: Hidden
    config: PruningConfig
    on_batch: Callable[[], object]


@torch.no_grad()
def rebuild_channels(
    dense: Trunk,
    small: Trunk,
    kept: tuple[Kept, ...],
    calibration: Calibration,
    metrics: dict[Key, torch.Tensor],
    config: PruningConfig,
    on_batch: Callable[[], object] = int,
) -> dict[Key, Rebuilt]:
    """Refit second and third convolutions in depth order; writes into `small`.

    The second convolution of a bottleneck aims at the dense one's output on the channels that stay; the third at the
    dense one's output plus what the residual stream has lost so far, in its units. Without `config.refit` every
    bottleneck reads the dense stream, and aims at its dense outputs alone. A convolution has no bias: what `regress`
    finds moves the mean of the normalisation that follows. Its other statistics stay: estimated anew after the
    refit in depth order they lowered the cosine of embeddings in all four measured cases.

    Args:
        dense: The dense trunk.
        small: The pruned trunk, whose convolutions hold plain slices of the dense weights.
        kept: The channels that it keeps.
        calibration: The images.
        metrics: Output metrics.
        config: See `PruningConfig`.
        on_batch: Called after every batch.
    """
    hidden = embed_parts(dense, calibration)
    other = [list(part) for part in hidden] if config.refit else hidden
    walk = _Walk(dense, small, calibration, hidden, other, config, on_batch)
    rebuilt: dict[Key, Rebuilt] = {}
    has_moved = False
    for index, (block, thin) in enumerate(zip(dense.bottlenecks, small.bottlenecks, strict=True)):
        is_changed = dense.widths[index] != small.widths[index]
        if is_changed or (has_moved and config.refit):
            second = torch.tensor(kept[index][1], device=dense.model.device)
            parts = _gather(walk, index, "conv2", second)
            metric = metrics[index, "conv2"][second][:, second]
            rebuilt[index, "conv2"] = _solve(thin.conv2, thin.bn2, parts, metric, ())
            parts = _gather(walk, index, "conv3", None)
            factors = SWEEP.gap_factors if config.refit else ()
            rebuilt[index, "conv3"] = _solve(thin.conv3, thin.bn3, parts, metrics[index, "conv3"], factors)
        has_moved = has_moved or is_changed
        _step(block, hidden, on_batch)
        if config.refit:
            _step(thin, other, on_batch)
    return rebuilt


def _gather(walk: _Walk, index: int, name: str, channels: torch.Tensor | None) -> Parts:
    """Gather rows [inputs of the small convolution, target] or [inputs, target, gap].

    Args:
        walk: Where both streams are.
        index: The bottleneck.
        name: "conv2" or "conv3".
        channels: Outputs of the dense convolution that are aimed at; None for all, with the gap of the stream.
    """
    block, thin = walk.dense.bottlenecks[index], walk.small.bottlenecks[index]
    conv = thin.conv2 if name == "conv2" else thin.conv3
    inputs, has_gap = conv.in_channels * KERNELS[name] ** 2, channels is None and walk.config.refit
    tail = {"tail": conv.out_channels, "tail_with": inputs} if has_gap else {}
    width = inputs + (1 + has_gap) * conv.out_channels
    device = walk.dense.model.device
    parts = (CovarianceStatistics(width, device, **tail), CovarianceStatistics(width, device, **tail))
    wanted = rows_per_image(inputs, walk.calibration)
    to_units = _inverse_scale(block.bn3)[:, None, None]
    for part, (dense_part, small_part) in enumerate(zip(walk.dense_hidden, walk.small_hidden, strict=True)):
        for number, (hidden, other) in enumerate(zip(dense_part, small_part, strict=True)):
            target = observe(block, hidden).outputs[name]
            read = observe(thin, other).inputs[name]
            positions = draw_positions(target[0, 0].numel(), wanted, walk.config.seed, index, part, number)
            maps = [target if channels is None else target[:, channels]]
            if has_gap:
                gap = to_units * (shortcut(block, hidden) - shortcut(thin, other))
                maps = [target + gap, gap]
            rows = [read_rows(read, KERNELS[name], positions), *(read_rows(m, 1, positions) for m in maps)]
            parts[part].update(torch.cat(rows, 1))
            walk.on_batch()
    check_statistics(index, f"channels of {walk.dense.names[index]}.{name}", parts)
    return parts


def _inverse_scale(norm: nn.BatchNorm2d) -> torch.Tensor:
    """Return the change of the input that changes the output by one; zero where the output hardly depends on it."""
    variance = norm.running_var if norm.running_var is not None else torch.ones_like(norm.weight)
    scale = norm.weight / (variance + norm.eps).sqrt()
    is_used = scale.abs() > SMALLEST_SCALE * scale.abs().max()
    return torch.where(is_used, 1 / scale, torch.zeros_like(scale))


def _solve(
    conv: nn.Conv2d, norm: nn.BatchNorm2d, parts: Parts, metric: torch.Tensor, factors: Sequence[float]
) -> Rebuilt:
    weight = conv.weight.flatten(1)
    done = regress(weight, weight.new_zeros(len(weight)), *parts, metric, gap_factors=factors)
    conv.weight.copy_(done.weight.view_as(conv.weight))
    if norm.running_mean is not None:
        norm.running_mean.sub_(done.bias)
    return done


def _step(block: nn.Module, hidden: Hidden, on_batch: Callable[[], object]) -> None:
    for part in hidden:
        for number, batch in enumerate(part):
            part[number] = block(batch)
            on_batch()
