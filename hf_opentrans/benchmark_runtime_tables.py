"""Tables and the picture of a latency benchmark over runtimes and precisions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_opentrans._optional import require
from hf_opentrans.benchmark_runtime_plan import RuntimeRow, Setting

Table = tuple[list[str], list[list[str]]]
_COLOURS = ("#4d4d4d", "#0072b2", "#c1121f", "#009e73", "#e69f00", "#7b4fa3")
_HATCHES = ("", "//", "..", "xx", "--", "++")
# Largest over smallest speed-up of the rounds of one row: alone on its machine a run stays within 2.2.
MOST_SPREAD = 3.0


# How fast it is, and what it takes and keeps: the whole table is wider than a terminal.
SPEED = ("runtime", "precision", "model", "batch", "px", "median", "speed-up", "MACs", "within", "of MACs")
QUALITY = ("runtime", "precision", "model", "batch", "px", "size", "memory", "cosine", "to the first", "mIoU")


def runtime_table(rows: Sequence[RuntimeRow], columns: Sequence[str] | None = None) -> Table:
    """Return header and cells; columns that were never measured, or are the same everywhere, are left out.

    Args:
        rows: The rows.
        columns: Which columns, such as `SPEED`. Defaults to all.
    """
    lines = [_cells(row) for row in rows]
    names = list(lines[0]) if lines else []
    constant = {"batch", "px"} if len(rows) > 1 else set()
    shown = [
        name
        for name in names
        if (columns is None or name in columns)
        and any(line[name] != "-" for line in lines)
        and not (name in constant and len({line[name] for line in lines}) == 1)
    ]
    return shown, [[line[name] for name in shown] for line in lines]


def _cells(row: RuntimeRow) -> dict[str, str]:
    def show(value: float | None, form: str, unit: str = "") -> str:
        return "-" if value is None else f"{value:{form}}{unit}"

    low, high = row.speed_up_range
    return {
        "runtime": row.runtime,
        "precision": row.precision,
        "model": _short(row.model),
        "batch": str(row.batch_size),
        "px": str(row.resolution),
        "median": f"{row.median_ms:,.1f} ms",
        "speed-up": f"{row.speed_up:.2f}x",
        "range": f"{low:.2f}-{high:.2f}",
        "MACs": f"{row.mac_ratio:.2f}x",
        "within": show(row.gain, ".2f", "x"),
        "of MACs": f"{row.efficiency:.0%}",
        "size": show(None if row.bytes is None else row.bytes / 1e6, ",.1f", " MB"),
        "memory": show(row.peak_memory_mib, ",.0f", " MiB"),
        "cosine": show(row.cosine, ".4f"),
        "to the first": show(row.cosine_to_first, ".4f"),
        "mIoU": "-" if row.mean_iou is None else f"{row.mean_iou:.1%}",
    }


def runtime_notes(rows: Sequence[RuntimeRow], values: dict[str, Any]) -> list[str]:
    """Return the sentences under the table: what the columns mean, what was best, and what was not run.

    Args:
        rows: The rows.
        values: The whole object: its settings and what was not run.
    """
    notes = [
        f"Speed-up: over {_short(rows[0].model)} in eager fp32, median of {rows[0].rounds} paired rounds. "
        f'"Within": over {_short(rows[0].model)} in that runtime and precision; "of MACs": that as a share of the '
        'ratio of multiply-accumulates. "Cosine": of the final tokens to those of the same model in eager fp32. '
        "Memory: of a process that loads the model and runs it, with its libraries."
    ]
    last = rows[-1].model
    shares: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.mac_ratio > 1:
            shares.setdefault((row.runtime, row.precision), []).append(row.efficiency)
    spans = [f"{name} {kind} {_span(found)}" for (name, kind), found in shares.items()]
    if spans:
        notes.append(f"What pruning gains inside each runtime, as a share of the ratio of MACs: {'; '.join(spans)}.")
        of_last = [row for row in rows if row.model == last]
        best = max([row for row in of_last if _is_steady(row)] or of_last, key=lambda row: row.speed_up)
        notes.append(
            f"The fastest way to run {_short(last)}: {_setting(best.setting)}, {best.speed_up:.2f} times as fast."
        )
    notes += _unsteady(rows)
    versions = values.get("settings", {}).get("runtime_versions", {})
    if versions and any(row.runtime in ("onnxruntime", "openvino") for row in rows):
        notes.append(f"With {', '.join(f'{name} {found}' for name, found in versions.items())}.")
    notes += [f"Not run: {x['runtime']} {x['precision']}. {x['reason']}" for x in values.get("not_run", ())]
    return notes


def _is_steady(row: RuntimeRow) -> bool:
    low, high = row.speed_up_range
    return high <= MOST_SPREAD * low


def _unsteady(rows: Sequence[RuntimeRow]) -> list[str]:
    """Say which rows another load of the machine has disturbed, if any."""
    found = [row for row in rows if not _is_steady(row)]
    if not found:
        return []
    widest = max(found, key=lambda row: row.speed_up_range[1] / row.speed_up_range[0])
    low, high = widest.speed_up_range
    return [
        f"Unsteady: {len(found)} of {len(rows)} rows, where one round has more than {MOST_SPREAD:g} times the "
        f"speed-up of another (most: {_short(widest.model)} in {_setting(widest.setting)}, {low:.2f}x to "
        f"{high:.2f}x). Something else was running. Measure again while nothing else runs."
    ]


def _short(model: str) -> str:
    """Return the last part of a path; Hub ids and the names of random towers as they are."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model


def _span(shares: Sequence[float]) -> str:
    least, most = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return least if least == most else f"{least} to {most}"


def _setting(setting: Setting) -> str:
    return f"{setting.runtime} {setting.precision}, batch {setting.batch_size}, {setting.resolution} px"


def draw_runtimes(rows: Sequence[RuntimeRow], path: str | Path, *, title: str = "") -> None:
    """Draw the speed-up of every model in every runtime and precision, a panel per batch size and resolution.

    Args:
        rows: The rows.
        path: A .png file; its folder exists.
        title: Above the panels.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    require("demo", "matplotlib")
    from matplotlib.figure import Figure  # without pyplot: no window, no state of the user's is touched

    panels = list(dict.fromkeys((row.resolution, row.batch_size) for row in rows))
    kinds = list(dict.fromkeys((row.runtime, row.precision) for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=(4.2 * len(panels) + 1.6, 1.6 + 0.3 * len(kinds) * len(models)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    height = 0.8 / len(models)
    for axis, (side, batch) in zip(axes, panels, strict=True):
        axis.set_title(f"batch {batch}, {side} px", loc="left", fontsize=11)
        for index, model in enumerate(models):
            found = {
                (r.runtime, r.precision): r
                for r in rows
                if (r.resolution, r.batch_size, r.model) == (side, batch, model)
            }
            places = [
                (i + index * height - 0.4 + height / 2, found[kind]) for i, kind in enumerate(kinds) if kind in found
            ]
            axis.barh(
                [place for place, _ in places],
                [row.speed_up for _, row in places],
                height=height * 0.9,
                color=_COLOURS[index % len(_COLOURS)],
                hatch=_HATCHES[index % len(_HATCHES)],
                edgecolor="white",
                label=f"{_short(model)} (MACs / {places[0][1].mac_ratio:.2f})" if places else _short(model),
            )
            for place, row in places:
                axis.annotate(
                    f"{row.speed_up:.2f}",
                    (row.speed_up, place),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        axis.axvline(1, color="#999999", linewidth=0.8)
        axis.set_xlabel("times as fast as the first model in eager fp32")
        axis.set_xlim(0, 1.12 * max(row.speed_up for row in rows))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(kinds)), [f"{runtime}\n{precision}" for runtime, precision in kinds])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    # Inches of a line of the legend, at most: a letter takes 0.09, its patch and the gaps 0.7.
    columns = int(figure.get_figwidth() / (0.09 * max(map(len, labels)) + 0.7))
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(columns, len(models))), frameon=False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.savefig(path, dpi=120)
