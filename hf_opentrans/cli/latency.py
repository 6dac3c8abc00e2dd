"""The command `latency-table`: measure what every width costs on this machine, for pruning by latency."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm.auto import tqdm

from hf_opentrans.cli._common import app, command_line, guarded, out, save_json, show_table, shows_progress
from hf_opentrans.loading import load_clip
from hf_opentrans.pruning.latency import LatencyGrid, LatencyTable, measure_latency_table
from hf_opentrans.pruning.latency_timing import vision_of


@app.command("latency-table")
@guarded
def latency_table(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a CLIP model, or 'clip-scenes' (shipped).")],
    output: Annotated[Path, typer.Option(help="File for the table; an older one is replaced.")] = Path(
        "latency-table.json"
    ),
    resolution: Annotated[int | None, typer.Option(min=1, help="Side in pixels; default: image_size.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per pass.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: all.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every figure to this file.")] = None,
) -> None:
    """Time the sublayers of a vision tower at many widths. Nothing else should run meanwhile."""
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_clip(model)
    points = len(LatencyGrid.of(vision_of(loaded.model).config).points)
    out.print(
        f"Timing about {points} widths, each {rounds} times, on {torch.get_num_threads()} threads. "
        "Nothing else should run meanwhile."
    )
    with tqdm(desc="Timing", unit="run", disable=not shows_progress(), leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        table = measure_latency_table(
            loaded.model, resolution=resolution, batch_size=batch, rounds=rounds, on_point=show
        )
    table.save(output)
    title = f"{model}: milliseconds of one sublayer, {table.resolution} px, batch {batch}"
    show_table(_cells(table), title=title)
    out.print(
        f"Dense tower {table.dense_ms:.3f} ms, without its layers {table.fixed_ms:.3f} ms. Sublayers alone were "
        f"scaled by {table.scale:.3f} to add up to it (near 1 on an idle machine). Saved to {output}."
    )
    save_json(json_file, command_line(), {"model": model, "seed": None, "table": table.to_dict()})


def _cells(table: LatencyTable) -> tuple[list[str], list[list[str]]]:
    """Return MLP widths, heads of full width, and equal widths inside all heads, each with its time."""
    grid = table.grid
    heads, qk, v = grid.heads[-1], grid.qk_head_dims[-1], grid.v_head_dims[-1]
    groups = {
        "mlp, neurons": [(n, table.mlp(n)) for n in grid.neurons],
        f"attention, heads of width {qk}": [(h, table.attention(h, qk, v)) for h in grid.heads],
        f"attention, width of {heads} heads": [(d, table.attention(heads, d, d)) for d in grid.qk_head_dims],
        f"attention, width of queries and keys only, {heads} heads": [
            (d, table.attention(heads, d, v)) for d in grid.qk_head_dims
        ],
    }
    cells = [[name, str(width), f"{ms:.3f}"] for name, rows in groups.items() for width, ms in rows]
    return ["sublayer", "width", "ms"], cells
