"""Push, load, push again, through the real client: models, a Trainer, an adapter, a data set and a subnetwork.

Two processes do all of it, because importing is what takes the time: one has the package and pushes, the other has not
and loads. The tests look at what both left in files.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.slow  # the default run pushes and loads in test_push.py and test_readme.py

SETUP = """
import copy, json, sys, warnings
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
work = Path(sys.argv[1])
generator = torch.Generator().manual_seed(3)
pixels = torch.randn(2, 3, 32, 32, generator=generator)
text = torch.nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=-1)
ids = torch.tensor([[536, 3, 537], [536, 9, 537]])
outputs, facts = {}, {}

@torch.no_grad()
def output_of(model):
    model = copy.deepcopy(model).eval()  # memory-mapped weights lie otherwise, which changes the rounding
    if type(model).__name__ in ("DenseCLIPForSegmentation", "DeepLabV3PlusForSegmentation"):
        return model(pixels, text_embeddings=text).logits
    if type(model).__name__ in ("SparseCLIPModel", "CLIPModel"):
        return model(pixel_values=pixels, input_ids=ids).logits_per_image
    return model(pixels)[0]

def finish(name):
    save_file({key: value.contiguous() for key, value in outputs.items()}, work / f"{name}.safetensors")
    (work / f"{name}.json").write_text(json.dumps(facts))
"""

PUSH_MODELS = """
from huggingface_hub import HfApi
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, CLIPVisionModel
from hf_opentrans import DenseCLIPForSegmentation, SparseCLIPModel, SparseCLIPVisionModel, PruningPlan, slice_model
from hf_opentrans.pruning import LayerPlan

api = HfApi()
folder = sys.argv[2]
base = CLIPModel.from_pretrained(folder).eval()
plan = PruningPlan((LayerPlan((1, 3), (5, 6, 7)), LayerPlan((), (0,)), LayerPlan((0, 2), ())))
clip = slice_model(base, plan)
tower = CLIPVisionModel(base.config.vision_config).eval()
tower.load_state_dict(base.vision_model.state_dict())
tower = slice_model(tower, plan)
dense = DenseCLIPForSegmentation(clip.config).eval()
dense.load_state_dict(clip.state_dict())
for name, model in (("base", base), ("clip", clip), ("tower", tower), ("dense", dense)):
    model.push_to_hub(f"tester/{name}")
    outputs[name] = output_of(model)
for part in (CLIPTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)):
    part.push_to_hub("tester/clip")

# Revisions: the first commit stays under its name, its tag and its branch while main moves on.
first = api.model_info("tester/tower").sha
api.create_tag("tester/tower", tag="v1")
api.create_branch("tester/tower", branch="old")
changed = SparseCLIPVisionModel.from_pretrained("tester/tower")
outputs["tower loaded"] = output_of(changed)
with torch.no_grad():
    changed.pre_layrnorm.bias.add_(torch.randn(32, generator=generator))
changed.push_to_hub("tester/tower")
changed.push_to_hub("tester/tower", revision="experiment")
outputs["tower changed"] = output_of(changed)
revisions = {"main": None, "first": first, "tag": "v1", "branch": "old", "new branch": "experiment"}
for name, revision in revisions.items():
    found = SparseCLIPVisionModel.from_pretrained("tester/tower", **({"revision": revision} if revision else {}))
    outputs[f"tower at {name}"] = output_of(found)
facts["first"] = first
"""

PUSH_TRAINER = """
from transformers import Trainer, TrainingArguments
from hf_opentrans import DeepLabV3PlusForSegmentation

torch.manual_seed(0)
model = DeepLabV3PlusForSegmentation.from_clip(
    SparseCLIPModel.from_pretrained("tester/clip"), decoder_channels=24, skip_channels=8, atrous_rates=[1, 2])
before = output_of(model)
data = [{"pixel_values": image, "labels": torch.randint(0, 3, (32, 32))} for image in torch.randn(6, 3, 32, 32)]

def collate(examples):
    batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
    return {**batch, "text_embeddings": text}

arguments = TrainingArguments(
    str(work / "run"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to=[],
    disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False, save_strategy="steps", save_steps=1,
    push_to_hub=True, hub_model_id="tester/tuned", hub_private_repo=True)
trainer = Trainer(
    model, arguments, data_collator=collate, train_dataset=data,
    processing_class=CLIPImageProcessorPil.from_pretrained("tester/clip"))
trainer.train()
trainer.push_to_hub()
outputs["tuned"] = output_of(trainer.model)
facts["tuned by"] = float((outputs["tuned"] - before).abs().max())
outputs["tuned loaded"] = output_of(DeepLabV3PlusForSegmentation.from_pretrained("tester/tuned"))
"""

PUSH_ADAPTER = """
from hf_opentrans import SpectralConfig, get_peft_model
from peft import PeftModel

for mode in ("full", "lora"):
    start = CLIPModel.from_pretrained("tester/base").eval()
    config = SpectralConfig(rule="random", mode=mode, target_modules=r"vision_model\\..*")
    adapted = get_peft_model(start, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    adapted.push_to_hub(f"tester/adapter-{mode}", private=True)
    outputs[f"adapter {mode}"] = output_of(adapted.base_model.model)
    again = PeftModel.from_pretrained(CLIPModel.from_pretrained("tester/base"), f"tester/adapter-{mode}")
    outputs[f"adapter {mode} loaded"] = output_of(again.base_model.model)
"""

PUSH_DATA = """
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from PIL import Image as Pictures

rng = np.random.default_rng(0)
arrays = rng.integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
masks = rng.integers(0, 3, (4, 20, 30), dtype=np.uint8)
rows = {
    "image": [Pictures.fromarray(array) for array in arrays],
    "mask": [Pictures.fromarray(mask) for mask in masks],
    "label": [0, 1, 1, 0],
}
features = Features({"image": Image(), "mask": Image(), "label": ClassLabel(names=["cat", "dog"])})
Dataset.from_dict(rows, features=features).push_to_hub("tester/pictures", split="validation", private=True)
again = load_dataset("tester/pictures", split="validation")
facts["data"] = {
    "images": all(np.array_equal(np.array(row["image"]), array) for row, array in zip(again, arrays, strict=True)),
    "masks": all(np.array_equal(np.array(row["mask"]), mask) for row, mask in zip(again, masks, strict=True)),
    "labels": again["label"][:] if not isinstance(again["label"], list) else again["label"],
    "names": again.features["label"].names,
}
"""

PUSH_SUBNETWORK = """
from hf_opentrans import Subnetwork
from hf_opentrans.pruning import to_sparse
from hf_opentrans.pruning.matching import hash_tensors, sample_tensors
from hf_opentrans.pruning.tower import Tower

def missing(what, repo, **options):
    try:
        Subnetwork.from_pretrained(repo, **options)
    except FileNotFoundError as err:
        facts[f"no {what}"] = str(err)

found, source = Tower.of(clip), to_sparse(base)
subnetwork = Subnetwork(
    plan=plan, vision_config=found.vision.config.to_dict(), tensors=found.named_tensors(), base_model="tester/base",
    base_revision=None, source_hashes=hash_tensors(source), source_samples=sample_tensors(source),
    calibration={"seed": 0}, budget={"keep": 0.5})
commit = subnetwork.push_to_hub("tester/subnetwork", private=True)
missing("stranger", "tester/subnetwork", token=False)  # first: later it lies in the cache
subnetwork.push_to_hub("tester/subnetwork", revision="experiment")
try:
    subnetwork.push_to_hub("tester/clip")
except FileExistsError as err:
    facts["refused"] = str(err)
subnetwork.push_to_hub("tester/clip", subfolder="subnetwork")
places = {
    "root": ("tester/subnetwork", {}),
    "commit": ("tester/subnetwork", {"revision": commit.oid}),
    "branch": ("tester/subnetwork", {"revision": "experiment"}),
    "inside": ("tester/clip", {}),
    "subfolder": ("tester/clip", {"subfolder": "subnetwork"}),
}
for name, (repo, options) in places.items():
    again = Subnetwork.from_pretrained(repo, **options)
    outputs[f"subnetwork {name}"] = output_of(again.apply_to(CLIPModel.from_pretrained("tester/base")).model)
    facts[f"subnetwork {name}"] = again.plan == plan and again.source_hashes == subnetwork.source_hashes
missing("revision", "tester/subnetwork", revision="v9")
missing("repository", "tester/nothing")
missing("subnetwork", "tester/tower")
finish("pushed")
"""

LOAD = """
from peft import PeftModel
from transformers import AutoModel, AutoModelForSemanticSegmentation, CLIPModel

for name in ("clip", "tower"):
    outputs[name] = output_of(AutoModel.from_pretrained(f"tester/{name}", trust_remote_code=True))
outputs["tower at tag"] = output_of(AutoModel.from_pretrained("tester/tower", revision="v1", trust_remote_code=True))
for name in ("dense", "tuned"):
    model = AutoModelForSemanticSegmentation.from_pretrained(f"tester/{name}", trust_remote_code=True)
    outputs[name] = output_of(model)
    facts[name] = type(model).__name__
for mode in ("full", "lora"):
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained("tester/base"), f"tester/adapter-{mode}")
    outputs[f"adapter {mode}"] = output_of(model.base_model.model)
facts["package"] = any(name.split(".")[0] == "hf_opentrans" for name in sys.modules)
finish("loaded")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_clip_config, tiny_tokenizer, tiny_image_processor):
    """Return the folder of a tiny stock CLIP."""
    from transformers import CLIPModel

    root = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    for part in (CLIPModel(tiny_clip_config()), tiny_tokenizer, tiny_image_processor):
        part.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def flows(module_hub, tmp_path_factory, folder):
    """Return (outputs, facts) of the process that pushed, and of the one without the package."""
    work = tmp_path_factory.mktemp("work")
    steps = (SETUP, PUSH_MODELS, PUSH_TRAINER, PUSH_ADAPTER, PUSH_DATA, PUSH_SUBNETWORK)
    module_hub.run("\n".join(steps), work, folder)
    module_hub.run(SETUP + LOAD, work, with_package=False)
    read = {name: load_file(work / f"{name}.safetensors") for name in ("pushed", "loaded")}
    facts = {name: json.loads((work / f"{name}.json").read_text()) for name in ("pushed", "loaded")}
    return read["pushed"], facts["pushed"], read["loaded"], facts["loaded"]


def test_models_load_without_the_package(flows):
    pushed, _, loaded, facts = flows
    expected = {"tower": "tower changed", "tower at tag": "tower"}
    for name, value in loaded.items():
        assert torch.equal(value, pushed[expected.get(name, name)]), name
    assert len(loaded) == 7
    assert not facts["package"]
    assert facts["dense"] == "DenseCLIPForSegmentation"
    assert facts["tuned"] == "DeepLabV3PlusForSegmentation"


def test_revisions_load_with_the_package(flows):
    outputs = flows[0]
    assert not torch.equal(outputs["tower"], outputs["tower changed"])
    for name in ("loaded", "at first", "at tag", "at branch"):
        assert torch.equal(outputs[f"tower {name}"], outputs["tower"]), name
    for name in ("at main", "at new branch"):
        assert torch.equal(outputs[f"tower {name}"], outputs["tower changed"]), name


def test_the_code_travels_and_no_pickle_of_ours(flows, module_hub):
    files = module_hub.files("tester/dense")
    assert {"modeling_dense_clip.py", "configuration_sparse_clip.py", "config.json", "model.safetensors"} <= set(files)
    assert json.loads(files["config.json"])["auto_map"]
    pickles = {
        (name, path)
        for name in ("clip", "tower", "dense", "tuned", "adapter-full", "adapter-lora", "subnetwork")
        for path in module_hub.files(f"tester/{name}")
        if path.endswith((".bin", ".pt", ".pkl", ".pth"))
    }
    assert pickles == {("tuned", "training_args.bin")}  # transformers' Trainer writes that one


def test_trainer_pushes(flows, module_hub):
    outputs, facts = flows[:2]
    assert facts["tuned by"] > 1e-4
    assert torch.equal(outputs["tuned"], outputs["tuned loaded"])
    assert {"preprocessor_config.json", "modeling_deeplabv3plus.py"} <= set(module_hub.files("tester/tuned"))
    titles = [commit.title for commit in module_hub.commits("tester/tuned")]
    assert titles[0] == "End of training"
    assert "Training in progress, step 1" in titles


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_adapters(flows, module_hub, mode):
    outputs = flows[0]
    name = f"adapter {mode}"
    assert torch.equal(outputs[name], outputs[f"{name} loaded"])
    assert float((outputs[name] - outputs["base"]).abs().max()) > 1e-3
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(module_hub.files(f"tester/adapter-{mode}"))
    config = json.loads(module_hub.files(f"tester/adapter-{mode}")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tester/base"


def test_data_set(flows, module_hub):
    facts = flows[1]["data"]
    assert facts == {"images": True, "masks": True, "labels": [0, 1, 1, 0], "names": ["cat", "dog"]}
    assert any(path.endswith(".parquet") for path in module_hub.files("tester/pictures", kind="dataset"))


@pytest.mark.parametrize("place", ["root", "commit", "branch", "inside", "subfolder"])
def test_subnetworks(flows, place):
    outputs, facts = flows[:2]
    assert facts[f"subnetwork {place}"]
    torch.testing.assert_close(outputs[f"subnetwork {place}"], outputs["clip"], atol=1e-6, rtol=1e-6)
    assert float((outputs["clip"] - outputs["base"]).abs().max()) > 1e-3


def test_a_subnetwork_leaves_the_model_beside_it_alone(flows, module_hub):
    facts, files = flows[1], module_hub.files("tester/clip")
    assert "holds a model: config.json" in facts["refused"]
    assert "Set subfolder='subnetwork'" in facts["refused"]
    assert {"subnetwork/subnetwork.json", "subnetwork/model.safetensors", "model.safetensors"} <= set(files)
    assert set(module_hub.files("tester/subnetwork")) == {"subnetwork.json", "model.safetensors"}
    assert module_hub.paths("GET").count("/tester/clip/resolve/main/model.safetensors") == 0


def test_missing_subnetworks(flows):
    facts = flows[1]
    assert "The subnetwork 'tester/subnetwork' could not be downloaded (Revision Not Found" in facts["no revision"]
    for name in ("no repository", "no stranger"):
        assert "could not be downloaded (Repository Not Found" in facts[name]
    assert "There is no subnetwork.json in the repository 'tester/tower'" in facts["no subnetwork"]


def test_private_stays_private(flows, module_hub):
    done = module_hub.run(
        """
        from huggingface_hub import HfApi
        names = [f"tester/{name}" for name in ("tuned", "adapter-full", "subnetwork", "clip")]
        pictures = HfApi().repo_exists("tester/pictures", repo_type="dataset")
        print([HfApi().repo_exists(name) for name in names], pictures)
        """,
        with_token=False,
        with_package=False,
    )
    assert done.stdout.split("\n")[0] == "[False, False, False, True] False"


def test_no_token_is_stored_and_no_request_was_unknown(flows, module_hub):
    token = module_hub.environment["HF_TOKEN"].encode()
    for kind, name in module_hub.repositories:
        for revision in module_hub.commits(name, kind=kind):
            assert not any(token in data for data in module_hub.files(name, revision.oid, kind).values())
    stored = [path for path in module_hub.home.rglob("*") if path.is_file() and token in path.read_bytes()]
    assert stored == []
    assert module_hub.unknown == []
