"""The command `transfer`: a subnetwork into another model."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from transformers import AutoProcessor

from hf_opentrans._files import check_output_folder
from hf_opentrans.cli._common import app, command_line, err, guarded, out, save_json, show_table, shows_progress, usage
from hf_opentrans.loading import load_any, load_processor, resolve_model
from hf_opentrans.pruning.plan import PruningConfig
from hf_opentrans.pruning.subnetwork import Subnetwork
from hf_opentrans.pruning.transfer import TransferReport
from hf_opentrans.pruning.transferred import CONFIG_FILE, save_transferred

_LISTED = 5


@app.command("transfer")
@guarded
def transfer_command(
    subnetwork: Annotated[
        str, typer.Argument(help="Folder that `prune` wrote, its folder 'subnetwork', or a Hub id of either.")
    ],
    target: Annotated[str, typer.Argument(help="Folder or Hub id of a model with a CLIP vision tower.")],
    output: Annotated[Path, typer.Option(help="Folder for the smaller model.")],
    images: Annotated[
        Path | None, typer.Option(help="Unlabelled images; rebuild on them where the target's weights differ.")
    ] = None,
    prefix: Annotated[str | None, typer.Option(help="Path of the tower, for classes that are not known.")] = None,
    num_images: Annotated[int, typer.Option(help="Most images that are used, drawn by the seed.")] = 256,
    resolution: Annotated[int | None, typer.Option(help="Side of the images; default: the tower's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw and the probes.")] = 0,
    keep_unused: Annotated[bool, typer.Option(help="Keep blocks that the target never reads.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every figure to this file.")] = None,
) -> None:
    """Put a subnetwork into a segmenter, detector or captioner that carries a CLIP tower; say what matched."""
    with usage():
        config = PruningConfig(num_images=num_images, resolution=resolution, seed=seed)
    check_output_folder(output, marker=CONFIG_FILE)
    found = Subnetwork.from_pretrained(subnetwork)
    model = load_any(target, dtype=None)
    processor = _processor(target)
    result = found.apply_to(
        model,
        images,
        prefix=prefix,
        config=config,
        image_processor=processor,
        drop_unused=not keep_unused,
        inplace=True,
        progress=shows_progress(),
    )
    save_transferred(result.model, output, processor=processor, report=result.report)
    _show(result.report, subnetwork, target)
    out.print(f"Saved to {escape(str(output))}. Load it with hf_opentrans.load_transferred.", highlight=False)
    save_json(json_file, command_line(), {"subnetwork": subnetwork, "target": target, **result.report.to_dict()})


def _processor(target: str) -> Any:
    """Load the target's processor; a model folder without one is a model all the same."""
    path = resolve_model(target)
    try:
        return AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError, KeyError):
        pass
    try:
        return load_processor(path)
    except (OSError, ValueError):
        err.print("[yellow]Warning:[/] There is no processor beside the target: none is saved with the smaller model.")
        return None


def _show(report: TransferReport, subnetwork: str, target: str) -> None:
    cells = [
        ["parameters", f"{report.dense_params / 1e6:.2f} M", f"{report.params / 1e6:.2f} M", _share(report, "params")],
        ["MACs per image", f"{report.dense_macs / 1e9:.2f} G", f"{report.macs / 1e9:.2f} G", _share(report, "macs")],
    ]
    title = f"{subnetwork} in {target} ({report.target}, tower {report.prefix or 'itself'}): {report.weights}"
    show_table((["vision tower", "before", "after", "kept"], cells), title=title)
    counts = ", ".join(f"{count} {kind}" for kind, count in report.matches.items() if count)
    lines = [f"Weights against the subnetwork's source: {counts}."]
    different = [tensor for tensor in report.tensors if tensor.match == "different"]
    if different:
        names = ", ".join(tensor.name for tensor in different[:_LISTED])
        lines.append(f"Different: {names}{' ...' * (len(different) > _LISTED)}.")
    lines += [f"Skipped: {tensor.name} ({tensor.reason})." for tensor in report.skipped]
    lines += [f"Dropped: {cut.name}, {cut.params / 1e6:.2f} M ({cut.reason})." for cut in report.cuts]
    lines += list(report.notes)
    for line in lines:
        out.print(escape(line), soft_wrap=True, highlight=False)


def _share(report: TransferReport, name: str) -> str:
    return f"{getattr(report, name) / getattr(report, f'dense_{name}'):.0%}"
