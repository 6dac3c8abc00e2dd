"""The commands `finetune`, `distill`, `benchmark layer-selection` and `benchmark recovery`: training."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from hf_opentrans._distributed import is_main_process, start_processes
from hf_opentrans._files import check_output_folder
from hf_opentrans._optional import require
from hf_opentrans.benchmark_plots import draw_selection
from hf_opentrans.benchmark_recovery_tables import recovery_notes, recovery_table
from hf_opentrans.benchmark_rows import fingerprint
from hf_opentrans.benchmark_selection_tables import COST, QUALITY, selection_notes, selection_table
from hf_opentrans.cli._common import app, command_line, err, guarded, out, save_json, show_table, shows_progress, usage
from hf_opentrans.cli.benchmark import benchmark_app
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.loading import load_clip, load_segmenter
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPModel
from hf_opentrans.pruning.calibration import list_images
from hf_opentrans.pruning.plan import PruningConfig
from hf_opentrans.pruning.report import PruningReport

# Not imported at the top: training needs an extra, and transformers' Trainer takes seconds.
_REPORT = "training_report.json"
MODE_HELP = "How CLIP's last block is read: vanilla, maskclip, sclip, clearclip, naclip; default: the model's own."


@app.command()
@guarded
def finetune(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a CLIP with both towers, or 'clip-scenes'.")],
    dataset: Annotated[Path, typer.Option(help="Folder with images/, masks/ and classes.json.")],
    output: Annotated[Path, typer.Option(help="Folder for the trained model.")],
    framework: Annotated[str | None, typer.Option(help="deeplabv3plus | catseg | fcclip | gkc.")] = None,
    select: Annotated[str | None, typer.Option(help="Rule for the tower's layers, full | head | own | lora.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the layers that train.")] = None,
    granularity: Annotated[str | None, typer.Option(help="module | block.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step and process.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the head.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the crops; default: image_size.")] = None,
    mode: Annotated[str | None, typer.Option(help=MODE_HELP)] = None,
    seed: Annotated[int | None, typer.Option(help="Of head, crops and random choices.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to train on; default: 'train' where there is one.")] = None,
    eval_dataset: Annotated[Path | None, typer.Option(help="Other folder to score on; default: --dataset.")] = None,
    eval_split: Annotated[
        str | None, typer.Option(help="Split to score on; default: 'val' where there is one.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with fields of FinetuneConfig; options win.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint of the same run.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every figure to this file.")] = None,
) -> None:
    """Train a text-classified segmentation head on a CLIP, and the layers of its tower that a rule selects."""
    require("train", "accelerate")
    from hf_opentrans.training.finetune import FinetuneConfig
    from hf_opentrans.training.finetune import finetune as run

    given = {"framework": framework, "select": select, "fraction": fraction, "granularity": granularity}
    given |= {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "resolution": resolution}
    given |= {"mode": mode, "seed": seed}
    with usage():
        values = _read_config(config, {field.name for field in fields(FinetuneConfig)})
        settings = FinetuneConfig(**{**values, **{name: v for name, v in given.items() if v is not None}})
    start_processes()
    check_output_folder(output, marker=_REPORT)
    train = SegmentationFolder(dataset, split or _existing(dataset, "train"))
    other = eval_dataset or dataset
    evaluate = SegmentationFolder(other, eval_split or _existing(other, "val"))
    loaded = load_clip(model)
    if not isinstance(loaded.model, SparseCLIPModel):
        raise TypeError(f"The model {model!r} has no text tower. Names need one. Give a CLIP with both towers.")
    result = run(
        loaded.model,
        loaded.processor,
        (train, evaluate),
        settings,
        output,
        resume=resume,
        pruning_report=PruningReport.load(model) if settings.select == "damage" else None,
        on_stage=_say,
        progress=shows_progress(),
    )
    if not is_main_process():
        return
    _show(result.report, f"{model} with {settings.framework}", output)
    save_json(json_file, command_line(), {"model": model, **result.report})


@app.command()
@guarded
def distill(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a pruned CLIP.")],
    teacher: Annotated[str, typer.Option(help="The dense CLIP that it was pruned from.")],
    images: Annotated[Path, typer.Option(help="Folder of unlabelled images (searched recursively).")],
    output: Annotated[Path, typer.Option(help="Folder for the recovered model.")],
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step and process.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest rate.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the crops; default: image_size.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the images.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with fields of DistillConfig; options win.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint of the same run.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every figure to this file.")] = None,
) -> None:
    """Recover a pruned CLIP without labels: it learns the dense model's tokens on unlabelled images."""
    require("train", "accelerate")
    from hf_opentrans.training.recovery import DistillConfig
    from hf_opentrans.training.recovery import distill as run

    given = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    given |= {"resolution": resolution, "seed": seed}
    with usage():
        values = _read_config(config, {field.name for field in fields(DistillConfig)})
        settings = DistillConfig(**{**values, **{name: v for name, v in given.items() if v is not None}})
    start_processes()
    check_output_folder(output, marker=_REPORT)
    found = list_images(images)
    pruned, dense = load_clip(model), load_clip(teacher)
    for name, loaded in ((model, pruned), (teacher, dense)):
        if not isinstance(loaded.model, SparseCLIPModel):
            raise TypeError(
                f"The model {name!r} has no text tower. It must be a whole CLIP. Give one with both towers."
            )
    report = run(
        pruned.model,  # pyright: ignore[reportArgumentType]
        dense.model,  # pyright: ignore[reportArgumentType]
        pruned.processor,
        found,
        settings,
        output,
        resume=resume,
        on_stage=_say,
        progress=shows_progress(),
    )
    if not is_main_process():
        return
    header = ["", "CLS cos", "patch cos", "loss"]
    cells = [
        [when, *(f"{report[when][name]:.4f}" for name in ("class_token_cosine", "patch_token_cosine", "loss"))]
        for when in ("before", "after")
    ]
    show_table((header, cells), title=f"{model} after {settings.steps} steps of distillation")
    out.print(f"Training took {report['seconds']:.0f} s. Saved to {escape(str(output))}.", highlight=False)
    save_json(json_file, command_line(), {"model": model, "teacher": teacher, **report})


@benchmark_app.command("layer-selection")
@guarded
def benchmark_layer_selection(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a CLIP with both towers, or 'clip-scenes'.")],
    dataset: Annotated[Path, typer.Option(help="Folder with images/, masks/ and classes.json.")],
    split: Annotated[str, typer.Option(help="Split to train on.")] = "train",
    eval_split: Annotated[str, typer.Option(help="Split to score on.")] = "val",
    rules: Annotated[list[str] | None, typer.Option(help="What trains; default: eight rules.")] = None,
    fraction: Annotated[float, typer.Option(help="Share of the layers that a rule trains.")] = 0.5,
    seen: Annotated[float, typer.Option(help="Share of the classes that the head is trained with.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Optimiser steps of a run.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Crops per step.")] = 8,
    resolution: Annotated[int | None, typer.Option(help="Side of the crops; default: image_size.")] = None,
    mode: Annotated[str | None, typer.Option(help=MODE_HELP)] = None,
    decoder_channels: Annotated[int, typer.Option(help="Width of the decoder.")] = 64,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted up from the first.")] = 5,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write every figure here after every run, and a picture beside it; go on."),
    ] = None,
) -> None:
    """Train a head with the tower's layers that each rule selects; compare quality, cost, time and memory."""
    require("train", "accelerate")
    from hf_opentrans.benchmark_layer_selection import STUDIED, SelectionFile, Study, run_study
    from hf_opentrans.training.finetune import FinetuneConfig

    chosen = list(dict.fromkeys(rules or STUDIED))
    options: dict[str, Any] = {"fraction": fraction, "steps": steps, "batch_size": batch_size}
    options |= {"resolution": resolution, "decoder_channels": decoder_channels, "save_every": steps + 1}
    options |= {"mode": mode}
    with usage():
        configs = [FinetuneConfig(select=rule, **options) for rule in chosen]
        train, evaluate = SegmentationFolder(dataset, split), SegmentationFolder(dataset, eval_split)
        loaded, processor = load_segmenter(model)
        study = Study(loaded, processor, train, evaluate, configs[0], seen)
        settings = {"model": model, "dataset": str(dataset), "split": split, "eval_split": eval_split, "seen": seen}
        settings |= options | {"side": study.side, "classes": len(train.class_names), "files": fingerprint(dataset)}
        results = SelectionFile(json_file, settings, command_line())
    run_study(study, chosen, range(seed, seed + seeds), results, say=_say, progress=shows_progress())
    title = f"{Path(model).name} on {dataset.name}"
    for columns, part in ((QUALITY, "what it learned"), (COST, "what it cost")):
        show_table(selection_table(results.rows, results.timings, columns), title=f"{title}: {part}")
    for note in selection_notes(results.rows, results.settings):
        out.print(escape(note), soft_wrap=True, highlight=False)
    if json_file is not None and not results.is_device:
        picture = json_file.with_suffix(".png")
        draw_selection(results.rows, picture, title=title)
        out.print(f"Picture: {escape(str(picture))}", soft_wrap=True, highlight=False)


@benchmark_app.command("recovery")
@guarded
def benchmark_recovery(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a dense CLIP with both towers, or 'clip-scenes'.")],
    images: Annotated[Path, typer.Option(help="Folder of unlabelled images (searched recursively).")],
    methods: Annotated[list[str] | None, typer.Option(help="Of pruning; default: obs magnitude random.")] = None,
    keep: Annotated[float, typer.Option(help="Share of the MACs to keep.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Optimiser steps of the distillation.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 16,
    resolution: Annotated[int | None, typer.Option(help="Side of the crops; default: image_size.")] = None,
    num_images: Annotated[int, typer.Option(help="Most images that pruning calibrates on.")] = 256,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted up from the first.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here; go on from it.")] = None,
) -> None:
    """Prune by several methods and recover by distillation; fidelity before and after, steps and seconds."""
    require("train", "accelerate")
    from hf_opentrans.benchmark_recovery import RECOVERED, RecoveryFile, run_recovery
    from hf_opentrans.training.recovery import DistillConfig

    chosen = list(dict.fromkeys(methods or RECOVERED))
    with usage():
        pruning = PruningConfig(keep=keep, num_images=num_images, resolution=resolution)
        for method in chosen:
            replace(pruning, method=method)
        training = DistillConfig(steps=steps, save_every=steps + 1, resolution=resolution, batch_size=batch_size)
        settings = {"model": model, "keep": keep, "num_images": num_images, "files": fingerprint(images)}
        results = RecoveryFile(json_file, settings | asdict(training), command_line())
    loaded, found = load_clip(model), list_images(images)
    if not isinstance(loaded.model, SparseCLIPModel):
        raise TypeError(f"The model {model!r} has no text tower. It must be a whole CLIP. Give one with both towers.")
    runs = [(method, number) for number in range(seed, seed + seeds) for method in chosen]
    parts = (loaded.model, loaded.processor, found, pruning, training, runs, results)
    run_recovery(*parts, say=_say, progress=shows_progress())
    show_table(recovery_table(results.rows), title=f"{Path(model).name}: recovery by distillation")
    for note in recovery_notes(results.rows):
        out.print(escape(note), soft_wrap=True, highlight=False)


def _read_config(path: Path | None, known: set[str]) -> dict[str, Any]:
    if path is None:
        return {}
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}. --config is a JSON file. Check the path.")
    values = json.loads(path.read_text(encoding="utf-8"))
    unknown = sorted(set(values) - known) if isinstance(values, dict) else ["no JSON object"]
    if unknown:
        raise ValueError(
            f"{str(path)!r} holds {', '.join(unknown)}. Fields are {', '.join(sorted(known))}. Correct it."
        )
    return values


def _existing(folder: Path, split: str) -> str | None:
    return split if (folder / "images" / split).is_dir() else None


def _show(report: dict[str, Any], subject: str, output: Path) -> None:
    config = report["config"]
    show_table(_cells(report), title=f"{subject}, {config['steps']} steps, {config['select']}")
    costs = {name: cost["per_sample"] for name, cost in report["training_cost"].items()}
    out.print(
        f"Training took {report['seconds']:.0f} s; a sample costs {costs['selected'] / 1e9:.2f} GMAC, with the whole "
        f"tower {costs['full'] / 1e9:.2f} ({costs['selected'] / costs['full']:.0%}). Saved to {escape(str(output))}.",
        highlight=False,
    )


def _say(line: str) -> None:
    if is_main_process():
        err.print(escape(line), soft_wrap=True, highlight=False)


def _cells(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["", "mIoU", "pixel accuracy", "loss"]
    cells = [
        [when, f"{scores['mean_iou']:.1%}", f"{scores['pixel_accuracy']:.1%}", f"{scores['loss']:.3f}"]
        for when, scores in (("before", report["before"]), ("after", report["after"]))
    ]
    return header, cells
