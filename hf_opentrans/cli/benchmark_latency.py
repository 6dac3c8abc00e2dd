"""The command `benchmark latency`: vision towers in several runtimes and precisions."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import torch
import typer
from rich.markup import escape

from hf_opentrans._fingerprints import model_fingerprint
from hf_opentrans.benchmark_rows import fingerprint
from hf_opentrans.benchmark_runtime_plan import KINDS, RUNTIMES, RuntimeRow, plan_settings
from hf_opentrans.benchmark_runtime_quality import RuntimeScores
from hf_opentrans.benchmark_runtime_tables import QUALITY, SPEED, draw_runtimes, runtime_notes, runtime_table
from hf_opentrans.benchmark_runtimes import RuntimeFile, Towers, run_benchmark, runtime_versions
from hf_opentrans.benchmarks import synthetic_towers
from hf_opentrans.cli._common import command_line, err, guarded, out, say, show_table, usage
from hf_opentrans.cli.benchmark import benchmark_app
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.evaluation import center_crops
from hf_opentrans.loading import Loaded, load_clip
from hf_opentrans.pruning.calibration import list_images
from hf_opentrans.pruning.plan import PruningConfig
from hf_opentrans.pruning.tower import Tower


@benchmark_app.command("latency")
@guarded
def benchmark_latency(
    models: Annotated[
        list[str] | None,
        typer.Option(help="Models, the reference first; default: a random ViT-B/16 tower, dense and sliced."),
    ] = None,
    runtimes: Annotated[list[str], typer.Option(help=f"Of {', '.join(RUNTIMES)}.")] = ["eager"],  # noqa: B006 (read only)
    precision: Annotated[
        list[str], typer.Option(help=f"Of {', '.join(KINDS)}, or one kind alone, such as int8-static.")
    ] = ["fp32"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(min=1, help="Batch sizes.")] = [1, 8],  # noqa: B006
    resolution: Annotated[
        list[int] | None, typer.Option(min=16, help="Sides in pixels; default: the first model's image_size.")
    ] = None,
    keep: Annotated[list[float], typer.Option(help="Shares of the MACs of the sliced default towers.")] = [0.65],  # noqa: B006
    images: Annotated[
        Path | None, typer.Option(help="Images to compare outputs on and to calibrate int8-static; default: noise.")
    ] = None,
    segmentation: Annotated[
        Path | None, typer.Option(help="Folder with images/, masks/, classes.json: mIoU in every precision.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of --segmentation.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Images of --segmentation.")] = 100,
    rounds: Annotated[int, typer.Option(min=3, help="Counted rounds.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every runtime; default: all.")] = None,
    memory: Annotated[bool, typer.Option(help="Measure memory, in a process of its own for each.")] = True,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write every figure here, and a picture beside it; go on from it."),
    ] = None,
) -> None:
    """Time vision towers in paired, interleaved runs. Nothing else should run meanwhile."""
    threads = threads or torch.get_num_threads()
    with usage():
        for value in keep:
            PruningConfig(keep=value)
        plan_settings(runtimes, precision, batch, resolution or [16])  # before models are loaded
        _check_scores(segmentation, models, images, precision)
    files = None if images is None else list_images(images)
    data = None if segmentation is None else SegmentationFolder(segmentation, split)
    loaded = {name: load_clip(name) for name in models or ()}
    towers = {name: Tower.of(found.model).vision for name, found in loaded.items()} or _synthetic(keep, resolution)
    values: dict[str, Any] = {"keep": None if models else keep, "seed": 0, "rounds": rounds, "threads": threads}
    values["images"] = None if images is None else [str(images), fingerprint(images)]
    chosen = [] if split is None else [split]
    scored = [] if segmentation is None else [str(segmentation), fingerprint(segmentation), limit, *chosen]
    values["segmentation"] = scored or None
    values["models"] = {name: model_fingerprint(tower) for name, tower in towers.items()}
    values["runtime_versions"] = runtime_versions()
    with usage():
        sides: list[int] = resolution or [cast("int", next(iter(towers.values())).config.image_size)]
        settings, not_run = plan_settings(runtimes, precision, batch, sides)
        results = RuntimeFile(json_file, values, command_line())
    results.not_run = not_run
    scores = None if data is None else RuntimeScores(data, limit, files or ())
    with TemporaryDirectory() as folder:
        crops = _images(files, next(iter(loaded.values()), None))
        measured = Towers(towers, Path(folder), crops, bool(loaded), scores)
        run_benchmark(measured, settings, results, rounds=rounds, threads=threads, say=say, memory=memory)
    _show(results, json_file)


def _check_scores(
    segmentation: Path | None, models: list[str] | None, images: Path | None, precision: list[str]
) -> None:
    if segmentation is None:
        return
    if not models:
        raise ValueError("--segmentation is given without --models. Random towers segment nothing. Give models.")
    if images is None and {"int8", "int8-static"} & set(precision):
        raise ValueError(
            "--segmentation and --precision int8 are given without --images. int8-static measures ranges on other "
            "images than those that are scored. Give a folder of unlabelled images."
        )


def _synthetic(keep: list[float], resolution: list[int] | None) -> dict[str, Any]:
    towers: dict[str, Any] = {}
    for value in keep:
        towers |= synthetic_towers(value, resolution=(resolution or [224])[0])
    return towers


def _images(files: list[Any] | None, loaded: Loaded | None) -> Any:
    """Return a function from side and number to pixel values."""

    def crops(side: int, count: int) -> torch.Tensor:
        if files is None or loaded is None:
            return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
        return center_crops(files[:count], loaded.image_processor, side)

    return crops


def _show(results: RuntimeFile, json_file: Path | None) -> None:
    rows: list[RuntimeRow] = results.rows
    show_table(runtime_table(rows, SPEED), title="Vision tower, paired interleaved runs")
    show_table(runtime_table(rows, QUALITY), title="What it takes, and what it keeps")
    values = {"settings": results.settings, **results.more()}
    for note in runtime_notes(rows, values):
        out.print(escape(note), soft_wrap=True, highlight=False)
    results.save(at_end=True)
    if json_file is None or results.is_device:
        return
    picture = json_file.with_suffix(".png")
    try:
        draw_runtimes(rows, picture, title="How many times as fast, in every runtime and precision")
    except ImportError as error:
        err.print(f"[yellow]Warning:[/] No picture was drawn. {escape(str(error))}", soft_wrap=True)
    else:
        out.print(f"Picture: {escape(str(picture))}", soft_wrap=True, highlight=False)
