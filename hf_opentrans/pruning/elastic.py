"""Several nested budgets in one checkpoint, from one set of unlabelled images: the method, in order."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from hf_opentrans._checks import check_finite
from hf_opentrans.models.configuration_elastic_clip import values_at
from hf_opentrans.models.modeling_elastic_clip import (
    ElasticCLIPForSegmentation,
    ElasticCLIPModel,
    ElasticCLIPVisionModel,
    ElasticCLIPVisionModelWithProjection,
    ElasticMixin,
    encode,
    places_of,
    stored_names,
)
from hf_opentrans.models.modeling_open_vocabulary import PER_FILE_KEYS

from .allocation import Budget
from .calibration import Calibration, draw_images, list_images, load_calibration, prepare_images, walk_layers
from .elastic_order import Layers, NestedSizes, cut_model, nest, order_tower
from .elastic_report import ELASTIC_REPORT_FILE, BudgetReport, ElasticReport
from .latency import LatencyTable
from .macs import TowerCost, layer_widths, tower_cost
from .menus import AttentionStatistics, attention_menu, neuron_menu
from .plan import PruningConfig
from .prune import make_budget, origin_of
from .refit import Key, rebuild
from .saving import save_result
from .selection import attention_statistics, probe, recipe_of
from .sizes import Menu
from .stages import StagedRun
from .surgery import PrunableModel, to_sparse
from .tower import SparseModel, Tower, summed_cosines

BUDGETS = (0.8, 0.6, 0.4)
# Images that fidelity is measured on, at most, and as a share of those that are given.
MOST_HELD_OUT, HELD_OUT_SHARE = 64, 0.1
_KINDS = (
    ElasticCLIPForSegmentation,
    ElasticCLIPModel,
    ElasticCLIPVisionModelWithProjection,
    ElasticCLIPVisionModel,
)


@dataclass(frozen=True)
class ElasticResult:
    """The outcome of `prune_elastic`.

    Args:
        model: All budgets; the largest is set.
        report: Cost, fidelity and bytes of every budget.
    """

    model: ElasticMixin
    report: ElasticReport

    def save_pretrained(
        self, folder: str | Path, processor: Any = None, *, disk_dtype: torch.dtype | None = None
    ) -> None:
        """Write the model, its processor and the report as one folder, or nothing at all.

        Args:
            folder: New, empty, or an earlier output.
            processor: Saved with the model, so that the folder can be used alone.
            disk_dtype: Precision of the weights on disk; see `PruningResult.save_pretrained`.
        """
        self.model.set_budget(self.model.budgets[0])
        report = self.report.in_precision(disk_dtype or cast("Any", self.model).dtype)
        options = {"marker": ELASTIC_REPORT_FILE, "disk_dtype": disk_dtype}
        save_result(folder, self.model, processor, write_more=report.save, **options)


@torch.inference_mode(mode=False)  # the probes need gradients, whatever mode the caller is in
def prune_elastic(
    model: PrunableModel,
    images: Any,
    budgets: Sequence[float] = BUDGETS,
    config: PruningConfig | None = None,
    *,
    image_processor: Any = None,
    held_out_images: Any = None,
    latency_table: LatencyTable | None = None,
    progress: bool = False,
) -> ElasticResult:
    """Prune a CLIP vision tower to several nested budgets that live in one checkpoint, without labels.

    1. Probes and one walk over the layers give the menus of `prune_model`, once for all budgets.
    2. The largest budget is spread over all menus; every smaller one over what the larger one keeps.
    3. Heads, dimensions inside heads and neurons are put in the order of their importance: a budget is a prefix.
    4. Every budget is rebuilt by least squares in depth order; differences from the largest are stored.

    Args:
        model: See `prune_model`. Not changed.
        images: Unlabelled images: see `prune_model`.
        budgets: Shares of the dense tower to keep, in (0, 1], in any order.
        config: How to prune; its `keep` is not read, and its method must be "obs" without search.
        image_processor: The model's image processor. Defaults to CLIP's mean and deviation.
        held_out_images: What fidelity is measured on. Defaults to a tenth of `images`, at most 64, which then are
            not used for pruning.
        latency_table: For unit "latency"; see `prune_model`.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If the model has no CLIP vision tower.
        ValueError: If the budgets or the configuration cannot be used, there are too few images, a weight is not
            finite, or the model is masked.
    """
    config = config or PruningConfig()
    shares = check_shares(budgets, config)
    dense = to_sparse(model).eval().float().requires_grad_(False)
    check_finite(dense.state_dict())
    tower = Tower.of(dense)
    _refuse_masks(tower)
    limits = [make_budget(tower, replace(config, keep=share), latency_table) for share in shares]
    found, held_out = _split(list_images(images), held_out_images, config)
    with StagedRun(_steps(tower, config, len(found), len(shares)), progress) as run:
        calibration = load_calibration(found, config, tower, image_processor, run.step)
        side = calibration.fit[0].shape[-1]
        unseen = torch.stack(prepare_images(held_out, range(len(held_out)), side, image_processor))
        menus, attention, metrics = run.time("menus", lambda: _menus(tower, calibration, config, run.step))
        nested = nest(menus, limits, config.solver)
        ordered = order_tower(dense, nested, attention)
        layers, towers = nested.layers(tower), []
        for share, widths in zip(shares, layers, strict=True):
            small = cut_model(ordered, widths)
            if share < 1:
                work = _rebuilding(tower, small, calibration, metrics, config, run.step)
                run.time(f"rebuild {share:g}", work)
            towers.append(small)
        _record_origin(towers[0], model, config, tower)
        elastic = make_elastic(towers, shares, layers)
        cosines = run.time("fidelity", lambda: _cosines(tower, elastic, unseen, config.batch_size))
    report = _report(tower, elastic, nested, layers, limits, cosines, config, calibration, run.seconds)
    report = replace(report, held_out_images=len(unseen))
    for entry, budget in zip(cast("Any", elastic.config).elastic_budgets, report.budgets, strict=True):
        entry |= {name: getattr(budget, name) for name in ("macs", "params", "cosine_class", "cosine_patches")}
    elastic.config.name_or_path = str(model.config.name_or_path or "")
    dtype = next(model.parameters()).dtype
    return ElasticResult(cast("Any", elastic).to(dtype), report.in_precision(dtype))


def check_shares(budgets: Sequence[float], config: PruningConfig) -> list[float]:
    """Return budgets, largest first.

    Raises:
        ValueError: If they are none, outside (0, 1] or given twice, or the configuration is not for several budgets.
    """
    shares = sorted((float(budget) for budget in budgets), reverse=True)
    if not shares or len(set(shares)) < len(shares) or not all(0 < share <= 1 for share in shares):
        raise ValueError(
            f"budgets is {list(budgets)}. They must be shares in (0, 1], at least one and none twice. Use for example "
            f"{list(BUDGETS)}."
        )
    if config.method != "obs" or config.search != "none":
        raise ValueError(
            f"The configuration has method={config.method!r} and search={config.search!r}. Nested budgets need the "
            "orders of 'obs' and no search. Use PruningConfig(method='obs', search='none')."
        )
    return shares


def _record_origin(largest: SparseModel, model: PrunableModel, config: PruningConfig, tower: Tower) -> None:
    """Note where the weights come from; `values_at` puts in the `keep` of each budget."""
    name, revision = origin_of(model)
    Tower.of(largest).vision.config.pruning_config = {
        "base_model": name,
        "base_revision": revision,
        "method": config.method,
        "unit": config.unit,
        "keep": config.keep,
        "resolution": config.resolution or tower.vision.config.image_size,
    }


def _refuse_masks(tower: Tower) -> None:
    for index, layer in enumerate(tower.layers):
        masks = [layer.self_attn.masked_heads] if layer.has_attention else []
        masks += [layer.mlp.masked_neurons] if layer.has_mlp else []
        if any(masks):
            raise ValueError(
                f"Layer {index} has masked heads or neurons. Units that change their order cannot be masked by their "
                "numbers. Remove them first with slice_model."
            )


def _split(found: list[Any], held_out: Any, config: PruningConfig) -> tuple[list[Any], list[Any]]:
    """Return images to prune with, and others to measure on."""
    if held_out is not None:
        return found, list_images(held_out)[:MOST_HELD_OUT]
    order = draw_images(len(found), replace(config, num_images=len(found)))
    count = min(MOST_HELD_OUT, math.ceil(len(found) * HELD_OUT_SHARE))
    if len(found) < 2:
        raise ValueError(
            "There is 1 image. Fidelity must be measured on others than those that weights are fitted on. Give more, "
            "or held_out_images."
        )
    return [found[i] for i in order[:-count]], [found[i] for i in order[-count:]]


def _steps(tower: Tower, config: PruningConfig, images: int, budgets: int) -> int:
    count = min(config.num_images, images)
    batches = -(-count // config.batch_size) + 1
    return count + batches + len(tower.layers) * batches * (1 + budgets * (4 if config.refit else 2))


def _menus(
    tower: Tower, calibration: Calibration, config: PruningConfig, on_batch: Callable[[], object]
) -> tuple[list[Menu], dict[int, AttentionStatistics], dict[Key, torch.Tensor]]:
    """Gather what all budgets are chosen from, as `select_ours` does for one."""
    metrics = probe(tower, calibration, config, on_batch)
    menus: list[Menu] = []
    attention: dict[int, AttentionStatistics] = {}
    for layer, statistics in walk_layers(tower, calibration, on_batch, {"heads", "neurons", "queries"}):
        if "heads" in statistics:
            attention[layer] = attention_statistics(tower, layer, statistics, metrics)
            menus.append(attention_menu(tower, layer, attention[layer], config))
        if "neurons" in statistics:
            both = statistics["neurons"][0].merge(statistics["neurons"][1])
            menus.append(neuron_menu(tower, layer, both.covariance, metrics[layer, "neurons"], config))
    return menus, attention, metrics


def _rebuilding(
    tower: Tower,
    small: SparseModel,
    calibration: Calibration,
    metrics: dict[Key, torch.Tensor],
    config: PruningConfig,
    on_batch: Callable[[], object],
) -> Callable[[], object]:
    recipe = recipe_of(config)
    if recipe is None:
        return lambda: None
    protected = [(len(tower.layers) - 1, "heads")] if config.protect_last_attention else ()
    return lambda: rebuild(tower, Tower.of(small), calibration, metrics, recipe, on_batch, protected=protected)


def make_elastic(towers: Sequence[SparseModel], shares: Sequence[float], layers: Sequence[Layers]) -> ElasticMixin:
    """Put models of nested budgets into one.

    Args:
        towers: Cut from one tower (`cut_model`) and rebuilt, largest first.
        shares: Their budgets.
        layers: Their widths: see `cut_model`.
    """
    largest = towers[0]
    kind = next(kind for kind in _KINDS if isinstance(largest, kind.plain_class))
    values = {key: value for key, value in largest.config.to_dict().items() if key not in PER_FILE_KEYS}
    entries = [{"budget": share, "layers": widths} for share, widths in zip(shares, layers, strict=True)]
    vision = cast("Any", values_at(Tower.of(largest).vision.config, entries[0]))
    values |= {"vision_config": vision} if "vision_config" in values else vision
    config = cast("Any", kind.config_class)(**values, elastic_budgets=entries)
    implementation = largest.config._attn_implementation
    elastic = cast("Any", kind)._from_config(config, attn_implementation=implementation).eval()
    state = largest.state_dict()
    elastic.load_state_dict(state, strict=True)
    added: dict[str, torch.Tensor] = {}
    for index, small in enumerate(towers[1:], 1):
        own = small.state_dict()
        for place in places_of(largest):
            target, names = own[place.name], stored_names(place, index)
            if place.kind == "own":
                added[names[0]] = target.clone()
            elif place.kind == "coded":
                widths = ([], []) if place.layer is None else (layers[0][place.layer], layers[index][place.layer])
                added |= zip(names, encode(place.cut(state[place.name], *widths), target), strict=True)
    elastic.adopt(added)
    return elastic.to(Tower.of(largest).vision.device)


@torch.no_grad()
def _cosines(tower: Tower, elastic: ElasticMixin, pixels: torch.Tensor, batch_size: int) -> list[tuple[float, float]]:
    """Return the mean cosine of class and of patch tokens to the dense model's, for every budget."""
    batches = [batch.to(tower.vision.device) for batch in pixels.split(batch_size)]
    expected = [tower.tokens(batch) for batch in batches]
    found = []
    for budget in elastic.budgets:
        elastic.set_budget(budget)
        small, total = Tower.of(cast("Any", elastic)), torch.zeros(2, dtype=torch.float64)
        for batch, target in zip(batches, expected, strict=True):
            total += summed_cosines(small.tokens(batch), target)
        mean = total / len(pixels)
        found.append((float(mean[0]), float(mean[1])))
    elastic.set_budget(elastic.budgets[0])
    return found


def _report(
    tower: Tower,
    elastic: ElasticMixin,
    nested: NestedSizes,
    layers: Sequence[Layers],
    limits: Sequence[Budget],
    cosines: Sequence[tuple[float, float]],
    config: PruningConfig,
    calibration: Calibration,
    seconds: dict[str, float],
) -> ElasticReport:
    cost = TowerCost.of(tower.vision.config, resolution=config.resolution, projection=tower.projection is not None)
    dense = layer_widths(tower.vision.config)
    reports = []
    for index, (sizes, widths, limit, pair) in enumerate(zip(nested.sizes, layers, limits, cosines, strict=True)):
        after = tuple(
            replace(old, heads=heads, qk_head_dim=qk, v_head_dim=v, neurons=neurons)
            for old, (heads, qk, v, neurons) in zip(dense, widths, strict=True)
        )
        params = cost.total("params", after)
        reports.append(
            BudgetReport(
                budget=limit.keep,
                realised_keep=tower_cost(limit.cost, after) / limit.dense,
                macs=cost.total("macs", after),
                params=params,
                cosine_class=pair[0],
                cosine_patches=pair[1],
                bytes_alone=4 * params,
                bytes_added=elastic.added_bytes(index),
                predicted_error=sum(size.error for size in sizes),
            )
        )
    return ElasticReport(
        config=config.to_dict(),
        budgets=tuple(reports),
        dense_macs=cost.total("macs", dense),
        dense_params=cost.total("params", dense),
        resolution=config.resolution or cast("int", tower.vision.config.image_size),
        calibration_images=calibration.num_images,
        held_out_images=0,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        notes=calibration.warnings,
    )
