"""The command `app`: a page to click on, here or as a Hugging Face Space."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hf_opentrans._files import check_output_folder
from hf_opentrans._optional import require
from hf_opentrans.app.interface import build_interface, free_port, serve
from hf_opentrans.app.preparation import Sources, prepare_embedded, read_examples
from hf_opentrans.app.service import SegmentationService
from hf_opentrans.app.space import SPACE_FILE, export_space
from hf_opentrans.cli._common import app, err, guarded, out, usage


@app.command("app")
@guarded
def show(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder or Hub id of a model that `prune-elastic` wrote, or with --dense of any segmenter. Default: "
            "clip-scenes, pruned once at the first start (extra `demo`)."
        ),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the model to compare with; default: the largest budget.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free one.")] = 7860,
    examples: Annotated[
        Path | None, typer.Option(help='Folder of example pictures; its examples.json may say {"a.jpg": "cat; sky"}.')
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for what the first start makes; default: in HF_HOME.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export-space", help="Write a Hugging Face Space to this folder and stop.")
    ] = None,
) -> None:
    """Open a page that segments pictures with the dense and the pruned model side by side."""
    require("app", "gradio")
    if export is not None:
        check_output_folder(export, marker=SPACE_FILE)
    else:
        free_port(host, port)
    with usage():
        if model is None and dense is not None:
            raise ValueError(f"--dense is {dense!r} without MODEL. It is what MODEL is compared with. Give both.")
        own = None if examples is None else read_examples(examples)
    if model is None:
        sources = prepare_embedded(cache, on_stage=_say)
        sources = sources if own is None else Sources(sources.model, sources.dense, own)
    else:
        sources = Sources(model, dense, own or ())
    if export is not None:
        path = export_space(sources, export)
        _say(f"Saved to {path}. Try it with: python {path / 'app.py'}")
        return
    with err.status("loading"):
        service = SegmentationService.load(sources.model, sources.dense)
    blocks = build_interface(service, sources)
    address = serve(blocks, sources, host, port, is_blocking=False)
    _say(f"Open {address} in a browser. Stop with Ctrl+C.")
    blocks.block_thread()


def _say(line: str) -> None:
    out.print(escape(line), soft_wrap=True, highlight=False)
