"""The command `export`: a model in ONNX, OpenVINO or torch.export, compared with the original."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from hf_opentrans._files import check_output_folder
from hf_opentrans.cli._common import app, command_line, err, guarded, out, save_json, show_table, usage
from hf_opentrans.cli.commands import BudgetOption, JsonFile, Mode, say_budget
from hf_opentrans.deploy.export import ExportConfig, check_exportable, export_model, load_exportable
from hf_opentrans.deploy.record import EXPORT_FILE, ExportRecord
from hf_opentrans.deploy.sessions import PRECISIONS
from hf_opentrans.deploy.vocabularies import read_vocabulary
from hf_opentrans.models.modeling_elastic_clip import ElasticMixin
from hf_opentrans.models.vocabulary import Vocabulary

COMPUTES_IN = ("fp32", "bf16")


@app.command("export")
@guarded
def export(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of a segmenter, a CLIP or a tower, or 'clip-scenes'.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the files; an earlier export is replaced.")],
    file_format: Annotated[str, typer.Option("--format", help=" | ".join(PRECISIONS))] = "onnx",
    vocabulary: Annotated[
        str | None,
        typer.Option(
            help="Build in 'cat; sofa, couch', a .json or .txt file, or a saved vocabulary; without text tower."
        ),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Weights in int8.")] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="With --int8 and onnx, unlabelled images: fixed ranges of activations.")
    ] = None,
    precision: Annotated[str, typer.Option(help=f"{' | '.join(COMPUTES_IN)}: what OpenVINO computes in.")] = "fp32",
    resolution: Annotated[
        str | None,
        typer.Option(help="Image size in pixels, 224 or 336x448 (height x width); default: the model's own."),
    ] = None,
    mode: Mode = None,
    templates: Annotated[
        str | None, typer.Option(help="Prompt templates of --vocabulary; default: the model's.")
    ] = None,
    budget: BudgetOption = None,
    json_file: JsonFile = None,
) -> None:
    """Export a segmenter or a vision tower, and check that the export still is the model."""
    with usage():
        config = ExportConfig(
            format=file_format,
            precision=_precision(file_format, precision, int8=int8, is_static=calibration is not None),
            resolution=_resolution(resolution),
            mode=mode,
        )
        if vocabulary is not None:
            read_vocabulary(vocabulary, templates=templates or "plain")  # before the model is loaded
        elif templates is not None:
            raise ValueError(f"--templates is {templates!r} without --vocabulary. They are for its names. Give both.")
    check_output_folder(output, marker=EXPORT_FILE)
    with err.status("loading") as status:
        loaded, processor, chosen = _load(model, budget)
        source = model if chosen is None else f"{model} at budget {chosen:g}"
        with usage():
            names = _vocabulary(vocabulary, templates, loaded)
            check_exportable(loaded, processor, config, names)
        options = {"calibration": calibration, "source": source, "on_stage": status.update}
        record = export_model(loaded, processor, output, config, vocabulary=names, **options)
    height, width = record.image_size
    title = f"{record.source} as {record.format} in {record.precision}, {height} x {width} pixels"
    show_table(_file_table(record), title=title)
    show_table(_parity_table(record), title="Compared with PyTorch in fp32")
    if record.precision.endswith("bf16") and record.computed_in != "bf16":
        out.print("This processor has no bfloat16: OpenVINO computed in float32, so compare again where it will run.")
    for line in record.folded:
        out.print(f"Folded: {escape(line)}", soft_wrap=True, highlight=False)
    out.print(f"Saved to {escape(str(output))}.", soft_wrap=True, highlight=False)
    values = {"model": model, "budget": chosen, "seed": None, "export": record.to_dict()}
    save_json(json_file, command_line(), values)


def _load(name: str, budget: float | None) -> tuple[Any, Any, float | None]:
    """Return a model of one budget, its processor, and the budget: where none was asked for, the one that is set."""
    loaded, processor = load_exportable(name, budget=budget)
    if not isinstance(loaded, ElasticMixin):
        return loaded, processor, budget
    return loaded.extract(), processor, say_budget(loaded)


def _precision(file_format: str, computes_in: str, *, int8: bool, is_static: bool) -> str:
    """Return the name of the precision that the options ask for."""
    if computes_in not in COMPUTES_IN:
        raise ValueError(f"--precision is {computes_in!r}. It must be one of {', '.join(COMPUTES_IN)}.")
    if is_static and not (int8 and file_format == "onnx"):
        raise ValueError("--calibration is given. Ranges are measured for --int8 --format onnx alone. Leave it out.")
    if not int8:
        return computes_in
    if file_format != "openvino" and computes_in == "bf16":
        raise ValueError(f"--precision is bf16 with --int8. Only openvino has both, not {file_format}. Leave one out.")
    if file_format == "onnx":
        return "int8-static" if is_static else "int8-dynamic"
    return "int8-weights-bf16" if computes_in == "bf16" else "int8-weights"


def _resolution(text: str | None) -> int | tuple[int, int] | None:
    """Read "224" or "336x448"."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--resolution is {text!r}. It must be a side or HEIGHTxWIDTH, such as 224 or 336x448.")
    sides = [int(part) for part in parts]
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _vocabulary(text: str | None, templates: str | None, model: Any) -> Vocabulary | None:
    if text is None:
        return None
    default = getattr(model.config, "segmentation_templates", "plain")
    return read_vocabulary(text, templates=templates or default)


def _file_table(record: ExportRecord) -> tuple[list[str], list[list[str]]]:
    cells = [[name, f"{entry['bytes'] / 1e6:,.2f} MB", entry["sha256"][:12]] for name, entry in record.files.items()]
    return ["file", "size", "SHA-256"], cells


def _parity_table(record: ExportRecord) -> tuple[list[str], list[list[str]]]:
    header = ["inputs", "largest difference", "of the largest value", "mean cosine", "worst cosine", "same class"]
    cells = []
    for kind, found in record.parity.items():
        if kind == "limits":
            continue
        same = "-" if found["agreement"] is None else f"{found['agreement']:.1%}"
        figures = [f"{found['max_difference']:.1e}", f"{found['max_relative']:.1e}"]
        cells.append([kind, *figures, f"{found['cosine']:.5f}", f"{found['worst_cosine']:.5f}", same])
    return header, cells
