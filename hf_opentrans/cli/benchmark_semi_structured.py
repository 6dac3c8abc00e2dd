"""The command `benchmark semi-structured`: what 2:4 sparsity does to quality."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hf_opentrans._fingerprints import model_fingerprint
from hf_opentrans.benchmark_rows import fingerprint
from hf_opentrans.benchmark_semi_structured import (
    SemiStructuredFile,
    SparsityStudy,
    run_semi_structured,
    semi_structured_notes,
    semi_structured_table,
)
from hf_opentrans.cli._common import command_line, guarded, out, say, show_table, shows_progress, usage
from hf_opentrans.cli.benchmark import benchmark_app
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.loading import load_dense_clip
from hf_opentrans.pruning.calibration import list_images
from hf_opentrans.pruning.semi_structured import SemiStructuredConfig


@benchmark_app.command("semi-structured")
@guarded
def benchmark_semi_structured(
    models: Annotated[list[str], typer.Option(help="CLIPs, dense or pruned; all are compared with the first.")],
    images: Annotated[Path, typer.Option(help="Folder of unlabelled images (searched recursively).")],
    segmentation: Annotated[Path, typer.Option(help="Folder with images/, masks/ and classes.json that is scored.")],
    split: Annotated[str | None, typer.Option(help="Of the folder; default: the only one.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N scored images.")] = None,
    num_images: Annotated[int, typer.Option(help="Unlabelled images to draw at random.")] = 256,
    resolution: Annotated[int | None, typer.Option(help="Side of their square crops; default: image_size.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw and of the random control.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every figure here after every row; go on from it.")
    ] = None,
) -> None:
    """Measure models before and after 2:4 sparsity, ours and two controls: cosines and mIoU, no speed."""
    options = {"num_images": num_images, "resolution": resolution, "seed": seed}
    with usage():
        SemiStructuredConfig(**options)
    listed, folder = list_images(images), SegmentationFolder(segmentation, split)
    files = {"images": fingerprint(images), "segmentation": fingerprint(segmentation)}
    settings = {**options, "images": str(images), "segmentation": str(segmentation), "split": split, "limit": limit}
    settings |= {"files": files, "models": {name: model_fingerprint(load_dense_clip(name)[0]) for name in models}}
    with usage():
        results = SemiStructuredFile(json_file, settings, command_line())
    study = SparsityStudy(listed, folder, limit, options)
    run_semi_structured(models, study, results, say=say, progress=shows_progress())
    show_table(semi_structured_table(results.rows), title="2:4 sparsity of the vision tower")
    for note in semi_structured_notes(results.rows):
        out.print(escape(note), soft_wrap=True, highlight=False)
