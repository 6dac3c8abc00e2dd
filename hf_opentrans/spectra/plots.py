"""Pictures of spectra: a metric by depth, and the eigenvalues of one layer with its fitted tail."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from hf_opentrans._optional import require

from .esd import Spectrum
from .layers import by_group
from .tail_fits import TailFit

# Told apart by people who see no red or green, and by their markers without any colour.
_COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#7b4fa3",
    "#56b4e9",
    "#8c564b",
    "#c1121f",
    "#4d4d4d",
    "#d98cb3",
    "#b5a400",
)
_MARKERS = "osD^vPX<>p"
_MOST_LINES = 10


def draw_report(report: Any, path: str | Path | None = None, metric: str = "alpha") -> Any:
    """Draw a metric by depth, one line per group of layers that do the same job.

    Layers without company are points of one line, "other". Undecided layers are hollow; bars are confidence intervals.

    Args:
        report: Of `analyze_spectra`.
        path: Where to save the picture; not saved without.
        metric: Which.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the metric is unknown, or no layer has it.
    """
    require("demo", "matplotlib")
    from matplotlib.figure import Figure  # without pyplot: no window, no state of the user's is touched

    values = report.values(metric)
    measured = {name: value for name, value in values.items() if value is not None}
    if not measured:
        raise ValueError(f"No layer of the report has {metric!r}. Measure it first, or draw another metric.")
    entries = {entry.layer.name: entry for entry in report.layers}
    places = {name: place for place, name in enumerate(dict.fromkeys(e.layer.block for e in report.layers))}
    figure = Figure(figsize=(10.0, 4.6), layout="constrained")
    axis = figure.subplots()
    for index, (label, names) in enumerate(_lines(report).items()):
        shown = [name for name in names if name in measured]
        x = [places[entries[name].layer.block] for name in shown]
        y = [measured[name] for name in shown]
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        width = 1.2 if label != "other" else 0
        axis.plot(x, y, color=colour, linewidth=width, marker=marker, markersize=6, label=label, zorder=2)
        undecided = [place for place, name in enumerate(shown) if entries[name].is_undecided]
        axis.plot(
            [x[place] for place in undecided],
            [y[place] for place in undecided],
            color=colour,
            marker=marker,
            markerfacecolor="white",
            linewidth=0,
            zorder=3,
        )
        for place, name in zip(x, shown, strict=True):
            interval = entries[name].fit.interval
            if metric == "alpha" and interval is not None:
                axis.plot([place, place], interval, color=colour, linewidth=0.8, alpha=0.5, zorder=1)
    middle = float(np.median(list(measured.values())))
    axis.axhline(middle, color="#888888", linewidth=0.9, linestyle="--", label=f"median {middle:.2f}")
    labels = [name.rpartition(".")[2] or "(top)" for name in places]
    axis.set_xticks(range(len(places)), labels, rotation=0 if len(places) <= 16 and max(map(len, labels)) < 6 else 90)
    axis.set_xlabel("block")
    axis.set_ylabel(metric.replace("_", " "))
    axis.set_title(f"{report.model}: {metric.replace('_', ' ')} by depth, fit {report.fit}", loc="left", fontsize=11)
    axis.grid(visible=True, color="#e6e6e6", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def draw_spectrum(spectrum: Spectrum, fit: TailFit, path: str | Path | None = None, *, title: str = "") -> Any:
    """Draw the density of eigenvalues and the survival function, both with the fitted power law.

    Args:
        spectrum: Of one layer.
        fit: Its tail.
        path: Where to save the picture; not saved without.
        title: Above it.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    require("demo", "matplotlib")
    from matplotlib.figure import Figure

    values = spectrum.eigenvalues.cpu().numpy()
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    high = max(values[-1], values[0] * 1.01)  # equal eigenvalues have no range of their own
    edges = np.logspace(math.log10(values[0]), math.log10(high), 61)
    left.hist(values, bins=edges.tolist(), density=True, color="#9ecae1")
    left.set_ylabel("density")
    survival = 1 - np.arange(len(values)) / len(values)
    right.plot(values, survival, ".", markersize=3, color="#0072b2")
    right.set_ylabel("share of larger eigenvalues")
    if fit.reliable:
        tail = np.logspace(math.log10(fit.xmin), math.log10(values[-1]), 50)
        share = fit.tail_count / len(values)
        density = share * (fit.alpha - 1) / fit.xmin * (tail / fit.xmin) ** -fit.alpha
        left.plot(
            tail, density, color="#c1121f", linewidth=1.8, label=f"alpha {fit.alpha:.2f}, KS {fit.ks_distance:.3f}"
        )
        right.plot(tail, share * (tail / fit.xmin) ** (1 - fit.alpha), color="#c1121f", linewidth=1.8)
        left.legend(frameon=False)
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="eigenvalue of WᵀW")
        axis.grid(visible=True, color="#e6e6e6", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _lines(report: Any) -> dict[str, list[str]]:
    """Return the groups with more than one layer by a short label, largest first, and all others under "other"."""
    groups = sorted(by_group(entry.layer for entry in report.layers).items(), key=lambda item: -len(item[1]))
    lines: dict[str, list[str]] = {}
    others: list[str] = []
    for group, names in groups:
        if len(names) > 1 and len(lines) < _MOST_LINES - 1:
            label = group.split(".")[-1].replace("other", "other layers")
            lines[group if label in lines else label] = names
        else:
            others += names
    return {**lines, "other": others} if others else lines
