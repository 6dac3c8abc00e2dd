"""The rows, the paired comparisons and the table of the transfer study."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_opentrans.benchmark_selection_tables import LEVEL, Difference, interval

DENSE, OURS, CONSTANT = "dense", "obs", "constant"
TRAINING_FREE = "dense-clip"
HEAD, FULL, ALPHA = "head", "full", "alpha"
KEPT_SHARE, KEPT_AT = 0.95, 0.65  # what ours shall keep of the dense mIoU, and at which budget
_LABELS = {OURS: "ours", CONSTANT: "constant class"}


@dataclass(frozen=True)
class TransferRow:
    """One subnetwork in one framework.

    Args:
        framework: "dense-clip" is CLIP without a head.
        method: How the tower was pruned; "dense" is the whole tower, "constant" the most frequent class everywhere.
        keep: Share of the tower's multiply-accumulates that was to be kept.
        seed: Of pruning, head, crops, and of which classes the head sees.
        trained: "head" with a frozen tower, or the rule by which layers of the tower trained too; "" for no training.
        seen, unseen: mIoU over the classes that the head was trained with and over the others; all names compete.
        pixel_accuracy: Over all classes.
        macs: Multiply-accumulates of the segmenter for one image, head included.
        params: Parameters of the tower and the head.
        tower_macs: Multiply-accumulates of the tower alone.
        training_macs: Of a training step per sample, where the tower trains too; else 0.
        first_loss, last_loss: Over the first and the last tenth of the steps.
        seconds: Wall time of training.
        seen_classes: Names of the classes that the head saw.
    """

    framework: str
    method: str
    keep: float
    seed: int
    trained: str
    seen: float
    unseen: float
    pixel_accuracy: float
    macs: int = 0
    params: int = 0
    tower_macs: int = 0
    training_macs: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    seconds: float | None = None
    seen_classes: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, float, str, int]:
        """What tells this row from the others of its file."""
        return (*self.group, self.seed)

    @property
    def group(self) -> tuple[str, str, float, str]:
        """What rows that differ in their seed alone have in common."""
        return self.framework, self.method, self.keep, self.trained

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class TransferTiming:
    """A framework with a pruned tower beside the same one with the dense tower, in paired rounds on one image.

    Args:
        framework, method, keep: As in the rows.
        dense_ms, ms: Median times.
        speed_up: Time with the dense tower / time with this one, median over the rounds.
    """

    framework: str
    method: str
    keep: float
    dense_ms: float
    ms: float
    speed_up: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Claim:
    """A statement of the study and what was measured.

    Args:
        text: The statement.
        difference: Paired over the seeds, in mIoU: of a claim it shall be above zero.
        is_claim: Whether anything is claimed; otherwise two rows are compared.
    """

    text: str
    difference: Difference
    is_claim: bool = True

    @property
    def verdict(self) -> str:
        """Whether the interval lies above zero, below it, or holds it."""
        if not self.is_claim:
            side = "higher" if self.difference.low > 0 else "lower"
            return side if self.difference.is_clear else "no difference shown"
        if self.difference.low > 0:
            return "holds"
        return (
            "fails" if self.difference.high < 0 else ("not shown" if self.difference.mean > 0 else "fails on average")
        )


def claims(rows: Sequence[TransferRow]) -> list[Claim]:
    """Compare ours with the controls in every framework, with what it shall keep of dense, and the joined rows."""
    found: list[Claim] = []
    frameworks = dict.fromkeys(row.framework for row in rows if row.framework != CONSTANT)
    keeps = sorted({row.keep for row in rows if row.method == OURS})
    for framework in frameworks:
        trained = "" if framework == TRAINING_FREE else HEAD
        for keep in keeps:
            ours = (framework, OURS, keep, trained)
            dense = (framework, DENSE, 1.0, trained)
            where = f"{framework}, keep {keep:g}"
            for score in ("seen", "unseen"):
                for other in ("magnitude", "random"):
                    text = f"{where}, {score}: ours above {other}"
                    _claim(found, rows, text, ours, (framework, other, keep, trained), score)
                if keep == KEPT_AT:
                    text = f"{where}, {score}: ours above {KEPT_SHARE:.0%} of dense"
                    _claim(found, rows, text, ours, dense, score, KEPT_SHARE)
        joined = [row.group for row in rows if row.framework == framework and row.trained == ALPHA]
        for score in ("seen", "unseen") if joined else ():
            text = f"{framework}, {score}: pruned and alpha against dense and full fine-tuning"
            _claim(found, rows, text, joined[0], (framework, DENSE, 1.0, FULL), score, is_claim=False)
    return found


def _claim(
    found: list[Claim],
    rows: Sequence[TransferRow],
    text: str,
    group: tuple[str, str, float, str],
    base: tuple[str, str, float, str],
    score: str,
    share: float = 1.0,
    is_claim: bool = True,
) -> None:
    values = [{row.seed: getattr(row, score) for row in rows if row.group == which} for which in (group, base)]
    both = sorted(set(values[0]) & set(values[1]))
    if len(both) > 1:
        found.append(Claim(text, interval([values[0][seed] - share * values[1][seed] for seed in both]), is_claim))


# What the subnetworks can do, and what they cost: the whole table is wider than a terminal.
QUALITY = ("framework", "tower", "keep", "trains", "mIoU seen", "mIoU unseen", "loss")
COST = ("framework", "tower", "keep", "trains", "MACs", "params", "time", "training / sample", "run")
_FRAMEWORK_ORDER = (CONSTANT, TRAINING_FREE)


def transfer_table(
    rows: Sequence[TransferRow], timings: Sequence[TransferTiming] = (), columns: Sequence[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return header and cells: one line per framework and tower, mean ± half the range over the seeds.

    Args:
        rows: The rows.
        timings: By framework and tower.
        columns: Which columns, for example `QUALITY`. Defaults to all.
    """
    header = list(columns or dict.fromkeys((*QUALITY, *COST)))
    order = list(dict.fromkeys((*_FRAMEWORK_ORDER, *(row.framework for row in rows))))
    methods = list(dict.fromkeys((CONSTANT, DENSE, OURS, *(row.method for row in rows))))

    def place(group: tuple[str, str, float, str]) -> tuple[Any, ...]:
        framework, method, keep, trained = group
        return order.index(framework), trained not in ("", HEAD), -keep, methods.index(method)

    groups = sorted(dict.fromkeys(row.group for row in rows), key=place)
    lines = [_line(group, [row for row in rows if row.group == group], timings) for group in groups]
    return header, [[line[name] for name in header] for line in lines]


def _line(
    group: tuple[str, str, float, str], rows: Sequence[TransferRow], timings: Sequence[TransferTiming]
) -> dict[str, str]:
    framework, method, keep, trained = group
    is_model = method != CONSTANT
    cells = {
        "framework": framework if is_model else "-",
        "tower": _LABELS.get(method, method),
        "keep": f"{keep:g}" if is_model else "-",
        "trains": {HEAD: "head", FULL: "head, tower", ALPHA: "head, alpha"}.get(trained, trained) or "-",
        "mIoU seen": _mean(rows, lambda row: 100 * row.seen, ".1f", "%"),
        "mIoU unseen": _mean(rows, lambda row: 100 * row.unseen, ".1f", "%"),
        "loss": _losses(rows),
        "MACs": f"{rows[0].macs / 1e9:.2f} G" if is_model else "-",
        "params": f"{rows[0].params / 1e6:.2f} M" if is_model else "-",
        "time": "-",
        "training / sample": f"{rows[0].training_macs / 1e9:.2f} GMAC" if rows[0].training_macs else "-",
        "run": f"{statistics.fmean(row.seconds or 0 for row in rows):.0f} s" if trained else "-",
    }
    own = [timing for timing in timings if timing.framework == framework]
    timing = next((each for each in own if (each.method, each.keep) == (method, keep)), None)
    if timing is not None:
        cells["time"] = f"{timing.ms:.1f} ms ({timing.speed_up:.2f}x)"
    elif own and method == DENSE:
        cells["time"] = f"{statistics.fmean(each.dense_ms for each in own):.1f} ms"
    return cells


def _mean(rows: Sequence[TransferRow], value: Callable[[TransferRow], float], form: str, unit: str) -> str:
    values = [value(row) for row in rows]
    around = f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{unit}{around}"


def _losses(rows: Sequence[TransferRow]) -> str:
    pairs = [(row.first_loss, row.last_loss) for row in rows if row.first_loss is not None]
    if not pairs:
        return "-"
    first, last = (statistics.fmean(column) for column in zip(*pairs, strict=True))  # pyright: ignore[reportArgumentType]
    return f"{first:.3g} to {last:.3g}"


def claim_table(rows: Sequence[TransferRow]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of `claims`."""
    header = ["claim", "difference, points of mIoU", f"{LEVEL:.0%} interval", ""]
    cells = []
    for claim in claims(rows):
        mean, low, high = (100 * value for value in asdict(claim.difference).values())
        cells.append([claim.text, f"{mean:+.1f}", f"{low:+.1f} to {high:+.1f}", claim.verdict])
    return header, cells


def transfer_notes(rows: Sequence[TransferRow], settings: dict[str, Any]) -> list[str]:
    """Return the sentences that belong under the table."""
    seeds = len({row.seed for row in rows})
    seen = len(next((row.seen_classes for row in rows if row.seen_classes), []))
    return [
        f"Means over {seeds} seed{'' if seeds == 1 else 's'} ± half their range. The heads were trained with {seen} "
        f"classes, drawn anew for every seed, and scored on all {settings['classes']}; all names compete. "
        f"{settings['steps']} steps of {settings['batch_size']} crops of {settings['side']} px on a frozen tower; "
        "mask queries (fcclip, gkc) three times as many of half the crops. Where the tower trains too, crops "
        "are drawn anew in every step. Loss: over the first and last tenth of the steps. MACs, params and time: tower "
        "and head, one image, all names."
    ]
