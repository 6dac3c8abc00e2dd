"""The rows and the table of `benchmark recovery`: apart, because they need no training extra."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RecoveryRow:
    """One pruned model, before and after distillation; cosines to the dense model's tokens on held-out images.

    Args:
        method, keep, seed: Of pruning; the seed is that of distillation too.
        class_before, class_after: Of the class token.
        patch_before, patch_after: Of the patch tokens, mean.
        steps, batch_size, images: Of distillation.
        prune_seconds, distill_seconds: Wall times.
    """

    method: str
    keep: float
    seed: int
    class_before: float
    class_after: float
    patch_before: float
    patch_after: float
    steps: int
    batch_size: int
    images: int
    prune_seconds: float
    distill_seconds: float

    @property
    def key(self) -> tuple[str, int]:
        """What tells this row from the others of its file: method and seed."""
        return self.method, self.seed

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


def recovery_table(rows: Sequence[RecoveryRow]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells: one line per method, means over the seeds ± half their range."""
    header = ["method", "keep", "CLS cos", "after", "patch cos", "after", "steps x batch", "pruning", "distillation"]
    cells = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        first = own[0]
        names = ("class_before", "class_after", "patch_before", "patch_after")
        cosines = [_spread([getattr(row, name) for row in own]) for name in names]
        times = [sum(getattr(row, name) for row in own) / len(own) for name in ("prune_seconds", "distill_seconds")]
        label = "ours" if method == "obs" else method
        work = f"{first.steps} x {first.batch_size}"
        cells.append([label, f"{first.keep:g}", *cosines, work, *(f"{seconds:.0f} s" for seconds in times)])
    return header, cells


def recovery_notes(rows: Sequence[RecoveryRow]) -> list[str]:
    """Return the sentences that belong under the table."""
    seeds = len({row.seed for row in rows})
    return [
        f"Cosines to the dense model's tokens on held-out images, before and after distillation from {rows[0].images} "
        "unlabelled images. " + (f"Means over {seeds} seeds; ± is half their range." if seeds > 1 else "One seed.")
    ]


def _spread(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.4f}" + (f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else "")
