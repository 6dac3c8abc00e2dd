"""The command `sparsify`: 2:4 sparsity for GPUs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hf_opentrans._distributed import is_main_process, start_processes
from hf_opentrans._files import check_output_folder
from hf_opentrans.cli._common import app, command_line, guarded, out, save_json, show_table, shows_progress, usage
from hf_opentrans.cli.commands import JsonFile, Model, Seed
from hf_opentrans.loading import load_clip
from hf_opentrans.pruning.semi_structured import (
    SEMI_STRUCTURED_FILE,
    SPARSITY_METHODS,
    SPARSITY_STRUCTURES,
    SemiStructuredConfig,
    SemiStructuredReport,
    prune_semi_structured,
)

# What nobody should have to find out.
WHERE_IT_HELPS = (
    "The model has its old size and is no faster on a processor. GPUs of compute capability 8.0 or newer can skip the "
    "zeros in large products (hf_opentrans.deploy.semi_structured.to_semi_structured); reported for SAM ViT-H on an "
    "A100: 1.07x with all layers, 1.10x with --structures mlp. Not measured here."
)


@app.command("sparsify")
@guarded
def sparsify(
    model: Model,
    images: Annotated[str, typer.Option(help="Folder of unlabelled images (searched recursively).")],
    output: Annotated[Path, typer.Option(help="Folder for the model with zeros.")],
    method: Annotated[
        str, typer.Option(help=f"{' | '.join(SPARSITY_METHODS)}: obs compensates, the others are controls.")
    ] = "obs",
    structures: Annotated[
        list[str] | None, typer.Option(help=f"Whose layers, of {', '.join(SPARSITY_STRUCTURES)}; default: both.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the square crops; default: image_size.")] = None,
    num_images: Annotated[int, typer.Option(help="Images to draw at random; all where there are fewer.")] = 1024,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Set two of every four weights to zero for GPUs that skip them; a processor gains nothing."""
    named = [part.strip() for text in structures or SPARSITY_STRUCTURES for part in text.split(",")]
    with usage():
        config = SemiStructuredConfig(
            method=method, structures=tuple(named), num_images=num_images, resolution=resolution, seed=seed
        )
    start_processes()
    check_output_folder(output, marker=SEMI_STRUCTURED_FILE)
    loaded = load_clip(model)
    result = prune_semi_structured(
        loaded.model, images, config, image_processor=loaded.image_processor, progress=shows_progress()
    )
    result.save_pretrained(output, loaded.processor, disk_dtype=loaded.disk_dtype)
    if is_main_process():
        _show(model, result.report, output)
        save_json(json_file, command_line(), {"model": model, "seed": seed, "report": result.report.to_dict()})


def _show(model: str, report: SemiStructuredReport, output: Path) -> None:
    lost = [layer.lost for layer in report.layers if layer.lost is not None]
    cells = [
        ["linear layers that are 2:4", str(len(report.layers))],
        ["left as they were", str(len(report.skipped))],
        ["zeros in the linear layers", f"{report.zeros:.1%}"],
        ["mean share of a layer's variance that is lost", f"{sum(lost) / len(lost):.1%}" if lost else "-"],
        ["cosine of class tokens to before", f"{report.class_token_cosine:.4f}"],
        ["cosine of patch tokens to before", f"{report.patch_token_cosine:.4f}"],
    ]
    title = (
        f"{model}, {report.config['method']}; cosines on {report.unseen_images} images that were not used otherwise"
    )
    show_table((["vision tower", ""], cells), title=title)
    lines = [f"Left: {layer.name} ({layer.reason})." for layer in report.skipped]
    for line in [*lines, *report.notes, WHERE_IT_HELPS, f"Saved to {output}."]:
        out.print(escape(line), soft_wrap=True, highlight=False)
