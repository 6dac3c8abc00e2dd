"""Many pruning runs: which, how long they take, and a file from which an interrupted benchmark goes on."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_opentrans.benchmark_rows import RowFile, duration
from hf_opentrans.benchmarks import BenchmarkData, Harness, MethodRow, RunKey
from hf_opentrans.models.modeling_dense_clip import DenseCLIPForSegmentation
from hf_opentrans.models.processing_open_vocabulary import OpenVocabularyProcessor
from hf_opentrans.pruning.plan import STRUCTURES, WITHOUT_IMAGES, PruningConfig

LATENCY_ROUNDS = 15
_PLAIN: dict[str, Any] = {"metric": "identity", "solver": "uniform", "refit": False}
_FULL: dict[str, Any] = {"metric": "probes", "solver": "dp", "refit": True}
# The components of "obs", each added to all before it; then the whole method on fewer structures.
ABLATION: dict[str, dict[str, Any]] = {
    "MLP only": {**_PLAIN, "structures": ("mlp",)},
    "+ heads": {**_PLAIN, "structures": ("mlp", "heads")},
    "+ ranks": {**_PLAIN, "structures": STRUCTURES},
    "+ probes": {"metric": "probes", "solver": "lagrangian", "refit": False},  # comparable errors can share a budget
    "+ DP": {**_FULL, "refit": False},
    "+ sweep": {**_FULL},
    "+ evolution": {**_FULL, "search": "evolution"},
    "MLP only, full method": {**_FULL, "structures": ("mlp",)},
    "MLP + heads, full method": {**_FULL, "structures": ("mlp", "heads")},
}


@dataclass(frozen=True)
class PruningRun:
    """One run of a benchmark.

    Args:
        config: Its configuration.
        variant: Name of the configuration in an ablation; "" for a method as it is.
    """

    config: PruningConfig
    variant: str = ""

    @property
    def key(self) -> RunKey:
        """What tells its row from the others: method, variant, keep and seed."""
        return self.config.method, self.variant, self.config.keep, self.config.seed

    @property
    def name(self) -> str:
        """Name for people."""
        return f"{self.variant or self.config.method} at keep {self.config.keep:g}, seed {self.config.seed}"


def plan_methods(
    methods: Sequence[str], keeps: Sequence[float], seeds: Sequence[int], **options: Any
) -> list[PruningRun]:
    """Return one run per budget, seed and method; `options` go to every configuration.

    Methods that read no images and draw nothing at random run once per budget: every seed would give the same model.
    All methods of one budget and seed come first, so that a benchmark that was cut short compares all of them.

    Raises:
        ValueError: If a value is outside its range.
    """
    runs = [
        PruningRun(PruningConfig(keep=keep, method=method, seed=seed, **options))
        for keep in keeps
        for seed in seeds
        for method in methods
        if seed == seeds[0] or method not in WITHOUT_IMAGES
    ]
    return list({run.key: run for run in runs}.values())


def plan_ablation(keeps: Sequence[float], seeds: Sequence[int], **options: Any) -> list[PruningRun]:
    """Return one run per budget, seed and entry of `ABLATION`; `options` go to every configuration.

    Raises:
        ValueError: If a value is outside its range.
    """
    runs = [
        PruningRun(PruningConfig(keep=keep, seed=seed, **changes, **options), variant)
        for keep in keeps
        for seed in seeds
        for variant, changes in ABLATION.items()
    ]
    return list({run.key: run for run in runs}.values())


@dataclass(frozen=True)
class SkippedRun:
    """A run that gave no model.

    Args:
        method, variant, keep, seed: Of the run.
        reason: What pruning said.
    """

    method: str
    variant: str
    keep: float
    seed: int | None
    reason: str

    @property
    def key(self) -> RunKey:
        """What tells this run from the others: method, variant, keep and seed."""
        return self.method, self.variant, self.keep, self.seed


class ResultFile(RowFile[MethodRow]):
    """The rows of `benchmark pruning`, and the runs that gave no model; see `RowFile`."""

    row_type, written_by = MethodRow, "benchmark pruning"

    def __init__(self, path: Path | None, settings: dict[str, Any], command: str) -> None:
        self.skipped: list[SkippedRun] = []
        super().__init__(path, settings, command)

    @property
    def dense(self) -> MethodRow | None:
        """The dense model's row; None where it is not measured yet."""
        return next((row for row in self.rows if row.method == "dense"), None)

    def forget_times(self) -> None:
        """Leave out all latencies, so that the next benchmark measures them again."""
        self.rows = [replace(row, latency_ms=None, speed_up=None) if row.widths else row for row in self.rows]

    def skip(self, run: PruningRun, reason: str) -> None:
        """Note that a run gave no model, in place of what an earlier attempt said, and write the file."""
        self.skipped = [other for other in self.skipped if other.key != run.key]
        self.skipped.append(SkippedRun(*run.key, reason=reason))
        self.save()

    def read_more(self, values: dict[str, Any]) -> None:
        """Take the runs that gave no model from the file's object."""
        self.skipped = [SkippedRun(**run) for run in values["skipped"]]

    def more(self) -> dict[str, Any]:
        """Return the runs that gave no model for the file's object."""
        return {"skipped": [asdict(run) for run in self.skipped]}


def run_benchmark(
    load: Callable[[], tuple[DenseCLIPForSegmentation, OpenVocabularyProcessor]],
    data: BenchmarkData,
    runs: Sequence[PruningRun],
    results: ResultFile,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> None:
    """Do all runs that `results` does not hold yet, and add their rows to it one by one; then time all of them.

    A run that pruning refuses with a ValueError (a budget that its structures cannot meet) or an ImportError (a method
    of a package that is not installed) is noted in `results.skipped`; the next start tries it again.

    Args:
        load: Returns the dense model and its processor; not called where nothing is left to do.
        data: What to measure on.
        runs: What to do.
        results: Takes the rows; see `ResultFile`.
        say: Called with a line on what comes next, what is done, and how long the rest will take.
        progress: Whether pruning shows a progress bar.

    Raises:
        ValueError: If no run at all gave a model.
    """
    finished = {row.key for row in results.rows}
    left = [run for run in runs if run.key not in finished]
    say(f"{_count(len(runs))}: {len(runs) - len(left)} in the file already, {len(left)} to do.")
    untimed = any(row.speed_up is None and row.widths for row in results.rows)
    harness = Harness.of(*load(), data) if left or untimed else None
    if harness and left:
        if results.dense is None:
            results.add(harness.measure_dense().row)
        say(f"The dense model is measured. {forecast(left, results.rows)}")
        for number, run in enumerate(left, 1):
            told = _do(run, harness, results, progress)
            rest = f" {forecast(left[number:], results.rows)}" if left[number:] else ""
            say(f"{number} of {len(left)}: {told}{rest}")
    if results.skipped and not any(row.method != "dense" for row in results.rows):
        raise ValueError(f"No run gave a model. {results.skipped[0].reason}")
    if harness:
        _time(harness, results, say)
    results.save(at_end=True)


def _do(run: PruningRun, harness: Harness, results: ResultFile, progress: bool) -> str:
    """Do one run, note its row or why there is none, and return what to say about it."""
    try:
        result, peak = harness.prune(run.config, progress=progress)
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        results.skip(run, reason)
        return f"{run.name} skipped. {reason}"
    row = harness.measure_pruned(result, run.config, peak, run.variant).row
    results.skipped = [other for other in results.skipped if other.key != run.key]
    results.add(row)
    return f"{run.name} done, pruned in {duration(row.seconds or 0)}."


def _time(harness: Harness, results: ResultFile, say: Callable[[str], None]) -> None:
    """Time all rows that have no latency, in one go, so that all meet the same conditions."""
    places = [place for place, row in enumerate(results.rows) if row.speed_up is None and row.widths]
    if places:
        say(f"Timing {len(places)} models, one image at a time. Nothing else should run meanwhile.")
    for place in places:
        results.put(place, harness.time_row(results.rows[place], rounds=LATENCY_ROUNDS))


def forecast(left: Sequence[PruningRun], rows: Sequence[MethodRow]) -> str:
    """Say how long the runs that are left will take, from the rows that are done.

    A run takes as long as those of its method and variant did, or else as long as all did on average. Before the first
    run only the measuring is known.
    """
    measuring = statistics.fmean([row.measuring_seconds or 0 for row in rows] or [0])
    times: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.seconds is not None:
            times.setdefault((row.method, row.variant), []).append(row.seconds)
    if not times:
        least = duration(len(left) * measuring)
        return (
            f"{_count(len(left))} x {duration(measuring)} to measure a model: at least {least}, and the pruning "
            "itself, which the first run will tell."
        )
    usual = statistics.fmean(time for found in times.values() for time in found)
    pruning = [statistics.fmean(times.get((run.config.method, run.variant), [usual])) for run in left]
    return f"About {duration(sum(pruning) + len(left) * measuring)} left for {_count(len(left))}."


def _count(runs: int) -> str:
    return f"{runs} run" if runs == 1 else f"{runs} runs"
