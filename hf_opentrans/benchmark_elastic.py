"""What nested budgets in one checkpoint cost and lose beside one model per budget: fidelity, bytes, times."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from hf_opentrans._files import folder_bytes
from hf_opentrans.benchmark_rows import RowFile, duration
from hf_opentrans.benchmarks import BenchmarkData, Harness, MethodRow, paired_latency, tower_of_widths
from hf_opentrans.loading import SAFE, quiet_transformers
from hf_opentrans.models.modeling_dense_clip import DenseCLIPForSegmentation
from hf_opentrans.models.modeling_elastic_clip import ElasticCLIPForSegmentation, ElasticMixin
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPVisionModel
from hf_opentrans.models.processing_open_vocabulary import OpenVocabularyProcessor
from hf_opentrans.pruning.calibration import list_images
from hf_opentrans.pruning.elastic import HELD_OUT_SHARE, MOST_HELD_OUT, check_shares, make_elastic, prune_elastic
from hf_opentrans.pruning.elastic_order import Layers, cut_model
from hf_opentrans.pruning.latency_timing import interleave, milliseconds
from hf_opentrans.pruning.plan import PruningConfig

DENSE, ELASTIC, SINGLE, RANDOM = WAYS = ("dense", "elastic", "single", "random")
BUDGETS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
THREE = (0.8, 0.6, 0.4)
# Most times the bytes of the largest budget alone, by the number of budgets.
MOST_RATIO = {3: 1.5, 6: 2.4}
# From which budget up how far the cosine may be below that of a model of this budget alone.
MOST_BELOW = ((0.6, 0.01), (0.0, 0.03))
LOAD_ROUNDS, SWITCH_ROUNDS, LATENCY_ROUNDS = 7, 9, 15
Table = tuple[list[str], list[list[str]]]
Load = Callable[[], tuple[DenseCLIPForSegmentation, OpenVocabularyProcessor]]


@dataclass(frozen=True)
class ElasticRow:
    """One model, measured.

    Args:
        way: "dense", "elastic" (one budget of the checkpoint with all of them), "single" (the same pruning for this
            budget alone), or "random" (units drawn at random, no compensation).
        budget: Share of the multiply-accumulates that was asked for.
        macs, params: Of the vision tower.
        bytes_alone: Of a file with this tower alone, in float32.
        bytes_added: What the budget adds to the checkpoint; None where there is none.
        class_token_cosine, patch_token_cosine: Mean cosine to the dense model, on images that nothing was fitted on.
        mean_iou: Of segmentation; None where it was not measured.
        seconds: Wall time of pruning; of all budgets together for "elastic".
        widths: See `MethodRow`.
    """

    way: str
    budget: float
    macs: int
    params: int
    bytes_alone: int
    bytes_added: int | None
    class_token_cosine: float
    patch_token_cosine: float
    mean_iou: float | None
    seconds: float | None
    widths: str

    @property
    def key(self) -> tuple[str, float]:
        """What tells this row from the others of its file."""
        return self.way, self.budget

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class FileSize:
    """One checkpoint of several budgets on disk.

    Args:
        budgets: That it holds, largest first.
        precision: Of the weights of the largest budget.
        file_bytes, largest_bytes: Of the whole model's file, with all budgets and with the largest alone.
        other_bytes: Of the tensors outside the vision tower, which both files hold.
    """

    budgets: tuple[float, ...]
    precision: str
    file_bytes: int
    largest_bytes: int
    other_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes of the vision tower with all budgets, relative to the largest alone."""
        return (self.file_bytes - self.other_bytes) / (self.largest_bytes - self.other_bytes)


@dataclass(frozen=True)
class BudgetTiming:
    """What one budget takes, in milliseconds: medians of paired rounds, files in the page cache.

    Args:
        budget: Which.
        whole_ms, alone_ms, plain_ms: Loading the checkpoint with all budgets, one budget of it, and a plain pruned
            model of the same widths from a file of its own.
        bytes_read, bytes_file: What loading one budget reads of the checkpoint's tensors, and all bytes of the file.
        switch_ms: `set_budget` from another budget.
        elastic_ms, extracted_ms, single_ms: One image through the tower: of the elastic model at this budget, of a
            plain model with the same widths, and of the model that was pruned for this budget alone.
        latency_ratio: extracted_ms / elastic_ms, median over rounds: 1 where the elastic model is as fast.
        latency_range: Smallest and largest such ratio.
    """

    budget: float
    whole_ms: float
    alone_ms: float
    plain_ms: float
    bytes_read: int
    bytes_file: int
    switch_ms: float
    elastic_ms: float
    extracted_ms: float
    single_ms: float
    latency_ratio: float
    latency_range: tuple[float, float]

    @property
    def reload_ratio(self) -> float:
        """How many times longer loading this budget takes than switching to it."""
        return self.alone_ms / self.switch_ms


class ElasticFile(RowFile[ElasticRow]):
    """The rows of `benchmark elastic`, the sizes of files and the times; see `RowFile`."""

    row_type, written_by = ElasticRow, "benchmark elastic"

    def __init__(self, path: Path | None, settings: dict[str, Any], command: str) -> None:
        self.files: list[FileSize] = []
        self.timings: list[BudgetTiming] = []
        super().__init__(path, settings, command)

    def read_more(self, values: dict[str, Any]) -> None:
        """Take sizes and times from the file's object."""
        self.files, self.timings = files_of(values), timings_of(values)

    def more(self) -> dict[str, Any]:
        """Return sizes and times for the file's object."""
        return {"files": [asdict(size) for size in self.files], "timings": [asdict(timing) for timing in self.timings]}

    def of(self, way: str) -> list[ElasticRow]:
        """Return the rows of one way, largest budget first."""
        return sorted((row for row in self.rows if row.way == way), key=lambda row: -row.budget)


def files_of(values: dict[str, Any]) -> list[FileSize]:
    """Read the sizes in a result's JSON object."""
    return [FileSize(**{**size, "budgets": tuple(size["budgets"])}) for size in values["files"]]


def timings_of(values: dict[str, Any]) -> list[BudgetTiming]:
    """Read the times in a result's JSON object."""
    return [BudgetTiming(**{**entry, "latency_range": tuple(entry["latency_range"])}) for entry in values["timings"]]


def split_images(images: Any, fidelity_images: Any) -> tuple[list[Any], list[Any]]:
    """Return images to prune with, and others to measure on.

    Args:
        images: What to prune with, see `list_images`.
        fidelity_images: What to measure on; None takes every tenth of `images`, at most 64.

    Raises:
        ValueError: If one image must serve for both.
    """
    found = list_images(images)
    if fidelity_images is not None:
        return found, list_images(fidelity_images)
    step = round(1 / HELD_OUT_SHARE)
    unseen = found[::step][:MOST_HELD_OUT]
    if len(found) < 2:
        raise ValueError(
            "There is 1 image. Fidelity must be measured on others than those that weights are fitted on. Give more, "
            "or fidelity_images."
        )
    chosen = {id(image) for image in unseen}
    return [image for image in found if id(image) not in chosen], unseen


def run_elastic(
    load: Load,
    data: BenchmarkData,
    budgets: Sequence[float],
    config: PruningConfig,
    results: ElasticFile,
    *,
    timing: bool = True,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> None:
    """Measure every model that `results` does not hold yet, then the sizes of files, then times.

    Args:
        load: Returns the dense model and its processor; not called where nothing is left to do.
        data: What to measure on; fidelity images are needed.
        budgets: Shares to keep.
        config: How to prune; its `keep` is not read.
        results: Takes the rows; see `ElasticFile`.
        timing: Whether to time loading, switching and forward passes where the file has no times. Nothing else should
            run meanwhile.
        say: Called with a line on what comes next.
        progress: Whether pruning shows its bar.

    Raises:
        ValueError: If the budgets are no shares, or there are no images to measure on.
    """
    shares = check_shares(budgets, config)
    if not data.fidelity_images:
        raise ValueError("There are no fidelity_images. Cosines are measured on images of their own. Give some.")
    wanted = [(DENSE, 1.0), *((way, share) for way in WAYS[1:] for share in shares)]
    done = {row.key for row in results.rows}
    left = [key for key in wanted if key not in done]
    say(f"{len(wanted)} models: {len(wanted) - len(left)} in the file already, {len(left)} to do.")
    is_timed = not timing or bool(results.timings)
    if left or not results.files or not is_timed:
        dense, processor = load()
        if left:
            _measure(Harness.of(dense, processor, data), shares, config, left, results, say, progress)
        if not results.files:
            results.files = measure_files(dense, results.of(ELASTIC))
            results.save()
        if not is_timed:
            say(f"Timing {len(shares)} budgets. Nothing else should run meanwhile.")
            results.timings = measure_times(dense, results.of(ELASTIC), results.of(SINGLE), data.resolution)
            results.save()
    results.save(at_end=True)


def _measure(
    harness: Harness,
    shares: Sequence[float],
    config: PruningConfig,
    left: Sequence[tuple[str, float]],
    results: ElasticFile,
    say: Callable[[str], None],
    progress: bool,
) -> None:
    """Add the rows that are left: the dense model, all budgets of one checkpoint, then one model after the other."""
    elastic, seconds = None, None
    for way, share in left:
        if way == DENSE:
            results.add(_row(way, harness.measure_dense().row))
        elif way == ELASTIC:
            if elastic is None:
                elastic, seconds = _prune_all(harness, shares, config, progress)
                say(f"{len(shares)} budgets in one checkpoint: {duration(seconds)}.")
            small = elastic.set_budget(share).extract()
            added = elastic.added_bytes(elastic.budgets.index(share))
            row = _row(way, harness.measure(way, share, small))
            results.add(replace(row, bytes_added=added, seconds=seconds))
        else:
            method = config.method if way == SINGLE else RANDOM
            own = replace(config, keep=share, method=method)
            result, peak = harness.prune(own, progress=progress)
            row = harness.measure_pruned(result, own, peak).row
            results.add(_row(way, row))
            say(f"{way} at {share:g}: {duration(row.seconds or 0)}.")


def _prune_all(
    harness: Harness, shares: Sequence[float], config: PruningConfig, progress: bool
) -> tuple[ElasticMixin, float]:
    processor, data = harness.processor, harness.data
    result = prune_elastic(
        harness.dense,
        data.calibration,
        shares,
        config,
        image_processor=processor.image_processor,
        held_out_images=list(data.fidelity_images),
        progress=progress,
    )
    return result.model, result.report.seconds["total"]


def _row(way: str, row: MethodRow) -> ElasticRow:
    if row.class_token_cosine is None or row.patch_token_cosine is None:
        raise ValueError("The model was not compared with the dense one. fidelity_images are needed. Give some.")
    return ElasticRow(
        way=way,
        budget=row.keep,
        macs=row.macs,
        params=row.params,
        bytes_alone=row.bytes,
        bytes_added=None,
        class_token_cosine=row.class_token_cosine,
        patch_token_cosine=row.patch_token_cosine,
        mean_iou=row.mean_iou,
        seconds=row.seconds,
        widths=row.widths or "",
    )


def elastic_of_widths(dense: DenseCLIPForSegmentation, rows: Sequence[ElasticRow]) -> ElasticCLIPForSegmentation:
    """Return an elastic model with the widths of `rows` and the first units of `dense`, for bytes and times alone.

    Neither depends on the values of the weights, so that both can be measured again at any time.

    Args:
        dense: The dense model.
        rows: Of "elastic", largest budget first.
    """
    layers: list[Layers] = [[[int(w) for w in layer.split(":")] for layer in row.widths.split()] for row in rows]
    towers = [cut_model(dense, widths) for widths in layers]
    return cast("ElasticCLIPForSegmentation", make_elastic(towers, [row.budget for row in rows], layers))


def measure_files(dense: DenseCLIPForSegmentation, rows: Sequence[ElasticRow]) -> list[FileSize]:
    """Save checkpoints of all budgets, and of `THREE` where these are among them, in float32 and float16.

    Args:
        dense: The dense model.
        rows: Of "elastic", largest budget first.
    """
    sets = [[row for row in rows if row.budget in THREE]] if {row.budget for row in rows} > set(THREE) else []
    found = []
    for chosen in (*sets, list(rows)):
        elastic = elastic_of_widths(dense, chosen)
        for precision in (torch.float32, torch.float16):
            whole, largest = (_saved_bytes(model, precision) for model in (elastic, elastic.extract()))
            other = [v for name, v in dense.state_dict().items() if not name.startswith(("vision_model.", "visual_"))]
            text = sum(value.numel() * precision.itemsize for value in other if value.is_floating_point())
            budgets = tuple(row.budget for row in chosen)
            found.append(FileSize(budgets, str(precision).removeprefix("torch."), whole, largest, text))
    return found


def _saved_bytes(model: Any, precision: torch.dtype) -> int:
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict={name: v.to(precision) for name, v in model.state_dict().items()})
        return folder_bytes(folder, "*.safetensors")


def measure_times(
    dense: DenseCLIPForSegmentation,
    rows: Sequence[ElasticRow],
    singles: Sequence[ElasticRow],
    resolution: int | None = None,
) -> list[BudgetTiming]:
    """Time loading, switching and forward passes of every budget, in paired rounds.

    Args:
        dense: The dense model.
        rows: Of "elastic", largest budget first.
        singles: Of "single", for the same budgets.
        resolution: Side of the images in pixels. Defaults to the model's.
    """
    elastic = elastic_of_widths(dense, rows)
    switches = _switch_times(elastic)
    timings = []
    with TemporaryDirectory() as temporary, quiet_transformers():
        root = Path(temporary)
        elastic.save_pretrained(root / "elastic")
        for row, single in zip(rows, singles, strict=True):
            small = elastic.set_budget(row.budget).extract()
            small.save_pretrained(root / "plain")
            loads = _load_times(root, row.budget)
            lone = tower_of_widths(cast("SparseCLIPVisionModel", dense.vision_model), single.widths)
            towers = {"extracted": small.vision_model, "elastic": elastic.vision_model, "single": lone}
            extracted, switched, alone = paired_latency(towers, resolution=resolution, rounds=LATENCY_ROUNDS)
            timings.append(
                BudgetTiming(
                    budget=row.budget,
                    **loads,
                    bytes_read=ElasticCLIPForSegmentation.bytes_of_budget(root / "elastic", row.budget),
                    bytes_file=folder_bytes(root / "elastic", "*.safetensors"),
                    switch_ms=switches[row.budget],
                    elastic_ms=switched.median_ms,
                    extracted_ms=extracted.median_ms,
                    single_ms=alone.median_ms,
                    latency_ratio=switched.speed_up,
                    latency_range=switched.speed_up_range,
                )
            )
    return timings


def _switch_times(elastic: ElasticCLIPForSegmentation) -> dict[float, float]:
    """Return the median milliseconds of `set_budget`, each from the next larger budget (the largest from the last)."""
    if len(elastic.budgets) == 1:
        return {elastic.budget: milliseconds(lambda: elastic.set_budget(elastic.budget), elastic.device)}
    order = (*elastic.budgets[1:], elastic.budgets[0])
    switches = {budget: partial(elastic.set_budget, budget) for budget in order}
    times = interleave(switches, SWITCH_ROUNDS, device=elastic.device)
    return {budget: statistics.median(taken) for budget, taken in times.items()}


def _load_times(root: Path, budget: float) -> dict[str, float]:
    """Return the median milliseconds of loading the checkpoint, one budget of it, and a plain model like that."""
    elastic, plain = root / "elastic", root / "plain"
    loads: dict[str, Callable[[], Any]] = {
        "whole_ms": lambda: ElasticCLIPForSegmentation.from_pretrained(elastic, **SAFE),
        "alone_ms": lambda: ElasticCLIPForSegmentation.from_pretrained(elastic, budget=budget, **SAFE),
        "plain_ms": lambda: DenseCLIPForSegmentation.from_pretrained(plain, **SAFE),
    }
    return {name: statistics.median(taken) for name, taken in interleave(loads, LOAD_ROUNDS).items()}
