"""The notebooks run, with tiny models in the place of the real ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPImageProcessorPil,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    OwlViTProcessor,
)

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def code_cells(name):
    cells = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_hold_no_output(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.fixture
def hosts(tmp_path, tiny_clip, tiny_tokenizer):
    """Write a tiny detector and a tiny captioner with their processors."""
    values = tiny_clip.config.to_dict()
    sizes: Any = {"height": 32, "width": 32}
    text = {**values["text_config"], "projection_dim": 32}
    config = OwlViTConfig(text_config=text, vision_config=values["vision_config"], projection_dim=32)
    OwlViTForObjectDetection(config).save_pretrained(tmp_path / "owlvit")
    OwlViTProcessor(OwlViTImageProcessorPil(size=sizes), tiny_tokenizer).save_pretrained(tmp_path / "owlvit")
    language: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    marks = {name: getattr(tiny_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = values["vision_config"]
    git = GitConfig(vision_config=vision, vocab_size=len(tiny_tokenizer), num_attention_heads=2, **language, **marks)
    GitForCausalLM(git).save_pretrained(tmp_path / "git")
    shortest: Any = {"shortest_edge": 32}
    GitProcessor(CLIPImageProcessorPil(size=shortest, crop_size=sizes), tiny_tokenizer).save_pretrained(
        tmp_path / "git"
    )
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*calibration images")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_one_subnetwork_in_a_detector_and_a_captioner(hosts, tiny_clip_folder, tiny_images, monkeypatch, capsys):
    monkeypatch.chdir(hosts)
    (hosts / "images").mkdir()
    for index in range(40):
        tiny_images[index % 8].rotate(index).save(hosts / "images" / f"{index}.png")
    tiny_images[0].save("photo.jpg")
    first, *cells = code_cells("03_transfer_to_frameworks.ipynb")
    names: dict[str, Any] = {}
    exec(first, names)
    assert {"CLIP", "DETECTOR", "CAPTIONER", "IMAGES", "PICTURE", "NAMES"} <= names.keys()
    names |= {"CLIP": str(tiny_clip_folder), "DETECTOR": "owlvit", "CAPTIONER": "git", "IMAGES": "images"}
    for cell in cells:
        exec(compile(cell, "03_transfer_to_frameworks.ipynb", "exec"), names)
    printed = capsys.readouterr().out
    assert "plan, refitted" in printed
    assert "trainable params" in printed
    assert names["report"].params < names["report"].dense_params
    state = names["transferred"].model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in names["detector_again"].state_dict().items())
