"""README and cards: their tables come from the published results, their code runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from hf_opentrans.benchmark_tables import fill_tables
from hf_opentrans.cli import app, repeat_options

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "model_cards" / "results"
MARKDOWN = [ROOT / "README.md", *sorted(ROOT.glob("model_cards/**/*.md"))]


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(path):
    text = path.read_text(encoding="utf-8")
    assert fill_tables(text, RESULTS) == text, "run: hf-opentrans benchmark tables README.md"


def test_the_tables_are_not_empty():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("pruning-clip-scenes.json", "latency-vit-b16.json"):
        block = text.split(f"<!-- table: {name} -->")[1].split("<!-- end of table -->")[0]
        assert block.count("|") > 20
        assert "Measured by `hf-opentrans benchmark" in block


def test_a_changed_figure_is_noticed(tmp_path):
    name = "latency-vit-b16.json"
    text = (RESULTS / name).read_text(encoding="utf-8")
    (tmp_path / name).write_text(text.replace('"resolution": 224', '"resolution": 225'), encoding="utf-8")
    block = f"<!-- table: {name} -->\nold\n<!-- end of table -->"
    assert fill_tables(block, tmp_path) != fill_tables(block, RESULTS)


@pytest.mark.filterwarnings("ignore:8 calibration images")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_code_blocks_run(tmp_path, tiny_clip, tiny_clip_folder, tiny_images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "of" / "images").mkdir(parents=True)
    for index, image in enumerate(tiny_images):
        image.save(tmp_path / "folder" / "of" / "images" / f"{index}.png")
    tiny_images[0].save("photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    published = [block for block in blocks if "push_to_hub" in block]  # run by tests/hub/test_readme.py
    blocks = [block for block in blocks if block not in published]
    assert (len(blocks), len(published)) == (6, 1)
    values = tiny_clip.config.to_dict()
    towers = {name: values[name] for name in ("text_config", "vision_config")}
    seg = CLIPSegForImageSegmentation(CLIPSegConfig(**towers, projection_dim=16, extract_layers=[0, 1]))
    seg.save_pretrained("seg")
    # Of all blocks: a reader types them in order.
    names = {"PATH": str(tiny_clip_folder), "CLIPSEG": "seg"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    with Image.open("overlay.png") as overlay:
        assert overlay.size[0] > 40
    assert (tmp_path / "smaller" / "config.json").exists()
    assert (tmp_path / "pruned" / "subnetwork" / "subnetwork.json").exists()


def lines_of(patterns):
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    python = [f for path in files for f in (path.rglob("*.py") if path.is_dir() else [path])]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in python)


def map_rows():
    for line in (ROOT / "README.md").read_text(encoding="utf-8").split("## Map of the code")[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            yield re.findall(r"`([^`]+)`", cells[0]), int(cells[1].replace(",", ""))


def test_the_map_counts_lines():
    for patterns, stated in map_rows():
        counted = lines_of(patterns)
        # Half a hundred: not every small change has to touch the README.
        assert abs(counted - stated) <= 50, f"{patterns}: {counted} lines"
    assert len(list(map_rows())) == 13


def typed_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for block in (block for language, block in blocks if not language):
        joined = re.sub(r"\n {10,}", " ", block)
        for line in joined.splitlines():
            if line.startswith("hf-opentrans ") and "|scale|" not in line:
                yield line.split(" #")[0]


@pytest.mark.parametrize("line", list(typed_commands()), ids=lambda line: " ".join(line.split()[1:3]))
def test_commands_and_options_exist(line):
    command: Any = typer.main.get_command(app)
    words = shlex.split(re.sub(r"[\[\]]|\.\.\.", " ", line))[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    asked = {word for word in words if word.startswith("--")}
    assert asked <= known, asked - known


def test_the_list_of_benchmarks_is_complete():
    line = next(
        line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "benchmark latency|" in line
    )
    named = set(line.split()[-1].split("|")) | {
        text.split()[2] for text in typed_commands() if text.startswith("hf-opentrans benchmark")
    }
    group: Any = typer.main.get_command(app)
    assert named == set(group.commands["benchmark"].commands)


def test_several_values_reach_an_option():
    assert repeat_options(["card", "F", "--evaluation", "a", "b"])[2:] == ["--evaluation", "a", "--evaluation", "b"]
