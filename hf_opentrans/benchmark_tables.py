"""Tables of measured figures, generated from the rows, for the terminal, for reports and for published Markdown."""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_opentrans.benchmark_claims import claim_text
from hf_opentrans.benchmark_cold_start import ColdStart, cold_start_notes, cold_start_table
from hf_opentrans.benchmark_cuts import CutRow, cuts_notes, cuts_table
from hf_opentrans.benchmark_elastic import ElasticRow, files_of, timings_of
from hf_opentrans.benchmark_elastic_tables import elastic_notes, elastic_table, timing_note, timing_table
from hf_opentrans.benchmark_metric import MetricRow, metric_notes, metric_table
from hf_opentrans.benchmark_recovery_tables import RecoveryRow, recovery_notes, recovery_table
from hf_opentrans.benchmark_runtime_plan import RuntimeRow
from hf_opentrans.benchmark_runtime_tables import runtime_notes, runtime_table
from hf_opentrans.benchmark_scale import ScaleRow, scale_table
from hf_opentrans.benchmark_selection_tables import SelectionRow, StepTiming, selection_notes, selection_table
from hf_opentrans.benchmark_semi_structured import (
    SemiStructuredRow,
    semi_structured_notes,
    semi_structured_table,
)
from hf_opentrans.benchmark_spectra import SpectraRow, spectra_table
from hf_opentrans.benchmark_transfer_tables import (
    TransferRow,
    TransferTiming,
    claim_table,
    transfer_notes,
    transfer_table,
)
from hf_opentrans.benchmarks import LatencyRow, MethodRow

Table = tuple[list[str], list[list[str]]]
# A published table stands between these lines; the first names the file that it is generated from.
_BLOCK = re.compile(r"(<!-- table: (?P<file>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


@dataclass(frozen=True)
class Summary:
    """The runs of one method and budget that differ in their seed alone.

    Args:
        method, variant, keep: Of all of them.
        seeds: How many there are.
        mean: Mean of every figure by field of `MethodRow`; None where it was not measured.
        lowest, highest: Smallest and largest of every figure.
    """

    method: str
    variant: str
    keep: float
    seeds: int
    mean: dict[str, float | None]
    lowest: dict[str, float | None]
    highest: dict[str, float | None]

    @property
    def label(self) -> str:
        """Name for people."""
        return self.variant or ("ours" if self.method == "obs" else self.method)

    def spread(self, name: str) -> float | None:
        """Return half the range over the seeds; None for one seed or where the figure was not measured."""
        low, high = self.lowest[name], self.highest[name]
        return None if self.seeds < 2 or low is None or high is None else (high - low) / 2


def summarise(rows: Sequence[MethodRow]) -> list[Summary]:
    """Combine the rows that differ in their seed: the dense model, then budget by budget, largest first, ours on top.

    Otherwise methods and variants keep the order of the rows.
    """
    groups: dict[tuple[str, str, float], list[MethodRow]] = {}
    for row in rows:
        groups.setdefault((row.method, row.variant, row.keep), []).append(row)
    order = sorted(groups, key=lambda key: (key[0] != "dense", -key[2], key[0] != "obs"))
    return [_summary(groups[key]) for key in order]


def _summary(rows: list[MethodRow]) -> Summary:
    first, found = rows[0], [row.to_dict() for row in rows]
    names = [name for name in found[0] if name not in {"method", "variant", "keep", "seed", "widths"}]
    values = {name: [row[name] for row in found if row[name] is not None] for name in names}

    def each(combine: Callable[[list[float]], float]) -> dict[str, float | None]:
        return {name: combine(measured) if measured else None for name, measured in values.items()}

    return Summary(first.method, first.variant, first.keep, len(rows), each(statistics.fmean), each(min), each(max))


# What a model can do, and what it costs: the whole table is wider than a terminal.
QUALITY = ("model", "keep", "MACs", "CLS cos", "patch cos", "top-1", "mIoU", "pixAcc")
COST = ("model", "keep", "MACs", "speed-up", "params / size", "time", "memory", "predicted", "realised")


def method_table(rows: Sequence[MethodRow], columns: Sequence[str] | None = None) -> Table:
    """Return header and cells of the comparison, for Markdown and for the terminal.

    Rows that differ in their seed become one line: the mean, and "±" half the range over the seeds. Columns that were
    never measured are left out.

    Args:
        rows: The rows.
        columns: Which columns, for example `QUALITY`. Defaults to all.
    """
    lines = [_cells(summary, any(row.variant for row in rows)) for summary in summarise(rows)]
    names = [name for name in lines[0] if columns is None or name in columns] if lines else []
    shown = [name for name in names if any(line[name] != "-" for line in lines)]
    return shown, [[line[name] for name in shown] for line in lines]


def _cells(summary: Summary, is_ablation: bool) -> dict[str, str]:
    def show(name: str, form: str, unit: str = "", scale: float = 1.0, spread: str | None = None) -> str:
        value, half = summary.mean[name], summary.spread(name)
        if value is None:
            return "-"
        around = "" if half is None or spread is None else f" ± {half * scale:{spread}}"
        return f"{value * scale:{form}}{unit}{around}"

    nominal = show("nominal_macs", ",.0f", " M", 1e-6)
    return {
        "model": summary.label,
        "keep": f"{summary.keep:g}",
        "MACs": show("macs", ",.0f", " M", 1e-6) + (f" (nominal {nominal})" if nominal != "-" else ""),
        "speed-up": show("speed_up", ".2f", "x", spread=".2f"),
        "params / size": f"{show('params', '.2f', ' M', 1e-6)} / {show('bytes', '.1f', ' MB', 1e-6)}",
        "CLS cos": show("class_token_cosine", ".4f", spread=".4f"),
        "patch cos": show("patch_token_cosine", ".4f", spread=".4f"),
        "top-1": show("top1", ".1f", "%", 100, ".1f"),
        "mIoU": show("mean_iou", ".1f", "%", 100, ".1f"),
        "pixAcc": show("pixel_accuracy", ".1f", "%", 100, ".1f"),
        "predicted": show("predicted_error", ".3g") if is_ablation else "-",
        "realised": show("realised_error", ".3g") if is_ablation else "-",
        "time": show("seconds", ".1f", " s"),
        "memory": show("peak_memory_mib", ",.0f", " MiB"),
    }


def latency_table(rows: Sequence[LatencyRow]) -> Table:
    """Return header and cells of paired latencies."""
    header = ["model", "batch", "px", "median", "speed-up (range)", "MACs", "of MACs"]
    cells = [
        [
            row.model,
            str(row.batch_size),
            str(row.resolution),
            f"{row.median_ms:.1f} ms",
            f"{row.speed_up:.2f}x ({row.speed_up_range[0]:.2f}-{row.speed_up_range[1]:.2f})",
            f"{row.mac_ratio:.2f}x",
            f"{row.efficiency:.0%}",
        ]
        for row in rows
    ]
    return header, cells


def markdown_table(table: Table) -> str:
    """Format header and cells as a Markdown table."""
    header, cells = table
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def result_table(values: dict[str, Any]) -> str:
    """Format a benchmark's JSON object as a Markdown table with the machine and the command that made it.

    Raises:
        ValueError: If the object is no benchmark result.
    """
    machine = values.get("environment", {})
    versions = machine.get("versions", {})
    threads = machine.get("threads")
    stack = f"{threads} thread{'' if threads == 1 else 's'}, {machine.get('processor')}, torch {versions.get('torch')}"
    if "cpu_ratio" in values:
        first = ColdStart.from_dict(values)
        table, notes = cold_start_table(first), cold_start_notes(first)
    else:
        table, notes = _table_of_rows(values, values.get("rows") or [{}])
    said = "".join(f"{note}\n\n" for note in notes)
    return f"{markdown_table(table)}\n\n{said}Measured by `{values['command']}` ({stack}).\n"


def _table_of_rows(values: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[Table, list[str]]:
    for field, build in _TABLES.items():
        if field in rows[0]:
            return build(rows, values)
    raise ValueError("The file holds no rows of a benchmark. Write it with `hf-opentrans benchmark ... --json`.")


def _of_selection(rows: list[dict[str, Any]], values: dict[str, Any]) -> tuple[Table, list[str]]:
    runs = [SelectionRow(**row) for row in rows]
    timings = [StepTiming(**timing) for timing in values["timings"]]
    return selection_table(runs, timings), selection_notes(runs, values["settings"])


def _of_metric(rows: list[dict[str, Any]], values: dict[str, Any]) -> tuple[Table, list[str]]:
    metrics = [MetricRow(**row) for row in rows]
    return metric_table(metrics), metric_notes(metrics, values["settings"])


def _of_recovery(rows: list[dict[str, Any]], _: dict[str, Any]) -> tuple[Table, list[str]]:
    recovered = [RecoveryRow(**row) for row in rows]
    return recovery_table(recovered), recovery_notes(recovered)


def _of_transfer(rows: list[dict[str, Any]], values: dict[str, Any]) -> tuple[Table, list[str]]:
    moved = [TransferRow(**row) for row in rows]
    table = transfer_table(moved, [TransferTiming(**timing) for timing in values["timings"]])
    return table, [*transfer_notes(moved, values["settings"]), markdown_table(claim_table(moved))]


def _of_methods(rows: list[dict[str, Any]], values: dict[str, Any]) -> tuple[Table, list[str]]:
    methods = [MethodRow(**row) for row in rows]
    return method_table(methods), method_notes(methods, values.get("skipped", ()))


def _of_cuts(rows: list[dict[str, Any]], _: dict[str, Any]) -> tuple[Table, list[str]]:
    cuts = [CutRow(**row) for row in rows]
    return cuts_table(cuts), cuts_notes(cuts)


def _of_runtimes(rows: list[dict[str, Any]], values: dict[str, Any]) -> tuple[Table, list[str]]:
    found = [RuntimeRow(**row) for row in rows]
    return runtime_table(found), runtime_notes(found, values)


def _of_sparsity(rows: list[dict[str, Any]], _: dict[str, Any]) -> tuple[Table, list[str]]:
    found = [SemiStructuredRow(**row) for row in rows]
    return semi_structured_table(found), semi_structured_notes(found)


def _of_elastic(rows: list[dict[str, Any]], values: dict[str, Any]) -> tuple[Table, list[str]]:
    found, timings = [ElasticRow(**row) for row in rows], timings_of(values)
    notes = elastic_notes(found, files_of(values), values["settings"])
    if timings:
        notes += [markdown_table(timing_table(timings)), timing_note(timings)]
    return elastic_table(found), notes


# By a field that only the rows of one benchmark have; the first that fits.
_TABLES: dict[str, Callable[[list[dict[str, Any]], dict[str, Any]], tuple[Table, list[str]]]] = {
    "rule": _of_selection,
    "times_faster": _of_metric,
    "over_eigenvalues": lambda rows, _: (spectra_table([SpectraRow(**row) for row in rows]), []),
    "rebuild_seconds": lambda rows, _: (scale_table([ScaleRow(**row) for row in rows]), []),
    "distill_seconds": _of_recovery,
    "framework": _of_transfer,
    "method": _of_methods,
    "bytes_added": _of_elastic,
    "runtime": _of_runtimes,
    "sparsity": _of_sparsity,
    "ms_before": _of_cuts,
    "speed_up": lambda rows, _: (latency_table([LatencyRow(**row) for row in rows]), []),
}


def method_notes(rows: Sequence[MethodRow], skipped: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Return the sentences that belong under a comparison: what "±" and "nominal" mean, and which runs are missing.

    Args:
        rows: The rows.
        skipped: Runs that gave no model: method, variant, keep, seed, reason.
    """
    summaries, notes = summarise(rows), []
    counts = sorted({summary.seeds for summary in summaries if summary.method != "dense"})
    if counts and counts[-1] > 1:
        many = str(counts[-1]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        notes.append(f"Means over {many} seeds; ± is half their range.")
    if any(summary.mean["nominal_macs"] is not None for summary in summaries):
        notes.append("Nominal MACs leave out zero weights, which cost as much time as others.")
    reasons = {(run["variant"] or run["method"], run["keep"]): run["reason"] for run in skipped}
    notes += [f"Not run: {name} at keep {keep:g}. {reason}" for (name, keep), reason in reasons.items()]
    return notes


def fill_tables(text: str, results: Path) -> str:
    """Return Markdown whose marked blocks hold the tables of the files that they name.

    A block starts with `<!-- table: FILE.json -->` and ends with `<!-- end of table -->`.

    Args:
        text: The Markdown.
        results: Folder of the files.
    """

    def fill(block: re.Match[str]) -> str:
        values = json.loads((results / block["file"]).read_text(encoding="utf-8"))
        text = claim_text(values, results) if "claim" in values else result_table(values)
        return f"{block[1]}{text}{block[3]}"

    return _BLOCK.sub(fill, text)
