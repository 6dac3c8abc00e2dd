"""Recovery after pruning: several methods pruned to one budget, then distilled from the dense model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_opentrans.benchmark_recovery_tables import RecoveryRow
from hf_opentrans.benchmark_rows import RowFile, duration
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPModel
from hf_opentrans.pruning.plan import PruningConfig
from hf_opentrans.pruning.prune import prune_model
from hf_opentrans.training.recovery import DistillConfig, distill

RECOVERED = ("obs", "magnitude", "random")


class RecoveryFile(RowFile[RecoveryRow]):
    """The rows of `benchmark recovery`; see `RowFile`."""

    row_type, written_by = RecoveryRow, "benchmark recovery"


def recover(
    dense: SparseCLIPModel,
    processor: Any,
    images: Sequence[Any],
    pruning: PruningConfig,
    training: DistillConfig,
    *,
    progress: bool = False,
) -> RecoveryRow:
    """Prune once, distil once.

    Args:
        dense: The CLIP; not changed.
        processor: Its processor.
        images: Unlabelled: pruning calibrates and distillation trains on them, and a share is only scored on.
        pruning: How far, and by which method.
        training: How to distil.
        progress: Whether bars are shown.
    """
    image_processor = getattr(processor, "image_processor", processor)
    pruned = prune_model(dense, images, pruning, image_processor=image_processor, progress=progress)
    student: Any = pruned.model
    with TemporaryDirectory() as folder:
        report = distill(student, dense, processor, images, training, Path(folder) / "out", progress=progress)
    before, after = report["before"], report["after"]
    return RecoveryRow(
        pruning.method,
        pruning.keep,
        pruning.seed,
        before["class_token_cosine"],
        after["class_token_cosine"],
        before["patch_token_cosine"],
        after["patch_token_cosine"],
        training.steps,
        training.batch_size,
        report["images"]["train"],
        pruned.report.seconds["total"],
        report["seconds"],
    )


def run_recovery(
    dense: SparseCLIPModel,
    processor: Any,
    images: Sequence[Any],
    pruning: PruningConfig,
    training: DistillConfig,
    runs: Sequence[tuple[str, int]],
    results: RecoveryFile,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> None:
    """Do all runs that `results` does not hold yet.

    Args:
        dense: The CLIP; not changed.
        processor: Its processor.
        images: See `recover`.
        pruning: How far; method and seed are set run by run.
        training: How to distil; the seed is set run by run.
        runs: Methods and seeds.
        results: Takes the rows.
        say: Called with a line on what is done.
        progress: Whether bars are shown.
    """
    done = {row.key for row in results.rows}
    left = [run for run in dict.fromkeys(runs) if run not in done]
    say(f"{len(runs)} runs: {len(runs) - len(left)} in the file already, {len(left)} to do.")
    for number, (method, seed) in enumerate(left, 1):
        chosen = replace(pruning, method=method, seed=seed), replace(training, seed=seed)
        row = recover(dense, processor, images, *chosen, progress=progress)
        results.add(row)
        spent = row.prune_seconds + row.distill_seconds
        rest = f" About {duration(spent * (len(left) - number))} left." if number < len(left) else ""
        gain = f"patches {row.patch_before:.4f} -> {row.patch_after:.4f} in {duration(row.distill_seconds)}"
        say(f"{number} of {len(left)}: {method}, seed {seed}: {gain}.{rest}")
    results.save(at_end=True)
