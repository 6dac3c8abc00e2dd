"""The command `benchmark transfer`: one subnetwork in every framework."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from hf_opentrans._optional import require
from hf_opentrans.benchmark_rows import fingerprint
from hf_opentrans.benchmark_transfer_tables import COST, QUALITY, claim_table, transfer_notes, transfer_table
from hf_opentrans.cli._common import command_line, guarded, out, say, show_table, usage
from hf_opentrans.cli.benchmark import benchmark_app
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.loading import load_dense_clip
from hf_opentrans.pruning.calibration import list_images

MODE_HELP = "How CLIP's last block is read: vanilla, maskclip, sclip, clearclip, naclip; default: the model's own."


@benchmark_app.command("transfer")
@guarded
def benchmark_transfer(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a CLIP with both towers, or 'clip-scenes'.")],
    dataset: Annotated[Path, typer.Option(help="Folder with images/, masks/ and classes.json.")],
    images: Annotated[Path, typer.Option(help="Folder of unlabelled images to prune with.")],
    split: Annotated[str, typer.Option(help="Split to train heads on.")] = "train",
    eval_split: Annotated[str, typer.Option(help="Split to score on.")] = "val",
    frameworks: Annotated[list[str] | None, typer.Option(help="Default: all of them.")] = None,
    seen: Annotated[float, typer.Option(help="Share of the classes that the heads are trained with.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Optimiser steps of a run.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Crops per step.")] = 8,
    resolution: Annotated[int | None, typer.Option(help="Side of the crops; default: image_size.")] = None,
    num_images: Annotated[int, typer.Option(help="Most images that pruning calibrates on.")] = 256,
    mode: Annotated[str | None, typer.Option(help=MODE_HELP)] = None,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted up from the first.")] = 3,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Whether to take times at the end.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every figure here after every run; go on from it.")
    ] = None,
) -> None:
    """Prune towers by several methods, put each into every framework, train the same heads, and compare."""
    require("train", "accelerate")
    from hf_opentrans.benchmark_layer_selection import Study
    from hf_opentrans.benchmark_transfer import STUDIED, TransferFile, TransferStudy, plan_transfer, run_transfer
    from hf_opentrans.training.finetune import FinetuneConfig

    options: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "resolution": resolution, "mode": mode}
    with usage():
        runs = plan_transfer(list(dict.fromkeys(frameworks or STUDIED)), range(seed, seed + seeds))
        config = FinetuneConfig(**options, decoder_channels=64, save_every=steps + 1)
        train, evaluate = SegmentationFolder(dataset, split), SegmentationFolder(dataset, eval_split)
        loaded, processor = load_dense_clip(model)
        study = TransferStudy(Study(loaded, processor, train, evaluate, config, seen), list_images(images), num_images)
        settings = {"model": model, "dataset": str(dataset), "split": split, "eval_split": eval_split, "seen": seen}
        settings |= options | {"side": study.study.side, "classes": len(train.class_names), "num_images": num_images}
        settings |= {"files": {"dataset": fingerprint(dataset), "images": fingerprint(images)}}
        results = TransferFile(json_file, settings, command_line())
    run_transfer(study, runs, results, say=say, timed=timed)
    title = f"{Path(model).name} on {dataset.name}"
    for columns, part in ((QUALITY, "what it can do"), (COST, "what it costs")):
        show_table(transfer_table(results.rows, results.timings, columns), title=f"{title}: {part}")
    show_table(claim_table(results.rows), title=f"{title}: claims, paired over the seeds")
    for note in transfer_notes(results.rows, results.settings):
        out.print(escape(note), soft_wrap=True, highlight=False)
