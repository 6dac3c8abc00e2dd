"""The command `benchmark cuts`."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from hf_opentrans import benchmark_cuts as cuts
from hf_opentrans.cli._common import command_line, err, guarded, out, show_table, usage
from hf_opentrans.cli.benchmark import benchmark_app


@benchmark_app.command("cuts")
@guarded
def benchmark_cuts(
    repeats: Annotated[int, typer.Option(min=1, help="Counted rounds.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: all.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every figure here after every row; go on from it.")
    ] = None,
) -> None:
    """Time what is saved where nothing reads a part of a model; check that the output stays the same bit for bit."""
    if threads is not None:
        torch.set_num_threads(threads)
    with usage():
        results = cuts.CutFile(json_file, {"repeats": repeats}, command_line())

    def say(line: str) -> None:
        err.print(escape(line), soft_wrap=True, highlight=False)

    cuts.run_cuts(cuts.plan_cuts(cuts.REAL), repeats, results, say=say)
    show_table(cuts.cuts_table(results.rows), title="Exact savings, paired interleaved runs")
    for note in cuts.cuts_notes(results.rows):
        out.print(escape(note), soft_wrap=True, highlight=False)
