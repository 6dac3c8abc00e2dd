"""Sizes that are nested in each other, and a tower whose units lie in the order of their importance."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from hf_opentrans.models.configuration_elastic_clip import values_at
from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig
from hf_opentrans.models.modeling_elastic_clip import places_of

from .allocation import Budget, allocate
from .macs import layer_widths
from .menus import AttentionStatistics
from .sizes import Menu, Size
from .surgery import replace_tower
from .tower import SparseModel, Tower

Layers = list[list[int]]


@dataclass(frozen=True)
class NestedSizes:
    """What every budget keeps, largest first.

    Args:
        menus: What could be chosen.
        sizes: Of every budget, what was chosen of each menu.
    """

    menus: tuple[Menu, ...]
    sizes: tuple[tuple[Size, ...], ...]

    def narrowed(self, position: int, name: str) -> bool:
        """Tell whether any budget narrows the heads of a menu."""
        dense = getattr(self.menus[position].sizes[0], name)
        return any(sizes[position].units and getattr(sizes[position], name) != dense for sizes in self.sizes)

    def layers(self, tower: Tower) -> list[Layers]:
        """Return heads, query-key width, value width and neurons of every layer, for every budget."""
        found: list[Layers] = []
        current = [[w.heads, w.qk_head_dim, w.v_head_dim, w.neurons] for w in layer_widths(tower.vision.config)]
        for sizes in self.sizes:
            current = [list(widths) for widths in current]
            for menu, size in zip(self.menus, sizes, strict=True):
                if menu.kind == "neurons":
                    current[menu.layer][3] = size.units
                else:  # the widths of heads that are gone do not matter
                    inner = [size.qk_head_dim, size.v_head_dim] if size.units else current[menu.layer][1:3]
                    current[menu.layer][:3] = [size.units, *inner]
            found.append(current)
        return found


def nest(menus: Sequence[Menu], budgets: Sequence[Budget], solver: str = "dp") -> NestedSizes:
    """Choose the largest budget's sizes, and those of each smaller one among what the larger one keeps.

    The removal orders of greedy OBS are nested by themselves; only sizes have to be kept from growing again.

    Args:
        menus: Of all sublayers.
        budgets: Descending.
        solver: See `allocate`.

    Raises:
        ValueError: See `allocate`.
    """
    chosen: list[tuple[Size, ...]] = []
    left = list(menus)
    for budget in budgets:
        sizes = tuple(allocate(left, budget, solver))
        chosen.append(sizes)
        left = [_within(menu, size) for menu, size in zip(left, sizes, strict=True)]
    return NestedSizes(tuple(menus), tuple(chosen))


def _within(menu: Menu, largest: Size) -> Menu:
    """Return a menu of what is no larger than `largest` in any respect, `largest` first."""

    def fits(size: Size) -> bool:
        if size.units == 0:
            return True
        narrow, wide = ((s.units, s.qk_head_dim, s.v_head_dim) for s in (size, largest))
        return all(n <= w for n, w in zip(narrow, wide, strict=True))

    return replace(menu, sizes=(largest, *(size for size in menu.sizes if size != largest and fits(size))))


@torch.no_grad()
def order_tower(dense: SparseModel, nested: NestedSizes, attention: Mapping[int, AttentionStatistics]) -> SparseModel:
    """Return a copy that computes the same, whose most important heads, dimensions and neurons come first.

    Heads are turned into the bases of `low_rank` only where a budget narrows them. The basis of values depends on
    which other heads are left to make up for what is cut: that of a head is the one of the smallest budget that keeps
    it, where most is cut.

    Args:
        dense: The dense model.
        nested: What the budgets keep.
        attention: What the bases are found from, by layer.
    """
    ordered = copy.deepcopy(dense)
    for position, menu in enumerate(nested.menus):
        layer = Tower.of(ordered).layers[menu.layer]
        first = torch.tensor(menu.order[::-1], dtype=torch.long, device=Tower.of(dense).vision.device)
        if menu.kind == "neurons":
            _permute_rows(layer.mlp.fc1, first, 1)
            _permute_columns(layer.mlp.fc2, first, 1)
            continue
        part = layer.self_attn
        if nested.narrowed(position, "qk_head_dim"):
            bases = attention[menu.layer].query_key_bases()
            _turn_rows(part.q_proj, bases.reduce)
            part.k_proj.bias.zero_()  # softmax never sees it
            _turn_rows(part.k_proj, bases.expand)
            _balance(part.q_proj, part.k_proj)
        if nested.narrowed(position, "v_head_dim"):
            reduce, expand = _value_bases(nested, position, attention[menu.layer], part.v_head_dim)
            _turn_rows(part.v_proj, reduce)
            weight = part.out_proj.weight.double().unflatten(1, (part.num_heads, -1))
            part.out_proj.weight.copy_(torch.einsum("ohd,hrd->ohr", weight, expand.to(weight)).flatten(1))
        for module, width in ((part.q_proj, part.qk_head_dim), (part.k_proj, part.qk_head_dim)):
            _permute_rows(module, first, width)
        _permute_rows(part.v_proj, first, part.v_head_dim)
        _permute_columns(part.out_proj, first, part.v_head_dim)
    return ordered


def _value_bases(
    nested: NestedSizes, position: int, statistics: AttentionStatistics, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    menu = nested.menus[position]
    eye = torch.eye(width, dtype=torch.float64, device=statistics.weight.device)
    reduce, expand = (eye.repeat(len(menu.order), 1, 1) for _ in range(2))
    for sizes in nested.sizes:  # the smallest budget last: its bases stay
        kept = menu.kept(sizes[position])
        if kept:
            bases, _, _ = statistics.value_bases(kept)
            reduce[list(kept)], expand[list(kept)] = bases.reduce.to(eye), bases.expand.to(eye)
    return reduce, expand


def _turn_rows(module: nn.Linear, maps: torch.Tensor) -> None:
    """Apply one square map per head to the outputs of a linear layer."""
    for value in (module.weight, module.bias):
        heads = value.double().unflatten(0, (len(maps), -1))
        value.copy_(torch.einsum("hrd,hd...->hr...", maps.to(heads), heads).flatten(0, 1))


def _balance(query: nn.Linear, key: nn.Linear) -> None:
    """Give matching rows of queries and keys one size: their product is what counts, and float16 holds it then."""
    tiny = torch.finfo(query.weight.dtype).tiny ** 0.5
    sizes = [torch.cat([p.weight, p.bias[:, None]], 1).norm(dim=1).clamp(min=tiny) for p in (query, key)]
    factor = (sizes[1] / sizes[0]).sqrt()
    query.weight.mul_(factor[:, None])
    query.bias.mul_(factor)
    key.weight.div_(factor[:, None])


def _permute_rows(module: nn.Linear, order: torch.Tensor, width: int) -> None:
    for value in (module.weight, module.bias):
        value.copy_(value.unflatten(0, (-1, width))[order].flatten(0, 1))


def _permute_columns(module: nn.Linear, order: torch.Tensor, width: int) -> None:
    module.weight.copy_(module.weight.unflatten(1, (-1, width))[:, order].flatten(1))


def cut_model(ordered: SparseModel, layers: Layers) -> SparseModel:
    """Return a smaller model of the first units of every layer.

    Args:
        ordered: See `order_tower`.
        layers: Heads, query-key width, value width and neurons of every layer.
    """
    tower = Tower.of(ordered)
    wide = [[w.heads, w.qk_head_dim, w.v_head_dim, w.neurons] for w in layer_widths(tower.vision.config)]
    config = SparseCLIPVisionConfig(**values_at(tower.vision.config, {"layers": layers}))
    tensors = tower.named_tensors()
    for place in places_of(tower.vision):
        if place.layer is not None:
            tensors[place.name] = place.cut(tensors[place.name], wide[place.layer], layers[place.layer])
    return replace_tower(ordered, config, tensors)
