"""Decide which inner channels of a CLIP ResNet's bottlenecks go: by error menus of pairs, or by a control's scores."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch

from .allocation import Budget, allocate
from .baselines import allocate_baseline
from .calibration import Calibration
from .channel_statistics import Key, Parts, embed_parts, gather_inputs, trunk_metrics
from .channel_trunk import BottleneckCost, Kept, Trunk, TrunkCost
from .importance import greedy_removal
from .macs import CostModel
from .menus import fewest_neurons
from .plan import PruningConfig
from .sizes import Menu, Size, neuron_step, rounded_widths

METHODS = ("obs", "magnitude", "random")


@dataclass(frozen=True)
class ChannelSize(Size):
    """One pair of inner channels: `units` after the first convolution, `second` after the second."""

    second: int = 0


@dataclass(frozen=True)
class ChannelMenu(Menu):
    """All pairs of inner channels of one bottleneck, the dense pair first.

    The 3x3 convolution costs nine times the product of both widths, so that single widths have no price: the menu is
    one of pairs, each with its exact cost. It prices itself and asks the budget's model for the fixed part only. Its
    kind is "neurons": channels are to a convolution what neurons are to an MLP.

    Args:
        second_order: Channels after the second convolution in the order of removal; `order` has those after the first.
        price: What the bottleneck costs.
    """

    second_order: tuple[int, ...] = ()
    price: BottleneckCost = field(kw_only=True)

    def cost(self, size: Size, cost: CostModel) -> float:
        """Return what the bottleneck costs at this pair."""
        return self.price.of(size.units, cast("ChannelSize", size).second)

    def kept_pair(self, size: Size) -> Kept:
        """Return the channels that stay, ascending."""
        second = self.second_order[len(self.second_order) - cast("ChannelSize", size).second :]
        return self.kept(size), tuple(sorted(second))


@dataclass(frozen=True)
class ChannelSelection:
    """What was decided.

    Args:
        kept: Channels of every bottleneck.
        errors: What the menus expect the final tokens to lose by each; empty for controls.
        metrics: Output metrics; empty for controls.
    """

    kept: tuple[Kept, ...]
    errors: tuple[float, ...] = ()
    metrics: dict[Key, torch.Tensor] = field(default_factory=dict, repr=False)


def make_channel_budget(trunk: Trunk, config: PruningConfig, side: int) -> Budget:
    """State what the convolutions cost, what may stay, and what the floors leave at least.

    Raises:
        ValueError: If the floors forbid the budget.
    """
    cost = TrunkCost.of(trunk, config.unit, side)
    dense = cost.total(trunk.widths)
    fewest = [
        (channel_widths(first, config)[-1], channel_widths(second, config)[-1]) for first, second in trunk.widths
    ]
    floor = f"the floor min_neurons={config.min_neurons:g}, the stem and the shortcuts"
    # The menus price themselves: the model is asked for its fixed part alone.
    budget = Budget(config.unit, cast("CostModel", cost), dense, config.keep, cost.total(fewest) / dense, floor)
    budget.check()
    return budget


def channel_widths(dense: int, config: PruningConfig) -> list[int]:
    """Return the widths that a group of channels may take, descending; never none."""
    step = neuron_step(dense, config.round_neurons)
    return rounded_widths(dense, min(dense, max(step, fewest_neurons(dense, config))), step)


def select_channels(
    trunk: Trunk,
    calibration: Calibration,
    budget: Budget,
    config: PruningConfig,
    on_batch: Callable[[], object] = int,
) -> ChannelSelection:
    """Choose by `config.method`: ours, or a control with the same share of both widths everywhere."""
    cost = cast("TrunkCost", budget.cost)
    if config.keep >= 1:
        return ChannelSelection(tuple((tuple(range(a)), tuple(range(b))) for a, b in trunk.widths))
    if config.method != "obs":
        menus = [control_menu(trunk, i, price, config) for i, price in enumerate(cost.bottlenecks)]
        sizes = allocate_baseline(menus, budget, config)
        return ChannelSelection(tuple(menu.kept_pair(size) for menu, size in zip(menus, sizes, strict=True)))
    metrics = trunk_metrics(trunk, calibration, config, on_batch)
    hidden, menus = embed_parts(trunk, calibration), []
    for index, price in enumerate(cost.bottlenecks):
        found = gather_inputs(trunk, index, hidden, calibration, config.seed, on_batch)
        menus.append(channel_menu(trunk, index, found, metrics, price, config))
    sizes = allocate(menus, budget, config.solver)
    kept = tuple(menu.kept_pair(size) for menu, size in zip(menus, sizes, strict=True))
    return ChannelSelection(kept, tuple(size.error for size in sizes), metrics)


def channel_menu(
    trunk: Trunk,
    index: int,
    found: dict[str, Parts],
    metrics: dict[Key, torch.Tensor],
    price: BottleneckCost,
    config: PruningConfig,
) -> ChannelMenu:
    """List the pairs of widths of one bottleneck; a pair's error is the sum of both groups' exact errors.

    Both groups leave in the order of greedy OBS with full compensation by the others: those before the 3x3
    convolution nine columns at a time, those before the last one by one.
    """
    block = trunk.bottlenecks[index]
    orders, errors = [], []
    for name, conv, group in (("conv2", block.conv2, 9), ("conv3", block.conv3, 1)):
        weight = conv.weight.flatten(1).double()
        covariance = found[name][0].merge(found[name][1]).covariance
        fewest = channel_widths(conv.in_channels, config)[-1]
        weight, metric = _smaller(weight, metrics[index, name].to(weight))
        order, error = greedy_removal(weight, covariance, metric, group_size=group, fewest=fewest)
        orders.append(order)
        errors.append(error)
    first, second = (channel_widths(len(order), config) for order in orders)
    sizes = tuple(
        ChannelSize(errors[0][len(orders[0]) - a] + errors[1][len(orders[1]) - b], a, second=b)
        for a in first
        for b in second
    )
    return ChannelMenu(index, "neurons", orders[0], sizes, orders[1], price=price)


def _smaller(weight: torch.Tensor, metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a problem with the same errors and fewer outputs: W under M costs what I costs under W^T M W."""
    if weight.shape[0] <= weight.shape[1]:
        return weight, metric
    return torch.eye(weight.shape[1]).to(weight), weight.T @ metric @ weight


def control_menu(trunk: Trunk, index: int, price: BottleneckCost, config: PruningConfig) -> ChannelMenu:
    """List pairs of the same share of both widths; their "error" is the share that goes, as for other controls."""
    orders = [torch.argsort(_scores(trunk, index, name, config), stable=True).tolist() for name in ("conv2", "conv3")]
    first, second = (channel_widths(len(order), config) for order in orders)
    pairs = {a: min(second, key=lambda b: abs(b / len(orders[1]) - a / len(orders[0]))) for a in first}
    sizes = tuple(ChannelSize(1 - a / len(orders[0]), a, second=b) for a, b in pairs.items())
    return ChannelMenu(index, "neurons", tuple(orders[0]), sizes, tuple(orders[1]), price=price)


def _scores(trunk: Trunk, index: int, name: str, config: PruningConfig) -> torch.Tensor:
    """Score the channels that a convolution reads: at random, or by the L2 norm of all their weights."""
    block = trunk.bottlenecks[index]
    writer, reader = (block.conv1, block.conv2) if name == "conv2" else (block.conv2, block.conv3)
    if config.method == "random":
        seed = (config.seed * 10_007 + index) * 2 + (name == "conv2")
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(reader.in_channels, generator=generator, dtype=torch.float64)
    written = writer.weight.flatten(1).square().sum(1)
    return (written + reader.weight.transpose(0, 1).flatten(1).square().sum(1)).double()
