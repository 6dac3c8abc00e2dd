"""One-shot structured pruning of a CLIP vision tower from unlabelled images: the method, in order."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_opentrans._checks import check_finite
from hf_opentrans._distributed import process_count
from hf_opentrans.models.modeling_clip_resnet import CLIPResNetVisionModel

from .allocation import Budget
from .baselines import zero_smallest
from .calibration import Calibration, list_images, load_calibration
from .latency import LatencyTable
from .macs import CostModel, CountedCost, LayerWidths, TowerCost, layer_widths, tower_cost
from .matching import hash_tensors, sample_tensors
from .menus import fewest_neurons
from .plan import STRUCTURES, PruningConfig, PruningPlan
from .refit import rebuild
from .report import REPORT_FILE, PruningReport
from .saving import save_result
from .selection import Selection, recipe_of, select_baseline, select_ours
from .sizes import head_dim_step
from .stages import StagedRun
from .subnetwork import SUBNETWORK_FOLDER, Subnetwork
from .summary import make_report, realised_error
from .surgery import PrunableModel, slice_model, to_sparse
from .tower import SparseModel, Tower

_COMMIT = re.compile("[0-9a-f]{40}")


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
        options = {"marker": REPORT_FILE, "disk_dtype": disk_dtype}
        save_result(folder, self.model, processor, write_more=self._write_reports, **options)

    def _write_reports(self, folder: Path) -> None:
        self.subnetwork.save_pretrained(folder / SUBNETWORK_FOLDER)
        self.report.save(folder)


@torch.inference_mode(mode=False)  # the probes need gradients, whatever mode the caller is in
def prune_model(
    model: PrunableModel,
    images: Any,
    config: PruningConfig | None = None,
    *,
    image_processor: Any = None,
    latency_table: LatencyTable | None = None,
    progress: bool = False,
) -> PruningResult:
    """Prune heads, widths inside heads, and MLP neurons of a CLIP vision tower in one shot, without labels.

    1. Probes measure how every sublayer's output moves the final tokens (the output metric).
    2. Layer by layer, the statistics of the images become menus: every size of every sublayer with its error.
    3. One budget is spread over all menus.
    4. What stays is sliced out, and rebuilt by least squares in depth order to do the work of what went.

    Args:
        model: `CLIPModel`, `CLIPVisionModel`, `CLIPVisionModelWithProjection` or a sparse class. Not changed.
        images: Unlabelled images: a folder, a `datasets.Dataset`, or an iterable of images or paths.
        config: How far and how. Defaults to `PruningConfig()`.
        image_processor: The model's image processor. Defaults to CLIP's mean and deviation.
        latency_table: Measured on this device for this model and resolution; for unit "latency".
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If the model has no CLIP vision tower, or is a ResNet (see `prune_channels`).
        ValueError: If the budget lies below the floors, there are too few images, a weight is not finite, or the
            latency table is missing or belongs to another device or shape.
    """
    config = config or PruningConfig()
    if isinstance(model, CLIPResNetVisionModel):
        raise TypeError(
            "The model is a CLIPResNetVisionModel. prune_model needs a CLIP vision tower that is a ViT. Use "
            "prune_channels, which takes the same images and configuration."
        )
    dense = to_sparse(model).eval().float().requires_grad_(False)
    check_finite(dense.state_dict())
    tower = Tower.of(dense)
    budget = make_budget(tower, config, latency_table)
    found = list_images(images)
    with StagedRun(_steps(tower, config, len(found)), progress) as run:
        calibration = load_calibration(found, config, tower, image_processor, run.step)
        choice = run.time("selection", lambda: _select(dense, tower, calibration, budget, config, run.step))
        small = slice_model(dense, choice.plan, choice.maps)
        zeros = zero_smallest(Tower.of(small), budget) if config.method == "imp" else None
        recipe, rebuilt = recipe_of(config), {}
        if recipe is not None and config.keep < 1:
            rebuilt = run.time(
                "rebuild",
                lambda: rebuild(
                    tower,
                    Tower.of(small),
                    calibration,
                    choice.metrics,
                    recipe,
                    run.step,
                    protected=[(len(tower.layers) - 1, "heads")] if config.protect_last_attention else (),
                ),
            )
        error = realised_error(tower, Tower.of(small), calibration)
    report = make_report(tower, Tower.of(small), choice, rebuilt, calibration, config, budget, run.seconds)
    if not math.isfinite(error):
        raise ValueError(
            "The final tokens are not finite on the calibration images. Pruning needs finite numbers. Check the "
            "weights and the images, or load the model in float32."
        )
    report = replace(report, realised_error=error)
    if zeros is not None:  # each weight is used once per token
        tokens = report.calibration_tokens // report.calibration_images
        report = replace(report, nominal_macs=report.dense_macs - zeros * tokens)
    small = small.to(next(model.parameters()).dtype)  # pyright: ignore[reportArgumentType]
    _record_origin(small, model, report)
    return PruningResult(small, _subnetwork(model, dense, small, choice.plan, calibration, report, budget), report)


def _select(
    dense: SparseModel,
    tower: Tower,
    calibration: Calibration,
    budget: Budget,
    config: PruningConfig,
    on_batch: Callable[[], object],
) -> Selection:
    widths = layer_widths(tower.vision.config)
    if config.method == "imp" or config.keep >= 1:
        return Selection(PruningPlan.keep_all((w.heads for w in widths), (w.neurons for w in widths)))
    if config.method == "torch-pruning":
        from .foreign import torch_pruning_plan

        return Selection(torch_pruning_plan(tower, budget, config))
    if config.method == "obs":
        return select_ours(dense, tower, calibration, budget, config, on_batch)
    return select_baseline(tower, calibration, budget, config, on_batch)


def make_budget(tower: Tower, config: PruningConfig, latency_table: LatencyTable | None = None) -> Budget:
    """State what the tower costs, what may stay, and what the floors leave at least.

    Raises:
        ValueError: If the floors forbid the budget, or there is no latency table for this model on this device.
    """
    widths = layer_widths(tower.vision.config)
    cost = _cost_model(tower, config, latency_table)
    dense, lowest = (tower_cost(cost, w) for w in (widths, _lowest(tower, config)))
    floor = f"the floors min_heads={config.min_heads} and min_neurons={config.min_neurons:g} per layer"
    if config.method == "obs" and config.structures != STRUCTURES:
        floor += f" and structures={', '.join(config.structures)}"
    if config.protect_last_attention:
        floor += " and protect_last_attention"
    budget = Budget(config.unit, cost, dense, config.keep, lowest / dense, floor)
    if config.method != "imp":  # it removes single weights: no floor applies
        budget.check()
    return budget


def _cost_model(tower: Tower, config: PruningConfig, latency_table: LatencyTable | None) -> CostModel:
    if config.unit == "latency":
        if latency_table is None:
            raise ValueError(
                "unit is 'latency' and there is no latency table. Times have to be measured on this device first. "
                "Run `hf-opentrans latency-table MODEL` and pass its file."
            )
        latency_table.check(tower, config.resolution)
        return latency_table
    vision = tower.vision.config
    counted = TowerCost.of(vision, resolution=config.resolution, projection=tower.projection is not None)
    sublayers = sum(layer.has_attention + layer.has_mlp for layer in tower.layers)
    return CountedCost(counted, config.unit, sublayers)


def _lowest(tower: Tower, config: PruningConfig) -> list[LayerWidths]:
    """Return the smallest widths that the floors and the method's structures allow."""
    kinds = _structures(config)
    found, widths = [], layer_widths(tower.vision.config)
    for index, layer in enumerate(widths):
        if "mlp" in kinds and layer.neurons:
            layer = replace(layer, neurons=fewest_neurons(layer.neurons, config))
        is_protected = config.protect_last_attention and index == len(widths) - 1
        if "heads" in kinds and not is_protected:
            layer = replace(layer, heads=min(config.min_heads, layer.heads))
        if not is_protected:
            for name, kind in (("qk_head_dim", "qk"), ("v_head_dim", "v")):
                if kind in kinds:
                    dense = getattr(layer, name)
                    layer = replace(layer, **{name: min(dense, head_dim_step(dense, config.round_head_dim))})
        found.append(layer)
    return found


def _structures(config: PruningConfig) -> set[str]:
    if config.method == "obs":
        return set(config.structures) | ({"qk", "v"} if "ranks" in config.structures else set())
    return {"vbp": {"mlp"}, "corp": {"mlp", "qk"}, "corp-refit": {"mlp", "qk"}}.get(config.method, {"mlp", "heads"})


def _steps(tower: Tower, config: PruningConfig, images: int) -> int:
    """Return the steps of the progress bar."""
    count = min(config.num_images, images)
    batches = -(-count // (config.batch_size * process_count())) + 1  # of this process
    layers, recipe = len(tower.layers), recipe_of(config)
    steps = layers * batches + batches if config.method in ("obs", "vbp", "flap", "corp", "corp-refit") else 0
    steps += config.search_steps if config.search != "none" else 0
    if recipe is not None:
        steps += layers * batches * (4 if recipe.propagates else 2)
    return (count + steps) if config.keep < 1 else count


def origin_of(model: PrunableModel) -> tuple[str, str | None]:
    """Return name without local folders, and commit, of the dense model."""
    name = str(model.config.name_or_path or "")
    is_local = Path(name).is_absolute() or Path(name).exists()
    if is_local:
        return Path(name).name, None
    # transformers keeps no commit with a model; `hf_opentrans.loading` does.
    known = (getattr(model, "loaded_revision", None), getattr(model.config, "_commit_hash", None))
    return name, next((value for value in known if value and _COMMIT.fullmatch(value)), None)


def _record_origin(small: SparseModel, model: PrunableModel, report: PruningReport) -> None:
    name, revision = origin_of(model)
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
    budget: Budget,
) -> Subnetwork:
    name, revision = origin_of(model)
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
            "dense": budget.dense,
        },
        source_samples=sample_tensors(dense),
    )
