"""The notebooks run: on the embedded model with fewer images, 03 with tiny models in the place of the real ones."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image
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

TESTS = Path(__file__).resolve().parent
NOTEBOOKS = TESTS.parent / "notebooks"
FEW_IMAGES = "ignore:.*calibration images"
FROM_PEFT = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT asks for it


def code_cells(name):
    cells = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(name, **settings):
    """Run a notebook with other settings than those of its first cell, and return its names."""
    first, *cells = code_cells(name)
    names: dict[str, Any] = {}
    exec(first, names)
    assert settings.keys() <= names.keys()
    names |= settings
    for cell in cells:
        exec(compile(cell, name, "exec"), names)
    return names


def check_picture(path):
    with Image.open(path) as picture:
        assert min(picture.size) >= 500
        assert len(picture.convert("RGB").getcolors(2**24) or ()) > 500, "next to nothing is drawn"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Work in an empty folder, with figures that need no screen."""
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    yield tmp_path
    plt.close("all")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_hold_no_output_and_end_with_a_picture(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    assert "figure.savefig(" in "".join(cells[-1]["source"])


@pytest.mark.slow
@pytest.mark.filterwarnings(FEW_IMAGES)
def test_prune_and_segment(work, capsys):
    names = run("01_prune_and_segment.ipynb", NUM_IMAGES=16, NUM_TESTS=4, ROUNDS=3)
    report = names["report"]
    assert 0.58 < report.macs / report.dense_macs <= 0.6
    assert names["same"]
    printed = capsys.readouterr().out
    assert f"{report.params / 1e6:.2f} M" in printed
    assert f"{names['close'].patch_tokens:.4f}" in printed
    assert "times as fast" in printed
    dense, pruned = (torch.stack([result.segmentation for result in results]) for results in names["seen"])
    assert (dense == pruned).double().mean() > 0.7
    assert (dense >= 0).double().mean() > 0.2
    check_picture("pruning.png")
    check_picture("dense-and-pruned.png")


@pytest.mark.slow
@pytest.mark.filterwarnings(FROM_PEFT)
def test_spectral_finetuning(work, capsys):
    names = run("02_spectral_finetuning.ipynb", RESOLUTION=64, TRAIN=24, TEST=6, STEPS=10, BATCH_SIZE=4)
    assert names["same"]
    assert names["costs"]["selected layers"] < names["costs"]["all layers"]
    printed = capsys.readouterr().out
    for before, after in names["scores"].values():
        assert after > before + 0.05
        assert f"mIoU {before:.1%} -> {after:.1%}" in printed
    trained = {name for name, weight in names["models"]["selected layers"].named_parameters() if weight.requires_grad}
    for layer in names["selection"].names:
        assert any(layer in name for name in trained)
    assert not any(layer + "." in name for layer in names["selection"].frozen for name in trained)
    for picture in ("alpha.png", "spectrum.png", "before-and-after.png"):
        check_picture(picture)


@pytest.fixture
def hosts(work, tiny_clip, tiny_tokenizer):
    """Write a tiny detector and a tiny captioner with their processors."""
    values = tiny_clip.config.to_dict()
    sizes: Any = {"height": 32, "width": 32}
    text = {**values["text_config"], "projection_dim": 32}
    config = OwlViTConfig(text_config=text, vision_config=values["vision_config"], projection_dim=32)
    OwlViTForObjectDetection(config).save_pretrained("owlvit")
    OwlViTProcessor(OwlViTImageProcessorPil(size=sizes), tiny_tokenizer).save_pretrained("owlvit")
    language: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    marks = {name: getattr(tiny_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = values["vision_config"]
    git = GitConfig(vision_config=vision, vocab_size=len(tiny_tokenizer), num_attention_heads=2, **language, **marks)
    GitForCausalLM(git).save_pretrained("git")
    shortest: Any = {"shortest_edge": 32}
    GitProcessor(CLIPImageProcessorPil(size=shortest, crop_size=sizes), tiny_tokenizer).save_pretrained("git")


@pytest.mark.filterwarnings(FEW_IMAGES)
@pytest.mark.filterwarnings(FROM_PEFT)
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font:UserWarning")  # a random captioner says anything
def test_one_subnetwork_in_a_detector_and_a_captioner(work, hosts, tiny_clip_folder, tiny_images, capsys):
    (work / "images").mkdir()
    for index in range(40):
        tiny_images[index % 8].rotate(index).save(work / "images" / f"{index}.png")
    tiny_images[0].save("photo.jpg")
    models = {"CLIP": str(tiny_clip_folder), "DETECTOR": "owlvit", "CAPTIONER": "git"}
    names = run("03_transfer_to_frameworks.ipynb", **models, IMAGES="images")
    printed = capsys.readouterr().out
    assert "plan, refitted" in printed
    assert "trainable params" in printed
    assert names["report"].params < names["report"].dense_params
    state = names["transferred"].model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in names["detector_again"].state_dict().items())
    boxes = sum(len(names["detect"](model)) for model in names["detectors"].values())
    assert boxes > 0
    assert sum(len(axis.patches) for axis in names["axes"]) == boxes
    check_picture("detector-and-captioner.png")


# The cell that pushes is tried first without a token, then with the name that the notebook comes with.
PUBLISH = """
import json, os, sys
import torch
torch.set_num_threads(1)
first, *cells = json.load(open(sys.argv[1]))
token, names, refused = os.environ.pop("HF_TOKEN"), {}, []
exec(first, names)
own_id = names["REPO_ID"]
names |= {"NUM_IMAGES": 16}
for cell in cells:
    code = compile(cell, "04", "exec")
    if "push_folder(" in cell:
        for values in ({}, {"HF_TOKEN": token}):
            os.environ |= values
            try:
                exec(code, names)
            except (RuntimeError, ValueError) as error:
                refused.append(str(error))
        names["REPO_ID"] = "tester/clip-scenes-pruned"
    exec(code, names)
found = [[entry["label"] for entry in masks] for masks in names["found"]]
commit = names["pushed"].commit
json.dump({"own_id": own_id, "refused": refused, "found": found, "commit": commit}, open("facts.json", "w"))
"""


@pytest.mark.slow
def test_publish_to_the_hub(work, monkeypatch):
    monkeypatch.syspath_prepend(TESTS)
    server = importlib.import_module("hub_server")
    token = "hf_of_a_notebook"
    (work / "cells.json").write_text(json.dumps(code_cells("04_publish_to_the_hub.ipynb")), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    kept = {name: value for name, value in kept.items() if not name.startswith("HF_")}
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
    paths = {"PYTHONPATH": str(TESTS.parent)}
    with server.HubServer(token) as hub:
        variables = {**kept, **threads, **paths, **server.environment(hub.url, token, str(work / "home"))}
        command = [sys.executable, "-c", PUBLISH, "cells.json"]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        assert hub.repositories == [("model", "tester/clip-scenes-pruned")]
        files = hub.files("tester/clip-scenes-pruned")
        assert hub.errors == []
        commit = hub.commits("tester/clip-scenes-pruned")[0].oid
    facts = json.loads(Path("facts.json").read_text(encoding="utf-8"))
    assert facts["commit"] == commit
    not_logged_in, wrong_name = facts["refused"]
    assert "not logged in" in not_logged_in
    assert "hf auth login" in not_logged_in
    assert facts["own_id"] in wrong_name
    assert {"README.md", "model.safetensors", "pipeline_open_vocabulary.py", "widths.png"} <= files.keys()
    assert b"cc-by-sa-4.0" in files["README.md"]
    assert token not in done.stdout + done.stderr
    assert "cc-by-sa-4.0" in done.stdout
    assert len(facts["found"]) == 3
    assert all(len(labels) >= 2 for labels in facts["found"])
    check_picture("published.png")
