"""Comparisons in one harness: pruning methods on the same images and seeds, and paired latencies."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from hf_opentrans._files import folder_bytes
from hf_opentrans.benchmark_memory import PeakMemory
from hf_opentrans.evaluation import (
    FidelityReference,
    center_crops,
    evaluate_segmentation,
    native_side,
    zero_shot_accuracy,
)
from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig
from hf_opentrans.models.modeling_dense_clip import DenseCLIPForSegmentation
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPVisionModel
from hf_opentrans.models.processing_open_vocabulary import OpenVocabularyProcessor
from hf_opentrans.pruning.latency_timing import dense_values, interleave, processor_name
from hf_opentrans.pruning.macs import count_macs, count_params, layer_widths
from hf_opentrans.pruning.plan import PruningConfig
from hf_opentrans.pruning.prune import PruningResult, prune_model


@dataclass(frozen=True)
class BenchmarkData:
    """What the methods are compared on. All parts but the images are optional.

    Args:
        calibration: Unlabelled images for pruning.
        fidelity_images: Other images for the comparison with the dense model.
        segmentation: Pairs of image and mask of class indices (-1: not counted).
        segmentation_names: Names by class index.
        classification: Images with one class each.
        classification_targets: Class index of each.
        classification_names: Names by class index.
        resolution: Side in pixels of the square crops for calibration, fidelity and classification.
        segmentation_options: Passed to `segment`.
    """

    calibration: Any
    fidelity_images: Sequence[Any] = ()
    segmentation: Sequence[tuple[Any, Any]] = ()
    segmentation_names: Sequence[str] = ()
    classification: Sequence[Any] = ()
    classification_targets: Sequence[int] = ()
    classification_names: Sequence[str] = ()
    resolution: int | None = None
    segmentation_options: dict[str, Any] | None = None


@dataclass(frozen=True)
class MethodRow:
    """One model in a comparison: what it costs and what it can do. None where it was not measured.

    Args:
        method: Name of the method; "dense" for the model itself.
        keep: Budget that was asked for; 1 for the dense model.
        macs, params: Of the vision tower at the benchmark's resolution, as it really runs.
        bytes: Of the vision tower's weights on disk (safetensors).
        class_token_cosine, patch_token_cosine: Mean cosine to the dense model.
        top1: Zero-shot accuracy.
        mean_iou, pixel_accuracy: Of segmentation.
        seconds: Wall time of pruning.
        variant: Name of the changed configuration in an ablation; "" for the method as it is.
        seed: Of the pruning; None for the dense model.
        nominal_macs: MACs without those of zero weights, for methods that leave the model as large as it was.
        latency_ms: Median time of the vision tower for one image, in milliseconds.
        speed_up: Dense time / this model's time, median of paired rounds.
        peak_memory_mib: Largest memory while pruning, in MiB: of the process, or of the tensors on an accelerator.
        predicted_error: Squared change of the unit class token plus mean squared change of the unit patch tokens, as
            pruning predicted it.
        realised_error: The same, measured on the fidelity images, which pruning has not seen.
        measuring_seconds: Wall time of measuring all this but the latency.
        widths: One "heads:qk_head_dim:v_head_dim:neurons" per layer, separated by spaces: what was kept, and all that
            timing needs.
    """

    method: str
    keep: float
    macs: int
    params: int
    bytes: int
    class_token_cosine: float | None = None
    patch_token_cosine: float | None = None
    top1: float | None = None
    mean_iou: float | None = None
    pixel_accuracy: float | None = None
    seconds: float | None = None
    variant: str = ""
    seed: int | None = None
    nominal_macs: int | None = None
    latency_ms: float | None = None
    speed_up: float | None = None
    peak_memory_mib: float | None = None
    predicted_error: float | None = None
    realised_error: float | None = None
    measuring_seconds: float | None = None
    widths: str | None = None

    @property
    def key(self) -> "RunKey":
        """What tells this row from the others of its file: method, variant, keep and seed."""
        return self.method, self.variant, self.keep, self.seed

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


RunKey = tuple[str, str, float, int | None]


@dataclass(frozen=True)
class Compared:
    """A row with its model.

    Args:
        row: The figures.
        model: The model.
        result: Of its pruning; None for the dense model.
    """

    row: MethodRow
    model: DenseCLIPForSegmentation
    result: PruningResult | None = None


@dataclass(frozen=True)
class Harness:
    """The one way in which all models of a comparison are pruned and measured.

    Args:
        dense: The model.
        processor: Its processor.
        data: What to measure on.
        reference: Tokens of the dense model; None where there are no images for them.
    """

    dense: DenseCLIPForSegmentation
    processor: OpenVocabularyProcessor
    data: BenchmarkData
    reference: FidelityReference | None = None

    @classmethod
    def of(cls, dense: DenseCLIPForSegmentation, processor: OpenVocabularyProcessor, data: BenchmarkData) -> "Harness":
        """Run the dense model once where the others are compared with its tokens."""
        reference = None
        if data.fidelity_images:
            side = data.resolution or native_side(dense)
            pixels = center_crops(data.fidelity_images, processor.image_processor, side)
            reference = FidelityReference.of(dense, pixels)
        return cls(dense, processor, data, reference)

    def measure_dense(self) -> Compared:
        """Measure the dense model."""
        return Compared(self.measure("dense", 1.0, self.dense), self.dense)

    def prune(self, config: PruningConfig, *, progress: bool = False) -> tuple[PruningResult, float | None]:
        """Prune the dense model and return the result with the peak of the memory in MiB.

        Raises:
            ValueError: If the budget cannot be met.
            ImportError: If the method needs a package that is not installed.
        """
        with PeakMemory(self.dense.device) as memory:
            result = prune_model(
                self.dense,
                self.data.calibration,
                config,
                image_processor=self.processor.image_processor,
                progress=progress,
            )
        return result, memory.mib

    def measure_pruned(
        self, result: PruningResult, config: PruningConfig, peak_memory_mib: float | None, variant: str = ""
    ) -> Compared:
        """Measure what `prune` returned.

        Raises:
            TypeError: If pruning changed the kind of the model.
        """
        model, report = result.model, result.report
        if not isinstance(model, DenseCLIPForSegmentation):
            raise TypeError(f"Pruning made a {type(model).__name__} of a segmenter. Pass a DenseCLIPForSegmentation.")
        row = replace(
            self.measure(config.method, config.keep, model.eval()),
            variant=variant,
            seed=config.seed,
            seconds=report.seconds["total"],
            nominal_macs=report.nominal_macs,
            peak_memory_mib=peak_memory_mib,
            predicted_error=report.predicted_error,
        )
        if row.class_token_cosine is not None and row.patch_token_cosine is not None:
            error = 2 * (1 - row.class_token_cosine) + 2 * (1 - row.patch_token_cosine)  # of unit vectors
            row = replace(row, realised_error=max(error, 0.0))
        return Compared(row, model, result)

    def measure(self, method: str, keep: float, model: DenseCLIPForSegmentation) -> MethodRow:
        """Measure everything that there is data for, but the latency: see `time_row`."""
        start = time.perf_counter()
        vision, data = cast("CLIPVisionConfig", model.config.vision_config), self.data
        values: dict[str, Any] = {}
        if self.reference is not None:
            measured = self.reference.compare(model)
            values = {"class_token_cosine": measured.class_token, "patch_token_cosine": measured.patch_tokens}
        if data.classification:
            values["top1"] = zero_shot_accuracy(
                model,
                self.processor,
                data.classification,
                data.classification_targets,
                data.classification_names,
                resolution=data.resolution,
            )
        if data.segmentation:
            options = data.segmentation_options or {}
            scores = evaluate_segmentation(
                model, self.processor, data.segmentation, data.segmentation_names, **options
            )
            values |= {"mean_iou": scores.mean_iou, "pixel_accuracy": scores.pixel_accuracy}
        return MethodRow(
            method=method,
            keep=keep,
            macs=count_macs(vision, resolution=data.resolution),
            params=count_params(vision),
            bytes=tower_bytes(model),
            measuring_seconds=round(time.perf_counter() - start, 3),
            widths=write_widths(vision),
            **values,
        )

    def time_row(self, row: MethodRow, *, rounds: int) -> MethodRow:
        """Return a row with its latency: one image, paired with the dense tower, the same weights for all.

        Latency depends on the widths and not on the values of the weights, so rows can be timed after all runs, when
        nothing else is at work, and again at any time.

        Args:
            row: A row with `widths`.
            rounds: Paired rounds.
        """
        dense = cast("SparseCLIPVisionModel", self.dense.vision_model)
        if row.widths is None:
            raise ValueError(f"The row of {row.method!r} has no widths. Timing needs them. Measure the row again.")
        if row.method == "dense":  # timed against itself it is 1 but for noise
            (timed,) = paired_latency({"dense": dense}, resolution=self.data.resolution, rounds=rounds)
        else:
            towers = {"dense": dense, "this": tower_of_widths(dense, row.widths)}
            timed = paired_latency(towers, resolution=self.data.resolution, rounds=rounds)[1]
        return replace(row, latency_ms=timed.median_ms, speed_up=timed.speed_up)


def compare_methods(
    dense: DenseCLIPForSegmentation,
    processor: OpenVocabularyProcessor,
    data: BenchmarkData,
    configs: Sequence[PruningConfig],
    *,
    on_row: Callable[[MethodRow], None] = lambda row: None,
    progress: bool = False,
) -> list[Compared]:
    """Measure the dense model and the models that `configs` make of it, all on the same data.

    All models stay in memory. `benchmark_pruning.run_benchmark` is the same for many runs, without the models.

    Args:
        dense: The model.
        processor: Its processor.
        data: What to measure on.
        configs: One pruning run each.
        on_row: Called with every row as soon as it is done.
        progress: Whether pruning shows a progress bar.
    """
    harness = Harness.of(dense, processor, data)
    compared = [harness.measure_dense()]
    on_row(compared[0].row)
    for config in configs:
        result, peak = harness.prune(config, progress=progress)
        compared.append(harness.measure_pruned(result, config, peak))
        on_row(compared[-1].row)
    return compared


def write_widths(config: CLIPVisionConfig) -> str:
    """Return "heads:qk_head_dim:v_head_dim:neurons" of every layer, separated by spaces."""
    return " ".join(f"{w.heads}:{w.qk_head_dim}:{w.v_head_dim}:{w.neurons}" for w in layer_widths(config))


def tower_of_widths(dense: SparseCLIPVisionModel, widths: str) -> SparseCLIPVisionModel:
    """Return a tower with random weights that has other widths than `dense` and is otherwise like it.

    Args:
        dense: The tower that it is like.
        widths: As `write_widths` writes them.
    """
    names = ("num_attention_heads", "qk_head_dim", "v_head_dim", "intermediate_size")
    layers = [dict(zip(names, map(int, layer.split(":")), strict=True)) for layer in widths.split()]
    values: dict[str, Any] = {"num_hidden_layers": len(layers), "per_layer_config": dict(enumerate(layers))}
    config = SparseCLIPVisionConfig(**{**dense_values(dense.config), **values})
    config._attn_implementation = dense.config._attn_implementation
    tower = SparseCLIPVisionModel(config).eval()
    return tower.to(device=dense.device, dtype=dense.dtype)  # pyright: ignore[reportCallIssue]


def tower_bytes(model: DenseCLIPForSegmentation) -> int:
    """Return the bytes that the vision tower takes on disk, by saving it."""
    with TemporaryDirectory() as folder:
        model.vision_model.save_pretrained(folder)
        return folder_bytes(folder, "*.safetensors")


@dataclass(frozen=True)
class LatencyRow:
    """Paired latency of one model against the first of its run.

    Args:
        model: Name.
        batch_size, resolution, threads: Of the run.
        median_ms: Median time of one forward pass in milliseconds.
        speed_up: Median over rounds of first model's time / this model's time.
        speed_up_range: Smallest and largest ratio.
        mac_ratio: First model's MACs / this model's MACs.
        efficiency: speed_up / mac_ratio.
        rounds: Counted rounds.
    """

    model: str
    batch_size: int
    resolution: int
    threads: int
    median_ms: float
    speed_up: float
    speed_up_range: tuple[float, float]
    mac_ratio: float
    efficiency: float
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


@torch.inference_mode()
def paired_latency(
    models: dict[str, Any],
    *,
    batch_size: int = 1,
    resolution: int | None = None,
    rounds: int = 15,
    warmup: int = 3,
) -> list[LatencyRow]:
    """Time vision towers in turn, A B A B ..., so that a drifting machine speed cancels in the ratios.

    Args:
        models: Vision models by name; the first is the reference.
        batch_size: Images per pass.
        resolution: Side of the images in pixels. Defaults to the first model's `image_size`.
        rounds: Counted rounds; each times every model once.
        warmup: Rounds before those.
    """
    first = next(iter(models.values()))
    side = resolution or first.config.image_size
    pixels = torch.randn(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0)).to(first.device)
    passes = {name: partial(model, pixels, interpolate_pos_encoding=True) for name, model in models.items()}
    times = interleave(passes, rounds, warmup=warmup, device=first.device)
    reference = next(iter(times.values()))
    macs = {name: count_macs(model.config, resolution=side, projection=False) for name, model in models.items()}
    rows = []
    for name, measured in times.items():
        ratios = [a / b for a, b in zip(reference, measured, strict=True)]
        ratio, mac_ratio = statistics.median(ratios), next(iter(macs.values())) / macs[name]
        median = statistics.median(measured)
        span = (min(ratios), max(ratios))
        threads = torch.get_num_threads()
        rows.append(
            LatencyRow(name, batch_size, side, threads, median, ratio, span, mac_ratio, ratio / mac_ratio, rounds)
        )
    return rows


def synthetic_towers(keep: float, *, resolution: int = 224, seed: int = 0) -> dict[str, Any]:
    """Return a random ViT-B/16-sized tower and the same one sliced to `keep` of its MACs, the same share per layer.

    Latency does not depend on the values of the weights.
    """
    torch.manual_seed(seed)
    dense = CLIPVisionModel(CLIPVisionConfig(patch_size=16)).eval()
    blank = [torch.zeros(3, resolution, resolution).numpy().transpose(1, 2, 0)] * 20
    config = PruningConfig(keep=keep, method="random", seed=seed, resolution=resolution, protect_last_attention=False)
    sparse = prune_model(dense, blank, config).model
    return {"dense ViT-B/16": dense, f"keep {keep:g}": sparse.eval()}


def vit_config(hidden: int, neurons: int, layers: int, patch: int, **options: Any) -> CLIPVisionConfig:
    """Return the configuration of a vision tower with heads of width 64, as all of OpenAI's have.

    Args:
        hidden: Width of the residual stream.
        neurons: Width of the MLPs.
        layers: How many.
        patch: Side of a patch in pixels.
        **options: Other fields: `image_size`, `projection_dim`.
    """
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        patch_size=patch,
        **options,
    )


def environment() -> dict[str, Any]:
    """Return versions, processor and threads: what a measurement depends on."""
    names = ("hf_opentrans", "torch", "transformers", "numpy", "pillow", "safetensors")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
