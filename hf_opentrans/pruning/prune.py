"""One-shot structured pruning of a CLIP vision tower from unlabelled images: the method, in order."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from hf_opentrans._checks import check_finite
from hf_opentrans._files import write_folder

from .allocation import Budget, allocate, allocate_uniform
from .calibration import Calibration, list_images, load_calibration, walk_layers
from .importance import ErrorCurve, greedy_removal, norm_order, output_metrics, random_order
from .macs import TowerCost, layer_widths
from .plan import LayerPlan, PruningConfig, PruningPlan
from .reconstruction import Rebuilt, delta_ridge
from .report import REPORT_FILE, LayerReport, PruningReport
from .subnetwork import Subnetwork, hash_tensors
from .surgery import PrunableModel, slice_model, to_sparse, unit_columns
from .tower import SparseModel, Tower

SUBNETWORK_FOLDER = "subnetwork"
PROBE_BATCH = 8
Metrics = dict[tuple[int, str], torch.Tensor]


@dataclass(frozen=True)
class PruningResult:
    """The outcome of `prune_model`.

    Args:
        model: The smaller model, of the sparse class of the input's kind.
        subnetwork: The tower with its plan and origin, for transfer.
        report: What was done, in numbers.
    """

    model: SparseModel
    subnetwork: Subnetwork
    report: PruningReport

    def save_pretrained(
        self, folder: str | Path, processor: Any = None, *, disk_dtype: torch.dtype | None = None
    ) -> None:
        """Write the model, its processor, the report and the subnetwork as one folder, or nothing at all.

        Args:
            folder: New, empty, or an earlier output.
            processor: Saved with the model, so that the folder can be used alone.
            disk_dtype: Precision of the weights on disk, for example the base model's float16. The configuration
                keeps the model's own, so the model loads in that. Defaults to the model's.
        """
        with write_folder(folder, marker=REPORT_FILE) as target:
            state = self.model.state_dict()
            self.model.save_pretrained(target, state_dict={k: v.to(disk_dtype or v.dtype) for k, v in state.items()})
            if processor is not None:
                processor.save_pretrained(target)
            self.subnetwork.save_pretrained(target / SUBNETWORK_FOLDER)
            self.report.save(target)


@torch.inference_mode(mode=False)  # the probes need gradients, whatever mode the caller is in
def prune_model(
    model: PrunableModel,
    images: Any,
    config: PruningConfig | None = None,
    *,
    image_processor: Any = None,
    progress: bool = False,
) -> PruningResult:
    """Prune heads and MLP neurons of a CLIP vision tower in one shot, without labels or training.

    1. Probes measure how every sublayer's output moves the final tokens (the output metric).
    2. Layer by layer, greedy OBS turns the statistics of the images into error curves.
    3. The budget is spread over all curves (Lagrangian on their hulls).
    4. What stays is sliced out, and rebuilt by least squares to do the work of what went.

    Args:
        model: `CLIPModel`, `CLIPVisionModel`, `CLIPVisionModelWithProjection` or a sparse class. Not changed.
        images: Unlabelled images: a folder, a `datasets.Dataset`, or an iterable of images or paths.
        config: How far and how. Defaults to `PruningConfig()`.
        image_processor: The model's image processor. Defaults to CLIP's mean and deviation.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If the model has no CLIP vision tower.
        ValueError: If the budget lies below the floors, there are too few images, or a weight is not finite.
    """
    config = config or PruningConfig()
    dense = to_sparse(model).eval().float().requires_grad_(False)
    check_finite(dense.state_dict())
    tower = Tower.of(dense)
    budget = make_budget(tower, config)
    found = list_images(images)
    with _Run(tower, config, len(found), progress) as run:
        calibration = load_calibration(found, config, tower, image_processor, run.step)
        if config.method == "obs":
            metrics = run.time("probes", lambda: _probe(tower, calibration, config, run))
            curves = run.time("curves", lambda: _error_curves(tower, calibration, metrics, config, run))
            removed = allocate(curves, budget)
        else:
            metrics, curves = {}, _baseline_orders(tower, config)
            removed = allocate_uniform(curves, [len(curve.order) for curve in curves], budget)
        plan = _make_plan(tower, curves, removed)
        small = slice_model(dense, plan)
        rebuilt: dict[tuple[int, str], Rebuilt] = {}
        if config.method == "obs":
            rebuilt = run.time("rebuild", lambda: _rebuild(tower, small, plan, calibration, metrics, run))
    small = small.to(next(model.parameters()).dtype)  # pyright: ignore[reportArgumentType]
    report = _report(tower, small, curves, removed, rebuilt, calibration, config, run.seconds)
    _record_origin(small, model, report)
    return PruningResult(small, _subnetwork(model, dense, small, plan, calibration, report), report)


def make_budget(tower: Tower, config: PruningConfig) -> Budget:
    """State what must go, what one unit of each sublayer costs, and what the floors leave at least.

    Raises:
        ValueError: If the floors forbid the budget.
    """
    cost = TowerCost.of(tower.vision.config, resolution=config.resolution, projection=tower.projection is not None)
    widths = layer_widths(tower.vision.config)
    unit, unit_costs, lowest = config.unit, {}, []
    for index, layer in enumerate(widths):
        unit_costs[index, "heads"] = cost.head(unit, layer.qk_head_dim, layer.v_head_dim)
        unit_costs[index, "neurons"] = cost.neuron(unit)
        heads, neurons = (_fewest(tower, config, index, kind) for kind in ("heads", "neurons"))
        lowest.append(replace(layer, heads=heads, neurons=neurons))
    dense = cost.total(unit, widths)
    floor = f"the floors min_heads={config.min_heads} and min_neurons={config.min_neurons:g} per layer"
    if config.protect_last_attention:
        floor += " and protect_last_attention"
    budget = Budget(unit, dense, config.keep, unit_costs, cost.total(unit, tuple(lowest)) / dense, floor)
    budget.check()
    return budget


def _fewest(tower: Tower, config: PruningConfig, layer: int, kind: str) -> int:
    """Units of a sublayer that must stay."""
    widths = layer_widths(tower.vision.config)
    if kind == "neurons":
        return -int(-widths[layer].neurons * config.min_neurons // 1)
    is_protected = config.protect_last_attention and layer == len(widths) - 1
    return widths[layer].heads if is_protected else min(config.min_heads, widths[layer].heads)


def _probe(tower: Tower, calibration: Calibration, config: PruningConfig, run: "_Run") -> Metrics:
    # Gradients keep the activations of all layers: small batches bound the memory.
    images = torch.cat(calibration.fit[: -(-config.probe_images // config.batch_size)])[: config.probe_images]
    batches = images.split(min(config.batch_size, PROBE_BATCH))
    # On CPUs the backward pass of fused attention takes two to three times as long as that of the plain one.
    usual = cast("str", tower.vision.config._attn_implementation)
    tower.vision.set_attn_implementation("eager" if tower.vision.device.type == "cpu" else "sdpa")
    metrics = output_metrics(tower, batches, probes=config.probes, seed=config.seed, on_batch=run.step)
    tower.vision.set_attn_implementation(usual)  # the smaller model inherits it
    return metrics


def _error_curves(
    tower: Tower, calibration: Calibration, metrics: Metrics, config: PruningConfig, run: "_Run"
) -> list[ErrorCurve]:
    curves = []
    for layer, statistics in walk_layers(tower, calibration, run.step):
        for kind, (fit, held_out) in statistics.items():
            order, errors = greedy_removal(
                tower.consumers[layer, kind].weight,
                fit.merge(held_out).covariance,
                metrics[layer, kind],
                group_size=tower.group_size(layer, kind),
                fewest=_fewest(tower, config, layer, kind),
            )
            curves.append(ErrorCurve(layer, kind, order, errors))
    return curves


def _baseline_orders(tower: Tower, config: PruningConfig) -> list[ErrorCurve]:
    """Removal orders of the controls, as curves whose length alone has a meaning."""
    generator = torch.Generator().manual_seed(config.seed)
    curves = []
    for layer, kind in tower.consumers:
        order = (
            norm_order(tower, layer, kind)
            if config.method == "magnitude"
            else random_order(tower, layer, kind, generator)
        )
        removable = len(order) - _fewest(tower, config, layer, kind)
        curves.append(ErrorCurve(layer, kind, order, (0.0,) * (removable + 1)))
    return curves


def _make_plan(tower: Tower, curves: list[ErrorCurve], removed: list[int]) -> PruningPlan:
    kept = {(curve.layer, curve.kind): curve.kept(count) for curve, count in zip(curves, removed, strict=True)}
    layers = range(len(tower.layers))
    return PruningPlan(tuple(LayerPlan(kept.get((i, "heads"), ()), kept.get((i, "neurons"), ())) for i in layers))


def _rebuild(
    tower: Tower, small: SparseModel, plan: PruningPlan, calibration: Calibration, metrics: Metrics, run: "_Run"
) -> dict[tuple[int, str], Rebuilt]:
    """Refit `out_proj` and `fc2` of every layer that lost something; writes into `small`."""
    rebuilt = {}
    sources, smaller = tower.consumers, Tower.of(small)
    changed = [key for key, source in sources.items() if smaller.consumer(*key).in_features < source.in_features]
    for layer, statistics in walk_layers(tower, calibration, run.step, changed):
        for kind, (fit, held_out) in statistics.items():
            source, target = sources[layer, kind], smaller.consumer(layer, kind)
            kept = unit_columns(getattr(plan.layers[layer], kind), tower.group_size(layer, kind)).to(fit.mean.device)
            done = delta_ridge(source.weight, source.bias, kept, fit, held_out, metrics[layer, kind])
            target.weight.data.copy_(done.weight)
            target.bias.data.copy_(done.bias)
            rebuilt[layer, kind] = done
    return rebuilt


class _Run:
    """Progress bar and wall times of one call."""

    def __init__(self, tower: Tower, config: PruningConfig, images: int, progress: bool) -> None:
        count = min(config.num_images, images)
        batches = -(-count // config.batch_size) + 1
        passes = 2 * len(tower.layers) + 1 if config.method == "obs" else 0
        self.bar = tqdm(total=count + passes * batches, desc="Pruning", unit="step", disable=not progress, leave=False)
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
        self.seconds["total"] = time.perf_counter() - self._start

    def step(self) -> None:
        """Advance the bar."""
        self.bar.update()

    def time(self, stage: str, work: Any) -> Any:
        """Run `work` and note how long it took."""
        start = time.perf_counter()
        self.bar.set_description(f"Pruning: {stage}")
        result = work()
        self.seconds[stage] = time.perf_counter() - start
        return result


def _report(
    tower: Tower,
    small: SparseModel,
    curves: list[ErrorCurve],
    removed: list[int],
    rebuilt: dict[tuple[int, str], Rebuilt],
    calibration: Calibration,
    config: PruningConfig,
    seconds: dict[str, float],
) -> PruningReport:
    before, after = (layer_widths(t.vision.config) for t in (tower, Tower.of(small)))
    cost = TowerCost.of(tower.vision.config, resolution=config.resolution, projection=tower.projection is not None)
    predicted: dict[int, float] = {}
    for curve, count in zip(curves, removed, strict=True):
        predicted[curve.layer] = predicted.get(curve.layer, 0.0) + curve.errors[count]
    layers = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        values: dict[str, float | None] = {}
        for kind in ("heads", "neurons"):
            if (done := rebuilt.get((index, kind))) is not None:
                values[f"{kind}_error"], values[f"{kind}_ridge"] = done.error, done.ridge
                values[f"{kind}_error_uncompensated"] = done.error_uncompensated
        if config.method == "obs":
            values["predicted_error"] = predicted.get(index, 0.0)
        layers.append(LayerReport(new.heads, new.neurons, old.heads, old.neurons, **values))
    notes = list(calibration.warnings)
    if config.protect_last_attention:
        notes.append("The attention of the last block is protected: training-free dense heads read its q, k and v.")
    costs = {unit: (cost.total(unit, before), cost.total(unit, after)) for unit in ("macs", "params")}
    side = config.resolution or cast("int", tower.vision.config.image_size)
    return PruningReport(
        config=config.to_dict(),
        layers=tuple(layers),
        resolution=side,
        dense_macs=costs["macs"][0],
        macs=costs["macs"][1],
        dense_params=costs["params"][0],
        params=costs["params"][1],
        realised_keep=costs[config.unit][1] / costs[config.unit][0],
        calibration_images=calibration.num_images,
        calibration_tokens=calibration.num_images * cost.tokens,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        notes=tuple(notes),
    )


def _origin(model: PrunableModel) -> tuple[str, str | None]:
    """Name without local folders, and commit, of the dense model."""
    name = str(model.config.name_or_path or "")
    is_local = Path(name).is_absolute() or Path(name).exists()
    return (Path(name).name if is_local else name), getattr(model.config, "_commit_hash", None)


def _record_origin(small: SparseModel, model: PrunableModel, report: PruningReport) -> None:
    name, revision = _origin(model)
    config = report.config
    Tower.of(small).vision.config.pruning_config = {
        "base_model": name,
        "base_revision": revision,
        "method": config["method"],
        "unit": config["unit"],
        "keep": config["keep"],
        "realised_keep": round(report.realised_keep, 6),
        "resolution": report.resolution,
    }


def _subnetwork(
    model: PrunableModel,
    dense: SparseModel,
    small: SparseModel,
    plan: PruningPlan,
    calibration: Calibration,
    report: PruningReport,
) -> Subnetwork:
    name, revision = _origin(model)
    tower, config = Tower.of(small), report.config
    vision_config = tower.vision.config.to_dict()
    vision_config.pop("_name_or_path", None)
    return Subnetwork(
        plan=plan,
        vision_config=vision_config,
        tensors={key: value.detach().clone() for key, value in tower.named_tensors().items()},
        base_model=name,
        base_revision=revision,
        # Another precision than float32 has other bytes than the working copy.
        source_hashes=hash_tensors(dense if next(model.parameters()).dtype == torch.float32 else to_sparse(model)),
        calibration={
            "fingerprint": calibration.fingerprint,
            "num_images": report.calibration_images,
            "num_tokens": report.calibration_tokens,
            "resolution": report.resolution,
            "seed": config["seed"],
        },
        budget={
            "unit": config["unit"],
            "keep": config["keep"],
            "realised_keep": report.realised_keep,
            "dense": report.dense_macs if config["unit"] == "macs" else report.dense_params,
        },
    )
