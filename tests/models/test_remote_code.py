"""Saved folders load where hf_opentrans cannot be imported: their code travels with them."""

import json
import os
import subprocess
import sys
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from hf_opentrans import DenseCLIPForSegmentation, SparseCLIPConfig, apply_masks, slice_model
from hf_opentrans.pruning import LayerPlan, PruningPlan, to_sparse

# Run with -I: no PYTHONPATH, no current folder. The finder refuses hf_opentrans even where it is installed.
LOAD = """
import copy, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_opentrans":
            raise ImportError("hf_opentrans is blocked")

sys.meta_path.insert(0, Blocker())
import torch, transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
folder = sys.argv[1]
inputs = load_file(f"{folder}/inputs.safetensors")
pixels, ids, text = inputs["pixels"], inputs["ids"], inputs["text"]
outputs, kinds = {}, {}
# Copies, because the alignment of memory-mapped weights changes the rounding.
with torch.no_grad():
    for name in ("vision", "masked", "projection"):
        model = transformers.AutoModel.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
        kinds[name] = type(model).__name__
        outputs[name] = copy.deepcopy(model)(pixels)[0]
    model = transformers.AutoModel.from_pretrained(f"{folder}/clip", trust_remote_code=True)
    kinds["clip"] = type(model).__name__
    outputs["clip"] = copy.deepcopy(model)(pixel_values=pixels, input_ids=ids).logits_per_image
    auto = transformers.AutoModelForSemanticSegmentation
    model = auto.from_pretrained(f"{folder}/dense", trust_remote_code=True)
    kinds["dense"] = type(model).__name__
    outputs["dense"] = copy.deepcopy(model)(pixels, text_embeddings=text).logits
    config = transformers.AutoConfig.from_pretrained(f"{folder}/vision", trust_remote_code=True)
    kinds["config"] = type(config).__name__
assert not any(name.split(".")[0] == "hf_opentrans" for name in sys.modules)
save_file({name: value.contiguous() for name, value in outputs.items()}, f"{folder}/outputs.safetensors")
open(f"{folder}/kinds.json", "w").write(json.dumps(kinds))
"""
KINDS = {
    "vision": "SparseCLIPVisionModel",
    "masked": "SparseCLIPVisionModel",
    "projection": "SparseCLIPVisionModelWithProjection",
    "clip": "SparseCLIPModel",
    "dense": "DenseCLIPForSegmentation",
    "config": "SparseCLIPVisionConfig",
}


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory, tiny_clip_config):
    """Save five pruned models, load them in a process without hf_opentrans; return (folder, expected outputs)."""
    folder = tmp_path_factory.mktemp("remote")
    torch.manual_seed(0)
    plan = PruningPlan((LayerPlan((1, 3), (5, 6, 7)), LayerPlan((), (0,)), LayerPlan((0, 2), ())))
    config = tiny_clip_config()
    clip = slice_model(CLIPModel(config).eval(), plan)
    dense = DenseCLIPForSegmentation(cast("SparseCLIPConfig", clip.config)).eval()
    dense.load_state_dict(clip.state_dict())
    models = {
        "vision": slice_model(CLIPVisionModel(config.vision_config).eval(), plan),
        "masked": apply_masks(CLIPVisionModel(config.vision_config).eval(), plan),
        "projection": to_sparse(CLIPVisionModelWithProjection(config.vision_config).eval()),
        "clip": clip,
        "dense": dense,
    }
    pixels, text = torch.randn(2, 3, 32, 32), torch.nn.functional.normalize(torch.randn(5, 16), dim=-1)
    ids = torch.tensor([[536, 3, 537], [536, 9, 537]])
    save_file({"pixels": pixels, "text": text, "ids": ids}, folder / "inputs.safetensors")
    with torch.no_grad():
        expected = {name: models[name](pixels)[0] for name in ("vision", "masked", "projection")}
        expected["clip"] = clip(pixel_values=pixels, input_ids=ids).logits_per_image
        expected["dense"] = dense(pixels, text_embeddings=text).logits
    for name, model in models.items():
        model.save_pretrained(folder / name)
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, expected


@pytest.mark.parametrize("name", ["vision", "masked", "projection", "clip", "dense"])
def test_outputs_are_equal_without_the_package(loaded_elsewhere, name):
    folder, expected = loaded_elsewhere
    assert torch.equal(load_file(folder / "outputs.safetensors")[name], expected[name])


def test_the_classes_are_the_travelling_ones(loaded_elsewhere):
    assert json.loads((loaded_elsewhere[0] / "kinds.json").read_text()) == KINDS


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("vision", {"configuration_sparse_clip.py", "modeling_sparse_clip.py"}),
        ("dense", {"modeling_dense_clip.py", "vocabulary.py", "prompt_templates.py"}),
    ],
)
def test_the_code_lies_beside_the_weights(loaded_elsewhere, name, files):
    folder = loaded_elsewhere[0] / name
    assert files <= {path.name for path in folder.glob("*.py")}
    assert json.loads((folder / "config.json").read_text())["auto_map"]
