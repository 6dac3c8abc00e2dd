"""Decide what to remove: by our menus, or by a baseline's scores. Stages hand over one frozen `Selection`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from hf_opentrans._distributed import process_count

from .allocation import Budget, allocate
from .baselines import (
    SCORES_WEIGHTS,
    USES_RANKS,
    Scores,
    allocate_baseline,
    baseline_menus,
    coordinate_maps,
    score_layer,
)
from .calibration import Calibration, Statistics, walk_layers
from .importance import output_metrics, regular
from .macs import layer_widths
from .menus import AttentionStatistics, attention_menu, diagonal_blocks, neuron_menu
from .plan import LayerPlan, PruningConfig, PruningPlan
from .refit import CORP, LOCAL, MEAN_SHIFT_ONLY, SWEEP, Key, Recipe
from .search import evolve
from .sizes import Menu, Size
from .statistics import CovarianceStatistics
from .surgery import HeadMaps, slice_model, unit_columns
from .tower import SparseModel, Tower, summed_cosines

# Images and bytes of one backward pass of the probes.
PROBE_BATCH, PROBE_BYTES = 8, 2 * 10**9
COMPENSATIONS: dict[str, Recipe] = {
    "obs": SWEEP,
    "corp-refit": SWEEP,
    "corp": CORP,
    "magnitude-compensated": LOCAL,
    "vbp": MEAN_SHIFT_ONLY,
    "flap": MEAN_SHIFT_ONLY,
}


@dataclass(frozen=True)
class Selection:
    """What was decided.

    Args:
        plan: What every layer keeps.
        maps: New bases of narrower heads, by layer.
        menus: What could be chosen; empty where a foreign tool decided.
        sizes: What was chosen of each menu.
        metrics: Output metrics by `(layer, kind)`; empty where nothing asked for them.
        predicted_error: Sum of the chosen errors; None where the menus are not in the final tokens' currency.
    """

    plan: PruningPlan
    maps: dict[int, HeadMaps] = field(default_factory=dict)
    menus: tuple[Menu, ...] = ()
    sizes: tuple[Size, ...] = ()
    metrics: dict[Key, torch.Tensor] = field(default_factory=dict, repr=False)
    predicted_error: float | None = None


def recipe_of(config: PruningConfig) -> Recipe | None:
    """Return how the method rebuilds; None where it does not."""
    return LOCAL if config.method == "obs" and not config.refit else COMPENSATIONS.get(config.method)


def select_ours(
    dense: SparseModel,
    tower: Tower,
    calibration: Calibration,
    budget: Budget,
    config: PruningConfig,
    on_batch: Callable[[], object] = int,
) -> Selection:
    """Choose by error menus under the output metric: the metric, the menus, the budget, and an optional search."""
    metrics = probe(tower, calibration, config, on_batch) if config.metric == "probes" else {}
    menus: list[Menu] = []
    attention: dict[int, AttentionStatistics] = {}
    rows: dict[Key, CovarianceStatistics] = {}
    for layer, statistics in walk_layers(tower, calibration, on_batch, _kinds(config)):
        if config.metric == "identity":
            metrics |= _identity_metrics(tower, layer, statistics)
        if "heads" in statistics:
            attention[layer] = attention_statistics(tower, layer, statistics, metrics)
            menus.append(attention_menu(tower, layer, attention[layer], config))
        if "neurons" in statistics:
            both = _both(statistics["neurons"])
            menus.append(neuron_menu(tower, layer, both.covariance, metrics[layer, "neurons"], config))
        if config.search == "evolution":
            rows |= {(layer, kind): _both(statistics[kind]) for kind in ("heads", "neurons") if kind in statistics}
    sizes = allocate(menus, budget, config.solver)
    if config.search == "evolution":
        candidates = _Candidates(dense, tower, menus, attention, rows, calibration, config)
        sizes, _ = evolve(
            menus, sizes, budget, candidates.score, steps=config.search_steps, seed=config.seed, on_step=on_batch
        )
    maps = _all_maps(attention, menus, sizes)
    total = sum(size.error for size in sizes) if config.metric == "probes" else None
    return Selection(make_plan(tower, menus, sizes), maps, tuple(menus), tuple(sizes), metrics, total)


def select_baseline(
    tower: Tower,
    calibration: Calibration,
    budget: Budget,
    config: PruningConfig,
    on_batch: Callable[[], object] = int,
) -> Selection:
    """Choose by a published method's scores and by its own rule for the budget."""
    scores: list[Scores] = []
    kept: dict[int, Statistics] = {}
    if config.method in SCORES_WEIGHTS:
        for layer in range(len(tower.layers)):
            scores += score_layer(tower, layer, {}, config)
    else:
        kinds = {"heads", "neurons"} | ({"queries", "keys"} if config.method in USES_RANKS else set())
        for layer, statistics in walk_layers(tower, calibration, on_batch, kinds):
            scores += score_layer(tower, layer, statistics, config)
            kept[layer] = {kind: statistics[kind] for kind in ("queries", "keys") if kind in statistics}
    menus = baseline_menus(tower, scores, config)
    sizes = allocate_baseline(menus, budget, config)
    maps = {}
    for score, menu, size in zip(scores, menus, sizes, strict=True):
        if _narrows(menu, size):
            maps[menu.layer] = coordinate_maps(tower, menu.layer, score, kept[menu.layer], size.qk_head_dim)
    recipe = recipe_of(config)
    needs_metric = recipe is not None and len(recipe.ridges) > 1 and not isinstance(recipe.ridges, str)
    metrics = probe(tower, calibration, config, on_batch) if needs_metric else {}
    return Selection(make_plan(tower, menus, sizes), maps, tuple(menus), tuple(sizes), metrics)


def _kinds(config: PruningConfig) -> set[str]:
    kinds = {"heads", "neurons", "queries"}
    return kinds | {"keys"} if config.metric == "identity" else kinds


def _both(parts: tuple[CovarianceStatistics, CovarianceStatistics]) -> CovarianceStatistics:
    return parts[0].merge(parts[1])


def attention_statistics(
    tower: Tower, layer: int, statistics: Statistics, metrics: dict[Key, torch.Tensor]
) -> AttentionStatistics:
    """Gather what the subspaces of a layer's heads are found from: activations, and the output metrics."""
    heads = tower.layers[layer].self_attn.num_heads
    return AttentionStatistics(
        tower.consumers[layer, "heads"].weight.double(),
        _both(statistics["heads"]).covariance,
        metrics[layer, "heads"],
        metrics[layer, "queries"],
        diagonal_blocks(_both(statistics["queries"]).moment, heads),
    )


def white_statistics(tower: Tower, layer: int) -> AttentionStatistics:
    """Return what `attention_statistics` would find if the layer's inputs were white noise: the weights alone."""
    attention = tower.layers[layer].self_attn
    heads = attention.num_heads
    query, key, value = (
        torch.cat([part.weight, part.bias[:, None]], 1).detach().double()
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    weight = attention.out_proj.weight.detach().double()
    return AttentionStatistics(
        weight,
        value @ value.T,
        torch.eye(len(weight)).to(weight),
        diagonal_blocks(key[:, :-1] @ key[:, :-1].T, heads),  # softmax never sees the keys' bias
        diagonal_blocks(query @ query.T, heads),
    )


def _identity_metrics(tower: Tower, layer: int, statistics: Statistics) -> dict[Key, torch.Tensor]:
    """Return plain squared errors: of the outputs, and of the attention logits (for ablations)."""
    found: dict[Key, torch.Tensor] = {}
    for kind in ("heads", "neurons"):
        if kind in statistics:
            consumer = tower.consumers[layer, kind]
            energy = ((consumer.weight.double() @ _both(statistics[kind]).covariance) * consumer.weight).sum()
            found[layer, kind] = torch.eye(consumer.out_features).to(energy) / energy.clamp(min=1e-30)
    if "keys" in statistics:
        attention = tower.layers[layer].self_attn
        keys = diagonal_blocks(_both(statistics["keys"]).covariance, attention.num_heads)
        queries = diagonal_blocks(_both(statistics["queries"]).moment, attention.num_heads)
        found[layer, "queries"] = keys / (keys * queries).sum().clamp(min=1e-30)
    return found


def probe(
    tower: Tower, calibration: Calibration, config: PruningConfig, on_batch: Callable[[], object] = int
) -> dict[Key, torch.Tensor]:
    """Measure the output metrics of all sublayers on some of the calibration images."""
    # Gradients keep the activations of all layers: small batches bound the memory. Every process needs one.
    images = torch.cat(calibration.fit[: -(-config.probe_images // config.batch_size)])[: config.probe_images]
    fitting, share = PROBE_BYTES // _probe_bytes(tower, images), len(images) // process_count()
    batches = images.split(max(1, min(config.batch_size, PROBE_BATCH, fitting, share)))
    # On CPUs the backward pass of fused attention takes two to three times as long as that of the plain one.
    usual = cast("str", tower.vision.config._attn_implementation)
    tower.vision.set_attn_implementation("eager" if tower.vision.device.type == "cpu" else "sdpa")
    metrics = output_metrics(tower, batches, probes=config.probes, seed=config.seed, on_batch=on_batch)
    tower.vision.set_attn_implementation(usual)  # the smaller model inherits it
    return metrics


def _probe_bytes(tower: Tower, images: torch.Tensor) -> int:
    """Estimate what the gradients of one image keep: attention maps, and some sixteen activations per layer."""
    config = tower.vision.config
    tokens = 1 + (images.shape[-1] // cast("int", config.patch_size)) ** 2
    heads = max(width.heads for width in layer_widths(config))
    return len(tower.layers) * tokens * (2 * heads * tokens + 16 * config.hidden_size) * 4


def _narrows(menu: Menu, size: Size) -> bool:
    dense = menu.sizes[0]
    narrower = (size.qk_head_dim, size.v_head_dim) != (dense.qk_head_dim, dense.v_head_dim)
    return menu.kind == "heads" and size.units > 0 and narrower


def head_maps(
    statistics: AttentionStatistics, heads: tuple[int, ...], qk_head_dim: int | None, v_head_dim: int | None
) -> HeadMaps:
    """Return new bases of the heads that stay, cut to new widths; None where a width stays."""
    found: dict[str, torch.Tensor] = {}
    if qk_head_dim is not None:
        bases, kept = statistics.query_key_bases(), list(heads)
        found |= {"query": bases.reduce[kept, :qk_head_dim], "key": bases.expand[kept, :qk_head_dim]}
    if v_head_dim is not None:
        bases, _, _ = statistics.value_bases(heads)
        found |= {"value": bases.reduce[:, :v_head_dim], "output": bases.expand[:, :v_head_dim]}
    return HeadMaps(**found)


def _new_widths(menu: Menu, size: Size) -> tuple[int | None, int | None]:
    dense = menu.sizes[0]
    qk = None if size.qk_head_dim == dense.qk_head_dim else size.qk_head_dim
    return qk, None if size.v_head_dim == dense.v_head_dim else size.v_head_dim


def _all_maps(attention: dict[int, AttentionStatistics], menus: list[Menu], sizes: list[Size]) -> dict[int, HeadMaps]:
    return {
        menu.layer: head_maps(attention[menu.layer], menu.kept(size), *_new_widths(menu, size))
        for menu, size in zip(menus, sizes, strict=True)
        if _narrows(menu, size)
    }


def make_plan(tower: Tower, menus: list[Menu], sizes: list[Size]) -> PruningPlan:
    """Write down what every layer keeps."""
    widths = layer_widths(tower.vision.config)
    layers: list[dict[str, Any]] = [{"heads": (), "neurons": ()} for _ in widths]
    for menu, size in zip(menus, sizes, strict=True):
        layers[menu.layer][menu.kind] = menu.kept(size)
        if _narrows(menu, size):
            dense = menu.sizes[0]
            for name in ("qk_head_dim", "v_head_dim"):
                if getattr(size, name) != getattr(dense, name):
                    layers[menu.layer][name] = getattr(size, name)
    return PruningPlan(tuple(LayerPlan(**layer) for layer in layers))


class _Candidates:
    """Builds and scores sizes for the search: sliced, compensated from the dense statistics, run on real images."""

    def __init__(
        self,
        dense: SparseModel,
        tower: Tower,
        menus: list[Menu],
        attention: dict[int, AttentionStatistics],
        rows: dict[Key, CovarianceStatistics],
        calibration: Calibration,
        config: PruningConfig,
    ) -> None:
        self.dense, self.tower, self.menus = dense, tower, menus
        self.attention, self.rows = attention, rows
        self.images = torch.cat(calibration.fit)[: config.probe_images].split(config.batch_size)
        with torch.no_grad():
            self.tokens = [tower.tokens(batch.to(tower.vision.device)) for batch in self.images]
        self.solved: dict[tuple[int, str, Size], tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def score(self, sizes: list[Size]) -> float:
        """Return the mean cosine of the class token plus that of the patches, to the dense model's."""
        maps = _all_maps(self.attention, self.menus, sizes)
        small = Tower.of(slice_model(self.dense, make_plan(self.tower, self.menus, sizes), maps))
        for menu, size in zip(self.menus, sizes, strict=True):
            if size != menu.sizes[0] and size.units:
                weight, bias = self._compensated(menu, size, maps.get(menu.layer, HeadMaps()))
                small.consumer(menu.layer, menu.kind).weight.copy_(weight)
                small.consumer(menu.layer, menu.kind).bias.copy_(bias)
        total = torch.zeros(2, dtype=torch.float64)
        for batch, expected in zip(self.images, self.tokens, strict=True):
            total += summed_cosines(small.tokens(batch.to(small.vision.device)), expected)
        return float(total.sum()) / sum(len(batch) for batch in self.images)

    def _compensated(self, menu: Menu, size: Size, maps: HeadMaps) -> tuple[torch.Tensor, torch.Tensor]:
        """Return least-squares weight and bias on what stays."""
        key = (menu.layer, menu.kind, size)
        if key not in self.solved:
            consumer, rows = self.tower.consumers[menu.layer, menu.kind], self.rows[menu.layer, menu.kind]
            weight, covariance, mean = consumer.weight.double(), regular(rows.covariance), rows.mean
            kept = unit_columns(menu.kept(size), self.tower.group_size(menu.layer, menu.kind)).to(covariance.device)
            cross, inner, left = covariance[:, kept], covariance[kept][:, kept], mean[kept]
            if menu.kind == "heads" and maps.value is not None:
                reduce = torch.block_diag(*maps.value)
                cross, inner, left = cross @ reduce.T, reduce @ inner @ reduce.T, reduce @ left
            solved = torch.linalg.solve(inner, (weight @ cross).T).T
            self.solved[key] = solved, consumer.bias + weight @ mean - solved @ left
        return self.solved[key]
