"""The command `benchmark cold-start`."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.markup import escape

from hf_opentrans import benchmark_cold_start as cold_start
from hf_opentrans.cli._common import command_line, err, guarded, out, save_json, show_table
from hf_opentrans.cli.benchmark import benchmark_app
from hf_opentrans.loading import resolve_model


@benchmark_app.command("cold-start")
@guarded
def benchmark_cold_start(
    model: Annotated[
        str | None, typer.Option(help="Folder of a CLIP with both towers; default: random weights of ViT-B/16's size.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of fresh processes.")] = 5,
    cold: Annotated[bool, typer.Option("--cold", help="Empty the file cache before every process (Linux).")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Time `import hf_opentrans` against transformers alone, and a process up to its first segmentation."""

    def say(line: str) -> None:
        err.print(escape(line), soft_wrap=True, highlight=False)

    if model is not None and not (Path(resolve_model(model)) / "config.json").is_file():
        raise FileNotFoundError(
            f"There is no model folder {model!r}. The measured processes load from disk alone. Give a folder with "
            "config.json, or leave --model out."
        )
    with TemporaryDirectory() as temporary:
        picture = Path(temporary) / "picture.png"
        cold_start.write_picture(picture)
        if model is None:
            folder, name = Path(temporary) / "model", "random weights of the size of CLIP ViT-B/16"
            say("Writing a model with random weights (600 MB, deleted afterwards).")
            cold_start.write_clip(folder)
        else:
            folder, name = Path(resolve_model(model)), model
        result = cold_start.measure_cold_start(folder, picture, repeats, is_cold=cold, model=name, say=say)
    show_table(cold_start.cold_start_table(result), title="First use, every figure of fresh processes")
    for note in cold_start.cold_start_notes(result):
        out.print(escape(note), soft_wrap=True, highlight=False)
    save_json(json_file, command_line(), result.to_dict())
