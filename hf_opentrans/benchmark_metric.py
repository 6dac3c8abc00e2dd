"""Mean IoU against what `evaluate` does: its histograms alone, and its whole path with stored maps, in one run."""

import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from hf_opentrans.benchmark_memory import PeakMemory
from hf_opentrans.benchmark_rows import RowFile, duration
from hf_opentrans.data.metrics import MeanIoU

Maps = list[tuple[np.ndarray, np.ndarray]]
HISTOGRAMS, STORED = "three histograms per image", "maps stored, then histograms"
REFERENCES = (HISTOGRAMS, STORED)
IGNORED = 255
REGIONS, NOISE = "regions", "noise"
KINDS = ((NOISE, "uint8"), (REGIONS, "uint8"), (REGIONS, "int64"))  # of the maps, with their types
SHIFT, CELL = 3, 32  # pixels that the prediction is off, and side of the regions
UNLABELLED = 0.08  # of all pixels, about as in ADE20K
TIMES = (1, 6)  # memory is measured with so many times the images
# CPU and wall time of paired rounds differ by more if other work ran.
DISTURBED = 1.1


@dataclass(frozen=True)
class MetricRow:
    """Ours and one reference on the same maps.

    Args:
        reference: What ours is compared with.
        through: Library that stores the maps, with its version; "" where none are stored.
        kind: Of the maps, see `random_maps`.
        dtype: Of the maps.
        images: How many.
        ours_ms, reference_ms: CPU time per image, median over the rounds.
        times_faster: Reference's CPU time / ours, median over paired rounds.
        quartiles: First and third quartile of that ratio.
        wall_ratio: The same ratio of wall times.
        difference: Largest absolute difference of any score, the classes' included.
        ours_growth, reference_growth: Memory in MiB per further image, from peaks of the process with a few and with
            six times as many fresh maps.
        disk_growth: Bytes on disk per further image, in MiB.
        rounds: Counted rounds.
    """

    reference: str
    through: str
    kind: str
    dtype: str
    images: int
    ours_ms: float
    reference_ms: float
    times_faster: float
    quartiles: tuple[float, float]
    wall_ratio: float
    difference: float
    ours_growth: float | None
    reference_growth: float | None
    disk_growth: float
    rounds: int

    @property
    def is_disturbed(self) -> bool:
        """Whether wall and CPU time tell different ratios."""
        return not 1 / DISTURBED <= self.times_faster / self.wall_ratio <= DISTURBED

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


class MetricFile(RowFile[MetricRow]):
    """The rows and their file."""

    row_type = MetricRow
    written_by = "hf-opentrans benchmark metric"


def random_maps(count: int, side: int, classes: int, kind: str, dtype: str, *, seed: int = 0) -> Maps:
    """Return predictions and targets: regions, wrong ones, shifted outlines; 8 % of every target is unlabelled.

    Histograms take longer where neighbouring pixels differ. "regions" has no noise at all and unlabelled pixels in one
    stripe, the cheapest case; in "noise" they are scattered, and so are wrong pixels, a quarter of all.

    Args:
        count: How many pairs.
        side: In pixels, at least 8.
        classes: How many; their ids and 255 must fit the type.
        kind: "regions" or "noise".
        dtype: Name of a NumPy integer type.
        seed: Of the first pair.
    """
    pairs = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        cells = rng.integers(0, classes, (2, side // CELL + 1, side // CELL + 1))
        cells[1] = np.where(rng.random(cells[1].shape) < 0.3, cells[1], cells[0])
        target, prediction = (np.kron(part, np.ones((CELL, CELL), int))[:side, :side] for part in cells)
        prediction = np.roll(prediction, SHIFT, (0, 1))
        stripe = max(1, round(side * UNLABELLED))
        start = rng.integers(0, side - stripe)
        if kind == REGIONS:
            target[start : start + stripe] = IGNORED
        else:
            target[rng.random(target.shape) < UNLABELLED] = IGNORED
            is_wrong = rng.random(target.shape) < 0.25
            prediction = np.where(is_wrong, rng.integers(0, classes, target.shape), prediction)
        pairs.append((prediction.astype(dtype), target.astype(dtype)))
    return pairs


def histogram_scores(pairs: Iterable[tuple[Any, Any]], classes: int) -> dict[str, Any]:
    """Compute the scores from three histograms per image, the formula of `evaluate`'s mean_iou.

    Areas of the intersection, of the prediction and of the target are counted over the labelled pixels, with
    np.histogram over the range of the class ids; union = prediction + target - intersection.

    Args:
        pairs: Predictions and targets, as arrays or pictures.
        classes: How many.
    """
    areas = np.zeros((3, classes))
    for prediction, target in pairs:
        labels = np.array(target)
        keep = labels != IGNORED
        found, wanted = np.array(prediction)[keep], labels[keep]
        for row, ids in enumerate((found[found == wanted], found, wanted)):
            areas[row] += np.histogram(ids, classes, (0, classes - 1))[0]
    hits, found, wanted = areas
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, accuracy = hits / (found + wanted - hits), hits / wanted
    scores = {"mean_iou": np.nanmean(iou), "mean_accuracy": np.nanmean(accuracy)}
    return scores | {
        "overall_accuracy": hits.sum() / wanted.sum(),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


def our_scores(pairs: Iterable[tuple[Any, Any]], classes: int) -> dict[str, Any]:
    """Compute the same scores with `MeanIoU`."""
    metric = MeanIoU(classes, IGNORED)
    for prediction, target in pairs:
        metric.update(prediction, target)
    scores = metric.compute()
    return {
        "mean_iou": scores.mean_iou,
        "mean_accuracy": scores.mean_accuracy,
        "overall_accuracy": scores.pixel_accuracy,
        "per_category_iou": np.array(scores.per_class_iou),
        "per_category_accuracy": np.array(scores.per_class_accuracy),
    }


class StoredScores:
    """What a metric of `evaluate` does with maps: it stores them as pictures in an Arrow file, and reads them back.

    With `evaluate` it is an `evaluate.Metric`. Without, the same steps of `datasets`, on which `evaluate` is built:
    encode the pictures, write, map the file, decode. Locks and checks of `evaluate` are then missing.

    Args:
        classes: How many.
        folder: For the file.
    """

    def __init__(self, classes: int, folder: Path) -> None:
        """Start with no maps."""
        import datasets

        self.classes, self.folder = classes, folder
        self.disk_bytes = 0
        self._features = datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()})

    def __call__(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
        """Return the scores of the pairs, which are added one by one."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Downcasting array dtype")  # int64 to int32, which holds all ids
            return self._by_evaluate(pairs) if has_evaluate() else self._by_datasets(pairs)

    def _by_datasets(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
        from datasets import Dataset
        from datasets.arrow_writer import ArrowWriter

        path = self.folder / "maps.arrow"
        with ArrowWriter(features=self._features, path=str(path)) as writer:
            for prediction, target in pairs:
                writer.write_batch(self._features.encode_batch({"predictions": [prediction], "references": [target]}))
            writer.finalize()
        self.disk_bytes = path.stat().st_size
        stored = Dataset.from_file(str(path))
        scores = histogram_scores(zip(stored["predictions"], stored["references"], strict=True), self.classes)
        del stored
        path.unlink()
        return scores

    def _by_evaluate(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
        import evaluate  # pyright: ignore[reportMissingImports]

        features, classes = self._features, self.classes
        found = 0

        class Storing(evaluate.Metric):
            def _info(self, *_: Any) -> Any:
                return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

            def _compute(self, predictions: Any = None, references: Any = None, **_: Any) -> dict[str, Any]:
                nonlocal found
                found = sum(entry.stat().st_size for entry in Path(self.data_dir).glob("*.arrow"))
                return histogram_scores(zip(predictions, references, strict=True), classes)

        metric: Any = Storing(cache_dir=str(self.folder))
        for prediction, target in pairs:
            metric.add_batch(predictions=[prediction], references=[target])
        scores = metric.compute()
        self.disk_bytes = found
        return scores


def has_evaluate() -> bool:
    """Tell whether `evaluate` is installed."""
    return importlib.util.find_spec("evaluate") is not None


def storing_library() -> str:
    """Return what stores the maps, with its version."""
    return f"evaluate {version('evaluate')}" if has_evaluate() else f"datasets {version('datasets')}"


def run_metric(
    results: MetricFile, *, rounds: int, say: Callable[[str], None] = lambda line: None, side: int = 512
) -> None:
    """Measure every reference with every type of maps that `results` does not hold yet.

    Args:
        results: Takes the rows; its settings name the number of images and classes.
        rounds: Counted rounds, after one that is not.
        say: Called with a line before every row.
        side: Of the maps, in pixels.
    """
    images, classes = results.settings["images"], results.settings["classes"]
    done = {(row.reference, row.kind, row.dtype) for row in results.rows}
    left = [(ref, *kind) for kind in KINDS for ref in REFERENCES if (ref, *kind) not in done]
    passes = sum(rounds + 1 + sum(TIMES) if ref == STORED else (rounds + 1 + sum(TIMES)) / 10 for ref, *_ in left)
    about = 0.06 * images * (side / 512) ** 2 * passes
    say(f"{len(left)} rows to do, about {duration(about)} on one thread. Nothing else should run meanwhile.")
    for reference, kind, dtype in left:
        say(f"{reference}, {kind} of {dtype}")
        results.add(compare(reference, random_maps(images, side, classes, kind, dtype), classes, rounds, kind))
    results.save(at_end=True)


def compare(reference: str, maps: Maps, classes: int, rounds: int, kind: str) -> MetricRow:
    """Time ours and a reference in turn, and compare scores and memory.

    Args:
        reference: One of `REFERENCES`.
        maps: Predictions and targets.
        classes: How many.
        rounds: Counted rounds, after one that is not.
        kind: Of the maps.

    Raises:
        ValueError: If there is no such reference.
    """
    if reference not in REFERENCES:
        raise ValueError(f"`reference` is {reference!r}. Only some ways are compared. Use one of {REFERENCES}.")
    with TemporaryDirectory() as folder:
        stored = None if reference == HISTOGRAMS else StoredScores(classes, Path(folder))

        def ours(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
            return our_scores(pairs, classes)

        def theirs(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
            # A function of all maps: whoever calls it keeps them until then.
            return histogram_scores(list(pairs), classes) if stored is None else stored(pairs)

        ways = (ours, theirs)
        cpu, wall, scores = _times(ways, maps, rounds)
        growth = [_growth(way, maps) for way in ways]
        on_disk = 0 if stored is None else stored.disk_bytes / (len(maps) * TIMES[-1]) / 2**20
    ratios = [theirs / ours for ours, theirs in zip(*cpu, strict=True)]
    quarters = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    return MetricRow(
        reference,
        "" if stored is None else storing_library(),
        kind,
        maps[0][0].dtype.name,
        len(maps),
        *(statistics.median(times) * 1000 / len(maps) for times in cpu),
        times_faster=statistics.median(ratios),
        quartiles=(quarters[0], quarters[2]),
        wall_ratio=statistics.median(theirs / ours for ours, theirs in zip(*wall, strict=True)),
        difference=_difference(*scores),
        ours_growth=growth[0],
        reference_growth=growth[1],
        disk_growth=on_disk,
        rounds=rounds,
    )


_Way = Callable[[Iterable[tuple[Any, Any]]], dict[str, Any]]
_Times = tuple[list[float], list[float]]


def _times(ways: Sequence[_Way], maps: Maps, rounds: int) -> tuple[_Times, _Times, list[dict[str, Any]]]:
    """Run all ways in turn; return CPU times, wall times and the scores."""
    cpu: _Times = ([], [])
    wall: _Times = ([], [])
    scores: list[dict[str, Any]] = []
    for index in range(rounds + 1):
        scores = []
        for place, way in enumerate(ways):
            start = time.perf_counter(), time.process_time()
            scores.append(way(maps))
            elapsed = time.perf_counter() - start[0], time.process_time() - start[1]
            if index:
                wall[place].append(max(elapsed[0], 1e-9))  # a clock may stand still during a very short pass
                cpu[place].append(max(elapsed[1], 1e-9))
    return cpu, wall, scores


def _growth(way: _Way, maps: Maps) -> float | None:
    """Return the memory per further image, in MiB: of maps that come one after the other, as from a model."""

    def fresh(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for index in range(count):
            prediction, target = maps[index % len(maps)]
            yield prediction.copy(), target.copy()

    peaks = []
    for times in TIMES:
        with PeakMemory(torch.device("cpu"), interval=0.002) as before:
            pass
        with PeakMemory(torch.device("cpu"), interval=0.002) as during:
            way(fresh(times * len(maps)))
        if before.mib is None or during.mib is None:
            return None
        peaks.append(during.mib - before.mib)
    return (peaks[1] - peaks[0]) / ((TIMES[1] - TIMES[0]) * len(maps))


def _difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference; infinite if a score is nan in one of them alone."""
    pairs = [(np.atleast_1d(one[name]), np.atleast_1d(other[name])) for name in one]
    if any(not np.array_equal(np.isnan(a), np.isnan(b)) for a, b in pairs):
        return float("inf")
    return max(float(np.nan_to_num(np.abs(a - b)).max()) for a, b in pairs)


def metric_table(rows: Sequence[MetricRow]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells."""

    def growth(value: float | None) -> str:
        return "-" if value is None else f"{max(0.0, value):.2f}"

    header = ["compared with", "maps", "CPU time", "ours", "speed-up (quartiles)", "scores", "MiB + disk", "ours"]
    cells = [
        [
            row.reference + (f" ({row.through})" if row.through else ""),
            f"{row.kind}, {row.dtype}",
            f"{row.reference_ms:.2f} ms",
            f"{row.ours_ms:.2f} ms",
            f"{row.times_faster:.1f}x ({row.quartiles[0]:.1f}-{row.quartiles[1]:.1f})" + "!" * row.is_disturbed,
            f"differ by {row.difference:.0e}" if row.difference else "equal",
            f"{growth(row.reference_growth)} + {growth(row.disk_growth)}",
            growth(row.ours_growth),
        ]
        for row in rows
    ]
    return header, cells


def metric_notes(rows: Sequence[MetricRow], settings: dict[str, Any]) -> list[str]:
    """Return the sentences that belong under the table."""
    notes = [
        f"{settings['images']} images, {settings['classes']} classes, {settings['side']} px, {UNLABELLED:.0%} "
        f"unlabelled; medians over {settings['rounds']} paired, interleaved rounds of CPU time per image. MiB: "
        "memory and disk per further image. The histograms are the formula of evaluate's mean_iou, written anew: the "
        "module itself is downloaded when it is loaded."
    ]
    if any(row.through.startswith("datasets") for row in rows):
        notes.append(
            "evaluate was not installed: its Metric is replaced by the same steps of datasets (encode, write Arrow, "
            "read, decode), without its locks and checks."
        )
    if any(row.is_disturbed for row in rows):
        notes.append(
            f"!: wall and CPU time differ by more than {DISTURBED - 1:.0%}: other work ran meanwhile, or the disk is "
            "slow."
        )
    return notes
