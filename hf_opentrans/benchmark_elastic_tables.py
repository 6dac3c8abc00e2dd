"""Tables, notes and the lines of the picture of `benchmark elastic`."""

from collections.abc import Sequence
from typing import Any

from hf_opentrans.benchmark_elastic import (
    DENSE,
    ELASTIC,
    MOST_BELOW,
    MOST_RATIO,
    RANDOM,
    SINGLE,
    WAYS,
    BudgetTiming,
    ElasticRow,
    FileSize,
    Table,
)
from hf_opentrans.benchmarks import MethodRow

_FIGURES = {"CLS cos": "class_token_cosine", "patch cos": "patch_token_cosine", "mIoU": "mean_iou"}
_COSINES = ("class_token_cosine", "patch_token_cosine")


def elastic_table(rows: Sequence[ElasticRow]) -> Table:
    """Return header and cells: one line per budget, each figure of the checkpoint, of a single model and of random."""
    found = {row.key: row for row in rows}
    figures = {title: name for title, name in _FIGURES.items() if any(getattr(row, name) is not None for row in rows)}
    header = ["budget", "MACs", *(f"{title}, {way}" for title in figures for way in WAYS[1:]), "alone", "adds"]
    cells = []
    for row in sorted((row for row in rows if row.way in (DENSE, ELASTIC)), key=lambda row: (-row.budget, row.way)):
        line = [row.way if row.way == DENSE else f"{row.budget:g}", f"{row.macs / 1e6:,.0f} M"]
        for name in figures.values():
            if row.way == DENSE:
                line += [_cell(row, name), "", ""]
            else:
                line += [_cell(found.get((way, row.budget)), name) for way in WAYS[1:]]
        added = "-" if row.bytes_added is None else f"{row.bytes_added / 1e6:.2f} MB"
        cells.append([*line, f"{row.bytes_alone / 1e6:.2f} MB", added])
    return header, cells


def _cell(row: ElasticRow | None, name: str) -> str:
    value = None if row is None else getattr(row, name)
    if value is None:
        return "-"
    return f"{value:.1%}" if name == "mean_iou" else f"{value:.4f}"


def timing_table(timings: Sequence[BudgetTiming]) -> Table:
    """Return header and cells of the times."""
    header = ["budget", "load all", "load it alone", "load a plain file", "reads", "switch", "load / switch"]
    header += ["pass, elastic", "pass, plain", "plain / elastic (range)", "pass, single"]
    cells = [
        [
            f"{timing.budget:g}",
            *(f"{value:.0f} ms" for value in (timing.whole_ms, timing.alone_ms, timing.plain_ms)),
            f"{timing.bytes_read / timing.bytes_file:.0%} of {timing.bytes_file / 1e6:.1f} MB",
            f"{timing.switch_ms:.1f} ms",
            f"{timing.reload_ratio:.0f}x",
            *(f"{value:.1f} ms" for value in (timing.elastic_ms, timing.extracted_ms)),
            f"{timing.latency_ratio:.2f} ({timing.latency_range[0]:.2f}-{timing.latency_range[1]:.2f})",
            f"{timing.single_ms:.1f} ms",
        ]
        for timing in timings
    ]
    return header, cells


def elastic_notes(rows: Sequence[ElasticRow], files: Sequence[FileSize], settings: dict[str, Any]) -> list[str]:
    """Return what belongs under the table: what the columns are, and which targets were met.

    Args:
        rows: The rows.
        files: The sizes.
        settings: Of the file.
    """
    first = (
        '"elastic" is one checkpoint with all budgets, "single" the same pruning for one budget alone, "random" units '
        "drawn at random without compensation. Cosines to the dense model's tokens, on images that no weight was "
        f"fitted on; {settings.get('num_images')} calibration images, seed {settings.get('seed')}."
    )
    return [first, *fidelity_notes(rows), *(size_note(size) for size in files)]


def fidelity_notes(rows: Sequence[ElasticRow]) -> list[str]:
    """Say for each range of budgets how far the checkpoint is below single models at most, and the target."""
    found = {row.key: row for row in rows}
    notes, upper = [], 1.1
    for lower, limit in MOST_BELOW:
        gaps = [
            (getattr(found[SINGLE, budget], name) - getattr(row, name), budget, name)
            for (way, budget), row in found.items()
            for name in _COSINES
            if way == ELASTIC and lower <= budget < upper and (SINGLE, budget) in found
        ]
        if gaps:
            gap, budget, name = max(gaps)
            verdict = "met" if gap <= limit else "not met"
            where = f"of {lower:g} and more" if lower else f"below {upper:g}"
            words = f"{gap:.4f} below" if gap > 0 else f"{-gap:.4f} above"
            tokens = "class token" if name == _COSINES[0] else "patch tokens"
            notes.append(
                f"Budgets {where}: at worst {words} a single model ({tokens} at {budget:g}); the target is {limit:g}: "
                f"{verdict}."
            )
        upper = lower
    return notes


def size_note(size: FileSize) -> str:
    """Say how large a checkpoint is, and whether that meets the target."""
    listed = ", ".join(f"{budget:g}" for budget in size.budgets)
    limit = MOST_RATIO.get(len(size.budgets))
    target = (
        "" if limit is None else f"; the target is {limit:g} at most: {'met' if size.ratio <= limit else 'not met'}"
    )
    whole = size.file_bytes / size.largest_bytes
    return (
        f"The tower with the budgets {listed} takes {size.ratio:.2f} times the bytes of {size.budgets[0]:g} alone in "
        f"{size.precision}{target}. With the text tower, the file takes {whole:.2f} times the bytes: "
        f"{size.file_bytes / 1e6:.1f} MB."
    )


def timing_note(timings: Sequence[BudgetTiming]) -> str:
    """Say what the columns of the times are."""
    others = [timing.switch_ms for timing in timings]
    return (
        'Medians of paired rounds in float32, files in the page cache. "Reads" are the bytes of the tensors that '
        'loading one budget asks for. "Plain" has the same widths as the elastic model, "single" those of the model '
        f"that was pruned for this budget alone. Switching takes {min(others):.1f} to {max(others):.1f} ms."
    )


def method_rows(rows: Sequence[ElasticRow]) -> list[MethodRow]:
    """Return the rows as those of a comparison of methods, for `draw_pruning`."""
    order = {way: index for index, way in enumerate((DENSE, RANDOM, SINGLE, ELASTIC))}
    return [
        MethodRow(
            method=row.way,
            keep=row.budget,
            macs=row.macs,
            params=row.params,
            bytes=row.bytes_alone,
            class_token_cosine=row.class_token_cosine,
            patch_token_cosine=row.patch_token_cosine,
            mean_iou=row.mean_iou,
        )
        for row in sorted(rows, key=lambda row: (order[row.way], -row.budget))
    ]
