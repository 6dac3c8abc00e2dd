"""The command `benchmark metric`."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from hf_opentrans import benchmark_metric as metric
from hf_opentrans._optional import require
from hf_opentrans.cli._common import command_line, err, guarded, out, show_table, usage
from hf_opentrans.cli.benchmark import benchmark_app


@benchmark_app.command("metric")
@guarded
def benchmark_metric(
    images: Annotated[int, typer.Option(min=1, help="Pairs of maps.")] = 24,
    classes: Annotated[int, typer.Option(min=1, max=metric.IGNORED, help="Classes.")] = 150,
    side: Annotated[int, typer.Option(min=8, help="Side of the maps in pixels.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds.")] = 7,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every figure here after every row; go on from it.")
    ] = None,
) -> None:
    """Time mean IoU against the histograms of evaluate and against its whole path, on one thread."""
    torch.set_num_threads(1)
    require("train", "datasets")
    settings = {"images": images, "classes": classes, "side": side, "rounds": rounds}
    settings |= {"stored by": metric.storing_library()}
    with usage():
        results = metric.MetricFile(json_file, settings, command_line())

    def say(line: str) -> None:
        err.print(escape(line), soft_wrap=True, highlight=False)

    metric.run_metric(results, rounds=rounds, side=side, say=say)
    show_table(metric.metric_table(results.rows), title="Mean IoU, paired interleaved runs on one thread")
    for note in metric.metric_notes(results.rows, settings):
        out.print(escape(note), soft_wrap=True, highlight=False)
