"""2:4 sparsity: of every four consecutive input weights of an output two stay, chosen and compensated in closed form.

Nothing gets smaller and a processor gains nothing: the zeros are multiplied like other numbers. GPUs of compute
capability 8.0 or newer can skip them in large products, see `hf_opentrans.deploy.semi_structured`. Structured pruning
(`prune_model`) is what makes a model faster everywhere; this comes on top of it, for such GPUs.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hf_opentrans._checks import check_finite
from hf_opentrans._files import write_json
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPEncoderLayer

from .calibration import (
    Calibration,
    check_statistics,
    embed_parts,
    list_images,
    load_calibration,
    split_images,
    token_weights,
)
from .plan import PruningConfig
from .reconstruction import regress
from .refit import SWEEP
from .saving import save_result
from .stages import StagedRun
from .statistics import CovarianceStatistics
from .surgery import PrunableModel, to_sparse
from .tower import Tower, summed_cosines
from .two_of_four import GROUP, compensate_two_of_four, two_of_four

SPARSITY_METHODS = ("obs", "magnitude", "random")
SPARSITY_STRUCTURES = ("attention", "mlp")
SEMI_STRUCTURED_FILE = "semi_structured_report.json"
# One image that nothing is fitted on, one that weights are fitted on, one that chooses the ridge.
_FEWEST_IMAGES = 3


@dataclass(frozen=True, kw_only=True)
class SemiStructuredConfig:
    """How to make a CLIP vision tower 2:4 sparse.

    Args:
        method: "obs" chooses by the error after compensation and lets the weights that stay do the work of those that
            go. "magnitude" keeps the largest and "random" any; both compensate nothing, and are controls.
        structures: Whose linear layers, of "attention" and "mlp".
        num_images: Calibration images, drawn at random by the seed; all of them where there are fewer. A fifth of them
            is kept for the fidelity in the report, and nothing else reads these.
        resolution: Side in pixels of the square calibration images. Defaults to the model's `image_size`.
        seed: Of the draw and of "random".
        batch_size: Images per forward pass.

    Raises:
        ValueError: If a value is outside its range.
    """

    method: str = "obs"
    structures: tuple[str, ...] = SPARSITY_STRUCTURES
    num_images: int = 1024
    resolution: int | None = None
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        kinds = (self.structures,) if isinstance(self.structures, str) else tuple(self.structures)
        for name, values, allowed in (
            ("method", (self.method,), SPARSITY_METHODS),
            ("structures", kinds, SPARSITY_STRUCTURES),
        ):
            if not values or not set(values) <= set(allowed):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}. It must be of {', '.join(allowed)}. Use for example "
                    f"{allowed[0]!r}."
                )
        object.__setattr__(self, "structures", tuple(kind for kind in SPARSITY_STRUCTURES if kind in kinds))
        self.calibration()  # checks the rest

    def calibration(self) -> PruningConfig:
        """Return the same numbers as a pruning configuration, which is what draws and prepares images."""
        return PruningConfig(
            method=self.method,
            num_images=self.num_images,
            resolution=self.resolution,
            seed=self.seed,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class SparsifiedLayer:
    """A linear layer that is 2:4 now.

    Args:
        name: Its path in the tower, such as "encoder.layers.0.mlp.fc2".
        inputs, outputs: Its widths.
        lost: Share of the variance of its output that is lost, on images that choose the ridge; None for controls.
    """

    name: str
    inputs: int
    outputs: int
    lost: float | None = None


@dataclass(frozen=True)
class SkippedLayer:
    """A linear layer that was left as it was.

    Args:
        name: Its path in the tower.
        inputs, outputs: Its widths.
        reason: Why.
    """

    name: str
    inputs: int
    outputs: int
    reason: str


@dataclass(frozen=True)
class SemiStructuredReport:
    """What was done, in numbers.

    Args:
        config: The configuration that was used.
        layers: What is 2:4 now.
        skipped: What is not, although `structures` names it.
        zeros: Share of zeros in the weights of all linear layers of the tower's blocks.
        class_token_cosine, patch_token_cosine: Mean cosine to the tokens of the model that came in, on
            `unseen_images` calibration images that were not used otherwise.
        unseen_images: Their number.
        fit_images: Images that weights were fitted on; 0 for controls.
        resolution: Side in pixels.
        seconds: Wall time by stage.
        notes: What the user should know.
    """

    config: dict[str, Any]
    layers: tuple[SparsifiedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    zeros: float
    class_token_cosine: float
    patch_token_cosine: float
    unseen_images: int
    fit_images: int
    resolution: int
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return asdict(self)

    def save(self, folder: str | Path) -> None:
        """Write the report into `folder`."""
        write_json(Path(folder) / SEMI_STRUCTURED_FILE, self.to_dict())

    @classmethod
    def load(cls, folder: str | Path) -> "SemiStructuredReport":
        """Read what `SemiStructuredResult.save_pretrained` wrote.

        Raises:
            FileNotFoundError: If there is no report in the folder.
            ValueError: If the file is damaged.
        """
        path = Path(folder) / SEMI_STRUCTURED_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            for name, kind in (("layers", SparsifiedLayer), ("skipped", SkippedLayer)):
                values[name] = tuple(kind(**entry) for entry in values[name])
            return cls(**{**values, "notes": tuple(values["notes"])})
        except (ValueError, TypeError, KeyError) as err:
            raise ValueError(
                f"{str(path)!r} is no report on 2:4 sparsity ({err}). It must be the file that `hf-opentrans "
                "sparsify` wrote. Write it again."
            ) from err


@dataclass(frozen=True)
class SemiStructuredResult:
    """The outcome of `prune_semi_structured`.

    Args:
        model: A model of the same class, shapes and precision as the one that came in, with zeros.
        report: What was done, in numbers.
    """

    model: PrunableModel
    report: SemiStructuredReport

    def save_pretrained(
        self, folder: str | Path, processor: Any = None, *, disk_dtype: torch.dtype | None = None
    ) -> None:
        """Write an ordinary folder with all weights, zeros included, its processor and the report, or nothing at all.

        Args:
            folder: New, empty, or an earlier output.
            processor: Saved with the model, so that the folder can be used alone.
            disk_dtype: Precision of the weights on disk. Defaults to the model's.
        """
        options = {"marker": SEMI_STRUCTURED_FILE, "disk_dtype": disk_dtype}
        save_result(folder, self.model, processor, write_more=self.report.save, **options)


@torch.inference_mode(mode=False)  # what comes back can be trained, whatever mode the caller is in
@torch.no_grad()
def prune_semi_structured(
    model: PrunableModel,
    images: Any,
    config: SemiStructuredConfig | None = None,
    *,
    image_processor: Any = None,
    progress: bool = False,
) -> SemiStructuredResult:
    """Set two of every four consecutive input weights to zero in the linear layers of a CLIP vision tower.

    Shapes, files and the time on a processor stay what they were: only GPUs of compute capability 8.0 or newer can
    skip these zeros, after `hf_opentrans.deploy.to_semi_structured`, and only large products gain. Reported for SAM
    ViT-H on an A100 (torchao, not measured here): 1.10x with the MLPs at 97.6 % of the mIoU, 1.07x with attention too.

    Method "obs" walks the tower in depth order beside the one that came in. Every layer reads the sparse tower's own
    stream and aims at what the layer gave before, the layers that write to the residual stream also at the gap that
    the layers before have left. Then, group by group, the pair goes whose removal costs least once all later weights
    are adapted (optimal brain surgeon with the covariance of the inputs); the bias takes the mean.

    Args:
        model: `CLIPModel`, `CLIPVisionModel`, `CLIPVisionModelWithProjection` or a sparse class, pruned or not. Not
            changed.
        images: Unlabelled images: a folder, a `datasets.Dataset`, or an iterable of images or paths.
        config: How. Defaults to `SemiStructuredConfig()`.
        image_processor: The model's image processor. Defaults to CLIP's mean and deviation.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If the model has no CLIP vision tower.
        ValueError: If there are too few images, a weight is not finite, or no layer can be made 2:4.
    """
    config = config or SemiStructuredConfig()
    if (extract := getattr(model, "extract", None)) is not None:  # of several budgets the one that is set
        model = extract()
    before = to_sparse(model).eval().float().requires_grad_(False)
    check_finite(before.state_dict())
    small = copy.deepcopy(before)
    tower, sparse = Tower.of(before), Tower.of(small)
    chosen, skipped = _choose(sparse, config)
    images = list_images(images)
    count = min(len(images), config.num_images)
    if count < _FEWEST_IMAGES:
        raise ValueError(
            f"There are {count} calibration images. At least {_FEWEST_IMAGES} are needed: some are fitted on, some "
            "choose how far, and some tell the fidelity. Give more images."
        )
    with StagedRun(_steps(tower, config, count), progress) as run:
        drawn = load_calibration(images, config.calibration(), tower, image_processor, run.step)
        start = time.perf_counter()
        fit_images = 0
        if config.method == "obs":
            inner = split_images(list(torch.cat(drawn.fit)), config.calibration())
            fit_images = inner.num_images
            layers = _sparsify(tower, sparse, inner, chosen, run.step)
        else:
            layers = _mask(chosen, config)
        run.seconds["sparsify"] = time.perf_counter() - start
        cosines = _cosines(tower, sparse, drawn.held_out)
    if not math.isfinite(sum(cosines)):
        raise ValueError(
            "The final tokens are not finite on the calibration images. Sparsity needs finite numbers. Check the "
            "weights and the images, or load the model in float32."
        )
    report = SemiStructuredReport(
        config={**asdict(config), "structures": list(config.structures)},
        layers=tuple(layers),
        skipped=tuple(skipped),
        zeros=_share_of_zeros(sparse),
        class_token_cosine=cosines[0],
        patch_token_cosine=cosines[1],
        unseen_images=sum(map(len, drawn.held_out)),
        fit_images=fit_images,
        resolution=drawn.held_out[0].shape[-1],
        seconds={name: round(value, 3) for name, value in run.seconds.items()},
        notes=drawn.warnings,
    )
    result = copy.deepcopy(model)
    cast("nn.Module", result).load_state_dict(small.state_dict())  # the same keys; casts to the model's precision
    return SemiStructuredResult(result, report)


Parts = tuple[CovarianceStatistics, CovarianceStatistics]
Hidden = list[list[torch.Tensor]]


@dataclass(frozen=True)
class _Sublayer:
    """Attention or MLP of one block: linear layers that read the normed stream, and the one that writes to it."""

    name: str
    norm: nn.Module
    module: Callable[[torch.Tensor], torch.Tensor]
    readers: dict[str, nn.Linear]
    writer: nn.Linear
    writer_name: str

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {**self.readers, self.writer_name: self.writer}

    def branch(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.module(self.norm(hidden))


def _sublayers(tower: Tower, index: int) -> Iterator[_Sublayer]:
    layer: SparseCLIPEncoderLayer = tower.layers[index]
    prefix = f"encoder.layers.{index}"
    if layer.has_attention:
        own = layer.self_attn
        readers = {f"{prefix}.self_attn.{name}": getattr(own, name) for name in ("q_proj", "k_proj", "v_proj")}
        path = f"{prefix}.self_attn.out_proj"
        yield _Sublayer("attention", layer.layer_norm1, lambda x: own(x)[0], readers, own.out_proj, path)
    if layer.has_mlp:
        mlp = layer.mlp
        readers = {f"{prefix}.mlp.fc1": mlp.fc1}
        yield _Sublayer("mlp", layer.layer_norm2, mlp, readers, mlp.fc2, f"{prefix}.mlp.fc2")


def _choose(tower: Tower, config: SemiStructuredConfig) -> tuple[dict[str, nn.Linear], list[SkippedLayer]]:
    """Return the layers to make 2:4 by name, and those that cannot be."""
    chosen: dict[str, nn.Linear] = {}
    skipped = []
    for index in range(len(tower.layers)):
        for sublayer in _sublayers(tower, index):
            for name, linear in sublayer.linears.items() if sublayer.name in config.structures else ():
                if not linear.weight.numel():
                    continue  # pruned away
                if linear.in_features % GROUP:
                    reason = f"{linear.in_features} inputs are no multiple of {GROUP}"
                    skipped.append(SkippedLayer(name, linear.in_features, linear.out_features, reason))
                else:
                    chosen[name] = linear
    if not chosen:
        raise ValueError(
            f"None of the linear layers of {', '.join(config.structures)} has a multiple of {GROUP} inputs. 2:4 needs "
            "groups of four. Prune with other widths (round_neurons, round_head_dim), or name other structures."
        )
    return chosen, skipped


def _mask(chosen: dict[str, nn.Linear], config: SemiStructuredConfig) -> list[SparsifiedLayer]:
    """Set weights to zero by size or at random, and compensate nothing."""
    generator = torch.Generator().manual_seed(config.seed)
    for linear in chosen.values():
        weight = linear.weight
        is_random = config.method == "random"
        scores = torch.rand(weight.shape, generator=generator).to(weight) if is_random else weight.abs()
        weight.mul_(two_of_four(scores))
    return [SparsifiedLayer(name, linear.in_features, linear.out_features) for name, linear in chosen.items()]


def _sparsify(
    tower: Tower,
    sparse: Tower,
    calibration: Calibration,
    chosen: dict[str, nn.Linear],
    on_batch: Callable[[], object],
) -> list[SparsifiedLayer]:
    """Walk both towers and make the chosen layers 2:4 in depth order; writes into `sparse`."""
    dense_hidden = embed_parts(tower, calibration)
    sparse_hidden = [list(part) for part in dense_hidden]
    done = []
    for index in range(len(tower.layers)):
        for dense, own in zip(_sublayers(tower, index), _sublayers(sparse, index), strict=True):
            readers = {name: linear for name, linear in own.readers.items() if name in chosen}
            if readers:
                targets = [dense.readers[name] for name in readers]
                done += _solve(readers, _read(dense, own, targets, dense_hidden, sparse_hidden, on_batch), index)
            parts = _write(dense, own, dense_hidden, sparse_hidden, on_batch)
            if own.writer_name in chosen:
                done += _solve({own.writer_name: own.writer}, parts, index, has_gap=True)
            for part in sparse_hidden:
                for position, batch in enumerate(part):
                    part[position] = batch + own.branch(batch)
                    on_batch()
    return done


def _read(
    dense: _Sublayer,
    own: _Sublayer,
    targets: list[nn.Linear],
    dense_hidden: Hidden,
    sparse_hidden: Hidden,
    on_batch: Callable[[], object],
) -> Parts:
    """Gather rows [what the readers of the sparse tower read, what the dense readers give]."""
    width = targets[0].in_features + sum(linear.out_features for linear in targets)
    parts = _empty_parts(width, targets[0])
    for statistics, old, new in zip(parts, dense_hidden, sparse_hidden, strict=True):
        for before, after in zip(old, new, strict=True):
            inputs, read = own.norm(after), dense.norm(before)
            rows = torch.cat([inputs, *(linear(read) for linear in targets)], -1)
            statistics.update(rows.flatten(0, 1), token_weights(inputs))
            on_batch()
    return parts


def _write(
    dense: _Sublayer, own: _Sublayer, dense_hidden: Hidden, sparse_hidden: Hidden, on_batch: Callable[[], object]
) -> Parts:
    """Gather rows [what the sparse writer reads, dense output plus gap, gap]; moves the dense stream on."""
    writer = own.writer
    tail = {"tail": writer.out_features, "tail_with": writer.in_features}
    parts = _empty_parts(writer.in_features + 2 * writer.out_features, writer, **tail)
    seen: list[torch.Tensor] = []
    hook = writer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for statistics, old, new in zip(parts, dense_hidden, sparse_hidden, strict=True):
            for position, (before, after) in enumerate(zip(old, new, strict=True)):
                target, gap = dense.branch(before), before - after
                old[position] = before + target
                seen.clear()
                own.branch(after)
                inputs = seen[0] if seen else before.new_empty(*before.shape[:2], 0)  # attention without heads
                rows = torch.cat([inputs, target + gap, gap], -1)
                statistics.update(rows.flatten(0, 1), token_weights(inputs if inputs.shape[-1] else target))
                on_batch()
    finally:
        hook.remove()
    return parts


def _empty_parts(width: int, like: nn.Linear, **tail: int) -> Parts:
    device = like.weight.device
    return CovarianceStatistics(width, device, **tail), CovarianceStatistics(width, device, **tail)


def _solve(linears: dict[str, nn.Linear], parts: Parts, layer: int, *, has_gap: bool = False) -> list[SparsifiedLayer]:
    """Aim linear layers with the same inputs at their target and make them 2:4."""
    check_statistics(layer, " and ".join(name.rsplit(".", 1)[-1] for name in linears), parts)
    weight = torch.cat([linear.weight for linear in linears.values()]).double()
    bias = torch.cat([linear.bias for linear in linears.values()]).double()
    gaps = SWEEP.gap_factors if has_gap else (1.0,)
    aim = regress(weight, bias, *parts, torch.eye(len(weight)), gap_factors=gaps)
    inputs, total = weight.shape[1], parts[0].merge(parts[1])
    new = compensate_two_of_four(aim.weight, total.covariance[:inputs, :inputs])
    change, unseen = aim.weight - new, parts[1].covariance[:inputs, :inputs]
    shifted = aim.bias + change @ total.mean[:inputs]
    lost = ((change @ unseen) * change).sum(1), ((aim.weight @ unseen) * aim.weight).sum(1)
    sizes = [linear.out_features for linear in linears.values()]
    pieces = zip(linears.items(), *(x.split(sizes) for x in (new, shifted, *lost)), strict=True)
    done = []
    for (name, linear), rows, biases, gone, before in pieces:
        linear.weight.copy_(rows)
        linear.bias.copy_(biases)
        share = float(gone.sum() / before.sum().clamp(min=torch.finfo(torch.float64).tiny))
        done.append(SparsifiedLayer(name, linear.in_features, linear.out_features, share))
    return done


def _cosines(tower: Tower, sparse: Tower, batches: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Return the mean cosines of class and patch tokens to those of the tower that came in."""
    sums = torch.zeros(2, dtype=torch.float64)
    for pixels in batches:
        pixels = pixels.to(tower.vision.device)
        sums += summed_cosines(sparse.tokens(pixels), tower.tokens(pixels))
    found = (sums / sum(map(len, batches))).tolist()
    return found[0], found[1]


def _share_of_zeros(tower: Tower) -> float:
    sublayers = [sublayer for index in range(len(tower.layers)) for sublayer in _sublayers(tower, index)]
    weights = [linear.weight for sublayer in sublayers for linear in sublayer.linears.values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def _steps(tower: Tower, config: SemiStructuredConfig, images: int) -> int:
    """Return the steps of the progress bar: every image once, and three passes of every sublayer."""
    sublayers = sum(layer.has_attention + layer.has_mlp for layer in tower.layers)
    batches = -(-images // config.batch_size) + 1
    return images + (3 * sublayers * batches if config.method == "obs" else 0)
