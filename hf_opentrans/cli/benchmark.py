"""The commands `benchmark pruning` and `benchmark latency`."""

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from hf_opentrans.benchmark_tables import fill_tables, latency_table, method_table
from hf_opentrans.benchmarks import (
    BenchmarkData,
    MethodRow,
    compare_methods,
    paired_latency,
    synthetic_towers,
)
from hf_opentrans.cli._common import app, command_line, err, guarded, out, save_json, show_table, shows_progress, usage
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.evaluation import folder_samples
from hf_opentrans.loading import load_clip, load_segmenter
from hf_opentrans.pruning.calibration import list_images
from hf_opentrans.pruning.plan import METHODS, PruningConfig
from hf_opentrans.pruning.tower import Tower

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
    methods: Annotated[list[str], typer.Option(help=f"Of {', '.join(METHODS)}.")] = list(METHODS),  # noqa: B006
    num_images: Annotated[int, typer.Option(help="Calibration images.")] = 256,
    resolution: Annotated[int | None, typer.Option(help="Side of square crops; default: image_size.")] = None,
    segmentation_resolution: Annotated[int | None, typer.Option(help="Short side for segmentation.")] = None,
    mode: Annotated[str | None, typer.Option(help="Segmentation mode; default: the model's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every figure to this file.")] = None,
) -> None:
    """Prune by several methods on the same images and measure all of them on the same data."""
    with usage():
        configs = [
            PruningConfig(keep=k, method=m, num_images=num_images, resolution=resolution, seed=seed)
            for k in keep
            for m in methods
        ]
    data = BenchmarkData(
        calibration=images,
        fidelity_images=list_images(fidelity_images) if fidelity_images else (),
        resolution=resolution,
        segmentation_options={"mode": mode, "resolution": segmentation_resolution},
        **_segmentation(segmentation, split),
        **_classification(classification),
    )
    dense, processor = load_segmenter(model)
    start = time.perf_counter()

    def note(row: MethodRow) -> None:
        err.print(f"{time.perf_counter() - start:6.1f} s  {row.method} {row.keep:g} done")

    compared = compare_methods(dense, processor, data, configs, on_row=note, progress=shows_progress())
    rows = [c.row for c in compared]
    show_table(method_table(rows), title=f"{model}, {num_images} calibration images, seed {seed}")
    values = {"model": model, "seed": seed, "num_images": num_images, "resolution": resolution, "mode": mode}
    save_json(json_file, command_line(), {**values, "rows": [row.to_dict() for row in rows]})


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


@benchmark_app.command("latency")
@guarded
def benchmark_latency(
    models: Annotated[
        list[str] | None,
        typer.Option(help="Models, the reference first; default: a random ViT-B/16 tower, dense and sliced."),
    ] = None,
    keep: Annotated[list[float], typer.Option(help="Share of the MACs of the sliced default tower.")] = [0.65],  # noqa: B006
    batch: Annotated[list[int], typer.Option(min=1, help="Batch sizes.")] = [1, 8],  # noqa: B006
    resolution: Annotated[int | None, typer.Option(min=16, help="Side in pixels; default: image_size.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Counted rounds.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: all.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every figure to this file.")] = None,
) -> None:
    """Time vision towers in paired, interleaved runs. Nothing else should run meanwhile."""
    if threads is not None:
        torch.set_num_threads(threads)
    towers: dict[str, Any] = {}
    if models:
        towers = {name: Tower.of(load_clip(name).model).vision for name in models}
    else:
        for value in keep:
            with usage():
                PruningConfig(keep=value)
            towers |= synthetic_towers(value, resolution=resolution or 224)
    rows = [r for size in batch for r in paired_latency(towers, batch_size=size, resolution=resolution, rounds=rounds)]
    show_table(latency_table(rows), title="Vision tower, paired interleaved runs")
    save_json(json_file, command_line(), {"seed": 0, "rows": [row.to_dict() for row in rows]})


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
