"""The rows, the paired comparisons and the table of the layer-selection study."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scipy.special import stdtrit

FULL, BASE, UNTRAINED = "full", "alpha", "training-free"
LEVEL = 0.95
_COSTS = ("macs_per_sample", "full_macs_per_sample")


@dataclass(frozen=True)
class SelectionRow:
    """One training run.

    Args:
        rule: What trained; "training-free" is the CLIP itself, without a head.
        seed: Of head, crops, random rule, and of which classes the head sees.
        seen, unseen: mIoU over the classes that the head was trained with and over the others; all names compete.
        pixel_accuracy: Over all classes.
        macs_per_sample: Multiply-accumulates of a training step: forward, input gradients, weight gradients.
        full_macs_per_sample: The same when the whole tower trains.
        trainable_params: Parameters that trained, head included.
        seconds: Wall time of training.
        peak_memory_mib: Largest memory of the process while training.
        trained: Names of the tower's layers that trained; None where no rule chose.
        seen_classes: Names of the classes that the head saw.
    """

    rule: str
    seed: int
    seen: float
    unseen: float
    pixel_accuracy: float
    macs_per_sample: int = 0
    full_macs_per_sample: int = 0
    trainable_params: int = 0
    seconds: float | None = None
    peak_memory_mib: float | None = None
    trained: list[str] | None = None
    seen_classes: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        """What tells this row from the others of its file: rule and seed."""
        return self.rule, self.seed

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class StepTiming:
    """One training step of a rule beside one that trains the whole tower, in paired rounds on the same batch.

    Args:
        rule: The rule.
        step_ms, full_step_ms: Median times.
        speed_up: Time of the full step / time of this one, median over the rounds.
        memory_mib, full_memory_mib: What the steps need beside the model and its data: activations, gradients,
            optimiser state.
    """

    rule: str
    step_ms: float
    full_step_ms: float
    speed_up: float
    memory_mib: float | None = None
    full_memory_mib: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """Paired difference of a rule to `BASE` over the seeds.

    Args:
        mean: In mIoU.
        low, high: Its 95 % interval (Student's t); both equal to the mean for a single seed.
    """

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_difference(rows: Sequence[SelectionRow], rule: str, score: str, base: str = BASE) -> Difference | None:
    """Compare two rules seed by seed; None where they have no two seeds in common.

    Args:
        rows: All rows.
        rule: The rule.
        score: "seen" or "unseen".
        base: What it is compared with.
    """
    values: dict[str, dict[int, float]] = {rule: {}, base: {}}
    for row in rows:
        if row.rule in values:
            values[row.rule][row.seed] = getattr(row, score)
    both = sorted(set(values[rule]) & set(values[base]))
    changes = [values[rule][seed] - values[base][seed] for seed in both]
    return interval(changes) if len(changes) > 1 else None


def interval(changes: Sequence[float]) -> Difference:
    """Return the mean of paired differences, at least two, and its 95 % interval (Student's t)."""
    mean, error = statistics.fmean(changes), statistics.stdev(changes) / len(changes) ** 0.5
    reach = float(stdtrit(len(changes) - 1, (1 + LEVEL) / 2)) * error
    return Difference(mean, mean - reach, mean + reach)


# What the trained model can do, and what training costs: the whole table is wider than a terminal.
QUALITY = ("trains", "mIoU seen", "seen vs alpha", "mIoU unseen", "unseen vs alpha")
COST = ("trains", "trained", "cost / sample", "step time", "step memory", "run", "peak memory")


def selection_table(
    rows: Sequence[SelectionRow], timings: Sequence[StepTiming] = (), columns: Sequence[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return header and cells: one line per rule, mean ± half the range over the seeds, and the paired difference.

    Args:
        rows: The rows.
        timings: Of steps, by rule.
        columns: Which columns, for example `QUALITY`. Defaults to all.
    """
    header = list(columns or dict.fromkeys((*QUALITY, *COST)))
    rules = dict.fromkeys(row.rule for row in rows)
    lines = [{"trains": rule, **_quality(rule, rows), **_cost(rule, rows, timings)} for rule in rules]
    return header, [[line[name] for name in header] for line in lines]


def _quality(rule: str, rows: Sequence[SelectionRow]) -> dict[str, str]:
    own = [row for row in rows if row.rule == rule]
    cells: dict[str, str] = {}
    for name in ("seen", "unseen"):
        values = [100 * getattr(row, name) for row in own]
        cells[f"mIoU {name}"] = f"{statistics.fmean(values):.1f}% ± {(max(values) - min(values)) / 2:.1f}"
        found = None if rule == BASE else paired_difference(rows, rule, name)
        cells[f"{name} vs alpha"] = "-"
        if found is not None:
            low, high, mark = 100 * found.low, 100 * found.high, " *" if found.is_clear else ""
            cells[f"{name} vs alpha"] = f"{100 * found.mean:+.1f} ({low:+.1f} to {high:+.1f}){mark}"
    return cells


def _cost(rule: str, rows: Sequence[SelectionRow], timings: Sequence[StepTiming]) -> dict[str, str]:
    own = [row for row in rows if row.rule == rule]
    cells: dict[str, str] = dict.fromkeys(COST[1:], "-")
    if rule == UNTRAINED:
        return cells
    macs, full = (statistics.fmean(getattr(row, name) for row in own) for name in _COSTS)
    cells["cost / sample"] = f"{macs / 1e9:.2f} GMAC ({macs / full:.0%})"
    cells["trained"] = f"{statistics.fmean(row.trainable_params for row in own) / 1e6:.2f} M"
    cells["run"] = f"{statistics.fmean(row.seconds or 0 for row in own):.0f} s"
    peaks = [row.peak_memory_mib for row in own if row.peak_memory_mib is not None]
    cells["peak memory"] = f"{max(peaks):,.0f} MiB" if peaks else "-"
    timing = next((timing for timing in timings if timing.rule == rule), None)
    if timing is not None:
        cells["step time"] = f"{timing.step_ms:.0f} ms ({1 / timing.speed_up:.0%})"
        cells["step memory"] = _memory(timing.memory_mib)
    elif rule == FULL and timings:
        cells["step time"] = f"{statistics.fmean(timing.full_step_ms for timing in timings):.0f} ms"
        cells["step memory"] = _memory(timings[0].full_memory_mib)
    return cells


def _memory(mib: float | None) -> str:
    return "-" if mib is None else f"{mib:,.0f} MiB"


def selection_notes(rows: Sequence[SelectionRow], settings: dict[str, Any]) -> list[str]:
    """Return the sentences that belong under the table."""
    seeds = len({row.seed for row in rows})
    seen = len(rows[0].seen_classes) if rows else 0
    return [
        f"Means over {seeds} seeds ± half their range; * marks paired differences to alpha whose {LEVEL:.0%} interval "
        f"leaves out zero. The head was trained with {seen} classes, drawn anew for every seed, and scored on all "
        f"{settings['classes']}; all names compete. {settings['steps']} steps of {settings['batch_size']} crops of "
        f"{settings['side']} px. In brackets the share of full fine-tuning of tower and head. Step memory: "
        "activations, gradients and optimiser state."
    ]
