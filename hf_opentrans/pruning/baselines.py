"""Published methods and controls, written from their formulas, in the same harness as ours.

| method | what it removes, and in which order | budget | compensation |
|---|---|---|---|
| random | heads, neurons; at random | same share everywhere | none |
| magnitude | heads, neurons; L2 norm of all their weights | same share everywhere | none |
| magnitude-compensated | as magnitude | same share everywhere | ours, layer by layer |
| vbp (arXiv 2507.12988) | neurons; variance after GELU | one global ranking | mean shift |
| flap (arXiv 2312.11983) | heads, neurons; variance x squared norm | global, per-layer z-scores | mean shift |
| corp (arXiv 2602.05243) | neurons, q-k dims; energy x active rate | same share everywhere | ridge, q . k fit |
| corp-refit | as corp | same share everywhere | our depth-order sweep |
| imp (OpenTrans) | single weights; global L1. Zeros: nothing gets smaller | one threshold | none |
| torch-pruning | heads, neurons; its group magnitude | same ratio everywhere | none |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .allocation import TOLERANCE, Budget
from .calibration import Statistics
from .menus import diagonal_blocks, fewest_neurons
from .plan import PruningConfig
from .sizes import Menu, Size, head_dim_step, neuron_step, rounded_widths
from .surgery import HeadMaps
from .tower import Tower

SCORES_WEIGHTS = ("random", "magnitude", "magnitude-compensated")
USES_RANKS = ("corp", "corp-refit")
NEURONS_ONLY = ("vbp", *USES_RANKS)
GLOBAL = ("vbp", "flap")


@dataclass(frozen=True)
class Scores:
    """How much the units of one sublayer matter to a method, least first gone.

    Args:
        layer: Index of the layer.
        kind: "heads" or "neurons".
        units: One score per unit.
        dims: Of query-key dimensions, `(heads, qk_head_dim)`; None where the method leaves them alone.
    """

    layer: int
    kind: str
    units: torch.Tensor
    dims: torch.Tensor | None = None


def score_layer(tower: Tower, layer: int, statistics: Statistics, config: PruningConfig) -> list[Scores]:
    """Score the units of one layer by `config.method`; `statistics` may be empty for magnitude and random."""
    found = []
    kinds = [kind for kind in ("heads", "neurons") if (layer, kind) in tower.consumers]
    for kind in kinds:
        if config.method in SCORES_WEIGHTS:
            found.append(Scores(layer, kind, _weight_scores(tower, layer, kind, config)))
            continue
        fit, held_out = statistics[kind]
        both = fit.merge(held_out)
        weight = tower.consumers[layer, kind].weight.double()
        dims = None
        if config.method == "vbp":
            units = both.covariance.diagonal()
        elif config.method == "flap":
            units = both.covariance.diagonal() * weight.square().sum(0)
            units = units.unflatten(0, (-1, tower.group_size(layer, kind))).sum(1)
        else:
            energy = both.moment.diagonal()
            units = energy * both.positive_rate
            dims = _query_key_energy(tower, layer, statistics) if kind == "heads" else None
        heads = tower.layers[layer].self_attn.num_heads if kind == "heads" else 0
        found.append(Scores(layer, kind, units[:heads] if kind == "heads" else units, dims))
    return found


def _weight_scores(tower: Tower, layer: int, kind: str, config: PruningConfig) -> torch.Tensor:
    units = tower.consumers[layer, kind].in_features // tower.group_size(layer, kind)
    if config.method == "random":
        seed = (config.seed * 10_007 + layer) * 2 + (kind == "heads")
        return torch.rand(units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    block = tower.layers[layer]
    if kind == "neurons":
        return (block.mlp.fc1.weight.square().sum(1) + block.mlp.fc2.weight.square().sum(0)).double()
    attention = block.self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, attention.out_proj.weight.T]
    return torch.stack([w.square().sum(1).unflatten(0, (units, -1)).sum(1) for w in weights]).sum(0).double()


def _query_key_energy(tower: Tower, layer: int, statistics: Statistics) -> torch.Tensor:
    heads = tower.layers[layer].self_attn.num_heads
    energies = [fit.merge(held).moment.diagonal() for fit, held in (statistics["queries"], statistics["keys"])]
    return (energies[0] * energies[1]).unflatten(0, (heads, -1))


def baseline_menus(tower: Tower, scores: Sequence[Scores], config: PruningConfig) -> list[Menu]:
    """Turn scores into menus whose errors are thresholds: a size is taken once the method's threshold reaches it.

    For a global ranking the threshold is the largest score removed, for a uniform method the removed share of units.
    """
    menus = []
    for score in scores:
        order = tuple(torch.argsort(score.units, stable=True).tolist())
        ranked = score.units[list(order)].double()
        if config.method == "flap":
            deviation = ranked.std() if len(ranked) > 1 else torch.ones_like(ranked[0])
            ranked = (ranked - ranked.mean()) / deviation.clamp(min=torch.finfo(torch.float64).tiny)
        dense, sizes = len(order), []
        for width in _baseline_widths(tower, score, config):
            last = float(ranked[dense - width - 1]) if width < dense else float(ranked[0]) - 1
            sizes.append((last if config.method in GLOBAL else 1 - width / dense, width))
        if score.kind == "neurons":
            menus.append(Menu(score.layer, "neurons", order, tuple(Size(e, w) for e, w in sizes)))
            continue
        attention = tower.layers[score.layer].self_attn
        qk, v = attention.qk_head_dim, attention.v_head_dim
        found = [Size(e, w, qk, v) for e, w in sizes]
        if score.dims is not None and not _is_protected(tower, score.layer, config):
            step = head_dim_step(qk, config.round_head_dim)
            found = [Size(1 - w / qk, dense, w, v) for w in rounded_widths(qk, min(step, qk), step)]
        menus.append(Menu(score.layer, "heads", order, tuple(found)))
    return menus


def _is_protected(tower: Tower, layer: int, config: PruningConfig) -> bool:
    return config.protect_last_attention and layer == len(tower.layers) - 1


def _baseline_widths(tower: Tower, score: Scores, config: PruningConfig) -> list[int]:
    dense = len(score.units)
    if score.kind == "neurons":
        return rounded_widths(dense, fewest_neurons(dense, config), neuron_step(dense, config.round_neurons))
    if config.method in NEURONS_ONLY or _is_protected(tower, score.layer, config):
        return [dense]
    return rounded_widths(dense, min(config.min_heads, dense), 1)


def allocate_baseline(menus: Sequence[Menu], budget: Budget, config: PruningConfig) -> list[Size]:
    """Choose sizes by the method's own rule: one global ranking, or the same share of every sublayer.

    Raises:
        ValueError: If what the method removes cannot meet the budget.
    """
    best: list[Size] | None = None
    for threshold in sorted({size.error for menu in menus for size in menu.sizes}):
        sizes = [_at(menu, threshold) for menu in menus]
        if budget.share(menus, sizes) <= budget.keep + 1e-9:
            best = _fill(menus, sizes, budget)
            break
    if best is None or budget.share(menus, best) < budget.keep - TOLERANCE:
        raise ValueError(
            f"method={config.method!r} cannot meet keep={budget.keep:g} of the {budget.unit} within {TOLERANCE:g} "
            "with the structures that it removes. Choose another keep, a lower floor, or a smaller round_neurons."
        )
    return best


def _at(menu: Menu, threshold: float) -> Size:
    """Return the smallest size that the threshold has reached; the dense one where it has reached none."""
    reached = [size for size in menu.sizes if size.error <= threshold]
    return max(reached, key=lambda size: (size.error, -size.units), default=menu.sizes[0])


def _fill(menus: Sequence[Menu], sizes: Sequence[Size], budget: Budget) -> list[Size]:
    """Spend what the coarse threshold left: one step more for the MLP that has lost most, while something fits."""
    sizes = list(sizes)
    while True:
        larger: list[tuple[float, int, Size]] = []
        for index, (menu, size) in enumerate(zip(menus, sizes, strict=True)):
            wider = [s for s in menu.sizes if menu.kind == "neurons" and s.units > size.units]
            if wider:
                larger.append((-size.error, index, min(wider, key=lambda s: s.units)))
        for _, index, size in sorted(larger, key=lambda entry: entry[:2]):
            changed = [*sizes[:index], size, *sizes[index + 1 :]]
            if budget.share(menus, changed) <= budget.keep + 1e-9:
                sizes = changed
                break
        else:
            return sizes


def coordinate_maps(
    tower: Tower, layer: int, scores: Scores, statistics: Statistics, width: int, ridge: float = 1e-3
) -> HeadMaps:
    """Keep the `width` strongest query-key coordinates of every head and fit the logits by least squares (CORP).

    With queries and keys of different tokens taken as independent, the best bilinear form on the kept coordinates is
    q_S^T (I + A^T D) k_S, where A and D regress the lost queries and keys on the kept ones.
    """
    heads = tower.layers[layer].self_attn.num_heads
    queries, keys = (statistics[kind][0].merge(statistics[kind][1]) for kind in ("queries", "keys"))
    query_moments, key_moments = diagonal_blocks(queries.moment, heads), diagonal_blocks(keys.covariance, heads)
    query_maps, key_maps = [], []
    for head in range(heads):
        energies = scores.dims[head] if scores.dims is not None else query_moments[head].diagonal()
        kept = torch.argsort(energies, descending=True, stable=True)[:width].sort().values
        gone = torch.ones(len(energies), dtype=torch.bool, device=energies.device)
        gone[kept] = False
        lost_queries, lost_keys = (_regression(m[head], kept, gone, ridge) for m in (query_moments, key_moments))
        chosen = torch.eye(len(energies)).to(energies)[kept]
        form = torch.eye(width).to(energies) + lost_queries.T @ lost_keys
        query_maps.append(form.T @ chosen)
        key_maps.append(chosen)
    return HeadMaps(query=torch.stack(query_maps), key=torch.stack(key_maps))


def _regression(moment: torch.Tensor, kept: torch.Tensor, gone: torch.Tensor, ridge: float) -> torch.Tensor:
    inner = moment[kept][:, kept]
    scale = inner.diagonal().mean().clamp(min=torch.finfo(inner.dtype).tiny ** 0.5)
    return torch.linalg.solve(inner + ridge * scale * torch.eye(len(inner)).to(inner), moment[gone][:, kept].T).T


@torch.no_grad()
def zero_smallest(tower: Tower, budget: Budget) -> int:
    """Set the smallest weights of all layers to zero, one threshold for all (OpenTrans' IMP, one round).

    As in OpenTrans the first convolution and the projection stay. Nothing gets smaller or faster.

    Args:
        tower: Changed in place.
        budget: Of "macs" or "params".

    Returns:
        How many weights are zero now.

    Raises:
        ValueError: If the unit is "latency", which zeros do not change, or even no weight at all costs too much.
    """
    if budget.unit == "latency":
        raise ValueError("method='imp' only sets weights to zero. That saves no latency. Use unit='macs' or 'params'.")
    matrices = [m.weight for layer in tower.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    per_weight = budget.cost.mlp(1) / (2 * matrices[0].shape[1]) if budget.unit == "macs" else 1.0
    count = sum(matrix.numel() for matrix in matrices)
    kept = count - (1 - budget.keep) * budget.dense / per_weight
    if kept < 0:
        lowest = math.ceil(1000 - 1000 * count * per_weight / budget.dense) / 1000
        raise ValueError(
            f"keep={budget.keep:g} of the {budget.unit} is below what method='imp' can reach: attention products and "
            f"fixed parts stay. Raise keep to {lowest} or more."
        )
    sizes = torch.cat([matrix.abs().flatten() for matrix in matrices])
    gone = torch.zeros(count, dtype=torch.bool, device=sizes.device)
    gone[sizes.argsort(stable=True)[: count - int(kept)]] = True  # by rank: weights of one size may be many
    for matrix, is_gone in zip(matrices, gone.split([matrix.numel() for matrix in matrices]), strict=True):
        matrix.masked_fill_(is_gone.view_as(matrix), 0.0)
    return int(gone.sum())
