"""What `import hf_opentrans` does, and what it leaves for later."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, CLIPVisionModel

import hf_opentrans
from hf_opentrans import DenseCLIPForSegmentation, SparseCLIPVisionModel, slice_model
from hf_opentrans.pruning import LayerPlan, PruningPlan

INIT = Path(hf_opentrans.__file__)
LATE = {"pruning", "spectra", "data", "training", "loading", "evaluation_runs", "benchmarks", "cli"}
# Nothing of ours is named before it is asked for.
FRESH = """
import json, sys
from transformers import CLIPModel
reference = sorted(sys.modules)
import hf_opentrans
ours = sorted(sys.modules)
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation
vision, dense = sys.argv[1:]
loaded = [
    type(AutoConfig.from_pretrained(vision)).__name__,
    type(AutoModel.from_pretrained(vision)).__module__,
    type(AutoModel.from_pretrained(dense)).__name__,
    type(AutoModelForSemanticSegmentation.from_pretrained(dense)).__name__,
]
print(json.dumps([reference, ours, loaded]))
"""
# As `benchmark cold-start` allows of time.
MOST_MODULES = 1.3


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, tiny_clip_config):
    """Return (modules of a CLIP model, modules with ours, kinds that Auto classes load) of a fresh process."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    plan = PruningPlan((LayerPlan((1, 3), (5, 6, 7)), LayerPlan((), (0,)), LayerPlan((0, 2), ())))
    slice_model(CLIPVisionModel(tiny_clip_config().vision_config), plan).save_pretrained(folder / "vision")
    DenseCLIPForSegmentation.from_clip(CLIPModel(tiny_clip_config())).save_pretrained(folder / "dense")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder / "vision"), str(folder / "dense")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reference, ours, loaded = json.loads(done.stdout.splitlines()[-1])
    return set(reference), set(ours), loaded


def type_checking_imports():
    """Return (name, module) of all imports that only type checkers see."""
    tree = ast.parse(INIT.read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {(alias.name, node.module) for node in imports for alias in node.names}


def test_type_checkers_see_what_is_imported_late():
    assert type_checking_imports() == set(hf_opentrans._MODULE_OF.items())


def test_every_late_name_is_public_and_comes_from_its_module():
    assert set(hf_opentrans._MODULE_OF) <= set(hf_opentrans.__all__)
    for name, module in hf_opentrans._MODULE_OF.items():
        assert getattr(hf_opentrans, name) is getattr(importlib.import_module(f"hf_opentrans.{module}"), name)


def test_names_are_listed_and_found():
    assert set(hf_opentrans.__all__) <= set(dir(hf_opentrans))
    names: dict[str, object] = {}
    exec("from hf_opentrans import *", names)
    assert set(hf_opentrans.__all__) <= set(names)


def test_a_name_is_remembered(monkeypatch):
    monkeypatch.delitem(vars(hf_opentrans), "MeanIoU", raising=False)
    first = hf_opentrans.MeanIoU
    monkeypatch.setattr("hf_opentrans.importlib.import_module", None)
    assert hf_opentrans.MeanIoU is first


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="module 'hf_opentrans' has no attribute 'prune'"):
        _ = hf_opentrans.prune  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ImportError, match="cannot import name 'prune'"):
        exec("from hf_opentrans import prune")
    assert not hasattr(hf_opentrans, "__wrapped__")


def test_what_is_not_needed_is_not_imported(fresh):
    reference, ours, _ = fresh
    assert not {f"hf_opentrans.{name}" for name in LATE} & ours
    packages = {name.split(".")[0] for name in ours - reference}
    assert not packages & {"matplotlib", "datasets", "pandas", "evaluate", "peft", "typer", "rich"}


def test_hardly_more_is_imported_than_a_clip_model_needs(fresh):
    reference, ours, _ = fresh
    assert len(ours) <= MOST_MODULES * len(reference)


def test_auto_classes_know_the_models_after_a_bare_import(fresh):
    assert fresh[2] == [
        "SparseCLIPVisionConfig",
        SparseCLIPVisionModel.__module__,
        "SparseCLIPModel",
        "DenseCLIPForSegmentation",
    ]
