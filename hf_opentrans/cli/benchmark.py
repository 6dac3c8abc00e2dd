"""The commands `benchmark pruning`, `benchmark scale` and `benchmark tables`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape

from hf_opentrans.benchmark_plots import draw_pruning
from hf_opentrans.benchmark_pruning import (
    PruningRun,
    ResultFile,
    plan_ablation,
    plan_methods,
    run_benchmark,
)
from hf_opentrans.benchmark_rows import fingerprint
from hf_opentrans.benchmark_scale import SCALE_RUNS, SIZES, ScaleFile, parse_run, run_scale, scale_table
from hf_opentrans.benchmark_tables import COST, QUALITY, fill_tables, method_notes, method_table
from hf_opentrans.benchmarks import BenchmarkData
from hf_opentrans.cli._common import app, command_line, err, guarded, out, say, show_table, shows_progress, usage
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.evaluation import folder_samples
from hf_opentrans.loading import load_dense_clip
from hf_opentrans.pruning.calibration import list_images
from hf_opentrans.pruning.plan import METHODS, PruningConfig

benchmark_app = typer.Typer(help="Comparisons in one harness.", no_args_is_help=True)
app.add_typer(benchmark_app, name="benchmark")


@benchmark_app.command("pruning")
@guarded
def benchmark_pruning(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a CLIP model with both towers.")],
    images: Annotated[Path, typer.Option(help="Unlabelled images to prune with.")],
    fidelity_images: Annotated[
        Path | None, typer.Option(help="Other images, for the cosine to the dense model.")
    ] = None,
    segmentation: Annotated[Path | None, typer.Option(help="Folder with images/, masks/, classes.json.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of --segmentation.")] = None,
    classification: Annotated[
        Path | None, typer.Option(help="A folder per class, or .npz with images, labels, class_names.")
    ] = None,
    keep: Annotated[list[float], typer.Option(help="Budgets.")] = [0.6],  # noqa: B006 (read only)
    methods: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(METHODS)}; default: all of them.")] = None,
    ablation: Annotated[bool, typer.Option(help="Take ours apart instead: one row per component.")] = False,
    num_images: Annotated[int, typer.Option(help="Calibration images.")] = 256,
    resolution: Annotated[int | None, typer.Option(help="Side of square crops; default: image_size.")] = None,
    segmentation_resolution: Annotated[int | None, typer.Option(help="Short side for segmentation.")] = None,
    mode: Annotated[str | None, typer.Option(help="Segmentation mode; default: the model's own.")] = None,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted up from the first.")] = 1,
    retime: Annotated[bool, typer.Option(help="Measure the latencies in the --json file again.")] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write every figure here after every run, and a picture beside it; go on from it."
        ),
    ] = None,
) -> None:
    """Prune by several methods on the same images and measure all of them on the same data."""
    options = {"num_images": num_images, "resolution": resolution}
    settings = {"model": model, "images": str(images), **options, "mode": mode, "split": split}
    settings |= {"fidelity_images": _named(fidelity_images), "segmentation": _named(segmentation)}
    settings |= {"segmentation_resolution": segmentation_resolution, "classification": _named(classification)}
    paths = {"model": Path(model), "images": images, "fidelity_images": fidelity_images}
    paths |= {"segmentation": segmentation, "classification": classification}
    with usage():
        runs = _plan(methods, ablation, keep, range(seed, seed + seeds), options)
        settings["files"] = {name: fingerprint(path) for name, path in paths.items() if path and path.exists()}
        results = ResultFile(json_file, settings, command_line())
        if retime:
            results.forget_times()
    data = BenchmarkData(
        calibration=list_images(images),  # once, and before anything takes time
        fidelity_images=list_images(fidelity_images) if fidelity_images else (),
        resolution=resolution,
        segmentation_options={"mode": mode, "resolution": segmentation_resolution},
        **_segmentation(segmentation, split),
        **_classification(classification),
    )
    run_benchmark(lambda: load_dense_clip(model), data, runs, results, say=say, progress=shows_progress())
    _show(results, json_file, f"{Path(model).name}, {min(num_images, len(data.calibration))} calibration images")


def _plan(
    methods: list[str] | None, ablation: bool, keeps: list[float], seeds: Sequence[int], options: dict[str, Any]
) -> list[PruningRun]:
    """List the runs.

    Raises:
        ValueError: If an option is out of range, or methods are chosen for an ablation.
    """
    if not ablation:
        return plan_methods(methods or METHODS, keeps, seeds, **options)
    if methods:
        raise ValueError(
            f"--methods is {' '.join(methods)} and --ablation is given too. The ablation compares variants of obs "
            "alone. Leave one of them out."
        )
    return plan_ablation(keeps, seeds, **options)


def _named(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _show(results: ResultFile, json_file: Path | None, subject: str) -> None:
    """Print the tables, and draw the picture where there is a file to put it beside."""
    for columns, title in ((QUALITY, "what it does"), (COST, "what it costs")):
        show_table(method_table(results.rows, columns), title=f"{subject}: {title}")
    for note in method_notes(results.rows, [asdict(run) for run in results.skipped]):
        out.print(escape(note), soft_wrap=True, highlight=False)
    if json_file is None or results.is_device:
        return
    picture = json_file.with_suffix(".png" if json_file.suffix != ".png" else ".png.png")
    try:
        if draw_pruning(results.rows, picture, title=subject):
            out.print(f"Picture: {escape(str(picture))}", soft_wrap=True, highlight=False)
    except ImportError as error:
        err.print(f"[yellow]Warning:[/] No picture was drawn. {escape(str(error))}", soft_wrap=True)


def _segmentation(path: Path | None, split: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    folder = SegmentationFolder(path, split)
    return {"segmentation": list(folder_samples(folder)), "segmentation_names": folder.class_names}


def _classification(path: Path | None) -> dict[str, Any]:
    """Read images with one class each from a folder per class, or from an .npz file."""
    if path is None:
        return {}
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            images, labels = list(arrays["images"]), arrays["labels"].tolist()
            names = [str(name) for name in arrays["class_names"]]
    else:
        names = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
        found = [(image, index) for index, name in enumerate(names) for image in list_images(path / name)]
        images, labels = [image for image, _ in found], [index for _, index in found]
    names = [name.replace("_", " ") for name in names]
    return {"classification": images, "classification_targets": labels, "classification_names": names}


@benchmark_app.command("scale")
@guarded
def benchmark_scale(
    runs: Annotated[
        list[str] | None,
        typer.Option(help=f"MODEL:IMAGES, with a model of {', '.join(SIZES)}; default: {' '.join(SCALE_RUNS)}."),
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of the MACs to keep.")] = 0.6,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every figure here after every run; go on from it.")
    ] = None,
) -> None:
    """Measure what pruning takes on towers of real size, with random weights and images: time and memory."""
    with usage():
        PruningConfig(keep=keep)
        parsed = [parse_run(run) for run in runs or SCALE_RUNS]
        results = ScaleFile(json_file, {"keep": keep}, command_line())
    run_scale(parsed, keep, results, say=say, progress=shows_progress())
    show_table(scale_table(results.rows), title="One-shot pruning, obs, all structures")


@benchmark_app.command("tables")
@guarded
def benchmark_tables(
    files: Annotated[list[Path], typer.Argument(help="Markdown files with marked blocks.")],
    results: Annotated[Path, typer.Option(help="Folder of the JSON files.")] = Path("model_cards/results"),
) -> None:
    """Generate the tables in Markdown files from published results."""
    for path in files:
        text = path.read_text(encoding="utf-8")
        filled = fill_tables(text, results)
        path.write_text(filled, encoding="utf-8")
        out.print(f"{path}: {'unchanged' if filled == text else 'updated'}")
