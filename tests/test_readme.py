"""README and cards: their tables come from the published results, their code runs."""

import re
from pathlib import Path

import pytest
from PIL import Image
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from hf_opentrans.benchmark_tables import fill_tables

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
    assert len(blocks) == 5
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
