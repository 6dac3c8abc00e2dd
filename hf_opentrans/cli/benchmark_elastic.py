"""The command `benchmark elastic`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from hf_opentrans.benchmark_elastic import BUDGETS, ElasticFile, run_elastic, split_images
from hf_opentrans.benchmark_elastic_tables import (
    elastic_notes,
    elastic_table,
    method_rows,
    timing_note,
    timing_table,
)
from hf_opentrans.benchmark_plots import draw_pruning
from hf_opentrans.benchmark_rows import fingerprint
from hf_opentrans.benchmarks import BenchmarkData
from hf_opentrans.cli._common import command_line, err, guarded, out, show_table, shows_progress, usage
from hf_opentrans.cli.benchmark import benchmark_app
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.evaluation import folder_samples
from hf_opentrans.loading import load_dense_clip
from hf_opentrans.pruning.elastic import check_shares
from hf_opentrans.pruning.plan import PruningConfig


@benchmark_app.command("elastic")
@guarded
def benchmark_elastic(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a CLIP model with both towers.")],
    images: Annotated[Path, typer.Option(help="Unlabelled images to prune with.")],
    fidelity_images: Annotated[
        Path | None, typer.Option(help="Other images, for the cosines; default: every tenth of --images.")
    ] = None,
    segmentation: Annotated[Path | None, typer.Option(help="Folder with images/, masks/, classes.json.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of --segmentation.")] = None,
    budgets: Annotated[list[float], typer.Option(help="Shares to keep.")] = list(BUDGETS),  # noqa: B006 (read only)
    num_images: Annotated[int, typer.Option(help="Calibration images.")] = 256,
    resolution: Annotated[int | None, typer.Option(help="Side of square crops; default: image_size.")] = None,
    segmentation_resolution: Annotated[int | None, typer.Option(help="Short side for segmentation.")] = None,
    mode: Annotated[str | None, typer.Option(help="Segmentation mode; default: the model's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    timing: Annotated[bool, typer.Option(help="Time loading, switching and passes at the end.")] = True,
    retime: Annotated[bool, typer.Option(help="Measure the times in the --json file again.")] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write every figure here after every row, and a picture beside it; go on from it."
        ),
    ] = None,
) -> None:
    """Compare one checkpoint of several budgets with one model per budget: fidelity, bytes, loading and switching."""
    calibration, unseen = split_images(images, fidelity_images)
    paths = {"model": Path(model), "images": images, "fidelity_images": fidelity_images, "segmentation": segmentation}
    settings: dict[str, Any] = {name: None if path is None else str(path) for name, path in paths.items()}
    used = min(num_images, len(calibration))
    settings |= {"split": split, "num_images": used, "resolution": resolution, "mode": mode, "seed": seed}
    settings |= {"segmentation_resolution": segmentation_resolution}
    with usage():
        config = PruningConfig(num_images=num_images, resolution=resolution, seed=seed)
        settings["budgets"] = check_shares(budgets, config)
        settings["files"] = {name: fingerprint(path) for name, path in paths.items() if path and path.exists()}
        results = ElasticFile(json_file, settings, command_line())
        if retime and not timing:
            raise ValueError("--retime and --no-timing are given. One asks for times, the other for none. Keep one.")
    if retime:
        results.timings = []
    samples: dict[str, Any] = {}
    if segmentation is not None:
        folder = SegmentationFolder(segmentation, split)
        samples = {"segmentation": list(folder_samples(folder)), "segmentation_names": folder.class_names}
    data = BenchmarkData(
        calibration=calibration,
        fidelity_images=unseen,
        resolution=resolution,
        segmentation_options={"mode": mode, "resolution": segmentation_resolution},
        **samples,
    )

    def say(line: str) -> None:
        err.print(escape(line), soft_wrap=True, highlight=False)

    options = {"timing": timing, "say": say, "progress": shows_progress()}
    run_elastic(lambda: load_dense_clip(model), data, settings["budgets"], config, results, **options)
    _show(results, json_file, f"{Path(model).name}, {used} calibration images")


def _show(results: ElasticFile, json_file: Path | None, subject: str) -> None:
    """Print the tables, and draw the picture where there is a file to put it beside."""
    _show_in_two(elastic_table(results.rows), "alone", subject, "Bytes of the tower")
    notes = elastic_notes(results.rows, results.files, results.settings)
    if results.timings:
        titles = "Loading and switching", "One image through the tower"
        _show_in_two(timing_table(results.timings), "pass, elastic", *titles)
        notes.append(timing_note(results.timings))
    for note in notes:
        out.print(escape(note), soft_wrap=True, highlight=False)
    if json_file is None or results.is_device:
        return
    picture = json_file.with_suffix(".png" if json_file.suffix != ".png" else ".png.png")
    try:
        if draw_pruning(method_rows(results.rows), picture, title=subject):
            out.print(f"Picture: {escape(str(picture))}", soft_wrap=True, highlight=False)
    except ImportError as error:
        err.print(f"[yellow]Warning:[/] No picture was drawn. {escape(str(error))}", soft_wrap=True)


def _show_in_two(table: tuple[list[str], list[list[str]]], column: str, *titles: str) -> None:
    """Print a table that is wider than a terminal in two, each with the first column; `column` begins the second."""
    header, cells = table
    at = header.index(column)
    show_table((header[:at], [line[:at] for line in cells]), title=titles[0])
    show_table(([header[0], *header[at:]], [[line[0], *line[at:]] for line in cells]), title=titles[1])
