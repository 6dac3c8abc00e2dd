"""Put a subnetwork into any model with a CLIP tower of the same size, and say tensor by tensor what happened."""

import copy
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from hf_opentrans._checks import check_finite
from hf_opentrans._files import write_json
from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig

from .calibration import list_images, load_calibration, walk_layers
from .hosts import HostTower, check_same_size
from .macs import TowerCost, layer_widths
from .matching import SourceWeights, WeightMatch
from .plan import PruningConfig, PruningPlan
from .refit import SWEEP, rebuild
from .selection import attention_statistics, head_maps, probe, white_statistics
from .surgery import HeadMaps, replace_tower, slice_model
from .tower import SparseModel, Tower
from .unused import Cut
from .unused import drop_unused as drop_unused_blocks

REPORT_FILE = "transfer_report.json"
SPARSE_TOWER = "sparse_tower"  # attribute of the host's configuration
_STOCK_CLIP = (CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection)
MATCHES = ("equal", "close", "different", "absent")
COMPENSATED, REFITTED, SLICED = "compensated weights", "plan, refitted", "plan alone"


@dataclass(frozen=True)
class Source:
    """What a subnetwork hands over.

    Args:
        plan: What every layer keeps.
        vision_config: Of the small tower; its global widths are those of the dense one.
        tensors: Weights of the small tower, compensated, under canonical names.
        weights: What is known of the dense tower's weights.
    """

    plan: PruningPlan
    vision_config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    weights: SourceWeights = field(repr=False)

    @property
    def config(self) -> SparseCLIPVisionConfig:
        """Configuration of the small tower."""
        return SparseCLIPVisionConfig(**{k: v for k, v in self.vision_config.items() if k != "model_type"})


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the target's tower, or one of the subnetwork that found no place.

    Args:
        name: In the target's state dict; canonical where the target lacks it.
        match: "equal", "close" or "different" from the subnetwork's source; "absent" on one of the two sides.
        difference: Relative difference of sampled values; None where nothing can be compared.
        action: What the target has now: "compensated", "refitted", "sliced", "kept" or "skipped".
        reason: Why it was skipped or kept.
        shape, new_shape: Before and after; None where it is absent.
    """

    name: str
    match: str
    difference: float | None
    action: str
    reason: str = ""
    shape: tuple[int, ...] | None = None
    new_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TransferReport:
    """What a transfer did.

    Args:
        target: Class of the target.
        prefix: Path of its tower.
        weights: "compensated weights", "plan, refitted" or "plan alone".
        tensors: Every tensor of the tower.
        params, dense_params: Of the tower, after and before.
        macs, dense_macs: Multiply-accumulates of the tower for one image of the target's `image_size`.
        cuts: Blocks that the target never reads, dropped.
        images: That the refit used.
        seconds: Wall time.
        notes: What the user should know.
    """

    target: str
    prefix: str
    weights: str
    tensors: tuple[TensorReport, ...]
    params: int
    dense_params: int
    macs: int
    dense_macs: int
    cuts: tuple[Cut, ...] = ()
    images: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def matches(self) -> dict[str, int]:
        """How many tensors are equal, close, different and absent."""
        return {kind: sum(tensor.match == kind for tensor in self.tensors) for kind in MATCHES}

    @property
    def skipped(self) -> tuple[TensorReport, ...]:
        """The tensors that found no place."""
        return tuple(tensor for tensor in self.tensors if tensor.action == "skipped")

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as a JSON-ready dictionary."""
        return {**asdict(self), "matches": self.matches}

    def save(self, folder: str | Path) -> None:
        """Write `transfer_report.json` into a folder."""
        write_json(Path(folder) / REPORT_FILE, self.to_dict())


@dataclass(frozen=True)
class TransferResult:
    """The outcome of `Subnetwork.apply_to`.

    Args:
        model: The target with the small tower.
        report: What was matched, taken over, rebuilt and skipped.
    """

    model: Any
    report: TransferReport


def transfer(
    source: Source,
    target: PreTrainedModel,
    images: Any = None,
    *,
    prefix: str | None = None,
    config: PruningConfig | None = None,
    image_processor: Any = None,
    drop_unused: bool = True,
    inplace: bool = False,
    progress: bool = False,
) -> TransferResult:
    """Put a subnetwork into a model; see `Subnetwork.apply_to`."""
    start = time.perf_counter()
    host = HostTower.of(target, prefix)
    check_same_size(host, source.vision_config)
    dense_tensors = host.tensors()
    check_finite(dense_tensors)
    matches = {name: source.weights.compare(name, tensor) for name, tensor in dense_tensors.items()}
    is_same = all(match.status in ("equal", "close") for match in matches.values())
    small, weights, count, notes = None, COMPENSATED, 0, ()
    if not is_same:
        dense = host.to_sparse().requires_grad_(False)
        small, count, notes = _rebuilt(dense, source, images, config, image_processor, progress)
        weights = REFITTED if count else SLICED
    tensors = dict(source.tensors) if small is None else Tower.of(small).named_tensors()
    if host.projection is None:
        tensors.pop("visual_projection.weight", None)
    before = {name: tuple(value.shape) for name, value in dense_tensors.items()}
    small_config = source.config if small is None else Tower.of(small).vision.config
    own = host.sparse_config()
    depth = len(host.layers)
    dense_params = sum(value.numel() for value in dense_tensors.values())
    model, cuts = _installed(host, source, small_config, tensors, inplace, drop_unused)
    report = TransferReport(
        target=type(target).__name__,
        prefix=host.prefix,
        weights=weights,
        tensors=_tensor_reports(host, source, matches, before, tensors, weights),
        params=sum(value.numel() for value in tensors.values()) - sum(cut.params for cut in cuts),
        dense_params=dense_params,
        macs=_cost(small_config, own, depth - sum(cut.blocks for cut in cuts)),
        dense_macs=_cost(own, own, depth),
        cuts=cuts,
        images=count,
        seconds=time.perf_counter() - start,
        notes=notes,
    )
    return TransferResult(model, report)


def _installed(
    host: HostTower,
    source: Source,
    config: SparseCLIPVisionConfig,
    tensors: Mapping[str, torch.Tensor],
    inplace: bool,
    drop_unused: bool,
) -> tuple[Any, tuple[Cut, ...]]:
    """Return the target with the small tower, and what was dropped beyond it."""
    target: Any = host.model
    if isinstance(target, _STOCK_CLIP) and host.prefix in ("", "vision_model"):
        return replace_tower(target, config, tensors), ()
    model = target if inplace else copy.deepcopy(target)
    moved = HostTower.of(model, host.prefix)
    moved = HostTower(model, moved.prefix, moved.tower, _projection(model, host))
    moved.install(config, tensors)
    cuts = drop_unused_blocks(model, host.prefix) if drop_unused else ()
    if not moved.builds_by_type:
        values = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        setattr(model.config, SPARSE_TOWER, {"prefix": host.prefix, "vision_config": values, "has_cuts": bool(cuts)})
    return model.eval() if not target.training else model, cuts


def _projection(model: Any, host: HostTower) -> Any:
    if host.projection is None:
        return None
    name = host.name_of("visual_projection.weight").removesuffix(".weight")
    return model.get_submodule(name)


@torch.inference_mode(mode=False)
def _rebuilt(
    dense: SparseModel,
    source: Source,
    images: Any,
    config: PruningConfig | None,
    image_processor: Any,
    progress: bool,
) -> tuple[SparseModel, int, tuple[str, ...]]:
    """Apply the plan to other weights; with images, find the bases and rebuild what stays on them."""
    tower, plan = Tower.of(dense), source.plan
    narrowed = [i for i, layer in enumerate(plan.layers) if layer.heads and (layer.qk_head_dim or layer.v_head_dim)]
    if images is None:
        maps = {i: _maps(plan, i, white_statistics(tower, i)) for i in narrowed}
        note = "The target's weights differ from the source's, and nothing was rebuilt: no images were given."
        return slice_model(dense, plan, maps), 0, (note,)
    config = config or PruningConfig()
    found = list_images(images)
    with tqdm(desc="Refitting", unit="batch", disable=not progress, leave=False) as bar:
        calibration = load_calibration(found, config, tower, _clip_processor(image_processor))
        metrics = probe(tower, calibration, config, bar.update)
        maps: dict[int, HeadMaps] = {}
        if narrowed:
            for layer, statistics in walk_layers(tower, calibration, bar.update, {"heads", "queries"}):
                if layer in narrowed:
                    maps[layer] = _maps(plan, layer, attention_statistics(tower, layer, statistics, metrics))
        small = slice_model(dense, plan, maps)
        protected = [(len(tower.layers) - 1, "heads")] if config.protect_last_attention else ()
        rebuild(tower, Tower.of(small), calibration, metrics, SWEEP, bar.update, protected=protected)
    return small, calibration.num_images, calibration.warnings


def _maps(plan: PruningPlan, layer: int, statistics: Any) -> HeadMaps:
    kept = plan.layers[layer]
    return head_maps(statistics, kept.heads, kept.qk_head_dim, kept.v_head_dim)


def _clip_processor(given: Any) -> Any:
    """Return a CLIP image processor with the mean and deviation of any host's."""
    given = getattr(given, "image_processor", given)
    if given is None or isinstance(given, CLIPImageProcessorPil):
        return given
    return CLIPImageProcessorPil(image_mean=given.image_mean, image_std=given.image_std)


def _cost(config: SparseCLIPVisionConfig, own: SparseCLIPVisionConfig, depth: int) -> int:
    """Return the MACs of the first `depth` blocks of a tower, and of its patches, at the target's `image_size`."""
    return TowerCost.of(own, projection=False).total("macs", layer_widths(config)[:depth])


def _tensor_reports(
    host: HostTower,
    source: Source,
    matches: Mapping[str, WeightMatch],
    before: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, torch.Tensor],
    weights: str,
) -> tuple[TensorReport, ...]:
    rows = []
    usual = {COMPENSATED: "compensated", REFITTED: "refitted", SLICED: "sliced"}[weights]
    for name, match in matches.items():
        new = tuple(tensors[name].shape)
        rows.append(TensorReport(host.name_of(name), match.status, match.difference, usual, "", before[name], new))
    for name in sorted(set(source.tensors) - set(matches)):
        reason = f"the {type(host.model).__name__} has no such tensor"
        if name.startswith("visual_projection"):
            reason = f"the {type(host.model).__name__} does not use CLIP's projection"
        rows.append(TensorReport(name, "absent", None, "skipped", reason, None, None))
    return tuple(rows)
