"""The picture of a pruning benchmark: how far the tokens move, over the share of the multiply-accumulates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_opentrans._optional import require
from hf_opentrans.benchmark_selection_tables import SelectionRow
from hf_opentrans.benchmark_tables import Summary, summarise
from hf_opentrans.benchmarks import MethodRow

PANELS = {"class_token_cosine": "class token", "patch_token_cosine": "patch tokens"}
_OURS = "#c1121f"
# Told apart by people who see no red or green, and by their markers without any colour.
_COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#7b4fa3",
    "#56b4e9",
    "#8c564b",
    "#4d4d4d",
    "#b5a400",
    "#d98cb3",
    "#9aa0a6",
)
_MARKERS = "sD^vPX<>ph"
_SMALLEST = 1e-7  # cosines of float32 tokens mean nothing below; a logarithmic axis has no zero


def draw_pruning(rows: Sequence[MethodRow], path: str | Path, *, title: str = "") -> bool:
    """Draw 1 - cosine to the dense model for class and patch tokens, and write the picture to `path`.

    With several budgets: one line per method over the share of the MACs; the band and the bars reach from the best to
    the worst seed. With one budget: one line of the chart per method or variant. Methods that only set weights to zero
    are drawn dashed at the share that they would need if zeros were free.

    Args:
        rows: The dense model's row and the others.
        path: A .png file; its folder exists.
        title: Above the panels.

    Returns:
        Whether there was something to draw: rows with cosines.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    require("demo", "matplotlib")
    from matplotlib.figure import Figure  # without pyplot: no window, no state of the user's is touched

    dense = next((row for row in rows if row.method == "dense"), None)
    found = [s for s in summarise(rows) if s.method != "dense" and s.mean["class_token_cosine"] is not None]
    if dense is None or not found:
        return False
    lines: dict[str, list[Summary]] = {}
    for summary in found:
        lines.setdefault(summary.label, []).append(summary)
    is_chart = len({summary.keep for summary in found}) == 1
    size = (11.0, 1.5 + 0.36 * len(lines)) if is_chart else (11.0, 4.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, 2, sharey=is_chart)
    for axis, (name, panel) in zip(axes, PANELS.items(), strict=True):
        axis.set_title(panel, loc="left", fontsize=11)
        axis.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
        axis.grid(visible=True, which="minor", axis="x" if is_chart else "y", color="#f0f0f0", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if is_chart:
            _draw_chart(axis, lines, name)
        else:
            _draw_lines(axis, lines, name, dense.macs)
    if not is_chart:
        handles, labels = axes[0].get_legend_handles_labels()
        # From top to bottom as the lines end on the left, at the smallest budget.
        ends = [_errors(summaries, "class_token_cosine")[0][-1] for summaries in lines.values()]
        order = sorted(range(len(ends)), key=lambda index: -ends[index])
        handles, labels = [handles[index] for index in order], [labels[index] for index in order]
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=10, handlelength=2.6)
    _save(figure, path, title)
    return True


def _save(figure: Any, path: str | Path, title: str) -> None:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=140, facecolor="white")


def _draw_lines(axis: Any, lines: dict[str, list[Summary]], name: str, dense_macs: int) -> None:
    for index, (label, summaries) in enumerate(lines.items()):
        is_nominal = summaries[0].mean["nominal_macs"] is not None
        field = "nominal_macs" if is_nominal else "macs"
        shares = [100 * (summary.mean[field] or 0) / dense_macs for summary in summaries]
        middles, lows, highs = _errors(summaries, name)
        colour, style = _look(label, index)
        dashes = "--" if is_nominal else "-"
        axis.plot(shares, middles, color=colour, linestyle=dashes, label=_name(summaries[0]), **style)
        if any(summary.seeds > 1 for summary in summaries):
            axis.fill_between(shares, lows, highs, color=colour, alpha=0.15, linewidth=0)
            around = _around(middles, lows, highs)
            axis.errorbar(shares, middles, around, fmt="none", ecolor=colour, elinewidth=1, capsize=2.5, zorder=2)
    axis.set_yscale("log")
    _use_plain_numbers(axis.yaxis)
    axis.set_xlabel("MACs of the vision tower, % of dense")
    axis.set_ylabel("1 - cosine to the dense model")


def _draw_chart(axis: Any, lines: dict[str, list[Summary]], name: str) -> None:
    for index, (label, summaries) in enumerate(lines.items()):
        middles, lows, highs = _errors(summaries, name)
        colour = _OURS if label in {"ours", "+ sweep"} else _COLOURS[0]  # "+ sweep" is the method as it is
        around = _around(middles, lows, highs)
        axis.errorbar(middles, [index], xerr=around, fmt="o", color=colour, markersize=7, capsize=3)
        axis.annotate(
            f"{middles[0]:#.2g}", (highs[0], index), (8, 0), textcoords="offset points", va="center", fontsize=9
        )
    axis.set_yticks(range(len(lines)), [_name(summaries[0]) for summaries in lines.values()])
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xscale("log")
    _use_plain_numbers(axis.xaxis)
    axis.margins(x=0.14)
    axis.set_xlabel("1 - cosine to the dense model")


def _name(summary: Summary) -> str:
    return summary.label if summary.mean["nominal_macs"] is None else f"{summary.label} (nominal)"


def _use_plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis 0.01, 0.02, 0.05, 0.1: powers of ten alone are too far apart."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(LogLocator(subs=(3.0, 4.0, 6.0, 7.0, 8.0, 9.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _errors(summaries: list[Summary], name: str) -> tuple[list[float], list[float], list[float]]:
    """Return mean, smallest and largest 1 - cosine of every summary."""

    def error(cosine: float | None) -> float:
        return max(1 - (1.0 if cosine is None else cosine), _SMALLEST)

    middles = [error(summary.mean[name]) for summary in summaries]
    return middles, [error(s.highest[name]) for s in summaries], [error(s.lowest[name]) for s in summaries]


def _around(middles: list[float], lows: list[float], highs: list[float]) -> list[list[float]]:
    """Return the lengths of error bars, below and above."""
    below = [max(middle - low, 0.0) for middle, low in zip(middles, lows, strict=True)]
    return [below, [max(high - middle, 0.0) for middle, high in zip(middles, highs, strict=True)]]


def _look(label: str, index: int) -> tuple[str, dict[str, Any]]:
    """Return colour and style of a line: ours on top of the others."""
    if label == "ours":
        return _OURS, {"marker": "o", "linewidth": 2.8, "markersize": 7, "zorder": 4}
    turn = index % len(_COLOURS)
    return _COLOURS[turn], {"marker": _MARKERS[turn], "linewidth": 1.5, "markersize": 5.5, "zorder": 3}


def draw_selection(rows: Sequence[SelectionRow], path: str | Path, *, title: str = "") -> None:
    """Draw mIoU on seen and on unseen classes over the cost of a training step: every seed, and the mean of each rule.

    Args:
        rows: Of the study; runs without training become a line across.
        path: A .png file; its folder exists.
        title: Above the panels.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    require("demo", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.9), layout="constrained")
    axes = figure.subplots(1, 2)
    rules = list(dict.fromkeys(row.rule for row in rows))
    panels = {"seen": "classes that the head saw", "unseen": "classes that it did not see"}
    for axis, (name, panel) in zip(axes, panels.items(), strict=True):
        for index, rule in enumerate(rules):
            own = [row for row in rows if row.rule == rule]
            scores = [100 * getattr(row, name) for row in own]
            mean = sum(scores) / len(scores)
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            if not own[0].full_macs_per_sample:
                axis.axhline(mean, color="#888888", linewidth=1, linestyle="--", label=rule)
                continue
            costs = [100 * row.macs_per_sample / row.full_macs_per_sample for row in own]
            axis.plot(costs, scores, linewidth=0, marker=marker, markersize=4, color=colour, alpha=0.35)
            place = sum(costs) / len(costs)
            axis.plot([place], [mean], linewidth=0, marker=marker, markersize=10, color=colour, label=rule)
        axis.set_title(panel, loc="left", fontsize=11)
        axis.set_xlabel("multiply-accumulates of a training step, % of full fine-tuning")
        axis.set_ylabel("mIoU, %")
        axis.grid(visible=True, color="#e6e6e6", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=10)
    _save(figure, path, title)
