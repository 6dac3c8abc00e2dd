"""The README's block on publishing, over a Hub on this machine."""

import re
from pathlib import Path

import pytest

from hf_opentrans import PruningConfig, prune_model
from hf_opentrans.loading import load_clip

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.filterwarnings("ignore:8 calibration images")
def test_publishing(hub, api, tmp_path, tiny_clip_folder, tiny_images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
        if "push_to_hub" in block
    ]
    loaded = load_clip(tiny_clip_folder)
    result = prune_model(loaded.model, tiny_images, PruningConfig(keep=0.6))
    result.save_pretrained("pruned", loaded.processor)
    owner = api.whoami()["name"]
    names: dict = {}
    exec(compile(block.replace("your-name", owner), "README.md", "exec"), names)
    masks = names["pipe"](tiny_images[0], candidate_labels=["cat", "dog"])
    assert {found["label"] for found in masks} <= {"cat", "dog"}
    assert names["subnetwork"].plan == result.subnetwork.plan
    files = hub.files(f"{owner}/your-model")
    assert {"README.md", "config.json", "model.safetensors", "pipeline_open_vocabulary.py"} <= set(files)
    assert b"license: mit" in files["README.md"]
