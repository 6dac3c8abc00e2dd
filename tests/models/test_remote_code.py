"""Saved folders load where hf_opentrans cannot be imported: their code travels with them."""

import json
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from hf_opentrans import (
    CATSegForSegmentation,
    DeepLabV3PlusForSegmentation,
    DenseCLIPForSegmentation,
    FCCLIPForSegmentation,
    GKCForSegmentation,
    OpenVocabularyProcessor,
    SparseCLIPConfig,
    Vocabulary,
    apply_masks,
    slice_model,
)
from hf_opentrans.models.pipeline_open_vocabulary import TASK, register_pipeline
from hf_opentrans.pruning import LayerPlan, PruningPlan, to_sparse

LOAD = """
inputs = load_file(f"{folder}/inputs.safetensors")
pixels, ids, text = inputs["pixels"], inputs["ids"], inputs["text"]
kinds = {}
torch.set_grad_enabled(False)
# Copies, because the alignment of memory-mapped weights changes the rounding.
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
for name in ("deeplab", "catseg", "fcclip", "gkc"):
    model = auto.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    kinds[name] = type(model).__name__
    call = load_file(f"{folder}/{name}.safetensors")
    if "region_embeddings" in call:
        call["region_embeddings"] = [call["region_embeddings"]]
    found = copy.deepcopy(model)(**call)
    outputs[f"{name}.loss"], outputs[f"{name}.logits"] = found.loss, found.logits
config = transformers.AutoConfig.from_pretrained(f"{folder}/vision", trust_remote_code=True)
kinds["config"] = type(config).__name__

torch.set_grad_enabled(True)  # pipelines do without gradients by themselves
task = "zero-shot-image-segmentation"
words = {"candidate_labels": ["cat", "sofa; couch"], "background": ["sky"]}
for name in ("segmenter", "trained"):
    pipe = transformers.pipeline(task, model=f"{folder}/{name}", trust_remote_code=True)
    given = pipe(f"{folder}/image.png", **words)
    # Saved again, whole and in its parts.
    pipe.save_pretrained(f"{folder}/{name}-pipeline")
    auto.from_pretrained(f"{folder}/{name}", trust_remote_code=True).save_pretrained(f"{folder}/{name}-parts")
    processor = transformers.AutoProcessor.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    processor.save_pretrained(f"{folder}/{name}-parts")
    kinds[name] = [type(part).__name__ for part in (pipe, pipe.model, pipe.processor, processor)]
    found = [given, pipe(f"{folder}/image.png")]
    for kept in ("pipeline", "parts"):
        again = transformers.pipeline(task, model=f"{folder}/{name}-{kept}", trust_remote_code=True)
        found += [again(f"{folder}/image.png", **words), again(f"{folder}/image.png")]
    for index, masks in enumerate(found):
        outputs[f"{name}.{index}.ids"] = masks.result.segmentation
        outputs[f"{name}.{index}.scores"] = masks.result.scores
    given.save(f"{folder}/{name}.png")
open(f"{folder}/kinds.json", "w").write(json.dumps(kinds))
"""
KINDS = {
    "vision": "SparseCLIPVisionModel",
    "masked": "SparseCLIPVisionModel",
    "projection": "SparseCLIPVisionModelWithProjection",
    "clip": "SparseCLIPModel",
    "dense": "DenseCLIPForSegmentation",
    "config": "SparseCLIPVisionConfig",
    "deeplab": "DeepLabV3PlusForSegmentation",
    "catseg": "CATSegForSegmentation",
    "fcclip": "FCCLIPForSegmentation",
    "gkc": "GKCForSegmentation",
}
QUERIES = {"hidden_dim": 32, "num_queries": 6, "encoder_layers": 1, "decoder_layers": 2, "feedforward_dim": 48}
QUERIES |= {"num_attention_heads": 4, "train_num_points": 64}
COSTS = {"cost_channels": 16, "aggregation_blocks": 1, "window_size": 3, "aggregation_heads": 2}
COSTS |= {"decoder_channels": [8, 4], "guidance_channels": 6, "text_guidance_channels": 5}
HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "deeplab": (DeepLabV3PlusForSegmentation, {"decoder_channels": 8}),
    "catseg": (CATSegForSegmentation, COSTS),
    "fcclip": (FCCLIPForSegmentation, QUERIES),
    "gkc": (GKCForSegmentation, QUERIES),
}
IGNORED = 255
pipeline: Any = transformers.pipeline  # its types know the tasks of transformers alone
PIPELINE, PROCESSOR = "OpenVocabularySegmentationPipeline", "OpenVocabularyProcessor"
KINDS |= {
    "segmenter": [PIPELINE, "DenseCLIPForSegmentation", PROCESSOR, PROCESSOR],
    "trained": [PIPELINE, "DeepLabV3PlusForSegmentation", PROCESSOR, PROCESSOR],
}
WORDS = {"candidate_labels": ["cat", "sofa; couch"], "background": ["sky"]}


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def with_head(name, clip):
    """Return a trained segmenter in evaluation mode; a new head would hide errors, it adds nothing."""
    kind, options = HEADS[name]
    model = kind.from_clip(clip, **options).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs_of_head(name):
    """Return what a trained segmenter is called with, labels among it: an image whose first rows are ignored."""
    side = 8 if name in ("fcclip", "gkc") else 32  # all pixels of small labels count, of others a random choice
    labels = torch.randint(0, 3, (1, side, side))
    labels[:, : side // 4] = IGNORED
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32), "text_embeddings": unit(3, 16), "labels": labels}
    if name == "gkc":
        inputs["region_embeddings"] = unit(len(labels[labels != IGNORED].unique()), 16)
    return inputs


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory, tiny_clip_config, tiny_tokenizer, tiny_image_processor, run_without_package):
    """Save pruned models and segmenters, load them without hf_opentrans; return (folder, expected, found outputs)."""
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
    for name in HEADS:
        inputs = inputs_of_head(name)
        save_file(inputs, folder / f"{name}.safetensors")
        regions = {"region_embeddings": [inputs.pop("region_embeddings")]} if name == "gkc" else {}
        model = with_head(name, dense)
        model.save_pretrained(folder / name)
        with torch.no_grad():
            found = model(**inputs, **regions)
        expected[f"{name}.loss"], expected[f"{name}.logits"] = found.loss, found.logits
    trained = with_head("deeplab", dense)
    for name, model in {"segmenter": dense, "trained": trained}.items():
        model.default_vocabulary = Vocabulary(["dog", "wall"], templates="plain")
        model.save_pretrained(folder / name)
        OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer).save_pretrained(folder / name)
    coarse = np.random.default_rng(0).integers(0, 256, size=(5, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((48, 40)).save(folder / "image.png")
    return folder, expected, run_without_package(LOAD, folder)


@pytest.mark.parametrize("name", ["vision", "masked", "projection", "clip", "dense"])
def test_outputs_are_equal_without_the_package(loaded_elsewhere, name):
    _, expected, outputs = loaded_elsewhere
    assert torch.equal(outputs[name], expected[name])


@pytest.mark.parametrize("name", HEADS)
def test_heads_give_the_same_without_the_package(loaded_elsewhere, name):
    _, expected, outputs = loaded_elsewhere
    assert expected[f"{name}.logits"].std() > 1e-3
    for output in ("loss", "logits"):
        torch.testing.assert_close(outputs[f"{name}.{output}"], expected[f"{name}.{output}"])


def test_the_classes_are_the_travelling_ones(loaded_elsewhere):
    assert json.loads((loaded_elsewhere[0] / "kinds.json").read_text()) == KINDS


@pytest.mark.parametrize("name", ["segmenter", "trained"])
def test_pipelines_give_the_same_masks_without_the_package(loaded_elsewhere, name):
    folder, _, outputs = loaded_elsewhere
    register_pipeline()
    pipe = pipeline(TASK, model=str(folder / name))  # no flag where the package is
    expected = [pipe(folder / "image.png", **WORDS), pipe(folder / "image.png")]
    assert not torch.equal(expected[0].result.segmentation, expected[1].result.segmentation)
    for index in range(6):  # as loaded, and from both folders that were saved again
        found = outputs[f"{name}.{index}.ids"], outputs[f"{name}.{index}.scores"]
        torch.testing.assert_close(found[1], expected[index % 2].result.scores)
        assert torch.equal(found[0], expected[index % 2].result.segmentation)
    with Image.open(folder / f"{name}.png") as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(expected[0].draw()))


@pytest.mark.parametrize("kept", ["segmenter-pipeline", "segmenter-parts", "trained-pipeline", "trained-parts"])
def test_what_is_saved_there_is_complete_here(loaded_elsewhere, kept):
    folder = loaded_elsewhere[0]
    name = kept.partition("-")[0]
    register_pipeline()
    pipes = [pipeline(TASK, model=str(folder / source)) for source in (kept, name)]
    assert type(pipes[0].model) is type(pipes[1].model)
    assert pipes[0].model.default_vocabulary == Vocabulary(["dog", "wall"], templates="plain")
    first, second = (pipe(folder / "image.png", **WORDS).result for pipe in pipes)
    assert torch.equal(first.segmentation, second.segmentation)
    code = {path.name: path.read_bytes() for path in (folder / name).glob("*.py")}
    assert {path.name: path.read_bytes() for path in (folder / kept).glob("*.py")} == code
    before, after = (json.loads((folder / source / "config.json").read_text()) for source in (name, kept))
    for key in ("auto_map", "custom_pipelines", "model_type"):
        assert after[key] == before[key]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("vision", {"configuration_sparse_clip.py", "modeling_sparse_clip.py"}),
        ("dense", {"modeling_dense_clip.py", "vocabulary.py", "pipeline_open_vocabulary.py"}),
        *((name, {f"modeling_{name}.py", "modeling_open_vocabulary.py"}) for name in ("catseg", "fcclip", "gkc")),
        ("trained", {"modeling_deeplabv3plus.py", "pipeline_open_vocabulary.py", "processing_open_vocabulary.py"}),
    ],
)
def test_the_code_lies_beside_the_weights(loaded_elsewhere, name, files):
    folder = loaded_elsewhere[0] / name
    assert files <= {path.name for path in folder.glob("*.py")}
    assert json.loads((folder / "config.json").read_text())["auto_map"]
