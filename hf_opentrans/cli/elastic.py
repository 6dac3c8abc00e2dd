"""The commands `prune-elastic` and `autotune`: several budgets in one checkpoint, and the right one for a device."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hf_opentrans._distributed import is_main_process, start_processes
from hf_opentrans._files import check_output_folder
from hf_opentrans.cli._common import app, command_line, guarded, out, save_json, show_table, shows_progress, usage
from hf_opentrans.cli.commands import JsonFile, Model, Seed, Structures, TableFile
from hf_opentrans.deploy.autotune import ORDER, TunedSettings, autotune, load_elastic
from hf_opentrans.loading import load_clip
from hf_opentrans.pruning.calibration import list_images
from hf_opentrans.pruning.elastic import BUDGETS, check_shares, prune_elastic
from hf_opentrans.pruning.elastic_report import ELASTIC_REPORT_FILE, ElasticReport
from hf_opentrans.pruning.latency import LatencyTable
from hf_opentrans.pruning.plan import UNITS, PruningConfig

_DEFAULT = [",".join(f"{budget:g}" for budget in BUDGETS)]


@app.command("prune-elastic")
@guarded
def prune_elastically(
    model: Model,
    images: Annotated[str, typer.Option(help="Folder of unlabelled images (searched recursively).")],
    output: Annotated[Path, typer.Option(help="Folder for the model of all budgets.")],
    budgets: Annotated[list[str], typer.Option(help="Shares to keep, such as 0.8,0.6,0.4.")] = _DEFAULT,
    unit: Annotated[str, typer.Option(help=f"{' | '.join(UNITS)}: what --budgets count.")] = "macs",
    resolution: Annotated[int | None, typer.Option(help="Side of the square crops; default: image_size.")] = None,
    structures: Structures = "mlp,heads,ranks",
    latency_table: TableFile = None,
    num_images: Annotated[int, typer.Option(help="Images to draw at random; all where there are fewer.")] = 1024,
    held_out: Annotated[str | None, typer.Option(help="Folder of images for fidelity; default: a tenth.")] = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Prune a CLIP vision tower to several nested budgets in one checkpoint, from unlabelled images."""
    with usage():
        config = PruningConfig(
            unit=unit,
            resolution=resolution,
            structures=tuple(kind.strip() for kind in structures.split(",")),
            num_images=num_images,
            seed=seed,
        )
        shares = check_shares(_numbers("--budgets", budgets), config)
    table = LatencyTable.load(latency_table) if latency_table is not None else None
    start_processes()
    check_output_folder(output, marker=ELASTIC_REPORT_FILE)
    loaded = load_clip(model)
    options = {"image_processor": loaded.image_processor, "latency_table": table, "progress": shows_progress()}
    unseen = None if held_out is None else list_images(held_out)
    result = prune_elastic(loaded.model, images, shares, config, held_out_images=unseen, **options)
    result.save_pretrained(output, loaded.processor, disk_dtype=loaded.disk_dtype)
    if is_main_process():
        report = result.report.in_precision(loaded.disk_dtype)
        show_table(_budget_table(report), title=f"{model} in {len(shares)} budgets")
        out.print(
            f"One file for all: {report.size_ratio:.2f} times the largest tower. Saved to {escape(str(output))}.",
            soft_wrap=True,
            highlight=False,
        )
        save_json(json_file, command_line(), {"model": model, "seed": seed, "report": report.to_dict()})


@app.command("autotune")
@guarded
def tune(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model that `prune-elastic` wrote.")],
    max_latency_ms: Annotated[float, typer.Option(help="Most milliseconds that one image may take.")],
    images: Annotated[
        str | None, typer.Option(help="Folder of images whose shapes are timed; default: a square.")
    ] = None,
    resolutions: Annotated[list[str] | None, typer.Option(help="Short sides in pixels, such as 224,336.")] = None,
    inference: Annotated[str, typer.Option(help="Of whole,slide: what may be chosen.")] = "whole,slide",
    order: Annotated[str, typer.Option(help="What is compared first, second and third.")] = ",".join(ORDER),
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of timing.")] = 5,
    device: Annotated[str | None, typer.Option(help="Where to measure, such as cpu or cuda.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Time an elastic segmenter on this device, and choose budget, resolution and whole or slide."""
    with usage():
        sides = None if resolutions is None else [int(side) for side in _numbers("--resolutions", resolutions)]
    loaded, processor = load_elastic(model)
    settings = autotune(
        loaded,
        processor,
        None if images is None else list_images(images),
        max_latency_ms=max_latency_ms,
        resolutions=sides,
        inferences=[name.strip() for name in inference.split(",")],
        order=[name.strip() for name in order.split(",")],
        repeats=repeats,
        device=device,
    )
    show_table(_candidate_table(settings), title=f"{model} on {settings.device['accelerator'] or 'this processor'}")
    out.print(
        f"Within {max_latency_ms:g} ms: budget {settings.budget:g} at {settings.resolution} pixels, "
        f"{settings.inference} ({settings.milliseconds:.1f} ms).",
        soft_wrap=True,
        highlight=False,
    )
    save_json(json_file, command_line(), {"model": model, "seed": None, "settings": settings.to_dict()})


def _numbers(option: str, texts: list[str]) -> list[float]:
    """Read "0.8,0.6" or several such texts."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    try:
        return [float(part) for part in parts]
    except ValueError as error:
        raise ValueError(
            f"{option} is {','.join(texts)!r}. It must be numbers with commas between them. Correct it."
        ) from error


def _budget_table(report: ElasticReport) -> tuple[list[str], list[list[str]]]:
    header = ["budget", "MACs", "parameters", "cosine of class", "of patches", "alone", "adds"]
    cells = [
        [
            f"{entry.budget:g}",
            f"{entry.macs / report.dense_macs:.3f}",
            f"{entry.params / report.dense_params:.3f}",
            f"{entry.cosine_class:.4f}",
            f"{entry.cosine_patches:.4f}",
            f"{entry.bytes_alone / 1e6:,.2f} MB",
            f"{entry.bytes_added / 1e6:,.2f} MB",
        ]
        for entry in report.budgets
    ]
    return header, cells


def _candidate_table(settings: TunedSettings) -> tuple[list[str], list[list[str]]]:
    header = ["budget", "pixels", "inference", "fidelity", "median ms", "runs", "fits"]
    cells = [
        [
            f"{entry.budget:g}",
            str(entry.resolution),
            entry.inference,
            "-" if entry.fidelity is None else f"{entry.fidelity:.4f}",
            f"{entry.milliseconds:.1f}",
            str(entry.runs),
            "yes" if entry.fits else "no",
        ]
        for entry in settings.candidates
    ]
    return header, cells
