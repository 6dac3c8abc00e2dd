"""The commands `analyze` and `benchmark spectra`."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from tqdm.auto import tqdm

from hf_opentrans._optional import require
from hf_opentrans.benchmark_spectra import analyze_large, compare_with_weightwatcher, spectra_table
from hf_opentrans.cli._common import (
    app,
    command_line,
    err,
    guarded,
    out,
    save_json,
    show_table,
    shows_progress,
    usage,
)
from hf_opentrans.cli.benchmark import benchmark_app
from hf_opentrans.loading import load_any
from hf_opentrans.spectra.analysis import METRICS, SpectralReport, analyze_spectra, check_metric, layer_spectrum
from hf_opentrans.spectra.plots import draw_spectrum
from hf_opentrans.spectra.selection import GRANULARITIES, SPECTRAL, check_selection, select_layers
from hf_opentrans.spectra.tail_fits import FIT_METHODS, check_method, fit_tail

# Of a CLIP with both towers: the image encoder is what this package prunes and trains.
IMAGE_TOWER = r"vision_model\..*|visual_projection"


@app.command()
@guarded
def analyze(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of any transformers model, or 'clip-scenes'.")],
    fit: Annotated[str, typer.Option(help=f"{' | '.join(FIT_METHODS)}: where a tail starts.")] = "hill",
    metric: Annotated[str, typer.Option(help=f"To sort and to draw by: {', '.join(METRICS)}.")] = "alpha",
    target_modules: Annotated[
        str | None, typer.Option(help="Regular expression for layers; default: all, of a CLIP its image tower.")
    ] = None,
    compat: Annotated[bool, typer.Option(help="Follow the OpenTrans code, slips included.")] = False,
    intervals: Annotated[
        bool, typer.Option(help="Bootstrap an interval of every alpha; mark undecided ones.")
    ] = False,
    select: Annotated[str | None, typer.Option(help=f"Also choose layers to train: {', '.join(SPECTRAL)}.")] = None,
    fraction: Annotated[float, typer.Option(help="Share of the layers that --select trains.")] = 0.5,
    granularity: Annotated[str, typer.Option(help=f"{' | '.join(GRANULARITIES)}, for --select.")] = "module",
    layer: Annotated[str | None, typer.Option(help="Draw the eigenvalues of this layer instead.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw to this file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every figure to this file.")] = None,
) -> None:
    """Fit the heavy tail of every weight matrix: small alpha = heavy tail = well trained."""
    with usage():
        check_method(fit)
        check_metric(metric)
        if select is not None:
            check_selection(select, granularity, fraction)
        if layer is not None and plot is None:
            raise ValueError(
                f"--layer is {layer!r} and there is no --plot. The picture needs a file. Add --plot FILE."
            )
    loaded = load_any(model)
    if layer is not None and plot is not None:
        spectrum = layer_spectrum(loaded, layer)
        draw_spectrum(spectrum, fit_tail(spectrum, fit, compat=compat), plot, title=f"{model}: {layer}, fit {fit}")
        out.print(f"Picture: {escape(str(plot))}", soft_wrap=True, highlight=False)
    is_clip = target_modules is None and hasattr(loaded, "vision_model") and hasattr(loaded, "text_model")
    with tqdm(desc="Analysing", unit="layer", disable=not shows_progress(), leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = analyze_spectra(
            loaded,
            fit=fit,
            target_modules=IMAGE_TOWER if is_clip else target_modules,
            compat=compat,
            debias=True,
            intervals=intervals,
            on_layer=show,
        )
    _show(report, model, metric, is_clip)
    values = report.to_dict() | {"model": model}
    if select is not None:
        chosen = select_layers(report, select, fraction, granularity)
        out.print(f"Rule {select}, fraction {fraction:g}: {len(chosen.names)} train, {len(chosen.frozen)} freeze.")
        out.print(escape("Train: " + ", ".join(chosen.names)), soft_wrap=True, highlight=False)
        values["selection"] = chosen.to_dict()
    if plot is not None and layer is None:
        report.plot(plot, metric=metric)
        out.print(f"Picture: {escape(str(plot))}", soft_wrap=True, highlight=False)
    save_json(json_file, command_line(), values)


def _show(report: SpectralReport, model: str, metric: str, is_clip: bool) -> None:
    """Print the layers, largest metric first: with alpha, what the paper's rule would train comes first."""
    header, cells = report.table()
    values = report.values(metric)
    order = sorted(range(len(cells)), key=lambda place: -_sortable(values[report.layers[place].layer.name]))
    if metric.replace("_", " ") not in header:
        header = [*header, metric.replace("_", " ")]
        cells = [[*line, _number(values[e.layer.name])] for line, e in zip(cells, report.layers, strict=True)]
    show_table((header, [cells[place] for place in order]), title=f"{model}: spectra, fit {report.fit}")
    known = sorted(value for value in values.values() if value is not None)
    if known:
        middle = known[len(known) // 2]
        out.print(f"{len(report.layers)} layers, {metric} {known[0]:.3g} to {known[-1]:.3g}, median {middle:.3g}.")
    if any(entry.is_undecided for entry in report.layers):
        out.print("?: undecided, no reliable tail or an interval wider than the spread between layers.")
    for name, reason in report.skipped.items():
        out.print(escape(f"Left out: {name}, {reason}."), soft_wrap=True, highlight=False)
    if is_clip:
        out.print("The text tower was left out. --target-modules '.*' takes all layers.")


def _sortable(value: float | None) -> float:
    return float("-inf") if value is None else value


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


@benchmark_app.command("spectra")
@guarded
def benchmark_spectra(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the B/16-sized tower; 12 is the whole.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds.")] = 3,
    large: Annotated[bool, typer.Option(help="Also analyse towers of the size of ViT-L/14 and ViT-g/14.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every figure to this file.")] = None,
) -> None:
    """Time the analysis against weightwatcher and against the eigenvalues alone, on one thread."""
    torch.set_num_threads(1)
    about = round((rounds + 1) * layers * 2.2 / 60 + (2.5 if large else 0), 1)
    out.print(f"About {about:g} minutes on one thread. Nothing else should run meanwhile.")

    def say(line: str) -> None:
        err.print(line, highlight=False)

    require("bench", "weightwatcher")
    from threadpoolctl import threadpool_limits  # weightwatcher brings it

    with threadpool_limits(1):  # NumPy and SciPy have threads of their own
        rows = compare_with_weightwatcher(layers=layers, rounds=rounds, say=say)
        rows += list(analyze_large(say)) if large else []
    show_table(spectra_table(rows), title="Tail fits of all layers, CPU seconds on one thread")
    save_json(json_file, command_line(), {"seed": 0, "rows": [row.to_dict() for row in rows]})
