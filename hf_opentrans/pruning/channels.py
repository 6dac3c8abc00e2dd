"""One-shot pruning of the inner channels of a CLIP ResNet from unlabelled images, by the engine that prunes ViTs."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_opentrans._checks import check_finite
from hf_opentrans._distributed import add_up, own_share, process_count
from hf_opentrans.models.modeling_clip_resnet import CLIPResNetVisionModel

from .calibration import (
    ROWS_PER_COLUMN,
    Calibration,
    check_copies,
    draw_images,
    list_images,
    prepare_images,
    split_images,
)
from .channel_rebuild import rebuild_channels
from .channel_selection import METHODS, ChannelSelection, make_channel_budget, select_channels
from .channel_statistics import Key
from .channel_trunk import STRIDE, Trunk, TrunkCost, slice_channels
from .plan import PruningConfig
from .reconstruction import Rebuilt
from .saving import save_result
from .stages import StagedRun

CHANNEL_REPORT_FILE = "channel_pruning_report.json"
# Options that say something about heads, or about searches that channels do not have.
WITHOUT_MEANING = ("structures", "metric", "search", "search_steps", "min_heads", "round_head_dim")
WITHOUT_MEANING += ("protect_last_attention",)


@dataclass(frozen=True)
class BottleneckReport:
    """One bottleneck before and after.

    Args:
        name: In the model.
        first, second: Channels after the first and after the second convolution.
        dense_first, dense_second: The same before.
        predicted_error: What the menus expect the final tokens to lose by it; None for controls.
        conv2_error, conv3_error: Held-out error of the refitted convolutions under the output metric, with what the
            bottlenecks before have left; None where nothing was refitted.
        conv2_error_uncompensated, conv3_error_uncompensated: The same before the refit.
        conv2_ridge, conv3_ridge: Ridge that was chosen, relative; None for a mean shift alone or no refit.
        conv3_gap_factor: Share of the residual stream's error that was aimed at.
    """

    name: str
    first: int
    second: int
    dense_first: int
    dense_second: int
    predicted_error: float | None = None
    conv2_error: float | None = None
    conv3_error: float | None = None
    conv2_error_uncompensated: float | None = None
    conv3_error_uncompensated: float | None = None
    conv2_ridge: float | None = None
    conv3_ridge: float | None = None
    conv3_gap_factor: float | None = None


@dataclass(frozen=True)
class ChannelPruningReport:
    """The figures of one run of `prune_channels`.

    Args:
        config: The configuration that was used.
        bottlenecks: One report per bottleneck.
        resolution: Side in pixels that MACs are counted at.
        dense_macs, macs: Multiply-accumulates of all convolutions for one image, before and after.
        dense_params, params: Weights of all convolutions, before and after.
        dense_total_params, total_params: Parameters of the whole model, before and after.
        realised_keep: Share of the unit that is left.
        calibration_images: Images of the calibration set.
        calibration_fingerprint: SHA-256 of their pixel values.
        seconds: Wall time by stage.
        notes: What the user should know.
        predicted_error: What the menus expect the final tokens to lose in all: squared change of the embedding plus
            mean squared change of the dense features, all of unit length. None for controls.
        realised_error: The same, measured on the held-out calibration images.
        embedding_error: Relative change of the embedding on all calibration images, root mean square.
    """

    config: dict[str, Any]
    bottlenecks: tuple[BottleneckReport, ...]
    resolution: int
    dense_macs: int
    macs: int
    dense_params: int
    params: int
    dense_total_params: int
    total_params: int
    realised_keep: float
    calibration_images: int
    calibration_fingerprint: str
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    predicted_error: float | None = None
    realised_error: float | None = None
    embedding_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return asdict(self)

    def save(self, folder: str | Path) -> None:
        """Write `channel_pruning_report.json` into `folder`."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        (Path(folder) / CHANNEL_REPORT_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "ChannelPruningReport":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no report.
        """
        path = Path(folder) / CHANNEL_REPORT_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"There is no {CHANNEL_REPORT_FILE} in {str(folder)!r}. Give a folder that prune_channels wrote."
            )
        values = json.loads(path.read_text(encoding="utf-8"))
        values["config"]["structures"] = tuple(values["config"]["structures"])
        values["bottlenecks"] = tuple(BottleneckReport(**entry) for entry in values["bottlenecks"])
        return cls(**values | {"notes": tuple(values["notes"])})


@dataclass(frozen=True)
class ChannelPruningResult:
    """The outcome of `prune_channels`.

    Args:
        model: The smaller model.
        report: What was done, in numbers.
    """

    model: CLIPResNetVisionModel
    report: ChannelPruningReport

    def save_pretrained(
        self, folder: str | Path, processor: Any = None, *, disk_dtype: torch.dtype | None = None
    ) -> None:
        """Write the model, its processor and the report as one folder, or nothing at all.

        `CLIPResNetVisionModel.from_pretrained` loads it like any other.

        Args:
            folder: New, empty, or an earlier output.
            processor: Saved with the model, so that the folder can be used alone.
            disk_dtype: Precision of the weights on disk. Defaults to the model's.
        """
        options = {"marker": CHANNEL_REPORT_FILE, "disk_dtype": disk_dtype}
        save_result(folder, self.model, processor, write_more=self.report.save, **options)


@torch.inference_mode(mode=False)  # the probes need gradients, whatever mode the caller is in
def prune_channels(
    model: CLIPResNetVisionModel,
    images: Any,
    config: PruningConfig | None = None,
    *,
    image_processor: Any = None,
    progress: bool = False,
) -> ChannelPruningResult:
    """Prune the inner channels of a CLIP ResNet's bottlenecks in one shot, without labels.

    The method is that of `prune_model`, for convolutions:

    1. Probes measure how the outputs of second and third convolutions move the final tokens (the output metric).
    2. Bottleneck by bottleneck, the moments of what these convolutions read become menus: every pair of inner widths
       with its error and its exact cost. A pair's error is the sum of both groups' exact least-squares errors, its
       cost counts that the 3x3 convolution has the product of both widths.
    3. One budget, of all convolutions, is spread over all menus.
    4. What stays is sliced out, and refitted by least squares in depth order to do the work of what went.

    Stem, shortcuts, the widths between bottlenecks and the attention pool stay as they are, and count as fixed cost.
    Normalisations keep their statistics but for the mean, which takes up the bias of the refit. The residual streams
    of all images are held in memory: at 224 pixels 3.2 MB per image and stream for RN50.

    Of `config`, `min_neurons` and `round_neurons` hold for channels. The methods "obs", "magnitude" and "random" are
    supported, the units "macs" and "params".

    Args:
        model: Not changed.
        images: Unlabelled images: a folder, a `datasets.Dataset`, or an iterable of images or paths.
        config: How far and how. Defaults to `PruningConfig()`.
        image_processor: The model's image processor. Defaults to CLIP's mean and deviation.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If the model is no CLIP ResNet.
        ValueError: If an option has no meaning here, the budget lies below the floors, or a weight is not finite.
    """
    config = config or PruningConfig()
    _check_model(model)
    check_channel_config(config)
    dense_model = _working_copy(model)
    check_finite(dense_model.state_dict())
    dense = Trunk(dense_model)
    side = max((config.resolution or dense_model.config.image_size) // STRIDE, 1) * STRIDE
    budget = make_channel_budget(dense, config, side)
    found = list_images(images)
    with StagedRun(_steps(config, len(found), len(dense.bottlenecks)), progress) as run:
        calibration = _load_calibration(dense, found, config, side, image_processor, run.step)
        choice = run.time("selection", lambda: select_channels(dense, calibration, budget, config, run.step))
        small = Trunk(slice_channels(dense_model, choice.kept))
        rebuilt: dict[Key, Rebuilt] = {}
        if config.method == "obs" and config.keep < 1:
            rebuilt = run.time(
                "rebuild",
                lambda: rebuild_channels(dense, small, choice.kept, calibration, choice.metrics, config, run.step),
            )
        errors = _measure_errors(dense, small, calibration)
    report = _make_report(dense, small, choice, rebuilt, calibration, config, side, errors, run.seconds)
    pruned = small.model.to(model.dtype)  # pyright: ignore[reportArgumentType]
    return ChannelPruningResult(pruned.train(model.training), report)


def _check_model(model: Any) -> None:
    if not isinstance(model, CLIPResNetVisionModel):
        raise TypeError(
            f"The model is a {type(model).__name__}. prune_channels needs a CLIPResNetVisionModel. Use prune_model "
            "for a CLIP with a ViT."
        )


def check_channel_config(config: PruningConfig) -> None:
    """Raise ValueError where an option means nothing to channels, or is not supported for them."""
    for name, allowed in (("method", METHODS), ("unit", ("macs", "params"))):
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(
                f"{name} is {value!r}. For the channels of a ResNet it must be one of {', '.join(allowed)}. "
                f"Use for example {name}={allowed[0]!r}."
            )
    usual = PruningConfig()
    for name in WITHOUT_MEANING:
        value, default = getattr(config, name), getattr(usual, name)
        if value != default:
            raise ValueError(
                f"{name} is {value!r}. It means nothing to the channels of a ResNet. Leave it at {default!r}."
            )


def _working_copy(model: CLIPResNetVisionModel) -> CLIPResNetVisionModel:
    kept = tuple((tuple(range(first)), tuple(range(second))) for first, second in Trunk(model).widths)
    return slice_channels(model, kept).eval().float().requires_grad_(False)


def _load_calibration(
    dense: Trunk,
    found: list[Any],
    config: PruningConfig,
    side: int,
    image_processor: Any,
    on_image: Callable[[], object],
) -> Calibration:
    chosen = draw_images(len(found), config)
    notes: tuple[str, ...] = ()
    if config.method == "obs" and config.keep < 1:
        notes = _doubt(dense, len(chosen), side)
    pixels = prepare_images(found, chosen, side, image_processor, on_image)
    if config.method == "obs":
        notes += check_copies(pixels)
    return split_images(pixels, config, notes)


def _doubt(dense: Trunk, images: int, side: int) -> tuple[str, ...]:
    """Say where least squares has fewer rows than it needs: 3x3 convolutions of late stages have few positions."""
    costs, blocks = TrunkCost.of(dense, "macs", side).bottlenecks, dense.bottlenecks
    needs = [ROWS_PER_COLUMN * 9 * b.conv2.in_channels / c.positions for b, c in zip(blocks, costs, strict=True)]
    enough = math.ceil(max(needs))
    if images >= enough:
        return ()
    worst = needs.index(max(needs))
    return (
        f"{images} calibration images give {images * costs[worst].positions} positions for the "
        f"{9 * blocks[worst].conv2.in_channels} inputs of {dense.names[worst]}.conv2. Fewer than {ROWS_PER_COLUMN} "
        f"per input make the compensation noisy. {enough} images or more are better.",
    )


@torch.no_grad()
def _measure_errors(dense: Trunk, small: Trunk, calibration: Calibration) -> tuple[float, float]:
    """Return the change of the unit tokens on held-out images, and the relative one of the embedding on all.

    Raises:
        ValueError: If the embeddings are not finite.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=dense.model.device)
    for is_held_out, part in ((0, calibration.fit), (1, calibration.held_out)):
        for batch in own_share(part):
            pixels = batch.to(dense.model.device)
            outputs = [trunk.model(pixels) for trunk in (dense, small)]
            before, after = (output.pooler_output.double() for output in outputs)
            totals[:2] += torch.stack([(after - before).square().sum(), before.square().sum()])
            if is_held_out:
                tokens = [t.finish(o.last_hidden_state) for t, o in zip((dense, small), outputs, strict=True)]
                changes = (tokens[0] - tokens[1]).square().sum(-1).double()
                lost = (changes[:, 0] + changes[:, 1:].mean(1)).sum()
                totals[2:] += torch.stack([lost, lost.new_tensor(float(len(batch)))])
    add_up(totals)
    found = float(totals[2] / totals[3]), float((totals[0] / totals[1]).sqrt())
    if not all(math.isfinite(error) for error in found):
        raise ValueError(
            "The embeddings are not finite, or all zero, on the calibration images. Pruning needs finite numbers. "
            "Check the weights and the images."
        )
    return found


def _make_report(
    dense: Trunk,
    small: Trunk,
    choice: ChannelSelection,
    rebuilt: dict[Key, Rebuilt],
    calibration: Calibration,
    config: PruningConfig,
    side: int,
    errors: tuple[float, float],
    seconds: dict[str, float],
) -> ChannelPruningReport:
    counts = {u: [TrunkCost.of(t, u, side).total(t.widths) for t in (dense, small)] for u in ("macs", "params")}
    entries = []
    for index, (old, new) in enumerate(zip(dense.widths, small.widths, strict=True)):
        values: dict[str, float | None] = {}
        for name in ("conv2", "conv3"):
            if (done := rebuilt.get((index, name))) is not None:
                values[f"{name}_error"], values[f"{name}_error_uncompensated"] = done.error, done.error_before
                values[f"{name}_ridge"] = done.ridge
                if name == "conv3":
                    values["conv3_gap_factor"] = done.gap_factor
        predicted = choice.errors[index] if choice.errors else None
        entries.append(BottleneckReport(dense.names[index], *new, *old, predicted, **values))
    same = [f"{dense.names[index]}.{name}" for (index, name), done in rebuilt.items() if done.is_kept]
    notes = [f"Kept as sliced, because refitting raised the held-out error: {', '.join(same)}."] if same else []
    before, after = counts[config.unit]
    return ChannelPruningReport(
        config=config.to_dict(),
        bottlenecks=tuple(entries),
        resolution=side,
        dense_macs=counts["macs"][0],
        macs=counts["macs"][1],
        dense_params=counts["params"][0],
        params=counts["params"][1],
        dense_total_params=sum(p.numel() for p in dense.model.parameters()),
        total_params=sum(p.numel() for p in small.model.parameters()),
        realised_keep=after / before,
        calibration_images=calibration.num_images,
        calibration_fingerprint=calibration.fingerprint,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        notes=(*calibration.warnings, *notes),
        predicted_error=sum(choice.errors) if choice.errors else None,
        realised_error=errors[0],
        embedding_error=errors[1],
    )


def _steps(config: PruningConfig, images: int, bottlenecks: int) -> int:
    """Return the steps of the progress bar."""
    count = min(config.num_images, images)
    batches = -(-count // (config.batch_size * process_count())) + 1  # of this process
    steps = bottlenecks * batches * (5 if config.refit else 4) if config.method == "obs" and config.keep < 1 else 0
    return count + steps
